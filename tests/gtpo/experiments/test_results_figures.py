"""RESULTS.md says what the JSON files beside it say, and its figures show it."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from composition import names
from PIL import Image
from scipy import stats

from recipe.gtpo.experiments.compare import FAIR
from recipe.gtpo.experiments.results import draw

pytestmark = pytest.mark.unit

PAGE = Path(draw.__file__).parents[1] / "RESULTS.md"
FIRST_CALL = PAGE.parent / "designs" / "5-first-call-decides.md"
TEXT = " ".join(PAGE.read_text().split())
#: Rows of the table "Why": the page's name of a method -> where its runs are.
FIVE_SEEDS = {
    "`dr_grpo_sum`": ("horizon6", "dr_grpo_sum"),
    "`gtpo_turn`, no division": ("horizon6_turn_unscaled", "gtpo_turn"),
    "`gtpo_turn_batch_std`": ("horizon6", "gtpo_turn_batch_std"),
    "`gtpo_turn`": ("horizon6", "gtpo_turn"),
    "`gtpo_undiscounted`": ("horizon6", "gtpo_undiscounted"),
    "`grpo_sum`": ("horizon6", "grpo_sum"),
    "`gtpo`": ("horizon6", "gtpo"),
}


def table_after(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the page, without its header."""
    below = PAGE.read_text().split(f"\n## {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def points(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def measures(name: str) -> dict[str, dict[int, float]]:
    """Final accuracy and area by seed of a row of the table "Why"."""
    file, method = FIVE_SEEDS[name]
    runs = [r for r in draw.load(file)["runs"] if r["method"] == method and r["seed"] in draw.FIVE_SEEDS]
    curves = {r["seed"]: [r["curve"][step] for step in ("0", "10", "20")] for r in runs}
    area = {seed: (start / 2 + middle + end / 2) / 2 for seed, (start, middle, end) in curves.items()}
    return {"final": {seed: heights[-1] for seed, heights in curves.items()}, "area": area}


def paired(ours: str, theirs: str, measure: str) -> str:
    one, other = measures(ours)[measure], measures(theirs)[measure]
    assert one.keys() == other.keys() == draw.FIVE_SEEDS
    differences = np.array([one[seed] - other[seed] for seed in sorted(one)])
    rng = np.random.default_rng(0)
    found = stats.bootstrap((differences,), np.mean, n_resamples=10_000, method="percentile", rng=rng)
    return points(differences.mean(), found.confidence_interval.low, found.confidence_interval.high)


@pytest.mark.parametrize("file", sorted(path.stem for path in draw.RESULTS.glob("*.json")))
def test_every_method_of_a_raw_file_is_one_of_today_and_no_summed_reward_goes_as_another(file):
    found = draw.load(file)
    methods = {entry["method"] for entry in (*found["rows"], *found["runs"])}
    assert methods <= set(names("method"))
    assert not methods & {"grpo", "dr_grpo"}  # all were made before these names meant what they mean


def test_the_first_paragraph_says_what_the_headline_is_against():
    first = PAGE.read_text().split("\n\n")[1]
    claim = draw.difference("horizon6", 6, "gtpo_turn_batch_std", True)
    assert f"{100 * claim.final.mean:+.1f} points" in first and "`grpo_sum`" in first and "summed" in first


def test_main_table():
    expected = [
        [str(d.horizon), str(d.steps), f"`{d.method}`", str(d.seeds)]
        + [points(i.mean, i.low, i.high) for i in (d.final, d.area)]
        for d in draw.main_table()
    ]
    assert [row[:-1] for row in table_after("Main results")] == expected


def test_main_table_says_what_carries_a_claim():
    for row, d in zip(table_after("Main results"), draw.main_table(), strict=True):
        clear = tuple(i.low > 0 or i.high < 0 for i in (d.final, d.area))
        if d.seeds < 16:
            assert not d.tested
            expected = f"no: {d.seeds} seeds"
        elif not d.tested:
            expected = "no: added afterwards"
        else:
            said = {(True, True): "yes, both", (False, True): "area yes, final no"}
            expected = said.get(clear, "no: tested, 0 inside")
        assert row[-1] == expected, row


def test_five_seeds_table():
    rows = table_after("Why: three reasons")
    assert [row[0] for row in rows] == list(FIVE_SEEDS)
    for name, _, final, *differences, _ in rows:
        assert final == f"{np.mean(list(measures(name)['final'].values())):.3f}"
        expected = ["", ""] if name == "`grpo_sum`" else [paired(name, "`grpo_sum`", m) for m in ("final", "area")]
        assert differences == expected, name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("`gtpo_turn`", "`gtpo`"),
        ("`gtpo_undiscounted`", "`gtpo`"),
        ("`gtpo_turn`, no division", "`dr_grpo_sum`"),
        ("`gtpo_turn_batch_std`", "`dr_grpo_sum`"),
    ],
)
def test_differences_in_the_text(ours, theirs):
    mean, interval = paired(ours, theirs, "final").split(" ", 1)
    assert re.search(rf"\b{re.escape(mean[1:])} [^\[\d]*{re.escape(interval)}", TEXT), (mean, interval)


def test_the_answer_has_the_table_s_numbers():
    claim, control = (draw.difference("horizon6", 6, m, False).final for m in ("gtpo_turn_batch_std", "dr_grpo_sum"))
    answer = TEXT.split("## Answer")[1].split("## Main results")[0]
    for said in (points(claim.mean, claim.low, claim.high)[1:], points(control.mean, control.low, control.high)):
        assert said.replace(" [", " points [") in answer or said in answer, said
    assert paired("`gtpo_turn_batch_std`", "`grpo_sum`", "final") in answer


def test_the_first_figure_s_five_seeds_end_where_the_table_says():
    finals = {row[0].strip("`"): row[2] for row in table_after("Why: three reasons")}
    *_, five = draw.curves().values()
    assert {m: f"{points[20].mean:.3f}" for m, points in five.items()} == {m: finals[m] for m in five}


@pytest.mark.parametrize("one", draw.first_call(), ids=lambda one: f"{one.rollouts} rollouts")
def test_the_fifth_design_says_what_came_out(one):
    came_out = " ".join(FIRST_CALL.read_text().split("## What came out")[1].split())
    assert one.seeds == 16
    for method, curve in one.curves.items():
        assert f"{curve[12].mean:.3f} `{method}`" in came_out
    for rival in one.final:
        final, area = (points(d.mean, d.low, d.high) for d in (one.final[rival], one.area[rival]))
        assert f"| `{rival}` | {final} | {area} |" in came_out


def test_the_goal_of_the_fifth_design_is_called_what_it_is():
    best = [one.final[one.best_rival] for one in draw.first_call()]
    reached = len(best) == 2 and all(d.mean >= 0.03 and d.low > 0 for d in best)
    assert not reached and "The goal is missed" in FIRST_CALL.read_text()
    for page in (TEXT, " ".join((PAGE.parents[3] / "README.md").read_text().split())):
        for d in best:
            assert points(d.mean, d.low, d.high) in page


def test_the_sixth_design_shows_its_raw_numbers():
    page = (PAGE.parent / "designs/6-small-real-model.md").read_text()
    rows = draw.csv_rows("small_model.csv")
    names = ("step_0", "step_10", "training_2_to_10")
    for row in rows:
        numbers = " | ".join(f"{float(row[name]):.3f}" for name in names)
        assert f"| {row['seed']} | `{row['method']}` | {numbers} |" in page
    assert page.count("\n| 1") == len(rows) >= 5
    for method in {row["method"] for row in rows}:
        cells = []
        for name in names[1:]:
            cells.append(f"{fmean(draw.by_seed(rows, method, name).values()):.3f}")
            for rival in ("grpo", "grpo_outcome"):
                d = draw.minus(rows, method, rival, name) if method.startswith("gtpo") else None
                cells.append("" if d is None else points(d.mean, d.low, d.high))
        assert " ".join(f"| `{method}` | {' | '.join(cells)} |".split()) in " ".join(page.split())


def test_the_seventh_design_shows_its_raw_numbers():
    page = (PAGE.parent / "designs/7-every-rival.md").read_text()
    rows = draw.csv_rows("every_rival.csv")
    assert [one.method for one in draw.every_rival()] == re.findall(r"(?m)^\| `(\w+)` \| 0\.", page)
    assert {row["method"] for row in rows} == set(FAIR)
    for method in FAIR:
        cells = [f"{fmean(draw.by_seed(rows, method, f'step_{step}').values()):.3f}" for step in (0, 10, 20)]
        for ours in ("gtpo_turn_batch_std", "gtpo"):
            d = None if method == ours else draw.minus(rows, ours, method, "step_20")
            cells.append("" if d is None else points(d.mean, d.low, d.high))
        assert " ".join(f"| `{method}` | {' | '.join(cells)} |".split()) in page


def test_what_is_said_elsewhere_of_the_seventh_design_is_what_came_out():
    """The best rival's accuracy, and both settings of GTPO minus it."""
    rows = draw.csv_rows("every_rival.csv")
    best = next(one.method for one in draw.every_rival() if not one.method.startswith("gtpo"))
    readme = " ".join((PAGE.parents[3] / "README.md").read_text().split())
    for ours in ("gtpo_turn_batch_std", "gtpo"):
        d = draw.minus(rows, ours, best, "step_20")
        assert points(d.mean, d.low, d.high) in TEXT and points(d.mean, d.low, d.high) in readme
    for one in draw.every_rival():
        assert one.method not in (best, "gtpo_turn_batch_std", "gtpo") or f"{one.final.mean:.3f}" in TEXT


def test_the_seventh_design_s_praise_of_wrong_answers_is_on_its_page():
    page = " ".join((PAGE.parent / "designs/7-every-rival.md").read_text().split())
    for row in draw.csv_rows("praise_of_wrong.csv"):
        first, last = (100 * float(row[half]) for half in draw.HALVES)
        assert first == last == 0 or f"`{row['method']}` {first:.0f}% and {last:.0f}%" in page
    assert sum(one.praise == 0 for one in draw.every_rival()) == 6


def test_what_silencing_unsolved_groups_changes_is_on_its_page():
    page = " ".join((PAGE.parent / "designs/7-every-rival.md").read_text().split())
    before, after = draw.csv_rows("every_rival.csv"), draw.csv_rows("unsolved_groups_zero.csv")
    for method in ("gtpo", "gtpo_turn_batch_std"):
        seeds = draw.by_seed(after, method, "step_20").keys()
        both = [row | {"method": "before"} for row in before if row["method"] == method and int(row["seed"]) in seeds]
        d = draw.minus([*both, *after], method, "before", "step_20")
        mean = fmean(draw.by_seed(after, method, "step_20").values())
        assert re.search(rf"`{method}` {re.escape(points(d.mean, d.low, d.high))}[^`]* to {mean:.3f}", page)


def test_figures_show_today_s_numbers():
    shown = {
        draw.CURVES: draw.curves(),
        draw.DIFFERENCES: draw.drawn_differences(),
        draw.MAP: draw.leads(),
        draw.FIRST_CALL: draw.first_call(),
        draw.EVERY_RIVAL: draw.every_rival(),
    }
    pages = [PAGE, *(PAGE.parent / "designs").glob("*.md")]
    images = [(page.parent, path) for page in pages for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page.read_text())]
    assert {(folder / path).resolve() for folder, path in images} == set(shown)
    for path, numbers in shown.items():
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            assert image.info["Description"] == draw.fingerprint(numbers), (
                "draw again: python -m recipe.gtpo.experiments.results.draw"
            )


@pytest.mark.parametrize("page", [PAGE, *sorted((PAGE.parent / "designs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []
