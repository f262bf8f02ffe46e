"""The Slurm script without Slurm: its steps, run by stand-ins of srun and scontrol over raylets on this machine.

What only Slurm can show (that it takes the options, that a job's nodes reach each other) is not tested.
"""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from cluster import free_port
from runs import ROOT, start

pytestmark = pytest.mark.timeout(600)

PROGRAMS = {
    # What follows its options is run here; the node that was named is noted.
    "srun": """
while [[ $1 == --* ]]; do [[ $1 != --nodelist=* ]] || node=${1#--nodelist=}; shift; done
echo "$node: ${1##*/} ${*:2}" >>"$SEEN"
exec "$@"
""",
    "scontrol": """
[[ "$*" == "show hostnames n[1-2]" ]] || exit 2
printf "%s\n" n1 n2
""",
    "hostname": "echo 127.0.0.1 fe80::1",
}


@pytest.fixture
def job(tmp_path):
    """A job's environment, with the stand-ins on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (programs / name).chmod(0o755)
    number = free_port()
    yield {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),  # the token of Ray's that the script makes
        "SEEN": str(tmp_path / "seen"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "8",
    }
    shutil.rmtree(f"/tmp/ray-{number}", ignore_errors=True)


def submit(tmp_path, job, *overrides):
    """What sbatch would start on the first node. The overrides make a training on CPUs of it."""
    on_cpu = ("hardware=cpu", "ray_kwargs.ray_init.address=auto", "ray_kwargs.ray_init.num_cpus=null")
    return start(tmp_path, *on_cpu, "tool_server.url=ray", *overrides, script="slurm/train.sbatch", environment=job)


@pytest.mark.e2e
def test_a_job_starts_ray_on_its_nodes_trains_over_them_and_leaves_nothing(tmp_path, job):
    with submit(tmp_path, job, "trainer.total_training_steps=1") as run:
        assert run.wait(300) == 0, run.text()[-3000:]
        assert run.left_behind() == []
    assert run.record.read_summary()["steps"] == [0, 1]
    lines = (tmp_path / "seen").read_text().splitlines()
    name, head, worker = lines
    assert name == "n1: hostname --ip-address"
    assert head.startswith("n1: ray start --block") and "--head" in head and "--num-gpus=1 --num-cpus=8" in head
    port = 20000 + int(job["SLURM_JOB_ID"]) % 10000
    assert worker.startswith("n2: ray start --block") and worker.endswith(f"--address=127.0.0.1:{port}")
    assert (tmp_path / ".ray" / "auth_token").stat().st_size  # nobody else on the network runs code there


@pytest.mark.slow
def test_a_job_that_is_cancelled_leaves_nothing(tmp_path, job):
    with submit(tmp_path, job) as run:
        run.wait_until(lambda: "ray: 2 nodes at" in run.text(), 120)
        run.look()
        run.process.send_signal(signal.SIGTERM)  # scancel, or the time is up
        assert run.wait(60) == 143
        assert run.left_behind() == []


@pytest.mark.e2e
def test_a_job_without_an_environment_says_how_to_make_it(tmp_path, job):
    with submit(tmp_path, job | {"VENV": str(tmp_path / "none")}) as run:
        assert run.wait(20) == 1
        made = f"VENV={tmp_path}/none bash examples/setup_env.sh cpu"
        assert run.last_line() == f"slurm: no environment in {tmp_path}/none; make it: {made}"
