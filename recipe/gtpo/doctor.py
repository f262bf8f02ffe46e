"""Look at all that a run needs, and start none: `python -m recipe.gtpo.doctor [the arguments of the run]`.

The checks are the run's own (recipe/gtpo/run): a run stops at the first that fails, this goes through all of them, says
what to do about each, and ends with 1 if one failed. It starts the tool server for one call, nothing else, and writes
nothing. Data that `recipe.gtpo.data` has prepared are looked at; what a task makes when a run starts (the embedded
policy and its data) is not made here. On GPUs a table follows of what fits them, by arithmetic
(recipe/gtpo/run/memory.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from recipe.gtpo.run.environment import settle

settle(sys.argv[1:])  # before hydra and verl are imported

from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from recipe.gtpo.main import tool_server, validate  # noqa: E402
from recipe.gtpo.run import checks, memory  # noqa: E402
from recipe.gtpo.run.checks import OF_DATA, choose_model, compose, first_checks, given_checks  # noqa: E402
from recipe.gtpo.run.errors import ConfigError, one_line  # noqa: E402
from recipe.gtpo.run.gpu import Check, machines_of  # noqa: E402
from recipe.gtpo.run.inputs import Say, check_reward, expand_paths, fill_open  # noqa: E402
from recipe.gtpo.run.machine import gpus, host_memory  # noqa: E402
from recipe.gtpo.run.memory import Settings  # noqa: E402
from recipe.gtpo.run.tools import check_tools  # noqa: E402
from recipe.gtpo.tasks.prepared import PreparedTask  # noqa: E402
from recipe.gtpo.tasks.task import OwnData, Task, load_task  # noqa: E402
from verl_ext.tool_server.launch import ServerStartError  # noqa: E402

_MADE = "made when a run starts, not looked at"
_NO_DATA = "not looked at without data"
_NO_MODEL = "not looked at without a model"


def examinations(config: DictConfig, choices: dict[str, str]) -> Iterator[tuple[str, Check]]:
    """(what is looked at, the check): the run's, in its order."""
    yield from first_checks(config, choices).items()
    yield "reward function", lambda say: check_reward(config, load_task(config))
    task: Task | None = None
    chosen: list[str] = []  # what is said of a model that nobody named
    with suppress(Exception):  # its own check names what is wrong with the task
        task = load_task(config)
        choose_model(config, task, chosen.append)
    if task is not None and task.finds and config.data.train_files is None:
        finds = task
        yield "prepared data", lambda say: _find_data(config, finds)
    yield from (("default model", lambda say, line=line: say(line)) for line in chosen)
    given = given_checks(config)
    files, path = config.data.train_files, config.actor_rollout_ref.model.path
    asks_for_data = task is None or isinstance(task, OwnData)  # of a task that did not load nothing is known
    asks_for_model = (task is None or isinstance(task, OwnData | PreparedTask)) and config.model is None
    for name, look in given.items():
        if name in OF_DATA:
            unset, missing = files is None, asks_for_data or (task is not None and task.finds)
            without, says_what_to_set = _NO_DATA, name == "data" and asks_for_data
        else:
            unset, missing = path is None, asks_for_model
            without, says_what_to_set = _NO_MODEL, name == "model and tokenizer" and asks_for_model
        if not unset or says_what_to_set:
            yield name, look
        else:
            yield name, _passed_over(without if missing else _MADE)
    yield "verl's own checks", lambda say: validate(config)
    yield "tools", lambda say: _try_tools(config, say)


def _find_data(config: DictConfig, task: Task) -> None:
    try:
        fill_open(config, task.prepare())
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _passed_over(why: str) -> Check:
    return lambda say: say(why)


def _try_tools(config: DictConfig, say: Say) -> None:
    with tool_server(config):
        variables = {"GTPO_TOOL_SERVER_URL": config.tool_server.url, "GTPO_TOOL_SERVER_TOKEN": config.tool_server.token}
        check_tools(config, variables, say)


def diagnose(config: DictConfig, choices: dict[str, str], say: Say) -> int:
    """Go through all checks; returns how many failed."""
    expand_paths(config)
    failed = 0
    for name, look in examinations(config, choices):
        said: list[str] = []
        try:
            look(said.append)
            told = "; ".join(line.removeprefix(f"{name}: ") for line in said)
            say(f"ok    {name}" + (f": {told}" if told else ""))
        except (ConfigError, ServerStartError) as e:
            failed += 1
            say(f"FAIL  {name}: {e}")
        except Exception as e:
            failed += 1
            say(f"FAIL  {name}: {one_line(e)}")
    return failed


def main(arguments: Sequence[str]) -> int:
    overrides = read_overrides(arguments)
    try:
        config, choices = compose(*overrides)
    except (HydraException, OmegaConfBaseException) as e:
        print(f"FAIL  config: {one_line(e)}")
        return 1
    failed = diagnose(config, choices, lambda line: print(line, flush=True))
    if config.trainer.device != "cpu":
        longest = config.data.max_prompt_length + config.data.max_response_length
        print(f"\nWhat fits, by arithmetic, with trajectories of up to {longest} tokens:")
        sglang = config.actor_rollout_ref.rollout.name == "sglang"
        asked = Settings(tokens=longest, longest=longest, sglang=sglang)
        print(memory.table(machines_of(config, gpus(), host_memory()), asked))
    print(f"\n{failed} of the checks failed" if failed else "\nall checks passed")
    return 1 if failed else 0


def read_overrides(arguments: Sequence[str]) -> list[str]:
    """The overrides of a command line as a run has it, and one that says the same as its --config-dir."""
    from hydra._internal.utils import get_args_parser  # what hydra.main reads its command line with

    parsed = get_args_parser().parse_args(list(arguments))
    overrides = list(parsed.overrides)
    if parsed.config_dir is not None:
        overrides.append(f"hydra.searchpath=[pkg://verl.trainer.config,file://{Path(parsed.config_dir).resolve()}]")
    return overrides


if __name__ == "__main__":
    checks.register()
    sys.exit(main(sys.argv[1:]))
