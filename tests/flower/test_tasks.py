"""ClientApps as forks: none outlives its SuperNode."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

from fedalt.flower.deploy.tasks import end_with


def test_a_fork_ends_with_the_process_it_works_for() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fork = multiprocessing.get_context("spawn").Process(target=end_with, args=(other.pid,))
    fork.start()
    fork.join(3)
    assert fork.is_alive()
    other.kill()
    other.wait()
    fork.join(60)
    assert fork.exitcode == 1
