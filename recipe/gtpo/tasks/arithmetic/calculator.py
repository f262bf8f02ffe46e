"""What the Python tool answers to the programs of the arithmetic task, computed in this process.

Not a sandbox and not an interpreter: integers with + - * only, evaluated on the syntax tree. It exists because
warm-start data and the plain-PyTorch twin need tool replies by the hundred thousand, in exactly the text that a rollout
shows (`agent_loop.py` with `config/tools/calculator.yaml`). Outside its language (names, other operators, several
statements) it answers with an error of its own wording; inside it, the wording is Python's.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace

from recipe.gtpo.method.turns import ToolCall, ToolOutcome

_OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def run_code(code: str) -> ToolOutcome:
    """Outcome and output of one program. Never raises for a program the model wrote."""
    try:
        tree = ast.parse(code)
        compile(tree, "<code>", "exec")  # finds the syntax errors that the parser lets pass
    except SyntaxError as e:
        return ToolOutcome("syntax_error", f"Traceback (most recent call last):\nSyntaxError: {e.msg}", 0.0)
    except (ValueError, RecursionError, MemoryError) as e:  # null bytes, absurd nesting
        return ToolOutcome("error", f"Traceback (most recent call last):\n{type(e).__name__}: {e}", 0.0)
    if not tree.body:
        return ToolOutcome("ok", "", 0.0)
    last = tree.body[-1]
    try:
        if len(tree.body) > 1 or not isinstance(last, ast.Expr):
            raise ValueError("the calculator evaluates one expression")
        return ToolOutcome("ok", f"{_evaluate(last.value)}\n", 0.0)
    except ValueError as e:
        return ToolOutcome("error", f"Traceback (most recent call last):\nValueError: {e}", 0.0)


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    raise ValueError(f"the calculator has no {type(node).__name__}")


def run_call(call: ToolCall) -> ToolOutcome:
    """What the tool answers to one well-formed call: what its program shows, of a failed one the traceback's last line.

    `config/tools/calculator.yaml` (`error_lines: 1`) makes the real tool answer in the same text.
    """
    result = run_code(str(call.arguments["code"]))
    return result if result.outcome == "ok" else replace(result, output=result.output.splitlines()[-1])
