"""The function schema of the tool `python`: what a chat template shows the model and what a call is checked against."""

from __future__ import annotations

from typing import Any


def python_schema(max_code_chars: int | None = None) -> dict[str, Any]:
    """OpenAI's function schema as a plain dict. `max_code_chars`: the longest `code` that is accepted; None: any."""
    code: dict[str, Any] = {"type": "string", "description": "Python code"}
    if max_code_chars is not None:
        code["maxLength"] = max_code_chars
    return {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Run Python code and see what it prints; the value of a last expression is shown too.",
            "parameters": {"type": "object", "properties": {"code": code}, "required": ["code"]},
        },
    }
