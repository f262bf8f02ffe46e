"""Runs inside the tool server, sent there as text: `unit_tests.py` says why. Standard library only.

Three programs, told apart by the order's `do`. An order and a report are JSON: the order comes by standard input, the
report is the last line of standard output.

* `collect`: the tests with a function in the place of the tested one that notes with what it is called -> the calls;
* `call`: the tested program, and the function's value for each of these calls -> the values;
* `check`: the tests with a function that gives those values -> whether they pass, and calls without a value.
"""

import ast
import builtins
import io
import itertools
import json
import random
import sys
import types

MARK = "report:"
MOST_ITEMS = 100_000  # of an iterator that a program returns
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
_ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed)


class Odd(Exception):
    """A value that is no plain data."""


def encode(value, depth=0):
    """Plain data as JSON: what has no JSON form becomes [kind, ...]. Objects of other classes raise Odd."""
    if depth > 50:
        raise Odd("nested too deeply")
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, dict):
        return ["dict", *([encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items())]
    if isinstance(value, _ITERATORS):
        return ["iterator", *(encode(item, depth + 1) for item in itertools.islice(value, MOST_ITEMS))]
    for kind in ("list", "tuple", "set", "frozenset"):
        if isinstance(value, _SEQUENCES[kind]):
            items = [encode(item, depth + 1) for item in value]
            return [
                kind,
                *(items if kind in ("list", "tuple") else sorted(items, key=json.dumps)),
            ]  # a set has no order
    raise Odd(f"an object of the class {type(value).__name__}")


def decode(data):
    """Inverse of `encode`. Makes plain data only, whatever it is given."""
    if not isinstance(data, list):
        if data is None or type(data) in (bool, str, int, float):
            return data
        raise Odd("no data")
    kind, *items = data
    if kind == "complex":
        return complex(*items)
    if kind == "bytes":
        return bytes.fromhex(*items)
    if kind == "range":
        return range(*items)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in items}
    return _SEQUENCES[kind]([decode(item) for item in items])


class _Lenient(ast.NodeTransformer):
    """An assertion becomes attempts to work out each call in it: nothing is known yet to be right or wrong."""

    def visit_Assert(self, node):
        attempts = []
        for call in (one for one in ast.walk(node.test) if isinstance(one, ast.Call)):
            attempt = ast.parse("try: pass\nexcept Exception: pass").body[0]
            attempt.body = [ast.Expr(call)]
            attempts.append(ast.fix_missing_locations(ast.copy_location(attempt, node)))
        return attempts or ast.copy_location(ast.Pass(), node)


def collect(order):
    calls = {}

    def tested(*args, **kwargs):
        call = [encode(list(args)), encode(kwargs)]
        calls.setdefault(json.dumps(call), call)

    tests = ast.unparse(_Lenient().visit(ast.parse(order["tests"])))
    error = None
    try:
        _run(order["setup"], tests, order["entry_point"], tested)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    return {"calls": list(calls.values()), "error": error}


def call(order):
    said = sys.stdout
    sys.stdout = sys.stderr = io.StringIO()  # what the program prints is not the report
    namespace = {"__name__": "solution"}
    values = []
    try:
        exec(order["setup"], namespace)
        exec(order["program"], namespace)
        tested = namespace[order["entry_point"]]
        for args, kwargs in order["calls"]:
            try:
                values.append({"value": encode(tested(*decode(args), **decode(kwargs)))})
            except Exception as e:
                values.append({"raised": type(e).__name__, "about": str(e)[:200]})
    except BaseException as e:
        values.append({"raised": type(e).__name__, "about": str(e)[:200]})
    finally:
        sys.stdout = said
    return {"values": values}


def check(order):
    values = {json.dumps(call): value for call, value in zip(order["calls"], order["values"], strict=False)}
    missing = []

    def tested(*args, **kwargs):
        call = [encode(list(args)), encode(kwargs)]
        value = values.get(json.dumps(call))
        if value is None:
            missing.append(call)
            raise Odd("no value yet")
        if "raised" in value:
            error = getattr(builtins, str(value["raised"]), Exception)
            raise error if isinstance(error, type) and issubclass(error, Exception) else Exception
        return decode(value["value"])

    try:
        _run(order["setup"], order["tests"], order["entry_point"], tested)
        return {"passed": not missing, "missing": missing, "about": ""}
    except Exception as e:
        return {"passed": False, "missing": missing, "about": f"{type(e).__name__}: {e}"[:200]}


def _run(setup, tests, entry_point, tested):
    """The tests, with `tested` under the name of the tested function. Draws of `random` are the same each time."""
    random.seed(0)
    namespace = {"__name__": "tests"}
    exec(setup, namespace)
    namespace[entry_point] = tested
    exec(tests, namespace)


def main():
    order = json.loads(sys.stdin.read())
    report = {"collect": collect, "call": call, "check": check}[order["do"]](order)
    sys.__stdout__.write(f"\n{MARK}{json.dumps(report)}\n")


if __name__ == "__main__":
    main()
