"""Protects the path from recorded turns to advantages through verl's own `_compute_advantage`, on all its V1 trainers.

Real: the trainers, their `__init__`, the composed config, verl's estimators, padding, rollout correction and KL, and
the containers that TransferQueue hands out. Fake: the queue's server, replaced by a dict. Every expected number comes
from a plain Python loop (`by_hand`), none from the code under test.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import statistics
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composition import compose, names
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager
from verl.trainer.ppo import padding_utils
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
from verl.trainer.ppo.v1 import replay_buffer, trainer_base
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from recipe.gtpo import trainer as glue
from recipe.gtpo.dataset import FILE_ROW
from recipe.gtpo.method.advantage import compare_turns
from recipe.gtpo.method.credit import assign_credit
from recipe.gtpo.method.estimators import turn_values
from recipe.gtpo.method.turns import TRAJECTORY, Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, Turn
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.trainer import GTPOTrainerMixin
from verl_ext.records import Reader, Record

pytestmark = pytest.mark.unit

EOS = 2
TRAINERS = {
    "gtpo_sync": ("sync", ()),
    "gtpo_colocate_async": ("colocate_async", ()),
    "gtpo_separate_async": (
        "separate_async",
        (  # what verl asks of this mode at start-up
            "actor_rollout_ref.rollout.nnodes=1",
            "actor_rollout_ref.rollout.n_gpus_per_node=1",
            "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
            "trainer.v1.separate_async.parameter_sync_step=1",
        ),
    ),
}


# -- a batch in a queue ------------------------------------------------------------------------------------------------


class DictQueue:
    """TransferQueue's two calls over a dict. Values come back in the containers its own storage packs them in."""

    def __init__(self):
        self.rows: dict[str, dict] = {}
        self.tags: dict[str, dict] = {}

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        assert partition_id == "train" and (fields is None or len(fields) == len(keys))
        for name in fields.keys() if fields is not None else ():
            column = fields.get(name)
            values = column.unbind() if isinstance(column, torch.Tensor) else column.tolist()
            for key, value in zip(keys, values, strict=True):
                self.rows.setdefault(key, {})[name] = value
        for key, tag in zip(keys, tags or (), strict=bool(tags)):
            self.tags[key] = tag
        names = sorted(set.union(*(set(self.rows[key]) for key in keys)))
        return KVBatchMeta(list(keys), [self.tags[key] for key in keys], partition_id, names)

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        assert partition_id == "train"
        present = set.intersection(*(set(self.rows[key]) for key in keys))
        names = present if select_fields is None else present & set(select_fields)
        pack = AsyncSimpleStorageManager._pack_field_values
        return TensorDict({n: pack([self.rows[key][n] for key in keys]) for n in sorted(names)}, batch_size=len(keys))

    def column(self, batch, name):
        return {key: self.rows[key][name].tolist() for key in batch.keys}


@pytest.fixture
def queue(monkeypatch):
    queue = DictQueue()
    for module in (glue, trainer_base, padding_utils):
        monkeypatch.setattr(module, "tq", queue)
    return queue


def turn(start, end, code="", broken=None):
    if not code:
        return Turn(start, end, "", broken=broken)
    return Turn(start, end, "", (ToolCall("python", {"code": code}),), (ToolOutcome("ok", "1", 0.0),), broken)


FIRST, ANSWER = FormatReason.FIRST_TURN_NO_CALL, FormatReason.NO_ANSWER
# Turn rewards of each when it shares a group with SOLVED ("a = 1" and "a = 2" share 2 of 4 tokens: 0.5 * 0.5).
SOLVED = Trajectory((turn(0, 3, "a = 1"), turn(5, 7)), Finish.ANSWER, 1.0)  # [0, 1]
FAILED = Trajectory((turn(0, 2, broken=FIRST), turn(2, 4, "a = 2"), turn(6, 9, broken=ANSWER)), Finish.ANSWER, 0.0)
CUT = Trajectory((turn(0, 4, "a = 1"),), Finish.LENGTH, 0.0)  # [0.5]
WRONG = Trajectory((turn(0, 2, broken=FIRST),), Finish.ANSWER, 0.0)  # [-0.1]
BROKEN = Trajectory((turn(0, 1, broken=FIRST), turn(3, 5, "a = 1"), turn(6, 7)), Finish.ANSWER, 1.0)
INFRA = Trajectory((turn(0, 3, "a = 1"), turn(4, 6, "a = 1")), Finish.INFRA, 0.0)
REWARDS = {"SOLVED": [0.0, 1.0], "FAILED": [-0.1, 0.0, 0.25], "CUT": [0.5], "WRONG": [-0.1]}
KINDS = {"SOLVED": SOLVED, "FAILED": FAILED, "CUT": CUT, "WRONG": WRONG, "BROKEN": BROKEN, "INFRA": INFRA}


def put(queue, rows, **changes):
    """Store rows as verl's agent-loop worker does. `rows`: key -> kind; `changes`: key -> other fields."""
    for key, kind in rows.items():
        trajectory = KINDS[kind]
        length = trajectory.turns[-1].end + (kind == "CUT")  # CUT ends with a token that it did not generate
        mask = torch.zeros(length, dtype=torch.int64)
        for t in trajectory.turns:
            mask[t.start : t.end] = 1
        log_probs = -torch.arange(1, length + 1) / 10
        scores = torch.zeros(length)
        scores[-1] = trajectory.acc  # where verl puts the scalar, whatever the mask there
        queue.rows[key] = {
            "uid": key.rsplit("_", 2)[0],
            "session_id": int(key.rsplit("_", 2)[1]),
            "prompts": torch.arange(4),
            "responses": torch.arange(length),
            "input_ids": torch.arange(4 + length),
            "position_ids": torch.arange(4 + length),
            "response_mask": mask,
            "loss_mask": mask,
            "rm_scores": scores,
            "rollout_log_probs": log_probs.clone(),
            "old_log_probs": log_probs.clone(),
            "num_turns": len(trajectory.turns),
            "extra_fields": {TRAJECTORY: json.loads(json.dumps(trajectory.to_dict())), "reward_extra_info": {"acc": 1}},
        } | changes.get(key, {})
        queue.tags[key] = {"status": "success", "min_global_steps": 0, "max_global_steps": 0}
    return KVBatchMeta(list(rows), [queue.tags[key] for key in rows], "train")


#: So that no row of the small batches below counts as missing.
FEW = ("data.train_batch_size=1", "actor_rollout_ref.rollout.n=1", "actor_rollout_ref.actor.ppo_mini_batch_size=1")


def make_trainer(run_dir, *overrides, mode="gtpo_sync"):
    methods = [o for o in overrides if o.startswith("method=")]
    keys = [o for o in overrides if o not in methods]  # applied without hydra, which would take a second
    config = OmegaConf.merge(
        compose(*methods),
        OmegaConf.from_dotlist(
            [*FEW, *keys, *TRAINERS[mode][1], f"trainer.v1.trainer_mode={mode}", f"run_dir={run_dir}"]
        ),
    )
    trainer = get_trainer_cls(mode)(config)
    trainer.global_steps = 1
    return trainer


# -- the reference -----------------------------------------------------------------------------------------------------


def by_hand(rewards, gamma=0.9):
    """key -> turn rewards to key -> (returns, advantages), for pools that are the prompts' groups."""
    returns = {
        k: [sum(gamma ** (m - j) * r[m] for m in range(j, len(r))) for j in range(len(r))] for k, r in rewards.items()
    }
    advantages = {}
    for key in returns:
        pool = [v for k, values in returns.items() if k.rsplit("_", 2)[0] == key.rsplit("_", 2)[0] for v in values]
        spread = statistics.stdev(pool) if len(pool) > 1 else 0.0
        centred = [v - statistics.fmean(pool) if spread > 1e-6 else 0.0 for v in returns[key]]
        advantages[key] = [c / (spread + 1e-6) for c in centred]
    return returns, advantages


def on_tokens(values, rows, lengths):
    """key -> value of each turn to key -> value of each token, 0 outside the turns."""
    tokens = {}
    for key, kind in rows.items():
        tokens[key] = [0.0] * lengths[key]
        for value, t in zip(values.get(key, ()), KINDS[kind].turns, strict=key in values):
            tokens[key][t.start : t.end] = [value] * (t.end - t.start)
    return tokens


def check(queue, batch, rows, kinds=REWARDS, skipped=()):
    """Advantages and returns of the batch are the reference's on generated tokens and exactly 0 elsewhere."""
    lengths = {key: len(queue.rows[key]["responses"]) for key in rows}
    returns, advantages = by_hand({key: kinds[kind] for key, kind in rows.items() if key not in skipped})
    for name, values in (("returns", returns), ("advantages", advantages)):
        stored = queue.column(batch, name)
        for key, expected in on_tokens(values, rows, lengths).items():
            assert stored[key] == pytest.approx(expected, abs=1e-5), (name, key)
            assert all(v == 0 for v, e in zip(stored[key], expected, strict=True) if e == 0), (name, key)
    return advantages


TWO_GROUPS = {"p_0_0": "SOLVED", "p_1_0": "FAILED", "q_0_0": "CUT", "q_1_0": "SOLVED", "q_2_0": "WRONG"}


@pytest.mark.parametrize("mode", TRAINERS)
def test_advantages_are_the_methods_on_generated_tokens_and_zero_elsewhere(queue, tmp_path, mode):
    batch = put(queue, TWO_GROUPS)
    trainer = make_trainer(tmp_path, mode=mode)
    metrics: dict = {}
    result = trainer._compute_advantage(batch, metrics)
    assert result.keys == batch.keys
    check(queue, batch, TWO_GROUPS)
    assert metrics["gtpo/acc/mean"] == pytest.approx(2 / 5) and metrics["gtpo/rows/valid_total"] == 5
    assert metrics["gtpo/log_prob_gap/mean"] == 0.0


def test_every_turn_reward_lies_on_the_last_token_of_its_turn(queue, tmp_path):
    batch = put(queue, TWO_GROUPS)
    make_trainer(tmp_path)._compute_advantage(batch, {})
    scores = queue.column(batch, "rm_scores")
    assert scores["p_0_0"] == [0, 0, 0, 0, 0, 0, 1]
    assert scores["p_1_0"] == pytest.approx([0, -0.1, 0, 0, 0, 0, 0, 0, 0.25])
    assert scores["q_0_0"] == [0, 0, 0, 0.5, 0]  # not on the last response token, which the policy did not write


@pytest.mark.parametrize("mode", TRAINERS)
def test_verl_sees_its_own_name_of_the_trainer_mode(tmp_path, mode):
    trainer = make_trainer(tmp_path, mode=mode)
    assert trainer.trainer_mode == trainer.config.trainer.v1.trainer_mode == TRAINERS[mode][0]
    assert isinstance(trainer, get_trainer_cls(TRAINERS[mode][0]))
    assert trainer.replay_buffer.poll_interval == glue.POLL_SECONDS


# -- rows that are not whole trajectories of the batch -----------------------------------------------------------------


def test_padding_rows_change_nothing_and_get_nothing(queue, tmp_path):
    """verl's padding rows carry a copy of the first row's record under a uid of their own."""
    rows = {"p_0_0": "SOLVED", "p_1_0": "FAILED", "q_0_0": "CUT"}
    batch = put(queue, rows)
    make_trainer(tmp_path)._compute_advantage(batch, {})
    alone = queue.column(batch, "advantages")

    batch = padding_utils.upsample_batch_to_divisible_size(put(queue, rows), 4, EOS)
    padding = batch.keys[3]
    assert padding.startswith("pad") and TRAJECTORY in queue.rows[padding]["extra_fields"]
    metrics: dict = {}
    make_trainer(tmp_path)._compute_advantage(batch, metrics)
    padded = queue.column(batch, "advantages")
    assert {key: padded[key] for key in rows} == alone
    assert padded[padding] == [0.0] and queue.rows[padding]["rm_scores"].tolist() == [0.0]
    assert metrics["gtpo/rows/valid_total"] == 3


BY_STATE = ["gtpo_state", "gtpo_bootstrap", "gtpo_within_state"]
METHODS = ["gtpo", *BY_STATE, *(name for name in names("method") if not name.startswith("gtpo"))]


@pytest.mark.parametrize("method", METHODS)
def test_an_infra_row_leaves_the_loss_and_its_group(queue, tmp_path, method):
    rows = {"p_0_0": "SOLVED", "p_1_0": "FAILED", "p_3_0": "WRONG"}
    batch = put(queue, rows)
    make_trainer(tmp_path, f"method={method}")._compute_advantage(batch, {})
    without = queue.column(batch, "advantages")
    assert any(without["p_0_0"])

    batch = put(queue, {"p_0_0": "SOLVED", "p_1_0": "FAILED", "p_2_0": "INFRA", "p_3_0": "WRONG"})
    metrics: dict = {}
    make_trainer(tmp_path, f"method={method}")._compute_advantage(batch, metrics)
    with_it = queue.column(batch, "advantages")
    assert {key: with_it[key] for key in rows} == without  # as if it were absent, to the last bit
    assert with_it["p_2_0"] == [0.0] * 6
    dropped = queue.rows["p_2_0"]
    assert dropped["uid"] == "dropped-p_2_0"
    assert dropped["response_mask"].tolist() == dropped["loss_mask"].tolist() == [0] * 6
    for key, kind in rows.items():
        mask = [int(any(t.start <= i < t.end for t in KINDS[kind].turns)) for i in range(KINDS[kind].turns[-1].end)]
        assert queue.rows[key]["response_mask"].tolist() == queue.rows[key]["loss_mask"].tolist() == mask
        assert queue.rows[key]["uid"] == "p"
    assert metrics["gtpo/rows/infra_total"] == metrics["gtpo/rows/dropped_total"] == 1


def test_cut_rows_are_dropped_when_the_option_says_so(queue, tmp_path):
    rows = {"p_0_0": "SOLVED", "p_1_0": "FAILED", "p_2_0": "CUT"}
    batch = put(queue, rows)
    make_trainer(tmp_path, "algorithm.gtpo.truncated=drop")._compute_advantage(batch, {})
    check(queue, batch, rows, skipped=["p_2_0"])
    assert queue.rows["p_2_0"]["loss_mask"].tolist() == [0] * 5


@pytest.mark.parametrize(
    ("kinds", "cause"),
    [
        (["CUT", "CUT"], r"2 of 2 hit data.max_response_length .*truncated=drop leaves these out: raise the limit"),
        (["CUT", "INFRA"], r"the tool server failed 1 of 2; 1 of 2 hit data.max_response_length"),
        (["INFRA", "INFRA"], r"the tool server failed 2 of 2$"),
    ],
)
def test_a_step_of_which_nothing_is_left_ends_the_run_with_what_took_it(queue, tmp_path, kinds, cause):
    """Where limits took all, it used to blame the tool server."""
    batch = put(queue, {f"p_{i}_0": kind for i, kind in enumerate(kinds)})
    trainer = make_trainer(tmp_path, "algorithm.gtpo.truncated=drop", "max_dropped_share=1")
    with pytest.raises(RuntimeError, match=rf"no trajectory of this step can be trained on: {cause}"):
        trainer._compute_advantage(batch, {})


def test_groups_may_be_ragged_and_rows_in_any_order(queue, tmp_path):
    """Failed sessions leave their siblings behind, and balancing reorders the rows."""
    rows = {
        "q_2_0": "WRONG",
        "p_1_0": "FAILED",
        "r_0_0": "SOLVED",
        "q_0_0": "CUT",
        "p_0_0": "SOLVED",
        "q_1_0": "SOLVED",
    }
    batch = put(queue, rows)
    make_trainer(tmp_path)._compute_advantage(batch, {})
    check(queue, batch, rows)


def test_a_group_of_one_turn_gets_exactly_zero(queue, tmp_path):
    batch = put(queue, TWO_GROUPS | {"r_0_0": "WRONG"})
    make_trainer(tmp_path)._compute_advantage(batch, {})
    assert queue.column(batch, "advantages")["r_0_0"] == [0.0, 0.0]


def test_a_session_with_several_outputs_is_refused_by_row(queue, tmp_path):
    batch = put(queue, {"p_0_0": "SOLVED", "p_1_0": "SOLVED", "p_1_1": "SOLVED"})
    with pytest.raises(ValueError, match="row p_1_1: this agent loop returns several outputs a session"):
        make_trainer(tmp_path)._compute_advantage(batch, {})


def test_a_row_without_a_record_is_refused_by_row_and_told_the_remedy(queue, tmp_path):
    batch = put(queue, TWO_GROUPS, q_0_0={"extra_fields": {"reward_extra_info": {}}})
    with pytest.raises(ValueError, match=r"row q_0_0 has no recorded turns: set rollout\.agent\.default_agent_loop"):
        make_trainer(tmp_path)._compute_advantage(batch, {})


def test_a_record_of_another_row_is_refused(queue, tmp_path):
    batch = put(queue, TWO_GROUPS, q_0_0={"extra_fields": {TRAJECTORY: FAILED.to_dict()}})
    with pytest.raises(ValueError, match="row 2: turn 2 ends at token 9 of a response of 5 tokens"):
        make_trainer(tmp_path)._compute_advantage(batch, {})


# -- verl's other parts of the same step -------------------------------------------------------------------------------


def test_rollout_correction_rejects_tokens_and_turns_stay_whole(queue, tmp_path):
    """verl zeroes the mask of a token in the middle of a turn: read off that mask, the turn would be two."""
    batch = put(queue, TWO_GROUPS)
    queue.rows["p_0_0"]["old_log_probs"][1] -= 5.0
    overrides = (
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold=0.5_2.0",
    )
    metrics: dict = {}
    trainer = make_trainer(tmp_path, *overrides)
    trainer._compute_advantage(batch, metrics)
    trainer._writer.wait()
    assert [[turn.masked for turn in record.turns] for record in Reader(tmp_path).read(1)][:2] == [[1, 0], [0, 0, 0]]
    assert queue.rows["p_0_0"]["response_mask"].tolist() == [1, 0, 1, 0, 0, 1, 1]  # verl did reject it
    stored = queue.column(batch, "advantages")
    _, advantages = by_hand({key: REWARDS[kind] for key, kind in TWO_GROUPS.items()})
    first, last = advantages["p_0_0"]
    assert stored["p_0_0"] == pytest.approx([first, 0, first, 0, 0, last, last], abs=1e-5)
    assert stored["p_0_0"][1] == 0.0
    for key in ("p_1_0", "q_0_0", "q_1_0", "q_2_0"):
        expected = on_tokens(advantages, {key: TWO_GROUPS[key]}, {key: len(stored[key])})[key]
        assert stored[key] == pytest.approx(expected, abs=1e-5)
    assert metrics["gtpo/log_prob_gap/mean"] == pytest.approx(
        5 / sum(sum(t.end - t.start for t in KINDS[k].turns) for k in TWO_GROUPS.values())
    )


#: Of a trajectory, by `algorithm.gtpo.trajectory_reward`, without shaping. BROKEN is right, with a turn that is not.
ONE_REWARD = {
    "sum": {"SOLVED": 1.0, "FAILED": -0.1, "CUT": 0.0, "WRONG": -0.1, "BROKEN": 0.9},
    "min": {"SOLVED": 1.0, "FAILED": 0.0, "CUT": 0.0, "WRONG": 0.0, "BROKEN": 0.0},
    "outcome": {"SOLVED": 1.0, "FAILED": 0.0, "CUT": 0.0, "WRONG": 0.0, "BROKEN": 1.0},
}
WITH_BROKEN = TWO_GROUPS | {"p_2_0": "BROKEN", "q_3_0": "BROKEN"}


@pytest.mark.parametrize(
    ("method", "reward"),
    [("grpo", "min"), ("grpo_outcome", "outcome"), ("grpo_sum", "sum"), ("dr_grpo", "outcome"), ("dr_grpo_sum", "sum")],
)
def test_a_rival_is_verls_own_estimator_on_the_reward_that_its_name_says(queue, tmp_path, method, reward):
    batch = put(queue, WITH_BROKEN)
    make_trainer(tmp_path, f"method={method}")._compute_advantage(batch, {})
    masks = torch.nn.utils.rnn.pad_sequence([queue.rows[key]["response_mask"] for key in batch.keys], batch_first=True)
    rewards = torch.zeros(masks.shape)
    rewards[:, 0] = torch.tensor([ONE_REWARD[reward][kind] for kind in WITH_BROKEN.values()])
    uids = np.array([key.split("_")[0] for key in batch.keys], dtype=object)
    expected, _ = compute_grpo_outcome_advantage(
        rewards, masks, uids, norm_adv_by_std_in_grpo=not method.startswith("dr")
    )
    stored = queue.column(batch, "advantages")
    for i, key in enumerate(batch.keys):
        assert stored[key] == pytest.approx(expected[i, : len(stored[key])].tolist(), abs=1e-6)
        assert any(stored[key])


def check_both_engines(queue, trainer, rows):
    """A method's advantages, which the engines take from two places: verl's registry and `estimators.turn_values`."""
    batch = put(queue, rows)
    metrics: dict = {}
    trainer._compute_advantage(batch, metrics)
    stored = queue.column(batch, "advantages")
    algorithm = trainer.config.algorithm
    credit = assign_credit([KINDS[kind] for kind in rows.values()], [key[0] for key in rows], trainer.options)
    returns, expected = turn_values(
        algorithm.adv_estimator, credit, trainer.options, divide=algorithm.norm_adv_by_std_in_grpo
    )
    assert expected.any()
    assert metrics["gtpo/return/mean"] == pytest.approx(float(returns[credit.turn_mask].mean()), abs=1e-6)
    for i, (key, kind) in enumerate(rows.items()):
        for k, turn in enumerate(KINDS[kind].turns):
            of_turn = 0.0 if credit.dropped[i] else float(expected[i, k])
            assert stored[key][turn.start : turn.end] == pytest.approx([of_turn] * (turn.end - turn.start), abs=1e-5)
    return stored


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_pytorch_engine_computes_what_verls_trainer_does(queue, tmp_path, method):
    """Also beside a group that all solved, and where the tool server failed one row and a limit cut another."""
    trainer = make_trainer(tmp_path, f"method={method}")
    check_both_engines(queue, trainer, WITH_BROKEN)
    trainer.options = replace(trainer.options, truncated="drop")
    flat = {"p_0_0": "SOLVED", "p_1_0": "SOLVED"}
    lossy = {"q_0_0": "SOLVED", "q_1_0": "INFRA", "q_2_0": "FAILED", "q_3_0": "CUT", "q_4_0": "BROKEN"}
    stored = check_both_engines(queue, trainer, flat | lossy)
    assert not any(stored["q_1_0"]) and not any(stored["q_3_0"])
    if trainer.config.algorithm.adv_estimator in ("grpo", "rloo", "mt_grpo"):  # which compare a prompt's trajectories
        assert not any(stored["p_0_0"]) and not any(stored["p_1_0"])


@pytest.mark.parametrize(
    ("method", "passed_on"),
    [("grpo", 1.0), ("dr_grpo", 1.0), ("rloo", 1.0), ("mt_grpo", 0.0), ("gigpo", 0.0), ("gtpo_state", 0.0)],
)
def test_verls_own_functions_pass_the_score_of_a_lone_row_on_and_ours_are_silent(queue, tmp_path, method, passed_on):
    rows = {"p_0_0": "SOLVED", "p_1_0": "FAILED", "r_0_0": "SOLVED"}
    batch = put(queue, rows)
    trainer = make_trainer(tmp_path, f"method={method}")
    trainer._compute_advantage(batch, {})
    generated = [v for t in SOLVED.turns for v in queue.column(batch, "advantages")["r_0_0"][t.start : t.end]]
    assert generated == pytest.approx([passed_on] * len(generated), abs=1e-5)
    credit = assign_credit([KINDS[kind] for kind in rows.values()], ["p", "p", "r"], trainer.options)
    algorithm = trainer.config.algorithm
    found = turn_values(algorithm.adv_estimator, credit, trainer.options, divide=algorithm.norm_adv_by_std_in_grpo)[1]
    assert found[0].any() and not found[2].any()


@pytest.mark.parametrize("estimator", ["mt_grpo", "gigpo", "recorded_gdpo"])
def test_a_rival_of_ours_outside_our_trainer_is_told_what_it_needs(estimator):
    with pytest.raises(ValueError, match=f"adv_estimator={estimator} needs recorded turns: run it with recipe.gtpo's"):
        get_adv_estimator_fn(estimator)(torch.zeros(1, 2), torch.ones(1, 2), index=["p"], config={})


@pytest.mark.parametrize("options", [{"baseline": "state"}, {"bootstrap": 1.0}])
def test_credit_by_state_outside_our_trainer_is_told_what_it_needs(options):
    with pytest.raises(ValueError, match="baseline=state and bootstrap need recorded tool outputs: run it with recipe"):
        get_adv_estimator_fn("gtpo")(torch.zeros(1, 2), torch.ones(1, 2), index=["p"], config={"gtpo": options})


def test_a_sampler_that_stores_no_log_probs_is_fine(queue, tmp_path):
    batch = put(queue, TWO_GROUPS)
    for key in batch.keys:
        del queue.rows[key]["rollout_log_probs"]
    metrics: dict = {}
    make_trainer(tmp_path)._compute_advantage(batch, metrics)
    check(queue, batch, TWO_GROUPS)
    assert "gtpo/log_prob_gap/mean" not in metrics


# -- record ------------------------------------------------------------------------------------------------------------


def test_every_training_trajectory_is_written_with_its_rewards_and_advantages(queue, tmp_path):
    rows = {"p_0_0": "SOLVED", "p_1_0": "FAILED", "p_2_0": "INFRA"}
    batch = padding_utils.upsample_batch_to_divisible_size(put(queue, rows), 4, EOS)
    trainer = make_trainer(tmp_path)
    trainer.global_steps = 6
    trainer._compute_advantage(batch, {})
    trainer._writer.wait()
    lines = [json.loads(line) for line in (tmp_path / "trajectories" / "6.jsonl").read_text().splitlines()]
    assert len(lines) == 3  # the padding row is nobody's trajectory
    returns, advantages = by_hand({"p_0_0": REWARDS["SOLVED"], "p_1_0": REWARDS["FAILED"]})
    for line, (key, kind) in zip(lines, rows.items(), strict=True):
        record = Record.model_validate(line)
        assert set(line) | {"shaped", "partners"} == set(Record.model_fields)  # nothing that the schema has not
        assert (record.version, record.step, record.split, record.group) == (1, 6, "train", "p")
        assert record.dropped == (kind == "INFRA") and record.session == int(key[2])
        known = KINDS[kind]  # and the weights, as its tag has them
        assert Trajectory.from_dict(line) == replace(
            known, turns=tuple(replace(turn, weights=(0, 0)) for turn in known.turns)
        )
        numbers = [(turn.reward, turn.return_, turn.advantage) for turn in record.turns]
        if record.dropped:  # never assigned, which is not 0
            assert {number for turn in numbers for number in turn} == {None}
            continue
        for known, expected in zip(
            zip(*numbers, strict=True), (REWARDS[kind], returns[key], advantages[key]), strict=True
        ):
            assert known == pytest.approx(expected, abs=1e-5)
        for k, turn in enumerate(record.turns):
            assert sum(turn.rewards.values()) == pytest.approx(turn.reward)
            assert turn.advantage == pytest.approx((turn.return_ - turn.pool_mean) / turn.divisor)
            assert turn.token_ids == list(range(turn.start, turn.end))  # what `put` has as responses
            assert turn.log_prob == pytest.approx(-sum(range(turn.start + 1, turn.end + 1)) / 10 / len(turn.token_ids))
            assert turn.log_prob_gap == 0.0 and turn.log_prob_gaps == [0.0] * len(turn.token_ids), k
    solved, failed, _ = lines
    assert failed["partners"] == [{"session": 0, "similarity": 0.5}] and failed["shaped"] == 0.25
    assert solved["partners"] == [] and solved["shaped"] == 1.0


@pytest.mark.parametrize("place", [{"index": 7}, {"index": 5, FILE_ROW: 7}])  # the first: a data set of one's own
def test_a_record_says_where_its_row_comes_from(queue, tmp_path, place):
    asked = [{"role": "user", "content": "1?"}]
    row = {"raw_prompt": asked, "reward_model": {"ground_truth": "1"}, "data_source": "mine"} | place
    batch = put(queue, {"p_0_0": "SOLVED", "p_1_0": "WRONG"}, p_0_0=row, p_1_0=row)
    queue.tags["p_0_0"].update(min_global_steps=3, max_global_steps=4)
    trainer = make_trainer(tmp_path)
    trainer._compute_advantage(batch, {})
    trainer._writer.wait()
    record, other = Reader(tmp_path).read(1)
    assert [turn.weights for turn in record.turns] == [None, None]  # of a turn alone nothing was said
    assert other.weights == [0, 0] and [turn.weights for turn in other.turns] == [[0, 0]]  # here it follows
    assert [message.model_dump() for message in record.prompt] == asked
    assert (record.gold, record.data_source, record.index, record.weights, record.seed) == ("1", "mine", 7, [3, 4], 1)


@pytest.mark.parametrize("options", [("baseline=turn",), ("baseline=state", "bootstrap=0.5", "leave_one_out=true")])
def test_the_numbers_of_a_record_can_be_computed_from_it(queue, tmp_path, options):
    """Rewards to returns, and returns to pool and advantage, by the method's own functions and the run's options."""
    own = [f"algorithm.gtpo.{option}" for option in (*options, "scale=batch_std")]
    trainer = make_trainer(tmp_path, *own)
    trainer._compute_advantage(put(queue, TWO_GROUPS), {})
    trainer._writer.wait()
    records = list(Reader(tmp_path).read(1))
    width = max(len(record.turns) for record in records)
    mask = torch.tensor([[k < len(record.turns) for k in range(width)] for record in records])

    def column(name):
        return torch.tensor(
            [[getattr(turn, name) for turn in r.turns] + [0.0] * (width - len(r.turns)) for r in records]
        )

    groups, solved = [r.group for r in records], torch.tensor([r.acc == 1 for r in records])
    states, known = torch.full(mask.shape, -1), {}
    for i, record in enumerate(records):
        said = [tuple((o.outcome, o.output.strip()) for o in turn.outcomes) for turn in record.turns]
        for k in range(len(said)):
            states[i, k] = known.setdefault((record.group, *said[:k]), len(known))
    returns, compared = compare_turns(column("reward"), mask, groups, trainer.options, solved, states)
    assert torch.equal(returns, column("return_"))
    for name, field in (("advantage",) * 2, ("pool_mean", "mean"), ("pool_std", "std"), ("divisor",) * 2):
        assert torch.equal(getattr(compared, field), column(name)), name


def test_a_validation_is_recorded_without_numbers(queue, tmp_path):
    trainer = make_trainer(tmp_path)
    batch = put(queue, {"p_0_0": "SOLVED", "q_0_0": "CUT"})
    for more in (False, True):  # the data may come in several batches
        trainer._validated = more
        trainer._record_validation(batch)
    trainer._writer.wait()
    records = list(Reader(tmp_path).read(1, "validation"))
    assert [record.group for record in records] == ["p", "q", "p", "q"] and records[0].acc == 1.0
    assert {turn.advantage for record in records for turn in record.turns} == {None}


@pytest.mark.parametrize(("of_line", "kept"), [("val-core/mine/acc/mean@1", 1.0), ("gtpo/acc/mean", 0.0)])
def test_a_run_that_goes_on_keeps_the_validation_whose_numbers_its_step_has(queue, tmp_path, of_line, kept):
    """verl validates a checkpoint again; a step that died before it had such numbers gets those of the second time."""
    for kind in ("SOLVED", "CUT"):
        trainer = make_trainer(tmp_path)
        trainer.global_steps = trainer._loaded_step = 4
        for group in ("p", "q"):  # the data may come in several batches
            trainer._record_validation(put(queue, {f"{group}_0_0": kind}))
        trainer._writer.wait()
        trainer.record.complete(4, {of_line: 1.0})
    assert [record.acc for record in Reader(tmp_path).read(4, "validation")] == [kept, kept]


def test_rows_of_a_validation_pass_the_record_on_their_way(queue, tmp_path, monkeypatch):
    """verl clears them when it has validated."""
    batch = put(queue, {"p_0_0": "SOLVED"})
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, global_steps, partition_id, batch_size: (batch, {}))
    trainer = make_trainer(tmp_path)
    for partition in ("train", "val"):
        assert trainer.replay_buffer.sample(global_steps=1, partition_id=partition, batch_size=1) == (batch, {})
    trainer._writer.wait()
    assert Reader(tmp_path).steps("validation") == [1] and Reader(tmp_path).steps() == []


def test_while_a_rollout_goes_on_its_prompts_are_counted(tmp_path, monkeypatch):
    """Also breaks when verl no longer waits in ReplayBuffer._wait_for_next_poll."""
    trainer, seen = make_trainer(tmp_path), []
    monkeypatch.setattr(glue, "SAY_SECONDS", 0.0)
    monkeypatch.setattr(trainer.replay_buffer, "poll_interval", 0.0)
    looks = iter(["running pending pending", "finished pending running", "finished failure running", "finished " * 3])

    def prompts() -> dict[str, dict]:
        seen.append(RunRecord(tmp_path).read_rollout())  # as the look before has left it
        tags = zip("abc", next(looks).split(), strict=True)
        return {"val": {uid: {"is_prompt": True, "global_steps": 3, "status": word} for uid, word in tags}}

    monkeypatch.setattr(replay_buffer.tq, "kv_list", prompts)
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **kwargs: None)
    monkeypatch.setattr(trainer, "_record_validation", lambda batch: None)
    trainer.replay_buffer.sample(global_steps=3, partition_id="val", batch_size=3)
    seen.append(RunRecord(tmp_path).read_rollout())
    assert [one["done"] for one in seen] == [0, 0, 1, 2, 3]
    assert {(one["step"], one["split"], one["of"]) for one in seen} == {(3, "validation", 3)}


def test_trajectories_are_written_every_so_many_steps(queue, tmp_path):
    trainer = make_trainer(tmp_path, "trajectory_freq=2")
    for step in (1, 2, 3, 4):
        trainer.global_steps = step
        trainer._compute_advantage(put(queue, TWO_GROUPS), {})
    trainer._writer.wait()
    assert sorted(path.name for path in (tmp_path / "trajectories").iterdir()) == ["2.jsonl", "4.jsonl"]


def test_a_step_of_several_updates_records_the_trajectories_of_all(queue, tmp_path):
    trainer = make_trainer(tmp_path, mode="gtpo_separate_async")
    for attempt in range(2):  # the step is done again after a resume
        for trainer.local_trigger_step, rows in enumerate([{"p_0_0": "SOLVED", "p_1_0": "FAILED"}, {"q_0_0": "CUT"}]):
            trainer._compute_advantage(put(queue, rows), {})
        trainer._writer.wait()
        lines = RunRecord(tmp_path).read_trajectories(1)
        assert [(line["group"], line["update"]) for line in lines] == [("p", 0), ("p", 0), ("q", 1)], attempt


def test_the_seconds_of_credit_are_those_of_all_updates_of_a_step(queue, tmp_path, monkeypatch):
    """verl takes the mean over a step's updates of what it does not know to be a sum."""
    clock = iter(range(1000))
    monkeypatch.setattr(glue, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    trainer = make_trainer(tmp_path, mode="gtpo_separate_async")
    trainer.prepare_step = lambda: None

    def update(metrics, timing_raw, size):
        prompt = "pq"[trainer.local_trigger_step]
        return trainer._compute_advantage(put(queue, {f"{prompt}_0_0": "SOLVED", f"{prompt}_1_0": "FAILED"}), metrics)

    trainer._step_once = update
    spent = {}
    for trainer.parameter_sync_step in (1, 2, 1):
        trainer.config.data.train_batch_size = trainer.parameter_sync_step
        trainer.step(metrics := {}, {})
        spent.setdefault(trainer.parameter_sync_step, []).append(metrics["gtpo/credit_seconds"])
    assert spent == {1: [2.0, 2.0], 2: [4.0]}  # two readings of the clock a part, two parts an update


def test_a_steps_metrics_are_written_with_verls_own(queue, tmp_path):
    batch = put(queue, TWO_GROUPS)
    trainer = make_trainer(tmp_path)
    trainer.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: 1)  # verl asks it for the throughput only
    metrics: dict = {}
    trainer._compute_advantage(batch, metrics)
    metrics["gtpo/credit_seconds"] = 0.5
    trainer._compute_metrics(batch, metrics, {"step": 10.0, "gen": 4.0}, global_steps=3, epoch=0)
    (line,) = RunRecord(tmp_path).read_metrics()
    assert line["step"] == 3
    assert line["metrics"]["gtpo/credit_share_of_step"] == 0.05
    assert line["metrics"]["training/global_step"] == 3 and line["metrics"]["timing_s/gen"] == 4.0
    assert line["metrics"]["gtpo/acc/mean"] == pytest.approx(0.4)


@pytest.mark.parametrize("determinism", [True, False])
def test_rows_of_a_reproducible_run_are_in_the_datas_order(queue, tmp_path, determinism):
    """Prompt by prompt, rollout by rollout; tokens and tags stay with their row."""

    class Balancing(PPOTrainerSync):  # verl's own asks the workers how many they are
        def _balance_batch(self, batch, metrics):
            return batch

    class Trainer(GTPOTrainerMixin, Balancing):
        base_mode = "sync"

    came = {"u_1_0": 7, "v_0_0": 12, "w_2_0": 3, "u_0_0": 7}
    batch = put(queue, dict.fromkeys(came, "SOLVED"), **{key: {"index": index} for key, index in came.items()})
    for key, tag in zip(batch.keys, batch.tags, strict=True):
        tag["key"] = key
    config = compose()
    config.run_dir = str(tmp_path)
    config.actor_rollout_ref.rollout.full_determinism = determinism
    batch = Trainer(config)._balance_batch(batch, metrics={})
    assert batch.keys == (["w_2_0", "u_0_0", "u_1_0", "v_0_0"] if determinism else list(came))
    assert [tag["key"] for tag in batch.tags] == batch.keys


def test_rows_that_are_too_long_are_counted_and_must_leave_a_batch(tmp_path):
    class Rows(list):
        too_long = 3

    class Loading(PPOTrainerSync):  # verl's own reads files
        def _init_dataloader(self):
            self.train_dataset, self.val_dataset = Rows([0] * 7), [0] * 2  # one of a class of the user's own
            self.steps_per_epoch = 7 // self.config.data.train_batch_size

    class Trainer(GTPOTrainerMixin, Loading):
        base_mode = "sync"

    config = compose()
    config.run_dir, config.data.train_batch_size = str(tmp_path), 4
    trainer = Trainer(config)
    trainer._init_dataloader()
    assert trainer._too_long == {"gtpo/data/too_long_total": 3.0, "gtpo/validation/too_long_total": 0.0}
    config.data.train_batch_size = 8
    with pytest.raises(
        ValueError, match=r"7 training rows are left .* fewer than one batch of data.train_batch_size=8"
    ):
        trainer._init_dataloader()


def test_validation_before_training_is_step_zero_and_later_ones_are_not_written_twice(tmp_path):
    class Validated(PPOTrainerSync):  # verl's own needs a cluster
        def _validate(self):
            return {"val-core/arithmetic/acc/mean@2": 0.25}

    class Trainer(GTPOTrainerMixin, Validated):
        base_mode = "sync"

    config = compose()
    config.run_dir = str(tmp_path)
    trainer = Trainer(config)
    for step in (0, 5):
        trainer.global_steps = step
        assert trainer._validate() == {"val-core/arithmetic/acc/mean@2": 0.25}
    assert RunRecord(tmp_path).read_metrics() == [{"step": 0, "metrics": {"val-core/arithmetic/acc/mean@2": 0.25}}]


def test_the_options_of_the_config_are_the_trainers(tmp_path):
    trainer = make_trainer(tmp_path, "algorithm.gtpo.baseline=turn", "algorithm.gtpo.shaping.alpha=0.25")
    assert trainer.options.baseline == "turn" and trainer.options.shaping.alpha == 0.25
    assert asdict(trainer.options)["gamma"] == 0.9
    assert make_trainer(tmp_path, "method=gtpo_no_shaping").similarity is None


def test_a_validation_in_which_every_rollout_failed_says_where_to_look(monkeypatch):
    """verl leaves failed rollouts out and asks TransferQueue for nothing, which it refuses in its own words."""
    from transfer_queue.client import AsyncTransferQueueClient

    def every_rollout_failed(self):
        client = object.__new__(AsyncTransferQueueClient)
        retrieve = inspect.unwrap(AsyncTransferQueueClient.async_kv_retrieve_meta)  # the words are TransferQueue's
        asyncio.run(retrieve(client, keys=[], partition_id="val"))

    monkeypatch.setattr(trainer_base.PPOTrainer, "_validate", every_rollout_failed)
    trainer = object.__new__(glue.GTPOTrainerSync)
    with pytest.raises(RuntimeError, match="every validation rollout failed; the run's logs say why"):
        trainer._validate()


# -- nothing is lost in silence ----------------------------------------------------------------------------------------


def lost(fault="row 3 of mine: the reward function raised ValueError: x"):
    return {"extra_fields": {TRAJECTORY: Trajectory((), Finish.FAULT, 0.0, fault=fault).to_dict()}}


def test_the_first_lost_trajectory_ends_the_run_with_its_row_and_cause(queue, tmp_path):
    trainer = make_trainer(tmp_path)
    batch = put(queue, TWO_GROUPS, q_0_0=lost())
    with pytest.raises(
        RuntimeError, match=r"1 trajectories are lost in step 1, 1 in this run .*: row 3 of mine: the rew"
    ):
        trainer._compute_advantage(batch, {})


def test_lost_trajectories_up_to_the_limit_are_counted_and_leave_the_update(queue, tmp_path):
    trainer = make_trainer(tmp_path, "max_lost_trajectories=2")
    metrics = {}
    batch = trainer._compute_advantage(put(queue, TWO_GROUPS, q_0_0=lost()), metrics)
    assert metrics["gtpo/rows/lost_total"] == 1.0 and metrics["gtpo/rows/dropped_total"] == 1.0
    assert set(queue.column(batch, "advantages")["q_0_0"]) == {0.0}
    trainer._compute_advantage(put(queue, TWO_GROUPS, q_0_0=lost()), {})
    with pytest.raises(RuntimeError, match="3 in this run"):
        trainer._compute_advantage(put(queue, TWO_GROUPS, q_0_0=lost()), {})


def test_a_trajectory_that_never_reached_the_batch_is_missed(queue, tmp_path):
    trainer = make_trainer(tmp_path, f"actor_rollout_ref.rollout.n={len(TWO_GROUPS) + 2}")
    with pytest.raises(
        RuntimeError, match=r"2 trajectories are lost in step 1, 2 in this run .*missing from the batch"
    ):
        trainer._compute_advantage(put(queue, TWO_GROUPS), {})


def test_a_step_that_the_tool_server_mostly_failed_ends_the_run_with_what_the_tool_said(queue, tmp_path):
    failed = Trajectory(
        (Turn(0, 3, "", (ToolCall("python", {}),), (ToolOutcome("infra", "Error: 401 wrong token", 0.0),)),),
        Finish.INFRA,
        0.0,
    ).to_dict()
    rows = {"p_0_0": "SOLVED", "p_1_0": "INFRA", "p_2_0": "INFRA"}
    changes = {key: {"extra_fields": {TRAJECTORY: failed}} for key in ("p_1_0", "p_2_0")}
    with pytest.raises(RuntimeError, match=r"67% of the trajectories of step 1 .*: Error: 401 wrong token"):
        make_trainer(tmp_path)._compute_advantage(put(queue, rows, **changes), {})
    make_trainer(tmp_path, "max_dropped_share=0.7")._compute_advantage(put(queue, rows, **changes), {})


def test_a_validation_says_over_how_many_rows_its_means_are(queue, tmp_path):
    trainer = make_trainer(tmp_path, "max_lost_trajectories=2", "max_dropped_share=1")
    infos = {"reward": [1.0, 0.0], "acc": [1.0, 0.0], "fault": ["", "row 1 of mine: KeyError: x"]}
    counts = {("mine", "a"): 1, ("mine", "b"): 1, ("mine", "c"): 1}
    metrics = trainer._val_metrics_update(["mine"] * 2, ["a", "b"], infos, [2, 2], expected_acc_counts=counts)
    assert metrics["gtpo/validation/rows"] == 1.0 and metrics["gtpo/validation/lost"] == 2.0
    assert metrics["val-core/mine/acc/mean@1"] == 1.0  # neither the fault nor what is missing counts as wrong
    again = {"reward": [0.0], "acc": [0.0], "fault": ["row 1 of mine: KeyError: x"]}
    with pytest.raises(RuntimeError, match=r"lost in the validation at step 1, 3 in this run .*row 1 of mine"):
        trainer._val_metrics_update(["mine"], ["a"], again, [2], expected_acc_counts={("mine", "a"): 1})


def test_a_validation_does_not_count_what_the_tool_server_failed_as_wrong(queue, tmp_path):
    """Two samples a prompt. b's first one failed on our side, so b is in no mean: what is left is all of a."""
    trainer = make_trainer(tmp_path)
    trainer._infra_said = ["Error: the tool server is full"]
    infos = {"reward": [1.0, 0.0, 0.0, 1.0], "acc": [1.0, 0.0, 0.0, 1.0], "infra": [0.0, 0.0, 1.0, 0.0]}
    rows = (["mine"] * 4, ["a", "a", "b", "b"], infos, [2] * 4)
    counts = {("mine", "a"): 2, ("mine", "b"): 2}
    metrics = trainer._val_metrics_update(*rows, expected_acc_counts=counts)
    assert metrics["val-core/mine/acc/mean@2"] == 0.5
    assert metrics["gtpo/validation/rows"] == 2.0 and metrics["gtpo/validation/infra"] == 1.0
    strict = make_trainer(tmp_path, "max_dropped_share=0.2")
    strict._infra_said = ["Error: the tool server is full"]
    with pytest.raises(RuntimeError, match=r"25% of the trajectories of the validation at step 1 .*server is full"):
        strict._val_metrics_update(*rows, expected_acc_counts=counts)
    loose = make_trainer(tmp_path, "max_dropped_share=1")
    loose._infra_said = ["Error: the tool server is full"]
    with pytest.raises(RuntimeError, match=r"no prompt of the validation at step 1 is whole, .*: Error: the tool"):
        loose._val_metrics_update(["mine"], ["b"], {"acc": [0.0], "infra": [1.0]}, [2], expected_acc_counts={})
