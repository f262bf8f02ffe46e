"""Runs one program in an already confined process, as ``python file.py`` would, plus the echo of a last expression.

Not a sandbox: by the time :func:`run` is called the kernel confines the process, and nothing here is relied on for
safety. The status bytes it writes are hints that let the server tell apart what the kernel cannot (see ``STATUS_*``);
a program that forges them can only claim an outcome it could also have brought about honestly.
"""

import ast
import atexit
import builtins
import io
import linecache
import os
import resource
import sys
import threading
import traceback
import types

FILENAME = "<code>"
LONGEST_TRACEBACK = 2000  # frames
# Written before any of the program runs, so these two cannot be forged:
STATUS_SYNTAX_ERROR = b"S"
STATUS_RUNNING = b"R"
# Written after it ran:
STATUS_MEMORY = b"M"

_FUTURE_FLAGS = 0
for _name in __import__("__future__").all_feature_names:
    _FUTURE_FLAGS |= getattr(__import__("__future__"), _name).compiler_flag


def run(
    source: str,
    echo: bool,
    status_fd: int,
    main: types.ModuleType | None = None,
    filename: str = FILENAME,
    last: bool = True,
) -> int:
    """Compile and run ``source`` as ``main`` (None: a fresh one); write status bytes to ``status_fd``.

    The standard streams must be new ones (``open_streams``), in this process or before its fork.
    ``last``: the process ends afterwards, so do what interpreter shutdown does. Returns the process exit status.
    """
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    try:
        parts = compile_program(source, echo, filename)
    except BaseException:
        os.write(status_fd, STATUS_SYNTAX_ERROR)
        _print_exception()
        return _finish(1, last)
    if main is None:
        main = fresh_main()
    os.write(status_fd, STATUS_RUNNING)
    code = run_parts(parts, main.__dict__, status_fd)
    return _finish(code, last)


def fresh_main() -> types.ModuleType:
    """A new ``__main__`` with nothing of ours in it."""
    main = types.ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = [FILENAME]
    return main


def compile_program(source: str, echo: bool, filename: str = FILENAME) -> list[types.CodeType]:
    """Compile; with ``echo``, a last expression statement becomes a unit of its own in REPL ("single") mode.

    The split is made on the syntax tree, never on the text, so strings, decorators, continuation lines and trailing
    comments cannot confuse it, and line numbers stay those of ``source``.
    """
    if not echo:
        return [compile(source, filename, "exec", dont_inherit=True)]
    tree = ast.parse(source, filename)
    if not (tree.body and isinstance(tree.body[-1], ast.Expr)):
        return [compile(tree, filename, "exec", dont_inherit=True)]
    last = ast.Interactive([tree.body.pop()])
    body = compile(tree, filename, "exec", dont_inherit=True)
    # A `from __future__` import at the top holds for the last line too.
    return [body, compile(last, filename, "single", flags=body.co_flags & _FUTURE_FLAGS, dont_inherit=True)]


def run_parts(parts: list[types.CodeType], namespace: dict[str, object], status_fd: int) -> int:
    """Run compiled parts in one namespace. Returns the exit status ``python`` would have given."""
    try:
        for part in parts:
            exec(part, namespace)
    except SystemExit as stop:
        if stop.code is None:
            return 0
        if isinstance(stop.code, int):
            return stop.code & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except MemoryError:
        _raise_memory_limit_to_hard()
        os.write(status_fd, STATUS_MEMORY)
        _print_exception()
        return 1
    except BaseException:
        _print_exception()
        return 1
    return 0


def _raise_memory_limit_to_hard() -> None:
    """The hard limit leaves a little room above the soft one, so that a traceback can be printed at all."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def open_streams() -> None:
    """New text streams over descriptors 0-2. Line buffered: a program killed later has still shown what it printed."""
    stdin = io.BufferedReader(io.FileIO(0, "r", closefd=False))
    sys.stdin = io.TextIOWrapper(stdin, "utf-8", "replace")
    setattr(sys.stdin, "mode", "r")  # noqa: B010  typed as read-only
    setattr(sys, "__stdin__", sys.stdin)  # noqa: B010  typed as final
    for fd, name in ((1, "stdout"), (2, "stderr")):
        raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
        stream = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
        setattr(stream, "mode", "w")  # noqa: B010  typed as read-only
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def open_streams_for_children() -> list[object]:
    """``open_streams`` before the forks: done in each child it would be a tenth of a small program's CPU.

    A stream remembers what kind of file it was opened over, so they are opened over what a child has: a seekable
    input, pipes for output. Returns the streams of before. Keep them: freeing them would be left to every child.
    """
    before = [sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__]
    saved = [os.dup(fd) for fd in (0, 1, 2)]
    null, (reader, writer) = os.open("/dev/null", os.O_RDONLY), os.pipe()
    for fd, stand_in in enumerate((null, writer, writer)):
        os.dup2(stand_in, fd)
    open_streams()
    for fd, original in enumerate(saved):
        os.dup2(original, fd)
    for fd in (null, reader, writer, *saved):
        os.close(fd)
    return before


def _print_exception() -> None:
    """Print the current exception as the interpreter would, without the frames of this file."""
    kind, error, tb = sys.exc_info()
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    depth, frame = 0, tb
    while frame is not None:
        depth, frame = depth + 1, frame.tb_next
    # A recursion without limit leaves millions of frames; formatting them all would take longer than the program.
    limit = None if depth <= LONGEST_TRACEBACK else -LONGEST_TRACEBACK
    try:
        traceback.print_exception(kind, error, tb, limit=limit, file=sys.__stderr__)
    except BaseException:  # a hostile __str__, or no memory left: still say what class of error it was
        os.write(2, f"{getattr(kind, '__name__', kind)}\n".encode(errors="replace"))


def _finish(code: int, last: bool) -> int:
    """What interpreter shutdown does and programs rely on: join threads, run atexit, flush. Returns the exit status."""
    flush = (sys.stdout.flush, sys.stderr.flush)
    shutdown = (getattr(threading, "_shutdown"), atexit._run_exitfuncs)  # noqa: B009  private, and typed as absent
    for step in (*shutdown, *flush) if last else flush:
        try:
            step()
        except BaseException:
            code = code or 1
    return code
