"""Training recipes on top of unmodified verl."""
