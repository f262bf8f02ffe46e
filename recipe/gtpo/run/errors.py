"""Why a run ended, in one line: what the last line of the terminal and `cause.txt` say."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
#: The end of a traceback as text: its last frame, and the line behind it, which is the only one that is not indented.
_RAISED = re.compile(r".*^  File [^\n]*\n(?: [^\n]*\n)*([^\s][^\n]*)", re.MULTILINE | re.DOTALL)
_DEEPEST = 20  # errors in errors

#: What a command that got SIGTERM says, and its exit status.
TERMINATED = "terminated (SIGTERM)"
TERMINATED_STATUS = 143

#: Of Ray's report on a dead actor: among twenty lines of advice, what it was and how it ended.
_DIED = {name: re.compile(rf"{name}: ([^\s]*\w)") for name in ("class_name", "pid", "Worker exit type")}


class ConfigError(Exception):
    """A configuration that cannot run. The message is one line: what is wrong and what to do."""


def call_hydra(main: Callable[[], None], program: str) -> None:
    """Call a function that `hydra.main` made. What hydra refuses ends the process with one line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra raises it, and does not print it
    try:
        main()
    except (HydraException, OmegaConfBaseException) as e:
        sys.exit(f"{program}: error: {plain(one_line(e))}")
    except ValueError as e:
        if not is_null_group(e):
            raise
        sys.exit(f"{program}: error: {one_line(e)}")


def is_null_group(error: ValueError) -> bool:
    """Whether it is hydra's word on a group that an override sets to null, which is no error of its own kind."""
    return str(error).startswith("Config group override must be a string or a list")


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return _COLOUR.sub("", text)


def one_line(error: BaseException) -> str:
    """`Type: message` of the error that began it.

    Ray hands an error of another process on inside one of its own, whose text is a coloured header and a traceback;
    hydra does so with what a class raises that it calls.
    """
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _no_such_key(cause)
    if isinstance(error, OverrideParseException):
        word = str(error.override)
        return (
            f"{word} is no override that Hydra can read. A value with spaces, brackets, commas or quotes needs quotes "
            "of its own inside the shell's, as in 'task.answer=\"#### (.+)\"'"
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: there is no such choice.{near(name, error.options)} Valid: {', '.join(error.options)}"
    if isinstance(error, ValueError) and is_null_group(error):
        return "a group (model=..., experiment=...) cannot be set to null by an override: leave it out"
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


def near(word: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` with the known word that is nearest, or nothing where none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _no_such_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """Of an override whose key is not there.

    Hydra's own text advises to add the key, which turns a typo into a key that nobody reads. An added key cannot be
    refused: verl looks for many that its config lacks, such as `data.gen_batch_size`.
    """
    known = list(_keys(OmegaConf.to_container(error.parent_node._get_root(), resolve=False)))
    hint = near(str(error.full_key), known)
    return f"{error.full_key}: there is no such key.{hint} A + in front adds a key, whether or not anything reads it."


def _keys(section: Any, above: str = "") -> Iterator[str]:
    """The full names of all keys and sections."""
    for key, value in section.items() if isinstance(section, dict) else ():
        yield f"{above}{key}"
        yield from _keys(value, f"{above}{key}.")


def how_it_died(report: str) -> str:
    """Ray's report on a dead actor in one line: its class, process id and kind of exit, as far as they are there."""
    found = {name: match[1] for name, pattern in _DIED.items() if (match := pattern.search(report))}
    return ", ".join(f"{name} {value}" for name, value in found.items()) or report.strip().partition("\n")[0]
