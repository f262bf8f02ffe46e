"""The echo of a last expression and true line numbers, without any process."""

from __future__ import annotations

import pytest

from verl_ext.tool_server.dispatcher import kind_of
from verl_ext.tool_server.inside.runner import compile_program

pytestmark = pytest.mark.unit


def run(source: str, capsys: pytest.CaptureFixture[str], echo: bool = True) -> str:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for part in compile_program(source, echo):
        exec(part, namespace)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx", "3\n"),
        ("x = 3", ""),
        ("None", ""),
        ("print('a')", "a\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("(1 +\n 1)  # a comment", "2\n"),
        ("'''text\nof two lines'''", "'text\\nof two lines'\n"),
        ("f = lambda: 5\nf()\n\n\n", "5\n"),
        ("1; 2", "2\n"),  # only the last expression is shown, unlike a shell's prompt
        ("for i in range(2): i", ""),
        ("", ""),
        ("# nothing", ""),
        ("from __future__ import annotations\nx: undefined = 1\nx", "1\n"),
        ("def f():\n    return 1\nf()", "1\n"),
        ("print('a', end='')\nx = 1", "a"),
    ],
)
def test_echo(source: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, capsys) == shown


def test_without_echo_it_is_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("1 + 1", capsys, echo=False) == ""


def test_the_echoed_line_keeps_its_number() -> None:
    namespace: dict[str, object] = {}
    with pytest.raises(ZeroDivisionError) as caught:
        for part in compile_program("x = 0\n\n\n1 / x", True):
            exec(part, namespace)
    assert caught.traceback[-1].lineno + 1 == 4


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("print(1)", "bare"),
        ("import numpy as np", "numpy"),
        ("  from numpy.linalg import inv", "numpy"),
        ("import math, numpy", "numpy"),
        ("import numpy\nimport sympy", "sci"),
        ("from scipy.optimize import minimize", "sci"),
        ("x = 'numpy'", "bare"),
        ("# import numpy", "bare"),
    ],
)
def test_zygote_is_chosen_by_imports(code: str, kind: str) -> None:
    assert kind_of(code) == kind
