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


def find_choice(group: str, name: str, own: Sequence[Path] = ()) -> Path | None:
    """The file of `GROUP=NAME`, in our config or in the user's own folders: ours first, as hydra looks."""
    files = (folder / group / f"{name}.yaml" for folder in (CONFIG_DIR, *own))
    return next((file for file in files if file.is_file()), None)


def settle(arguments: Sequence[str]) -> None:
    """Tell verl the platform of the chosen `hardware` file, and keep it from warning in every process."""
    if _device(arguments) == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"  # verl finds an accelerator's by itself
    # verl warns of every engine that is not installed
    warnings.filterwarnings("ignore", message=r".* engine is not available", category=UserWarning)
    warnings.filterwarnings("ignore", message="Disabled critic", category=UserWarning)  # no method here has one
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")


def _device(arguments: Sequence[str]) -> str | None:
    """`trainer.device` of the chosen file; None where it has none, or where hydra will refuse the choice."""
    defaults = OmegaConf.load(CONFIG_DIR / "gtpo_trainer.yaml").defaults
    hardware = next(one["hardware"] for one in defaults if isinstance(one, DictConfig) and "hardware" in one)
    own: list[Path] = []
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key == "hardware":
            hardware = value
        elif key in ("--config-dir", "-cd"):
            own += [Path(given) for given in [value or next(iter(arguments[i + 1 :]), "")] if given]
    found = find_choice("hardware", hardware, own)
    return None if found is None else OmegaConf.select(OmegaConf.load(found), "trainer.device")
