"""A fast, isolated Python execution server for reinforcement learning of tool-using language models.

Usable without verl: ``python -m verl_ext.tool_server`` serves HTTP, :class:`ToolClient` calls it, and
:func:`start_server` runs one for the length of a ``with`` block. See README.md beside this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult, Isolation, Limits, Outcome

if TYPE_CHECKING:
    from verl_ext.tool_server.client import ToolClient
    from verl_ext.tool_server.launch import start_server

__all__ = [
    "ExecutionRequest",
    "ExecutionResult",
    "Isolation",
    "Limits",
    "Outcome",
    "ToolClient",
    "start_server",
]


def __getattr__(name: str) -> object:
    """Import the client and the launcher only when asked for: they pull in aiohttp, the types do not."""
    if name == "ToolClient":
        from verl_ext.tool_server.client import ToolClient

        return ToolClient
    if name == "start_server":
        from verl_ext.tool_server.launch import start_server

        return start_server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
