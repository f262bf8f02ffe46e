"""The benchmarks of an evaluation: config, problems and limits of each, and what is checked before anything starts."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.data.prepare import prepare_evaluation
from recipe.gtpo.evaluate.models import Model, fingerprint, run_config, run_overrides
from recipe.gtpo.evaluate.request import (
    Benchmark,
    Request,
    check_task_keys,
    find_benchmarks,
    key_of,
    overrides_of,
    task_of,
)
from recipe.gtpo.models.cache import FACTS
from recipe.gtpo.run import checks
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.gpu import machine_checks
from recipe.gtpo.run.identity import differences, flatten
from recipe.gtpo.run.inputs import ask_reward, check_data, check_machine, check_reward, expand_paths, fill_open
from recipe.gtpo.run.model import check_model
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.tasks.prepared import MANIFEST, PreparedTask
from recipe.gtpo.tasks.task import Task, load_task

_SHARE = 0.85  # of a GPU's memory that a rollout engine takes where nothing trains beside it
_ROLLOUT = "actor_rollout_ref.rollout"


def say(text: str) -> None:
    print(f"evaluate: {text}", flush=True)


@dataclass
class Entry:
    """One benchmark with everything that it is evaluated with. `rows`, once there is a tokenizer."""

    benchmark: Benchmark
    config: DictConfig
    choices: dict[str, str]
    samples: int
    task: Task = field(default=None, repr=False)  # type: ignore[assignment]
    rows: Any = None

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def files(self) -> list[str]:
        files = self.config.data.val_files
        return [files] if isinstance(files, str) else list(files)


def make_entries(request: Request, model: Model) -> list[Entry]:
    run = run_overrides(model)
    run_task = None if model.run is None else task_of(run, "arithmetic")
    compose = functools.lru_cache(maxsize=None)(checks.compose)  # a second each, and most benchmarks share one
    entries = []
    benchmarks = find_benchmarks(request.benchmarks, task_of(request.overrides, run_task))
    check_task_keys(benchmarks, request, run_task)
    for one in benchmarks:
        config, choices = compose(*overrides_of(one, request, run, run_task))
        entries.append(Entry(one, deepcopy(config), dict(choices), request.samples or one.samples))
    return entries


def make_record(request: Request, model: Model, entries: Sequence[Entry]) -> RunRecord:
    """In `run_dir=`, or in a folder that is named by what is asked for."""
    if any(key_of(one) == "run_dir" for one in request.overrides):
        return RunRecord(Path(entries[0].config.run_dir).expanduser().resolve())
    copies = [] if request.local is None else [f"local={_local(request)}"]
    more = [*request.overrides, *copies, f"compare={request.compare}", f"endpoint={request.endpoint}"]
    names = "-".join(entry.name for entry in entries)
    facts = hashlib.sha256("\n".join([*sorted(more), names]).encode()).hexdigest()[:6]
    chosen = request.overrides or copies or request.compare is not None or request.endpoint is not None
    plain_one = not chosen and len(names) < 60
    return RunRecord(
        Path("outputs/evaluations").resolve() / f"{model.label}-{names[:60]}{'' if plain_one else '-' + facts}"
    )


def fill(entry: Entry, record: RunRecord, request: Request) -> None:
    """The benchmark's problems and limits, as its task has them. Raises ConfigError."""
    config = entry.config
    expand_paths(config)
    config.run_dir = str(record.dir)
    config.trainer.default_local_dir = str(record.dir / "checkpoints")
    try:
        entry.task = load_task(config)
        check_reward(config, entry.task)
        made = _find_problems(entry, record, request)
    except InstantiationException as e:
        raise ConfigError(f"task={entry.benchmark.task}: {e.__cause__ or e}") from e
    except ValueError as e:
        raise ConfigError(f"{entry.name}: {e}") from e
    fill_open(config, made)
    if OmegaConf.select(config, f"{_ROLLOUT}.gpu_memory_utilization") is None:
        config.actor_rollout_ref.rollout.gpu_memory_utilization = _SHARE


def _find_problems(entry: Entry, record: RunRecord, request: Request) -> dict[str, Any]:
    """verl key -> value, for the keys that are open."""
    task, one = entry.task, entry.benchmark
    if one.file is not None:
        entry.config.data.val_files = str(one.file)
    if not isinstance(task, PreparedTask):
        return task.prepare_evaluation()
    if one.file is not None:
        return {}
    names = [source.name for source in task.evaluation]
    if one.chosen not in names:
        raise ConfigError(f"benchmarks={one.name} is no set of task={one.task}: {', '.join(names)}")
    file = record.dir / "data" / f"{one.name}.parquet"
    prepared = Path(task.folder).resolve()
    facts = {"task": task.name, "set": one.chosen, "local": _local(request), "settings": task.settings}
    if file.is_file() and _made_of(file) == facts:
        pass
    elif request.local is None and _is_prepared(task, prepared, one.chosen):
        file = prepared / f"{one.chosen}.parquet"
    else:
        _make(file, facts, task, record, request)
    entry.config.data.val_files = str(file)
    return {}


def _make(file: Path, facts: dict[str, Any], task: PreparedTask, record: RunRecord, request: Request) -> None:
    """Write the problems, and beside them of what they are made. Raises ConfigError where samples may be of others."""
    if file.is_file() and record.read_config() is not None:
        theirs = _made_of(file)
        other = (
            "that is not written down" if theirs is None else f"else: {differences(flatten(theirs), flatten(facts))}"
        )
        raise ConfigError(
            f"{file} was made of something {other}. Give this evaluation a folder of its own (run_dir=...), or the "
            "same values"
        )
    _facts_of(file).unlink(missing_ok=True)  # first: a kill in between leaves problems that are made again
    prepare_evaluation(task, facts["set"], file, local=request.local, say=lambda text: say(f"data: {text}"))
    _facts_of(file).write_text(json.dumps(facts, indent=1) + "\n")


def _facts_of(file: Path) -> Path:
    return file.with_suffix(f".{FACTS}")


def _made_of(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(_facts_of(file).read_text())
    except (FileNotFoundError, ValueError):  # made before this was written down, or cut off
        return None


def _local(request: Request) -> str | None:
    return None if request.local is None else str(request.local.resolve())


def _is_prepared(task: PreparedTask, folder: Path, name: str) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    found = json.loads((folder / MANIFEST).read_text())
    return found.get("settings") == task.settings and name in found["evaluation"]


def check_entry(entry: Entry, models: Sequence[Model], request: Request) -> None:
    """What a training run looks at before it starts, as far as it is needed to evaluate. Raises ConfigError."""
    config = entry.config
    checks.check(config, entry.choices)
    prompts = check_data(config, lambda text: None, keys=("val_files",))
    ask_reward(config, prompts)
    for model in models:
        config.actor_rollout_ref.model.path = model.path
        check_model(config, prompts, lambda text: say(f"{entry.name}: {text}"), weights=request.endpoint is None)
        if (warning := checks.short_context(config)) is not None:
            say(f"warning: {entry.name}: {warning}")


def check_hardware(models: Sequence[Model], request: Request) -> None:
    """Raise ConfigError where nobody said on what a model of a training on GPUs is to be evaluated.

    What belongs to the machine is not taken from a run, and the config's own hardware is the CPU: a 7B would sit there
    for days, and nothing would say why.
    """
    if request.endpoint is not None or any(key_of(one) == "hardware" for one in request.overrides):
        return
    for model in models:
        device = run_config(model).get("trainer.device", "cpu")
        if device != "cpu":
            raise ConfigError(
                f"{model} was trained with trainer.device={device}, and without hardware= it would be evaluated on the "
                "CPU: give hardware=single_node rollout=vllm, or what the machine has; hardware=cpu, if that is meant"
            )


def check_here(config: DictConfig, request: Request) -> None:
    """The machine, where servers are started on it."""
    if request.endpoint is not None:
        return
    check_machine(config)
    for name, look in machine_checks(config).items():
        if name not in ("batch", "processors"):  # of a training
            look(say)


def identity(entries: Sequence[Entry], models: Sequence[Model], request: Request) -> DictConfig:
    """What the folder of an evaluation belongs to. Free to change: how many samples, and how many at once."""
    first = OmegaConf.to_container(entries[0].config, resolve=True)
    assert isinstance(first, dict)
    first["evaluation"] = {
        "models": {str(i): {"name": str(m), "files": fingerprint(m)} for i, m in enumerate(models)},
        "endpoint": request.endpoint,
        "local": _local(request),
        "served_model": request.served_model,
        "benchmarks": {
            entry.name: {
                "problems": hashlib.sha256(b"".join(Path(file).read_bytes() for file in entry.files)).hexdigest()[:16],
                **{
                    key: OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
                    for key in ("task", "reward", "data.max_prompt_length", "data.max_response_length", _ROLLOUT)
                    for section in [OmegaConf.select(entry.config, key)]
                },
            }
            for entry in entries
        },
    }
    return OmegaConf.create(first)


def _text(content: Any) -> str:
    """Of a message, which may be a list of parts."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def describe(entry: Entry) -> dict[str, Any]:
    """What a benchmark was evaluated with."""
    rollout = entry.config.actor_rollout_ref.rollout
    prompts = [entry.rows[i]["raw_prompt"] for i in range(len(entry.rows))]
    systems = {_text(m["content"]) for messages in prompts for m in messages if m["role"] == "system"}
    return {
        "task": entry.benchmark.task,
        "problems": entry.files,
        "system_message": systems.pop() if len(systems) == 1 else sorted(systems) or None,
        "first_prompt": [dict(message) for message in prompts[0]],
        "samples": entry.samples,
        "turns": rollout.multi_turn.max_assistant_turns,
        "prompt_tokens": entry.config.data.max_prompt_length,
        "response_tokens": entry.config.data.max_response_length,
        "tools": rollout.multi_turn.tool_config_path or rollout.multi_turn.function_tool_path,
        **{name: rollout.val_kwargs[name] for name in ("temperature", "top_p", "top_k")},
    }
