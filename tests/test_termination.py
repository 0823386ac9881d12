"""SIGTERM reaches a driver that waits for its workers, whoever handles it."""

from __future__ import annotations

import subprocess
import sys

import pytest

DRIVER = """
import signal, sys, time
from entprune.runner import Work
from tasks.actors import RayRunner
from tasks.cluster import connect

class Terminated(BaseException):
    pass

def handle(*_):
    raise Terminated

def last_long(shared, item):
    time.sleep(100)

is_first = sys.argv[1] == "handler first"
if is_first:
    signal.signal(signal.SIGTERM, handle)
with connect(None, workers=1) as cluster:
    if not is_first:
        signal.signal(signal.SIGTERM, handle)
    with RayRunner(cluster) as runner:
        runner.settle()
        print("waits", flush=True)
        try:
            runner.run(last_long, [Work(shared=runner.share(0), item=0)], stage="test")
        except Terminated:
            print("heard", flush=True)
"""


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.parametrize("order", ["handler first", "cluster first"])  # as in a flow run of a worker, and in a command
def test_a_driver_that_waits_for_a_long_unit_hears_it(order: str) -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER, order], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "waits\n"
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(2)  # it waits in Ray by now
            driver.terminate()
            assert driver.communicate(timeout=60)[0] == "heard\n"
        finally:
            driver.kill()
