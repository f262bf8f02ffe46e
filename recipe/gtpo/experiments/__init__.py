"""Methods against each other: a matrix of runs, a plain-PyTorch engine for many seeds, a report."""
