"""Which of the models that verl saves is the cold start's. Its training itself: tests/e2e/test_cold_start.py."""

from __future__ import annotations

import pytest
from composition import compose

from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.sft import train as sft

pytestmark = pytest.mark.unit


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A cold start with a trainer that only saves: the model of a step is the step's number."""

    def run(*steps: int, **of_verl):
        def save(settings, folder):
            for step in steps:
                saved = folder / "work" / f"global_step_{step}" / "huggingface"
                saved.mkdir(parents=True)
                (saved / "model.safetensors").write_text(str(step))

        monkeypatch.setattr(sft, "_run_worker", save)
        config = compose("task=verl_data", f"sft.out={tmp_path / 'sft'}")
        config.sft.verl = {"data": {"train_batch_size": 1}, **of_verl}
        return sft.train(config, [[{"role": "user", "content": "1+1?"}]], [], lambda line: None)

    return run


def test_of_several_saved_models_the_last_is_taken_by_number(train):
    made = train(8, 9, 10, trainer={"save_freq": 1})
    assert (made / "model.safetensors").read_text() == "10"
    assert not (made / "work").exists()


def test_settings_that_save_no_weights_are_refused_before_anything_is_trained(train, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.save_contents has no 'hf_model'"):
        train(7, checkpoint={"save_contents": ["model"]})
    assert not (tmp_path / "sft").exists()


def test_a_training_that_saved_nothing_says_why(train):
    with pytest.raises(ConfigError, match=r"saved no model: .*total_training_steps is more than its epochs have"):
        train(trainer={"total_training_steps": 100})
