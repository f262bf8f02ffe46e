"""The token stream is verl's to the last id, and the tokenizer that trains is the one that will be loaded."""

from __future__ import annotations

import random

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer
from verl.utils.tokenizer.continuous_token import QwenContinuousTokenBuilder
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from recipe.gtpo.tasks.arithmetic.experts import FAULT_MIX, demonstrate, scale_faults, write_answer, write_call
from recipe.gtpo.tasks.arithmetic.policy import train_tokenizer
from recipe.gtpo.tasks.arithmetic.problems import sample_problems, take, tool_schema
from recipe.gtpo.tasks.arithmetic.warm_start import IGNORE, BaseOptions, encode

pytestmark = pytest.mark.unit

TOOLS = [tool_schema()]


@pytest.fixture(scope="module")
def conversations():
    rng = random.Random(1)
    mix = scale_faults(FAULT_MIX, 1.0)
    return [demonstrate(p, mix, rng) for p in take(sample_problems("train", 5, {1: 1, 2: 1, 3: 1}), 150)]


def verl_stream(builder, stream, conversation):
    """Ids and response mask of a conversation as verl's agent loop builds them, one merge at a time."""
    messages = conversation.problem.messages
    ids = builder.build_initial_tokens(messages, tools=TOOLS)
    mask: list[int] = []
    for text, replies in zip(conversation.turns, conversation.replies, strict=True):
        merged = builder.merge_assistant_tokens(ids, stream.turn(text))
        mask, _ = builder.align_response_metadata(merged, mask)
        ids = merged.token_ids
        if replies:
            before = [*messages, {"role": "assistant", "content": text}]
            messages = [*before, *({"role": "tool", "content": reply} for reply in replies)]
            merged = builder.merge_context_tokens(before, messages, ids, tools=TOOLS)
            mask, _ = builder.align_response_metadata(merged, mask)
            ids = merged.token_ids
    return ids, mask


def test_trained_stream_is_the_rollouts_stream(stream, conversations):
    """Make or break: what SFT trains on, ids and loss mask, is what verl's builder makes of the same conversation."""
    builder = create_continuous_token_builder(stream.tokenizer, hf_model_type="qwen2")
    assert type(builder) is QwenContinuousTokenBuilder
    assert {len(c.turns) for c in conversations} >= {1, 2, 3, 4}
    for conversation in conversations:
        ids, labels = encode(conversation, stream)
        expected_ids, mask = verl_stream(builder, stream, conversation)
        assert ids == expected_ids
        prompt = len(ids) - len(mask)
        assert [int(label != IGNORE) for label in labels] == [0] * prompt + mask
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))


def test_several_tool_messages_share_one_user_turn_as_in_verl(stream):
    builder = create_continuous_token_builder(stream.tokenizer, hf_model_type="qwen2")
    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    after = [*before, {"role": "tool", "content": "12\n"}, {"role": "tool", "content": "Error: no"}]
    prefix = stream.turn("y")
    merged = builder.merge_context_tokens(before, after, prefix, tools=TOOLS)
    assert merged.token_ids == prefix + list(stream.observation(("12\n", "Error: no")))
    assert stream.tokenizer.decode(merged.token_ids).count("<|im_start|>user") == 1


def test_what_is_loaded_encodes_like_what_trained(toy_policy, stream, conversations):
    reloaded = AutoTokenizer.from_pretrained(toy_policy)
    assert type(reloaded) is Qwen2Tokenizer
    for conversation in conversations[:20]:
        for text in (conversation.problem.question, *conversation.turns):
            assert reloaded.encode(text) == stream.encode(text)


def test_any_text_survives_encoding(stream):
    texts = [
        write_call("12+3"),
        write_answer(42),
        " déjà\tvu \n\n 你好 \x00\x7f",
        "Error: <tool_call> is not closed",
        "  ",
    ]
    for text in texts:
        assert stream.tokenizer.decode(stream.encode(text)) == text


def test_control_tokens_are_single_ids_and_tool_tags_survive_decoding(stream):
    tokenizer = stream.tokenizer
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "\n"):
        assert len(stream.encode(token)) == 1, token
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    call = write_call("12+3")
    assert tokenizer.decode(stream.turn(call), skip_special_tokens=True) == call


def test_every_digit_is_a_token(stream):
    assert len(stream.encode("1234567890")) == 10


def test_vocabulary_model_and_tokenizer_agree(toy_policy, stream):
    config = AutoConfig.from_pretrained(toy_policy)
    assert config.model_type == "qwen2"
    assert config.vocab_size == len(stream.tokenizer) == BaseOptions.vocab_size
    assert config.eos_token_id == stream.eos_id
    assert config.tie_word_embeddings


def test_default_policy_is_tiny(tmp_path, stream):
    from recipe.gtpo.tasks.arithmetic.policy import build_model

    options = BaseOptions()
    model = build_model(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        layers=options.layers,
        heads=options.heads,
        intermediate_size=options.intermediate_size,
        eos_id=stream.eos_id,
        pad_id=stream.pad_id,
    )
    assert 150_000 < sum(p.numel() for p in model.parameters()) < 600_000
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


def test_template_renders_structured_calls_like_the_text_they_came_from(stream):
    """A client that keeps calls as structures and one that keeps the text must show the model the same thing."""
    arguments = {"name": "python", "arguments": {"code": "12+3"}}
    texts = [
        stream.tokenizer.apply_chat_template([{"role": "user", "content": "x"}, message], tools=TOOLS, tokenize=False)
        for message in (
            {"role": "assistant", "content": write_call("12+3")},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": arguments}]},
        )
    ]
    assert texts[0] == texts[1]


def test_prompts_stay_short(stream):
    lengths = [len(stream.prompt(p.messages)) for p in take(sample_problems("validation", 1), 200)]
    assert max(lengths) <= 80


def test_too_small_a_vocabulary_raises(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=260 is too small"):
        train_tokenizer(["text"], 260, tmp_path)
