"""GTPO on verl's V1 trainers: the recorded turns of a batch become turn rewards before verl computes advantages.

    TransferQueue: trajectories -> `assign_credit` -> rm_scores (turn by turn) -> verl's own `_compute_advantage`

One mixin for verl's sync, colocate_async and separate_async trainers. It serves the rivals too: their estimators read
the same rewards, most of them summed over the trajectory.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, ClassVar

import torch
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from recipe.gtpo.dataset import FILE_ROW, file_row
from recipe.gtpo.estimator import recorded_turns
from recipe.gtpo.method.credit import Credit, assign_credit
from recipe.gtpo.method.estimators import turn_returns
from recipe.gtpo.method.metrics import credit_metrics, log_prob_gap_by_turn
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.tokens import at_turn_ends, dense
from recipe.gtpo.method.turns import FAILED, TRAJECTORY, Finish, Trajectory
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.trajectories import Numbers, Row, Writer, training_lines, validation_lines
from verl_ext.plugin import trainer_base
from verl_ext.records.reader import Split

#: Seconds between two looks for finished trajectories. verl's 2.0 is most of a small run's step.
POLL_SECONDS = 0.1
#: Seconds between two words on how far a rollout is.
SAY_SECONDS = 2.0

_Trainer: Any = trainer_base()


#: What is said of a trajectory that never reached the batch.
_MISSING = "they are missing from the batch; logs/ in the run folder says why (the worker-*.err of AgentLoopWorkerTQ)"


class GTPOTrainerMixin(_Trainer):
    """Put it before one of verl's trainer classes."""

    #: verl's name of the trainer that it extends. verl compares trainer_mode with "sync" in several places, and reads
    #: trainer.v1.<mode> by it, so the registered name ends here.
    base_mode: ClassVar[str]

    def __init__(self, config: Any) -> None:
        self.options = GTPOOptions.from_config(config.algorithm.get("gtpo"))
        self.similarity = make_similarity(self.options.shaping.similarity) if self.options.shaping.enable else None
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.base_mode
        self.record = RunRecord(config.run_dir, compress=config.trajectory_zstd, keep=config.trajectory_keep)
        super().__init__(config)
        self._writer = Writer(self.record)
        self._validated = False  # a batch of the present validation has been recorded
        self._infra_said: list[str] = []  # what tools said that failed trajectories of it
        self._lost = 0  # trajectories of this start
        self._too_long: dict[str, float] = {}  # rows that are no part of the data
        self._loaded_step = 0
        self._credit_seconds = 0.0  # of this step, whose updates verl would average
        self._step_metrics: dict[str, Any] = {}

    def _build_replay_buffer(self):
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_SECONDS
        sample, wait = buffer.sample, buffer._wait_for_next_poll
        rollout = RolloutProgress(self.record)

        def sample_and_record(global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
            # verl's `_validate` takes its rows here, and has cleared them when it is done.
            rollout.begin(global_steps, "validation" if partition_id == "val" else "train", batch_size)
            batch, metrics = sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
            rollout.say(batch_size, at_once=True)
            if partition_id == "val":
                self._record_validation(batch)
            return batch, metrics

        def say_and_wait(partition_id: str, last_debug_time: float) -> float:
            rollout.say(len(buffer.finished_keys[partition_id]) + len(buffer.failure_keys[partition_id]))
            return wait(partition_id, last_debug_time)

        buffer.sample = sample_and_record
        # verl has no public place that is passed while it waits; tests/gtpo/test_trainer.py breaks when this one moves.
        buffer._wait_for_next_poll = say_and_wait
        return buffer

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{len(self.train_dataset)} training rows are left of those with prompts of at most "
                f"data.max_prompt_length={self.config.data.max_prompt_length} tokens, fewer than one batch of "
                f"data.train_batch_size={self.config.data.train_batch_size}: set either otherwise"
            )
        self._too_long = {
            "gtpo/data/too_long_total": float(getattr(self.train_dataset, "too_long", 0)),
            "gtpo/validation/too_long_total": float(getattr(self.val_dataset, "too_long", 0)),
        }

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Put the trajectories in the data's order first, where runs are to be equal bit for bit.

        They come in the order in which they were done, which is chance, and a sum of floats depends on its order.
        """
        if self.config.actor_rollout_ref.rollout.full_determinism:
            fields = ["index", "session_id"]
            rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
            places = list(zip(*(map(int, rows[name]) for name in fields), strict=True))
            batch.reorder(sorted(range(len(places)), key=places.__getitem__))
        return super()._balance_batch(batch, *args, **kwargs)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        began = time.perf_counter()
        fields = ["uid", "extra_fields", "response_mask", "rollout_log_probs", "old_log_probs"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        trajectories = read_trajectories(batch, list(rows["extra_fields"]))
        prompts = self.config.data.train_batch_size // self.parameter_sync_step
        metrics.update(
            self._count_lost(
                [t for t in trajectories if t is not None], prompts * self.config.actor_rollout_ref.rollout.n
            )
        )
        uids = list(rows["uid"])
        lengths = rows["response_mask"].offsets().diff().tolist()
        credit = assign_credit(trajectories, uids, self.options, self.similarity)
        if not credit.valid.any():
            raise RuntimeError(f"no trajectory of this step can be trained on: {_why_dropped(trajectories)}")
        write_rewards(batch, credit, uids, rows["response_mask"])
        turn_ids = credit.turn_ids(max(lengths))
        seconds = time.perf_counter() - began

        with recorded_turns(turn_ids, credit.solved, credit.states, credit.reward_parts):
            batch = super()._compute_advantage(batch, metrics)

        began = time.perf_counter()
        # Read back what the estimator made of it, whichever it is: baselines are measured by turn too.
        fields = ["advantages", "response_mask"]
        result = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        trained = result["response_mask"]  # less than was generated, where rollout_correction has rejected tokens
        advantages = at_turn_ends(result["advantages"], credit.turn_mask, credit.spans, trained)
        # verl's estimators of one advantage a trajectory say that it is the return, too
        returns = turn_returns(self.config.algorithm.adv_estimator, credit, self.options)
        metrics.update(credit_metrics(credit, trajectories, returns, advantages, self.options.baseline))
        # with rollout_correction.bypass_mode the two are one
        if "rollout_log_probs" in rows and not self.config.algorithm.rollout_correction.bypass_mode:
            metrics.update(log_prob_gap_by_turn(rows["old_log_probs"], rows["rollout_log_probs"], turn_ids))
        if self.global_steps % self.config.trajectory_freq == 0:
            masked = [a - b for a, b in zip(rows["response_mask"], result["response_mask"], strict=True)]
            self._record_training(batch, trajectories, credit, rows, advantages, masked)
        self._credit_seconds += seconds + time.perf_counter() - began
        return batch

    def _count_lost(self, trajectories: list[Trajectory], expected: int) -> dict[str, float]:
        """Count what is lost or dropped of a step; end the run when it is more than the config allows."""
        faults = [t.fault for t in trajectories if t.finish is Finish.FAULT]
        where = f"step {self.global_steps}"
        lost = self._lose(faults, expected - len(trajectories), where)
        infra = sum(t.finish is Finish.INFRA for t in trajectories)
        share = (lost + infra) / max(1, expected, len(trajectories))
        self._refuse_dropped(share, where, [said for t in trajectories for said in t.infra_outputs] or faults)
        return {"gtpo/rows/lost_total": float(lost)}

    def _refuse_dropped(self, share: float, where: str, said: list[str]) -> None:
        """Raise RuntimeError where more is lost or was failed by the tool server than the config allows."""
        if share > self.config.max_dropped_share:
            raise RuntimeError(
                f"{share:.0%} of the trajectories of {where} are lost or were failed by the tool server "
                f"(max_dropped_share={self.config.max_dropped_share:g}): {(said or [_MISSING])[-1].strip()}"
            )

    def _lose(self, faults: list[str], missing: int, where: str) -> int:
        """The trajectories lost in `where`. Raises RuntimeError with the last cause when the run has lost too many.

        verl leaves a trajectory whose agent loop raised out of the batch. Ours does not raise, so one that is missing
        was lost after it.
        """
        lost = len(faults) + max(0, missing)
        self._lost += lost
        if lost and self._lost > self.config.max_lost_trajectories:
            raise RuntimeError(
                f"{lost} trajectories are lost in {where}, {self._lost} in this run (max_lost_trajectories="
                f"{self.config.max_lost_trajectories}): {(faults or [_MISSING])[-1].strip()}"
            )
        return lost

    def _val_metrics_update(
        self, data_sources, sample_uids, reward_extra_infos_dict, sample_turns, expected_acc_counts=None
    ) -> dict[str, float]:
        """Also say over how many rows the means of a validation are, and leave out prompts with a trajectory that the
        tool server failed or that was lost.

        It would count as a wrong answer; verl puts one in even where a row is missing. The whole prompt goes: verl
        names a mean after the number of samples of a prompt, so one with fewer would be in another metric.
        """
        where = f"the validation at step {self.global_steps}"
        infos = dict(reward_extra_infos_dict)
        faults = infos.pop("fault", [""] * len(sample_uids))
        causes = [fault for fault in faults if fault]
        expected = expected_acc_counts or {}
        lost = self._lose(causes, sum(expected.values()) - len(sample_uids), where)
        infra = infos.get("infra", [0.0] * len(sample_uids))
        failed = sum(map(bool, infra))
        share = (lost + failed) / max(1, sum(expected.values()), len(sample_uids))
        self._refuse_dropped(share, where, self._infra_said or causes)
        there = Counter(map(str, sample_uids))
        left_out = {str(uid) for uid, a, b in zip(sample_uids, infra, faults, strict=True) if a or b}
        left_out |= {uid for (_, uid), count in expected.items() if there[uid] < count}
        kept = [i for i, uid in enumerate(sample_uids) if str(uid) not in left_out]
        if left_out and not kept:
            cause = (self._infra_said or causes or [_MISSING])[-1].strip()
            raise RuntimeError(f"no prompt of {where} is whole, so there is no mean: {cause}")
        metrics = super()._val_metrics_update(
            *([column[i] for i in kept] for column in (data_sources, sample_uids)),
            {name: [values[i] for i in kept] for name, values in infos.items()},
            [sample_turns[i] for i in kept],
            expected_acc_counts={key: count for key, count in expected.items() if key[1] not in left_out},
        )
        return metrics | {
            "gtpo/validation/rows": float(len(kept)),
            "gtpo/validation/lost": float(lost),
            "gtpo/validation/infra": float(failed),
        }

    # -- record -----------------------------------------------------------------------------------------------------
    #
    # verl saves a step before it validates and computes the step's metrics. A run that dies in between goes on behind
    # the step, so what its line needs is on disk before the checkpoint is. (Saving later instead, when the line is
    # written, would load the policy beside rollout servers that have taken the accelerator's memory back, snapshot
    # colocate_async's TransferQueue while it is written to, and lose the step to a validation that fails.)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._loaded_step = self.global_steps  # the checkpoint's step, 0 without one
        if not self.config.trainer.val_only:  # which trains no step again
            self.record.forget_after(self._loaded_step or -1)

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self._step_metrics, self._credit_seconds = metrics, 0.0
        batch = super().step(metrics, timing_raw)
        metrics["gtpo/credit_seconds"] = self._credit_seconds
        return batch

    def _save_checkpoint(self) -> None:
        self._writer.wait()
        self.record.write_checkpoint_metrics(self.global_steps, self._step_metrics)
        super()._save_checkpoint()

    def on_train_begin(self) -> None:
        self.record.complete(self._loaded_step, {})  # where verl does not validate before training
        super().on_train_begin()

    def _validate(self) -> dict[str, float]:
        self._validated, self._infra_said = False, []
        try:
            metrics = super()._validate()
        except ValueError as e:
            if "empty list" not in str(e):
                raise
            # verl leaves failed rollouts out, and TransferQueue then complains of a request for nothing
            raise RuntimeError(
                "every validation rollout failed; the run's logs say why (the worker-*.err of AgentLoopWorkerTQ)"
            ) from e
        self._writer.wait()
        if self.config.trainer.val_only:
            self.record.write_evaluation(self.global_steps, metrics)
        elif self.global_steps == self._loaded_step:  # before training; later ones come with their step's metrics
            self.record.complete(self._loaded_step, metrics)
        return metrics

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch) -> None:
        self._writer.wait()  # a step that has its line has its trajectories
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        metrics.update(self._too_long)
        metrics["gtpo/credit_share_of_step"] = metrics["gtpo/credit_seconds"] / timing_raw["step"]
        self.record.write_metrics(global_steps, metrics)

    def _record_training(
        self,
        batch: KVBatchMeta,
        trajectories: list[Trajectory | None],
        credit: Credit,
        rows: TensorDict,
        adv: torch.Tensor,
        masked: list[torch.Tensor],
    ) -> None:
        """`rows`: the fields of the step that verl has computed by now; `masked`: 1 where its mask lost a token."""
        log_probs, gaps = rows.get("old_log_probs"), None
        if log_probs is not None and "rollout_log_probs" in rows:
            gaps = [a - b for a, b in zip(rows["rollout_log_probs"], log_probs, strict=True)]
        estimator = self.config.algorithm.adv_estimator
        token_log_probs = None if log_probs is None else dense(log_probs)
        numbers = Numbers.of(credit, adv, estimator, self.options, token_log_probs, gaps, masked)
        update = self.local_trigger_step  # separate_async may make several a step
        lines = training_lines(self.global_steps, self.config.seed, trajectories, describe_rows(batch), numbers, update)
        self._writer.write(self.global_steps, lines, more=update > 0)

    def _record_validation(self, batch: KVBatchMeta) -> None:
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
        found = read_trajectories(batch, list(fields["extra_fields"]))
        real = [(trajectory, row) for trajectory, row in zip(found, describe_rows(batch), strict=True) if trajectory]
        if real:
            trajectories, rows = zip(*real, strict=True)
            self._infra_said += [said for t in trajectories for said in t.infra_outputs]
            first = not self._validated and self.global_steps == self._loaded_step
            if first and self.record.has_validation(self.global_steps):
                return  # a run that goes on validates its checkpoint again; the step's line keeps its numbers
            lines = validation_lines(self.global_steps, self.config.seed, trajectories, rows)
            self._writer.write(self.global_steps, lines, split="validation", more=self._validated)
            self._validated = True  # the data may come in several batches


class RolloutProgress:
    """Writes how many prompts of the present rollout are done, at most once every SAY_SECONDS."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._step, self._of = 0, 0
        self._split: Split = "train"
        self._said, self._at = -1, 0.0

    def begin(self, step: int, split: Split, of: int) -> None:
        self._step, self._split, self._of, self._said = step, split, of, -1
        self.say(0, at_once=True)

    def say(self, done: int, *, at_once: bool = False) -> None:
        done = min(done, self._of)  # the async trainers sample more than one step takes
        if done != self._said and (at_once or time.monotonic() >= self._at + SAY_SECONDS):
            self._record.write_rollout(self._step, self._split, done, self._of)
            self._said, self._at = done, time.monotonic()


def describe_rows(batch: KVBatchMeta) -> list[Row]:
    """Where every row comes from. The agent loop's worker stores the row of the data set beside what came of it."""
    fields = ["raw_prompt", "reward_model", "data_source", "index", FILE_ROW, "responses"]
    stored = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    columns = {name: list(stored[name]) for name in fields if name in stored}
    return [
        Row(
            group=key.rsplit("_", 2)[0],
            session=int(key.rsplit("_", 2)[1]),
            index=file_row({name: columns[name][i] for name in ("index", FILE_ROW) if name in columns}),
            data_source=str(columns["data_source"][i]) if "data_source" in columns else "",
            prompt=list(columns["raw_prompt"][i]) if "raw_prompt" in columns else None,
            gold=columns["reward_model"][i].get("ground_truth") if "reward_model" in columns else None,
            weights=[step for name in ("min", "max") if (step := tag.get(f"{name}_global_steps")) is not None],
            token_ids=columns["responses"][i].tolist() if "responses" in columns else None,
        )
        for i, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True))
    ]


def read_trajectories(batch: KVBatchMeta, extra_fields: list[dict]) -> list[Trajectory | None]:
    """The recorded trajectory of every row; None for verl's padding rows, which carry a copy of somebody else's record.

    Raises ValueError for a row without a record, and for a session with several rows: a record is one trajectory.
    """
    trajectories: list[Trajectory | None] = []
    for key, tag, fields in zip(batch.keys, batch.tags, extra_fields, strict=True):
        if tag.get("is_padding", False):
            trajectories.append(None)
            continue
        if not key.endswith("_0"):  # {uid}_{session}_{output}
            raise ValueError(f"row {key}: this agent loop returns several outputs a session; GTPO needs one")
        if TRAJECTORY not in fields:
            raise ValueError(f"row {key} has no recorded turns: set rollout.agent.default_agent_loop=gtpo_agent")
        trajectories.append(Trajectory.from_dict(fields[TRAJECTORY]))
    return trajectories


def _why_dropped(trajectories: list[Trajectory | None]) -> str:
    """Of a step of which nothing is left."""
    there = [t for t in trajectories if t is not None]
    failed = sum(t.finish in FAILED for t in there)
    said = [f"the tool server failed {failed} of {len(there)}"] if failed else []
    if cut := len(there) - failed:
        said.append(
            f"{cut} of {len(there)} hit data.max_response_length or multi_turn.max_assistant_turns, and "
            "algorithm.gtpo.truncated=drop leaves these out: raise the limit, or keep them (truncated=keep)"
        )
    return "; ".join(said)


def write_rewards(batch: KVBatchMeta, credit: Credit, uids: list[str], response_mask: torch.Tensor) -> None:
    """Turn rewards to `rm_scores`. Dropped rows leave the loss (zero mask) and every group's statistics (own uid).

    verl treats its padding rows the same way. `response_mask` is the nested mask as stored.
    """
    lengths = response_mask.offsets().diff().tolist()
    fields: dict[str, Any] = {"rm_scores": _nested(credit.token_rewards(lengths))}
    if credit.dropped.any():
        rows = response_mask.unbind()
        masks = [row * 0 if drop else row for row, drop in zip(rows, credit.dropped.tolist(), strict=True)]
        # verl's loss reads loss_mask, everything else response_mask
        fields["response_mask"] = _nested(masks)
        fields["loss_mask"] = _nested(masks)
        own = [f"dropped-{key}" if d else uid for key, uid, d in zip(batch.keys, uids, credit.dropped, strict=True)]
        fields["uid"] = NonTensorStack(*own)
    tq.kv_batch_put(
        keys=batch.keys,
        partition_id=batch.partition_id,
        fields=TensorDict(fields, batch_size=len(batch)),
    )


def _nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@register_trainer("gtpo_sync")
class GTPOTrainerSync(GTPOTrainerMixin, PPOTrainerSync):
    base_mode = "sync"


@register_trainer("gtpo_colocate_async")
class GTPOTrainerColocateAsync(GTPOTrainerMixin, PPOTrainerColocateAsync):
    base_mode = "colocate_async"


@register_trainer("gtpo_separate_async")
class GTPOTrainerSeparateAsync(GTPOTrainerMixin, PPOTrainerSeparateAsync):
    base_mode = "separate_async"
