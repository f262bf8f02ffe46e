"""Compare finished runs. The command is `python -m recipe.gtpo.experiments.report`; see `__main__`."""
