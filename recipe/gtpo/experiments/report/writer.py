"""The report's folder: the page, its figures as PNG, the table as Markdown, and every number as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.gtpo.experiments.report.figures import draw_sections
from recipe.gtpo.experiments.report.page import markdown, page, verdict
from recipe.gtpo.experiments.report.runs import Run, load_runs
from recipe.gtpo.experiments.report.statistics import Row, make_rows

THRESHOLD = 0.5  # accuracy of the column `steps to`


def write_report(paths: Sequence[Path], out: Path, threshold: float) -> list[Row]:
    """Compare the finished runs in `paths` (run folders, or folders of them) and write all files into `out`.

    Returns:
        The rows of the table.

    Raises:
        ValueError: as `load_runs`.
    """
    runs = load_runs(paths)
    rows = make_rows(runs, threshold)
    out.mkdir(parents=True, exist_ok=True)
    sections = draw_sections(runs, rows, out)
    (out / "table.md").write_text(markdown(rows, threshold))
    facts = _facts(runs, rows, threshold)
    (out / "report.json").write_text(json.dumps(facts, indent=1, default=lambda o: o.__dict__))
    (out / "index.html").write_text(page(runs, rows, sections, out, threshold))
    return rows


def show_report(paths: Sequence[Path], out: Path, threshold: float = THRESHOLD) -> int:
    """`write_report`, with the table, the verdict and the page's place on the terminal. Returns the exit status."""
    try:
        rows = write_report(paths, out, threshold)
    except ValueError as e:
        print(f"report: error: {e}", file=sys.stderr)
        return 1
    print(f"{markdown(rows, threshold)}\n{verdict(rows)}\nreport: {out / 'index.html'}")
    return 0


def _facts(runs: Sequence[Run], rows: Sequence[Row], threshold: float) -> dict[str, Any]:
    """What report.json holds; rows are written field by field."""
    return {
        "task": runs[0].task,
        "engine": runs[0].engine,
        "steps": max(runs[0].curve),
        "threshold": threshold,
        "rows": rows,
        "runs": [
            {
                "method": r.method,
                "horizon": r.horizon,
                "seed": r.seed,
                "curve": r.curve,
                "classes": r.classes,
                "commit": r.start.get("commit"),
                "command": r.command,
            }
            for r in runs
        ],
    }
