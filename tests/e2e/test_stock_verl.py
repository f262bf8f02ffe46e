"""verl's own command, trainer and tool agent with `algorithm.adv_estimator=gtpo`: what a user of another recipe gets.

Nothing of ours is on the command line but the estimator's name; the rest of the overrides makes verl run on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from recipe.gtpo.run.checks import CONFIG_DIR
from recipe.gtpo.tasks.arithmetic.task import Arithmetic
from verl_ext.tool_server.launch import start_server

SAID = "gtpo: no recorded turns: turns from the response mask, outcome on the last turn, no shaping"

# What config/hardware/cpu.yaml says, for a command that does not read it.
CPU = [
    "trainer.device=cpu",
    "trainer.v1.trainer_mode=cpu_sync",
    "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.model.use_remove_padding=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
    "actor_rollout_ref.rollout.name=transformers",
    "actor_rollout_ref.rollout.dtype=float32",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.free_cache_engine=false",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "+ray_kwargs.ray_init.address=local",
    "ray_kwargs.ray_init.num_cpus=16",
    "+ray_kwargs.ray_init.num_gpus=1",
    "+ray_kwargs.ray_init.include_dashboard=false",
    "reward.num_workers=1",
    "data.dataloader_num_workers=0",
]


def run_stock(tmp_path, *overrides: str) -> subprocess.CompletedProcess:
    """Two steps of verl's main_ppo; the tool server it needs runs for as long."""
    made = Arithmetic(
        name="arithmetic",
        seed=1,
        horizon=2,
        success=0.2,
        train_problems=64,
        validation_problems=4,
        final_problems=4,
        cache=str(tmp_path.parent),
        warm_start={"steps": 1, "base": {"skill": 0.0, "check_every": 3}},
    ).prepare()
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=gtpo", *CPU),
        f"actor_rollout_ref.model.path={made['actor_rollout_ref.model.path']}",
        f"data.train_files={made['data.train_files']}",
        f"data.val_files={made['data.val_files']}",
        f"data.max_prompt_length={made['data.max_prompt_length']}",
        *("data.train_batch_size=2", "data.max_response_length=32"),
        *("actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.actor.use_dynamic_bsz=true"),
        *("actor_rollout_ref.rollout.n=2", "actor_rollout_ref.rollout.multi_turn.enable=true"),
        f"actor_rollout_ref.rollout.multi_turn.tool_config_path={CONFIG_DIR / 'tools' / 'calculator.yaml'}",
        "actor_rollout_ref.rollout.agent.agent_loop_config_path=" + str(tmp_path / "agent.yaml"),
        *("reward.custom_reward_function.path=pkg://recipe.gtpo.tasks.arithmetic.problems", "trainer.logger=[console]"),
        *("trainer.total_training_steps=2", "trainer.val_before_train=false", "trainer.resume_mode=disable"),
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
        f"hydra.run.dir={tmp_path / 'hydra'}",
        *overrides,
    ]
    # The generated rows name our agent loop; here that name stands for verl's own tool agent.
    (tmp_path / "agent.yaml").write_text(
        "- name: gtpo_agent\n  _target_: verl.experimental.agent_loop.tool_agent_loop.ToolAgentLoop\n"
    )
    with start_server(workers=1) as server:
        environment = {
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": "verl_ext.cpu.platform,verl_ext.cpu.workers",
            "GTPO_TOOL_SERVER_URL": server.url,
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=tmp_path)


@pytest.mark.e2e
def test_the_estimator_runs_in_verls_own_recipe(tmp_path):
    done = run_stock(tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "step:2 " in output and "actor/grad_norm" in output  # verl's console logger
    assert SAID in output


@pytest.mark.slow  # the check itself is a unit test (tests/gtpo); here: that it reaches the user of a stock command
def test_rollout_correction_that_rewrites_the_mask_is_refused(tmp_path):
    rejection = "algorithm.rollout_correction.rollout_rs"
    done = run_stock(tmp_path, f"{rejection}=token_k1", f"{rejection}_threshold='0.5_2.0'")
    assert done.returncode != 0
    assert "rewrites response_mask" in done.stdout + done.stderr
