"""The model that a run is given: its folder, its architecture, and what its chat template makes of a conversation.

Only what is on this machine is looked at: a hub name is read where it is cached, and nothing is downloaded. The rest
verl's workers find out.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.run.errors import ConfigError, one_line
from recipe.gtpo.run.inputs import Prompt, Say
from verl_ext.tools.schema import python_schema

_KEY = "actor_rollout_ref.model.path"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
#: The start of a file of which `git clone` without git-lfs left the address only.
_LFS = b"version https://git-lfs"


def check_model(config: DictConfig, prompts: Sequence[Prompt], say: Say, *, weights: bool = True) -> None:
    """Raise ConfigError for a model that cannot be trained here, or that would never see its tools.

    Args:
        prompts: of the data (`inputs.check_data`), for the chat template.
        weights: whether its folder has to have them.
    """
    model = config.actor_rollout_ref.model
    folder = _check_path(model.path)
    if folder is None:
        return
    if weights and Path(model.path).is_dir():
        _check_weights(folder)
    config_folder, tokenizer_folder = (
        _local(model.hf_config_path or model.path),
        _local(model.tokenizer_path or model.path),
    )
    model_type = None if config_folder is None else _check_architecture(config, config_folder)
    if tokenizer_folder is not None:
        _check_conversation(config, folder, tokenizer_folder, model_type, prompts, say)


def read_config(model: DictConfig) -> dict[str, Any] | None:
    """Its config.json, with `override_config` over it; None where the hub has to be asked for it.

    Args:
        model: the section `actor_rollout_ref.model`.
    """
    folder = _local(os.path.expanduser(model.hf_config_path or model.path))
    if folder is None or not (folder / "config.json").is_file():
        return None
    return _read_json(folder / "config.json") | OmegaConf.to_container(model.override_config, resolve=True)


def context_of(model: DictConfig) -> int | None:
    """The tokens that the model reads at once; None where that is not known before verl loads it. Args as above."""
    known = None if model.path is None else read_config(model)
    if known is None:
        return None
    return known.get("max_position_embeddings") or known.get("text_config", {}).get("max_position_embeddings")


# -- files ------------------------------------------------------------------------------------------------------------


def _check_path(path: str | None) -> Path | None:
    if path is None:
        raise ConfigError(f"{_KEY} is not set: a local folder or a hub name")
    looks_local = path.startswith(("/", "./", "../")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ConfigError(
            f"{_KEY}={path} is not a folder: download the model there, or give its hub name (for example "
            "Qwen/Qwen2.5-7B-Instruct)"
        )
    return _local(path)


def _local(path: str) -> Path | None:
    """The folder of a path or of a cached hub name; None where the hub has to be asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(path).is_dir():
        return Path(path)
    try:
        found = [try_to_load_from_cache(path, name) for name in ("config.json", "tokenizer_config.json")]
    except HFValidationError as e:
        raise ConfigError(f"{_KEY}={path} is neither a folder nor a hub name ({one_line(e)})") from e
    # both, or the rest may still be downloaded
    return Path(found[0]).parent if all(isinstance(one, str) for one in found) else None  # type: ignore[arg-type]


def _check_weights(folder: Path) -> None:
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        remedy = f"download one of {_WEIGHTS[0]}, {_WEIGHTS[1]}, {_WEIGHTS[2]}"
        if list(folder.parent.glob("model_world_size_*_rank_*.pt")):
            remedy = (
                "they are in the shards of verl's checkpoint beside it; merge them with `python -m verl.model_merger "
                f"merge --backend fsdp --local_dir {folder.parent} --target_dir ...` and give that folder"
            )
        raise ConfigError(f"{_KEY}={folder} has no weights: {remedy}")
    shards = [weights]
    if weights.suffix == ".json":
        names = sorted(set(_read_json(weights).get("weight_map", {}).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ConfigError(
                f"{_KEY}={folder} lacks {len(absent)} of the {len(names)} files that its {weights.name} names, the "
                f"first is {absent[0]}: download the rest"
            )
        shards = [folder / name for name in names]
    for shard in shards:
        with shard.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ConfigError(f"{shard} is an address of git-lfs, not the weights: run `git lfs pull` in {folder}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise ConfigError(f"{file} is no JSON: {one_line(e)}") from e


# -- architecture -----------------------------------------------------------------------------------------------------


def _check_architecture(config: DictConfig, folder: Path) -> str | None:
    """The `model_type`. What verl asks of an architecture: one name, and heads that its attention patch can count."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{_KEY}={folder} has no config.json: it is not the folder of a Hugging Face model")
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type == "deepseek_v4":  # verl asks vLLM for its config
        return model_type
    try:
        trust = bool(config.actor_rollout_ref.model.trust_remote_code)
        found = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as e:
        raise ConfigError(f"{_KEY}={folder}: its config.json cannot be used: {one_line(e)}") from e
    names = found.architectures or []
    if len(names) != 1:
        raise ConfigError(f"{_KEY}={folder}: verl needs one name in `architectures` of config.json, there are {names}")
    if config.actor_rollout_ref.actor.strategy not in ("fsdp", "fsdp2"):
        return model_type
    text = found if hasattr(found, "num_key_value_heads") else found.get_text_config()
    for attribute in ("num_attention_heads", "num_key_value_heads"):
        if not hasattr(text, attribute):
            raise ConfigError(
                f"{_KEY}={folder}: verl cannot train a {names[0]}, whose config has no {attribute}; use a model that "
                "has it (Qwen2, Qwen3, Llama, Mistral, ...)"
            )
    return model_type


# -- a conversation ---------------------------------------------------------------------------------------------------

_TOOL_NAME, _ANSWER, _SAID = "gtpo_probe_tool", "gtpoprobe", "gtposaid"  # in no template and no prompt
_TEMPLATE = (
    "take an instruct model, or give a chat template: chat_template=qwen2_5 where messages begin with <|im_start|> and "
    "end with <|im_end|>, else actor_rollout_ref.model.custom_chat_template"
)


def _check_conversation(
    config: DictConfig,
    folder: Path,
    tokenizer_folder: Path,
    model_type: str | None,
    prompts: Sequence[Prompt],
    say: Say,
) -> None:
    """Build a conversation with a tool as a rollout builds it, with verl's own builder, and look for the tool in it."""
    tokenizer, processor = _load_tokenizer(config, tokenizer_folder)
    if not tokenizer.chat_template and not getattr(processor, "chat_template", None) and model_type != "deepseek_v4":
        raise ConfigError(f"the tokenizer in {tokenizer_folder} has no chat template (a base model?): {_TEMPLATE}")
    builder = _builder(config, tokenizer_folder, tokenizer, processor, model_type)
    schema = python_schema()
    schema["function"]["name"] = _TOOL_NAME
    _check_lengths(config, tokenizer, prompts[:_COUNTED])
    of_each_kind: dict[tuple[str, ...], Prompt] = {}
    for prompt in prompts or [Prompt("a question", [{"role": "user", "content": "?"}])]:
        of_each_kind.setdefault(prompt.roles, prompt)
    for prompt in of_each_kind.values():
        ids = _check_prompt(builder, prompt, schema, tokenizer_folder)
    _check_answer(builder, prompt, ids, schema, tokenizer_folder)
    _warn_of_endless_turns(tokenizer, folder, say)


def _check_prompt(builder: Any, prompt: Prompt, schema: dict[str, Any], where: Path) -> list[int]:
    """Its tokens, as a rollout has them."""
    tokenizer, messages = builder.tokenizer, list(prompt.messages)
    try:
        if tokenizer.chat_template:  # where it refuses, verl's builder tries with another message, and loses the tools
            tokenizer.apply_chat_template(messages, tools=[schema], tokenize=False, **builder.chat_template_kwargs)
        ids = list(builder.build_initial_tokens(messages, tools=[schema]))
    except Exception as e:
        raise _refused(prompt, e) from e
    if _TOOL_NAME not in _text(tokenizer, ids):
        raise ConfigError(
            f"the chat template of {where} does not show the model its tools (it has no branch for `tools`): "
            f"{_TEMPLATE}"
        )
    return ids


def _check_answer(builder: Any, prompt: Prompt, ids: list[int], schema: dict[str, Any], where: Path) -> None:
    tokenizer = builder.tokenizer
    before = [*prompt.messages, {"role": "assistant", "content": _SAID}]
    after = [*before, {"role": "tool", "content": _ANSWER}]
    try:
        said = ids + list(tokenizer.encode(_SAID, add_special_tokens=False))
        answered = builder.merge_context_tokens(before, after, said, tools=[schema]).token_ids
    except Exception as e:
        raise ConfigError(
            f"the chat template of {where} cannot show the model what a tool answered (verl renders roles system, "
            f"user, assistant, tool): {_first(e)}; {_TEMPLATE}"
        ) from e
    if _ANSWER not in _text(tokenizer, answered):
        raise ConfigError(f"the chat template of {where} leaves out what a tool answered: {_TEMPLATE}")


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids).replace(" ", "")  # some tokenizers put spaces between the pieces of a word


def _load_tokenizer(config: DictConfig, tokenizer_folder: Path) -> tuple[Any, Any]:
    """As verl's model config loads them."""
    from verl.utils.tokenizer import hf_processor, hf_tokenizer

    if not any(path for pattern in _TOKENIZER for path in tokenizer_folder.glob(pattern)):
        raise ConfigError(
            f"{tokenizer_folder} has no tokenizer: put its files there, or set actor_rollout_ref.model.tokenizer_path"
        )
    model = config.actor_rollout_ref.model
    trust = bool(model.trust_remote_code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl's, of a padding token
        try:
            tokenizer = hf_tokenizer(str(tokenizer_folder), trust_remote_code=trust)
        except Exception as e:
            raise ConfigError(f"the tokenizer in {tokenizer_folder} cannot be loaded: {one_line(e)}") from e
        sees = any(
            (tokenizer_folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
        )
        processor = hf_processor(str(tokenizer_folder), trust_remote_code=trust) if sees else None
    if model.get("custom_chat_template") is not None:
        if processor is not None:
            processor.chat_template = model.custom_chat_template
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer, processor


def _builder(config: DictConfig, where: Path, tokenizer: Any, processor: Any, model_type: str | None) -> Any:
    from verl.utils.tokenizer import continuous_token_wiring

    logging.getLogger(continuous_token_wiring.__name__).setLevel(logging.ERROR)  # the workers say which one they take
    try:
        return continuous_token_wiring.create_continuous_token_builder(
            tokenizer,
            hf_model_type=model_type,
            chat_template_kwargs=_template_kwargs(config),
            mm_processor_kwargs=OmegaConf.select(config, "data.mm_processor_kwargs") or {},
            processor=processor,
        )
    except Exception as e:
        raise ConfigError(f"verl cannot build conversations with the tokenizer in {where}: {one_line(e)}") from e


def _template_kwargs(config: DictConfig) -> dict[str, Any]:
    found = OmegaConf.select(config, "data.apply_chat_template_kwargs")
    return OmegaConf.to_container(found, resolve=True) if found else {}  # type: ignore[return-value]


_COUNTED = 64  # prompts whose length is looked at


def _check_lengths(config: DictConfig, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """verl's filter of long prompts drops those that the template refuses too: of neither it says a word."""
    from verl.utils.tokenizer import normalize_token_ids

    limit = config.data.max_prompt_length
    if not config.data.filter_overlong_prompts or limit is None or not prompts:
        return
    lengths = []
    for prompt in prompts:
        try:
            ids = tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, tokenize=True, **_template_kwargs(config)
            )
        except Exception as e:
            raise _refused(prompt, e) from e
        lengths.append(len(normalize_token_ids(ids)))
    if min(lengths) > limit:
        raise ConfigError(
            f"data.max_prompt_length={limit}: the first {len(lengths)} prompts all have more tokens ({min(lengths)} "
            f"to {max(lengths)}), and data.filter_overlong_prompts drops such rows; set it to {max(lengths)} or more"
        )


def _refused(prompt: Prompt, error: Exception) -> ConfigError:
    system = " Move the system message's text into the user message, or" if "system" in prompt.roles else ""
    return ConfigError(
        f"the model's chat template refuses {prompt.where} (roles {', '.join(prompt.roles)}): {_first(error)}."
        f"{system} {_TEMPLATE}"
    )


def _first(error: BaseException) -> str:
    """The error that was raised first: verl tries again with another message, and what that raises says less."""
    while error.__context__ is not None:
        error = error.__context__
    return one_line(error)


def _warn_of_endless_turns(tokenizer: Any, folder: Path, say: Say) -> None:
    """A base model's end of text is not what its chat template ends a turn with: then no turn ends by itself."""
    try:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
        end = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_SAID)[2]
    except Exception:  # a template of typed parts: nothing is known
        return
    file = folder / "generation_config.json"
    found = next((_read_json(one) for one in (file, folder / "config.json") if one.is_file()), {})
    stops = {*_as_list(tokenizer.eos_token_id), *_as_list(found.get("eos_token_id"))}
    if stops.isdisjoint(tokenizer.encode(end, add_special_tokens=False)):
        names = ", ".join(sorted(tokenizer.convert_ids_to_tokens(stop) or str(stop) for stop in stops)) or "nothing"
        say(
            f"warning: no turn may end: the model stops at {names}, and its chat template ends a turn with "
            f"{end.strip()!r}; put that token's id into eos_token_id of {file}"
        )


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
