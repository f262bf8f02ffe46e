"""What the tests on a GPU measured goes into one file, with the card's name: $GTPO_GPU_RESULTS."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from recipe.gtpo.run.machine import driver_cuda, gpus


@pytest.fixture(scope="session")
def results():
    """A mapping to put numbers into, by name; it is written when the tests are over."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    found: dict[str, object] = {
        "gpus": [str(gpu) for gpu in gpus()],
        "driver": gpus()[0].driver if gpus() else None,
        "driver_cuda": driver_cuda(),
        "torch": torch.__version__,
        "commit": commit,
    }
    yield found
    file = Path(os.environ.get("GTPO_GPU_RESULTS", "outputs/gpu-results.json"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
