"""Prepare the data of a task.

    python -m recipe.gtpo.data prepare task=math                                   # from the hub
    python -m recipe.gtpo.data prepare task=gsm8k local=../shared/data out=data/gsm8k
    python -m recipe.gtpo.data prepare task=math source=agentica-org/DeepScaleR-Preview-Dataset

Keys:
    task        gsm8k, math, commonsense, code, reasoning_gym, or one of yours that extends PreparedTask
    config_dir  the folder with your task's YAML, task/NAME.yaml: what a run is given as --config-dir
    source      training problems from elsewhere: a file (.jsonl, .json, .jsonl.gz, .parquet) or a hub id,
                with :CONFIG after it where it has several                                          (the task's own)
    local       a folder with local copies, <set>/<split>.jsonl, instead of the hub
    evaluation  comma-separated evaluation sets                                                 (all of the task's)
    out         the folder to write                                                             (the task's own)
    task.KEY    a key of the task's YAML, such as task.system
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from recipe.gtpo.data.prepare import prepare
from recipe.gtpo.run.environment import CONFIG_DIR, find_choice
from recipe.gtpo.tasks.prepared import PreparedTask
from recipe.gtpo.tasks.task import Task, load_task

KEYS = ("task", "config_dir", "source", "local", "evaluation", "out")


def make_task(name: str, settings: Sequence[str] = (), config_dir: str | None = None) -> Task:
    """The task of task/NAME.yaml, here or in `config_dir`, with `task.KEY=VALUE` settings. Raises ValueError."""
    own = [] if config_dir is None else [Path(config_dir)]
    file = find_choice("task", name, own)
    if file is None:
        known = sorted({path.stem for folder in (CONFIG_DIR, *own) for path in (folder / "task").glob("*.yaml")})
        raise ValueError(
            f"unknown task={name}; tasks: {', '.join(known)}; one of yours: config_dir=FOLDER, with "
            f"FOLDER/task/{name}.yaml"
        )
    section = OmegaConf.load(file).task
    config = OmegaConf.merge({"seed": 1, "task": section}, OmegaConf.from_dotlist(list(settings)))
    try:
        return load_task(config)  # type: ignore[arg-type]
    except InstantiationException as e:
        raise ValueError(f"task={name}: {e.__cause__ or e}") from e


def run(arguments: Sequence[str]) -> None:
    """Raises ValueError with one line for the user."""
    if not arguments or arguments[0] != "prepare":
        raise ValueError(f"{' '.join(arguments[:1]) or 'no command'}: the command is prepare, with task=NAME")
    given: dict[str, str] = {}
    settings = []
    for argument in arguments[1:]:
        name, equals, value = argument.partition("=")
        if name.startswith("task.") and equals:
            settings.append(argument)
        elif name in KEYS and value:
            given[name] = value
        else:
            raise ValueError(f"{argument}: no KEY=VALUE of this command; keys: {', '.join(KEYS)}, task.KEY")
    if "task" not in given:
        raise ValueError("task= is missing")
    task = make_task(given["task"], settings, given.get("config_dir"))
    if not isinstance(task, PreparedTask):
        raise ValueError(f"task={task.name} needs no preparation: a run makes what it needs, or takes your files")
    prepare(
        task,
        Path(given.get("out", task.folder)),
        source=given.get("source"),
        local=Path(given["local"]) if "local" in given else None,
        evaluation=given["evaluation"].split(",") if "evaluation" in given else None,
        say=lambda text: print(f"data: {text}", flush=True),
        progress=True,
    )


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        run(sys.argv[1:])
    except (ValueError, OSError) as e:
        print(f"data: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
