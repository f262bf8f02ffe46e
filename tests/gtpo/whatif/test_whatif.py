"""What-if: the numbers are those that the run recorded, and the exported page's are those of the method."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from composition import METHODS, compose
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from trajectories import trajectory, turn

from recipe.gtpo import whatif
from recipe.gtpo.experiments.draw_credit import EXAMPLE
from recipe.gtpo.method.credit import assign_credit
from recipe.gtpo.method.estimators import ESTIMATORS, turn_values
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.similarity import SimilarityError, make_similarity
from recipe.gtpo.method.turns import Finish, FormatReason, Trajectory
from recipe.gtpo.run.identity import flatten
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.trajectories import Numbers, Row, training_lines
from recipe.gtpo.whatif import arithmetic
from verl_ext.viewer.runs import Run

pytestmark = pytest.mark.unit

RECORD = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]


def never() -> list[str]:
    raise AssertionError("asked for code where every similarity is recorded")


def row(record: dict[str, Any]) -> dict[str, Any]:
    """What the viewer's index keeps of a recorded trajectory."""
    turns = [
        {"tokens": t["end"] - t["start"], "broken": t["broken"], "said": str(t["outcomes"])} for t in record["turns"]
    ]
    found = Trajectory.from_dict(record)
    kept = {name: record[name] for name in ("group", "finish", "acc")}
    return kept | {"outcome": found.raw_outcome, "code": bool(found.code.strip()), "similar": None, "turns": turns}


ROWS = [row(record) for record in RECORD]
CODES = [Trajectory.from_dict(record).code for record in RECORD]


def advantages(**settings: Any) -> list[list[float]]:
    answers = whatif.recompute(ROWS, settings, None, lambda: CODES)
    return [[turn["advantage"] for turn in answer["turns"]] for answer in answers]


def test_with_the_runs_own_settings_the_advantages_are_those_it_recorded():
    for computed, record in zip(advantages(**whatif.settings_of(None)), RECORD, strict=True):
        assert computed == pytest.approx(record["advantages"], abs=1e-6)


def test_a_run_from_before_the_format_rule_charged_all_reasons():
    assert whatif.settings_of({"algorithm.gtpo.gamma": 1.0})["format_rule"] == "strict"
    assert whatif.settings_of({"algorithm.gtpo.format_rule": "paper"})["format_rule"] == "paper"
    assert whatif.settings_of(None)["format_rule"] == GTPOOptions().format_rule


def test_as_grpo_every_turn_has_the_advantage_of_its_trajectory():
    computed = advantages(**whatif.presets()["grpo_sum"])
    assert all(len({*turns}) == 1 for turns in computed)
    assert computed[7][0] == pytest.approx(0.79, abs=0.005)  # the README's picture


def test_a_presets_settings_are_those_of_a_run_with_that_method():
    presets = whatif.presets()
    assert sorted(presets) == METHODS
    for method in ("gtpo_turn_batch_std", "dr_grpo", "gigpo"):
        config = compose(f"method={method}").algorithm
        of_run = whatif.settings_of(flatten({"algorithm": OmegaConf.to_container(config)}))
        assert of_run == whatif.defaults() | presets[method]


def test_a_preset_leaves_what_no_method_sets_to_the_run():
    for preset in whatif.presets().values():
        assert {"estimator", "divide", "gamma", "baseline", "scale", "shaping.enable"} <= preset.keys()
        assert preset.keys().isdisjoint({"format_rule", "format_penalty", "shaping.alpha", "min_pool", "truncated"})


def test_every_estimator_of_the_recipe_can_be_asked_for():
    (control,) = [control for control in whatif.controls() if control["name"] == "estimator"]
    assert control["choices"] == ESTIMATORS


def test_an_option_without_a_control_is_the_runs_on_the_server_and_refused_by_an_exported_page(monkeypatch):
    """So a new option needs no control to be right."""
    assert whatif.uncontrolled({"algorithm.gtpo.gamma": 0.5}) == {}
    config = {"algorithm.gtpo.gamma": 0.5, "algorithm.gtpo.format_rule": "paper"}
    with_control = whatif.recompute(ROWS, whatif.settings_of(config), config, lambda: CODES)
    left = [control for control in whatif.controls() if control["name"] != "gamma"]
    monkeypatch.setattr(whatif, "controls", lambda: left)
    assert whatif.uncontrolled(config) == {"gamma": 0.5}
    assert whatif.recompute(ROWS, whatif.settings_of(config), config, lambda: CODES) == with_control


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 2.0}, "gamma"),
        ({"estimator": "gae"}, "estimator"),
        ({"gama": 0.5}, "gama"),
        ({"shaping.alpha": 1.0}, "alpha"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        advantages(**settings)


def test_missing_similarities_are_computed_from_the_code_and_then_recorded_ones_give_the_same():
    similar, missing, _ = whatif.similarities(ROWS, None, lambda: CODES)
    assert missing == 0
    recorded = [one | {"similar": found} for one, found in zip(ROWS, similar, strict=True)]
    settings = whatif.settings_of(None)
    assert whatif.recompute(recorded, settings, None, never) == whatif.recompute(ROWS, settings, None, lambda: CODES)


class Backend:
    """Notes what it is asked about, and answers 0.25, or nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.error = error
        monkeypatch.setattr(arithmetic, "make_similarity", lambda options: self)

    def compare(self, groups: Any) -> list[np.ndarray]:
        self.asked += groups
        if self.error:
            raise self.error
        return [np.full((len(a), len(b)), 0.25) for a, b in groups]


def coded(acc: float, finish: str = "answer", similar: dict[int, float] | None = None, group: str = "a") -> dict:
    turns = [{"tokens": 1, "broken": None, "said": "7"}]
    kept = {"group": group, "finish": finish, "acc": acc, "outcome": acc, "code": True}
    return kept | {"similar": similar, "turns": turns}


#: truncated=drop: one failure was compared, one was cut. In group b all was, in c nothing.
PARTLY = [
    coded(1.0),
    coded(0.0, similar={0: 0.9}),
    coded(0.0, "length"),
    coded(0.0, "infra"),
    coded(1.0, "fault"),
    coded(1.0, group="b"),
    coded(0.0, similar={5: 0.8}, group="b"),
    coded(0.0, "infra", group="b"),
    coded(1.0, group="c"),
    coded(1.0, group="c"),
    coded(0.0, group="c"),
]


def test_an_export_keeps_what_is_recorded_and_asks_only_for_what_is_missing_and_may_be_needed(monkeypatch):
    backend = Backend(monkeypatch)
    similar, missing, why = whatif.similarities(PARTLY, None, lambda: [f"code {i}" for i in range(len(PARTLY))])
    assert backend.asked == [(["code 2"], ["code 0"]), (["code 10"], ["code 8", "code 9"])]
    assert (missing, why) == (0, "")
    compared = {i: found for i, found in enumerate(similar) if found}
    assert compared == {1: {0: 0.9}, 2: {0: 0.25}, 6: {5: 0.8}, 10: {8: 0.25, 9: 0.25}}


def test_pairs_that_the_backend_cannot_compare_are_left_out_and_counted(monkeypatch):
    Backend(monkeypatch, SimilarityError("http://gone: refused"))
    similar, missing, why = whatif.similarities(PARTLY, None, lambda: [""] * len(PARTLY))
    assert (missing, why) == (3, "http://gone: refused")
    assert {i: found for i, found in enumerate(similar) if found} == {1: {0: 0.9}, 6: {5: 0.8}}


def test_a_trajectory_that_the_tool_server_failed_is_no_reason_to_ask():
    rows = [coded(1.0), coded(0.0, similar={0: 0.8}), coded(0.0, "infra")]
    assert whatif.similarities(rows, None, never) == ([{}, {0: 0.8}, {}], 0, "")


# -- any options ------------------------------------------------------------------------------------------------------


def random_trajectory(draw: random.Random) -> Trajectory:
    turns, at = [], 0
    for _ in range(draw.randint(1, 4)):
        start, end = at + draw.randint(0, 2), at + 2 + draw.randint(1, 5)
        code = draw.choice(["", "a = 1", "b = a + 1", "print(3 * 4)"])
        outcome = draw.choice(["ok", "ok", "error", "malformed"])
        broken = draw.choice([None, None, *FormatReason])
        turns.append(turn(start, end, code, broken, outcome, said=draw.choice(["", "7", "8"])))
        at = end
    finish = draw.choice([Finish.ANSWER] * 6 + [Finish.LENGTH, Finish.TURN_LIMIT, Finish.INFRA])
    acc = float(draw.random() < 0.5)
    return replace(trajectory(*turns, acc=acc, finish=finish), outcome=draw.choice([None, 0.3, -1.0]))


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_whatever_the_options_the_advantages_of_a_run_follow_from_its_record(draw):
    chosen = random_settings(draw)
    keys = {name: whatif.OF_VERL.get(name, f"algorithm.gtpo.{name}") for name in chosen}
    config = {keys[name]: value for name, value in chosen.items()}
    of_run = {name.removeprefix("algorithm.gtpo."): v for name, v in config.items() if ".gtpo." in name}
    options = GTPOOptions.from_config(nested(of_run))
    trajectories = [random_trajectory(draw) for _ in range(draw.randint(1, 10))]
    groups = [draw.choice("ab") for _ in trajectories]
    credit = assign_credit(trajectories, groups, options, make_similarity(options.shaping.similarity))
    _, trained = turn_values(chosen["estimator"], credit, options, divide=chosen["divide"])
    numbers = Numbers.of(credit, trained, chosen["estimator"], options)
    rows = [Row(group, session) for session, group in enumerate(groups)]
    with TemporaryDirectory() as folder:
        RunRecord(folder).write_config(config)
        RunRecord(folder).write_trajectories(1, training_lines(1, 1, trajectories, rows, numbers))
        run = Run(Path(folder), whatif, Path(folder) / "cache")
        run.index.update()
        answers = run.recompute("train", 1, run.settings)
        recorded = [[turn["advantage"] for turn in row["turns"]] for row in run.rows("train", 1)]
    assert len(recorded) == len(trajectories)
    for answer, known in zip(answers, recorded, strict=True):
        if answer["dropped"]:
            assert set(known) == {None}
        else:
            assert [one["advantage"] for one in answer["turns"]] == pytest.approx(known, rel=1e-4, abs=1e-4)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


# -- the exported page ------------------------------------------------------------------------------------------------


def random_rows(draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    for _ in range(draw.randint(1, 14)):
        acc = draw.choice([None, 0.0, 0.0, 1.0, 1.0])
        turn = [
            {
                "tokens": (tokens := draw.randint(1, 9)),
                "masked": draw.choice([None, 0, 0, draw.randint(0, tokens), tokens]),
                "broken": draw.choice([None] * 6 + ["no_answer", "invalid_json"]),
                "said": draw.choice(["", "7", "8"]),
            }
            for _ in range(draw.randint(1, 5))
        ]
        finish = draw.choice(["answer"] * 6 + ["length", "turn_limit", "infra", "fault"])
        outcome = None if acc is None else draw.choice([acc, acc, 0.3, -1.0])
        group = draw.choice("abc")
        known = {"group": group, "update": int(group == "c"), "finish": finish}
        rows.append(known | {"acc": acc, "outcome": outcome, "turns": turn})
    for one in rows:
        one["code"] = any(turn["said"] for turn in one["turns"]) and draw.random() < 0.8
        one["similar"] = {at: draw.choice([0.0, 1.0, draw.random()]) for at in range(len(rows))}
    return rows


def random_settings(draw: random.Random) -> dict[str, Any]:
    def value(control: dict[str, Any]) -> Any:
        if "choices" in control:
            return draw.choice(control["choices"])
        if control["name"] == "min_pool":
            return draw.randint(2, 6)
        return draw.choice([control["low"], control["high"], draw.uniform(control["low"], control["high"])])

    return {control["name"]: value(control) for control in whatif.controls()}


#: Those that whiten over the batch. Where all is equal they divide rounding, 1e-7, by 1e-4 (as verl does), and GDPO's
#: two parts may cancel up to 1e-6.
WHITENING = ("reinforce_plus_plus", "recorded_gdpo")


def agree(a: Any, b: Any, share: float) -> bool:
    """Whether b, in float64, is a, in float32: every number to that share of the larger of it and 1."""
    if isinstance(b, dict):
        return all(agree(a[key], b[key], share) for key in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(agree(x, y, share) for x, y in zip(a, b, strict=True))
    return a is b if a is None or b is None else abs(a - b) <= share * max(1.0, abs(a))


def in_node(script: str, cases: Any, folder: Path) -> Any:
    """What `script` makes of `cases`, with `viewerCredit` there."""
    driver = pytest.importorskip(
        "playwright._impl._driver", reason="needs the node of playwright (requirements/dev.txt)"
    )
    node = Path(driver.compute_driver_executable()[0])
    (folder / "cases.json").write_text(json.dumps(cases))
    script = (
        f"require({json.dumps(str(whatif.JAVASCRIPT))}); const cases = JSON.parse(require('fs').readFileSync(0));"
        f"console.log(JSON.stringify({script}))"
    )
    with (folder / "cases.json").open() as stdin:
        done = subprocess.run([node, "-e", script], stdin=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_exported_pages_formulas_are_the_methods_on_a_thousand_groups(tmp_path):
    draw = random.Random(16)
    cases = [(random_rows(draw), random_settings(draw)) for _ in range(1000)]
    computed = [whatif.recompute(rows, settings, None, never) for rows, settings in cases]
    answers = in_node("cases.map(([rows, s]) => viewerCredit.recompute(rows, s))", cases, tmp_path)
    assert sum(len(row["turns"]) for case in answers for row in case) > 10_000
    shares = [2e-2 if settings["estimator"] in WHITENING else 1e-3 for _, settings in cases]
    wrong = [case for case, *found in zip(cases, computed, answers, shares, strict=True) if not agree(*found)]
    assert not wrong, json.dumps(wrong[0])


def test_a_batch_is_that_of_one_update():
    """separate_async: several updates a step, each with its own standard deviation."""
    draw = random.Random(7)
    differ = 0
    for _ in range(100):
        rows, settings = random_rows(draw), random_settings(draw) | {"shaping.enable": False}
        whole = whatif.recompute(rows, settings, None, never)
        for update in (0, 1):
            own = [i for i, row in enumerate(rows) if row["update"] == update]
            assert [whole[i] for i in own] == whatif.recompute([rows[i] for i in own], settings, None, never)
        differ += whole != whatif.recompute([row | {"update": 0} for row in rows], settings, None, never)
    assert differ > 10


def test_what_rollout_correction_left_out_weighs_nothing_in_the_mean_over_tokens():
    """REINFORCE++ on turns of two tokens with returns 1 and 0: +-0.5 over the root of 4 * 0.25 / 3. The third is not in
    the mean; its return is."""

    def one(acc, masked):
        turns = [{"tokens": 2, "masked": masked, "broken": None, "said": ""}]
        known = {"group": "a", "finish": "answer", "acc": acc, "outcome": acc, "code": False, "similar": None}
        return known | {"turns": turns}

    rows = [one(1.0, 0), one(0.0, None), one(1.0, 2)]
    settings = whatif.presets()["reinforce_plus_plus"]
    (up,), (down,), (left_out,) = (answer["turns"] for answer in whatif.recompute(rows, settings, None, never))
    assert (up["advantage"], down["advantage"]) == pytest.approx((0.75**0.5, -(0.75**0.5)), rel=1e-5)
    assert left_out["return"] == 1.0


def test_an_exported_page_refuses_what_needs_a_similarity_that_it_has_not(tmp_path):
    chosen = [{"truncated": "drop"}, {"truncated": "keep"}, {"truncated": "keep", "shaping.enable": False}]
    cases = [[PARTLY[:4], whatif.settings_of(None) | some] for some in chosen]
    attempt = "try { return viewerCredit.recompute(rows, s)[2].shaped } catch (e) { return e.message }"
    dropped, needed, unshaped = in_node(f"cases.map(([rows, s]) => {{ {attempt} }})", cases, tmp_path)
    assert (dropped, unshaped) == (None, 0) and "whose similarity is not in this page" in needed


def test_the_advantage_is_the_sum_of_its_parts():
    draw = random.Random(5)
    for _ in range(100):
        rows, settings = random_rows(draw), random_settings(draw)
        settings["estimator"] = draw.choice(["gtpo", settings["estimator"]])
        for answer in whatif.recompute(rows, settings, None, never):
            for one in answer["turns"]:
                if settings["estimator"] in ("gtpo", "grpo", "rloo"):
                    assert sum(one["advantage_parts"].values()) == pytest.approx(one["advantage"], rel=1e-3, abs=1e-3)
                else:
                    assert one["advantage_parts"] == {}
