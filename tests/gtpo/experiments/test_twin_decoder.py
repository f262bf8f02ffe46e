"""The plain-PyTorch engine's decoder: how it lays its cache out in memory changes no bit of a run."""

from __future__ import annotations

import json
import random

import pytest
import torch
from plain_decoder import PlainDecoder
from test_twin import settings_of
from transformers import AutoModelForCausalLM

from recipe.gtpo.experiments.twin import rollout, training
from recipe.gtpo.experiments.twin.decoder import _GROWTH, Decoder

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("rollouts", [1, 4])
def test_logits_equal_those_of_a_cache_that_never_moves(toy_policy, rollouts):
    """While rows and whole prompts leave, across several layouts of the cache, to the last token there is room for."""
    model = AutoModelForCausalLM.from_pretrained(toy_policy).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(rng.randrange(5, 30))] for _ in range(24 // rollouts)]
    rows = [prompt for prompt in prompts for _ in range(rollouts)]
    room = 5 * _GROWTH + 1
    with torch.inference_mode():
        ours, plain = (kind(model, rows, room, 0) for kind in (Decoder, PlainDecoder))
        assert torch.equal(ours.first, plain.first)
        left = len(rows)
        for step in range(room):
            tokens = torch.tensor([rng.randrange(300) for _ in range(left)])
            assert torch.equal(ours.step(tokens), plain.step(tokens)), step
            if step % 5 == 2 and left > 8:
                keep = torch.arange(left)[4:] if step < 6 else torch.tensor(sorted(rng.sample(range(left), left - 3)))
                ours.keep(keep)
                plain.keep(keep)
                left = len(keep)


def test_a_cell_equals_one_that_decodes_plainly(toy_policy, tmp_path, monkeypatch):
    """Every metric and every recorded trajectory of two steps and their validations, the clock's aside."""

    def run(folder) -> tuple[list, list]:
        training.train(
            settings_of(
                toy_policy,
                "data.train_batch_size=2",
                "actor_rollout_ref.actor.ppo_mini_batch_size=2",
                "task.horizon=1",
                "task.validation_problems=6",
                "task.final_problems=8",
                "trainer.total_training_steps=2",
                "trainer.test_freq=1",
                f"run_dir={folder}",
            )
        )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = [
            {k: v for k, v in line["metrics"].items() if not k.startswith("timing_s/")} | {"step": line["step"]}
            for line in lines
        ]
        return metrics, [
            json.loads(line)
            for file in sorted((folder / "trajectories").iterdir())
            for line in file.read_text().splitlines()
        ]

    ours = run(tmp_path / "ours")
    monkeypatch.setattr(rollout, "Decoder", PlainDecoder)
    assert run(tmp_path / "plain") == ours
    assert len(ours[0]) == 3 and len(ours[1]) == 2 * 2 * 8
