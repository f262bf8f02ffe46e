"""The worked example of the method page: its inputs are read from the page, every other number is recomputed."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from trajectories import trajectory, turn

from recipe.gtpo.estimator import compute_gtpo_advantage, recorded_turns
from recipe.gtpo.method.credit import assign_credit
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.turns import FormatReason

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).parents[3] / "recipe" / "gtpo" / "README.md").read_text()
SECTION = PAGE.split("## Worked example")[1].split("\n## ")[0]


def tables() -> list[list[list[str]]]:
    """The Markdown tables of the section, without their headers, as cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", SECTION, flags=re.MULTILINE)
    return [
        [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in block.splitlines()[2:]]
        for block in blocks
    ]


def test_every_number_of_the_worked_example():
    rows, quantities = tables()
    names = list(dict.fromkeys(row[0] for row in rows))
    codes, trajectories = {}, []
    for name in names:
        mine = [row for row in rows if row[0] == name]
        assert [row[1] for row in mine] == [str(k) for k in range(len(mine))]
        turns = [turn(3 * k, 3 * k + 2, r[2], FormatReason(r[3]) if r[3] else None) for k, r in enumerate(mine)]
        trajectories.append(trajectory(*turns, acc=float(mine[-1][4])))
        codes[name] = trajectories[-1].code
    credit = assign_credit(trajectories, ["prompt"] * len(names), GTPOOptions())
    ids = credit.turn_ids(9)
    rewards = torch.stack(credit.token_rewards([9] * len(names)))
    with recorded_turns(ids, credit.solved):
        advantages, returns = compute_gtpo_advantage(rewards, (ids >= 0).long(), ["prompt"] * len(names))

    first_tokens = [(names.index(row[0]), 3 * int(row[1])) for row in rows]
    for row, (i, t) in zip(rows, first_tokens, strict=True):
        computed = [credit.rewards.combined[i, t // 3], returns[i, t], advantages[i, t]]
        assert row[5:] == [f"{float(value) + 0.0:.4f}" for value in computed], row[:2]

    pool = torch.stack([returns[i, t] for i, t in first_tokens])
    (similarity,) = make_similarity(GTPOOptions().shaping.similarity).compare(
        [([codes["b"], codes["c"]], [codes["a"]])]
    )
    shaped = credit.rewards.shaping.sum(dim=1)
    expected = {
        "similarity of b to a": similarity[0, 0],
        "similarity of c to a": similarity[1, 0],
        "shaped acc of b": shaped[1],
        "shaped acc of c": shaped[2],
        f"mean of the {len(pool)} returns": pool.mean(),
        f"std of the {len(pool)} returns": pool.std(),
    }
    assert dict(quantities) == {name: f"{float(value):.4f}" for name, value in expected.items()}
    # And the sentence between the tables.
    a, b, c = ({*re.findall(r"\w+|[^\w\s]", codes[name])} for name in "abc")
    said = re.search(r"shares (\d+) of (\d+) tokens with b's and (\w+) with c's", SECTION)
    assert said and said.groups() == (str(len(a & b)), str(len(a | b)), "none" if not a & c else "some")


def test_the_page_names_every_option_with_its_default():
    def options(node, prefix=""):
        for name, value in vars(node).items():
            if hasattr(value, "__dataclass_fields__"):
                yield from options(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    table = PAGE.split("## Options")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", table, flags=re.MULTILINE))
    stated = {name: re.match(r"`([^`]*)`", cell) for name, cell in rows.items()}
    words = {True: "true", False: "false"}
    assert {name: m.group(1) if m else "" for name, m in stated.items()} == {
        name: words[value] if isinstance(value, bool) else str(value) for name, value in options(GTPOOptions())
    }


def test_the_page_lists_every_law_with_its_tests():
    """Law n of the list names the tests `test_law_n_...`: one by its name, several by a pattern."""
    tests = re.findall(r"^def (test_law_\w+)", (Path(__file__).parent / "test_laws.py").read_text(), flags=re.MULTILINE)
    listed = re.findall(r"^(\d+)\. .*`(test_law_(\d+)_[\w*]+)`$", PAGE, flags=re.MULTILINE)
    assert [(int(number), int(of_test)) for number, _, of_test in listed] == [(n, n) for n in range(1, 11)]
    assert tests == [name for _, pattern, _ in listed for name in tests if fnmatchcase(name, pattern)]
