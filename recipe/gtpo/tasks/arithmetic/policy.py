"""A tiny Qwen2 policy: tokenizer, chat template, model, and the token stream of a conversation.

Not a pretrained model and of no use outside the embedded task. Everything else about it is a Qwen2.5: byte-level BPE
with Qwen's pre-tokenizer (each digit is a token), ChatML, Hermes tool calls, `Qwen2ForCausalLM`. verl treats it as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from recipe.gtpo.parsing import as_data, encode_data

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
#: As in Qwen2.5: known to the tokenizer, but not "special", so decoding with skip_special_tokens keeps them.
TOOL_TAGS = ("<tool_call>", "</tool_call>")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(corpus: Iterable[str], vocab_size: int, directory: str | Path) -> PreTrainedTokenizerBase:
    """Train a Qwen2 tokenizer on `corpus`, save it, and return it as `AutoTokenizer` loads it back.

    Args:
        corpus: texts without the control tokens.
        vocab_size: upper bound of len(tokenizer): 256 bytes, 5 control tokens, the rest merges.

    Raises:
        ValueError: `vocab_size` has no room for bytes and control tokens.
    """
    control = (END_OF_TEXT, TURN_START, TURN_END, *TOOL_TAGS)
    if vocab_size < 256 + len(control):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(control)} control tokens are needed"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(control),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(m) for m in trained["merges"]],
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=4096,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TOOL_TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    tokenizer.save_pretrained(directory)
    # transformers picks the class by model_type, whatever was saved: train with what will be loaded, not with this one
    return AutoTokenizer.from_pretrained(directory)


class TokenStream:
    """The token ids of a conversation, grown turn by turn exactly as verl's Continuous Token builder grows them.

    verl never re-renders a finished conversation: it appends what was generated, then the delta the chat template adds.
    Training on a re-rendered text instead would show the policy boundaries it never meets in a rollout.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]):
        self.tokenizer = tokenizer
        self.tools = list(tools)
        self.eos_id: int = tokenizer.convert_tokens_to_ids(TURN_END)
        self.pad_id: int = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self._control = frozenset(tokenizer.get_added_vocab())
        self._prefix = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        self._prefix_text = self._render(self._prefix)
        self.observation = lru_cache(maxsize=4096)(self._observation)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids up to and including the generation prompt of the first assistant turn."""
        return self.encode(self._render(messages, add_generation_prompt=True))

    def turn(self, text: str) -> list[int]:
        """Ids of an assistant turn that ends by itself."""
        return [*self.encode(text), self.eos_id]

    def _observation(self, replies: tuple[str, ...]) -> tuple[int, ...]:
        """Ids between `<|im_end|>` of a turn and the first token of the next: newline, tool messages, prompt."""
        messages = [*self._prefix, *({"role": "tool", "content": reply} for reply in replies)]
        delta = self._render(messages, add_generation_prompt=True)[len(self._prefix_text) :]
        return tuple(self.encode("\n" + delta))

    def _render(self, messages: Sequence[Mapping[str, str]], **kwargs: Any) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tools=self.tools, tokenize=False, **kwargs)

    def as_data(self, text: str) -> str:
        """What a tool said, as it goes into a reply: the control tokens that it spells are text."""
        return as_data(text, self._control)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no token added."""
        return encode_data(self.tokenizer, text)


def build_model(
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int,
    eos_id: int,
    pad_id: int,
) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 in fp32 with tied embeddings. Seed torch first."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,  # Qwen's 0.02 is for wide models: here attention would start out flat
        bos_token_id=pad_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    return Qwen2ForCausalLM(config)
