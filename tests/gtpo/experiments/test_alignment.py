"""The command line of the alignment measurement; what it measures with has tests of its own."""

from __future__ import annotations

import argparse
import re

import pytest

from recipe.gtpo.experiments import alignment

pytestmark = pytest.mark.unit


def test_the_command_of_its_docstring_is_read(monkeypatch):
    """`--after 0 15 task.horizon=4` took the override for a third number of steps."""
    (line,) = re.findall(r"recipe\.gtpo\.experiments\.alignment (.*) \[hydra", alignment.__doc__)
    seen = []
    monkeypatch.setattr(alignment, "settle", lambda overrides: seen.append(overrides) or exit(0))
    monkeypatch.setattr("sys.argv", ["alignment", *line.split()])
    with pytest.raises(SystemExit, match=r"^0$"):
        alignment.main()
    assert seen == [["task.horizon=4"]]


def test_one_training_only_goes_forward():
    assert alignment._ascending("0,15") == [0, 15]
    for text in ("20,0", "5,5", "-1,2", "soon"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            alignment._ascending(text)
