"""A program's own signals where it is the init of a pid namespace (the tier ``strong``).

To such a process the kernel gives no signal that it has no handler for: SIGTERM, SIGALRM or abort() would do nothing,
where any other process dies of them. So each of them gets a handler that ends the process with status 128 + number,
which the server reads as death by that signal. Handlers in Python would not do: they run between two bytecodes only,
and one for SIGSEGV would return to the instruction that failed.
"""

import _signal
import ctypes
import mmap
import os
import signal

# Those whose default action is death, without SIGKILL (nobody handles it) and the two that the C library keeps.
DEADLY = frozenset(
    getattr(signal, name)
    for name in (
        "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGUSR1", "SIGSEGV",
        "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGSTKFLT", "SIGXCPU", "SIGXFSZ", "SIGVTALRM", "SIGPROF", "SIGIO",
        "SIGPWR", "SIGSYS",
    )
    if hasattr(signal, name)  # Python 3.10 has no name for SIGSTKFLT
) | frozenset(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))  # fmt: skip
# exit_group(128 + first argument): a handler must be called like a C function and may call no Python.
_EXIT_BY_SIGNAL = {
    "x86_64": "81c780000000b8e70000000f05",  # add edi, 128; mov eax, 231; syscall
    "aarch64": "00000211c80b80d2010000d4",  # add w0, w0, 128; mov x8, 94; svc 0
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


def death_by_signal() -> "DeathBySignal | None":
    """The handler for this machine; None on an architecture that it was not written for."""
    code = _EXIT_BY_SIGNAL.get(os.uname().machine)
    return DeathBySignal(bytes.fromhex(code)) if code else None


class DeathBySignal:
    """The handler. Made once in a zygote; its children inherit it."""

    def __init__(self, code: bytes) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._page.write(code)
        self._view = ctypes.c_char.from_buffer(self._page)  # as long as it lives the page stays mapped
        self._address = ctypes.addressof(self._view)
        executable = mmap.PROT_READ | mmap.PROT_EXEC
        if _libc.mprotect(ctypes.c_void_p(self._address), ctypes.c_size_t(mmap.PAGESIZE), executable):
            error = ctypes.get_errno()
            raise OSError(error, f"mprotect: {os.strerror(error)}")

    def install(self) -> None:
        """For every deadly signal that has no handler. Python goes on to see the default one."""
        for number in DEADLY:
            if signal.getsignal(number) is signal.SIG_DFL:
                _libc.signal(number, self._address)

    @staticmethod
    def remove() -> None:
        """In a process whose children are not init: for them the kernel's own default works."""
        for number in DEADLY:
            if signal.getsignal(number) is signal.SIG_DFL:
                _libc.signal(number, None)

    def keep(self) -> None:
        """Make ``signal.signal(number, SIG_DFL)`` mean this handler too."""
        set_handler = _signal.signal

        def set_handler_or_ours(number: int, handler: object, /) -> object:
            before = set_handler(number, handler)  # type: ignore[arg-type]
            if type(handler) is int and handler == signal.SIG_DFL and number in DEADLY:
                _libc.signal(number, self._address)
            return before

        _signal.signal = set_handler_or_ours  # signal.signal looks it up at every call
