"""The recipe's configuration as its command composes it, once for each set of overrides."""

from __future__ import annotations

import copy
import functools

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, open_dict

from recipe.gtpo.compose import CONFIG_DIR, register


def compose(*overrides: str) -> DictConfig:
    """The composed config; a copy, to be changed at will."""
    return copy.deepcopy(_compose(overrides)[0])


def compose_with_choices(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """Also hydra's record of which file of each group was taken."""
    config, choices = _compose(overrides)
    return copy.deepcopy(config), dict(choices)


@functools.cache  # about a second each
def _compose(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config = hydra_compose("gtpo_trainer", overrides=list(overrides), return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choices
