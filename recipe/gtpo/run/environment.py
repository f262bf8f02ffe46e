"""What has to be settled before verl's first import. Imports neither verl nor hydra.

verl settles its platform at its first import, and hydra imports verl to find its configs: too early for the composed
config to tell. So the platform is the one choice that is read off the command line.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CONFIG_DIR = Path(__file__).parents[1] / "config"


def settle(arguments: Sequence[str]) -> None:
    """Tell verl the platform of the chosen `hardware` file, and keep it from warning in every process."""
    defaults = OmegaConf.load(CONFIG_DIR / "gtpo_trainer.yaml").defaults
    hardware = next(one["hardware"] for one in defaults if isinstance(one, DictConfig) and "hardware" in one)
    for argument in arguments:
        if argument.startswith("hardware="):
            hardware = argument.split("=", 1)[1]
    file = CONFIG_DIR / "hardware" / f"{hardware}.yaml"  # an unknown one is hydra's to refuse
    device = OmegaConf.select(OmegaConf.load(file), "trainer.device") if file.exists() else None
    if device is not None:
        os.environ["VERL_PLATFORM"] = device
    # verl warns of every engine that is not installed
    warnings.filterwarnings("ignore", message=r".* engine is not available", category=UserWarning)
    warnings.filterwarnings("ignore", message="Disabled critic", category=UserWarning)  # no method here has one
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
