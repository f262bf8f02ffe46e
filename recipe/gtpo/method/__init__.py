"""GTPO itself: pure functions and records, importing neither verl nor ray."""
