"""Protects the arithmetic of a GPU's memory: published sizes to the last parameter, sums worked out by hand, and the
settings of verl's own scripts, which are known to have run.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from recipe.gtpo.run.memory import (
    GB,
    QWEN25,
    Machines,
    Settings,
    Shape,
    by_name,
    cache_tokens,
    choose,
    generation,
    host,
    lacking,
    proposals,
    table,
    update,
)

pytestmark = pytest.mark.unit

OURS = Settings(tokens=18432, longest=9216)  # task=verl_data
ONE, TWO, EIGHT, SIXTEEN = Machines(1, 80 * GB), Machines(2, 80 * GB), Machines(8, 80 * GB), Machines(8, 80 * GB, 2)
SMALL = Machines(1, 24 * GB)


def total(parts):
    return sum(parts.values()) / GB


def held(*arguments):
    """What there is of on a host."""
    return {part: size for part, size in host(*arguments).items() if size}


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "cache"),
    [
        ("0.5B", 494_032_768, 12_288),
        ("1.5B", 1_543_714_304, 28_672),
        ("3B", 3_085_938_688, 36_864),
        ("7B", 7_615_616_512, 57_344),
        ("14B", 14_770_033_664, 196_608),
    ],
)
def test_qwen_has_the_parameters_that_are_published(name, parameters, cache):
    assert (QWEN25[name].parameters, QWEN25[name].cache) == (parameters, cache)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_the_count_is_that_of_the_model_itself(kind, tied):
    import torch
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    exact = sum(p.numel() for p in model.parameters())
    norms = 3 * 2 * 6 if kind == "Qwen3" else 0  # of query and key, which the arithmetic leaves out
    assert Shape.of(config.to_dict()).parameters == exact - norms


def test_the_adapter_is_peft_s():
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    config = transformers.Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        model = get_peft_model(
            transformers.AutoModelForCausalLM.from_config(config), LoraConfig(r=8, target_modules="all-linear")
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Shape.of(config.to_dict()).adapter(8) == trained


def test_a_shape_is_read_from_a_config_or_a_name_and_else_is_unknown():
    config = {
        **{"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "model_type": "qwen2"},
    }
    assert Shape.of(config) == Shape.of({"text_config": config}) == QWEN25["7B"]
    assert Shape.of({"model_type": "mamba", "d_model": 3}) is None
    for name in ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Coder-7B-Instruct"):
        assert by_name(name) is QWEN25["7B"]
    assert by_name("Qwen/Qwen2.5-72B") is None and by_name("Qwen/Qwen3-4B") is None


QWEN3_30B_A3B = {
    **{"hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144, "num_attention_heads": 32},
    **{"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "model_type": "qwen3_moe"},
}


@pytest.mark.parametrize(
    "experts",
    [
        {"num_experts": 128, "moe_intermediate_size": 768},
        {"num_local_experts": 8},  # Mixtral
        {"n_routed_experts": 64},  # DeepSeek
        {"num_experts": [64, 64]},  # a number a layer
        {"text_config": {**QWEN3_30B_A3B, "num_experts": 128}},
    ],
)
def test_a_mixture_of_experts_is_unknown_and_not_dense(experts):
    assert Shape.of({**QWEN3_30B_A3B, **experts}) is None


@pytest.mark.parametrize("experts", [{"num_experts": None}, {"num_local_experts": 0}, {"num_experts": 1}])
def test_a_config_that_says_that_it_has_no_experts_is_dense(experts):
    assert Shape.of({**QWEN3_30B_A3B, **experts}) == Shape.of(QWEN3_30B_A3B) is not None


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral", "DeepseekV3"])
def test_the_mixtures_of_transformers_are_unknown(kind):
    import transformers

    assert Shape.of(getattr(transformers, f"{kind}Config")().to_dict()) is None


# -- sums -------------------------------------------------------------------------------------------------------------


def test_the_update_of_a_tiny_model_by_hand():
    shape = Shape(hidden=4, layers=2, intermediate=8, heads=2, kv_heads=1, head=2, vocabulary=10, tied=False)
    assert shape.layer == (16 + 8 + 8 + 16) + (32 + 32 + 32) + (2 + 1 + 1) * 2 + 8 == 160
    assert shape.root == 2 * 40 + 4 and shape.parameters == 404 and shape.cache == 2 * 2 * 2 * 2
    settings = Settings(tokens=100, longest=50)
    parts = update(shape, Machines(2, GB), settings)
    assert parts["weights"] == parts["gradients"] == 4 * 404 / 2 and parts["Adam"] == 8 * 404 / 2
    assert parts["gathered layers"] == 2 * (2 * 160 + 84)
    checkpoints, recomputed, mask = 2 * 100 * 2 * 4, 100 * 2 * (12 * 4 + 4 * 8), 3 * 100**2
    fused = 100 * 10 * 24 + 2 * 2 * 10 * 4
    assert parts["activations and logits"] == checkpoints + recomputed + mask + fused
    whole = update(shape, Machines(2, GB), replace(settings, fused=False, flash=True))
    assert whole["activations and logits"] == checkpoints + recomputed + 100 * 10 * 2 * 4
    lora = update(shape, Machines(2, GB), replace(settings, lora_rank=1))
    adapter = 2 * (8 + 6 + 6 + 8 + 12 + 12 + 12)
    assert lora["Adam"] == 8 * adapter / 2 and lora["weights"] == 4 * (404 + adapter) / 2


def test_sglang_keeps_its_weights_in_the_update_where_it_gets_adapters_alone():
    """verl's server then gives up the cache and nothing else; with whole weights it gives up both."""
    shape = Shape(hidden=4, layers=2, intermediate=8, heads=2, kv_heads=1, head=2, vocabulary=10, tied=False)
    machines, vllm = Machines(2, GB), Settings(tokens=100, longest=50, lora_rank=1)
    sglang = replace(vllm, sglang=True)
    for asked, kept in (
        (sglang, 2 * 404),
        (replace(sglang, tensor_parallel=2), 404),
        (replace(sglang, merged=True), 0),
        (replace(sglang, lora_rank=0), 0),
        (vllm, 0),
    ):
        assert update(shape, machines, asked)["SGLang's weights"] == kept


def test_where_sglang_s_weights_are_too_much_whole_ones_are_proposed():
    asked = replace(OURS, lora_rank=32, sglang=True)
    assert choose(QWEN25["3B"], SMALL, replace(asked, sglang=False)) and not choose(QWEN25["3B"], SMALL, asked)
    assert "actor_rollout_ref.model.lora.merge=true" in proposals(QWEN25["3B"], SMALL, asked)
    assert choose(QWEN25["3B"], SMALL, replace(asked, merged=True))


def test_generation_and_host_of_a_tiny_model_by_hand():
    shape = Shape(hidden=4, layers=2, intermediate=8, heads=2, kv_heads=1, head=2, vocabulary=10, tied=False)
    machines, settings = Machines(2, 10 * GB), Settings(tokens=100, longest=50, share=0.5)
    assert generation(shape, machines, settings) == {
        "vLLM": 5 * GB,
        "trainer": 12 * 404 / 2,
        "contexts and weight sync": 4 * GB,
    }
    assert generation(shape, machines, replace(settings, offload=True))["trainer"] == 0
    assert cache_tokens(shape, machines, settings) == int((2 * GB - 1.13 * 808) / 16)
    assert held(shape, machines, settings) == {"weights that are read": 4 * 404}
    away = replace(settings, offload=True, reference=True)
    assert held(shape, replace(machines, nodes=2), away) == {
        "offloaded": 12 * 404 / 2,
        "KL reference": 4 * 404 / 2,
        "weights that are read": 4 * 404,
    }
    assert host(shape, machines, replace(away, lora_rank=1))["KL reference"] == 0  # the model without its adapter


def test_every_process_reads_a_model_whose_embedding_is_its_head():
    """verl begins with empty weights in all but the first process of all others alone."""
    shape = Shape(hidden=4, layers=2, intermediate=8, heads=2, kv_heads=1, head=2, vocabulary=10, tied=True)
    asked = Settings(tokens=100, longest=50)
    for gpus in (1, 8):
        assert held(shape, Machines(gpus, GB), asked) == {"weights that are read": gpus * 4 * shape.parameters}
    one, eight = (round(total(host(QWEN25["3B"], Machines(n, 80 * GB), OURS))) for n in (1, 8))
    assert (one, eight) == (12, 99) and round(total(host(QWEN25["7B"], EIGHT, OURS))) == 30


@pytest.mark.parametrize(
    ("asked", "copies"),
    [
        ({"sglang": True}, 8),
        ({"sglang": True, "tensor_parallel": 2}, 4),
        ({"sglang": True, "lora_rank": 1}, 0),  # they stay on the GPU
        ({"sglang": True, "lora_rank": 1, "merged": True}, 8),
        ({"lora_rank": 1}, 8),
        ({"lora_rank": 1, "merged": True}, 0),
        ({}, 0),
        ({"rows": 16}, 0),
    ],
)
def test_what_sleeping_rollouts_keep_on_a_host(asked, copies):
    """verl: SGLang's enable_weights_cpu_backup, vLLM's level of sleep."""
    found = host(QWEN25["7B"], SIXTEEN, replace(OURS, **asked))["weights of sleeping rollouts"]
    assert found == copies * 2 * QWEN25["7B"].parameters


@pytest.mark.parametrize(("asked", "copies"), [({}, 2), ({"offload": True}, 1), ({"cpu_adam": True}, 0)])
def test_rollouts_apart_cost_the_host_copies_of_the_trained_weights(asked, copies):
    there = replace(OURS, **asked)
    part = "weights for old log-probs"
    assert host(QWEN25["7B"], SIXTEEN, there)[part] == 0
    assert host(QWEN25["7B"], SIXTEEN, replace(there, apart=True))[part] == copies * 4 * QWEN25["7B"].parameters / 2


def test_the_transformers_rollout_of_a_tiny_model_by_hand():
    """In the update it has nothing; in generation it takes what its rows need, and no share."""
    shape = Shape(hidden=4, layers=2, intermediate=8, heads=2, kv_heads=1, head=2, vocabulary=10, tied=False)
    machines, vllm = Machines(2, 10 * GB), Settings(tokens=100, longest=50, share=0.5)
    settings = replace(vllm, rows=3, prompt=20)
    assert update(shape, machines, settings) == update(shape, machines, vllm)
    cache, reading = 2 * 3 * 50 * 16, 3 * (20 * 2 * (12 * 4 + 4 * 8) + 3 * 20**2)
    assert generation(shape, machines, settings) == {
        "rollout": 2 * 404 + cache + reading,
        "trainer": 12 * 404 / 2,
        "contexts and weight sync": 4 * GB,
    }
    sampling = generation(shape, machines, replace(settings, prompt=1))["rollout"]
    assert sampling == 2 * 404 + cache + 3 * 10 * 24
    assert lacking(shape, machines, replace(settings, share=0.0)) is None  # it has no share to be too small


@pytest.mark.parametrize(
    ("machines", "peak"), [(ONE, 141.1), (EIGHT, 34.5), (SIXTEEN, 26.9)], ids=["one", "eight", "sixteen"]
)
def test_the_update_of_a_7b_is_what_was_added_up_by_hand(machines, peak):
    """By another hand, with flash-attn: 139, 35 and 27."""
    assert total(update(QWEN25["7B"], machines, OURS)) == pytest.approx(peak, abs=0.05)


def test_generation_of_a_7b_on_eight_gpus_is_what_was_added_up_by_hand():
    assert total(generation(QWEN25["7B"], EIGHT, replace(OURS, share=0.7))) == pytest.approx(71.4, abs=0.05)
    assert cache_tokens(QWEN25["7B"], EIGHT, replace(OURS, share=0.7)) // 9216 == 67


# -- what fits --------------------------------------------------------------------------------------------------------

GSM8K = Settings(tokens=1536, longest=1536)  # verl's scripts: prompts of 512, responses of 1024


@pytest.mark.parametrize(
    ("name", "machines", "settings"),
    [
        # docs/perf/device_tuning.rst, examples/tuning
        ("0.5B", ONE, replace(GSM8K, lora_rank=64)),
        ("1.5B", ONE, replace(GSM8K, lora_rank=64)),
        ("3B", ONE, replace(GSM8K, lora_rank=32)),
        ("7B", ONE, replace(GSM8K, lora_rank=32)),
        ("7B", TWO, GSM8K),
        ("14B", TWO, replace(GSM8K, lora_rank=32)),
        ("14B", Machines(4, 80 * GB), GSM8K),
    ],
)
def test_what_verl_has_run_fits(name, machines, settings):
    assert choose(QWEN25[name], machines, settings) is not None


def test_verl_s_script_for_a_7b_on_eight_gpus_fits_as_it_is():
    """examples/grpo_trainer/run_qwen2-7b_seq_balance.sh, with flash-attn and without a fused head."""
    script = Settings(tokens=24000, longest=1536, share=0.6, tensor_parallel=2, fused=False, flash=True)
    assert lacking(QWEN25["7B"], EIGHT, script) is None


@pytest.mark.parametrize(
    ("machines", "in_full", "by_lora"),
    [
        (SMALL, {"0.5B"}, {"0.5B", "1.5B", "3B"}),
        (ONE, {"0.5B", "1.5B", "3B"}, {"0.5B", "1.5B", "3B", "7B"}),
        (TWO, {"0.5B", "1.5B", "3B", "7B"}, set(QWEN25)),
        (EIGHT, set(QWEN25), set(QWEN25)),
        (SIXTEEN, set(QWEN25), set(QWEN25)),
    ],
    ids=["1x24", "1x80", "2x80", "8x80", "2x8x80"],  # a set's own text differs from process to process
)
def test_what_fits_the_machines_of_our_presets(machines, in_full, by_lora):
    for rank, wanted in ((0, in_full), (32, by_lora)):
        found = {name for name, shape in QWEN25.items() if choose(shape, machines, replace(OURS, lora_rank=rank))}
        assert found == wanted


def test_what_costs_least_time_comes_first():
    """A 7B on two GPUs needs all there is to save; on four it does not."""
    two, four = (choose(QWEN25["7B"], Machines(n, 80 * GB), OURS) for n in (2, 4))
    assert (two.tokens, two.offload) == (9216, True)
    assert (four.tokens, four.offload, four.share) == (18432, False, 0.6)


def test_what_is_given_is_kept():
    found = choose(QWEN25["3B"], ONE, OURS, tokens=9216, offload=True, share=0.5)
    assert (found.tokens, found.offload, found.share) == (9216, True, 0.5)
    assert choose(QWEN25["7B"], TWO, OURS, tokens=18432) is None
    assert choose(QWEN25["7B"], TWO, OURS, offload=False) is None


def test_more_never_stops_fitting():
    fits = {}
    for (name, shape), rank in itertools.product(QWEN25.items(), (0, 32)):
        for gpus in (1, 2, 3, 4, 6, 8):
            fits[name, rank, gpus] = choose(shape, Machines(gpus, 80 * GB), replace(OURS, lora_rank=rank)) is not None
            if gpus > 1 and gpus - 1 in (1, 2, 3):
                assert fits[name, rank, gpus] >= fits[name, rank, gpus - 1]
            assert fits[name, 32, gpus] >= fits[name, 0, gpus] if rank else True


@pytest.mark.parametrize(
    ("shape", "machines", "settings", "words"),
    [
        ("7B", ONE, OURS, "the update needs about 141 GB of each GPU's 80 (weights 30.5, gradients 30.5, Adam 60.9, "),
        (
            "3B",
            ONE,
            replace(OURS, share=0.7),
            "generation needs about 97 GB of each GPU's 80 (vLLM 56.0, trainer 37.0, ",
        ),
        (
            "7B",
            EIGHT,
            replace(OURS, share=0.25),
            "vLLM's share of 0.25 has room for 0 tokens beside the weights, and 8 ",
        ),
        (
            "7B",
            replace(TWO, host=100 * GB),
            replace(OURS, tokens=9216, offload=True),
            "the host needs about 122 GB of memory and has 100 (offloaded 91.4, weights that are read 30.5)",
        ),
        (
            "7B",
            replace(TWO, host=128 * GB),
            replace(OURS, tokens=9216, offload=True, reference=True),
            "the host needs about 152 GB of memory and has 128 (offloaded 91.4, KL reference 30.5, weights that are ",
        ),
    ],
)
def test_what_is_lacking_is_said_with_its_sums(shape, machines, settings, words):
    assert lacking(QWEN25[shape], machines, settings).startswith(words)


def test_every_proposal_fits():
    found = list(proposals(QWEN25["7B"], ONE, OURS))
    assert found[0] == "actor_rollout_ref.model.lora_rank=32" and found[-1] == "a model like Qwen2.5-3B"
    assert any(one.startswith("actor_rollout_ref.actor.fsdp_config.offload_policy=true") for one in found)
    assert "2 such GPUs" in found
    assert choose(QWEN25["7B"], ONE, replace(OURS, lora_rank=32)) and choose(QWEN25["3B"], ONE, OURS)
    assert choose(QWEN25["7B"], TWO, OURS) and choose(QWEN25["7B"], ONE, replace(OURS, cpu_adam=True))
    assert not any("offload_policy" in one for one in proposals(QWEN25["7B"], replace(ONE, host=64 * GB), OURS))


def test_the_transformers_rollout_is_told_vllm_or_fewer_trajectories_at_once():
    rows = replace(OURS, rows=1024, prompt=1024)
    assert "generation needs about" in lacking(QWEN25["0.5B"], ONE, rows)
    found = list(proposals(QWEN25["0.5B"], ONE, rows))
    assert found[:2] == ["rollout=vllm", "actor_rollout_ref.rollout.max_num_seqs=128"]
    assert choose(QWEN25["0.5B"], ONE, replace(rows, rows=128)) and not choose(
        QWEN25["0.5B"], ONE, replace(rows, rows=256)
    )
    assert not any("lora_rank" in one for one in found)  # it takes no adapter


def test_where_only_the_host_is_too_small_its_memory_is_proposed():
    small = replace(TWO, host=100 * GB)
    assert choose(QWEN25["7B"], TWO, OURS) and not choose(QWEN25["7B"], small, OURS)
    assert "122 GB of the host's memory instead of 100" in proposals(QWEN25["7B"], small, OURS)
    assert not any("instead of 64" in one for one in proposals(QWEN25["7B"], replace(ONE, host=64 * GB), OURS))


REMEDIES = {"tokens": "without tokens", "offload": "without offload", "share": "without share"}


def test_what_is_given_and_the_only_cause_is_proposed_to_be_left_out():
    """A 7B fits eight GPUs; no share of 0.95 does, whatever else is changed."""
    machines = replace(EIGHT, host=1000 * GB)
    given = {"tokens": None, "offload": None, "share": 0.95}
    assert choose(QWEN25["7B"], machines, OURS) and not choose(QWEN25["7B"], machines, OURS, **given)
    assert list(proposals(QWEN25["7B"], machines, OURS, REMEDIES, **given)) == ["without share"]


def test_every_proposal_fits_with_what_is_given():
    given = {"tokens": None, "offload": False, "share": 0.5}
    for name, shape in QWEN25.items():
        for machines in (ONE, TWO, replace(TWO, host=100 * GB), EIGHT):
            if choose(shape, machines, OURS, **given):
                continue
            found = list(proposals(shape, machines, OURS, REMEDIES, **given))
            lora, cpu_adam = replace(OURS, lora_rank=32), replace(OURS, cpu_adam=True)
            half = replace(OURS, longest=OURS.longest // 2)
            for words, tried in (("lora_rank", lora), ("offload_policy", cpu_adam), ("max_prompt_length", half)):
                assert any(words in one for one in found) == (choose(shape, machines, tried, **given) is not None)
            for key in ("offload", "share"):
                fits = choose(shape, machines, OURS, **{**given, key: None}) is not None
                assert (REMEDIES[key] in found) == fits, (name, machines)
            hosts = [one for one in found if "of the host's memory instead" in one]
            assert all(machines.host and float(one.split()[0]) > machines.host / GB for one in hosts)


def test_where_it_takes_more_than_one_all_that_is_given_is_left_out_together():
    given = {"tokens": None, "offload": False, "share": 0.95}
    assert not any(choose(QWEN25["7B"], TWO, OURS, **{**given, name: None}) for name in given)
    assert next(proposals(QWEN25["7B"], TWO, OURS, REMEDIES, **given)) == "without offload and without share"


def test_the_table_says_the_same():
    lines = table(ONE, OURS).splitlines()
    assert lines[0].startswith("1 x 80 GB") and len(lines) == 1 + 2 * len(QWEN25)
    (seven,) = [line for line in lines if "7B" in line and "in full" in line]
    assert "does not fit" in seven and "136 GB" in seven
    (three,) = [line for line in lines if "-3B" in line and "in full" in line]
    assert "18432" in three and three.endswith("no")
