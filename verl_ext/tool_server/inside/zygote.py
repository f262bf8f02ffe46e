"""A zygote: an interpreter with its libraries loaded that forks one confined child per execution.

It never runs, parses or even reads user code, output or ids. For each execution it receives descriptors (program,
stdin, stdout, stderr, status) and limits, forks, kills by pidfd at the deadline, and answers with what the kernel said
about the child. The child reads the program only after the fork, so nothing of one execution is in the memory another
one inherits, and output of an execution can go nowhere but into that execution's own pipes.

Ends when the control socket closes, so it cannot outlive the server however that died.
"""

import gc
import json
import os
import resource
import select
import signal
import site
import socket
import sys
import time
import traceback

import kernel
import runner
import semaphores
import session
import signals

PRELOAD = {
    "bare": ("collections", "itertools", "functools", "math", "re", "json", "random", "datetime", "statistics",
             "fractions", "decimal", "heapq", "bisect", "string", "typing", "dataclasses", "copy", "operator"),
    "numpy": ("math", "random", "itertools", "collections", "numpy", "numpy.random", "numpy.linalg", "numpy.fft"),
    "sci": ("numpy", "numpy.random", "numpy.linalg", "sympy", "scipy", "scipy.optimize", "scipy.integrate",
            "scipy.stats", "scipy.linalg", "scipy.special"),
}  # fmt: skip
HARD_MEMORY_MARGIN = 16 << 20  # between the soft and the hard RLIMIT_AS: room to print the traceback
FIRST_FREE_FD = 4  # in a child: 0-2 are the standard streams, 3 the status pipe
OWN_MODULES = ("zygote", "runner", "session", "kernel", "signals", "semaphores")


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.setblocking(True)
    config = json.loads(control.recv(1 << 16))
    if sys.version != config["python"]:
        raise SystemExit(
            f"this interpreter is {sys.version}, the server's {config['python']}: check its shared libraries"
        )
    kernel.die_with_parent(signal.SIGKILL)
    warm(config["kind"])
    zygote = Zygote(control, config)
    like_an_interpreter()
    runner.keep_lines_whole_beside_threads()
    streams_of_before = runner.open_streams_for_children()  # noqa: F841  kept, not used
    gc.collect()
    gc.freeze()  # no collection ever touches, and so copies, the pages shared with the children
    control.send(json.dumps({"ready": True}).encode())
    zygote.serve()


def warm(kind: str) -> None:
    """Import the libraries of ``kind`` and use them once, so that lazily built tables exist before the first fork."""
    for name in PRELOAD[kind]:
        try:
            __import__(name)
        except ModuleNotFoundError as missing:
            # Only the runtime's own package list decides what exists; a broken package must still fail loudly.
            if missing.name != name.partition(".")[0]:
                raise
    if kind == "sci" and "sympy" in sys.modules:
        sympy = sys.modules["sympy"]
        x = sympy.Symbol("x")
        sympy.solve(x**2 - 3 * x + 2, x)
        sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
        sympy.integrate(x * sympy.exp(x), x)
        sympy.factorint(360)
        str(sympy.Rational(1, 3) + sympy.sqrt(2))
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        numpy.linalg.solve(numpy.eye(2), numpy.ones(2))
        repr(numpy.arange(3.0))


def like_an_interpreter() -> None:
    """What start-up adds for a program (exit, quit, help, ...), and nothing of ours left for it to import."""
    for add in (site.setquit, site.setcopyright, site.sethelper):
        add()
    sys.path.remove(os.path.dirname(__file__))
    for name in OWN_MODULES:
        del sys.modules[name]


class Zygote:
    def __init__(self, control: socket.socket, config: dict) -> None:
        self.control = control
        self.pid = os.getpid()
        self.namespaces: bool = config["namespaces"]
        self.seccomp = self.seccomp_sessions = None
        if config["seccomp"]:
            marker = bytes.fromhex(config["seccomp_pid_marker"])
            self.seccomp = kernel.SeccompFilter(bytes.fromhex(config["seccomp"]), marker)
            self.seccomp_sessions = kernel.SeccompFilter(bytes.fromhex(config["seccomp_sessions"]))
        self.scratch: str | None = config["scratch"]
        self.ruleset: int | None = None
        if config["landlock"]:
            # The rule goes on the directory above: each child mounts its scratch later, and that hides a rule on it.
            writable = os.path.dirname(self.scratch) if self.scratch else None
            self.ruleset = kernel.landlock_ruleset(config["read_paths"], writable)
            kernel.landlock_allow_write_file(self.ruleset, "/dev/null")
        self.own_pidfd = os.pidfd_open(os.getpid())
        self.death = signals.death_by_signal() if self.namespaces else None
        if self.death is not None:
            self.death.install()

    def serve(self) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(self.control, 4096, 8)
            if not message:
                return
            order = json.loads(message)
            if "kill" in order:
                continue  # its child was already gone when the order came
            try:
                answer = self.execute(order, fds)
            except OSError as error:
                answer = {"failed": str(error)}
            finally:
                for fd in fds:
                    os.close(fd)
            self.control.send(json.dumps(answer).encode())

    def execute(self, order: dict, fds: list[int]) -> dict:
        """Fork, wait, kill at the deadline. Returns the kernel's account of the child."""
        started = time.monotonic()
        pid = self.fork()
        if pid == 0:
            self.become_session(order, fds) if "session" in order else self.become_child(order, fds)
        pidfd = os.pidfd_open(pid)
        try:
            killed = self.wait(pidfd, started + order["wall"])
            _, status, usage = os.wait4(pid, 0)
        finally:
            os.close(pidfd)
        if not self.namespaces and self.seccomp is None:
            self.kill_group(pid)
        return {
            "status": status,
            "killed": killed,
            "seconds": time.monotonic() - started,
            "cpu": usage.ru_utime + usage.ru_stime,
            "rss": usage.ru_maxrss * 1024,
        }

    def fork(self) -> int:
        """Fork; with namespaces, into a new pid namespace whose init the child becomes, so its death ends all in it."""
        if not self.namespaces:
            return os.fork()
        # unshare() only decides where the next child goes. Pointing it back afterwards is what makes it repeatable.
        kernel.unshare(kernel.CLONE_NEWPID)
        try:
            pid = os.fork()
        except BaseException:
            kernel.setns(self.own_pidfd, kernel.CLONE_NEWPID)
            raise
        if pid:
            kernel.setns(self.own_pidfd, kernel.CLONE_NEWPID)
        return pid

    def wait(self, pidfd: int, deadline: float) -> str:
        """Wait for the child to die, killing it on the server's word or at ``deadline``. Returns who killed it."""
        killed = ""
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(self.control, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            events = dict(poller.poll(max(0, left * 1000) if not killed else None))
            if pidfd in events:
                return killed
            if self.control.fileno() in events:
                message = self.control.recv(4096)
                if not message:  # the server is gone; take the child along
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    os._exit(0)
                killed = json.loads(message)["kill"]
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            elif not killed and time.monotonic() >= deadline:
                killed = "wall"
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    @staticmethod
    def kill_group(pid: int) -> None:
        """Without isolation a program can leave processes behind; take those of its process group (others escape)."""
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def become_child(self, order: dict, fds: list[int]) -> None:
        """In the child: confine this process for good, then run the program. Does not return."""
        code = 70
        try:
            program, stdout, stderr, status, *stdin = fds
            # Opened anew: the flags of a shared open file would outlive the execution that sets them.
            os.dup2(stdin[0] if stdin else os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            source = os.pread(program, order["code_bytes"], 0).decode("utf-8", "surrogatepass")
            self.confine(order, *stdin)
            # Last, because the ruleset and the program are among what gets closed.
            os.dup2(status, 3)
            kernel.close_from(FIRST_FREE_FD)
            if self.seccomp is not None:
                self.seccomp.install()
            reseed()
            if self.seccomp is not None:
                semaphores.install()
            if self.death is not None:
                self.death.keep()
            code = runner.run(source, order["echo"], 3, line_mark=bytes.fromhex(order["line_mark"]))
        except BaseException:
            # Only reached before the program runs: without a status byte this text goes to the operator.
            traceback.print_exc(file=open(2, "w", closefd=False))
        finally:
            os._exit(code)

    def become_session(self, order: dict, fds: list[int]) -> None:
        """In the child: confine this process like any other, but let it fork, and serve turns. Does not return."""
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            self.confine(order)
            if self.death is not None:
                self.death.remove()
            os.dup2(fds[0], FIRST_FREE_FD - 1)
            kernel.close_from(FIRST_FREE_FD)
            if self.seccomp_sessions is not None:
                self.seccomp_sessions.install()
            reseed()
            session.supervise(socket.socket(fileno=FIRST_FREE_FD - 1))
        finally:
            os._exit(0)

    def confine(self, order: dict, stdin: int | None = None) -> None:
        """Everything but seccomp, which would forbid the rest of it. ``stdin``: what /dev/stdin is to show."""
        if self.scratch is not None:
            kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
            size = os.fstat(stdin).st_size if stdin is not None else 0
            kernel.mount_tmpfs(self.scratch, order["scratch"] + size)
            if stdin is not None and size:
                show_stdin(stdin, size, self.scratch)
        else:
            os.setsid()
            kernel.die_with_parent(signal.SIGKILL)
            if os.getppid() != self.pid:
                os._exit(70)  # the zygote died before the line above
        os.chdir(self.scratch or "/")
        set_limits(order)
        kernel.drop_all_capabilities()
        kernel.set_not_dumpable()
        kernel.set_no_new_privs()
        if self.ruleset is not None:
            kernel.landlock_restrict_self(self.ruleset)


def show_stdin(stdin: int, size: int, scratch: str) -> None:
    """Have /dev/stdin, a link to a file beside the scratch directory, hold what is on standard input.

    Without /proc it cannot be a link to the descriptor. The file has no name in the scratch directory, which is empty.
    """
    name = f"{scratch}/stdin"
    with open(name, "wb") as copy:
        copy.write(os.pread(stdin, size, 0))
    kernel.mount_bind(name, f"{os.path.dirname(scratch)}/stdin")
    os.unlink(name)


def set_limits(order: dict) -> None:
    """rlimits, soft equal to hard except for memory. The kernel sends SIGKILL at the hard CPU limit."""
    for name, value in (
        # A session's supervisor lives long; it limits each turn instead.
        (resource.RLIMIT_CPU, resource.RLIM_INFINITY if "session" in order else order["cpu"]),
        (resource.RLIMIT_NOFILE, order["files"]),
        (resource.RLIMIT_NPROC, order["threads"]),
        (resource.RLIMIT_FSIZE, order["scratch"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(name, (at_most_hard(name, value),) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (order["memory"], order["memory"] + HARD_MEMORY_MARGIN))


def at_most_hard(name: int, value: int) -> int:
    """``value``, or the present hard limit where that is lower (RLIM_INFINITY is -1, so min() will not do)."""
    hard = resource.getrlimit(name)[1]
    if hard == resource.RLIM_INFINITY:
        return value
    return hard if value == resource.RLIM_INFINITY else min(value, hard)


def reseed() -> None:
    """Give each child its own numpy.random state, or all would draw the same numbers (`random` reseeds itself)."""
    if "numpy.random" in sys.modules:
        # An explicit seed is ten times cheaper than seed() without one.
        sys.modules["numpy.random"].seed(int.from_bytes(os.urandom(4), "little"))


if __name__ == "__main__":
    main()
