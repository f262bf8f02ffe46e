"""Rows are told apart by their place, whatever they say of themselves, and found by that in their files; those left out
are counted."""

from __future__ import annotations

import json
import pickle

import pytest
from composition import compose
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import get_dataset_class

from recipe.gtpo.dataset import FILE_ROW
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


def test_a_row_that_is_left_knows_its_place_in_the_files(tmp_path):
    """What is shown and recorded, to be looked up; the number that seeds are made of is the place among those left."""
    texts = ["a" * 30, "b" * 50, "c" * 40]
    files = [write_parquet([asks(text) for text in texts], tmp_path / f"{name}.parquet") for name in ("one", "two")]
    dataset = load_files(files, tmp_path, max_prompt_length=40)
    rows = [dataset[i] for i in range(len(dataset))]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row[FILE_ROW] for row in rows] == [0, 2, 3, 5]


@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_row_that_was_chosen_knows_its_place_in_the_file(tmp_path, most, shuffle):
    file = write_parquet([asks(str(i)) for i in range(20)], tmp_path / "rows.parquet")
    for seed in range(3):
        dataset = load_files(file, tmp_path, most, max_prompt_length=9, shuffle=shuffle, seed=seed)
        rows = [dataset[i] for i in range(most)]
        assert [str(row[FILE_ROW]) for row in rows] == [row["raw_prompt"][0]["content"] for row in rows]
    again = pickle.loads(pickle.dumps(dataset))  # as a checkpoint of the data's loader has it
    again.resume_dataset_state()
    assert [again[i][FILE_ROW] for i in range(most)] == [row[FILE_ROW] for row in rows]


def test_data_of_which_nothing_is_left_are_refused(tmp_path):
    rows = [{"prompt": QUESTION}] * 2
    with pytest.raises(ValueError, match=r"all 2 rows of \S+rows.parquet .* data.max_prompt_length=3 tokens"):
        load(rows, tmp_path, max_prompt_length=3)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"images": [{"image": "a.png"}]}, "images"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "text": None}]}]}, "image"),
    ],
)
@pytest.mark.parametrize("filtered", [True, False])
def test_images_are_refused_in_every_row(tmp_path, row, what, filtered):
    """The check before a run reads the first 1000 rows; an image after them was dropped, and its row trained on."""
    text = QUESTION if "prompt" not in row else [{"role": "user", "content": [{"type": "text", "text": "2+3?"}]}]
    rows = [{"prompt": text} | dict.fromkeys(row.keys() - {"prompt"})] * 1200
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows[:1100], rows[0] | row, *rows])))
    with pytest.raises(ValueError, match=rf"row 1100 of \S+rows.jsonl has '{what}': this recipe's agent loop is for"):
        load_files(str(file), tmp_path, filter_overlong_prompts=filtered)


def test_a_row_that_lacks_what_others_have_is_as_one_without_the_column(tmp_path):
    """The reader of JSON lines fills the gap with None, and `reward_model` of None ended the first validation."""
    full = {"prompt": QUESTION, "data_source": "mine", "reward_model": {"ground_truth": "5"}}
    (file := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [full, {"prompt": QUESTION}])))
    dataset = load_files(str(file), tmp_path, filter_overlong_prompts=False)
    assert [dataset[i]["reward_model"] for i in range(2)] == [{"ground_truth": "5"}, {}]
    assert [dataset[i]["data_source"] for i in range(2)] == ["mine", "data"]


class Letters:
    """A tokenizer with a token a letter."""

    def apply_chat_template(self, messages, **kwargs):
        return list("".join(message["content"] for message in messages).encode())


def asks(text):
    return {"prompt": [{"role": "user", "content": text}]}


def load(rows, folder, **settings):
    return load_files(write_parquet(rows, folder / "rows.parquet"), folder, **settings)


def load_files(files, folder, max_samples=-1, **settings):
    data = OmegaConf.to_container(compose(), resolve=True)["data"]
    data |= {"filter_overlong_prompts": True, "filter_overlong_prompts_workers": None, "cache_dir": str(folder)}
    config = OmegaConf.create(data | settings)
    return get_dataset_class(config)(files, tokenizer=Letters(), config=config, max_samples=max_samples)
