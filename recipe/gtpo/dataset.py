"""verl's data set, with a number of its own for every row (`data.custom_cls`)."""

from __future__ import annotations

from typing import Any

from verl.utils.dataset.rl_dataset import RLHFDataset


class NumberedDataset(RLHFDataset):
    """`index` is the row's place in the data, whatever `extra_info` says.

    With `rollout.full_determinism` a trajectory's seed is made of it. verl takes `extra_info.index`, or 0 where there
    is none: rows with the same one had the same seeds, and a question asked twice gave the same trajectories twice.
    """

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = super().__getitem__(item)
        row["index"] = int(item)
        row.setdefault("data_source", "data")  # names a validation's metrics
        row.setdefault("reward_model", {})
        return row
