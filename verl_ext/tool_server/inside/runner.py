"""Runs one program in an already confined process, as ``python file.py`` would, plus the echo of a last expression.

Not a sandbox: by the time :func:`run` is called the kernel confines the process, and nothing here is relied on for
safety. The status bytes it writes are hints that let the server tell apart what the kernel cannot (see ``STATUS_*``);
a program that forges them can only claim an outcome it could also have brought about honestly.
"""

import _thread
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
from collections.abc import Callable, Iterable
from typing import Any

FILENAME = "<code>"
LONGEST_TRACEBACK = 2000  # frames
# Nested expressions, a sum's terms among them, that compile: ten times what the interpreter's own limit on recursion
# lets an interactive line have. A third of what fits into 8 MiB of stack.
DEEPEST_SOURCE = 10_000
# Written before any of the program runs, so these two cannot be forged:
STATUS_SYNTAX_ERROR = b"S"
STATUS_RUNNING = b"R"
# Written after it ran:
STATUS_MEMORY = b"M"
STATUS_EXIT = b"E"  # it ends by itself, with one of the statuses that otherwise stand for a signal (inside/signals.py)

_FUTURE_FLAGS = 0
for _name in __import__("__future__").all_feature_names:
    _FUTURE_FLAGS |= getattr(__import__("__future__"), _name).compiler_flag
_OWN_FOLDER = os.path.dirname(__file__) + os.sep
_FIRST_SIGNAL_STATUS = 129
_WITHOUT_END = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)  # nothing happens when they go
_FLUSH_FAILED = 120  # the interpreter's exit status when standard output cannot be flushed


def run(
    source: str,
    echo: bool,
    status_fd: int,
    main: types.ModuleType | None = None,
    filename: str = FILENAME,
    last: bool = True,
    line_mark: bytes = b"",
) -> int:
    """Compile and run ``source`` as ``main`` (None: a fresh one); write status bytes to ``status_fd``.

    The standard streams must be new ones (``open_streams``), in this process or before its fork.
    ``last``: the process ends afterwards, so do what interpreter shutdown does.
    ``line_mark``: written to standard output ahead of an echo; the server puts a line's end in its place where needed.
    Returns the process exit status.
    """
    source = source.removeprefix("\ufeff")
    # The interpreter's lines end at \n, \r\n or \r; str.splitlines knows others, and would number them differently.
    lines = [line + "\n" for line in source.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    linecache.cache[filename] = (len(source), None, lines, filename)
    try:
        parts = compile_program(source, echo, filename)
    except BaseException as error:
        os.write(status_fd, STATUS_SYNTAX_ERROR)
        error = _as_read_from_a_file(error, lines, filename)
        _print_exception(type(error), error, None)
        return _finish(1, last)
    if main is None:
        main = fresh_main()
    if echo:
        sys.displayhook = _displayhook(line_mark)
    os.write(status_fd, STATUS_RUNNING)
    code = run_parts(parts, main.__dict__, status_fd)
    code = _finish(code, last, main.__dict__, parts)
    if code >= _FIRST_SIGNAL_STATUS:
        try:
            os.write(status_fd, STATUS_EXIT)
        except OSError:
            pass  # the program closed it
    return code


def fresh_main() -> types.ModuleType:
    """A new ``__main__`` with nothing of ours in it, and the working directory to import from."""
    main = types.ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __file__=FILENAME, __cached__=None, __annotations__={})
    sys.modules["__main__"] = main
    sys.argv = [FILENAME]
    sys.path.insert(0, os.getcwd())
    return main


def compile_program(source: str, echo: bool, filename: str = FILENAME) -> list[types.CodeType]:
    """Compile; with ``echo``, a last expression statement becomes a unit of its own in REPL ("single") mode.

    The split is made on the syntax tree, never on the text, so strings, decorators, continuation lines and trailing
    comments cannot confuse it, and line numbers stay those of ``source``.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEEPEST_SOURCE))
    try:
        parts = _split(source, filename) if echo else None
        return parts or [compile(source, filename, "exec", dont_inherit=True)]
    finally:
        sys.setrecursionlimit(limit)


def _split(source: str, filename: str) -> list[types.CodeType] | None:
    """The program and its last expression. None: there is none, or the tree is too deep to be taken apart."""
    try:
        tree = ast.parse(source, filename)
        if not (tree.body and isinstance(tree.body[-1], ast.Expr)):
            return [compile(tree, filename, "exec", dont_inherit=True)]
        last = ast.Interactive([tree.body.pop()])
        body = compile(tree, filename, "exec", dont_inherit=True)
        # A `from __future__` import at the top holds for the last line too.
        return [body, compile(last, filename, "single", flags=body.co_flags & _FUTURE_FLAGS, dont_inherit=True)]
    except RecursionError:
        return None  # what compiles as a script must not fail for the sake of the echo


def _as_read_from_a_file(error: BaseException, lines: list[str], filename: str) -> BaseException:
    """The compiler's error as the interpreter has it for a file: with the line, which it cannot look up itself."""
    if isinstance(error, UnicodeEncodeError):  # lone surrogates: in a file they are bytes that do not decode
        try:
            compile("".join(lines).encode("utf-8", "surrogatepass"), filename, "exec", dont_inherit=True)
        except SyntaxError as same:
            error = same
    line = (error.lineno or 0) if isinstance(error, SyntaxError) else 0
    if isinstance(error, SyntaxError) and error.text is None and 0 < line <= len(lines):
        error.text = lines[line - 1]
    error.__context__ = None
    return error


def run_parts(parts: list[types.CodeType], namespace: dict[str, object], status_fd: int) -> int:
    """Run compiled parts in one namespace. Returns the exit status ``python`` would have given."""
    try:
        for part in parts:
            exec(part, namespace)
    except SystemExit as stop:
        return _exit_status(stop)
    except MemoryError:
        _raise_memory_limit_to_hard()
        os.write(status_fd, STATUS_MEMORY)
        return _uncaught()
    except KeyboardInterrupt:
        return _uncaught(130)  # as a shell sees it
    except BaseException:
        return _uncaught()
    return 0


def _exit_status(stop: SystemExit) -> int:
    """What sys.exit() means: None is 0, a number is itself, anything else is printed and is 1."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF if abs(stop.code) < 1 << 63 else 0xFF
    try:
        text = str(stop.code)
    except BaseException:
        text = ""  # the interpreter says no more either
    print(text, file=_open_stderr(sys.stderr))
    return 1


def _uncaught(status: int = 1) -> int:
    """Hand the current exception to sys.excepthook, as the interpreter does. Returns the exit status."""
    kind, error, tb = sys.exc_info()
    assert kind is not None and error is not None
    tb = _without_our_frames(tb)
    hook = getattr(sys, "excepthook", None)
    if hook is None or hook is sys.__excepthook__:
        _print_exception(kind, error, tb)
        return status
    try:
        hook(kind, error.with_traceback(tb), tb)
    except SystemExit as stop:
        return _exit_status(stop)
    except BaseException as second:
        second.__context__ = None
        stream = _open_stderr()
        print("Error in sys.excepthook:", file=stream)
        _print_exception(type(second), second, _without_our_frames(second.__traceback__))
        print("\nOriginal exception was:", file=stream)
        _print_exception(kind, error, tb)
    return status


def _raise_memory_limit_to_hard() -> None:
    """The hard limit leaves a little room above the soft one, so that a traceback can be printed at all."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def open_streams() -> None:
    """New text streams over descriptors 0-2. Nothing is held back: a program killed later has shown what it printed.

    Beside other threads a line is held back until it ends (``keep_lines_whole_beside_threads``).
    """
    stdin = io.BufferedReader(io.FileIO(0, "r", closefd=False))
    sys.stdin = io.TextIOWrapper(stdin, "utf-8", "replace")
    setattr(sys.stdin, "mode", "r")  # noqa: B010  typed as read-only
    setattr(sys, "__stdin__", sys.stdin)  # noqa: B010  typed as final
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = _output_stream(fd)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        _streams[name] = stream


_streams: dict[str, io.TextIOWrapper] = {}  # the last ones opened; a program may replace those of sys


def _output_stream(fd: int) -> io.TextIOWrapper:
    raw: Any = io.FileIO(fd, "w", closefd=False)  # as under `python -u`
    stream = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True, write_through=True)
    setattr(stream, "mode", "w")  # noqa: B010  typed as read-only
    return stream


def keep_lines_whole_beside_threads() -> None:
    """Have the streams hold a line back until it ends, from when the program starts a thread. To be called once.

    print() writes a line in pieces, and lets other threads run in each write: their lines would be mixed.
    """
    start = getattr(threading, "_start_new_thread")  # noqa: B009  private, and typed as absent

    def start_new_thread(*args: Any) -> int:
        for stream in _streams.values():
            try:
                stream.reconfigure(write_through=False)
            except Exception:
                pass  # the program closed it
        return start(*args)

    setattr(threading, "_start_new_thread", start_new_thread)  # noqa: B010


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


def _displayhook(line_mark: bytes) -> Callable[[object], None]:
    """What shows the value of a last expression: ``sys.displayhook`` after ``line_mark``.

    It is our addition, so it fails nothing: a standard output that takes no text is left alone. The mark goes to the
    server only, which takes it out: not to where the program may have led descriptor 1.
    """
    server = os.fstat(1)

    def show(value: object) -> None:
        if value is None:
            return
        if not hasattr(sys.stdout, "write") or getattr(sys.stdout, "closed", False):
            return
        streams: tuple[Any, ...] = (sys.stdout, *_streams.values())  # the program's own may write through ours
        for stream in streams:
            try:
                stream.flush()
            except Exception:
                pass  # _finish reports it
        try:
            if os.path.samestat(os.fstat(1), server):
                os.write(1, line_mark)
        except OSError:
            pass  # the program closed it
        sys.__displayhook__(value)

    return show


def _without_our_frames(tb: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback as it would be if the interpreter itself had run the program."""
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
        tb = tb.tb_next
    entry = tb
    while entry is not None:
        while entry.tb_next is not None and entry.tb_next.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
            entry.tb_next = entry.tb_next.tb_next
        entry = entry.tb_next
    return tb


def _unraisable(args: Any) -> None:
    """The interpreter's own report of what cannot be raised. To what has no frame it gives the running one: ours."""
    tb = _without_our_frames(args.exc_traceback)
    sys.__unraisablehook__(type(args)((args.exc_type, args.exc_value, tb, args.err_msg, args.object)))


def _open_stderr(stream: Any = None) -> Any:
    """``stream``, else our own standard error, else (the program closed that too) a new one over its descriptor."""
    for candidate in (stream, _streams.get("stderr")):
        if candidate is not None and not getattr(candidate, "closed", False):
            return candidate
    _streams["stderr"] = _output_stream(2)
    return _streams["stderr"]


def _print_exception(kind: type[BaseException], error: BaseException, tb: types.TracebackType | None) -> None:
    """Print an exception as the interpreter would."""
    depth, frame = 0, tb
    while frame is not None:
        depth, frame = depth + 1, frame.tb_next
    # A recursion without limit leaves millions of frames; formatting them all would take longer than the program.
    limit = None if depth <= LONGEST_TRACEBACK else -LONGEST_TRACEBACK
    try:
        traceback.print_exception(kind, error, tb, limit=limit, file=_open_stderr())
    except BaseException:  # no memory left: still say what class of error it was
        os.write(2, f"{getattr(kind, '__name__', kind)}\n".encode(errors="replace"))


def _finish(
    code: int, last: bool, namespace: dict[str, object] | None = None, parts: Iterable[types.CodeType] = ()
) -> int:
    """What interpreter shutdown does and programs rely on. Returns the exit status.

    That is: join threads, run atexit, flush, let go of the program's variables (``__del__``, files not yet flushed).
    """
    shutdown = (getattr(threading, "_shutdown"), atexit._run_exitfuncs)  # noqa: B009  private, and typed as absent
    if last and sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
    for step in shutdown if last else ():
        try:
            step()
        except BaseException:
            code = code or 1
    for stream in (getattr(sys, "stdout", None), getattr(sys, "stderr", None)):
        code = _flush(stream, code)
    # A daemon thread that still runs would stumble over the missing variables; in the interpreter it is frozen by now.
    if last and namespace is not None and _thread._count() == 0:
        _clear(namespace, parts)
    for stream in _streams.values():
        code = _flush(stream, code)
    return code


def _flush(stream: Any, code: int) -> int:
    """Flush, and report what cannot be flushed, as the interpreter does. Returns the exit status."""
    try:
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    except BaseException as error:
        if stream is getattr(sys, "stderr", None):
            return _FLUSH_FAILED  # nowhere to say it
        try:
            name = repr(stream)
        except BaseException:
            name = "<object repr() failed>"
        print(f"Exception ignored in: {name}", file=_open_stderr())
        _print_exception(type(error), error, _without_our_frames(error.__traceback__))
        return _FLUSH_FAILED
    return code


def _clear(namespace: dict[str, object], parts: Iterable[types.CodeType]) -> None:
    """End the program's variables: first those with a ``__del__``, which may use all others, then what may hold such.

    Only those that the program names: to touch all of ``from sympy import *`` would copy the pages they are on.
    """
    named: set[str] = set()
    code = list(parts)
    while code:
        part = code.pop()
        named.update(part.co_names)
        code.extend(constant for constant in part.co_consts if isinstance(constant, types.CodeType))
    names = [name for name in namespace if name in named and not isinstance(namespace[name], _WITHOUT_END)]
    for name in [name for name in names if hasattr(type(namespace[name]), "__del__")] + names:
        namespace[name] = None
