"""The function schema of the tool `python`: what a chat template shows the model and what a call is checked against."""

from __future__ import annotations

from typing import Any


def python_schema(max_code_chars: int | None = None, *, echo: bool = True) -> dict[str, Any]:
    """OpenAI's function schema as a plain dict.

    Args:
        max_code_chars: the longest `code` that is accepted; None: any.
        echo: whether the value of a last expression is shown.
    """
    shown = "; the value of a last expression is shown too" if echo else ""
    code: dict[str, Any] = {"type": "string", "description": "Python code"}
    if max_code_chars is not None:
        code["maxLength"] = max_code_chars
    return {
        "type": "function",
        "function": {
            "name": "python",
            "description": f"Run Python code and see what it prints{shown}.",
            "parameters": {"type": "object", "properties": {"code": code}, "required": ["code"]},
        },
    }
