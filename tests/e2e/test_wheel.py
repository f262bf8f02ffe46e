"""Who installs the package has what a comparison needs: the wheel runs one from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from runs import ROOT, TOY

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what the wheel installs. Built from a copy, so that the repository's own build/ has no say."""
    copy, dist, site = (tmp_path_factory.mktemp(name) for name in ("copy", "dist", "site"))
    for name in ("recipe", "verl_ext", "requirements"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run(copy, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(dist), ".")
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "verl_ext/viewer/web"))]
    assert {"verl_ext/viewer/static/app.js", "recipe/gtpo/whatif/arithmetic.js"} <= set(names)
    run(copy, "-m", "pip", "install", "--no-deps", "-q", "--target", str(site), str(wheel))
    return site


def test_the_wheel_runs_the_plain_pytorch_engine_from_an_empty_folder(site, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = run(
        tmp_path, "-c", "import recipe.gtpo, verl_ext; print(recipe.gtpo.__file__, verl_ext.__file__)", env=environment
    )
    assert all(path.startswith(str(site)) for path in where.split())
    keys = [one for one in TOY if not one.startswith("trainer.save_freq")]  # the engine keeps no checkpoints
    text = run(
        tmp_path,
        *("-m", "recipe.gtpo.experiments.compare", "engine=twin", "methods=gtpo,grpo", "seeds=1", "steps=2", "out=m"),
        *(*keys, "task.final_problems=4"),
        env=environment,
    )
    assert "2 complete, 0 were, 0 failed" in text
    assert f"report: {tmp_path}/m/report/index.html" in text
    assert json.loads((tmp_path / "m" / "gtpo-seed1" / "summary.json").read_text())["steps"] == [0, 2]
    assert list((tmp_path / "m" / "grpo-seed1" / "hydra").glob("*/config.yaml"))
    assert "<table" in (tmp_path / "m" / "report" / "index.html").read_text()


def run(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Output of a Python command that ends with 0."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
