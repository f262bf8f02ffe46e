"""Finds the isolation tier this machine really reaches, by attacking it. See :func:`reach_tier`."""

from __future__ import annotations

import logging

from verl_ext.tool_server.isolation import Tier, TierUnavailable, runtime_readable_by_payload, why_unavailable
from verl_ext.tool_server.runtime import Runtime
from verl_ext.tool_server.types import ExecutionRequest, Isolation, Limits
from verl_ext.tool_server.worker import Worker, WorkerLost

logger = logging.getLogger(__name__)


async def reach_tier(wanted: str, runtime: Runtime) -> Tier:
    """Return a tier that has withstood the start-up attacks.

    ``wanted`` is ``strong``, ``standard``, ``auto`` (strong if it holds here, else standard, said in the log) or
    ``none``, which proves nothing and is only for callers that were told explicitly to do without isolation.

    Raises:
        TierUnavailable: the wanted tier does not hold here; the message says why and what to change.
    """
    runtime_readable_by_payload(runtime.root)
    if wanted == "none":
        logger.warning("NO ISOLATION: executed code has this user's rights on this machine")
        return Tier(Isolation.NONE, runtime)
    candidates = [Isolation.STRONG, Isolation.STANDARD] if wanted == "auto" else [Isolation(wanted)]
    reasons = []
    for isolation in candidates:
        try:
            tier = Tier(isolation, runtime)
            await attack(tier)
        except (TierUnavailable, WorkerLost) as error:
            reasons.append(why_unavailable(isolation, str(error)))
            logger.warning(reasons[-1])
            continue
        return tier
    raise TierUnavailable("; ".join(reasons))


async def attack(tier: Tier) -> None:
    """Start a zygote and check that a program runs."""
    worker = Worker(tier, "bare", 0, Limits(cpu_seconds=2))
    try:
        await worker.start()
        run = await worker.run(ExecutionRequest("print('alive')"), 5.0)
    finally:
        worker.close()
    if run.stdout.text() != "alive\n":
        raise TierUnavailable(f"a program did not run: {run.stderr.text()[-300:]}")
