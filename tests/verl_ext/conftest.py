"""Servers the tests share: one per (who runs it, isolation tier), started once."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
from lab import FLAGS, USER_UID, OrdinaryUser, Server, World, own_server

# A secret in the environment of every server these tests start; no program may ever learn it.
os.environ["PLANTED_ANSWER"] = f"planted-{secrets.token_hex(12)}"


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[OrdinaryUser]:
    user = OrdinaryUser()
    yield user
    user.remove()


@pytest.fixture(scope="session", params=["root-strong", "root-standard", "user-strong", "user-standard"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A server in one tier, run by root or by an ordinary user, and what surrounds it."""
    identity, tier = request.param.split("-")
    options = {"isolation": tier, "workers": 2, "extra_arguments": FLAGS}
    if os.geteuid() != 0:
        if identity == "root":
            pytest.skip("needs root: these tests run as an ordinary user")
        context, uid = own_server(**options), os.geteuid()
    elif identity == "root":
        context, uid = own_server(**options), 0
    else:
        context, uid = request.getfixturevalue("ordinary_user").server(**options), USER_UID
    with context as server:
        assert server.isolation == tier
        surroundings = World(server, identity == "root", uid)
        try:
            yield surroundings
        finally:
            surroundings.close()


@pytest.fixture(scope="session")
def unconfined_server() -> Iterator[Server]:
    with own_server(unsafe_no_isolation=True, workers=1, extra_arguments=FLAGS) as server:
        yield server


@pytest.fixture
def unconfined_world(unconfined_server: Server) -> Iterator[World]:
    """A server without isolation, and surroundings that each test may see damaged."""
    surroundings = World(unconfined_server, os.geteuid() == 0, os.geteuid())
    try:
        yield surroundings
    finally:
        surroundings.end_strays()
        surroundings.close()


@pytest.fixture(scope="session")
def strong_server() -> Iterator[Server]:
    """A server for everything that is not about isolation."""
    with own_server(isolation="strong", workers=2, extra_arguments=("--cpu-seconds", "2", "--memory-mib", "256")) as s:
        yield s
