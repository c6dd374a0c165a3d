"""Jobs in processes: results in order, a crash costs one job, nobody outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colfolio.data.preparing.workers import run_jobs

pytestmark = pytest.mark.slow  # starts processes


def run(work, jobs, processes):
    done = []
    results = run_jobs(work, jobs, processes, done.append, lambda job: f"crashed at {job}")
    assert sorted(done) == list(range(len(jobs)))
    return results


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_jobs(processes):
    assert run(abs, [-3, 5, -1, 0], processes) == [3, 5, 1, 0]


def test_no_jobs_are_no_results():
    assert run(abs, [], 2) == []


def test_an_error_of_a_job_is_raised():
    with pytest.raises(ValueError, match="invalid literal"):
        run(int, ["1", "x"], 2)


CRASHING = """
import os, sys
from colfolio.data.preparing.workers import run_jobs

def work(number):
    if number == 3:
        os._exit(1)
    return number

if __name__ == "__main__":
    print(run_jobs(work, range(6), 2, lambda number: None, lambda job: f"crashed at {job}"))
"""


def test_a_crash_costs_only_the_job_that_crashed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CRASHING)
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[0, 1, 2, 'crashed at 3', 4, 5]"


WAITING = """
import os, sys, time
from pathlib import Path
from colfolio.data.preparing.workers import run_jobs

def work(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    run_jobs(work, [sys.argv[1]] * 2, 2, lambda number: None, lambda job: None)
"""


def is_alive(process):
    """Whether a process runs; one that is dead but not yet collected by its new parent does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_workers_die_with_a_killed_parent(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "processes"
    script.write_text(WAITING)
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, script, folder])
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [int(path.name) for path in folder.iterdir()]
    assert len(workers) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))
