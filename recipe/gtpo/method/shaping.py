"""Self-supervised reward shaping: equation (2) of GTPO (arXiv 2511.14846), numbered as in recipe/gtpo/README.md.

For a failed trajectory i, with P the successful trajectories of the same prompt and c the code a trajectory executed:

    acc[i] = (alpha / |P|) * sum over p in P of sim(c_i, c_p)          0 when P or c_i is empty; sim in [0, 1]

where a success has outcome 1 and a failure 0, as in the paper. With other scores, of a reward function of one's own:

    least = the least outcome in P; from = the failure's own outcome where it is below 0, else 0
    acc[i] = from + the smaller of the credit above and alpha * (least - from); never below the own outcome

So a failure at -1 whose code is like nobody's stays at -1, and closeness to a success that is paid little (a score
that falls with the length, say) pays less than that success.

Shaping pays for closeness, not for correctness: for every similarity measured, a buggy near-copy of a correct program
scores higher than a correct rewording. Hence alpha < 1, its own metric, and a switch. Validation is never shaped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from recipe.gtpo.method.similarity import Similarity


class Shaped(NamedTuple):
    """What `shape_outcomes` made of B rows."""

    outcomes: torch.Tensor  # (B,) float32, shaped where a trajectory failed; successful rows stay as they are
    partners: tuple[tuple[tuple[int, float], ...], ...]  # B: the rows in P whose code was compared, and how similar


def shape_outcomes(
    outcomes: torch.Tensor,
    solved: torch.Tensor,
    codes: Sequence[str],
    group_ids: Sequence[Hashable],
    similarity: Similarity,
    alpha: float,
) -> Shaped:
    """The outcome of every trajectory, shaped where it failed.

    Args:
        outcomes: (B,), raw. A failed trajectory whose own outcome is above its credit keeps it: closeness never lowers
            an outcome.
        solved: (B,) bool. codes: B programs; blank ones count as empty. group_ids: B labels, equal for one prompt.
        similarity: asked once, and only about groups with both a failed and a successful trajectory that ran code.
        alpha: in [0, 1).

    Rows that must not count as siblings (padding, dropped) are the caller's to leave out. A successful trajectory
    without code counts in |P| with similarity 0. Raises whatever the backend raises.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} must be in [0, 1): at 1, closeness would pay as much as success")
    if not len(outcomes) == len(solved) == len(codes) == len(group_ids):
        raise ValueError(f"{len(outcomes)} outcomes, {len(codes)} codes and {len(group_ids)} group ids")
    shaped = outcomes.float().clone()
    partners: list[tuple[tuple[int, float], ...]] = [()] * len(shaped)
    if alpha == 0:
        return Shaped(shaped, tuple(partners))

    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(group_ids):
        members[group].append(row)
    is_solved = solved.tolist()
    # one entry for each group that needs comparing
    failed_rows, solved_rows, successes, least, pairs = [], [], [], [], []
    for rows in members.values():
        failed = [i for i in rows if not is_solved[i] and codes[i].strip()]
        models = [i for i in rows if is_solved[i] and codes[i].strip()]
        if failed and models:
            failed_rows.append(failed)
            solved_rows.append(models)
            paid = [float(shaped[i]) for i in rows if is_solved[i]]
            successes.append(len(paid))
            least.append(min(paid))
            pairs.append(([codes[i] for i in failed], [codes[i] for i in models]))
    answers = similarity.compare(pairs) if pairs else []
    for failed, models, count, lowest, matrix in zip(failed_rows, solved_rows, successes, least, answers, strict=True):
        close = _in_range(matrix, (len(failed), len(models)))
        start = shaped[failed].double().clamp_max(0.0).numpy()
        credit = start + np.minimum(alpha / count * close.sum(axis=1), alpha * (lowest - start))
        shaped[failed] = torch.maximum(shaped[failed], torch.as_tensor(credit, dtype=torch.float32))
        for i, row in enumerate(failed):
            partners[row] = tuple(zip(models, close[i].tolist(), strict=True))
    return Shaped(shaped, tuple(partners))


def _in_range(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Similarities clipped to [0, 1]: opposite embeddings are as bad as unrelated ones. Anything above 1 is a fault."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != shape or not np.isfinite(matrix).all() or matrix.max() > 1 + 1e-3:
        raise ValueError(
            f"the similarity backend answered {matrix.shape} for {shape}, or a value that is no similarity"
        )
    return matrix.clip(0.0, 1.0)
