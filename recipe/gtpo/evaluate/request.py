"""What the command line of an evaluation asks for, and the config that each benchmark is evaluated with.

A benchmark of the task that a run was trained on keeps the run's own settings: prompt, limits, tools, sampling. A
benchmark of another task has that task's file. What belongs to the model (`model=NAME` with all that it sets, chat
template, seed, what programs can import) is the run's in both cases. What belongs to the machine never is. The command
line has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.utils import get_class
from omegaconf import OmegaConf

from recipe.gtpo.run.environment import CONFIG_DIR
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.tasks.prepared import PreparedTask

_ROLLOUT = "actor_rollout_ref.rollout"
#: Short keys of the command -> keys of the config.
SAMPLING = {"temperature": f"{_ROLLOUT}.val_kwargs.temperature", "top_p": f"{_ROLLOUT}.val_kwargs.top_p"}
KEYS = ("model", "benchmarks", "samples", "compare", "endpoint", "served_model", "api_key_env", "local", "concurrency")

#: Keys and sections of a run's command line that go with its model, whatever it is evaluated on ...
OF_MODEL = (
    "actor_rollout_ref.model",
    f"{_ROLLOUT}.dtype",
    "chat_template",
    "data.apply_chat_template_kwargs",
    "hydra.searchpath",  # a group below may be a file of the user's own
    "model",  # the group; `model=` of an evaluation is another key, and `Request` takes it out of the overrides
    "seed",
    "tool_server.limits",
    "tool_server.packages",
)
#: ... those of them that stay with the run: its own path, and how it was trained ...
_NOT_OF_MODEL = (
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
    "actor_rollout_ref.model.lora_adapter_path",
    "actor_rollout_ref.model.lora_alpha",
    "actor_rollout_ref.model.lora_rank",
    "actor_rollout_ref.model.target_modules",
    "actor_rollout_ref.model.use_fused_kernels",
    "actor_rollout_ref.model.use_remove_padding",
)
#: ... and those that go with its task.
OF_TASK = (
    "algorithm.gtpo",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.prompt_key",
    "experiment",
    "method",
    "reward",
    "reward_timeout_seconds",
    f"{_ROLLOUT}.max_model_len",
    f"{_ROLLOUT}.multi_turn",
    f"{_ROLLOUT}.val_kwargs",
    "task",
)


@dataclass(frozen=True)
class Benchmark:
    """Args:
    name: in the table, the records and the name of its file.
    task: the choice of the config's group `task`.
    chosen: the evaluation set of that task; None: the validation problems that the task makes, or `file`.
    file: rows in verl's columns.
    samples: attempts a problem where the user does not say.
    generator: of reasoning-gym; None: all that the task names.
    """

    name: str
    task: str
    chosen: str | None = None
    file: Path | None = None
    samples: int = 1
    generator: str | None = None


@dataclass(frozen=True)
class Request:
    """The command line. `overrides` are hydra's, in the order given."""

    model: str
    benchmarks: tuple[str, ...]
    samples: int | None = None
    compare: str | None = None
    endpoint: str | None = None
    served_model: str | None = None
    api_key_env: str | None = None
    local: Path | None = None
    concurrency: int | None = None
    overrides: tuple[str, ...] = field(default=())

    @classmethod
    def parse(cls, arguments: Iterable[str]) -> Request:
        """Raises ConfigError with what is missing or wrong."""
        given: dict[str, str] = {}
        overrides = []
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if key in KEYS and equals and value:
                given[key] = value
            elif key in KEYS:
                raise ConfigError(f"{argument}: {key}= has no value")
            elif key in SAMPLING:
                _check_sampling(key, value)
                overrides.append(f"{SAMPLING[key]}={value}")
            elif not equals and not argument.startswith("~"):
                raise ConfigError(f"{argument}: no KEY=VALUE")
            else:
                overrides.append(argument)
        for key, what in (
            ("model", "a run's folder, a checkpoint, a model's folder or a hub name"),
            ("benchmarks", ""),
        ):
            if key not in given:
                raise ConfigError(
                    f"{key}= is missing: {what or 'names with commas between them: ' + ', '.join(known())}"
                )
        names = tuple(name for name in given["benchmarks"].split(",") if name)
        if len(set(names)) < len(names):
            raise ConfigError(f"benchmarks={given['benchmarks']}: a name is there twice")
        if "endpoint" in given and "compare" in given:
            raise ConfigError(
                "compare= and endpoint=: an endpoint serves one model; evaluate each into its own run_dir"
            )
        if "endpoint" not in given and given.keys() & {"served_model", "api_key_env"}:
            raise ConfigError("served_model= and api_key_env= are of an endpoint: endpoint=http://HOST:PORT/v1")
        return cls(
            model=given["model"],
            benchmarks=names,
            samples=_count("samples", given),
            compare=given.get("compare"),
            endpoint=given.get("endpoint"),
            served_model=given.get("served_model"),
            api_key_env=given.get("api_key_env"),
            local=Path(given["local"]).expanduser() if "local" in given else None,
            concurrency=_count("concurrency", given),
            overrides=tuple(overrides),
        )


def _count(key: str, given: Mapping[str, str]) -> int | None:
    if key not in given:
        return None
    if not given[key].isdecimal() or int(given[key]) < 1:
        raise ConfigError(f"{key}={given[key]}: a whole number, 1 or more")
    return int(given[key])


def _check_sampling(key: str, value: str) -> None:
    """Raise ConfigError for what the engine would refuse, or take for something else, after everything has started."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if key == "temperature" and not 0 <= number < float("inf"):
        raise ConfigError(f"temperature={value}: a number, 0 (always the likeliest token) or more")
    if key == "top_p" and not 0 < number <= 1:
        raise ConfigError(f"top_p={value}: a number above 0, at most 1")


# -- benchmarks -------------------------------------------------------------------------------------------------------


def known() -> dict[str, Benchmark]:
    """All names of the shipped tasks."""
    found: dict[str, Benchmark] = {}
    for path in sorted((CONFIG_DIR / "task").glob("*.yaml")):
        section = OmegaConf.load(path).task
        task = get_class(section._target_)
        if issubclass(task, PreparedTask):
            for one in task.evaluation:
                found[one.name] = Benchmark(one.name, path.stem, one.name, samples=one.samples)
                for generator in section.get("generators", {}):
                    found[generator] = Benchmark(generator, path.stem, one.name, generator=generator)
        elif path.stem != "verl_data":  # which has no problems of its own
            found[path.stem] = Benchmark(path.stem, path.stem)
    return found


def find_benchmarks(names: Sequence[str], task: str | None) -> list[Benchmark]:
    """Args: `task`: that of the run or of the command line, for files, and for names of a task of the user's own.

    Raises ConfigError for a name that is none.
    """
    all_known, found = known(), []
    own = {path.stem for path in (CONFIG_DIR / "task").glob("*.yaml")}
    for name in names:
        if Path(name).suffix in (".parquet", ".jsonl", ".json"):
            if not Path(name).expanduser().is_file():
                raise ConfigError(f"benchmarks={name} does not exist")
            file = Path(name).expanduser().resolve()
            found.append(Benchmark(file.stem, task or "verl_data", file=file))
        elif name in all_known:
            found.append(all_known[name])
        elif task is not None and task not in own:
            found.append(Benchmark(name, task, None if name == task else name))
        else:
            raise ConfigError(
                f"benchmarks={name} is none: {', '.join(all_known)}, or a .parquet or .jsonl file in verl's columns"
            )
    if len({one.name for one in found}) < len(found):
        raise ConfigError("two benchmarks have the same name: rename a file")
    return found


def check_task_keys(benchmarks: Sequence[Benchmark], request: Request, run_task: str | None) -> None:
    """Raise ConfigError for a key of a task that none of the benchmarks is of: it would be passed over."""
    own = task_of(request.overrides, run_task)
    for override in request.overrides:
        if key_of(override).startswith("task.") and own not in (None, *(one.task for one in benchmarks)):
            raise ConfigError(
                f"{override} is a key of task={own}, which no benchmark is of: task=NAME says whose it is"
            )


# -- configs ----------------------------------------------------------------------------------------------------------


def key_of(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def task_of(overrides: Sequence[str], otherwise: str | None) -> str | None:
    """The choice of the group `task` that the overrides make."""
    found = [one.partition("=")[2] for one in overrides if key_of(one) == "task"]
    return found[-1] if found else otherwise


def overrides_of(benchmark: Benchmark, request: Request, run: Sequence[str], run_task: str | None) -> tuple[str, ...]:
    """What the benchmark's config is composed of.

    Args:
        run: the overrides of the run that trained the model.
        run_task: its task.

    A `task.KEY=` of the command line is for the task that `task=` names, or else for the run's, or else for all.
    """
    own = task_of(request.overrides, run_task)
    given = [one for one in request.overrides if own in (None, benchmark.task) or not key_of(one).startswith("task.")]
    sections = OF_MODEL + (OF_TASK if benchmark.task == run_task else ())
    inherited = [one for one in run if _is_of(key_of(one), sections) and not _is_of(key_of(one), _NOT_OF_MODEL)]
    merged: dict[str, str] = {}
    for override in [*inherited, *given, f"task={benchmark.task}"]:
        merged[key_of(override)] = override
    made = list(merged.values())
    if benchmark.generator is not None:
        # null and not `~`: hydra deletes nothing that is null already, and sets nothing that is deleted. {} keeps
        # settings, and takes back a null.
        made = [one for one in made if not one.startswith("~task.generators.")]
        made += [f"task.generators.{one}=null" for one in _generators(benchmark.task) if one != benchmark.generator]
        made.append(f"task.generators.{benchmark.generator}={{}}")
    return tuple(made)


def _generators(task: str) -> list[str]:
    return list(OmegaConf.load(CONFIG_DIR / "task" / f"{task}.yaml").task.generators)


def _is_of(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
