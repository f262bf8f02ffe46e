"""Tiny tensors on one thread; a toy policy for the tests that need a tokenizer or a model, built once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from recipe.gtpo.tasks.arithmetic.policy import TokenStream

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

settings.register_profile("gtpo", max_examples=60, deadline=None)
settings.load_profile("gtpo")


@pytest.fixture(scope="session")
def toy_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toy import TOY

    from recipe.gtpo.tasks.arithmetic.warm_start import ensure_warm_start

    return ensure_warm_start(TOY, tmp_path_factory.mktemp("toy_policies"), progress=False)


@pytest.fixture(scope="session")
def stream(toy_policy: Path) -> TokenStream:
    from transformers import AutoTokenizer

    from recipe.gtpo.tasks.arithmetic.policy import TokenStream
    from recipe.gtpo.tasks.arithmetic.problems import tool_schema

    return TokenStream(AutoTokenizer.from_pretrained(toy_policy), [tool_schema()])
