"""A toy policy for the tests that need a tokenizer or a model, built once."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import TOY
from transformers import AutoTokenizer

from recipe.gtpo.tasks.arithmetic.policy import TokenStream
from recipe.gtpo.tasks.arithmetic.problems import tool_schema
from recipe.gtpo.tasks.arithmetic.warm_start import ensure_warm_start


@pytest.fixture(scope="session")
def toy_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_warm_start(TOY, tmp_path_factory.mktemp("toy_policies"), progress=False)


@pytest.fixture(scope="session")
def stream(toy_policy: Path) -> TokenStream:
    return TokenStream(AutoTokenizer.from_pretrained(toy_policy), [tool_schema()])
