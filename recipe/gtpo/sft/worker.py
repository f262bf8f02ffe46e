"""A process of the cold start: `python -m recipe.gtpo.sft.worker CONFIG.yaml`, by torchrun on several GPUs.

verl's own SFT trainer does the training. It runs apart from the command so that its memory and its process group end
with it.
"""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig, OmegaConf


def run(config: DictConfig) -> None:
    """One process of verl's SFT training, from the process group to its end."""
    import torch

    if config.trainer.device == "cpu":
        # verl's own helper names the CPU twice, and torch refuses it (verl_ext/cpu/workers.py)
        import verl_ext.cpu.engine  # registers the engine

        torch.distributed.init_process_group("gloo")
    else:
        from verl.utils.distributed import initialize_global_process_group

        import verl_ext.fused_head  # noqa: F401  as in a run

        initialize_global_process_group()
    from verl.trainer.sft_trainer import SFTTrainer

    torch.manual_seed(config.trainer.seed)
    SFTTrainer(config).fit()
    torch.distributed.destroy_process_group()


def main() -> None:
    config = OmegaConf.load(sys.argv[1])
    assert isinstance(config, DictConfig)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)  # torchrun sets them
    run(config)


if __name__ == "__main__":
    main()
