"""Evaluate a model with its tools, on benchmarks, as a run's own validation would.

    python -m recipe.gtpo.evaluate model=outputs/arithmetic-gtpo-seed1 benchmarks=arithmetic samples=4 compare=base
    python -m recipe.gtpo.evaluate model=Qwen/Qwen2.5-3B-Instruct benchmarks=aime24 hardware=single_gpu rollout=vllm
    python -m recipe.gtpo.evaluate model=Qwen/Qwen2.5-3B-Instruct benchmarks=gsm8k endpoint=http://127.0.0.1:8000/v1

Keys:
    model         a run's folder (its last checkpoint), a checkpoint, a model's folder, or a hub name
    benchmarks    names with commas between them, or files with rows in verl's columns
    samples       attempts a problem                                              (each benchmark's own)
    compare       base: the model that the run began with; or another model       (none)
    endpoint      an OpenAI-compatible endpoint that serves the model, up to and with /v1, instead of servers of its own
    served_model  its name there (its only one); api_key_env: environment variable with a bearer token
    local         a folder with copies of the sets, <set>/<split>.jsonl           (prepared data, else the hub)
    temperature, top_p, concurrency, and every key of the run's config, such as hardware=, rollout=, run_dir=, seed=

The same command goes on where it was stopped. What it leaves: README.md, section 'Evaluate a model'.
"""

from __future__ import annotations

import sys

from recipe.gtpo.run.environment import settle

settle(sys.argv[1:])  # before hydra and verl are imported

import functools  # noqa: E402
import signal  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

from hydra.errors import HydraException  # noqa: E402
from omegaconf import OmegaConf, open_dict  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from recipe.gtpo.doctor import read_overrides  # noqa: E402
from recipe.gtpo.evaluate.entries import (  # noqa: E402
    Entry,
    check_entry,
    check_here,
    fill,
    identity,
    make_entries,
    make_record,
    say,
)
from recipe.gtpo.evaluate.evaluation import Evaluation, TooManyLost, roll_out  # noqa: E402
from recipe.gtpo.evaluate.models import Model, find_base, find_model, merge  # noqa: E402
from recipe.gtpo.evaluate.report import report  # noqa: E402
from recipe.gtpo.evaluate.request import Request  # noqa: E402
from recipe.gtpo.main import end_of, tool_server  # noqa: E402
from recipe.gtpo.run.errors import ConfigError, one_line, plain  # noqa: E402
from recipe.gtpo.run.identity import claim  # noqa: E402
from recipe.gtpo.run.record import RecordError, RunRecord, last_line  # noqa: E402
from recipe.gtpo.run.tools import check_tools, environment  # noqa: E402
from verl_ext.tool_server.launch import ServerStartError  # noqa: E402

_GOES_ON = "what is done is kept, and the same command goes on"


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
        if compared is not None and steps[0] >= steps[1]:  # not two moments of one training
            steps = [0, 1]
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
        for one_model in evaluations:
            one_model.load()
        endpoint = None if request.endpoint is None else {"url": request.endpoint}
        to_do = [each for each in evaluations if not each.complete]
        if to_do:
            endpoint = run(to_do, entries) or endpoint
        report(evaluations, endpoint)
        return 0
    except (ConfigError, RecordError) as e:
        return _end(str(e))
    except (HydraException, OmegaConfBaseException) as e:
        return _end(one_line(e))
    except ServerStartError as e:
        head, _, log = str(e).partition("\n")
        return _end(f"{head} {last_line(log)}" if log else head)
    except KeyboardInterrupt:
        return _end(f"{(record and record.read_cause()) or 'interrupted'}; {_GOES_ON}", status=130)
    except TooManyLost as e:
        return _end(f"{e}; {_GOES_ON}")
    except Exception as e:
        if record is None:
            raise
        record.write_traceback("".join(traceback.format_exception(e)))
        record.write_cause(end_of(e))  # unless there is one
        return _end(f"{record.read_cause()} (whole report: {record.logs}); {_GOES_ON}")


def run(evaluations: Sequence[Evaluation], entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Tool server, then the models, one after the other."""
    first, said = entries[0].config, None
    with tool_server(first) as server:
        variables = {"GTPO_TOOL_SERVER_URL": first.tool_server.url, "GTPO_TOOL_SERVER_TOKEN": first.tool_server.token}
        with environment(variables):
            for entry in entries:
                with open_dict(entry.config):
                    entry.config.tool_server.url = first.tool_server.url
                check_tools(entry.config, variables, functools.partial(_say_of, entry.name))
            for one in evaluations:
                said = roll_out(one, server)
    return said


def _say_of(name: str, text: str) -> None:
    say(f"{name}: {text}")


def _end(cause: str, status: int = 1) -> int:
    print(f"evaluate: error: {plain(cause)}", file=sys.stderr, flush=True)
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
