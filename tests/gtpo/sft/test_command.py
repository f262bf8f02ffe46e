"""The command line of the cold start."""

from __future__ import annotations

import sys

import pytest

from recipe.gtpo.sft import __main__ as command

pytestmark = pytest.mark.unit


def test_without_a_source_nothing_is_made_before_it_is_said(tmp_path, monkeypatch, capsys):
    """Not even the embedded policy, whose warm start takes a minute."""
    monkeypatch.setattr(sys, "argv", ["sft", f"task.cache={tmp_path}/cache", f"sft.out={tmp_path}/sft"])
    assert command.main() == 1
    said = capsys.readouterr()
    assert said.err.startswith("sft: error: sft.source is not set: teacher (a task that has one), a run's folder")
    assert said.out == "" and list(tmp_path.iterdir()) == []
