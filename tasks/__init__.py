"""Engine room: Ray actors, Prefect tasks, MLflow tracking; each task makes one call into the library."""
