"""Evaluate a model with its tools, on benchmarks, as a run's own validation would.

    python -m recipe.gtpo.evaluate model=outputs/arithmetic-gtpo-seed1 benchmarks=arithmetic samples=4 compare=base
    python -m recipe.gtpo.evaluate model=Qwen/Qwen2.5-7B-Instruct benchmarks=aime24,math500 hardware=single_gpu rollout=vllm
    python -m recipe.gtpo.evaluate model=Qwen/Qwen2.5-7B-Instruct benchmarks=gsm8k endpoint=http://127.0.0.1:8000/v1

Keys:
    model         a run's folder (its last checkpoint), a checkpoint, a model's folder, or a hub name
    benchmarks    names with commas between them, or files with rows in verl's columns
    samples       attempts a problem                                              (each benchmark's own)
    compare       base: the model that the run began with; or another model       (none)
    endpoint      an OpenAI-compatible endpoint that serves the model, up to and with /v1, instead of servers of its own
    served_model  its name there (its only one); api_key_env: environment variable with a bearer token
    local         a folder with copies of the sets, <set>/<split>.jsonl           (prepared data, else the hub)
    temperature, top_p, concurrency, and every key of the run's config, such as hardware=, rollout=, run_dir=, seed=

The same command goes on where it was stopped. What it leaves: recipe/gtpo/evaluate/samples.py and results.py.
"""

from __future__ import annotations

import sys

from recipe.gtpo.run.environment import settle

settle(sys.argv[1:])  # before hydra and verl are imported

import asyncio  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from contextlib import AsyncExitStack  # noqa: E402
from copy import deepcopy  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from hydra.errors import HydraException, InstantiationException  # noqa: E402
from omegaconf import DictConfig, OmegaConf, open_dict  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402
from tqdm import tqdm  # noqa: E402

from recipe.gtpo.data.prepare import prepare_evaluation  # noqa: E402
from recipe.gtpo.doctor import read_overrides  # noqa: E402
from recipe.gtpo.evaluate.measures import INTERVALS  # noqa: E402
from recipe.gtpo.evaluate.models import (  # noqa: E402
    Model,
    find_base,
    find_model,
    fingerprint,
    merge,
    run_overrides,
)
from recipe.gtpo.evaluate.request import (  # noqa: E402
    Benchmark,
    Request,
    find_benchmarks,
    key_of,
    overrides_of,
    task_of,
)
from recipe.gtpo.evaluate.results import Result, difference_table, results_table  # noqa: E402
from recipe.gtpo.evaluate.rollout import (  # noqa: E402
    Roller,
    all_or_none,
    in_parallel,
    load_model_config,
    load_rows,
    opened_tools,
)
from recipe.gtpo.evaluate.samples import Samples  # noqa: E402
from recipe.gtpo.evaluate.servers import Endpoint, own_ray, start_servers, watch  # noqa: E402
from recipe.gtpo.main import end_of, keep_logs, lost_part, tool_server, watch_machine  # noqa: E402
from recipe.gtpo.method.turns import Finish  # noqa: E402
from recipe.gtpo.run import checks  # noqa: E402
from recipe.gtpo.run.errors import ConfigError, one_line, plain  # noqa: E402
from recipe.gtpo.run.gpu import machine_checks  # noqa: E402
from recipe.gtpo.run.identity import claim  # noqa: E402
from recipe.gtpo.run.inputs import check_data, check_machine, check_reward, expand_paths  # noqa: E402
from recipe.gtpo.run.model import check_model  # noqa: E402
from recipe.gtpo.run.record import RecordError, RunRecord, last_line  # noqa: E402
from recipe.gtpo.run.tools import check_tools, environment  # noqa: E402
from recipe.gtpo.tasks.prepared import MANIFEST, PreparedTask  # noqa: E402
from recipe.gtpo.tasks.task import Task, load_task  # noqa: E402
from recipe.gtpo.tasks.unit_tests import close_client  # noqa: E402
from verl_ext.tool_server.launch import ServerStartError  # noqa: E402

_SHARE = 0.85  # of a GPU's memory that a rollout engine takes where nothing trains beside it
_AT_ONCE = 64  # trajectories over an endpoint, where concurrency= does not say
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


# -- before anything starts -------------------------------------------------------------------------------------------


def make_entries(request: Request, model: Model) -> list[Entry]:
    run = run_overrides(model)
    run_task = None if model.run is None else task_of(run, "arithmetic")
    compose = functools.lru_cache(maxsize=None)(checks.compose)  # a second each, and most benchmarks share one
    entries = []
    for one in find_benchmarks(request.benchmarks, task_of(request.overrides, run_task)):
        config, choices = compose(*overrides_of(one, request, run, run_task))
        entries.append(Entry(one, deepcopy(config), dict(choices), request.samples or one.samples))
    return entries


def make_record(request: Request, model: Model, entries: Sequence[Entry]) -> RunRecord:
    """In `run_dir=`, or in a folder that is named by what is asked for."""
    if any(key_of(one) == "run_dir" for one in request.overrides):
        return RunRecord(Path(entries[0].config.run_dir).expanduser().resolve())
    more = [*request.overrides, f"compare={request.compare}", f"endpoint={request.endpoint}"]
    names = "-".join(entry.name for entry in entries)
    facts = hashlib.sha256("\n".join([*sorted(more), names]).encode()).hexdigest()[:6]
    plain_one = not request.overrides and request.compare is None and request.endpoint is None and len(names) < 60
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
    for key, value in made.items():
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, value)
    if OmegaConf.select(config, f"{_ROLLOUT}.gpu_memory_utilization") is None:
        config.actor_rollout_ref.rollout.gpu_memory_utilization = _SHARE


def _find_problems(entry: Entry, record: RunRecord, request: Request) -> dict[str, Any]:
    """verl key -> value; `data.val_files` is set outright."""
    task, one = entry.task, entry.benchmark
    if one.file is not None:
        entry.config.data.val_files = str(one.file)
        return {}
    if one.chosen is None or not isinstance(task, PreparedTask):
        return task.prepare_evaluation()
    file = record.dir / "data" / f"{one.name}.parquet"
    prepared = Path(task.folder).resolve()
    if file.is_file():
        pass
    elif request.local is None and _is_prepared(task, prepared, one.chosen):
        file = prepared / f"{one.chosen}.parquet"
    else:
        names = [source.name for source in task.evaluation]
        if one.chosen not in names:
            raise ConfigError(f"benchmarks={one.chosen} is no set of task={one.task}: {', '.join(names)}")
        prepare_evaluation(task, one.chosen, file, local=request.local, say=lambda text: say(f"data: {text}"))
    entry.config.data.val_files = str(file)
    return {}


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
    for model in models:
        config.actor_rollout_ref.model.path = model.path
        check_model(config, prompts, lambda text: say(f"{entry.name}: {text}"), weights=request.endpoint is None)
        if (warning := checks.short_context(config)) is not None:
            say(f"warning: {entry.name}: {warning}")


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


# -- the evaluation ---------------------------------------------------------------------------------------------------


class TooManyLost(RuntimeError):
    """Samples that failed on our side: the last cause."""


class Evaluation:
    """One model on all benchmarks."""

    def __init__(self, entries: Sequence[Entry], model: Model, step: int, record: RunRecord, request: Request) -> None:
        self.entries, self.model, self.record, self.request = entries, model, record, request
        self.samples = Samples(record, step, int(entries[0].config.seed))
        if again := self.samples.load():
            say(f"{again} samples of {model} failed on our side before: they are done again")
        self._lost = 0
        self.server_config = _server_config(entries, model)

    def load(self) -> None:
        """Tokenizer and data sets: who knows how many problems there are."""
        self.model_config = load_model_config(self.server_config)
        for entry in self.entries:
            entry.config.actor_rollout_ref.model.path = self.model.path
            if entry.rows is None:
                entry.rows = load_rows(entry.config, self.model_config)

    def missing(self, entry: Entry) -> list[tuple[int, int]]:
        return self.samples.missing(entry.name, len(entry.rows), entry.samples)

    @property
    def complete(self) -> bool:
        return not any(self.missing(entry) for entry in self.entries)

    async def with_servers(self) -> None:
        manager = await start_servers(self.server_config)
        rollout = self.server_config.actor_rollout_ref.rollout
        most = self.request.concurrency or rollout.max_num_seqs * len(manager.get_replicas())
        await self._beside(self._all(manager.get_client(), most), watch(manager, self.record, self.server_config))

    async def with_endpoint(self) -> dict[str, Any]:
        """Returns what is said of the endpoint in the output."""
        from recipe.gtpo.agent_loop import ids_of, turn_end

        tokenizer, request = self.model_config.tokenizer, self.request
        end = turn_end(tokenizer)
        if end is None:
            end = next(iter(ids_of(tokenizer.eos_token_id)), None)
        assert request.endpoint is not None
        async with Endpoint(request.endpoint, request.served_model, tokenizer, end, request.api_key_env) as endpoint:
            for lost in endpoint.lost:
                say(f"warning: endpoint {endpoint.url}: {lost}")
            await self._all(endpoint, request.concurrency or _AT_ONCE)
            return {"url": endpoint.url, "model": endpoint.model, "lost": endpoint.lost}

    async def _beside(self, work: Any, guard: Any) -> None:
        """Until the work is done, or the guard raises."""
        guarding = asyncio.ensure_future(guard)
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({guarding, working}, return_when=asyncio.FIRST_COMPLETED)
            await (guarding if guarding.done() else working)
        finally:
            for task in (guarding, working):
                task.cancel()
            await asyncio.gather(guarding, working, return_exceptions=True)

    async def _all(self, server: Any, most: int) -> None:
        try:
            for entry in self.entries:  # one after the other: problem and sample make the name of a request
                await self._one(entry, server, most)
        finally:
            await close_client()

    async def _one(self, entry: Entry, server: Any, most: int) -> None:
        missing = self.missing(entry)
        total = len(entry.rows) * entry.samples
        if not missing:
            return
        async with AsyncExitStack() as stack:
            tools = await stack.enter_async_context(opened_tools(entry.config))
            roller = Roller(entry.config, self.model_config, server, tools)
            seen = {"right": 0, "scored": 0, "infra": 0}
            bar = stack.enter_context(
                tqdm(total=total, initial=total - len(missing), desc=entry.name, unit="sample", mininterval=0.5)
            )

            async def sample(job: tuple[int, int]) -> None:
                index, session = job
                row = entry.rows[index]
                rollout = await roller.roll_out(row, session)
                done = self.samples.add(entry.name, row, session, rollout.trajectory, rollout.token_ids)
                seen["right"] += int(done.acc >= 1)
                seen["scored"] += int(done.scored)
                seen["infra"] += int(done.finish is Finish.INFRA)
                self._judge(entry, rollout.trajectory, seen["infra"], len(missing))
                bar.set_postfix_str(
                    f"acc={seen['right'] / max(1, seen['scored']):.3f} infra={seen['infra']} lost={self._lost}",
                    refresh=False,
                )
                bar.update()

            await in_parallel(missing, sample, most)

    def _judge(self, entry: Entry, trajectory: Any, infra: int, planned: int) -> None:
        """Raise TooManyLost where a training run would end as well."""
        config = entry.config
        if trajectory.finish is Finish.FAULT:
            self._lost += 1
            if self._lost > config.max_lost_trajectories:
                raise TooManyLost(
                    f"{self._lost} samples are lost (max_lost_trajectories={config.max_lost_trajectories}): "
                    f"{trajectory.fault.strip()}"
                )
        if infra > config.max_dropped_share * planned:
            said = [o.output for turn in trajectory.turns for o in turn.outcomes if o.outcome == "infra"]
            raise TooManyLost(
                f"{infra} of {planned} samples of {entry.name} were failed by the tool server (max_dropped_share="
                f"{config.max_dropped_share:g}): {(said or [''])[-1].strip()}"
            )

    async def results(self) -> dict[str, Result]:
        found = {}
        for entry in self.entries:
            done = self.samples.of(entry.name, entry.samples)
            too_long = int(getattr(entry.rows, "too_long", 0))
            found[entry.name] = await Result.of(done, len(entry.rows), entry.samples, too_long, entry.task.same)
        return found


def _server_config(entries: Sequence[Entry], model: Model) -> DictConfig:
    """Of servers that hold the longest trajectory of all benchmarks."""
    config = deepcopy(entries[0].config)
    for key in ("data.max_prompt_length", "data.max_response_length"):
        OmegaConf.update(config, key, max(OmegaConf.select(entry.config, key) for entry in entries))
    limits = [entry.config.actor_rollout_ref.rollout.max_model_len for entry in entries]
    config.actor_rollout_ref.rollout.max_model_len = None if None in limits else max(limits)
    config.actor_rollout_ref.model.path = model.path
    OmegaConf.resolve(config)
    return config


def roll_out(evaluation: Evaluation, server: Any) -> dict[str, Any] | None:
    """All samples that are missing. Returns what is said of an endpoint."""
    request, record, config = evaluation.request, evaluation.record, evaluation.server_config
    with watch_machine(server, record, config.watchdog.poll_seconds) as ending:
        try:
            if request.endpoint is not None:
                return asyncio.run(evaluation.with_endpoint())
            say(f"starting the rollout servers of {evaluation.model}")
            with own_ray(config):
                try:
                    asyncio.run(evaluation.with_servers())
                finally:
                    ending.set()
                    keep_logs(record)
            return None
        except Exception:
            lost = lost_part(server)
            if lost is not None:  # what was raised is a consequence
                record.write_cause(lost)
            raise
        finally:
            ending.set()


def describe(entry: Entry) -> dict[str, Any]:
    """What a benchmark was evaluated with."""
    rollout = entry.config.actor_rollout_ref.rollout
    prompts = [entry.rows[i]["raw_prompt"] for i in range(len(entry.rows))]
    systems = {m["content"] for messages in prompts for m in messages if m["role"] == "system"}
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


def report(
    evaluations: Sequence[Evaluation], steps: Sequence[int], endpoint: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Write evaluation.json and the curves' points; print the table."""
    entries, record = evaluations[0].entries, evaluations[0].record

    async def all_results() -> list[dict[str, Result]]:
        return [await one.results() for one in evaluations]

    results = asyncio.run(all_results())
    start, config = record.read_starts()[-1], evaluations[0].server_config
    written: dict[str, Any] = {
        "models": [
            {"model": str(one.model), "path": one.model.path, "step": step, "files": fingerprint(one.model)}
            for one, step in zip(evaluations, steps, strict=True)
        ],
        "rollout": {"endpoint": endpoint}
        if endpoint is not None
        else {"engine": config.actor_rollout_ref.rollout.name, "dtype": config.actor_rollout_ref.rollout.dtype},
        "seed": config.seed,
        "intervals": INTERVALS,
        "versions": {key: start[key] for key in ("commit", "python", "packages", "machine")},
        "command": start["command"],
        "benchmarks": {},
    }
    for entry in entries:
        found: dict[str, Any] = describe(entry)
        found["results"] = [of[entry.name].to_dict() for of in results]
        if len(results) == 2:
            found["difference"] = {
                n: d.to_dict() for n, d in results[1][entry.name].minus(results[0][entry.name]).items()
            }
        written["benchmarks"][entry.name] = found
    record.write_evaluation_report(written)
    for step, of in zip(steps, results, strict=True):
        record.write_metrics(step, {k: v for name, result in of.items() for k, v in result.metrics(name).items()})
    for one, of in zip(evaluations, results, strict=True):
        print(f"\n{one.model}")
        print("\n".join(results_table(of)))
    if len(results) == 2:
        print()
        print("\n".join(difference_table(results[0], results[1], ("before", "after"))))
    print(f"\n{settings_line(entries, config)}\noutputs: {record.dir}", flush=True)
    return written


def settings_line(entries: Sequence[Entry], config: DictConfig) -> str:
    """In words, what the numbers depend on."""
    lines = {}
    for entry in entries:
        about = describe(entry)
        words = ", ".join(f"{name} {about[name]:g}" for name in ("temperature", "top_p", "top_k"))
        lines.setdefault(f"{words}, at most {about['turns']} turns and {about['response_tokens']} tokens", []).append(
            entry.name
        )
    parts = [f"{', '.join(names)}: {line}" if len(lines) > 1 else line for line, names in lines.items()]
    return "; ".join(parts) + f"; seed {config.seed}; 95% intervals over problems"


def evaluate(arguments: Sequence[str]) -> int:
    """Everything from the command line to the last line. Returns the exit status."""
    record: RunRecord | None = None
    try:
        request = Request.parse(read_overrides(arguments))
        model = find_model(request.model)
        compared = None
        if request.compare is not None:
            compared = find_base(model) if request.compare == "base" else find_model(request.compare)
        models = [model] if compared is None else [compared, model]
        steps = [one.step for one in models]
        if compared is not None and steps[0] >= steps[1]:  # two models that no run here has trained
            steps = [0, max(1, model.step)] if model.step else [0, 1]
        entries = make_entries(request, model)
        record = make_record(request, model, entries)
        record.drop_cause()
        if request.endpoint is not None and model.checkpoint is not None:  # only the tokenizer is read here
            models = [Model(model.name, str(model.checkpoint / "actor" / "huggingface"), model.checkpoint, model.run)]
        else:
            for one in models:
                if one.checkpoint is not None and merge(one):
                    say(f"the shards of {one} are merged in {one.path}")
        check_here(entries[0].config, request)
        for entry in entries:
            fill(entry, record, request)
            check_entry(entry, models, request)
            OmegaConf.resolve(entry.config)
        claim(record, identity(entries, models, request))
        record.write_start(int(entries[0].config.seed))
        evaluations = [Evaluation(entries, m, step, record, request) for m, step in zip(models, steps, strict=True)]
        for one in evaluations:
            one.load()
        endpoint = None if request.endpoint is None else {"url": request.endpoint}
        to_do = [one for one in evaluations if not one.complete]
        if to_do:
            endpoint = run(to_do, entries) or endpoint
        report(evaluations, steps, endpoint)
        return 0
    except (ConfigError, RecordError, TooManyLost) as e:
        return _end(str(e), record)
    except (HydraException, OmegaConfBaseException) as e:
        return _end(one_line(e), record)
    except ServerStartError as e:
        head, _, log = str(e).partition("\n")
        return _end(f"{head} {last_line(log)}" if log else head, record)
    except KeyboardInterrupt:
        return _end((record.read_cause() if record is not None else None) or "interrupted", record, status=130)
    except Exception as e:
        if record is None:
            raise
        record.write_traceback("".join(traceback.format_exception(e)))
        record.write_cause(end_of(e))  # unless there is one
        return _end(f"{record.read_cause()} (whole report: {record.logs})", record)


def run(evaluations: Sequence[Evaluation], entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Tool server, then the models, one after the other."""
    first, said = entries[0].config, None
    with tool_server(first) as server:
        variables = {"GTPO_TOOL_SERVER_URL": first.tool_server.url, "GTPO_TOOL_SERVER_TOKEN": first.tool_server.token}
        with environment(variables):
            for entry in entries:
                with open_dict(entry.config):
                    entry.config.tool_server.url = first.tool_server.url
                check_tools(entry.config, variables, lambda text, name=entry.name: say(f"{name}: {text}"))
            for one in evaluations:
                said = roll_out(one, server)
    return said


def _end(cause: str, record: RunRecord | None, status: int = 1) -> int:
    going_on = "" if record is None or not record.dir.is_dir() else f" ({record.dir}: the same command goes on)"
    print(f"evaluate: error: {plain(cause)}{going_on}", file=sys.stderr, flush=True)
    return status


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return evaluate(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
