"""Whether a program passes its unit tests, on a tool server, where the program cannot decide about it.

A program that runs beside its tests can leave before them (`sys.exit(0)`), print what they would print, or change what
they compare with. So the two never meet: the program is asked in one execution for the values of the calls that the
tests make, and has neither the tests nor the expected values; the tests run in another one, with these values. All that
a program can do is give values, and the wrong ones fail. `inside_tests.py` is what runs there.

Limits: values are plain data (numbers, texts, lists, dicts, ...), never objects of the program's own classes; a test
that looks at an argument which the program changed in place does not see the change. `recipe.gtpo.data` leaves out
problems whose own solution fails for such a reason, and counts them.
"""

from __future__ import annotations

import asyncio
import json
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe.gtpo.tasks.inside_tests import MARK
from verl_ext.tool_server import ToolClient

_INSIDE = (Path(__file__).parent / "inside_tests.py").read_text()
_ROUNDS = 3  # of values asked for: a test may make a call only when an earlier one had its value
_KEPT = 512  # problems whose calls are remembered
_ATTEMPTS = 3  # at these calls, before a run may end for the want of them: a busy machine fails one


@dataclass(frozen=True)
class UnitTests:
    """Tests of one function.

    Args:
        entry_point: its name.
        setup: what runs before the program and before the tests: imports, helpers.
        tests: statements that call the function and assert.
    """

    entry_point: str
    setup: str
    tests: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UnitTests:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    passed: bool
    why: str = ""  # of a failure: an assertion, an error, how the program ended


class ToolServerFailed(RuntimeError):
    """The tool server failed, not the program: nothing is known of the program."""


class NoCalls(ToolServerFailed):
    """The tests alone, which are ours, did not run to their end."""


_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ToolClient] = weakref.WeakKeyDictionary()


def tool_client() -> ToolClient:
    """The client of this event loop: of the run's tool server, and without a run of one inside this process."""
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        url = os.environ.get("GTPO_TOOL_SERVER_URL")
        token = os.environ.get("GTPO_TOOL_SERVER_TOKEN")
        _clients[loop] = ToolClient.from_url(url, token=token) if url else ToolClient.local()
    return _clients[loop]


async def close_client() -> None:
    """End the client of this event loop, where there is one."""
    client = _clients.pop(asyncio.get_running_loop(), None)
    if client is not None:
        await client.close()


async def run_tests(program: str, tests: UnitTests, client: ToolClient | None = None) -> Verdict:
    """Whether the function that `program` defines passes `tests`.

    Raises ToolServerFailed, and so NoCalls.
    """
    client = client or tool_client()
    calls = await _calls(tests, client)
    for _ in range(_ROUNDS):
        asked = {"do": "call", "program": program, "calls": calls} | asdict(tests)
        said = await _ask(client, {key: asked[key] for key in asked if key != "tests"})  # it never sees them
        if isinstance(said, Verdict):
            return said
        told = said.get("values")
        values = told if isinstance(told, list) else []
        checked = await _ask(client, {"do": "check", "calls": calls, "values": values} | asdict(tests))
        if isinstance(checked, Verdict):
            return checked
        if not checked["missing"]:
            return Verdict(checked["passed"], checked["about"])
        if len(values) < len(calls):
            return Verdict(False, str(values[-1] if values else "the program ended early")[:200])
        calls = [*calls, *checked["missing"]]
    return Verdict(False, "the tests make calls that depend on too many others")


_known: OrderedDict[UnitTests, list[Any]] = OrderedDict()


async def _calls(tests: UnitTests, client: ToolClient) -> list[Any]:
    """The calls that the tests make, worked out once: the rollouts of a problem share them.

    No program is there yet, so what fails here is a failure of ours: no program's verdict, and nothing to remember.
    """
    if tests not in _known:
        _known[tests] = await _collect(tests, client)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    _known.move_to_end(tests)
    return _known[tests]


async def _collect(tests: UnitTests, client: ToolClient) -> list[Any]:
    for _ in range(_ATTEMPTS):
        said = await _ask(client, {"do": "collect"} | asdict(tests))
        if not isinstance(said, Verdict):
            return said["calls"]
        why = said.why
    raise NoCalls(f"the tests of {tests.entry_point} gave no calls: {why}")


async def _ask(client: ToolClient, order: Mapping[str, Any]) -> dict[str, Any] | Verdict:
    """The report of one execution, or the verdict where there is none."""
    # "__main__" is what a program's name is there: the file's last lines start it
    result = await client.run(_INSIDE, stdin=json.dumps(order), echo=False)
    if result.outcome == "infra":
        raise ToolServerFailed(f"the tool server failed: {result.detail}")
    _, mark, report = result.stdout.rpartition(f"\n{MARK}")
    if result.ok and mark:
        try:
            data = json.loads(report)
        except ValueError:
            data = None
        if isinstance(data, dict):
            return data
    return Verdict(False, f"no report; the execution's outcome is {result.outcome.value}: {result.stderr[-200:]}")
