"""What n attempts at each of some problems come to: mean@k, pass@k, maj@k, and their intervals over problems.

Of a problem there are n scored attempts, c of them right. With k of the n drawn without replacement:

* mean@k: the mean of the attempts, c / n, whatever k is.
* pass@k: at least one is right, 1 - C(n-c, k) / C(n, k): unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).
* maj@k: the answer that most of them give is right. Ties are broken at random, and an attempt without an answer votes
  for nothing. What comes out is the exact expectation over all draws and ties, not one draw.

Every problem weighs the same. No verl, no files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from recipe.gtpo.experiments.report.statistics import bootstrap_interval

INTERVALS = (
    "95%: percentile bootstrap over problems, 10,000 resamples, seed 0; where all problems have the same value, "
    "Wilson's interval for that share of so many; of a difference: the same bootstrap over the problems' differences"
)
_Z = 1.959964


@dataclass(frozen=True)
class Attempts:
    """The scored attempts at one problem.

    Args:
        right: acc of each, in {0, 1}.
        answers: (attempts that give it, share of these that are right) of each different answer. Attempts that give no
            answer are in `right` only.
    """

    right: tuple[float, ...]
    answers: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if sum(votes for votes, _ in self.answers) > len(self.right):
            raise ValueError(f"{self.answers}: more votes than the {len(self.right)} attempts")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Raises ValueError where k attempts cannot be drawn."""
    _check(n, k)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[tuple[int, float]], n: int, k: int) -> float:
    """The chance that the most frequent answer of k out of n attempts is right, ties broken at random.

    Args:
        answers: as in `Attempts`; n minus their votes gave none.

    Raises ValueError where k attempts cannot be drawn.
    """
    _check(n, k)
    return _maj_at_k(tuple(sorted(answers)), n, k)


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of n={n} attempts: k is 1 to n")


@functools.lru_cache(maxsize=65536)  # most problems look alike: all right, all wrong
def _maj_at_k(answers: tuple[tuple[int, float], ...], n: int, k: int) -> float:
    total = 0.0
    blank = n - sum(votes for votes, _ in answers)
    blanks = _chances(blank, min(blank, k), n, k)
    chances = [_chances(votes, min(votes, k), n, k) for votes, _ in answers]
    for most in range(1, min(k, max((votes for votes, _ in answers), default=0)) + 1):
        # ways[t, u]: the chance that u attempts are drawn, t answers have `most` votes and none has more;
        # right[t, u]: the same, weighed by how right these t answers are together
        size = (len(answers) + 1, k + 1)
        ways, right = np.zeros(size), np.zeros(size)
        ways[0, : len(blanks)] = blanks
        for (votes, share), drawn in zip(answers, chances, strict=True):
            new_ways, new_right = np.zeros(size), np.zeros(size)
            for count in range(min(votes, most) + 1):
                chosen = drawn[count]
                rest = k + 1 - count
                if count < most:
                    new_ways[:, count:] += chosen * ways[:, :rest]
                    new_right[:, count:] += chosen * right[:, :rest]
                else:
                    new_ways[1:, count:] += chosen * ways[:-1, :rest]
                    new_right[1:, count:] += chosen * (right[:-1, :rest] + share * ways[:-1, :rest])
            ways, right = new_ways, new_right
        total += float((right[1:, k] / np.arange(1, size[0])).sum())
    found = total / _chances(n, k, n, k)[k]
    return min(1.0, round(found, 12))  # of equal chances the last bits may differ, and `estimate` looks for equal ones


def _chances(attempts: int, most: int, n: int, k: int) -> list[float]:
    """That 0, 1, ..., `most` of these attempts are drawn, where each of all n is drawn alone and with the chance k / n.

    The draws that have k attempts in all are then equally likely, as they should be. To count draws instead would end
    at a thousand attempts: comb(1100, 550) has no float.
    """
    whole = n**attempts
    return [math.comb(attempts, count) * k**count * (n - k) ** (attempts - count) / whole for count in range(most + 1)]


def sizes(n: int) -> list[int]:
    """The k that are reported of n attempts: the powers of two below n, and n."""
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and its interval; `low` and `high` are None where there is none (one problem)."""

    value: float
    low: float | None
    high: float | None
    problems: int

    def to_dict(self) -> dict[str, float | int | None]:
        return dict(vars(self))


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value in [0, 1] a problem. Raises ValueError without a problem."""
    if not values:
        raise ValueError("no problem, no estimate")
    if len(values) > 1 and min(values) == max(values):
        return Estimate(values[0], *wilson(values[0], len(values)), len(values))
    found = bootstrap_interval(values)
    return Estimate(found.mean, found.low, found.high, found.count)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours minus theirs, paired by problem; None without a common problem.

    Without an interval where all differences are the same: these data say nothing on how else they could be.
    """
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    values = [ours[i] - theirs[i] for i in both]
    if min(values) == max(values):
        return Estimate(values[0], None, None, len(values))
    found = bootstrap_interval(values)
    return Estimate(found.mean, found.low, found.high, found.count)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share of n (Wilson 1927)."""
    middle = share + _Z**2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + _Z**2 / n)), min(1.0, (middle + half) / (1 + _Z**2 / n))


def by_problem(problems: Mapping[int, Attempts], samples: int) -> dict[str, dict[int, float]]:
    """Measure, such as pass@4 -> problem -> its value.

    A problem with fewer than k scored attempts has no pass@k and no maj@k; one with none has no value at all.
    """
    found: dict[str, dict[int, float]] = {f"mean@{samples}": {}}
    for k in sizes(samples):
        found |= {f"pass@{k}": {}, f"maj@{k}": {}}
    for problem, attempts in problems.items():
        n = len(attempts.right)
        if n == 0:
            continue
        found[f"mean@{samples}"][problem] = fmean(attempts.right)
        for k in (k for k in sizes(samples) if k <= n):
            found[f"pass@{k}"][problem] = pass_at_k(n, sum(one >= 1 for one in attempts.right), k)
            found[f"maj@{k}"][problem] = maj_at_k(attempts.answers, n, k)
    return found
