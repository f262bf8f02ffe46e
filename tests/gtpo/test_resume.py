"""Protects the record of a run that is killed, whenever that is: after the next start every step has exactly one line
and one file of trajectories, and what validation found is there.

Real: verl's `fit`, its saving and loading of checkpoints, our trainer and record. Fake: what trains; the policy is the
number of steps that it was trained.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from composition import compose
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from recipe.gtpo.main import finished
from recipe.gtpo.run.record import RunRecord, latest_checkpoint
from recipe.gtpo.trainer import GTPOTrainerMixin

pytestmark = pytest.mark.unit

STEPS = 4
ACCURACY = "val-core/arithmetic/acc/mean@1"


class Killed(BaseException):
    """What no handler in between catches."""


class Moments:
    """Called at every moment of a run that matters, in all its starts; kills at those of the given numbers."""

    def __init__(self, *deaths):
        self.deaths, self.count = deaths, 0

    def __call__(self, damage=lambda: None):
        self.count += 1
        if self.count in self.deaths:
            damage()  # what the kill leaves half done
            raise Killed


class FakeTraining:
    """In the place of workers, rollouts and TransferQueue. Each call of `moment` is a place to die."""

    def prepare(self, moment):
        self.moment, self.policy = moment, 0
        self.steps_per_epoch, self.total_training_steps = 10**6, STEPS
        self.use_critic = False
        self.actor_rollout_wg = SimpleNamespace(
            save_checkpoint=lambda *args, **kwargs: moment(), load_checkpoint=lambda *args, **kwargs: moment()
        )
        self.train_dataloader = SimpleNamespace(
            state_dict=lambda: {"policy": self.policy},
            load_state_dict=lambda state: setattr(self, "policy", state["policy"]),
        )
        tracker = self.record.dir / "checkpoints" / "latest_checkpointed_iteration.txt"
        self.checkpoint_callback = SimpleNamespace(on_save=lambda **kwargs: moment(lambda: tracker.write_text("")))
        write = self.record.write_metrics

        def write_half():
            with self.record.metrics_path.open("a") as f:
                f.write('{"step": 3, "metri')

        def write_metrics(step, metrics):
            moment(write_half)
            write(step, metrics)
            moment()

        self.record.write_metrics = write_metrics

    def step(self, metrics, timing_raw):
        self.moment()
        self.record.write_trajectories(self.global_steps, [{"policy": self.policy}])
        self.moment()
        metrics.update({"gtpo/credit_seconds": 0.0, "policy": self.policy})
        self.policy += 1
        return KVBatchMeta([], [], "train")

    def _validate(self):
        self.moment()
        return {ACCURACY: float(self.policy)}

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        self.moment()
        metrics["timing_s/step"] = timing_raw["step"]

    def on_step_end(self):
        self.moment()

    def on_train_begin(self):
        self.moment()

    def _shutdown_dump_executor(self):
        pass


TRAINERS = {
    mode: type(mode, (GTPOTrainerMixin, FakeTraining, base), {"base_mode": mode})
    for mode, base in {"sync": PPOTrainerSync, "colocate_async": PPOTrainerColocateAsync}.items()
}


@pytest.fixture(autouse=True)
def _queue(monkeypatch):
    nothing = SimpleNamespace(
        kv_clear=lambda **kwargs: None,
        kv_list=lambda partition_id: {},
        save_checkpoint=lambda folder, metadata: None,
    )
    monkeypatch.setattr(trainer_base, "tq", nothing)


def make_config(*overrides):
    settings = [f"trainer.total_training_steps={STEPS}", "trainer.test_freq=2", "trainer.logger=[]", *overrides]
    config = OmegaConf.merge(compose(), OmegaConf.from_dotlist(settings))
    OmegaConf.resolve(config)  # otherwise it is most of this module's time
    return config


def run(folder, config, mode, moment):
    """Start as the command does until the run is complete; returns the number of starts."""
    config.run_dir, config.trainer.default_local_dir = str(folder), str(folder / "checkpoints")
    for starts in range(5):
        checkpoint = latest_checkpoint(folder / "checkpoints")
        if finished(config, RunRecord(folder), checkpoint):
            return starts
        trainer = TRAINERS[mode](config)
        trainer.record.write_start(seed=1)
        trainer.prepare(moment)
        try:
            trainer._load_checkpoint()
            assert trainer.policy == (checkpoint or 0)
            trainer.fit(None)
        except Killed:
            continue
    raise AssertionError("not complete after five starts")


def check(folder, validated=(0, 2, 4)):
    record = RunRecord(folder)
    raw = [json.loads(line) for line in record.metrics_path.read_text().splitlines()]
    steps = list(range(0 if 0 in validated else 1, STEPS + 1))
    assert [line["step"] for line in raw] == [line["step"] for line in record.read_metrics()] == steps
    for line in raw:
        step, metrics = line["step"], line["metrics"]
        assert step == 0 or metrics["policy"] == step - 1
        assert metrics.get(ACCURACY, step) == step
        assert step not in validated or ACCURACY in metrics
    assert record.trajectory_steps() == list(range(1, STEPS + 1))
    assert all(record.read_trajectories(step) == [{"policy": step - 1}] for step in range(1, STEPS + 1))


@pytest.mark.parametrize("mode", TRAINERS)
@pytest.mark.parametrize("save_freq", [1, 2])
def test_a_run_may_be_killed_at_any_moment(tmp_path, mode, save_freq):
    config, moment = make_config(f"trainer.save_freq={save_freq}"), Moments()
    assert run(tmp_path / "whole", config, mode, moment) == 1
    check(tmp_path / "whole")
    for death in range(1, moment.count + 1):
        folder = tmp_path / str(death)
        starts = run(folder, config, mode, Moments(death))
        check(folder)
        assert starts == (1 if death == moment.count else 2)  # dead after its last line, it was complete


def test_a_run_may_be_killed_again_and_again(tmp_path):
    config, moment = make_config("trainer.save_freq=1"), Moments()
    run(tmp_path / "whole", config, "sync", moment)
    for death in range(1, moment.count + 1):
        folder = tmp_path / str(death)
        run(folder, config, "sync", Moments(death, death + 5, death + 8))
        check(folder)


def test_without_validation_before_training_a_resumed_run_still_has_every_line(tmp_path):
    config, moment = make_config("trainer.save_freq=1", "trainer.val_before_train=false"), Moments()
    run(tmp_path / "whole", config, "sync", moment)
    for death in range(1, moment.count + 1):
        folder = tmp_path / str(death)
        run(folder, config, "sync", Moments(death))
        check(folder, validated=())


@pytest.mark.parametrize("mode", TRAINERS)
def test_a_run_whose_epochs_decide_saves_and_validates_at_its_last_step_and_then_trains_no_more(tmp_path, mode):
    epochs = ("trainer.total_training_steps=null", "trainer.total_epochs=2")
    config = make_config("trainer.save_freq=3", "trainer.test_freq=3", *epochs)
    config.run_dir, config.trainer.default_local_dir = str(tmp_path), str(tmp_path / "checkpoints")
    for _ in range(2):
        trainer = TRAINERS[mode](config)
        trainer.prepare(Moments())
        trainer.steps_per_epoch = STEPS // 2
        trainer._load_checkpoint()
        trainer.fit(None)
        assert trainer.policy == latest_checkpoint(tmp_path / "checkpoints") == STEPS
        check(tmp_path, validated=(0, 3, 4))


def test_a_run_that_starts_over_keeps_nothing_of_the_one_before(tmp_path):
    folder, config = tmp_path / "run", make_config("trainer.save_freq=2", "trainer.test_freq=1")
    run(folder, config, "sync", Moments())
    record = RunRecord(folder)
    record.write_metrics(STEPS + 1, {"policy": 0})
    record.write_trajectories(STEPS + 1, [])
    config.trainer.resume_mode = "disable"
    run_once = TRAINERS["sync"](config)
    run_once.prepare(Moments())
    run_once._load_checkpoint()
    assert record.read_metrics() == [] and record.trajectory_steps() == []
    run_once.fit(None)
    check(folder)
