"""What a run is given: machine, choices, reward function, data. The model and its tokenizer: `model.py` beside this.

Each is looked at before a process starts, and a fault raises ConfigError with its cause and its remedy: verl finds the
same ones minutes later, in a worker, and names something else. Nothing here takes more than a second or two.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.conversation import TEXT_ONLY, not_text, read_score
from recipe.gtpo.run.errors import ConfigError, near, one_line
from recipe.gtpo.run.scoring import SPECIMEN, ScoreError, custom_score, load_function, try_score
from recipe.gtpo.tasks.task import Task

Say = Callable[[str], None]

_README = "README.md, section 'Your own data and reward'"

# -- the machine ------------------------------------------------------------------------------------------------------

#: Ray's longest socket is <folder>/session_<date, time, microseconds>_<pid>/sockets/plasma_store.
_SESSION = "session_2000-01-01_00-00-00_000000"
_SOCKET_BYTES = 107  # of a Unix socket's path, on Linux


def ray_starts_here(config: DictConfig) -> bool:
    """Whether the run starts a Ray of its own on this machine, or joins one that runs."""
    return config.ray_kwargs.ray_init.get("address") in (None, "local") and "RAY_ADDRESS" not in os.environ


def check_machine(config: DictConfig) -> None:
    """The folders that Ray and the workers write to beside the run's own: temporary files, and a cache of the data."""
    if ray_starts_here(config):
        base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # in Ray's own order
        folder = OmegaConf.select(config, "ray_kwargs.ray_init._temp_dir") or f"{base}/ray"
        too_long = len(f"{folder}/{_SESSION}_{os.getpid()}/sockets/plasma_store".encode()) - _SOCKET_BYTES
        if too_long > 0:
            raise ConfigError(
                f"Ray's temporary folder {folder} is {too_long} bytes too long for its sockets: set RAY_TMPDIR to a "
                "short folder, for example RAY_TMPDIR=/tmp"
            )
        _check_writable(folder, "Ray's temporary folder", "set RAY_TMPDIR to a folder that is")
        token = Path.home() / ".ray" / "auth_token"
        given = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or token.is_file()
        if not given and os.environ.get("RAY_AUTH_MODE", "token") == "token":
            remedy = "set HOME to a folder that is, or RAY_AUTH_MODE=disabled"
            _check_writable(str(token.parent), "the folder of the token that Ray makes", remedy)
    _check_writable(
        _datasets_cache(),
        "the folder in which Hugging Face's datasets are cached",
        "set HF_HOME to a folder that is, or HOME",
    )


def _datasets_cache() -> str:
    """As the package `datasets` works it out, which takes a second to import."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return os.path.expanduser(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets")


def _check_writable(folder: str, what: str, remedy: str) -> None:
    """Write a file, where the folder is or would be made: permissions do not say all (a full or read-only disk)."""
    try:
        there = next(path for path in (Path(folder), *Path(folder).resolve().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as e:
        raise ConfigError(f"{what}, {folder}, is not writable ({e.strerror or e}): {remedy}") from e


# -- choices ----------------------------------------------------------------------------------------------------------

_RESUME_MODES = ("auto", "disable", "resume_path")
#: Loggers that need a package of another name than theirs, or none.
_LOGGER_PACKAGES = {"console": None, "file": None, "rl_insight": None, "vemlp_wandb": "volcengine_ml_platform"}


#: Whole numbers that verl compares or divides by after it has started, without having looked at them.
_COUNTS = (
    "seed",
    *(f"data.{key}" for key in ("train_batch_size", "max_prompt_length", "max_response_length")),
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    *(f"actor_rollout_ref.rollout.{key}" for key in ("n", "val_kwargs.n", "multi_turn.max_assistant_turns")),
    *(f"trainer.{key}" for key in ("total_training_steps", "test_freq", "save_freq", "nnodes", "n_gpus_per_node")),
)


def check_counts(config: DictConfig) -> None:
    """Raise ConfigError for a count that is no whole number; one of verl's that is not set is for others to judge."""
    for key in _COUNTS:
        value = OmegaConf.select(config, key)
        if value is not None and not _is_whole(value):
            raise ConfigError(f"{key}={value}: a whole number is needed")
    freq, keep = config.trajectory_freq, config.trajectory_keep
    if not _is_whole(freq) or freq < 1:
        raise ConfigError(f"trajectory_freq={freq}: a whole number, at least 1; one above the last step records none")
    if keep is not None and (not _is_whole(keep) or keep < 1):
        raise ConfigError(f"trajectory_keep={keep}: a whole number, at least 1, or null, which keeps all")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_choices(config: DictConfig) -> None:
    """Words that verl looks up when it needs them: the estimator after the first rollouts, a logger at the start of
    the training, the resume mode never."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.utils.tracking import Tracking

    import recipe.gtpo.plugin  # noqa: F401  registers ours

    _check_word("algorithm.adv_estimator", config.algorithm.adv_estimator, ADV_ESTIMATOR_REGISTRY)
    _check_word("trainer.resume_mode", config.trainer.resume_mode, _RESUME_MODES)
    loggers = config.trainer.logger
    for logger in [loggers] if isinstance(loggers, str) else loggers or []:
        _check_word("trainer.logger", logger, Tracking.supported_backend)
        package = _LOGGER_PACKAGES.get(logger, logger)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"trainer.logger={logger}: the package {package} is not installed; pip install it")


def _check_word(key: str, word: Any, valid: Iterable[str]) -> None:
    known = sorted(str(getattr(one, "value", one)) for one in valid)
    if str(word) in known:
        return
    raise ConfigError(f"{key}={word} is none that verl has.{near(str(word), known)} Valid: {', '.join(known)}")


# -- paths ------------------------------------------------------------------------------------------------------------

_MODEL = "actor_rollout_ref.model"
_PATHS = (
    "reward.custom_reward_function.path",
    f"{_MODEL}.path",
    f"{_MODEL}.tokenizer_path",
    f"{_MODEL}.hf_config_path",
    f"{_MODEL}.lora_adapter_path",
    "actor_rollout_ref.rollout.multi_turn.tool_config_path",
    "actor_rollout_ref.rollout.multi_turn.function_tool_path",
)


def fill_open(config: DictConfig, values: Mapping[str, Any]) -> None:
    """Give the keys of verl that are left open (null) their values."""
    for key, value in values.items():
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, value)


def expand_paths(config: DictConfig) -> None:
    """`~` means the home folder wherever the config has a path, and a folder may end in `/`: verl knows neither."""
    for key in _PATHS:
        path = OmegaConf.select(config, key)
        if isinstance(path, str):
            OmegaConf.update(config, key, _expand(path))
    for key in ("train_files", "val_files"):
        files = config.data[key]
        if files is not None:
            config.data[key] = _expand(files) if isinstance(files, str) else [_expand(str(file)) for file in files]


def _expand(path: str) -> str:
    return os.path.expanduser(path.rstrip("/") or path)


# -- the reward function ----------------------------------------------------------------------------------------------

_REWARD = "reward.custom_reward_function"


def _from_here(path: str) -> str:
    """Where a relative path was looked for: the example scripts change to the repository's folder."""
    return "" if "://" in path or Path(path).is_absolute() else f" in {Path.cwd()}: give an absolute path"


def check_reward(config: DictConfig, task: Task) -> None:
    """Load the reward function as a worker will, and see that it takes what it is asked with."""
    section = config.reward.custom_reward_function
    path, name = section.path, section.name
    if path is None:
        if not task.scores:
            raise ConfigError(f"{_REWARD}.path is not set: a Python file with compute_score(...)")
        return
    if not path.startswith("pkg://") and not Path(path.removeprefix("file://")).is_file():
        raise ConfigError(f"{_REWARD}.path={path} does not exist{_from_here(path)}")
    try:
        function, kwargs = load_function(OmegaConf.to_container(section, resolve=True))  # type: ignore[arg-type]
    except SyntaxError as e:
        raise ConfigError(f"{_REWARD}.path: {e.filename}, line {e.lineno}, is no Python: {e.msg}") from e
    except (Exception, SystemExit) as e:
        if isinstance(e, AttributeError) and e.name == name and inspect.ismodule(e.obj):
            has = [key for key, value in vars(e.obj).items() if getattr(value, "__module__", None) == e.obj.__name__]
            raise ConfigError(
                f"{_REWARD}.name={name}: {path} has no such function; it has {', '.join(has) or 'none'}"
            ) from e
        raise ConfigError(f"{_REWARD}.path={path} cannot be loaded: {one_line(e)}") from e
    if not callable(function):
        raise ConfigError(f"{_REWARD}.name: in {path}: {name} is no function, but of type {type(function).__name__}")
    asked = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"))
    try:
        inspect.signature(function).bind(**asked, **kwargs)
    except TypeError as e:
        raise ConfigError(
            f"{_REWARD}: {name} cannot be called with {', '.join([*asked, *kwargs])} by keyword: {e}"
        ) from e
    except ValueError:
        return  # of a compiled function nothing is known


def ask_reward(config: DictConfig, prompts: Sequence[Prompt]) -> None:
    """Ask the reward function, as a worker will, about one row of each data source of each file.

    What it raises, or an answer that is no outcome, would lose every trajectory of such rows. Raises ConfigError.
    """
    score = custom_score(config) if prompts else None
    if score is None:
        return  # the task's own, or data that only a class of the user's own can read
    first: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        first.setdefault((prompt.file, str(prompt.row.get("data_source"))), prompt)
    rows = list(first.values())
    for prompt, answer in zip(rows, try_score(score, [prompt.row for prompt in rows]), strict=True):
        try:
            if isinstance(answer, BaseException):
                raise answer
            read_score(answer)
        except (ScoreError, ValueError) as e:
            gold = "" if "reward_model" in prompt.row else "; the row has no reward_model, so ground_truth was None"
            raise ConfigError(
                f"{_REWARD}: {e} (asked about {prompt.where} with solution_str={SPECIMEN!r}{gold})"
            ) from e


# -- data -------------------------------------------------------------------------------------------------------------

_LOOKED_AT = 1000  # rows of a file whose form is checked
_ASKED_WITH = ("data_source", "reward_model", "extra_info")  # columns that the reward function is asked with
_MEDIA = {"image": "images", "video": "videos", "audio": "audios"}  # columns, by default; data.image_key, ...
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """A row's prompt, and where it stands."""

    where: str
    messages: Messages
    file: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)  # what the reward function is asked with

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(str(message["role"]) for message in self.messages)


_FILES = {"train_files": "training", "val_files": "validation"}


def check_data(config: DictConfig, say: Say, keys: Iterable[str] = tuple(_FILES)) -> list[Prompt]:
    """Read what can be wrong with the data files, and say how many rows there are.

    Args:
        keys: of `data`, the files that are looked at; all that a training run has.

    Returns:
        Prompts from the top of the files, for `model.check_model`.
    """
    own_class = OmegaConf.select(config, "data.custom_cls.path")
    verls = own_class is None or own_class == "pkg://recipe.gtpo.dataset"
    prompts: list[Prompt] = []
    counts = {}
    for key in keys:
        files = [Path(file) for file in _files(config, key)]
        if not verls:
            continue  # only a class of the user's own knows what its files hold
        tables = [_read(f"data.{key}: {file}", file, config.data.prompt_key, _media(config)) for file in files]
        for table in tables:
            prompts += _check_table(table, config, say)
        counts[key] = _limited(sum(table.count for table in tables), config, key)
    if not verls:
        return []
    _check_counts(config, counts)
    say(", ".join(f"{count} {_FILES[key]} rows" for key, count in counts.items()))
    return prompts


def _files(config: DictConfig, key: str) -> list[str]:
    files = config.data[key]
    if files is None:
        raise ConfigError(f"data.{key} is not set: a parquet or jsonl file in verl's format")
    files = [files] if isinstance(files, str) else list(files)
    if not files:
        raise ConfigError(f"data.{key} is empty: at least one parquet or jsonl file in verl's format")
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"data.{key}: {file} does not exist{_from_here(file)}; its columns: {_README}")
    return files


@dataclass(frozen=True)
class _Table:
    """What is read of a file."""

    name: str  # with its key, for messages
    count: int
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]  # the first, as far as they are looked at
    agents: set[Any]  # the values of the column agent_name


def _read(name: str, file: Path, prompt_key: str, media: Sequence[str]) -> _Table:
    looked_at = (*_ASKED_WITH, *media)
    if file.suffix == ".parquet":
        return _read_parquet(name, file, prompt_key, looked_at)
    if file.suffix in (".json", ".jsonl"):
        return _read_json(name, file, prompt_key, looked_at)
    raise ConfigError(f"{name} is neither .parquet nor .jsonl or .json, and verl goes by the name")


def _read_parquet(name: str, file: Path, prompt_key: str, looked_at: Sequence[str]) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            wanted = [key for key in (prompt_key, *looked_at) if key in columns]
            first = next(table.iter_batches(_LOOKED_AT, columns=wanted), None) if wanted else None
            agents = table.read(columns=["agent_name"]).column(0).unique() if "agent_name" in columns else []
            rows = [] if first is None else first.to_pylist()
            return _Table(name, table.metadata.num_rows, columns, rows, {str(agent) for agent in agents})
    except (pyarrow.ArrowException, OSError) as e:
        raise ConfigError(f"{name} is no parquet file: {one_line(e)}") from e


def _read_json(name: str, file: Path, prompt_key: str, looked_at: Sequence[str]) -> _Table:
    count, columns, agents = 0, set[str](), set[str]()
    rows: list[Mapping[str, Any]] = []
    for where, row in _json_rows(name, file):
        if not isinstance(row, dict):
            raise ConfigError(
                f"{name}, {where}, is no JSON object, but of type {type(row).__name__}; its keys: {_README}"
            )
        count += 1
        columns |= row.keys()
        if len(rows) < _LOOKED_AT:
            rows.append({key: row.get(key) for key in (prompt_key, *looked_at) if key in row})
        agents.add(str(row.get("agent_name")))
    return _Table(name, count, sorted(columns), rows, agents if "agent_name" in columns else set())


def _json_rows(name: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Where it is, and the row: a line each, or the elements of one list; verl's loader takes both."""
    try:
        with file.open(encoding="utf-8") as lines:
            if lines.read(1) == "[":
                lines.seek(0)
                yield from ((f"row {i}", row) for i, row in enumerate(_parse(name, lines.read())))
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", _parse(f"{name}, line {number},", line)
    except UnicodeDecodeError as e:
        raise ConfigError(f"{name} is no text in UTF-8: {e.reason} at byte {e.start}") from e


def _parse(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{name} is no JSON: {e.msg}, at character {e.pos}") from e


def _check_table(table: _Table, config: DictConfig, say: Say) -> list[Prompt]:
    key = config.data.prompt_key
    if table.count and key not in table.columns:
        raise ConfigError(
            f"{table.name} has no column {key!r} (data.prompt_key); it has {', '.join(table.columns)}. What it needs: "
            f"{_README}"
        )
    if table.count and "reward_model" not in table.columns:
        say(f"warning: {table.name} has no column 'reward_model': the reward function gets ground_truth=None")
    loop = config.actor_rollout_ref.rollout.agent.default_agent_loop
    others = sorted(table.agents - {loop})
    if others:
        raise ConfigError(
            f"{table.name}: its column 'agent_name' asks for the agent loop {others[0]!r}, and the turns that GTPO "
            f"needs are recorded by {loop!r} alone; drop the column, or set it to {loop!r} in every row"
        )
    prompts = [_prompt(f"row {i} of {table.name}", table.name, row, key) for i, row in enumerate(table.rows)]
    media = _media(config)
    for prompt in prompts:  # of the rows behind these, the data set asks the same
        if found := not_text(prompt.row, prompt.messages, media):
            raise ConfigError(f"{prompt.where} has {found!r}: {TEXT_ONLY}")
    return prompts


def _media(config: DictConfig) -> list[str]:
    """The columns of images, videos and sounds, as verl's dataset knows them."""
    found = (config.data.get(f"{kind}_key", default) for kind, default in _MEDIA.items())
    return [str(key) for key in found if key]


def _prompt(where: str, file: str, row: Mapping[str, Any], key: str) -> Prompt:
    messages = row.get(key)
    good = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not good or not messages:
        found = "an empty list" if messages == [] else f"a {type(messages).__name__}"
        inside = f" of {type(messages[0]).__name__}" if isinstance(messages, list) and messages else ""
        raise ConfigError(
            f"{where}: its prompt is {found}{inside}, not a list of chat messages: "
            '[{"role": "user", "content": "..."}]'
        )
    return Prompt(where, messages, file, row)


def _limited(count: int, config: DictConfig, key: str) -> int:
    most = config.data.get(key.replace("_files", "_max_samples"), -1)
    return min(count, most) if most > 0 else count


def _check_counts(config: DictConfig, counts: Mapping[str, int]) -> None:
    for key, count in counts.items():
        if count == 0:
            raise ConfigError(f"data.{key} has no row; what it needs: {_README}")
    batch = config.data.train_batch_size
    train = counts.get("train_files", batch)
    if train < batch:
        raise ConfigError(
            f"data.train_files has {train} rows, fewer than one batch of data.train_batch_size={batch}: give more "
            f"rows, or set data.train_batch_size and actor_rollout_ref.actor.ppo_mini_batch_size to {train} or less"
        )
