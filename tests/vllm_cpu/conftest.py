"""The lane `vllm` (`bash tests/vllm_cpu.sh`): verl's vLLM server on the CPU. Elsewhere its tests are skipped."""

from __future__ import annotations

import importlib.util

import pytest

pytest_skip = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def pytest_itemcollected(item):
    item.add_marker(pytest_skip)
