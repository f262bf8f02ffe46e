"""The map of credit: its toy is what it says, its exact gradient is exact, and the page shows the file's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from recipe.gtpo.experiments import credit_map
from recipe.gtpo.experiments.compare import FAIR
from recipe.gtpo.experiments.credit_map import Cell, Chain
from recipe.gtpo.method.estimators import turn_values

pytestmark = pytest.mark.unit

CELLS = [Cell(2, 4, 0.4, 0.0), Cell(3, 4, 0.1, 0.5, 2, "first"), Cell(3, 4, 0.4, 1.0, 1, "last")]
PAGE = Path(credit_map.__file__).parent / "RESULTS.md"


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_chain_succeeds_as_often_as_asked(cell):
    chain = Chain(cell)
    assert float(chain.success(chain.logits)) == pytest.approx(cell.success)
    sample = chain.sample(5000, torch.Generator().manual_seed(0))
    assert sample.solved.float().mean() == pytest.approx(cell.success, abs=0.02)
    assert not sample.solved[sample.astray.any(dim=1)].any()
    if not cell.recoverable:
        assert not sample.broken.any()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_exact_gradient_is_reach_times_advantage(cell):
    """By the policy-gradient theorem, with the values of `worth`: another way to the same numbers."""
    chain = Chain(cell)
    value, quality = chain.worth()
    p = chain.probabilities
    reach, expected = 1.0, torch.zeros(chain.rows, chain.actions, dtype=torch.float64)
    for turn in range(cell.horizon):
        go, mend = 2 * turn, 2 * turn + 1
        tries = reach * float(p[go, -1])
        for row, reached in ((go, reach), (mend, tries)):
            expected[row] = reached * p[row] * (quality[row] - value[row])
        reach = reach * float(p[go, : chain.right].sum()) + tries * float(p[mend, : chain.right].sum())
    torch.testing.assert_close(chain.exact_gradient(), expected.flatten())
    assert reach == pytest.approx(cell.success)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_unbiased_methods_point_where_the_exact_gradient_does(cell):
    chain = Chain(cell)
    exact = chain.exact_gradient()
    sample = chain.sample(6000, torch.Generator().manual_seed(1))

    def check(advantages):
        found = credit_map.gradients(chain, sample, advantages)
        error = (found.var(dim=0) / len(found)).sum().sqrt()
        assert (found.mean(dim=0) - exact).norm() <= 2.5 * error < exact.norm() / 3

    for name in ("rloo", "state", "state, lone", "bootstrap"):
        estimator, divide, options = credit_map.method(name)
        check(turn_values(estimator, sample.credit(options), options, divide=divide)[1])
    for kind in credit_map.ORACLES.values():
        check(credit_map.oracle(chain, sample, kind))


def test_states_are_a_tree_and_a_wrong_call_leads_elsewhere():
    sample = Chain(CELLS[0]).sample(500, torch.Generator().manual_seed(2))
    for turn in range(1, sample.states.shape[1]):
        rows = sample.states[:, turn] >= 0
        parents: dict[int, set[int]] = {}
        for state, parent in zip(
            sample.states[rows, turn].tolist(), sample.states[rows, turn - 1].tolist(), strict=True
        ):
            parents.setdefault(state, set()).add(parent)
        assert all(len(found) == 1 for found in parents.values())
        astray = sample.astray[:, turn]
        assert not set(sample.states[rows & astray, turn].tolist()) & set(sample.states[rows & ~astray, turn].tolist())


def test_a_state_is_of_one_prompt_and_one_turn():
    """GiGPO compares all turns in a state, whatever their index."""
    sample = Chain(CELLS[0]).sample(500, torch.Generator().manual_seed(2))
    places: dict[int, set[tuple[int, int]]] = {}
    for i, turn in (sample.states >= 0).nonzero().tolist():
        places.setdefault(int(sample.states[i, turn]), set()).add((int(sample.group[i]), turn))
    assert all(len(found) == 1 for found in places.values())


def test_a_rerun_of_a_cell_gives_what_the_file_has(tmp_path):
    """Cosines to a hundredth: another machine's rounding may move a trajectory or two."""
    cell = Cell(2, 4, 0.1, 0.5)
    found = {row.method: row for row in credit_map.measure(cell)}
    kept = credit_map.by_cell(credit_map.read())[cell]
    assert found.keys() == kept.keys()
    for name, row in found.items():
        assert row.cosine == pytest.approx(kept[name].cosine, abs=0.01), name
    credit_map.write(list(found.values()), tmp_path / "map.csv")
    assert credit_map.read(tmp_path / "map.csv") == list(found.values())


def test_the_file_has_every_method_in_every_cell():
    found = credit_map.by_cell(credit_map.read())
    assert list(found) == list(credit_map.cells())
    assert all(list(rows) == [*credit_map.METHODS, *credit_map.ORACLES] for rows in found.values())


def test_the_rivals_of_the_map_are_those_of_the_fair_set():
    ours = {"gtpo", "gtpo_turn_batch_std"}
    assert {credit_map.METHODS[name][0] for name in credit_map.RIVALS} == {*FAIR} - ours | {"dr_grpo_sum"}


def test_the_pages_claims_are_the_files():
    """Points 1 and 3: where credit by state is ahead of the best rival of the cell, and by how much."""
    found = credit_map.by_cell(credit_map.read())
    rest = [name for name in credit_map.METHODS if name not in credit_map.RIVALS]

    def over_rivals(names, **wanted) -> list[float]:
        at = [rows for cell, rows in found.items() if all(getattr(cell, key) == v for key, v in wanted.items())]
        return [max(r[n].cosine for n in names) - max(r[n].cosine for n in credit_map.RIVALS) for r in at]

    assert len(over_rivals(rest, wordings=1)) == 120 and max(over_rivals(rest, wordings=1)) < 0.001
    first, last, even = (
        {name: over_rivals([name], wordings=4, risk=risk) for name in credit_map.BY_STATE}
        for risk in ("first", "last", "even")
    )
    both = first["within state"] + last["within state"]
    assert len(both) == 12 and (round(min(both), 3), round(max(both), 3)) == (0.029, 0.235)
    ahead = {risk: sum(v > 0 for v in of["bootstrap"]) for risk, of in (("f", first), ("l", last), ("e", even))}
    assert ahead == {"f": 1, "l": 6, "e": 5} and sum(v > 0 for v in even["within state"]) == 4
    assert sum(v > 0 for of in (first, last, even) for v in of["state"]) == 1


@pytest.mark.parametrize("stepping", ["one length", "adam"])
def test_the_page_says_what_is_learnt(stepping):
    """One row of its table again, to a hundredth: another machine may round a choice otherwise."""
    cell = credit_map.LEARNT[0]
    (row,) = re.findall(rf"^\| {cell.risk}, {cell.wordings} \| {stepping} \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    shown = [float(one.split()[0]) for one in row.split(" | ")]
    for name in ("gigpo", "within state"):
        values = [credit_map.learn(cell, name, seed, stepping) for seed in range(16)]
        assert sum(values) / 16 == pytest.approx(shown[credit_map.LEARNERS.index(name)], abs=0.01)


def test_the_pages_tables_are_the_files():
    tables = credit_map.show(credit_map.read()).strip().split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert table.strip() in re.sub(r"\*\*", "", PAGE.read_text())
