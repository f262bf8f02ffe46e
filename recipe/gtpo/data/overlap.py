"""Whether two problems are the same problem, and whether one has much of the other's text.

Two problems are the same when nothing but case, spaces and dollar signs differs (`key`). A training problem also counts
as known from an evaluation set when it has half of the n-grams (runs of n words) of one of its problems: half, because
competition problems share whole sentences ("can be written as m/n, where m and n are relatively prime positive
integers") with problems that have nothing else in common.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

N = 10
SHARE = 0.5
_WORD = re.compile(r"[^\W_]+")


def key(problem: str) -> str:
    """What is equal for problems that are the same."""
    return re.sub(r"[\s$]+", "", problem.lower()).rstrip(".?")


def words(problem: str) -> tuple[str, ...]:
    """The words and numbers of a problem, in lower case."""
    return tuple(_WORD.findall(problem.lower()))


def ngrams(of: Sequence[str], n: int = N) -> Iterator[int]:
    """Hashes of the runs of n words; none where there are fewer words."""
    return (hash(tuple(of[i : i + n])) for i in range(len(of) - n + 1))


@dataclass
class Known:
    """The problems of evaluation sets, to be compared with training problems one by one.

    Args:
        partial: whether a part of a problem counts.
    """

    partial: bool = True
    _sets: dict[str, str] = field(default_factory=dict)  # key -> the set that has it
    _members: dict[int, list[int]] = field(default_factory=dict)  # n-gram -> the numbers of the problems that have it
    _sizes: list[tuple[str, int]] = field(default_factory=list)  # of each problem: its set, how many n-grams

    def add(self, problem: str, name: str) -> None:
        """A problem of the evaluation set `name`."""
        self._sets.setdefault(key(problem), name)
        distinct = set(ngrams(words(problem)))
        for gram in distinct:
            self._members.setdefault(gram, []).append(len(self._sizes))
        self._sizes.append((name, len(distinct)))

    def find(self, problem: str) -> tuple[str, str] | None:
        """How a training problem is known, "exactly" or "in part", and from which set; None where it is not."""
        if (same := self._sets.get(key(problem))) is not None:
            return "exactly", same
        if not self.partial:
            return None
        grams = set(ngrams(words(problem)))
        shared = Counter(member for gram in grams for member in self._members.get(gram, ()))
        for member, count in shared.most_common():
            name, size = self._sizes[member]
            if count >= SHARE * size:
                return "in part", name
        return None
