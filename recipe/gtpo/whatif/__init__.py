"""What `verl_ext.viewer` asks of this recipe: what would the advantages be with other options, from what is recorded?

The viewer finds this module through the entry-point group `verl_ext.viewer` and knows no method itself. The settings
are those of `algorithm.gtpo` by name, and two of verl's: `estimator` (`algorithm.adv_estimator`) and `divide`
(`algorithm.norm_adv_by_std_in_grpo`). The arithmetic is in `arithmetic.py`, which needs torch; a page is there before
that is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import yaml

from recipe.gtpo.method import options as words
from recipe.gtpo.method.options import GTPOOptions

#: `recompute` for a page without a server: defines `globalThis.viewerCredit.recompute(rows, settings)`.
JAVASCRIPT = Path(__file__).with_name("arithmetic.js")
#: Settings that are verl's own keys: name -> key.
OF_VERL = {"estimator": "algorithm.adv_estimator", "divide": "algorithm.norm_adv_by_std_in_grpo"}
#: `method.estimators.ESTIMATORS`, which torch comes with; a test compares the two.
_ESTIMATORS = ("gtpo", "grpo", "rloo", "reinforce_plus_plus", "recorded_gdpo", "mt_grpo", "gigpo")
_METHODS = Path(__file__).parents[1] / "config" / "method"


def controls() -> list[dict[str, Any]]:
    """What can be changed, in the order of the page. `name` is a key of the settings."""
    return [
        _control("estimator", "estimator", choices=_ESTIMATORS),
        _control("divide", "grpo: divided by the std", choices=(True, False)),
        _control("gamma", "gamma, discount per turn", low=0.0, high=1.0, step=0.05),
        _control("baseline", "compared with the returns of", choices=get_args(words.Baseline)),
        _control("bootstrap", "share of the next state's mean in a return", low=0.0, high=1.0, step=0.1),
        _control("state_prior", "by state: returns that the state before counts as", low=0.0, high=8.0, step=0.5),
        _control("lone_state", "by state, alone in it", choices=get_args(words.LoneState)),
        _control("scale", "divided by", choices=get_args(words.Scale)),
        _control("leave_one_out", "mean without the trajectory itself", choices=(False, True)),
        _control("format_rule", "what the penalty charges", choices=get_args(words.FormatRule)),
        _control("format_penalty", "format penalty", low=-1.0, high=0.0, step=0.05),
        _control("turn_rewards", "penalty on the turn that earned it", choices=(True, False)),
        _control("trajectory_reward", "a trajectory's reward", choices=get_args(words.TrajectoryReward)),
        _control("shaping.enable", "shaping", choices=(True, False)),
        _control("shaping.alpha", "shaping, alpha", low=0.0, high=0.95, step=0.05),
        _control("unsolved_groups", "groups that nobody solved", choices=get_args(words.UnsolvedGroups)),
        _control("sparse_turn", "a turn pool that is too small", choices=get_args(words.SparseTurn)),
        _control("min_pool", "smallest pool", low=2, high=16, step=1),
        _control("truncated", "trajectories cut by a limit", choices=get_args(words.Truncated)),
    ]


def _control(name: str, label: str, **rest: Any) -> dict[str, Any]:
    return {"name": name, "label": label, **rest}


def settings_of(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a run, from its flat config (`algorithm.gtpo.gamma`, ...); without one the defaults of GTPO."""
    if not config:
        return defaults()
    config = {"algorithm.gtpo.format_rule": "strict"} | dict(config)  # a run from before there was a choice
    return {name: config.get(_key(name), default) for name, default in defaults().items()}


def is_computed(settings: Mapping[str, Any]) -> bool:
    """Whether `recompute` has the estimator; those of verl that are no method of the recipe it has not."""
    return {**defaults(), **settings}["estimator"] in _ESTIMATORS


def _key(setting: str) -> str:
    return OF_VERL.get(setting, f"algorithm.gtpo.{setting}")


def presets() -> dict[str, dict[str, Any]]:
    """What choosing a method of the recipe (config/method) sets, by name: the settings that any of the files names.

    The others, such as the format rule and its penalty, are no part of a method: a run keeps its own.
    """
    contents = {path.stem: yaml.safe_load(path.read_text())["algorithm"] for path in sorted(_METHODS.glob("*.yaml"))}
    files = {name: {f"algorithm.{key}": v for key, v in _flat(content).items()} for name, content in contents.items()}
    named = {key for file in files.values() for key in file}
    return {name: {k: v for k, v in settings_of(file).items() if _key(k) in named} for name, file in files.items()}


def _flat(node: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= {f"{key}.{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {key: value}
    return flat


def defaults() -> dict[str, Any]:
    """The settings of GTPO where nothing is set."""
    flat = {"estimator": "gtpo", "divide": True} | _flat(asdict(GTPOOptions()))
    return {control["name"]: flat[control["name"]] for control in controls()}


def uncontrolled(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The run's values of options that have no control and that change a number, where they are not the defaults.

    The server computes with them. An exported page cannot, since its formulas do not know them.
    """
    known = {control["name"] for control in controls()} | {"success_threshold"}  # the record has what became of that
    own = {name: value for name, value in asdict(GTPOOptions()).items() if name not in known and name != "shaping"}
    found = {name: (config or {}).get(f"algorithm.gtpo.{name}", default) for name, default in own.items()}
    return {name: value for name, value in found.items() if value != own[name]}


def recompute(
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    codes: Callable[[], Sequence[str]],
) -> list[dict[str, Any]]:
    """`arithmetic.recompute`."""
    from recipe.gtpo.whatif import arithmetic

    return arithmetic.recompute(rows, settings, config, codes)


def similarities(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any] | None, codes: Callable[[], Sequence[str]]
) -> tuple[list[dict[int, float]], int, str]:
    """`arithmetic.similarities`."""
    from recipe.gtpo.whatif import arithmetic

    return arithmetic.similarities(rows, config, codes)
