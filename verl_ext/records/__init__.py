"""Records of trajectories with turns and tools: their schema, a reader that takes torn and older files, and exports.

    python -c 'from verl_ext.records import read_run; print(next(read_run("outputs/my-run")).turns[0].text)'

A recipe writes `Record.model_dump`'s keys as one line of JSON a trajectory; everything here reads them.
"""

from verl_ext.records.export import to_dataframe, write_parquet
from verl_ext.records.reader import Reader, read_run
from verl_ext.records.schema import VERSION, Record, json_schema

__all__ = ["VERSION", "Reader", "Record", "json_schema", "read_run", "to_dataframe", "write_parquet"]
