"""A part of the run dies: the run ends non-zero within 60 s, says which part, and leaves no process."""

from __future__ import annotations

import pytest
from runs import start

# (part of the process's command line, what the last line must name)
PARTS = [
    pytest.param("ray::TransformersServer", "the rollout server died", id="rollout-server"),
    pytest.param("ray::WorkerDict", "the training worker died", id="training-worker"),
    pytest.param("ray::AgentLoopWorkerTQ", "the agent loop worker died", id="agent-loop-worker"),
    pytest.param("-m verl_ext.tool_server", "the tool server died", id="tool-server"),
]


@pytest.mark.e2e
@pytest.mark.parametrize(("title", "named"), PARTS)
def test_the_run_ends_and_names_the_dead_part(tmp_path, title, named):
    with start(tmp_path, "trainer.total_training_steps=100000", "watchdog.poll_seconds=2") as run:
        run.wait_for_step(1)
        run.find(title).kill()
        status = run.wait(60)
        assert status != 0
        assert run.last_line().startswith("gtpo: error: ") and named in run.last_line(), run.text()[-2000:]
        assert run.left_behind() == []
