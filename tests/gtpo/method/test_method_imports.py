"""The method stands alone: whoever checks its numbers needs torch and numpy, no trainer and no model library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]

LOOK = """
import importlib, json, pkgutil, sys
from recipe.gtpo import method
names = [module.name for module in pkgutil.iter_modules(method.__path__)]
for name in names:
    importlib.import_module(f"{method.__name__}.{name}")
print(json.dumps([names, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_the_method_imports_neither_verl_nor_ray_nor_transformers():
    command = [sys.executable, "-W", "ignore", "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    modules, loaded = json.loads(done.stdout.splitlines()[-1])
    files = {path.stem for path in (ROOT / "recipe" / "gtpo" / "method").glob("*.py")} - {"__init__"}
    assert set(modules) == files and "advantage" in modules
    assert {"torch", "numpy"} <= set(loaded)
    assert not {"verl", "ray", "transformers"} & set(loaded)
