"""0 escapes: every attack, in both tiers, with the server as root and as an ordinary user, judged from outside."""

from __future__ import annotations

import asyncio

import pytest
from attacks import ATTACKS, PRELUDE, Attack
from lab import World

from verl_ext.tool_server import ExecutionRequest, ExecutionResult, ToolClient

pytestmark = pytest.mark.e2e

# What the next program must find: working libraries, and in the strong tier an empty scratch directory.
NEXT = {
    "strong": "import os, json, math\nprint(math.sqrt(16), os.listdir('.'), json.loads('{}'))",
    "standard": "import os, json, math\nprint(math.sqrt(16), [], json.loads('{}'))",
}


def run(world: World, code: str, timeout: float | None = None) -> ExecutionResult:
    async def once() -> ExecutionResult:
        async with ToolClient.from_url(world.server.url, attempts=1) as client:
            request = ExecutionRequest(code, timeout=timeout, echo=False)
            return (await client.run_batch([request], deadline=30))[0]

    return asyncio.run(once())


def test_there_are_enough_attacks_and_their_names_are_unique() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 60


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_contained(world: World, attack: Attack) -> None:
    result = run(world, f"W = {world.facts()!r}\n{PRELUDE}\n{attack.code}", attack.timeout)
    assert world.damage(result.output + result.stdout + result.stderr) == []
    assert result.outcome.value in attack.outcomes, (result.outcome, result.detail, result.output[-500:])
    # Far more than a kill takes (test_http.py measures that): a busy machine needs time to free a quarter of a GiB.
    assert result.seconds < (attack.timeout or 10) + 2
    assert len(result.output) <= 70_000
    after = run(world, NEXT[world.server.isolation])
    assert after.output == "4.0 [] {}\n", "the next execution was affected"
    assert after.attempts == 1


# Attacks that do harm wherever nothing holds them, and what the judge must then see.
HARM = {
    "read_secret": "read a secret",
    "write_outside": "wrote outside",
    "write_existing": "changed a file outside",
    "kill_victim": "disturbed another process",
    "tcp": "connected to tcp",
    "udp": "sent to udp",
    "unix_path": "connected to unix",
    "unix_abstract": "connected to abstract",
    "unix_datagram_by_pair": "sent to datagram",
    "daemon": "left process",
}


@pytest.mark.parametrize("name", HARM)
def test_the_judge_sees_what_an_unconfined_attack_does(unconfined_world: World, name: str) -> None:
    attack = next(attack for attack in ATTACKS if attack.name == name)
    result = run(unconfined_world, f"W = {unconfined_world.facts()!r}\n{PRELUDE}\n{attack.code}", 2.0)
    damage = unconfined_world.damage(result.output)
    assert any(HARM[name] in line for line in damage), damage
    assert result.isolation.value == "none", "results of an unconfined server must say so"
