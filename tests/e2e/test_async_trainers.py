"""verl's two asynchronous trainers with our credit, whole: they train and validate, a stopped one goes on, and the
record says which weights each turn was sampled with."""

from __future__ import annotations

import pytest
from runs import Run, start

from recipe.gtpo.run.progress import validation_accuracy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_rollouts_ahead_on_the_same_devices_and_a_second_start_goes_on_with_them(tmp_path):
    for total in (2, 4):
        with start(tmp_path, "mode=colocate_async", f"trainer.total_training_steps={total}") as run:
            assert run.wait(300) == 0, run.text()[-3000:]
            assert run.left_behind() == []
    assert "going on from the checkpoint of step 2" in run.text()
    check(run, steps=4, prompts=2)


def test_rollouts_on_devices_of_their_own(tmp_path):
    """Two updates between two weight syncs: the old log-probs of the second need the weights from before the first."""
    batch = (
        "data.train_batch_size=4",
        "trainer.v1.separate_async.parameter_sync_step=2",
    )  # of 2 each: TOY's mini-batch
    with start(tmp_path, "mode=separate_async", "trainer.total_training_steps=3", *batch) as run:
        assert run.wait(300) == 0, run.text()[-3000:]
        assert run.left_behind() == []
    check(run, steps=3, prompts=4)


def check(run: Run, steps: int, prompts: int) -> None:
    lines = run.record.read_metrics()
    assert [line["step"] for line in lines] == list(range(steps + 1))
    assert (
        validation_accuracy(lines[0]["metrics"]) is not None and validation_accuracy(lines[-1]["metrics"]) is not None
    )
    # Turns of step 1 are by the first weights, and so are the old log-probs of all its updates.
    assert lines[1]["metrics"]["gtpo/log_prob_gap/mean"] < 1e-4
    ahead = 0
    for step in range(1, steps + 1):
        rows = run.record.read_trajectories(step)
        assert len(rows) == 2 * prompts
        for row in rows:
            assert all(None not in (turn["reward"], turn["advantage"]) for turn in row["turns"])
            spans = [turn["weights"] for turn in row["turns"]]
            assert all(0 <= first <= last < step for first, last in spans)  # known of each, and none from the future
            assert [spans[0][0], spans[-1][1]] == row["weights"]
            ahead += any(last < step - 1 for _, last in spans)
    assert ahead, "every turn was sampled with the newest weights: nothing was ahead"
