"""The benchmark: this project's selection, refit, search and speed, measured beside what others do.

    python -m infra.benchmark --part selection --network lenet --seed 0
    python -m infra.benchmark.render

Every figure goes into a JSON file under `results/` as it is measured; tables and plots are made from these files alone.
"""
