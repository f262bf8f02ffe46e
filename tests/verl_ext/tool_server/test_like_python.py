"""A program behaves as under ``python file.py``: each one here is run by a plain interpreter too, and compared.

What the isolation makes different has an expected value of its own, and must be the same in both tiers.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import REPOSITORY, USER_UID, Server, World

from verl_ext.tool_server import ExecutionRequest, ExecutionResult, ToolClient
from verl_ext.tool_server.runtime import ensure_runtime

pytestmark = pytest.mark.e2e
README = (REPOSITORY / "verl_ext" / "tool_server" / "README.md").read_text()
NO_FLUSH = "import sys\nclass W:\n    def write(self, s): pass\nsys.stdout = W()\n"


def run(server: Server, code: str, echo: bool = False, **options: object) -> ExecutionResult:
    async def once() -> ExecutionResult:
        async with ToolClient.from_url(server.url, attempts=1) as client:
            return (await client.run_batch([ExecutionRequest(code, echo=echo, **options)], deadline=60))[0]

    return asyncio.run(once())


@dataclass(frozen=True)
class Ending:
    """All that an execution shows of itself."""

    stdout: str
    stderr: str
    exit_code: int | None
    signal: int | None


@functools.cache
def plain_python(code: str, stdin: str = "") -> Ending:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "program.py")
        file.write_bytes(code.encode("utf-8", "surrogatepass"))
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(file)]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            input=stdin.encode(),
            capture_output=True,
            timeout=60,
            # As in a terminal: tests that a script starts with `&` ignore SIGINT, and a program would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        out, err = (_comparable(text.decode("utf-8", "replace"), str(file)) for text in (done.stdout, done.stderr))
    died = done.returncode < 0
    return Ending(out, err, None if died else done.returncode, -done.returncode if died else None)


def _comparable(text: str, file: str = "<code>") -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text.replace(file, "<code>"))


def ending(result: ExecutionResult) -> Ending:
    return Ending(_comparable(result.stdout), _comparable(result.stderr), result.exit_code, result.signal)


AS_PLAIN = {
    # 16: what start-up adds
    "exit": "print('x'); exit()",
    "quit_with_a_status": "quit(3)",
    "exit_with_a_text": "exit('bye')",
    "help": "help(abs)",
    "the_others": "print(exit, quit, help, copyright, credits, license, sep='\\n')",
    # 18: standard output and error replaced or closed
    "stdout_none": "import sys\nsys.stdout = None\nprint(1)",
    "stdout_none_with_text_pending": "import sys\nsys.stdout.write('abc')\nsys.stdout = None",
    "stdout_without_flush": f"{NO_FLUSH}print(1)",
    "stdout_whose_flush_fails": f"{NO_FLUSH}W.flush = lambda self: 1 / 0",
    "stdout_closed": "import sys\nsys.stdout.close()",
    "stdout_closed_then_print": "import sys\nsys.stdout.close()\nprint(1)",
    "stdout_no_file": "import sys\nsys.stdout = object()\nprint(1)",
    "stderr_without_flush": "import sys\nsys.stderr = object()",
    "exit_with_a_text_without_stderr": "import sys\nsys.stderr.close()\nsys.stdout.write('a')",
    # 18: what does not compile
    "never_closed": "x = (1,\ny = 2",
    "return_outside": "x = 1\nreturn 5",
    "break_outside": "x = 1\n\nbreak",
    "bad_string": "x = 'abc\n",
    "bad_escape": "'\\N{nothing}'",
    "keyword_twice": "f(a=1, a=2)",
    "nonlocal_at_top": "nonlocal x",
    "future_too_late": "x = 1\nfrom __future__ import annotations",
    "long_sum": "x = 1\nprint(" + " + ".join(["x"] * (1200 if sys.version_info >= (3, 12) else 2900)) + ")",
    # 19: the module, its file and its path
    "file": "print(__file__, __name__)\nimport sys\nprint(sys.argv)",
    "globals": "print(sorted(globals()), __annotations__, __cached__)",
    "folder_of_the_file": "import os\nprint(os.path.dirname(os.path.abspath(__file__)) == os.getcwd())",
    "path": "import os, sys\nprint(os.path.samefile(sys.path[0], os.getcwd()))",
    "source_of_a_function": "import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f))",
    "bom": "\ufeffprint(1)",
    "lines_of_a_traceback": "x = '\x0c'  # \x1c \u2028\n1 / 0",
    "carriage_returns": "x = 1\r\n\r\n1 / 0\r\n",
    # 19: the last hooks
    "excepthook": "import sys\nsys.excepthook = lambda *a: print('hooked', a[0].__name__, a[2].tb_lineno)\n1 / 0",
    "excepthook_exits": "import sys\nsys.excepthook = lambda *a: sys.exit(7)\n1 / 0",
    "excepthook_fails": "import sys\ndef hook(*a):\n    raise KeyError('h')\nsys.excepthook = hook\n1 / 0",
    "excepthook_sees_its_own_frames_only": "import sys, traceback\n"
    "sys.excepthook = lambda k, e, tb: traceback.print_exception(e)\n1 / 0",
    "excepthook_none_for_exit": "import sys\nsys.excepthook = print\nsys.exit(4)",
    "exit_status_of_a_signal": "import sys\nsys.exit(143)",
    "atexit": "import atexit\n_ = atexit.register(print, 'bye')",
    "atexit_fails": "import atexit\n_ = atexit.register(int, 'x')",
    "deleted_at_the_end": "n = [3]\nclass A:\n    def __del__(self): print(id(self) == id_, n, json.__name__)\n"
    "import json\na = A()\nid_ = id(a)",
    "deleted_in_order": "class A:\n    def __del__(self): print(self.n)\n_a, b = A(), A()\n_a.n, b.n = 1, 2",
    "deleted_with_its_list": "class A:\n    def __del__(self): print('deleted')\na = [A()]",
    "file_flushed_at_the_end": "out = open(1, 'w', closefd=False)\n_ = out.write('late')",
    # 19: threads and what multiprocessing makes of them
    "executor": "from concurrent.futures import ThreadPoolExecutor as P\nprint(list(P(4).map(abs, [-1, 2])))",
    "thread_pool": "from multiprocessing.pool import ThreadPool\nprint(ThreadPool(2).map(abs, [-1, 2]))",
    "dummy_pool": "from multiprocessing.dummy import Pool\nwith Pool(2) as p: print(p.map(abs, [-1, 2]))",
    "primitives": """
import multiprocessing as m, threading
q, s, j = m.Queue(), m.SimpleQueue(), m.JoinableQueue()
for each in (q, s, j): each.put(1)
print(q.get(timeout=5), s.get(), j.get(timeout=5), q.empty())
j.task_done(); j.join()
lock, r, sem, bounded = m.Lock(), m.RLock(), m.Semaphore(2), m.BoundedSemaphore(1)
print(lock, lock.acquire(), lock.acquire(False), lock.acquire(timeout=0.01), lock.release(), lock)
with r, r: print(r)
print(sem.acquire(), sem.acquire(), sem.acquire(False), sem, bounded.acquire(), bounded.release())
for failing in (lock.release, r.release, bounded.release):
    try: failing()
    except Exception as e: print(type(e).__name__, e)
event, condition = m.Event(), m.Condition()
print(event.is_set(), event.set(), event.is_set(), event.wait(1))
def wake():
    with condition: condition.notify()
with condition:
    t = threading.Thread(target=wake); t.start()
    print(condition.wait(5))
t.join()
with m.get_context("spawn").Lock(): print("spawn")
a, b = m.Pipe(); a.send([1]); print(b.recv())
""",
    # 19: its own signals
    **{
        f"signal_{name}": f"import os, signal\nprint('x', flush=True)\nos.kill(os.getpid(), signal.{name})\nprint('on')"
        for name in ("SIGHUP", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGILL", "SIGFPE", "SIGSEGV", "SIGBUS",
                     "SIGALRM", "SIGXCPU", "SIGPIPE", "SIGCHLD", "SIGURG", "SIGRTMIN", "SIGSYS", "SIGPROF")
    },
    "signal_raised": "import signal\nsignal.raise_signal(signal.SIGTERM)",
    "signal_to_a_thread": "import signal, threading\nsignal.pthread_kill(threading.get_ident(), signal.SIGUSR1)",
    "alarm": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\ntime.sleep(5)\nprint('on')",
    "alarm_handled": "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: print('rang'))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.1)\ntime.sleep(0.3)\nprint('on')",
    "alarm_while_computing": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\nwhile True: pass",
    "handler_taken_back": "import os, signal\nprint(signal.signal(signal.SIGTERM, print))\n"
    "print(signal.signal(signal.SIGTERM, signal.SIG_DFL) is print, flush=True)\nos.kill(os.getpid(), signal.SIGTERM)",
    "default_for_interrupt": "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.kill(os.getpid(), signal.SIGINT)",
    "ignored": "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "os.kill(os.getpid(), signal.SIGTERM)\nprint('on')",
    "default_seen": "import signal\nprint([signal.getsignal(n) for n in (1, 2, 11, 13, 14, 15)])",
    "wrong_handler": "import signal\ntry: signal.signal(signal.SIGTERM, 'x')\nexcept TypeError as e: print(e)",
    "abort": "import os\nos.abort()",
    "null_pointer": "import ctypes\nctypes.string_at(0)",
    "exit_behind_the_back": "import os\nos._exit(137)",
}  # fmt: skip


@pytest.mark.parametrize("name", AS_PLAIN)
def test_as_a_plain_interpreter(world: World, name: str) -> None:
    code = AS_PLAIN[name]
    result = run(world.server, code)
    assert ending(result) == plain_python(code), result
    assert "runner.py" not in result.output and "zygote.py" not in result.output
    assert result.outcome.value in ("ok", "error", "syntax_error", "crash")
    assert (result.outcome.value == "ok") == (result.exit_code == 0)
    assert (result.outcome.value == "crash") == (result.signal is not None)


@pytest.mark.parametrize("value", ["2**64", "-(2**64)", "-1", "256", "True", "A()", "[1]"])
def test_the_status_of_an_odd_exit(world: World, value: str) -> None:
    """What is said about it differs from one Python to the next."""
    code = f"import sys\nclass A:\n    def __str__(self): raise ValueError\nsys.exit({value})"
    result = run(world.server, code)
    assert result.exit_code == plain_python(code).exit_code and "runner.py" not in result.output


def test_leaving_early_is_ok(strong_server: Server) -> None:
    result = run(strong_server, "print('x'); exit()", echo=True)
    assert (result.outcome.value, result.exit_code, result.output) == ("ok", 0, "x\n")


@pytest.mark.parametrize("stdin", ["a\nbé\n", ""])
def test_standard_input_has_a_path(world: World, stdin: str) -> None:
    code = (
        "print(repr(open('/dev/stdin').read()), repr(input()) if input else '')"
        if stdin
        else "open('/dev/stdin').read()"
    )
    result = run(world.server, code, stdin=stdin)
    if stdin:
        assert result.output == "'a\\nbé\\n' 'a'\n"
    assert result.ok and run(world.server, "open('/dev/stdin').read()", echo=True).output == "''\n"


def test_the_path_of_standard_input_costs_no_scratch(strong_server: Server) -> None:
    code = "import os\nopen('f', 'wb').write(bytes(16 * 2**20 - 4096)), os.listdir()"
    assert run(strong_server, code, echo=True, stdin="x" * 2**20).output == f"({16 * 2**20 - 4096}, ['f'])\n"


@pytest.mark.parametrize("module", ["zygote", "runner", "session", "kernel", "signals", "semaphores"])
def test_nothing_of_ours_can_be_imported(world: World, module: str) -> None:
    result = run(world.server, f"import {module}")
    assert f"ModuleNotFoundError: No module named '{module}'" in result.output
    assert run(world.server, "import sys\nprint([p for p in sys.path if 'inside' in p])").output == "[]\n"


def test_what_a_program_writes_it_can_import(strong_server: Server) -> None:
    code = "open('kernel.py', 'w').write('x = 3')\nimport kernel\nkernel.x"
    assert run(strong_server, code, echo=True).output == "3\n"


def test_an_interrupt_ends_it_as_a_shell_sees_it(world: World) -> None:
    for code in ("raise KeyboardInterrupt", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)"):
        result, plain = run(world.server, code), plain_python(code)
        assert (result.outcome.value, result.exit_code, plain.signal) == ("error", 130, 2)
        assert result.stderr == plain.stderr and result.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("stderr", ["None", "object()", "__import__('io').StringIO()"])
def test_a_traceback_is_shown_wherever_standard_error_went(world: World, stderr: str) -> None:
    code = f"import sys\nsys.stderr = {stderr}\n1 / 0"
    result = run(world.server, code)
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert result.exit_code == plain_python(code).exit_code
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n") and "runner.py" not in result.stderr


PROCESSES = {
    "fork": "import os\nos.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['ls'])",
    "process": "import multiprocessing as m\nm.Process(target=print).start()",
    "pool": "import multiprocessing as m\nm.Pool(2)",
    "executor": "from concurrent.futures import ProcessPoolExecutor as P\nwith P(2) as p: p.submit(abs, 1)",
    "manager": "import multiprocessing as m\nm.Manager()",
    "shared_memory": "from multiprocessing import shared_memory as s\ns.SharedMemory(create=True, size=100)",
}


@pytest.mark.parametrize("name", PROCESSES)
def test_what_needs_a_process_raises_one_documented_error(world: World, name: str) -> None:
    result = run(world.server, PROCESSES[name])
    assert result.outcome.value == "error"
    assert result.stderr.splitlines()[-1].startswith("PermissionError: [Errno 1"), result.stderr


@pytest.mark.parametrize("make", ["Value('i', 3).value", "Array('i', [1, 3])[1]", "Barrier(1).wait() + 3"])
def test_shared_values_work_in_strong_and_raise_the_same_error_in_standard(world: World, make: str) -> None:
    result = run(world.server, f"import multiprocessing as m\nprint(m.{make})")
    if world.server.isolation == "strong":
        assert result.output == "3\n"
    else:
        assert result.stderr.splitlines()[-1].startswith("PermissionError: [Errno 13] Permission denied")


CROWD = """
import sys, threading
threading.stack_size(65536)
for _ in range(1500):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("world", ["user-standard"], indirect=True)
def test_threads_start_however_many_tasks_its_user_gets_meanwhile(world: World) -> None:
    """As Ray, torch and vLLM have them, when they start after the server."""
    code = "import threading\nt = threading.Thread(target=print, args=(3,))\nt.start()"
    assert run(world.server, code).output == "3\n"
    identity = {"user": USER_UID, "group": USER_UID, "extra_groups": []} if os.geteuid() == 0 else {}
    runtime = ensure_runtime(packages=("numpy",))  # an interpreter that every user can run
    with subprocess.Popen(
        [str(runtime.python), "-I", "-S", "-c", CROWD],
        env={"LD_LIBRARY_PATH": f"{runtime.root}/lib"},
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **identity,
    ) as crowd:
        assert crowd.stdout.readline() == "there\n"
        assert run(world.server, code).output == "3\n"
        crowd.stdin.close()
    bound = run(world.server, "import resource\nprint(*resource.getrlimit(resource.RLIMIT_NPROC))").output.split()
    assert bound[0] == bound[1] and 0 < int(bound[0]) < 100_000, "there is a limit"


def test_a_signal_nobody_can_handle_is_no_excuse(world: World) -> None:
    """SIGKILL must stay the mark of somebody else: a program that fakes it is charged like any other."""
    for code in ("import os\nos._exit(137)", "import os\nos._exit(147)", "import os, signal\nos.kill(os.getpid(), 9)"):
        assert run(world.server, code).outcome.value == "error"


# --- the echo --------------------------------------------------------------------------------------------------------


def rows_of_the_readme() -> list[tuple[str, str]]:
    table = README.partition("| program | shown |\n|---|---|\n")[2].partition("\n\n")[0]
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return [(program, shown.replace("\\n", "\n")) for program, shown in cells]


def test_the_readme_says_what_is_shown() -> None:
    assert len(rows_of_the_readme()) >= 12


@pytest.mark.parametrize(("program", "shown"), rows_of_the_readme())
def test_what_is_shown(world: World, program: str, shown: str) -> None:
    result = run(world.server, program, echo=True)
    assert (result.output, result.outcome.value) == (shown, "ok")


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("import sys\nsys.stdout.write('42')", "42\n2\n"),
        ("import sys\nsys.stdout.write('42\\n')", "42\n3\n"),
        ("import sys\nsys.stdout.buffer.write(b'42')", "42\n2\n"),
        ("import os\nos.write(1, b'42')", "42\n2\n"),
        ("import ctypes\nlibc = ctypes.CDLL(None)\nlibc.write(1, b'42', 2)", "42\n2\n"),
        ("import sys\nsys.stderr.write('42')", "2\n42"),
        ("print('a', end='')\nNone", "a"),
        ("print('é', end='')\n'é'", "é\n'é'\n"),
        ("print('x' * 100_000, end='')\n5", "\n5\n"),
        ("import sys\nclass T:\n    def __init__(self, f): self.f = f\n    def write(self, s): return self.f.write(s)\n"
         "    def flush(self): self.f.flush()\nsys.stdout = T(sys.stdout)\nprint('a', end='')\n5", "a\n5\n"),
        ("import io, sys\nsys.stdout.write('a')\nsys.stdout = io.StringIO()\n5", "a"),
        ("import sys\nsys.displayhook = lambda v: print('shown', v)\n5", "shown 5\n"),
        ("import sys\nsys.stdout.close()\n5", ""),
        ("import sys\nsys.displayhook(1)\nsys.displayhook(2)\nprint('a', end='')\n3", "1\n2\na\n3\n"),
        ("from code import InteractiveInterpreter as I\ni = I()\nfor s in ('1', 'print(2)', '3'): _ = i.runsource(s)",
         "1\n2\n3\n"),
        ("import os\nprint('a')\nos.dup2(2, 1)\n5", "a\n5\n"),
        ("import os\nr, w = os.pipe()\nout = os.dup(1)\nos.dup2(w, 1)\nimport sys\nsys.displayhook(5)\n"
         "os.dup2(out, 1)\nprint(os.read(r, 99))", "b'5\\n'\n"),
        ("\ufeff5", "5\n"),
    ],
)  # fmt: skip
def test_an_echo_has_a_line_of_its_own(strong_server: Server, code: str, output: str) -> None:
    result = run(strong_server, code, echo=True)
    assert result.ok and result.output.endswith(output) and len(result.output) < 70_000, result
    if len(output) < 20 and "100_000" not in code:
        assert result.output == output


def test_turns_of_a_session_echo_alike(strong_server: Server) -> None:
    async def go() -> list[str]:
        async with ToolClient.from_url(strong_server.url) as client:
            session = await client.open_session()
            codes = "print('a', end='')\n5", "import sys\nsys.stdout.write('42')", "x = 3; exit()", "x", "__file__"
            outputs = [(await client.run(code, session_id=session)).output for code in codes]
            await client.close_session(session)
            return outputs

    assert asyncio.run(go()) == ["a\n5\n", "42\n2\n", "", "3\n", "'<code>'\n"]


def test_signals_in_a_session_end_the_turn(strong_server: Server) -> None:
    async def go() -> list[ExecutionResult]:
        async with ToolClient.from_url(strong_server.url) as client:
            session = await client.open_session()
            codes = (
                "x = 1",
                "x = 2\nimport os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
                "import os; os._exit(143)",
                "x",
            )
            results = [await client.run(code, session_id=session) for code in codes]
            await client.close_session(session)
            return results

    _, killed, left, after = asyncio.run(go())
    assert (killed.outcome.value, killed.signal) == ("crash", 15)
    assert (left.outcome.value, left.exit_code) == ("error", 143) and after.output == "1\n"


@pytest.mark.parametrize("code", ["x = (1,\ny = 2", "def f():\nprint(1)", "return 5", "x = $"])
@pytest.mark.parametrize("echo", [True, False])
def test_what_does_not_compile_looks_as_it_does_in_python(world: World, code: str, echo: bool) -> None:
    result, plain = run(world.server, code, echo=echo), plain_python(code)
    assert result.outcome.value == "syntax_error"
    # From a file the interpreter marks a word's beginning only.
    assert re.sub(r"\^+", "^", result.output) == re.sub(r"\^+", "^", plain.stderr)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("\ufeffx x", '  File "<code>", line 1\n    x x\n      ^\nSyntaxError: invalid syntax\n'),
        ("\ufeff\ufeffx", "invalid non-printable character U+FEFF"),  # one is a mark, two are a mistake
        ("x = 1\x00", "Error: source code string cannot contain null bytes\n"),
        ("print('\ud800')", "SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xed"),
    ],
)
@pytest.mark.parametrize("echo", [True, False])
def test_what_is_no_text_does_not_compile(strong_server: Server, code: str, output: str, echo: bool) -> None:
    result = run(strong_server, code, echo=echo)
    assert result.outcome.value == "syntax_error" and output in result.output and "Traceback" not in result.output


# Python 3.12 has a limit of its own in the compiler, which a file meets as well.
needs_depth = pytest.mark.skipif(sys.version_info >= (3, 12), reason="no plain interpreter of this version compiles it")


@pytest.mark.parametrize("terms", [100, 1200, *(pytest.param(n, marks=needs_depth) for n in (3000, 9000, 20_000))])
def test_deep_source_runs_with_an_echo_as_without(strong_server: Server, terms: int) -> None:
    code = f"x = 1\ny = {' + '.join(['x'] * terms)}\nprint(y)"
    assert [run(strong_server, code, echo=echo).output for echo in (True, False)] == [f"{terms}\n"] * 2


@needs_depth
@pytest.mark.parametrize("code", ["x = 1\nprint({})", "x = 1\n{}"])
@pytest.mark.parametrize("term", ["x", "1"])
@pytest.mark.parametrize("terms", [3000, 9000])
def test_the_value_of_a_long_sum_is_shown(strong_server: Server, code: str, term: str, terms: int) -> None:
    assert run(strong_server, code.format(" + ".join([term] * terms)), echo=True).output == f"{terms}\n"


@pytest.mark.parametrize("replacement", ["None", "W()", "object()"])
def test_no_frame_of_ours_with_an_echo_either(world: World, replacement: str) -> None:
    code = f"{NO_FLUSH}sys.stdout = {replacement}\n5"
    result = run(world.server, code, echo=True)
    assert (
        "runner.py" not in result.output and "zygote.py" not in result.output and "lost sys.stdout" not in result.output
    )
    assert result.ok == (replacement == "None"), "without flush it is an error, as in plain Python"


def test_a_repr_that_fails_is_the_programs_error(strong_server: Server) -> None:
    result = run(strong_server, "class A:\n    def __repr__(self): raise KeyError('r')\nA()", echo=True)
    lines = result.output.splitlines()
    assert result.outcome.value == "error" and '  File "<code>", line 3, in <module>' in lines
    assert '  File "<code>", line 2, in __repr__' in lines and "runner.py" not in result.output
