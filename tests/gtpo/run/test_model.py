"""The model that a run is given: what cannot be trained, or would never see its tools, is refused before Ray starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from composition import compose
from transformers import AutoTokenizer, GPT2Config, GPTNeoXConfig

from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.inputs import Prompt
from recipe.gtpo.run.model import check_model

pytestmark = pytest.mark.unit

PROMPTS = [
    Prompt("row 0 of train", [{"role": "user", "content": "What is 1+1?"}]),
    Prompt("row 7 of train", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]),
]
USER_ONLY = PROMPTS[:1]


@pytest.fixture
def folder(toy_policy, tmp_path) -> Path:
    """A model's folder, to be spoilt."""
    return Path(shutil.copytree(toy_policy, tmp_path / "model"))


def said_of(path, prompts=PROMPTS, *overrides) -> list[str]:
    said = []
    check_model(compose(f"actor_rollout_ref.model.path={path}", *overrides), prompts, said.append)
    return said


def refusal(path, prompts=PROMPTS, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        said_of(path, prompts, *overrides)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    return str(caught.value)


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_model_s_folder_passes_without_a_word(folder):
    assert said_of(folder) == []
    assert said_of(folder, [], "data.filter_overlong_prompts=true") == []


def test_nothing_is_asked_of_the_hub(monkeypatch, tmp_path):
    def ask(*args, **kwargs):
        raise AssertionError("a request")

    monkeypatch.setattr("httpx.Client.send", ask)
    monkeypatch.setattr("socket.create_connection", ask)
    assert said_of("Qwen/Qwen2.5-7B-Instruct") == [] and said_of("gpt2") == []
    assert "is neither a folder nor a hub name" in refusal("my model")


def test_a_cached_hub_name_is_read_where_it_is(folder, monkeypatch):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    cached = {
        "config.json": str(folder / "config.json"),
        "tokenizer_config.json": str(folder / "tokenizer_config.json"),
    }
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: cached.get(name))
    (folder / "model.safetensors").unlink()  # may still be downloaded
    assert "does not show the model its tools" in refusal("someone/model")
    del cached["tokenizer_config.json"]
    assert said_of("someone/model") == []


def test_no_model_and_no_folder_are_named_with_the_remedy(tmp_path):
    assert refusal("null") == "actor_rollout_ref.model.path is not set: a local folder or a hub name"
    message = refusal(tmp_path / "absent")
    assert f"{tmp_path / 'absent'} is not a folder" in message and "download the model there" in message


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["config.json"], " has no config.json: it is not the folder of a Hugging Face model"),
        (["model.safetensors"], " has no weights: download one of model.safetensors, model.safetensors.index.json, "),
        (["tokenizer.json", "tokenizer_config.json"], " has no tokenizer: put its files there, or set "),
    ],
    ids=["config", "weights", "tokenizer"],
)
def test_a_folder_without_files_of_a_model_is_refused(folder, absent, message):
    for name in absent:
        (folder / name).unlink()
    assert f"{folder}{message}" in refusal(folder)


def test_the_folder_of_a_checkpoint_is_refused_with_how_to_merge_it(folder):
    (folder / "model.safetensors").unlink()
    (folder.parent / "model_world_size_1_rank_0.pt").touch()
    assert f"python -m verl.model_merger merge --backend fsdp --local_dir {folder.parent} --target_dir" in refusal(
        folder
    )


def test_an_incomplete_download_is_refused(folder):
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (folder / "model.safetensors").rename(folder / shards[0])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("abc", shards, strict=True))})
    )
    assert f"lacks 2 of the 3 files that its model.safetensors.index.json names, the first is {shards[1]}" in refusal(
        folder
    )
    for name in shards[1:]:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert (
        refusal(folder)
        == f"{folder / shards[1]} is an address of git-lfs, not the weights: run `git lfs pull` in {folder}"
    )


# -- architecture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind"), [("GPT2LMHeadModel", GPT2Config), ("GPTNeoXForCausalLM", GPTNeoXConfig)]
)
def test_an_architecture_that_verl_cannot_patch_is_refused(folder, architecture, kind):
    kind(architectures=[architecture]).save_pretrained(folder)
    assert refusal(folder) == (
        f"actor_rollout_ref.model.path={folder}: verl cannot train a {architecture}, whose config has no "
        "num_key_value_heads; use a model that has it (Qwen2, Qwen3, Llama, Mistral, ...)"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": None}, "verl needs one name in `architectures` of config.json, there are []"),
        (
            {"model_type": "nonsense"},
            "its config.json cannot be used: ValueError: The checkpoint you are trying to load",
        ),
    ],
)
def test_a_config_that_verl_cannot_use_is_refused(folder, values, message):
    edit(folder / "config.json", **values)
    assert message in refusal(folder)


def test_a_config_that_is_no_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    assert f"{folder}/config.json is no JSON" in refusal(folder)


# -- the chat template ------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: As Gemma's and Mistral's templates refuse it.
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
REMEDY = (
    "take an instruct model, or give a chat template: chat_template=qwen2_5 where messages begin with <|im_start|> and "
    "end with <|im_end|>, else actor_rollout_ref.model.custom_chat_template"
)


def give_template(folder: Path, template: str | None) -> None:
    file = folder / "chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template)


def test_a_template_with_branches_for_tools_passes(folder):
    give_template(folder, TOOLS + CHATML)
    assert said_of(folder) == []


def test_a_tokenizer_without_a_chat_template_is_refused(folder):
    give_template(folder, None)
    assert refusal(folder) == f"the tokenizer in {folder} has no chat template (a base model?): {REMEDY}"


def test_a_chat_template_of_the_config_s_counts(folder):
    give_template(folder, None)
    model = compose(f"actor_rollout_ref.model.path={folder}")
    model.actor_rollout_ref.model.custom_chat_template = TOOLS + CHATML
    check_model(model, PROMPTS, lambda text: None)


def test_the_template_that_the_remedy_names_is_one_word_and_shows_the_tools(folder):
    give_template(folder, CHATML)  # without a branch for tools, as SmolLM2's own
    assert REMEDY in refusal(folder)
    assert said_of(folder, PROMPTS, "chat_template=qwen2_5") == []


def test_a_template_that_refuses_the_system_role_is_refused_when_the_data_has_it(folder):
    give_template(folder, TOOLS + NO_SYSTEM + ALTERNATE + CHATML)
    for overrides in ([], ["data.filter_overlong_prompts=true"]):
        assert refusal(folder, PROMPTS, *overrides) == (
            "the model's chat template refuses row 7 of train (roles system, user): TemplateError: System role not "
            f"supported. Move the system message's text into the user message, or {REMEDY}"
        )


def test_a_template_that_refuses_what_verl_renders_for_a_tool_s_answer_is_refused(folder):
    give_template(folder, TOOLS + NO_SYSTEM + ALTERNATE + CHATML)
    assert refusal(folder, USER_ONLY) == (
        f"the chat template of {folder} cannot show the model what a tool answered (verl renders roles system, user, "
        f"assistant, tool): TemplateError: System role not supported; {REMEDY}"
    )


def test_a_template_without_a_branch_for_tools_is_refused(folder):
    give_template(folder, CHATML)
    assert refusal(folder) == (
        f"the chat template of {folder} does not show the model its tools (it has no branch for `tools`): {REMEDY}"
    )


def test_a_template_that_leaves_out_tool_messages_is_refused(folder):
    give_template(
        folder,
        TOOLS
        + CHATML.replace("%}<|im_start|>{{", "%}{% if m.role != 'tool' %}<|im_start|>{{").replace(
            "<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor"
        ),
    )
    assert refusal(folder) == f"the chat template of {folder} leaves out what a tool answered: {REMEDY}"


def test_a_template_that_is_no_jinja_is_refused(folder):
    give_template(folder, "{% for m in %}")
    assert "the model's chat template refuses row 0 of train (roles user): TemplateSyntaxError: " in refusal(folder)


def test_prompts_that_are_all_too_long_for_the_filter_are_refused(folder):
    assert said_of(folder, PROMPTS, "data.max_prompt_length=4") == []  # without the filter a rollout takes them
    message = refusal(folder, PROMPTS, "data.max_prompt_length=4", "data.filter_overlong_prompts=true")
    assert message.startswith("data.max_prompt_length=4: the first 2 prompts all have more tokens (")
    assert "and data.filter_overlong_prompts drops such rows; set it to " in message


def test_a_tokenizer_that_verls_builder_does_not_take_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edited = json.loads((folder / "tokenizer.json").read_text())
    for token in edited["added_tokens"]:
        token["content"] = token["content"].replace("im_end", "the_end")
    (folder / "tokenizer.json").write_text(json.dumps(edited))
    edit(folder / "tokenizer_config.json", eos_token="<|the_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert refusal(folder).startswith(f"verl cannot build conversations with the tokenizer in {folder}: ")


# -- the end of a turn ------------------------------------------------------------------------------------------------


def test_a_base_model_whose_end_token_never_comes_is_a_warning(folder):
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|endoftext|>")
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit(folder / "config.json", eos_token_id=end)
    edit(folder / "generation_config.json", eos_token_id=end)
    assert said_of(folder) == [
        "warning: no turn may end: the model stops at <|endoftext|>, and its chat template ends a turn with "
        f"'<|im_end|>'; put that token's id into eos_token_id of {folder}/generation_config.json"
    ]


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
def test_one_stop_token_of_several_that_ends_a_turn_is_enough(folder, file):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, turn_end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>"))
    by_tokenizer = file == "tokenizer_config.json"
    edit(folder / "tokenizer_config.json", eos_token="<|im_end|>" if by_tokenizer else "<|endoftext|>")
    edit(folder / "generation_config.json", eos_token_id=end if by_tokenizer else [end, turn_end])
    assert said_of(folder) == []
