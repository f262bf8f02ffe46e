"""One run, from the checks of its configuration to its last line: checks, record on disk, progress, watch."""
