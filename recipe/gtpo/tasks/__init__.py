"""Embedded tasks: data, score and a warm-started policy for a machine without a GPU."""
