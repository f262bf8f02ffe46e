"""Wait for the nodes of a Ray cluster: `python -m recipe.gtpo.run.cluster HOST:PORT NODES SECONDS`.

For scripts that start Ray by themselves (examples/slurm). Ends with status 1, and a line, when the time is over.
"""

from __future__ import annotations

import sys
import time

import ray


def living(address: str) -> int:
    """Nodes that the cluster's head counts as alive; 0 where there is no head yet."""
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        return sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError, ValueError):
        return 0
    finally:
        ray.shutdown()


def main(address: str, nodes: str, seconds: str) -> int:
    until = time.monotonic() + float(seconds)
    while (found := living(address)) < int(nodes):
        if time.monotonic() > until:
            print(f"ray: {found} of {nodes} nodes at {address} after {seconds} s", file=sys.stderr)
            return 1
        time.sleep(1)
    print(f"ray: {found} nodes at {address}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
