"""Rows are told apart by their place in the data, whatever they say of themselves; those left out are counted."""

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
    dataset = load(rows, tmp_path, filter_overlong_prompts=False)
    assert [dataset[i]["index"] for i in range(3)] == [0, 1, 2]
    assert dataset[0]["raw_prompt"] == QUESTION
    assert (dataset[0]["data_source"], dataset[0]["reward_model"]) == ("data", {})


@pytest.mark.parametrize(("longest", "kept"), [(40, 2), (60, 3)])
def test_rows_whose_prompt_is_too_long_are_counted(tmp_path, longest, kept):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a" * 30, "b" * 50, "c" * 40)]
    dataset = load(rows, tmp_path, max_prompt_length=longest)
    assert (len(dataset), dataset.too_long) == (kept, 3 - kept)


def test_data_of_which_nothing_is_left_are_refused(tmp_path):
    rows = [{"prompt": QUESTION}] * 2
    with pytest.raises(ValueError, match=r"all 2 rows of \S+rows.parquet .* data.max_prompt_length=3 tokens"):
        load(rows, tmp_path, max_prompt_length=3)


class Letters:
    """A tokenizer with a token a letter."""

    def apply_chat_template(self, messages, **kwargs):
        return list("".join(message["content"] for message in messages).encode())


def load(rows, folder, **settings):
    data = OmegaConf.to_container(compose(), resolve=True)["data"]
    data |= {"filter_overlong_prompts": True, "filter_overlong_prompts_workers": None, "cache_dir": str(folder)}
    config = OmegaConf.create(data | settings)
    return get_dataset_class(config)(write_parquet(rows, folder / "rows.parquet"), tokenizer=Letters(), config=config)
