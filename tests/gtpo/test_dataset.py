"""Rows are told apart by their place in the data, whatever they say of themselves."""

from __future__ import annotations

import pytest
from composition import compose
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import get_dataset_class

from recipe.gtpo.tasks.task import write_parquet

pytestmark = pytest.mark.unit

QUESTION = [{"role": "user", "content": "What is 2+3?"}]


@pytest.mark.parametrize("extra_info", [{}, {"extra_info": {"index": 7}}, {"extra_info": {"split": "train"}}])
def test_the_same_question_twice_has_two_numbers(tmp_path, extra_info):
    rows = [{"prompt": QUESTION, **extra_info}] * 3
    data = OmegaConf.to_container(compose(), resolve=True)["data"]
    config = OmegaConf.create(data | {"filter_overlong_prompts": False, "cache_dir": str(tmp_path)})
    dataset = get_dataset_class(config)(write_parquet(rows, tmp_path / "rows.parquet"), tokenizer=None, config=config)
    assert [dataset[i]["index"] for i in range(3)] == [0, 1, 2]
    assert dataset[0]["raw_prompt"] == QUESTION
    assert (dataset[0]["data_source"], dataset[0]["reward_model"]) == ("data", {})
