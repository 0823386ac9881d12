"""A Ray cluster of one head and nodes that can be lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.faults.processes import kill, worker_pids

_OBJECT_STORE = 100 * 2**20


class Engines:
    """The cluster; this process is connected to its head, which runs no worker."""

    def __init__(self, num_nodes: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **_node_arguments()})
        for _ in range(num_nodes):
            self.add_node()
        self._cluster.wait_for_nodes()
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        self.session = Path(self._cluster.head_node.get_session_dir_path()).name

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self) -> None:
        self._cluster.add_node(num_cpus=1, wait=False, **_node_arguments())

    def kill_node(self, number: int) -> None:
        """Kill all processes of a node at once, and have another one take its place."""
        nodes = list(self._cluster.worker_nodes)
        self._cluster.remove_node(nodes[number % len(nodes)], allow_graceful=False)
        self.add_node()

    def kill_worker(self, number: int) -> str:
        """Kill one of this project's actors, a busy one if there is one; returns which kind it was."""
        busy = worker_pids(self.session, busy=True)
        pids = busy or worker_pids(self.session)
        if not pids:
            return "none was up"
        kill(pids[number % len(pids)])
        return "busy" if busy else "idle"

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)  # the cluster sets it


def _node_arguments() -> dict[str, Any]:
    return {"object_store_memory": _OBJECT_STORE, "include_dashboard": False}
