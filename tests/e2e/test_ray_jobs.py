"""Cells as jobs of a Ray cluster: a real head node with its job server, on loopback; cells are small programs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from recipe.gtpo.experiments.compare import Cell, RayJob, run_matrix

pytestmark = pytest.mark.e2e

#: Fails in its first attempt; leaves a summary in its second.
PROGRAM = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
if not (folder / "tried").exists():
    (folder / "tried").touch()
    sys.exit("no luck")
(folder / "summary.json").write_text(json.dumps({"steps": [0, 3]}))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def job_server():
    """The address of a cluster's job server. The cluster ends with the test, whatever happens in it."""
    jobs = pytest.importorskip("ray.job_submission")
    address = f"http://127.0.0.1:{(port := free_port())}"
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # pytest's own is too long a path for Ray's sockets
    bin_dir = Path(sys.executable).parent
    options = [f"--port={free_port()}", "--num-cpus=2", f"--temp-dir={folder}", "--disable-usage-stats"]
    dashboard = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    # The agent that takes jobs has one port by default: beside another cluster on this machine there would be none.
    dashboard += [f"--dashboard-agent-listen-port={free_port()}"]
    head = subprocess.Popen(
        [bin_dir / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", *options, *dashboard],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Ray asks for a token as soon as some earlier start on this machine has left one; this process may not have it.
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"},
    )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                # The server answers before there is an agent that takes jobs.
                jobs.JobSubmissionClient(address).submit_job(entrypoint="true")
                break
            except Exception:
                assert head.poll() is None, f"ray start ended with {head.returncode}"
                assert time.monotonic() < until, "no job server in time"
                time.sleep(0.5)
        yield address
    finally:
        head.send_signal(signal.SIGTERM)  # --block: takes the cluster's processes along
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(300)
def test_a_cell_becomes_a_job_that_gets_a_second_attempt(job_server, tmp_path):
    cell = Cell("gtpo", 1, tmp_path / "gtpo-seed1", (sys.executable, "-c", PROGRAM, str(tmp_path / "gtpo-seed1")), 3)
    outcome = run_matrix([cell], lambda command, log: RayJob(command, log, job_server), parallel=1, hours=0.05)
    assert outcome.complete == ["gtpo-seed1"] and not outcome.failed
    log = (cell.dir / "terminal.log").read_text()
    assert log.count(f"at {job_server}") == 2, "each attempt leaves the id of its job"


@pytest.mark.timeout(300)
def test_stopping_a_job_ends_its_process(job_server, tmp_path):
    command = (sys.executable, "-c", f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
               "time.sleep(600)")  # fmt: skip
    job = RayJob(command, tmp_path / "log", job_server)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    assert job.poll() is None
    job.stop()
    wait_until(lambda: job.poll() is not None)
    wait_until(lambda: not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists())
    assert job.poll() == 1


@pytest.mark.timeout(300)
def test_the_script_submits_a_training_as_a_job(job_server):
    """What it would train is printed instead (`--cfg job`): the cluster has no GPU."""
    script = Path(__file__).parents[2] / "examples/ray/submit.sh"
    environment = {**os.environ, "RAY": job_server, "VENV": sys.prefix, "RAY_AUTH_MODE": "disabled"}
    command = ["bash", script, "trainer.nnodes=3", "task=math", "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout and "\n  nnodes: 3\n" in done.stdout and "\n  url: ray\n" in done.stdout


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.2)
