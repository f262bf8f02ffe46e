"""A training over three nodes: a Ray cluster of three raylets on this machine, with code run on each; one is lost.

The tests tell the story in order, over one cluster and one run folder.
"""

from __future__ import annotations

import json
import time

import pytest
from cluster import ENVIRONMENT, cluster
from runs import start

from recipe.gtpo.run.record import RunRecord, latest_checkpoint

pytestmark = pytest.mark.timeout(600)

#: A training process on two of the nodes; verl puts the rest where there are CPUs in Ray's books.
NODES = ({"cpus": 14, "gpus": 1}, {"cpus": 14, "gpus": 1}, {"cpus": 4, "gpus": 0})
#: The policy of the other tests calls no tool. This one has learnt to, if not well.
CALLS = ("task.warm_start={steps: 1, base: {skill: 0.0, check_every: 150}}", "data.max_response_length=null")
#: Has the executor of every node run a program.
RUN_ON_EACH = """
import json
from verl_ext.tool_server import ExecutionRequest
names = [found["name"] for found in ray.util.list_named_actors(all_namespaces=True) if found["namespace"] == "tool_server"]
actors = [ray.get_actor(name, namespace="tool_server") for name in names]
answers = ray.get([actor.run.remote(ExecutionRequest("print(6 * 7)").to_dict()) for actor in actors])
print(json.dumps([[kind, content["output"]] for kind, content, _ in answers]))
"""  # noqa: E501


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, cluster(*NODES) as made:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made.run_folder = tmp_path_factory.mktemp("nodes") / "run"
        yield made


def start_over(nodes, total):
    """The same command, for so many steps."""
    cache = nodes.run_folder.parent / "policy"
    where = (f"ray_kwargs.ray_init.address={nodes.address}", "ray_kwargs.ray_init.num_cpus=null", "trainer.nnodes=2")
    more = ("tool_server.url=ray", f"task.cache={cache}", f"trainer.total_training_steps={total}", *CALLS)
    return start(nodes.run_folder.parent, *where, *more)


@pytest.mark.e2e
def test_a_lost_node_ends_the_run_with_the_cause(nodes):
    with start_over(nodes, total=100000) as run:
        run.wait_for_step(2)
        assert json.loads(nodes.ask(RUN_ON_EACH)) == 3 * [["result", "42\n"]]
        turns = [turn for row in run.record.read_trajectories(2) for turn in row["turns"]]
        calls = {outcome["outcome"] for turn in turns for outcome in turn["outcomes"]}
        assert calls & {"ok", "error", "syntax_error"} and "infra" not in calls
        began = time.monotonic()
        nodes.nodes[1].raylet().kill()
        assert run.wait(60) == 1
        print(f"ended after {time.monotonic() - began:.1f} s: {run.last_line()}")
        assert run.last_line().startswith("gtpo: error: the ") and " died: " in run.last_line()
        assert run.left_behind() == []
        assert list((run.record.dir / "tensorboard").rglob("events.*"))  # not in a folder of some worker's


@pytest.mark.slow
def test_the_same_command_goes_on_when_there_is_another_node(nodes):
    saved = latest_checkpoint(RunRecord(nodes.run_folder).dir / "checkpoints") or 0
    if len(nodes.nodes) == len(NODES) and saved:  # the test before this one has lost one
        nodes.add(**NODES[1])
    with start_over(nodes, total=saved + 1) as run:
        assert run.wait(300) == 0, run.text()[-3000:]
        assert saved == 0 or f"going on from the checkpoint of step {saved}" in run.text()
