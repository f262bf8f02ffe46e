"""Export a run's records, a row a turn: `python -m verl_ext.records RUN_DIR out.parquet`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from verl_ext.records.export import write_parquet
from verl_ext.records.reader import FOLDERS, Reader
from verl_ext.records.schema import NewerRecordError, json_schema


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m verl_ext.records", description=__doc__)
    parser.add_argument("run_dir", nargs="?", help="a run folder")
    parser.add_argument("out", nargs="?", help="the parquet file to write")
    parser.add_argument("--split", choices=FOLDERS, default="train", help="default: %(default)s")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a record, and nothing else")
    given = parser.parse_args(arguments)
    if given.schema:
        print(json.dumps(json_schema(), indent=1))
        return 0
    if not given.out:
        parser.error("a run folder and the file to write, or --schema")
    reader = Reader(given.run_dir)
    files = reader.files(given.split)
    if not files:
        rare = "; a run records the steps that its trajectory_freq divides" if given.split == "train" else ""
        print(f"{reader.dir}/{FOLDERS[given.split]}: no recorded step{rare}", file=sys.stderr)
        return 1
    steps = tqdm(files.items(), unit="step", file=sys.stderr)
    records = (record for step, path in steps for record in reader.read_file(path, step, given.split))
    try:
        rows = write_parquet(records, given.out)
    except NewerRecordError as e:
        steps.close()  # its bar is on the same line of the terminal
        Path(given.out).unlink()  # half of a table
        print(f"verl_ext.records: error: {e}", file=sys.stderr)
        return 1
    print(f"{given.out}: {rows} turns of {len(files)} steps, {reader.skipped} lines skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
