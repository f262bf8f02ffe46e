"""The options: defaults, what a config may say, and one clear error for what it may not."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from recipe.gtpo.method.options import GTPOOptions

pytestmark = pytest.mark.unit


def test_defaults_are_the_papers():
    options = GTPOOptions.from_config(None)
    assert options == GTPOOptions() == GTPOOptions.from_config({})
    assert (options.gamma, options.format_penalty, options.shaping.alpha) == (0.9, -0.1, 0.5)
    assert (options.baseline, options.scale, options.unsolved_groups, options.min_pool) == ("group", "std", "keep", 2)
    assert not options.leave_one_out and options.sparse_turn == "zero" and options.truncated == "keep"
    assert options.turn_rewards and options.shaping.enable and options.shaping.similarity.backend == "token_jaccard"


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_every_level_can_be_set(wrap):
    config = wrap({"gamma": 1, "baseline": "turn", "shaping": {"alpha": 0, "similarity": {"backend": "tfidf"}}})
    options = GTPOOptions.from_config(config)
    assert options.gamma == 1.0 and isinstance(options.gamma, float)
    assert options.baseline == "turn" and options.shaping.similarity.backend == "tfidf" and options.shaping.alpha == 0.0
    assert options.shaping.enable  # what is not said keeps its default


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"gama": 0.9},
            r"algorithm.gtpo: unknown option 'gama'. Did you mean 'gamma'\? Valid options: gamma, format_p",
        ),
        ({"zzz": 1}, r"unknown option 'zzz'. Valid options: gamma"),
        ({"shaping": {"similarity": {"modle": "x"}}}, r"algorithm.gtpo.shaping.similarity: unknown .* 'model'\?"),
        ({"gamma": 1.1}, r"algorithm.gtpo.gamma: 1.1 must be in \[0, 1\]"),
        ({"gamma": -0.1}, r"gamma"),
        ({"gamma": float("nan")}, r"gamma"),
        ({"gamma": "0.9"}, r"algorithm.gtpo.gamma: expected float, got '0.9'"),
        ({"gamma": True}, r"expected float, got True"),
        ({"gamma": None}, r"expected float, got None"),
        ({"format_penalty": 0.1}, r"format_penalty: 0.1 must be 0 or below"),
        ({"format_penalty": float("-inf")}, r"format_penalty: -inf must be 0 or below, and finite"),
        ({"turn_rewards": 1}, r"turn_rewards: expected bool, got 1"),
        ({"baseline": "prompt"}, r"algorithm.gtpo.baseline: 'prompt' is not one of group, turn, batch"),
        ({"scale": None}, r"scale: None is not one of std, batch_std, none"),
        ({"unsolved_groups": "drop"}, r"unsolved_groups"),
        ({"sparse_turn": "batch"}, r"sparse_turn"),
        ({"truncated": True}, r"truncated"),
        ({"min_pool": 1}, r"min_pool: 1 must be at least 2"),
        ({"min_pool": 2.0}, r"min_pool: expected int"),
        ({"shaping": {"alpha": 1.0}}, r"algorithm.gtpo.shaping.alpha: 1.0 must be in \[0, 1\)"),
        ({"shaping": {"alpha": -0.5}}, r"alpha"),
        ({"shaping": None}, r"algorithm.gtpo.shaping: null .* set algorithm.gtpo.shaping.enable=false to turn it off"),
        ({"shaping": {"similarity": None}}, r"shaping.similarity: expected a mapping of options, got None"),
        ({"shaping": True}, r"algorithm.gtpo.shaping: expected a mapping of options, got True"),
        ({"shaping": {"similarity": "tfidf"}}, r"shaping.similarity: expected a mapping"),
        ({"shaping": {"similarity": {"cache_size": 0}}}, r"cache_size: 0 must be at least 1"),
        ({"shaping": {"similarity": {"timeout_s": 0}}}, r"timeout_s: 0.0 must be above 0"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        GTPOOptions.from_config(config)
