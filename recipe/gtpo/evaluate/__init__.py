"""Evaluate a model, or a run's checkpoint, on benchmarks: `python -m recipe.gtpo.evaluate model=... benchmarks=...`."""
