"""The few Linux calls the sandbox needs that Python does not offer: namespaces, mounts, landlock, seccomp.

Every function raises ``OSError`` on failure; none of them retries, guesses or degrades.
"""

import ctypes
import os
import re
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 2, 4, 8, 4096

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2

# No libc wrappers everywhere; these numbers are the same on every architecture (they postdate unification).
_SYS_LANDLOCK_CREATE_RULESET, _SYS_LANDLOCK_ADD_RULE, _SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
_SYS_CLOSE_RANGE = 436
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
FS_READ_FILE, FS_READ_DIR = 1 << 2, 1 << 3
FS_READ = FS_READ_FILE | FS_READ_DIR
_FS_MAKE_CHAR, _FS_MAKE_SOCK, _FS_MAKE_FIFO, _FS_MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
_FS_EXECUTE, _FS_IOCTL_DEV = 1 << 0, 1 << 15
_FS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_BIND_AND_CONNECT_TCP = 0b11
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# ctypes looks a function up and makes an object of it at first use: here once, not in every child.
for _name in ("unshare", "setns", "mount", "prctl", "capset"):
    getattr(_libc, _name)


def _check(value: int, what: str) -> int:
    if value < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return value


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(fd, flags), "setns")


def mount_tmpfs(path: str, size_bytes: int) -> None:
    """Mount an empty tmpfs of at most ``size_bytes`` (and 4096 inodes) at ``path``."""
    options = f"size={size_bytes},nr_inodes=4096,mode=0700".encode()
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    _check(_libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options), f"mount tmpfs on {path}")


def mount_bind(source: str, target: str) -> None:
    """Have ``target``, an existing file, show ``source``."""
    _check(_libc.mount(source.encode(), target.encode(), None, MS_BIND, None), f"mount {source} on {target}")


def _prctl(option: int, arg2: object, arg3: object = 0) -> int:
    return _check(_libc.prctl(option, arg2, arg3, 0, 0), f"prctl({option})")


def die_with_parent(signal_number: int) -> None:
    """Receive ``signal_number`` when the thread that started this process ends (cleared by any later uid change)."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def set_not_dumpable() -> None:
    """No core dumps, and no ptrace or /proc/PID/mem access by other processes of the same user."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_no_new_privs() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_all_capabilities() -> None:
    """Empty the ambient, effective, permitted and inheritable sets. The bounding set is moot: exec is forbidden."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(_libc.capset(header, bytes(24)), "capset")


class SeccompFilter:
    """A classic-BPF filter (as libseccomp exports it), made before the fork and installed after it.

    ctypes makes a type of every buffer size it meets; doing that in each child would cost it half a millisecond.

    Args:
        program: the filter.
        pid_marker: bytes in it that stand for the pid of the process that installs it; empty: there are none.
    """

    def __init__(self, program: bytes, pid_marker: bytes = b"") -> None:
        self._code = ctypes.create_string_buffer(program, len(program))
        # struct sock_fprog { unsigned short len; struct sock_filter *filter; }; each instruction has 8 bytes.
        fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(self._code))
        self._fprog = ctypes.create_string_buffer(fprog, len(fprog))
        self._pid_at = [m.start() for m in re.finditer(re.escape(pid_marker), program)] if pid_marker else []

    def install(self) -> None:
        """On the calling thread, for good. Needs no_new_privs."""
        pid = os.getpid().to_bytes(4, "little")
        for offset in self._pid_at:
            ctypes.memmove(ctypes.addressof(self._code) + offset, pid, len(pid))
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._fprog)


def close_from(first: int) -> None:
    """Close every descriptor from ``first`` on, in one call (os.closerange makes one per number on older builds)."""
    _check(_libc.syscall(_SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0), "close_range")


def landlock_abi() -> int:
    """Landlock ABI version of the running kernel. Raises ``OSError`` where landlock is absent or switched off."""
    version = _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    return _check(version, "landlock")


def landlock_ruleset(read_paths: list[str], write_path: str | None) -> int:
    """Create a ruleset: read below ``read_paths``, read/write (no devices, no sockets) below ``write_path``.

    Everything else the kernel's landlock version can forbid is forbidden, execution and TCP included; from ABI 6 on
    also signals to, and abstract unix sockets of, processes outside. Returns a file descriptor.
    """
    abi = landlock_abi()
    handled_fs = _FS_BY_ABI[min(abi, 5)]
    fields = [handled_fs]
    if abi >= 4:
        fields.append(_NET_BIND_AND_CONNECT_TCP)
    if abi >= 6:
        fields.append(_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS)
    attr = struct.pack(f"{len(fields)}Q", *fields)
    fd = _check(
        _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attr, ctypes.c_size_t(len(attr)), 0), "landlock_create_ruleset"
    )
    for path in read_paths:
        rights = FS_READ if os.path.isdir(path) else FS_READ_FILE
        _landlock_allow(fd, path, rights)
    if write_path is not None:
        special = _FS_EXECUTE | _FS_IOCTL_DEV | _FS_MAKE_CHAR | _FS_MAKE_SOCK | _FS_MAKE_FIFO | _FS_MAKE_BLOCK
        _landlock_allow(fd, write_path, handled_fs & ~special)
    return fd


def landlock_allow_write_file(ruleset: int, path: str) -> None:
    """Also let the file at ``path`` (a device such as /dev/null) be opened for writing."""
    _landlock_allow(ruleset, path, FS_READ_FILE | 1 << 1)


def _landlock_allow(ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, parent)
        result = _libc.syscall(_SYS_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        _check(result, f"landlock_add_rule {path}")
    finally:
        os.close(parent)


def landlock_restrict_self(ruleset: int) -> None:
    """Apply ``ruleset`` to the calling thread and its descendants, for good. Needs no_new_privs."""
    _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
