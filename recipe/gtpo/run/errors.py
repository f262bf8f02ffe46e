"""Why a run ended, in one line: what the last line of the terminal and `cause.txt` say."""

from __future__ import annotations

import re

from hydra.errors import InstantiationException

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
#: The end of a traceback as text: its last frame, and the line behind it, which is the only one that is not indented.
_RAISED = re.compile(r".*^  File [^\n]*\n(?: [^\n]*\n)*([^\s][^\n]*)", re.MULTILINE | re.DOTALL)
_DEEPEST = 20  # errors in errors


#: Of Ray's report on a dead actor: among twenty lines of advice, what it was and how it ended.
_DIED = {name: re.compile(rf"{name}: ([^\s]*\w)") for name in ("class_name", "pid", "Worker exit type")}


class ConfigError(Exception):
    """A configuration that cannot run. The message is one line: what is wrong and what to do."""


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return _COLOUR.sub("", text)


def one_line(error: BaseException) -> str:
    """`Type: message` of the error that began it.

    Ray hands an error of another process on inside one of its own, whose text is a coloured header and a traceback;
    hydra does so with what a class raises that it calls.
    """
    for _ in range(_DEEPEST):
        inner = error.__cause__ if isinstance(error, InstantiationException) else getattr(error, "cause", None)
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    if (mark := getattr(error, "problem_mark", None)) is not None:  # of a YAML file: the first of many lines says least
        return f"{type(error).__name__}: line {mark.line + 1} of {mark.name}: {error.problem}"  # type: ignore[attr-defined]
    text = plain(str(error)).strip()
    if "class_name" in (died := how_it_died(text)):
        return f"a process of the run died: {died}"
    if raised := _RAISED.match(text):  # of an error that could not be sent, or of an actor that failed to start
        return raised[1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def how_it_died(report: str) -> str:
    """Ray's report on a dead actor in one line: its class, process id and kind of exit, as far as they are there."""
    found = {name: match[1] for name, pattern in _DIED.items() if (match := pattern.search(report))}
    return ", ".join(f"{name} {value}" for name, value in found.items()) or report.strip().partition("\n")[0]
