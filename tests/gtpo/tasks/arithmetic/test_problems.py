"""Laws of the generated task: determinism, splits, the one-step-a-call limit, the score, the file format."""

from __future__ import annotations

import itertools

import pytest

from recipe.gtpo.tasks.arithmetic.problems import (
    HORIZON,
    MAX_CODE_LENGTH,
    MAX_STEPS,
    SYMBOLS,
    VALUE_RANGE,
    Limits,
    compute_score,
    sample_problems,
    step_mix,
    take,
    tool_schema,
)
from recipe.gtpo.tasks.arithmetic.task import Arithmetic

pytestmark = pytest.mark.unit

EVERY_HORIZON = dict.fromkeys(range(1, MAX_STEPS + 1), 1.0)


def test_same_arguments_give_the_same_problems():
    assert take(sample_problems("train", 7), 50) == take(sample_problems("train", 7), 50)
    assert take(sample_problems("train", 7), 50) != take(sample_problems("train", 8), 50)


def test_splits_share_no_numbers_whatever_the_seeds():
    drawn = {
        split: {(p.start, p.steps) for seed in range(3) for p in take(sample_problems(split, seed), 1000)}
        for split in ("train", "validation")
    }
    assert not drawn["train"] & drawn["validation"]
    # by construction, not by luck: the numbers alone name the split
    for split, problems in drawn.items():
        assert {p.split for p in take(sample_problems(split, 9), 200)} == {split}
        assert len(problems) > 2000


def test_a_stream_does_not_repeat_itself():
    problems = take(sample_problems("validation", 1, {1: 1.0}), 3000)
    assert len({(p.start, p.steps) for p in problems}) == len(problems)


def test_mix_is_the_distribution_of_step_counts():
    counts = [len(p.steps) for p in take(sample_problems("train", 1, {1: 1, 3: 3}), 2000)]
    assert set(counts) == {1, 3}
    assert counts.count(3) / len(counts) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("mix", [{}, {0: 1.0}, {MAX_STEPS + 1: 1.0}, {1: -1.0, 2: 2.0}, {1: 0.0}])
def test_malformed_mix_raises(mix):
    with pytest.raises(ValueError, match="the mix must map step counts"):
        next(sample_problems("train", 1, mix))


def test_the_horizon_is_the_longest_chain_and_sets_the_limits():
    assert step_mix(1) == {1: 1.0}
    assert step_mix(4) == {3: 0.4, 4: 0.6}
    assert take(sample_problems("train", 1), 20) == take(sample_problems("train", 1, step_mix(HORIZON)), 20)
    assert Limits.of(4) == Limits(prompt=128, response=320, turns=7)
    for horizon in (0, MAX_STEPS + 1):
        with pytest.raises(ValueError, match=f"horizon={horizon}: the task has 1 to {MAX_STEPS}"):
            step_mix(horizon)


def test_unknown_split_raises_with_the_valid_names():
    with pytest.raises(ValueError, match="splits: train, validation"):
        next(sample_problems("test", 1))


def test_every_value_is_too_long_for_mental_arithmetic_and_short_enough_to_copy():
    for problem in take(sample_problems("train", 2, EVERY_HORIZON), 2000):
        assert all(VALUE_RANGE[0] <= value <= VALUE_RANGE[1] for value in problem.values)
        assert len(problem.values) == len(problem.steps) + 1


def test_one_step_fits_the_limit_and_two_never_do():
    """The law that makes k steps k dependent calls, on generated problems of every length."""
    for problem in take(sample_problems("train", 3, EVERY_HORIZON), 2000):
        for value, step in zip(problem.values, problem.steps, strict=False):
            assert len(f"{value}{SYMBOLS[step.operation]}{step.operand}") <= MAX_CODE_LENGTH
        for value, (one, two) in zip(problem.values, itertools.pairwise(problem.steps), strict=False):
            # without the parentheses that precedence may need: the shortest text that any formulation can have
            both = f"{value}{SYMBOLS[one.operation]}{one.operand}{SYMBOLS[two.operation]}{two.operand}"
            assert len(both) > MAX_CODE_LENGTH, problem


def test_schema_carries_the_limit():
    assert tool_schema()["function"]["parameters"]["properties"]["code"]["maxLength"] == MAX_CODE_LENGTH
    assert tool_schema(20)["function"]["parameters"]["properties"]["code"]["maxLength"] == 20


def test_question_tells_every_number_in_order():
    for problem in take(sample_problems("train", 4, EVERY_HORIZON), 200):
        numbers = [int(word.strip(".")) for word in problem.question.split() if word.strip(".").isdigit()]
        assert numbers == [problem.start, *(step.operand for step in problem.steps)]


@pytest.mark.parametrize(
    ("text", "acc", "pred"),
    [
        (r"The answer is \boxed{1234567}.", 1.0, "1234567"),
        (r"\boxed{1,234,567}", 1.0, "1234567"),
        (r"\boxed{1 234 567}", 1.0, "1234567"),
        (r"\boxed{ 1234567 }", 1.0, "1234567"),
        (r"\boxed{01234567}", 1.0, "1234567"),
        (r"\boxed{+1234567}", 1.0, "1234567"),
        (r"first \boxed{1}, then \boxed{1234567}", 1.0, "1234567"),
        (r"\boxed{1234567} or \boxed{7}", 0.0, "7"),
        (r"\boxed{-1234567}", 0.0, "-1234567"),
        (r"\boxed{12345678}", 0.0, "12345678"),
        (r"\boxed{12,34567}", 0.0, "12,34567"),
        (r"\boxed{1234567.0}", 0.0, "1234567.0"),
        (r"\boxed{about 1234567}", 0.0, "about 1234567"),
        ("1234567", 0.0, ""),
        (r"\boxed{1234567", 0.0, ""),
        ("", 0.0, ""),
    ],
)
def test_score_compares_integers_exactly(text, acc, pred):
    assert compute_score("arithmetic", text, "1234567") == {"score": acc, "acc": acc, "pred": pred}


def test_files_are_what_verls_dataset_reads(tmp_path):
    """Through verl's own RLHFDataset, so that a missing column or a wrong type fails here."""
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    sizes = {"train_problems": 12, "validation_problems": 5, "final_problems": 5}
    files = Arithmetic(name="arithmetic", seed=1, horizon=2, success=0.2, cache=str(tmp_path), **sizes).write_data()
    config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(tmp_path / "cache")})
    for (split, path), size in zip(files.items(), (12, 5), strict=True):
        dataset = RLHFDataset(path, tokenizer=None, config=config)
        expected = take(sample_problems(split, 1), size)
        assert len(dataset) == size
        for index, problem in enumerate(expected):
            row = dataset[index]
            assert row["raw_prompt"] == problem.messages
            assert row["reward_model"] == {"style": "rule", "ground_truth": str(problem.answer)}
            assert row["agent_name"] == "gtpo_agent"
            assert row["index"] == index
            info = row["extra_info"]
            assert (info["split"], info["operations"], info["steps"]) == (split, problem.operations, len(problem.steps))
    assert not list(tmp_path.rglob(".*.parquet*")), "a partial file was left behind"
