"""State kept between turns, by fork: the state lives in a *holder* process; a turn runs in a fork of it.

A turn that ends well hands its state to a fork of itself, the next holder; a turn that fails is simply gone, and the
old holder is still as it was. The *supervisor*, first process of the session's own pid namespace, never runs user code:
it keeps the deadlines and, after every turn, kills whatever is not the holder.

Holders have run user code, so nothing they say is believed beyond their own session: a session can lie about its own
outcomes and lose its own state, no more. Threads do not survive a turn. Files in the scratch directory do, also those
of a failed turn.
"""

import json
import os
import resource
import select
import signal
import socket
import time
import types

import runner

MOST_PIDS = 1 << 22  # Linux hands out no higher ones
LOST_SECONDS = 1.0  # a holder that has not reported this long after its turn was killed makes the session lost


def supervise(server: socket.socket) -> None:
    """The supervisor's loop. Returns when the server closes its end; raises when the session is lost."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    holder = os.fork()
    if holder == 0:
        server.close()
        mine.close()
        try:
            hold(theirs)
        finally:
            os._exit(70)
    theirs.close()
    server.send(json.dumps({"ready": True}).encode())
    top = holder
    while True:
        message, fds, _, _ = socket.recv_fds(server, 4096, 8)
        if not message:
            return
        order = json.loads(message)
        if "kill" in order:
            continue  # the turn it meant had already ended
        socket.send_fds(mine, [message], fds)
        for fd in fds:
            os.close(fd)
        answer, successor, turn = await_turn(server, mine, order["wall"])
        if answer["status"] == 0:
            if successor:
                holder = successor
            else:
                answer["status"] = (
                    1 << 8
                )  # it left by os._exit: nobody holds its state, so it cannot pass for a success
        top = sweep(holder, max(top, turn, successor), thorough=answer["status"] != 0)
        server.send(json.dumps(answer).encode())


def await_turn(server: socket.socket, holders: socket.socket, wall: float) -> tuple[dict, int, int]:
    """Wait for the running turn, kill it when told to or too late. Returns the account, its successor and its pid."""
    started = time.monotonic()
    deadline = started + wall
    killed, turn, successor = "", 0, 0
    poller = select.poll()
    poller.register(server, select.POLLIN)
    poller.register(holders, select.POLLIN)
    while True:
        events = dict(poller.poll(max(0.0, (deadline - time.monotonic()) * 1000)))
        if holders.fileno() in events:
            report = json.loads(holders.recv(4096))
            turn, successor = report.get("turn", turn), report.get("successor", successor)
            if "status" in report:
                report |= {"killed": killed, "seconds": time.monotonic() - started}
                return report, successor, turn
        elif killed and time.monotonic() >= deadline:
            raise TimeoutError("the holder does not answer")
        elif not killed and (server.fileno() in events or time.monotonic() >= deadline):
            # A closed server end reads as an empty message: then the session is over anyway.
            killed = json.loads(server.recv(4096))["kill"] if server.fileno() in events else "wall"
            poller.unregister(server)
            deadline = time.monotonic() + LOST_SECONDS
            if turn > 1:
                os.kill(turn, signal.SIGKILL)


def sweep(holder: int, top: int, *, thorough: bool) -> int:
    """Kill and reap every process of this pid namespace but the supervisor and ``holder``. Returns the highest pid.

    There is no /proc here; pids are small and handed out in order, so trying them all is cheap and complete.

    ``thorough``: again, until no pid was handed out since: a turn that failed may have left processes that fork. One
    that succeeded has left none, or its successor would have had no task. Raises when the pids have no end.
    """
    before = 0
    while True:
        probe = highest_pid()
        if probe and probe == before + 1:
            return probe
        before, top = probe, max(top, probe) if probe else 2 * top  # without a probe nobody knows how far to look
        if top > MOST_PIDS:
            raise RuntimeError("processes of the turn cannot be ended")
        for pid in range(2, top + 1):
            if pid != holder:
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError):
                    pass
        if probe and not thorough:
            return probe


def highest_pid() -> int:
    """That of a process which ends at once; 0 where the one spare task is taken, by whom nobody has announced."""
    try:
        probe = os.fork()
    except OSError:
        return 0
    if probe == 0:
        os._exit(0)
    os.waitpid(probe, 0)
    return probe


def hold(supervisor: socket.socket) -> None:
    """A holder's loop: keep the state, fork a turn for each order. A turn that succeeds goes on as the next holder."""
    main = runner.fresh_main()
    turns = 0
    while True:
        message, fds, _, _ = socket.recv_fds(supervisor, 4096, 8)
        if not message:
            os._exit(0)
        order = json.loads(message)
        turns += 1
        turn = os.fork()
        if turn:
            for fd in fds:
                os.close(fd)
            supervisor.send(json.dumps({"turn": turn}).encode())
            _, status, usage = os.wait4(turn, 0)
            cpu, rss = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
            supervisor.send(json.dumps({"status": status, "cpu": cpu, "rss": rss}).encode())
            turns -= 1 if status else 0
            continue
        code = run_turn(order, fds, main, turns)
        if code:
            os._exit(code)
        try:
            successor = os.fork()
        except OSError:
            os.write(2, b"[the turn left a process or thread behind; its state was not kept]\n")
            os._exit(1)
        if successor:
            supervisor.send(json.dumps({"successor": successor}).encode())
            os._exit(0)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)


def run_turn(order: dict, fds: list[int], main: types.ModuleType, number: int) -> int:
    """Run one program in ``main``. Returns its exit status."""
    program, stdout, stderr, status, *stdin = fds
    if stdin:
        os.dup2(stdin[0], 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    source = os.pread(program, order["code_bytes"], 0).decode("utf-8", "surrogatepass")
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    cpu = order["cpu"] if hard == resource.RLIM_INFINITY else min(order["cpu"], hard)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    for fd in (program, stdout, stderr, *stdin):
        os.close(fd)
    runner.open_streams()  # a turn may have closed or replaced the ones it had
    # Each turn has a file name of its own, so that a traceback through a function of an earlier turn shows its lines.
    mark = bytes.fromhex(order["line_mark"])
    code = runner.run(source, order["echo"], status, main, f"<code {number}>", last=False, line_mark=mark)
    os.close(status)
    return code
