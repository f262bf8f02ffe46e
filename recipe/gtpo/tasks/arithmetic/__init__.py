"""Generated arithmetic that needs the tool, and a tiny policy warm-started on it: training without a GPU."""
