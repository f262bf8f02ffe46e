"""Compare finished runs. The command is `python -m recipe.gtpo.experiments.report`; see `__main__`."""

from recipe.gtpo.experiments.report.runs import Run, load_runs
from recipe.gtpo.experiments.report.writer import show_report, write_report

__all__ = ["Run", "load_runs", "show_report", "write_report"]
