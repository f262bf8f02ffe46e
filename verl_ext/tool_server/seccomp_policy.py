"""The system calls executed code may make: an allow-list, compiled to BPF once by the server with libseccomp.

What is not listed fails with EPERM, so that Python turns it into an ordinary exception; calls in another ABI (32-bit,
x32) kill the process. Left out on purpose: exec, fork and every namespace flag, sockets other than an unnamed
pair, memfd, ptrace and the other windows into a foreign process, mount, keys, bpf, perf, io_uring, and every change by
path that landlock does not cover (chmod, chown, utime, xattr; truncate on older kernels).
"""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any

# The child's pid is only known after the fork: the filter is compiled with this value in its place (a pid is never that
# large, and BPF keeps it as one little-endian word, which the child replaces).
PID_MARKER = 0x5EC0DE51

_ALWAYS = """
read write readv writev pread64 pwrite64 preadv pwritev close close_range lseek fsync fdatasync
stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getcwd getdents64
open openat creat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat
getdents ftruncate fallocate umask chdir fchdir flock fadvise64 sendfile
mmap mprotect munmap mremap madvise brk msync mincore
pipe pipe2 dup dup2 dup3 select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime
futex set_robust_list rseq membarrier sched_yield sched_getaffinity sched_getparam sched_getscheduler
sched_get_priority_max sched_get_priority_min getpriority set_tid_address arch_prctl getcpu
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause restart_syscall
nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getitimer setitimer alarm
timer_settime timer_gettime timer_delete timer_getoverrun
getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid capget
uname sysinfo getrandom getrlimit setrlimit getrusage wait4 waitid exit exit_group
getsockopt getsockname getpeername recvfrom shutdown
""".split()
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)  # DUPFD..SETFL, record locks, DUPFD_CLOEXEC, GETPIPE_SZ
_IOCTL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_PRCTL_OPTIONS = (3, 15, 16, 21, 39)  # GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP, GET_NO_NEW_PRIVS
_SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_FLAGS = 1, 5, 0o2000000 | 0o4000  # SOCK_CLOEXEC | SOCK_NONBLOCK
_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000 | 0x00000080  # every CLONE_NEW*
_SIGKILL, _SIGSTOP = 9, 19


class SeccompUnavailable(RuntimeError):
    """libseccomp or its Python binding is missing; the message says what to install."""


def compile_policy(sessions: bool = False) -> bytes:
    """Return the filter as classic BPF.

    ``sessions``: for processes that keep state by forking. Permits plain fork, signals, and passing descriptors, which
    is safe only inside pid, network and mount namespaces of their own (the strong tier).

    Raises:
        SeccompUnavailable: pyseccomp or libseccomp is not installed.
    """
    try:
        import pyseccomp as s
    except (ImportError, RuntimeError, OSError) as error:
        raise SeccompUnavailable(
            f"seccomp filter cannot be built ({error}): pip install pyseccomp, and the system library libseccomp2"
        ) from error
    policy = s.SyscallFilter(s.ERRNO(errno.EPERM))
    policy.set_attr(s.Attr.ACT_BADARCH, s.KILL_PROCESS)
    # A binary tree instead of a chain: on installation the kernel walks the filter once for every system call number,
    # which with a chain costs each execution half a millisecond.
    policy.set_attr(s.Attr.CTL_OPTIMIZE, 2)
    for name in _ALWAYS:
        _add(policy, s.ALLOW, name)
    # glibc falls back to clone() on ENOSYS; clone3's flags lie behind a pointer that a filter cannot read.
    _add(policy, s.ERRNO(errno.ENOSYS), "clone3")
    policy.add_rule(s.ALLOW, "clone", s.Arg(0, s.MASKED_EQ, _CLONE_NAMESPACES | _CLONE_THREAD, _CLONE_THREAD))
    if sessions:
        policy.add_rule(s.ALLOW, "clone", s.Arg(0, s.MASKED_EQ, _CLONE_NAMESPACES, 0))
        for name in ("fork", "vfork", "kill", "tgkill", "recvmsg", "sendmsg"):
            _add(policy, s.ALLOW, name)
    for command in _FCNTL_COMMANDS:
        policy.add_rule(s.ALLOW, "fcntl", s.Arg(1, s.EQ, command))
    for request in _IOCTL_REQUESTS:
        policy.add_rule(s.ALLOW, "ioctl", s.Arg(1, s.EQ, request))
    for option in _PRCTL_OPTIONS:
        policy.add_rule(s.ALLOW, "prctl", s.Arg(0, s.EQ, option))
    policy.add_rule(s.ALLOW, "prlimit64", s.Arg(0, s.EQ, 0))
    # asyncio's self-pipe is a stream socketpair. A destination address could name someone else's abstract socket.
    policy.add_rule(
        s.ALLOW,
        "socketpair",
        s.Arg(0, s.EQ, 1),
        s.Arg(1, s.MASKED_EQ, 0xFFFFFFFF & ~_SOCK_FLAGS, _SOCK_STREAM),
    )
    if sessions:  # the supervisor's line to its holders
        policy.add_rule(
            s.ALLOW,
            "socketpair",
            s.Arg(0, s.EQ, 1),
            s.Arg(1, s.MASKED_EQ, 0xFFFFFFFF & ~_SOCK_FLAGS, _SOCK_SEQPACKET),
        )
    policy.add_rule(s.ALLOW, "sendto", s.Arg(4, s.EQ, 0))
    # Signals to itself only. Not SIGKILL or SIGSTOP: a SIGKILL must always mean somebody else, so that it can be
    # attributed (deadline, kernel, operator) without asking the program.
    for name, signal_argument in () if sessions else (("kill", 1), ("tgkill", 2)):
        own = s.Arg(0, s.EQ, PID_MARKER)
        policy.add_rule(s.ALLOW, name, own, s.Arg(signal_argument, s.LT, _SIGKILL))
        for number in range(_SIGKILL + 1, _SIGSTOP):
            policy.add_rule(s.ALLOW, name, own, s.Arg(signal_argument, s.EQ, number))
        policy.add_rule(s.ALLOW, name, own, s.Arg(signal_argument, s.GT, _SIGSTOP))
    with tempfile.TemporaryFile() as out:
        policy.export_bpf(out)
        os.lseek(out.fileno(), 0, os.SEEK_SET)
        return out.read()


def _add(policy: Any, action: object, name: str) -> None:
    """Add a rule; a call this architecture does not have (open, stat on aarch64) needs none."""
    import pyseccomp as s

    if s.resolve_syscall(s.system_arch(), name) < 0:
        return
    policy.add_rule(action, name)
