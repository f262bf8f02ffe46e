"""The runs of a report: what is read from their records, and which may be compared."""

from __future__ import annotations

import json

import pytest
from recorded_runs import make_run

from recipe.gtpo.experiments.report.runs import Run, load_runs
from recipe.gtpo.run.record import RunRecord

pytestmark = pytest.mark.unit


def test_area_is_the_mean_height_of_the_curve(tmp_path):
    run = Run.load(make_run(tmp_path, "gtpo", 1, {0: 0.0, 1: 0.4, 3: 0.8}))
    # (0 + .4) / 2 over one step, (.4 + .8) / 2 over two
    assert run.area == pytest.approx((0.2 * 1 + 0.6 * 2) / 3)
    assert run.final == 0.8
    assert (run.reached(0.4), run.reached(0.5), run.reached(0.9)) == (1.0, 3.0, None)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        load_runs([tmp_path])
    first = make_run(tmp_path / "a", "gtpo", 1, {0: 0.2, 2: 0.5})
    with pytest.raises(ValueError, match="both gtpo with seed 1"):
        load_runs([first, make_run(tmp_path / "b", "gtpo", 1, {0: 0.2, 2: 0.5})])
    far = make_run(tmp_path / "a", "gtpo", 1, {0: 0.2, 2: 0.5}, horizon=3)
    assert len(load_runs([far, make_run(tmp_path / "b", "gtpo", 1, {0: 0.2, 2: 0.5}, horizon=4)])) == 2
    with pytest.raises(ValueError, match="both gtpo with seed 1 at horizon 3"):
        load_runs([far, make_run(tmp_path / "b", "gtpo", 1, {0: 0.2, 2: 0.5}, horizon=3)])
    with pytest.raises(ValueError, match=r"gtpo-seed1 does not say its horizon, .*gtpo-h3-seed1 does"):
        load_runs([far, first])
    with pytest.raises(ValueError, match="differ in task"):
        load_runs([first, make_run(tmp_path / "c", "grpo", 1, {0: 0.2, 2: 0.5}, task="other")])
    with pytest.raises(ValueError, match="ends at step 3"):
        load_runs([first, make_run(tmp_path / "d", "grpo", 1, {0: 0.2, 3: 0.5})])
    with pytest.raises(ValueError, match="no validation before and after"):
        load_runs([make_run(tmp_path / "e", "grpo", 1, {2: 0.5})])


@pytest.mark.parametrize(
    ("validated", "differing"),
    [((0, 20), "5, 10, 15"), ((5, 10, 15, 20), "0"), ((0, 5, 10, 12, 15, 20), "12")],
    ids=["seldom", "not before training", "once more"],
)
def test_curves_that_were_validated_at_other_steps_are_not_compared(tmp_path, validated, differing):
    """Their learners are alike, and their areas and starts are not."""
    learned = {step: 1 - 2.0 ** (-step / 5) for step in (0, 5, 10, 12, 15, 20)}
    base = make_run(tmp_path, "grpo", 1, {step: learned[step] for step in (0, 5, 10, 15, 20)})
    method = make_run(tmp_path, "gtpo", 1, {step: learned[step] for step in validated})
    assert Run.load(method).final == Run.load(base).final
    with pytest.raises(ValueError, match=rf"only one was validated at step {differing}: not comparable"):
        load_runs([base, method])


def test_seeds_of_two_learning_rates_are_not_pooled(tmp_path):
    runs = [make_run(tmp_path, "gtpo", seed, {0: 0.2, 2: 0.5}) for seed in (1, 2)]
    runs.append(make_run(tmp_path, "grpo", 1, {0: 0.2, 2: 0.5}))
    for run, rate in zip(runs, (3e-5, 1e-4, 1e-4), strict=True):
        path = run / "config.json"
        config = json.loads(path.read_text()) | {
            "actor_rollout_ref.actor.optim.lr": rate,
            "trainer.nnodes": int(1e9 * rate),
        }
        path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"gtpo-seed2 is not another seed of .*gtpo-seed1: .*optim.lr=3e-05 there, 0.0001"
    ):
        load_runs(runs)
    assert len(load_runs([runs[0], runs[2]])) == 2  # a method may have a rate of its own


def test_the_command_is_given_in_the_repository_again(tmp_path):
    folder = make_run(tmp_path, "gtpo", 1, {0: 0.2, 2: 0.5})
    start = {"command": ["somewhere/__main__.py", f"run_dir={folder}", "note=two words"]}
    (folder / "versions.json").write_text(json.dumps([{}, start]))
    summary = json.loads((folder / "summary.json").read_text())
    for engine, module in (("verl", "main"), ("twin", "experiments.twin")):
        (folder / "summary.json").write_text(json.dumps(summary | {"engine": engine}))
        command = f"python -m recipe.gtpo.{module} run_dir=OUT/{folder.name} 'note=two words'"
        assert Run.load(folder).command == command


@pytest.mark.parametrize(
    ("method", "recorded", "name", "reward"),
    [
        ("grpo", None, "grpo_sum", "outcome + format penalties"),  # a record older than the option
        ("dr_grpo", None, "dr_grpo_sum", "outcome + format penalties"),
        ("gtpo", None, "gtpo", "outcome + format penalties"),
        ("grpo", {"trajectory_reward": "min"}, "grpo", "min(outcome, well-formed)"),
        ("rloo", {"trajectory_reward": "outcome"}, "rloo", "the outcome"),
        ("dr_grpo_sum", {"trajectory_reward": "sum"}, "dr_grpo_sum", "outcome + format penalties"),
        ("grpo_sum", {"trajectory_reward": "sum", "format_penalty": 0}, "grpo_sum", "the outcome"),
        ("gtpo", {"trajectory_reward": "sum", "shaping.enable": True}, "gtpo", "shaped outcome + format penalties"),
        ("gtpo", {"trajectory_reward": "outcome", "shaping.enable": False}, "gtpo", "the outcome"),
    ],
)
def test_a_run_says_by_todays_name_which_reward_its_method_compared(tmp_path, method, recorded, name, reward):
    folder = make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5}, reward=None)
    if recorded is not None:
        RunRecord(folder).write_config({f"algorithm.gtpo.{key}": value for key, value in recorded.items()})
    run = Run.load(folder)
    assert (run.method, run.reward, run.ours) == (name, reward, method == "gtpo")


def test_gdpo_compares_parts(tmp_path):
    folder = make_run(tmp_path, "gdpo", 1, {0: 0.2, 2: 0.5}, reward=None)
    RunRecord(folder).write_config({"algorithm.adv_estimator": "recorded_gdpo"})
    assert Run.load(folder).reward == "outcome and well-formed apart"
