"""Compare finished runs: `python -m recipe.gtpo.experiments.report RUNS... -o report/`.

RUNS are run folders, or folders of run folders (what `recipe.gtpo.experiments.compare` leaves). Writes `index.html`
(self-contained), the same figures as PNG, the table as `table.md`, and every number as `report.json`.

Everything is read from the runs' own records. Accuracy is the raw outcome on held-out problems, sampled as the run's
config says (temperature 1 by default). Runs at several horizons (longest number of dependent tool calls) are compared
within each, with an overview across them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipe.gtpo.experiments.report.writer import THRESHOLD, show_report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.gtpo.experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="accuracy of `steps to`")
    args = parser.parse_args()
    return show_report(args.runs, args.out, args.threshold)


if __name__ == "__main__":
    sys.exit(main())
