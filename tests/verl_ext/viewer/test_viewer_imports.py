"""The viewer starts without what is heavy, and knows no recipe."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

FOREIGN = {"recipe", "verl", "ray", "torch", "transformers"}


def test_the_viewer_imports_neither_a_recipe_nor_what_takes_seconds():
    script = f"import sys, verl_ext.viewer.__main__; print(*{FOREIGN!r} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
