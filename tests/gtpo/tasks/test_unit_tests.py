"""Programs against their unit tests on a real tool server, and programs that try to pass without being right."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterator

import pyarrow.parquet
import pytest
from composition import compose
from published import write_jsonl

from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.data.prepare import prepare
from recipe.gtpo.run.scoring import ScoreError, load_score
from recipe.gtpo.tasks import inside_tests, unit_tests
from recipe.gtpo.tasks.prepared import Example, Unusable
from recipe.gtpo.tasks.task import load_task
from recipe.gtpo.tasks.unit_tests import ToolServerFailed, UnitTests, Verdict, run_tests
from verl_ext.tool_server import ToolClient
from verl_ext.tool_server.launch import start_server
from verl_ext.tool_server.types import ExecutionResult, Isolation, Outcome

pytestmark = pytest.mark.e2e

SQUARE = UnitTests("square", "import math", "assert square(3) == 9\nassert square(-2) == 4\nassert square(0) == 0")
LIMITS = ("--cpu-seconds", "2", "--wall-seconds", "10")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with start_server(isolation="auto", workers=2, packages=("numpy",), extra_arguments=LIMITS) as server:
        yield server.url


@pytest.fixture
def judge(url):
    def ask(program: str, tests: UnitTests = SQUARE) -> Verdict:
        async def run():
            async with ToolClient.from_url(url) as client:
                return await run_tests(program, tests, client)

        return asyncio.run(run())

    return ask


RIGHT = [
    "def square(x):\n    return x * x",
    "def square(x):\n    print('so', x)\n    return x ** 2",  # what it prints is not looked at
    "square = lambda x: x * x",
    "import numpy as np\ndef square(x):\n    return np.int64(x) * x",
    "def square(x):\n    return math.prod([x, x])",  # the problem's own import
    "def square(x):\n    return x * x\nif __name__ == '__main__':\n    raise SystemExit(1)",
]


@pytest.mark.parametrize("program", RIGHT)
def test_a_right_program_passes(judge, program):
    assert judge(program) == Verdict(True)


WRONG = {
    "wrong": "def square(x):\n    return x + x",
    "right where it was shown": "def square(x):\n    return 9",
    "no such function": "def cube(x):\n    return x * x * x",
    "no Python": "def square(x) return x",
    "nothing": "",
    "raises": "def square(x):\n    return x / 0",
    "never ends": "def square(x):\n    while True: pass",
    # leaving before the tests
    "exits early": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits when it is called": "import os\ndef square(x):\n    os._exit(0)",
    "raises SystemExit when it is called": "def square(x):\n    raise SystemExit(0)",
    # forged output: what a report of passed tests looks like
    "prints a report": f"""
import json, os, sys
report = json.dumps({{"passed": True, "missing": [], "about": "", "values": [True, True, True]}})
sys.__stdout__.write("\\n{inside_tests.MARK}" + report + "\\n")
sys.__stdout__.flush()
os._exit(0)""",
    "prints a report at the end": f"""
import atexit, sys
atexit.register(lambda: sys.__stdout__.write('\\n{inside_tests.MARK}{{"passed": true, "missing": []}}\\n'))
def square(x):
    return 1""",
    # changing what compares
    "equal to everything": """
class Any:
    __eq__ = lambda self, other: True
    __hash__ = None
def square(x):
    return Any()""",
    "a number equal to everything": """
class Any(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
def square(x):
    return Any(5)""",
    "changes the checker": """
import __main__, builtins, sys
for name in ("check", "collect", "_run"):
    setattr(__main__, name, lambda order: {"passed": True, "missing": [], "about": ""})
builtins.AssertionError = ArithmeticError
def square(x):
    return 1""",
    "looks for the tests": """
import __main__, gc, sys
def square(x):
    frame = sys._getframe()
    while frame:
        for value in (*frame.f_locals.values(), *frame.f_globals.values()):
            if isinstance(value, dict) and "tests" in value:
                return eval(value["tests"].split("==")[1].split()[0])
        frame = frame.f_back
    return None""",
    "an endless value": "def square(x):\n    x = []\n    x.append(x)\n    return x",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_program_that_is_not_right_fails_whatever_it_does(judge, name):
    verdict = judge(WRONG[name])
    assert not verdict.passed and verdict.why
    assert judge(RIGHT[0]) == Verdict(True)  # and spoils nothing for the next one


VALUES = UnitTests(
    "f",
    "",
    """
assert f("list") == [1, (2, "b")] and isinstance(f("list")[1], tuple)
assert f("set") == {1, 2} and f("dict") == {"a": [1.5, None], 2: True}
assert list(f("iterator")) == [0, 1] and f("range") == range(3) and f("bytes") == b"\\x00" and f("complex") == 1j
assert sorted(f({3, 1, 2}, key=[1])) == [1, 2, 3]
try:
    f("error")
    raise SystemError("it did not raise")
except KeyError:
    pass
""",
)
GIVES = """
def f(what, key=None):
    if isinstance(what, set):
        return list(what)
    return {"list": lambda: [1, (2, "b")], "set": lambda: {1, 2}, "dict": lambda: {"a": [1.5, None], 2: True},
            "iterator": lambda: iter(map(int, "01")), "range": lambda: range(3), "bytes": lambda: b"\\x00",
            "complex": lambda: 1j, "error": lambda: {}["x"]}[what]()
"""


def test_values_of_every_kind_reach_the_tests(judge):
    assert judge(GIVES, VALUES) == Verdict(True)


def test_a_call_that_depends_on_the_value_of_another_is_made(judge):
    tests = UnitTests("f", "", "x = f(2)\nassert f(x) == 16 if x is not None else False")
    assert judge("def f(x):\n    return x ** 2 if x < 4 else x * x", tests) == Verdict(True)
    assert not judge("def f(x):\n    return x", tests).passed


def test_tests_with_an_error_of_their_own_pass_nobody(judge):
    assert not judge(RIGHT[0], UnitTests("square", "", "assert unknown(square(3)) == 9")).passed


def test_random_draws_of_the_tests_are_the_same_each_time(judge):
    tests = UnitTests("f", "import random", "for _ in range(20):\n    x = random.random()\n    assert f(x) == x + 1")
    assert judge("def f(x):\n    return x + 1", tests) == Verdict(True)


# -- in a run ---------------------------------------------------------------------------------------------------------


def score(monkeypatch, url, said, tests=SQUARE):
    """As the agent loop scores a last turn, with the run's tool server in the environment."""
    monkeypatch.setenv("GTPO_TOOL_SERVER_URL", url)
    monkeypatch.delenv("GTPO_TOOL_SERVER_TOKEN", raising=False)
    config = compose("task=code")
    ask = load_score(config, load_task(config))

    async def run():
        try:
            row = {"data_source": "mbpp", "ground_truth": tests.to_json(), "extra_info": {"index": 0}}
            return await ask(solution_str=said, **row)
        finally:
            await unit_tests.close_client()

    return asyncio.run(run())


def test_the_last_block_of_the_last_turn_is_scored(monkeypatch, url):
    good, bad = (f"```python\n{program}\n```" for program in (RIGHT[0], WRONG["wrong"]))
    assert score(monkeypatch, url, f"{bad}\nNo:\n{good}")["acc"] == 1.0
    assert score(monkeypatch, url, f"{good}\nNo:\n{bad}")["acc"] == 0.0


def test_what_only_a_tool_printed_is_no_answer(monkeypatch, url):
    """The score sees the last turn alone: a program that an earlier call ran, or its output, is not in it."""
    assert score(monkeypatch, url, "The tool ran it, and it printed 9.") == {"acc": 0.0, "pred": ""}


def test_a_tool_server_that_fails_is_never_charged_to_the_program(monkeypatch):
    monkeypatch.setattr(unit_tests.ToolClient, "from_url", lambda url, **options: _Failing())
    with pytest.raises(ScoreError, match=r"the score of task=code raised ToolServerFailed: .*no worker"):
        score(monkeypatch, "http://nowhere", f"```python\n{RIGHT[0]}\n```", UnitTests("other", "", "assert other(1)"))
    assert issubclass(ToolServerFailed, RuntimeError)


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(unit_tests, "_known", OrderedDict())


TIRED = (Outcome.TIMEOUT, Outcome.MEMORY, Outcome.CRASH)


@pytest.mark.parametrize("outcome", TIRED)
def test_a_stumble_of_the_tests_themselves_is_charged_to_nobody(nothing_known, outcome):
    assert asyncio.run(run_tests(RIGHT[0], SQUARE, _Busy(outcome, times=1))) == Verdict(True)


@pytest.mark.parametrize("outcome", TIRED)
def test_tests_that_give_no_calls_are_a_failure_of_ours_which_nobody_remembers(nothing_known, outcome):
    with pytest.raises(ToolServerFailed, match=f"the tests of square gave no calls: .*{outcome.value}"):
        asyncio.run(run_tests(RIGHT[0], SQUARE, _Busy(outcome, times=99)))
    assert asyncio.run(run_tests(RIGHT[0], SQUARE, _Busy(outcome, times=0))) == Verdict(True)


def test_a_score_without_calls_is_lost_and_not_zero(nothing_known, monkeypatch):
    monkeypatch.setattr(unit_tests.ToolClient, "from_url", lambda url, **options: _Busy(Outcome.TIMEOUT, times=99))
    with pytest.raises(ScoreError, match="the tests of square gave no calls"):
        score(monkeypatch, "http://nowhere", f"```python\n{RIGHT[0]}\n```")


def test_a_problem_whose_tests_give_no_calls_is_unusable_and_ends_no_preparation(nothing_known, monkeypatch):
    monkeypatch.setattr(unit_tests, "tool_client", lambda: _Busy(Outcome.TIMEOUT, times=99))
    with pytest.raises(Unusable, match="its tests do not run"):
        asyncio.run(make_task("code").check(Example("Square it.", SQUARE.to_json(), reference=RIGHT[0])))


def test_problems_whose_own_solution_fails_are_no_training_problems(monkeypatch, url, tmp_path):
    monkeypatch.setenv("GTPO_TOOL_SERVER_URL", url)
    monkeypatch.delenv("GTPO_TOOL_SERVER_TOKEN", raising=False)

    def mbpp(text, body, *tests):
        return {"text": text, "code": f"def f(x):\n    return {body}", "test_list": tests, "test_setup_code": ""}

    good, bad = mbpp("Double it.", "2 * x", "assert f(2) == 4"), mbpp("Halve it.", "x", "assert f(2) == 1")
    own = mbpp("Make one.", "type('C', (), {})()", "assert f(1) is not None")  # an object of a class of its own
    write_jsonl(tmp_path / "local/mbpp/train.jsonl", [good, bad, own])
    write_jsonl(tmp_path / "local/mbpp/test.jsonl", [mbpp("Square it.", "x", "assert f(2) == 4")])
    said: list[str] = []
    prepare(make_task("code"), tmp_path / "out", local=tmp_path / "local", say=said.append)
    assert "  1 kept all the same, its own solution does not pass its tests: line 1" in said
    assert "  2 left out, its own solution does not pass its tests: lines 2, 3" in said
    (row,) = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert UnitTests.from_json(row["reward_model"]["ground_truth"]) == UnitTests("f", "", "assert f(2) == 4")


class _Failing:
    async def run(self, code, **options):
        return ExecutionResult.infra("id", "no worker", Isolation.UNKNOWN)

    async def close(self):
        pass


class _Busy:
    """A client of a machine on which the first so many executions of tests alone end like this."""

    def __init__(self, outcome: Outcome, times: int) -> None:
        self.outcome, self.times = outcome, times

    async def run(self, code, stdin, **options):
        order = json.loads(stdin)
        if order["do"] == "collect" and self.times > 0:
            self.times -= 1
            return ExecutionResult(self.outcome, "", "", "", "id", Isolation.UNKNOWN)
        said = f"\n{inside_tests.MARK}{json.dumps(getattr(inside_tests, order['do'])(order))}\n"
        return ExecutionResult(Outcome.OK, said, said, "", "id", Isolation.UNKNOWN)

    async def close(self):
        pass
