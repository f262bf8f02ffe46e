"""Where credit by turn can pay: how well a step's gradient points, method by method, on a toy whose own is known.

    python -m recipe.gtpo.experiments.credit_map            # measures: results/credit_map.csv, some six minutes
    python -m recipe.gtpo.experiments.credit_map --show     # the tables of RESULTS.md from that file, at once
    python -m recipe.gtpo.experiments.credit_map --learn    # trains on three cells, a minute

The toy is a chain of `horizon` calls, then an answer, under a tabular softmax policy with a row of logits a turn. In a
turn the policy makes the right call (in one of `wordings` ways, which the tool answers alike), or it errs: a wrong call
(one of four results that look like any other: nothing mends it, and the policy, which cannot tell, goes on), an answer
too early, or, for the share `recoverable` of all errors, a malformed call, which is refused, charged as a broken
format, and can be mended in the next turn. The outcome is 1 when the last number is right. `success` sets how often
that is: all turns err equally often (`risk=even`), or all the risk is in the first call (`first`) or in the last
(`last`), but for one error in fifty turns.

The exact gradient is that of the success rate by the logits, by dynamic programming. A method's is the mean over
`rollouts` trajectories of a prompt, advantage times score, with the recipe's own rewards, shaping and advantages. What
is reported, over `BATCHES` steps of 16 prompts: the mean cosine between a step's gradient and the exact one; the cosine
of their mean (1 without bias, but for noise); and the noise, the variance of a prompt's gradient over the square of its
mean's part along the exact one: how many prompts a step needs until signal and noise are level. Scales cancel in all
three. What is scaled or whitened over a batch is so over all prompts measured.

What the toy leaves out: tokens (a turn is one choice), parameters shared between turns, the optimiser, prompts that
differ. The last flatters what centres by the batch (`reinforce_plus_plus`): its mean is what every prompt is worth.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from recipe.gtpo.method.credit import REASONS, Credit
from recipe.gtpo.method.estimators import turn_values
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.rewards import assign_turn_rewards
from recipe.gtpo.method.shaping import shape_outcomes
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.turns import FormatReason

FILE = Path(__file__).parent / "results" / "credit_map.csv"
METHOD_FILES = Path(__file__).parents[1] / "config" / "method"
PROMPTS, BATCHES = 16, 120
WRONG = 4  # results that a wrong call can have
MALFORMED = REASONS.index(FormatReason.INVALID_JSON)

#: Name -> (method of the config, further options of `algorithm.gtpo`). The first are what GTPO's parts cost.
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gtpo": ("gtpo", {}),
    "gtpo, no discount": ("gtpo", {"gamma": 1.0}),
    "gtpo, no shaping": ("gtpo", {"shaping": {"enable": False}}),
    "gtpo, scale none": ("gtpo", {"scale": "none"}),
    "gtpo, turn pool": ("gtpo", {"baseline": "turn"}),
    "gtpo, none of these": ("gtpo", {"gamma": 1.0, "scale": "none", "shaping": {"enable": False}}),
    "turn_batch_std": ("gtpo_turn_batch_std", {}),
    "turn_batch_std, no discount": ("gtpo_turn_batch_std", {"gamma": 1.0}),
    "turn_batch_std, no shaping": ("gtpo_turn_batch_std", {"shaping": {"enable": False}}),
    "turn_batch_std, neither": ("gtpo_turn_batch_std", {"gamma": 1.0, "shaping": {"enable": False}}),
    "state": ("gtpo_state", {}),
    "state, penalty": ("gtpo_state", {"trajectory_reward": "sum"}),
    "state, lone": ("gtpo_state", {"lone_state": "lone"}),
    "state, prior 8": ("gtpo_state", {"state_prior": 8.0}),
    "bootstrap": ("gtpo_bootstrap", {}),
    "bootstrap, prior 8": ("gtpo_bootstrap", {"state_prior": 8.0}),
    "within state": ("gtpo_within_state", {}),
    "grpo": ("grpo", {}),
    "grpo_outcome": ("grpo_outcome", {}),
    "dr_grpo": ("dr_grpo", {}),
    "dr_grpo_sum": ("dr_grpo_sum", {}),
    "rloo": ("rloo", {}),
    "reinforce_plus_plus": ("reinforce_plus_plus", {}),
    "gdpo": ("gdpo", {}),
    "gigpo": ("gigpo", {}),
    "mt_grpo": ("mt_grpo", {}),
}
ORACLES: Mapping[str, str] = {"exact values": "value", "exact advantages": "advantage"}
RIVALS = (
    *("grpo", "grpo_outcome", "dr_grpo", "dr_grpo_sum", "rloo"),
    *("reinforce_plus_plus", "gdpo", "gigpo", "mt_grpo"),
)
BY_STATE = ("state", "bootstrap", "within state")


@dataclass(frozen=True)
class Cell:
    horizon: int
    rollouts: int
    success: float
    recoverable: float
    wordings: int = 1
    risk: str = "even"


def cells() -> Iterator[Cell]:
    """Every horizon, group and success rate with and without errors that can be mended; then, at one horizon and one
    group, how the call may be worded and where the risk is."""
    for horizon, rollouts, success, recoverable in itertools.product(
        (2, 4, 6, 8), (4, 8, 16), (0.02, 0.1, 0.4), (0.0, 0.5, 1.0)
    ):
        yield Cell(horizon, rollouts, success, recoverable)
    for success, recoverable, wordings, risk in itertools.product(
        (0.02, 0.1, 0.4), (0.0, 0.5), (1, 4), ("even", "first", "last")
    ):
        if (wordings, risk) != (1, "even"):
            yield Cell(6, 8, success, recoverable, wordings, risk)


class Chain:
    """A cell's policy. Row `2 k` of the logits is turn k's, row `2 k + 1` what mends a malformed call of it.

    Actions: the `wordings` of the right call, then wrong, early answer, malformed.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.right = cell.wordings
        self.rows, self.actions = 2 * cell.horizon, cell.wordings + 3
        self.logits = self._logits()

    def _logits(self) -> torch.Tensor:
        cell = self.cell
        safe = 0.98
        risky = {"even": range(cell.horizon), "first": [0], "last": [cell.horizon - 1]}[cell.risk]

        def rate(p: float) -> float:  # of passing a turn in which a share p of the choices is right
            return p + (1 - p) * cell.recoverable * p

        rest = rate(safe) ** (cell.horizon - len(risky))
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if rate(middle) ** len(risky) * rest < cell.success else (low, middle)
        logits = torch.full((self.rows, self.actions), -math.inf, dtype=torch.float64)
        for turn in range(cell.horizon):
            p = high if turn in risky else safe
            for row, malformed in ((2 * turn, cell.recoverable), (2 * turn + 1, 0.0)):
                lasting = (1 - p) * (1 - malformed) / 2
                shares = [p / cell.wordings] * cell.wordings + [lasting, lasting, (1 - p) * malformed]
                logits[row] = torch.tensor(shares, dtype=torch.float64).log()
        return logits

    @property
    def probabilities(self) -> torch.Tensor:
        return self.logits.softmax(dim=1)

    def success(self, logits: torch.Tensor) -> torch.Tensor:
        """The success rate, by dynamic programming from the last turn."""
        p = logits.softmax(dim=1)
        value = torch.ones((), dtype=p.dtype)
        for turn in reversed(range(self.cell.horizon)):
            go, mend = p[2 * turn], p[2 * turn + 1]
            value = (go[: self.right].sum() + go[-1] * mend[: self.right].sum()) * value
        return value

    def exact_gradient(self) -> torch.Tensor:
        """(rows * actions,) of the success rate by the logits."""
        logits = self.logits.clone().requires_grad_()
        self.success(logits).backward()
        assert logits.grad is not None
        return torch.nan_to_num(logits.grad).flatten()  # an action that is never taken has none

    def worth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """V (rows,) and Q (rows, actions) of whoever has not gone astray; who has is worth 0."""
        p = self.probabilities
        after, value, quality = torch.ones((), dtype=p.dtype), torch.zeros(self.rows), torch.zeros(p.shape)
        value, quality = value.double(), quality.double()
        for turn in reversed(range(self.cell.horizon)):
            for row in (2 * turn + 1, 2 * turn):
                quality[row, : self.right] = after
                quality[row, -1] = value[row + 1] if row == 2 * turn else 0.0
                value[row] = (p[row] * quality[row]).sum()
            after = value[2 * turn]
        return value, quality

    def sample(self, prompts: int, generator: torch.Generator, *, programs: bool = True) -> Sample:
        """`prompts` groups of trajectories; `programs`: with what their calls execute, which only shaping reads."""
        cell, count = self.cell, prompts * self.cell.rollouts
        turns = 2 * cell.horizon + 1
        row = torch.full((count, turns), -1)
        action = torch.full((count, turns), -1)
        states = torch.full((count, turns), -1)
        astray = torch.zeros(count, turns, dtype=torch.bool)
        group = torch.arange(count) // cell.rollouts
        # The prompt and what the tools have said so far, as digits in base 8: 1 refused, 2 the right number, 3 and up a
        # wrong one. From `prompts` on, so that no prompt's number is another one's with a digit behind it.
        heard = prompts + group
        at = torch.zeros(count, dtype=torch.long)  # the row of the logits; `rows` once all calls are made
        right, running = torch.ones(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
        solved = torch.zeros(count, dtype=torch.bool)
        codes = [""] * count
        probabilities = self.probabilities
        for turn in range(turns):
            states[running, turn] = heard[running]
            astray[:, turn] = ~right
            answers = running & (at == self.rows)  # all calls are made: nothing is left to choose
            solved |= answers & right
            calls = running & ~answers
            if not calls.any():
                break
            chosen = torch.zeros(count, dtype=torch.long)
            chosen[calls] = torch.multinomial(probabilities[at[calls]], 1, generator=generator)[:, 0]
            row[calls, turn], action[calls, turn] = at[calls], chosen[calls]
            good = calls & (chosen < self.right)
            wrong, malformed = calls & (chosen == self.right), calls & (chosen == self.right + 2)
            result = 3 + torch.randint(WRONG, (count,), generator=generator)
            if programs:
                for i in (good | wrong).nonzero().squeeze(1).tolist():
                    step = int(at[i]) // 2
                    codes[i] += f"v{step} {'+' if good[i] else '*'} o{step}\n"
            right &= ~wrong
            # Whoever has gone astray hears other numbers, also after a right call; the tree of states sees to it.
            said = torch.where(malformed, 1, torch.where(good, 2, result))
            heard = heard * (4 + WRONG) + said
            running = running & (good | wrong | malformed | answers) & ~answers
            at = torch.where(malformed, at + 1, at - at % 2 + 2).clamp_max(self.rows)
        exists = states >= 0
        length = int(exists.any(dim=0).sum())
        _, states = torch.unique(states[:, :length], return_inverse=True)
        exists = exists[:, :length]
        return Sample(
            row[:, :length],
            action[:, :length],
            torch.where(exists, states, -1),
            astray[:, :length],
            group,
            solved,
            action[:, :length] == self.right + 2,
            codes,
        )


@dataclass(frozen=True)
class Sample:
    """B trajectories of T turns at most."""

    row: torch.Tensor  # (B, T) whose probabilities the choice of a turn had, -1: nothing was chosen
    action: torch.Tensor  # (B, T)
    states: torch.Tensor  # (B, T), -1 where there is no turn
    astray: torch.Tensor  # (B, T) bool: there was a wrong call before
    group: torch.Tensor  # (B,)
    solved: torch.Tensor  # (B,) bool
    broken: torch.Tensor  # (B, T) bool
    codes: list[str]

    def credit(self, options: GTPOOptions) -> Credit:
        """As `credit.assign_credit` makes it of recorded trajectories."""
        mask = self.states >= 0
        outcomes = self.solved.float()
        groups = tuple(map(str, self.group.tolist()))
        shaped = outcomes
        if options.shaping.enable:
            similarity = make_similarity(options.shaping.similarity)
            shaped = shape_outcomes(
                outcomes, self.solved, self.codes, groups, similarity, options.shaping.alpha
            ).outcomes
        ends = torch.cumsum(mask.long(), dim=1)
        return Credit(
            group_ids=groups,
            valid=torch.ones_like(self.solved),
            dropped=torch.zeros_like(self.solved),
            outcomes=outcomes,
            solved=self.solved,
            turn_mask=mask,
            spans=torch.stack((ends - mask.long(), ends), dim=2),
            reasons=torch.where(self.broken, MALFORMED, -1),
            charged=self.broken,
            states=self.states,
            rewards=assign_turn_rewards(
                outcomes,
                shaped,
                self.broken,
                mask,
                format_penalty=options.format_penalty,
                turn_rewards=options.turn_rewards,
                trajectory_reward=options.trajectory_reward,
            ),
            shaped=shaped,
            partners=((),) * len(outcomes),
        )


def oracle(chain: Chain, sample: Sample, kind: str) -> torch.Tensor:
    """(B, T) what an advantage would be that knew the policy's exact values: what credit by turn can reach at most.

    `value`: the outcome minus V of the state. `advantage`: Q - V, so that nothing is left of the sampled outcome.
    """
    value, quality = chain.worth()
    row, on_the_way = sample.row.clamp_min(0), (sample.row >= 0) & ~sample.astray
    expected = torch.where(on_the_way, value[row], 0.0)
    got = sample.solved[:, None].double()
    if kind == "advantage":
        got = torch.where(on_the_way, quality[row, sample.action.clamp_min(0)], 0.0)
    return torch.where(sample.row >= 0, got - expected, 0.0)


def method(name: str) -> tuple[str, bool, GTPOOptions]:
    """Estimator, `norm_adv_by_std_in_grpo` and options of an entry of METHODS."""
    file, further = METHODS[name]
    algorithm = yaml.safe_load((METHOD_FILES / f"{file}.yaml").read_text())["algorithm"]
    options = GTPOOptions.from_config({**algorithm.get("gtpo", {}), **further})
    return algorithm["adv_estimator"], algorithm.get("norm_adv_by_std_in_grpo", True), options


def gradients(chain: Chain, sample: Sample, advantages: torch.Tensor) -> torch.Tensor:
    """(prompts, rows * actions) float64: the mean over a prompt's trajectories of advantage times score."""
    prompts = int(sample.group.max()) + 1
    chose = sample.row >= 0
    weight = advantages[chose].double()
    owner = sample.group[:, None].expand_as(sample.row)[chose]
    place = (owner * chain.rows + sample.row[chose]) * chain.actions + sample.action[chose]
    taken = torch.zeros(prompts * chain.rows * chain.actions, dtype=torch.float64).index_add_(0, place, weight)
    taken = taken.view(prompts, chain.rows, chain.actions)
    expected = taken.sum(dim=2, keepdim=True) * chain.probabilities
    return ((taken - expected) / chain.cell.rollouts).flatten(1)


@dataclass(frozen=True)
class Row:
    """A method in a cell: a line of the file."""

    horizon: int
    rollouts: int
    success: float
    recoverable: float
    wordings: int
    risk: str
    method: str
    cosine: float  # of a step's gradient with the exact one, mean over steps
    error: float  # standard error of it
    mean_cosine: float  # of the mean of all steps
    noise: float  # prompts a step until signal and noise are level


def measure(cell: Cell, seed: int = 0) -> list[Row]:
    """Every method on the same trajectories."""
    chain = Chain(cell)
    exact = chain.exact_gradient()
    direction = exact / exact.norm()
    sample = chain.sample(PROMPTS * BATCHES, torch.Generator().manual_seed(seed))
    rows = []
    for name in (*METHODS, *ORACLES):
        if name in ORACLES:
            advantages = oracle(chain, sample, ORACLES[name])
        else:
            estimator, divide, options = method(name)
            _, advantages = turn_values(estimator, sample.credit(options), options, divide=divide)
        found = gradients(chain, sample, advantages)
        steps = found.view(BATCHES, PROMPTS, -1).mean(dim=1)
        cosines = torch.cosine_similarity(steps, exact[None], dim=1)
        mean = found.mean(dim=0)
        noise = (found - mean).square().sum(dim=1).mean() / (mean @ direction).square()
        rows.append(
            Row(
                **asdict(cell),
                method=name,
                cosine=round(float(cosines.mean()), 4),
                error=round(float(cosines.std()) / BATCHES**0.5, 4),
                mean_cosine=round(float(torch.cosine_similarity(mean, exact, dim=0)), 4),
                noise=float(f"{float(noise):.4g}"),
            )
        )
    return rows


#: Where the map has a difference, and where it has none.
LEARNT = (
    Cell(6, 8, 0.1, 0.0, 4, "first"),
    Cell(6, 8, 0.1, 0.0, 4, "last"),
    Cell(6, 8, 0.1, 0.0, 1, "even"),
)
LEARNERS = ("grpo_outcome", "dr_grpo", "reinforce_plus_plus", "gigpo", *BY_STATE)


Stepping = Literal["one length", "adam"]


def learn(cell: Cell, name: str, seed: int, stepping: Stepping, steps: int = 10) -> float:
    """The exact success rate after `steps` steps on a method's gradients, of 16 prompts each.

    `one length`: a step goes 0.3 along the gradient, whatever its size, so what points elsewhere is lost. `adam`: rate
    0.1, and every logit has its own step, so what moves one takes nothing from another.
    """
    chain = Chain(cell)
    generator = torch.Generator().manual_seed(seed)
    estimator, divide, options = method(name)
    logits = chain.logits.flatten().clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.1, maximize=True)
    for _ in range(steps):
        chain.logits = logits.detach().view(chain.rows, chain.actions)
        sample = chain.sample(PROMPTS, generator, programs=options.shaping.enable)
        _, advantages = turn_values(estimator, sample.credit(options), options, divide=divide)
        found = gradients(chain, sample, advantages).mean(dim=0)
        if stepping == "adam":
            logits.grad = found
            adam.step()
        elif found.any():
            logits.data += 0.3 * found / found.norm()
    return float(chain.success(logits.detach().view(chain.rows, chain.actions)))


def learnt(cell: Cell, stepping: Stepping, seeds: int = 16) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([learn(cell, name, seed, stepping) for seed in range(seeds)]) for name in LEARNERS}


def show_learning() -> str:
    """A table: the success rate at the end, mean over 16 seeds, and its difference from the best rival's of these,
    paired."""
    text = ["| risk, wordings | steps | " + " | ".join(LEARNERS) + " |", "| --- |" + " --- |" * (len(LEARNERS) + 1)]
    for stepping in get_args(Stepping):
        for cell in LEARNT:
            found = learnt(cell, stepping)
            best = max((name for name in LEARNERS if name in RIVALS), key=lambda name: float(found[name].mean()))
            shown = []
            for name, values in found.items():
                difference = 100 * (values - found[best])
                half = 2.131 * float(difference.std()) / len(values) ** 0.5  # Student's t, 15 degrees of freedom
                over = "" if name in RIVALS else f" ({float(difference.mean()):+.1f} ± {half:.1f})"
                shown.append(f"{float(values.mean()):.3f}{over}")
            text.append(f"| {cell.risk}, {cell.wordings} | {stepping} | " + " | ".join(shown) + " |")
    return "\n".join(text)


def write(rows: list[Row], file: Path = FILE) -> None:
    with file.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(map(astuple, rows))


def read(file: Path = FILE) -> list[Row]:
    with file.open(newline="") as f:
        return [
            Row(
                **{
                    field.name: {"int": int, "float": float, "str": str}[str(field.type)](line[field.name])
                    for field in fields(Row)
                }
            )
            for line in csv.DictReader(f)
        ]


def by_cell(rows: list[Row]) -> dict[Cell, dict[str, Row]]:
    found: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        cell = Cell(*(getattr(row, field.name) for field in fields(Cell)))
        found.setdefault(cell, {})[row.method] = row
    return found


def lead(methods: Mapping[str, Row]) -> float:
    """What the figure shows of a cell: the mean cosine of the best credit by state minus that of the best rival, both
    chosen by what is shown."""
    ours, theirs = (max(methods[name].cosine for name in names) for names in (BY_STATE, RIVALS))
    return ours - theirs


def show(rows: list[Row]) -> str:
    """The tables of RESULTS.md: mean cosines by success rate and horizon, and by wording and risk; bias and noise."""
    found = by_cell(rows)

    def mean(name: str, **wanted: Any) -> float:
        values = [
            methods[name].cosine
            for cell, methods in found.items()
            if all(getattr(cell, key) == value for key, value in wanted.items())
        ]
        return statistics.fmean(values)

    grid = {"wordings": 1, "risk": "even"}
    heads: list[tuple[str, dict[str, Any]]] = [("all", grid)]
    heads += [(f"success {s:g}", {**grid, "success": s}) for s in (0.02, 0.1, 0.4)]
    heads += [(f"horizon {h}", {**grid, "horizon": h}) for h in (2, 8)]
    heads += [(f"{g} rollouts", {**grid, "rollouts": g}) for g in (4, 16)]
    heads += [(f"recoverable {r:g}", {**grid, "recoverable": r}) for r in (0.0, 1.0)]
    one = {"horizon": 6, "rollouts": 8}
    other: list[tuple[str, dict[str, Any]]] = [
        (f"{r}, {w} wording{'s' * (w > 1)}", {**one, "risk": r, "wordings": w})
        for r in ("even", "first", "last")
        for w in (1, 4)
    ]
    text = []
    for columns in (heads, other):
        text.append("| method | " + " | ".join(head for head, _ in columns) + " |")
        text.append("| --- |" + " --- |" * len(columns))
        for name in (*METHODS, *ORACLES):
            cosines = [f"{mean(name, **wanted):.3f}" for _, wanted in columns]
            text.append(f"| {name} | " + " | ".join(cosines) + " |")
        text.append("")
    return "\n".join([*text, *_bias_and_noise(found), ""])


def _bias_and_noise(found: Mapping[Cell, Mapping[str, Row]]) -> list[str]:
    even = [methods for cell, methods in found.items() if (cell.wordings, cell.risk) == (1, "even")]
    one_turn = [methods for cell, methods in found.items() if cell.wordings == 4 and cell.risk != "even"]
    text = ["| method | cosine of the mean | noise | cosine of the mean, one turn | noise, one turn |"]
    text.append("| --- |" + " --- |" * 4)
    for name in (*METHODS, *ORACLES):
        shown = []
        for cells_of_it in (even, one_turn):
            shown.append(f"{statistics.fmean(methods[name].mean_cosine for methods in cells_of_it):.3f}")
            shown.append(f"{statistics.median(methods[name].noise for methods in cells_of_it):.1f}")
        text.append(f"| {name} | " + " | ".join(shown) + " |")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the tables of the file, measure nothing")
    parser.add_argument("--learn", action="store_true", help="train on three cells, 16 seeds each, and print the table")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.learn:
        print(show_learning())
        return 0
    if not args.show:
        rows: list[Row] = []
        everything = list(cells())
        for done, cell in enumerate(everything, 1):
            rows += measure(cell)
            print(f"{done} of {len(everything)}: {cell}", file=sys.stderr, flush=True)
        write(rows, args.out)
    print(show(read(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
