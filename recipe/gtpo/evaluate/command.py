"""The command, from its arguments to its last line. `__main__.py` beside this says what the arguments are."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from recipe.gtpo.doctor import read_overrides
from recipe.gtpo.evaluate.entries import (
    Entry,
    check_entry,
    check_hardware,
    check_here,
    fill,
    identity,
    make_entries,
    make_record,
    say,
)
from recipe.gtpo.evaluate.evaluation import Evaluation, TooManyLost, roll_out
from recipe.gtpo.evaluate.models import Model, find_base, find_model, merge
from recipe.gtpo.evaluate.report import report
from recipe.gtpo.evaluate.request import Request
from recipe.gtpo.run.ending import end, end_on_sigterm, end_over, sigterm_came
from recipe.gtpo.run.errors import TERMINATED, TERMINATED_STATUS, ConfigError, one_line
from recipe.gtpo.run.identity import claim
from recipe.gtpo.run.record import RecordError, RunRecord, last_line
from recipe.gtpo.run.tool_server import tool_server
from recipe.gtpo.run.tools import check_tools, environment
from verl_ext.tool_server.launch import ServerStartError

_GOES_ON = "; what is done is kept, and the same command goes on"


def evaluate(arguments: Sequence[str]) -> int:
    """Everything from the command line to the last line. Returns the exit status."""
    record: RunRecord | None = None  # before the folder is known to be this start's, its cause is another one's
    try:
        end_on_sigterm()
        request = Request.parse(read_overrides(arguments))
        model = find_model(request.model)
        compared = None
        if request.compare is not None:
            compared = find_base(model) if request.compare == "base" else find_model(request.compare)
        models = [model] if compared is None else [compared, model]
        check_hardware(models, request)
        steps = [one.step for one in models]
        if compared is not None and steps[0] >= steps[1]:  # not two moments of one training
            steps = [0, 1]
        entries = make_entries(request, model)
        folder = make_record(request, model, entries)
        if request.endpoint is not None and model.checkpoint is not None:  # only the tokenizer is read here
            models = [Model(model.name, str(model.checkpoint / "actor" / "huggingface"), model.checkpoint, model.run)]
        else:
            for one in models:
                if one.checkpoint is not None and merge(one):
                    say(f"the shards of {one} are merged in {one.path}")
        check_here(entries[0].config, request)
        for entry in entries:
            fill(entry, folder, request)
            check_entry(entry, models, request)
            OmegaConf.resolve(entry.config)
        claim(folder, identity(entries, models, request))
        folder.drop_cause()
        record = folder
        record.write_start(int(entries[0].config.seed))
        end_on_sigterm(record)
        evaluations = [Evaluation(entries, m, step, record, request) for m, step in zip(models, steps, strict=True)]
        for one_model in evaluations:
            one_model.load()
        endpoint = None if request.endpoint is None else {"url": request.endpoint}
        to_do = [each for each in evaluations if not each.complete]
        if to_do:
            if request.endpoint is not None:
                endpoint = asyncio.run(to_do[0].ask_endpoint())
            run(to_do, entries)
        report(evaluations, endpoint)
        return 0
    except (ConfigError, RecordError) as e:
        return end("evaluate", str(e), record=record)
    except (HydraException, OmegaConfBaseException) as e:
        return end("evaluate", one_line(e), record=record)
    except ServerStartError as e:
        head, _, log = str(e).partition("\n")
        return end("evaluate", f"{head} {last_line(log)}" if log else head, record=record)
    except KeyboardInterrupt:
        cause = None if record is None else record.read_cause()  # of the watch that sent it
        return end("evaluate", cause or "interrupted", 130, record, _GOES_ON)
    except SystemExit:
        if not sigterm_came():
            raise
        return end("evaluate", TERMINATED, TERMINATED_STATUS, record, _GOES_ON)
    except TooManyLost as e:
        return end("evaluate", str(e), record=record, then=_GOES_ON)
    except Exception as e:
        return end_over(e, "evaluate", record, _GOES_ON)


def run(evaluations: Sequence[Evaluation], entries: Sequence[Entry]) -> None:
    """Tool server, then the models, one after the other."""
    first = entries[0].config
    with tool_server(first) as server:
        variables = {"GTPO_TOOL_SERVER_URL": first.tool_server.url, "GTPO_TOOL_SERVER_TOKEN": first.tool_server.token}
        with environment(variables):
            for entry in entries:
                with open_dict(entry.config):
                    entry.config.tool_server.url = first.tool_server.url
                check_tools(entry.config, variables, functools.partial(_say_of, entry.name))
            for one in evaluations:
                roll_out(one, server)


def _say_of(name: str, text: str) -> None:
    say(f"{name}: {text}")
