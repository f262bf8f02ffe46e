"""Records as a table, for pandas, polars or duckdb: a row a turn, with what is known of its trajectory beside it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet

from verl_ext.records.schema import Record

if TYPE_CHECKING:
    import pandas

#: Columns of a turn's row: name -> type. Those from `turn` on are the turn's, the others its trajectory's.
COLUMNS: dict[str, pyarrow.DataType] = {
    "step": pyarrow.int64(),
    "split": pyarrow.string(),
    "group": pyarrow.string(),
    "session": pyarrow.int64(),
    "index": pyarrow.int64(),
    "data_source": pyarrow.string(),
    "seed": pyarrow.int64(),
    "prompt": pyarrow.string(),  # JSON of the messages
    "gold": pyarrow.string(),  # JSON where it is no text
    "finish": pyarrow.string(),
    "acc": pyarrow.float64(),
    "pred": pyarrow.string(),
    "outcome": pyarrow.float64(),
    "shaped": pyarrow.float64(),
    "dropped": pyarrow.bool_(),
    "update": pyarrow.int64(),
    "turn": pyarrow.int64(),  # from 0
    "turns": pyarrow.int64(),  # of the trajectory
    "tokens": pyarrow.int64(),
    "text": pyarrow.string(),
    "code": pyarrow.string(),  # what it ran
    "outcomes": pyarrow.list_(pyarrow.string()),  # of its calls, in order; so are the next two
    "outputs": pyarrow.list_(pyarrow.string()),
    "seconds": pyarrow.list_(pyarrow.float64()),
    "broken": pyarrow.string(),
    "ended_by": pyarrow.string(),
    "reward": pyarrow.float64(),
    "reward_outcome": pyarrow.float64(),  # these three add up to reward
    "reward_shaping": pyarrow.float64(),
    "reward_format": pyarrow.float64(),
    "return": pyarrow.float64(),
    "pool_mean": pyarrow.float64(),
    "pool_std": pyarrow.float64(),
    "divisor": pyarrow.float64(),
    "advantage": pyarrow.float64(),
    "masked": pyarrow.int64(),
    "log_prob": pyarrow.float64(),
    "log_prob_gap": pyarrow.float64(),
    "weights": pyarrow.list_(pyarrow.int64()),  # first and last step whose weights sampled it
}
_BATCH = 4096  # rows
_DID_NOT_RUN = ("malformed", "over_limit")
_PARTS = ("outcome", "shaping", "format")


def turn_rows(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """One dict with the keys of COLUMNS for every turn."""
    for record in records:
        prompt = None if record.prompt is None else json.dumps([message.model_dump() for message in record.prompt])
        about = {name: getattr(record, name) for name in list(COLUMNS)[: list(COLUMNS).index("turn")]}
        gold = record.gold if record.gold is None or isinstance(record.gold, str) else json.dumps(record.gold)
        about |= {"prompt": prompt, "gold": gold}
        for k, turn in enumerate(record.turns):
            ran = zip(turn.calls, turn.outcomes, strict=False)
            code = [str(call.arguments.get("code", "")) for call, o in ran if o.outcome not in _DID_NOT_RUN]
            own = {name: getattr(turn, name, None) for name in list(COLUMNS)[list(COLUMNS).index("text") :]}
            own |= {"turn": k, "turns": len(record.turns), "tokens": turn.end - turn.start, "return": turn.return_}
            own |= {f"reward_{part}": (turn.rewards or {}).get(part) for part in _PARTS}
            own |= {"code": "\n".join(code), "outcomes": [outcome.outcome for outcome in turn.outcomes]}
            own |= {"outputs": [_text(outcome.output) for outcome in turn.outcomes]}
            own |= {"seconds": [outcome.seconds for outcome in turn.outcomes]}
            yield {name: _text(value) for name, value in (about | own).items()}


def _text(value: Any) -> Any:
    """Half a character (a lone surrogate) is no UTF-8, and Arrow takes nothing else."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def to_dataframe(records: Iterable[Record]) -> pandas.DataFrame:
    """A pandas data frame with a row a turn and the columns of COLUMNS."""
    return pyarrow.Table.from_pylist(list(turn_rows(records)), schema=_schema()).to_pandas()


def write_parquet(records: Iterable[Record], path: str | os.PathLike[str]) -> int:
    """Write a row a turn, some thousands in memory at a time. Returns the number of rows."""
    count, rows = 0, turn_rows(records)
    with pyarrow.parquet.ParquetWriter(path, _schema()) as writer:
        while batch := list(itertools.islice(rows, _BATCH)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=_schema()))
            count += len(batch)
    return count


def _schema() -> pyarrow.Schema:
    return pyarrow.schema(list(COLUMNS.items()))
