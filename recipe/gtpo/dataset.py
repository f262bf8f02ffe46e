"""verl's data set, with a number of its own for every row, and a count of those left out (`data.custom_cls`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.utils.dataset.rl_dataset import RLHFDataset

from recipe.gtpo.conversation import TEXT_ONLY, not_text

#: A row's place in the data files, from 0, counted on from file to file.
FILE_ROW = "gtpo_file_row"


class NumberedDataset(RLHFDataset):
    """`index` is the row's place among those that are left, whatever `extra_info` says; FILE_ROW that in the files.

    With `rollout.full_determinism` a trajectory's seed is made of the first. verl takes `extra_info.index`, or 0 where
    there is none: rows with the same one had the same seeds, and a question asked twice gave the same trajectories
    twice.
    """

    too_long = (
        0  # rows that verl left out: their prompt has more than data.max_prompt_length tokens, or no template fits
    )

    def __setattr__(self, name: str, value: Any) -> None:
        # verl sets it to all rows and then to those that it chose, and asks nobody in between
        if name == "dataframe" and FILE_ROW not in value.column_names:
            value = value.add_column(FILE_ROW, range(len(value)))
        super().__setattr__(name, value)

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        self._refuse_media(dataframe)
        kept = super().maybe_filter_out_long_prompts(dataframe)
        self.too_long = len(dataframe) - len(kept)
        if self.too_long and not len(kept):
            raise ValueError(
                f"all {self.too_long} rows of {', '.join(self.data_files)} have prompts of more than "
                f"data.max_prompt_length={self.max_prompt_length} tokens: set it higher"
            )
        return kept

    def _refuse_media(self, dataframe: Any) -> None:
        """The check before a run reads the first rows of a file: these are all of them. verl drops such columns."""
        media = [key for key in (self.image_key, self.video_key, self.audio_key) if key in dataframe.column_names]
        for row in dataframe.select_columns([self.prompt_key, FILE_ROW, *media]):
            if found := not_text(row, row[self.prompt_key], media):
                raise ValueError(f"row {row[FILE_ROW]} of {', '.join(self.data_files)} has {found!r}: {TEXT_ONLY}")

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = super().__getitem__(item)
        row["index"] = int(item)
        # a row of JSON lines that lacks what another has is read with None there
        if row.get("data_source") is None:
            row["data_source"] = "data"  # names a validation's metrics
        if row.get("reward_model") is None:
            row["reward_model"] = {}
        return row


def file_row(row: Mapping[str, Any]) -> int | None:
    """The number by which a user finds a row. A data set of one's own has `index` alone: its own, or in an evaluation
    the row's place."""
    place = row.get(FILE_ROW, row.get("index"))
    return None if place is None else int(place)
