"""Cold start: teach a model to call its tools before it is trained with GTPO.

    python -m recipe.gtpo.sft model=smollm2 task=reasoning_gym                    # the task's own teacher, on the CPU
    python -m recipe.gtpo.sft task=math sft.source=JoeYing/ReTool-SFT \
        actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct hardware=single_node rollout=vllm
    python -m recipe.gtpo.sft task=... actor_rollout_ref.model.path=... sft.source=outputs/RUN   # rejection sampling

The arguments are the overrides of the run that is to follow; those of the section `sft` in config/gtpo_trainer.yaml are
this command's. It prints the folder of the trained model last, to be given as actor_rollout_ref.model.path.
"""

from __future__ import annotations

import sys

from recipe.gtpo.run.environment import settle

settle(sys.argv[1:])  # before hydra and verl are imported

from hydra.errors import HydraException  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from recipe.gtpo.doctor import read_overrides  # noqa: E402
from recipe.gtpo.run.checks import choose_model, compose, prepare_model, prepare_task  # noqa: E402
from recipe.gtpo.run.errors import ConfigError, one_line  # noqa: E402
from recipe.gtpo.run.model import check_model  # noqa: E402
from recipe.gtpo.sft.cold_start import check_source, cold_start  # noqa: E402
from verl_ext.tool_server.launch import ServerStartError  # noqa: E402


def say(text: str) -> None:
    print(f"sft: {text}", flush=True)


def main() -> int:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        config, _ = compose(*read_overrides(arguments))
        check_source(config)  # before a task makes what may take minutes
        task = prepare_task(config, scored=False)
        prepare_model(config, say)
        choose_model(config, task, say)
        check_model(config, [], say)  # a chat template that shows no tools teaches none
        print(cold_start(config, say))
    except ConfigError as e:
        return _end(str(e))
    except (HydraException, OmegaConfBaseException, ServerStartError, ValueError, OSError) as e:
        return _end(one_line(e) if isinstance(e, HydraException | OmegaConfBaseException) else str(e))
    return 0


def _end(cause: str) -> int:
    print(f"sft: error: {cause.splitlines()[0]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
