"""Design 8: what an effect is."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe.gtpo.experiments.results import parts

pytestmark = pytest.mark.unit

COSTS = {"gamma 1 minus 0.9": 0.01, "shaping off minus on": 0.02, "the same turn minus the group": 0.04}
BOTH = 0.08  # of shaping off and the same turn together


def accuracy(setting: parts.Setting | None, seed: int) -> float:
    """Of a world in which each part costs the same wherever it is, but for `BOTH`."""
    if setting is None:
        return 0.5 + seed / 100
    without = {name for name, (field, remedy) in parts.EFFECTS.items() if getattr(setting, field) == remedy}
    both = BOTH * ({"shaping off minus on", "the same turn minus the group"} <= without)
    return 0.1 + seed / 100 + sum(COSTS[name] for name in without) + both


def rows(seeds=(1, 2, 3)) -> list[dict[str, str]]:
    return [
        dict(zip(("method", "gamma", "shaping"), setting or (parts.RIVAL, "", ""), strict=True))
        | {"seed": str(seed), "step_0": "0.1", "step_10": "0.3", "step_20": repr(accuracy(setting, seed))}
        for setting in (*parts.SETTINGS, None)
        for seed in seeds
    ]


def test_an_effect_is_the_mean_over_the_four_pairs_that_differ_in_it_alone():
    numbers = parts.read("final", rows())
    found = {name: parts.effect(numbers, name).mean for name in parts.EFFECTS}
    shared = BOTH / 2  # two of the four pairs have it
    assert found == pytest.approx(
        {
            "gamma 1 minus 0.9": 0.01,
            "shaping off minus on": 0.02 + shared,
            "the same turn minus the group": 0.04 + shared,
        }
    )


def test_alone_is_what_one_remedy_changes_in_the_published_form():
    numbers = parts.read("final", rows())
    assert {name: parts.alone(numbers, name).mean for name in parts.EFFECTS} == pytest.approx(COSTS)


def test_a_setting_over_the_rival_that_has_no_turns():
    numbers = parts.read("final", rows())
    found = {name: parts.over_rival(numbers, setting).mean for name, setting in parts.OVER_RIVAL.items()}
    assert found == pytest.approx(
        {
            "the same turn, discount and shaping on": 0.1 + 0.04 - 0.5,
            "turns by themselves: all three remedies": 0.1 + sum(COSTS.values()) + BOTH - 0.5,
        }
    )


def test_differences_are_paired_by_seed():
    """The seeds differ by points, the differences do not: no interval."""
    found = parts.effect(parts.read("final", rows()), "gamma 1 minus 0.9")
    assert found.count == 3 and (found.low, found.high) == pytest.approx((0.01, 0.01))


def test_the_area_is_the_mean_height_of_the_curve():
    numbers = parts.read("area", rows(seeds=(0,)))
    assert numbers[None][0] == pytest.approx((0.1 / 2 + 0.3 + 0.5 / 2) / 2)


def test_a_seed_that_a_setting_lacks_is_an_error():
    lacking = [row for row in rows() if not (row["seed"] == "2" and row["gamma"] == "1.0" and row["shaping"] == "true")]
    with pytest.raises(ValueError, match=r"lack seeds.*gamma='1.0', shaping='true'"):
        parts.read("final", lacking)


def test_the_page_shows_what_the_file_has():
    page = (Path(parts.__file__).parents[1] / "designs/8-parts.md").read_text()
    assert [line for line in parts.lines() if line not in page] == []
