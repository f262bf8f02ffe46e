"""The matrix: which cells there are, how many run at once, what is skipped, tried again, reported, and ended.

Cells are small Python programs in place of trainings; processes are real.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import time

import psutil
import pytest
from composition import compose
from omegaconf import OmegaConf
from ray.job_submission import JobStatus
from recorded_runs import make_run

from recipe.gtpo.experiments import compare
from recipe.gtpo.experiments.compare import Cell, LocalJob, at_once, matrix, parse, parse_integers, run_matrix
from recipe.gtpo.run.identity import claim
from recipe.gtpo.run.record import RunRecord

pytestmark = pytest.mark.unit

#: Counts its attempts in a file; leaves a summary from the attempt in argv[2] on.
PROGRAM = """
import json, pathlib, sys
folder, good_from = pathlib.Path(sys.argv[1]), int(sys.argv[2])
tries = folder / "tries"
count = len(tries.read_text()) + 1 if tries.exists() else 1
tries.write_text("x" * count)
print("attempt", count)
if count < good_from:
    sys.exit("no luck")
(folder / "summary.json").write_text(json.dumps({"steps": [0, 3]}))
"""


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(compare, "_POLL_SECONDS", 0.02)


def cell(folder, name, good_from=1, steps=3):
    run_dir = folder / name
    return Cell("gtpo", 1, run_dir, (sys.executable, "-c", PROGRAM, str(run_dir), str(good_from)), steps)


def run(cells, parallel=1, hours=1.0):
    out = io.StringIO()
    return run_matrix(cells, LocalJob, parallel=parallel, hours=hours, out=out), out.getvalue()


def test_the_matrix_is_methods_x_seeds_with_one_folder_each(tmp_path):
    own, rest = parse(["methods=gtpo,grpo", "seeds=3..4", f"out={tmp_path}", "steps=7", "task=arithmetic", "+a.b=1"])
    cells = matrix(own, rest)
    assert [c.name for c in cells] == ["gtpo-seed3", "grpo-seed3", "gtpo-seed4", "grpo-seed4"]
    assert all(c.dir.parent == tmp_path for c in cells)
    command = cells[1].command[1:]
    assert command[:4] == ("-m", "recipe.gtpo.main", "method=grpo", "seed=3")
    assert command[-3:] == ("trainer.total_training_steps=7", "task=arithmetic", "+a.b=1")
    # a pair differs in its method and its folder, in nothing else
    assert [a for a, b in zip(cells[0].command, cells[1].command, strict=True) if a != b] == [
        "method=gtpo",
        f"run_dir={cells[0].dir}",
    ]


def test_both_engines_take_the_same_cells_in_the_same_words(tmp_path):
    arguments = ["methods=gtpo_turn", "seeds=5", "horizons=2", f"out={tmp_path}", "algorithm.gtpo.gamma=1.0"]
    (verl,), (twin,) = (matrix(*parse([*arguments, f"engine={engine}"])) for engine in ("verl", "twin"))
    assert verl.command[1:3] == ("-m", "recipe.gtpo.main")
    assert twin.command[1:3] == ("-m", "recipe.gtpo.experiments.twin")
    assert verl.command[3:] == twin.command[3:]
    assert verl.command[3:] == (
        "method=gtpo_turn", "seed=5", f"run_dir={verl.dir}", "task.horizon=2", "algorithm.gtpo.gamma=1.0",
    )  # fmt: skip


def test_the_stack_of_the_machine_is_for_verl_and_can_be_overridden(tmp_path):
    stack = "stack=hardware=cpu rollout=transformers"
    (verl,), (twin,) = (matrix(*parse(["seeds=1", "methods=gtpo", stack, f"engine={e}"])) for e in ("verl", "twin"))
    assert verl.command[3:5] == ("hardware=cpu", "rollout=transformers")
    assert not any("hardware" in word for word in twin.command)


def test_a_published_result_is_one_word_and_the_command_line_has_the_last(tmp_path):
    own, rest = parse(["experiment=horizon6", f"out={tmp_path}"])
    assert (own["engine"], own["methods"], own["seeds"]) == ("twin", "grpo_sum,gtpo_turn_batch_std", "701..716")
    assert rest == ["experiment=horizon6"]
    assert len(matrix(own, rest)) == 32
    own, _ = parse(["experiment=horizon6", "seeds=1", "engine=verl"])
    assert (own["engine"], own["methods"], own["seeds"]) == ("verl", "grpo_sum,gtpo_turn_batch_std", "1")


def test_each_experiment_has_a_folder_of_its_own():
    folders = [parse(arguments)[0]["out"] for arguments in ([], ["experiment=horizon4"], ["experiment=horizon6"])]
    assert folders == ["outputs/compare", "outputs/horizon4", "outputs/horizon6"]


@pytest.mark.parametrize("name", ["horizon4", "horizon6"])
def test_a_published_result_composes_to_what_its_page_says(name):
    """RESULTS.md: 20 steps of six calls, 30 of four; rate 5e-4, 256 and 1024 held-out problems."""
    config = compose(f"experiment={name}")
    steps = {"horizon4": (4, 30, 15), "horizon6": (6, 20, 10)}[name]
    assert (config.task.horizon, config.trainer.total_training_steps, config.trainer.test_freq) == steps
    assert (config.task.validation_problems, config.task.final_problems) == (256, 1024)
    assert config.actor_rollout_ref.actor.optim.lr == 5e-4


def test_the_fifth_design_composes_to_what_it_says(tmp_path):
    own, rest = parse(["experiment=first_call", f"out={tmp_path}"])
    assert (own["engine"], own["seeds"]) == ("twin", "1001..1016") and len(matrix(own, rest)) == 64
    config = compose("experiment=first_call")
    assert (config.task.horizon, config.task.success, config.trainer.total_training_steps) == (6, 0.1, 12)
    assert config.task.warm_start == {"faults_in": "first_call", "talks": True}
    assert (config.data.train_batch_size, config.actor_rollout_ref.rollout.n) == (16, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods=gtpo,gppo"], "unknown method 'gppo'; methods: .*grpo"),
        (["engine=slime"], "unknown engine 'slime'"),
        (["seeds=1,1"], "each once"),
        (["seeds=4..2"], "at least one"),
        (["seeds=one"], "seeds=one: no integers"),
        (["horizons=2,2"], "horizons=2,2: .*each once"),
        (["horizons=1..x"], "horizons=1..x: no integers"),
        (["trainer.total_training_steps=5"], "a cell sets this itself"),
        (["seed=5"], "a cell sets this itself"),
        (["methods=gtpo,gtpo"], "methods=gtpo,gtpo: each once"),
        (["methods=gtpo, gtpo"], "methods=gtpo, gtpo: each once"),
        (["methods=gtpo,", "grpo"], "grpo: no KEY=VALUE .in a list, write A,B without a space"),
        (["--multirun"], "--multirun: the matrix is methods=, seeds= and horizons="),
        (["-m", "seed=1,2"], "-m: the matrix is methods=, seeds= and horizons="),
        (["--cfg", "job"], "--cfg: no KEY=VALUE"),
        (["steps=abc"], "steps=abc: a whole number, at least 1"),
        (["steps=0"], "steps=0: a whole number, at least 1"),
        (["engine=twin", "trainer.save_freq=5"], "the plain-PyTorch engine does not read trainer.save_freq"),
        (["experiment=horizon7"], "unknown experiment 'horizon7'; experiments: first_call, horizon4, horizon6"),
    ],
)
def test_a_wrong_matrix_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        matrix(*parse(arguments))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hours=0", "compare: error: hours=0: a number above 0, the limit of a cell"),
        ("hours=-1", "compare: error: hours=-1: a number above 0, the limit of a cell"),
        ("hours=nan", "compare: error: hours=nan: a number above 0, the limit of a cell"),
        ("hours=day", "compare: error: hours=day: a number above 0, the limit of a cell"),
        ("parallel=x", "compare: error: parallel=x: a whole number, at least 1"),
        ("steps=abc", "compare: error: steps=abc: a whole number, at least 1"),
        ("--multirun", "compare: error: --multirun: the matrix is methods=, seeds= and horizons=; hydra's own is not"),
    ],
)
def test_a_number_that_is_none_ends_the_command_with_one_line(argument, message, tmp_path, capsys):
    assert compare.main([argument, f"out={tmp_path}"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(message)
    assert not list(tmp_path.iterdir())


def test_spaces_in_a_list_and_the_home_folder_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cells = matrix(*parse(["methods=gtpo, grpo", "seeds= 1, 2", "out=~/m", "parallel= 2"]))
    assert [c.name for c in cells] == ["gtpo-seed1", "grpo-seed1", "gtpo-seed2", "grpo-seed2"]
    assert {c.dir.parent for c in cells} == {tmp_path / "m"} and f"run_dir={cells[0].dir}" in cells[0].command


def test_a_cell_may_be_given_a_folder_of_configs_and_a_key_less():
    (one,) = matrix(*parse(["methods=gtpo", "seeds=1", "~trainer.logger", "--config-dir", "/my/config"]))
    assert one.command[-3:] == ("~trainer.logger", "--config-dir", "/my/config")


def test_seeds_are_a_list_or_a_range_with_both_ends():
    assert parse_integers("seeds", "0..3") == [0, 1, 2, 3]
    assert parse_integers("seeds", "7,2") == [7, 2]


def test_horizons_are_a_third_axis_and_pairs_stay_together(tmp_path):
    own, rest = parse(["methods=gtpo,grpo", "seeds=3..4", "horizons=1,6", f"out={tmp_path}", "steps=7", "a=1"])
    cells = matrix(own, rest)
    assert [c.name for c in cells] == [
        "gtpo-h1-seed3", "grpo-h1-seed3", "gtpo-h6-seed3", "grpo-h6-seed3",
        "gtpo-h1-seed4", "grpo-h1-seed4", "gtpo-h6-seed4", "grpo-h6-seed4",
    ]  # fmt: skip
    assert [(c.seed, c.horizon) for c in cells[1:3]] == [(3, 1), (3, 6)]
    assert cells[3].command[3:] == (
        "method=grpo", "seed=3", f"run_dir={cells[3].dir}", "trainer.total_training_steps=7", "task.horizon=6", "a=1",
    )  # fmt: skip
    # the same chain in two methods: nothing else differs
    assert [a for a, b in zip(cells[2].command, cells[3].command, strict=True) if a != b] == [
        "method=gtpo",
        f"run_dir={cells[2].dir}",
    ]


@pytest.mark.parametrize("override", ["task.horizon=3", "+task.horizon=3"])
def test_a_horizon_by_hand_is_an_override_like_others_until_it_is_an_axis(override, tmp_path):
    (one,) = matrix(*parse(["methods=gtpo", "seeds=1", f"out={tmp_path}", override]))
    assert one.name == "gtpo-seed1" and one.horizon is None and one.command[-1] == override
    with pytest.raises(ValueError, match="a cell sets this itself"):
        matrix(*parse(["horizons=1..3", override]))


def test_one_cell_at_a_time_here_and_as_many_as_the_user_says_on_a_cluster():
    assert at_once(parse([])[0]) == 1
    assert at_once(parse(["parallel=3"])[0]) == 3
    assert at_once(parse(["ray=http://head:8265", "parallel=4"])[0]) == 4
    with pytest.raises(ValueError, match="at least 1"):
        at_once(parse(["parallel=0"])[0])


def test_a_cluster_without_a_number_of_cells_is_refused_before_anything_starts(tmp_path, capsys):
    assert compare.main(["ray=http://head:8265", "methods=gtpo", "seeds=1", f"out={tmp_path}"]) == 1
    assert "ray=http://head:8265 needs parallel=" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_complete_is_skipped_and_what_is_short_is_not(tmp_path):
    done, short = cell(tmp_path, "done"), cell(tmp_path, "short")
    for one, steps in ((done, 3), (short, 2)):
        one.dir.mkdir()
        (one.dir / "summary.json").write_text(json.dumps({"steps": [0, steps]}))
    outcome, _ = run([done, short])
    assert (outcome.skipped, outcome.complete, outcome.failed) == (["done"], ["short"], [])
    assert not (done.dir / "tries").exists()


def test_a_failed_cell_gets_one_more_attempt_then_is_reported_and_the_others_go_on(tmp_path):
    cells = [cell(tmp_path, "bad", good_from=9), cell(tmp_path, "lucky", good_from=2), cell(tmp_path, "good")]
    outcome, said = run(cells, parallel=2)
    assert sorted(outcome.complete) == ["good", "lucky"] and outcome.failed == ["bad"]
    assert (cells[0].dir / "tries").read_text() == "xx"
    assert "bad: failed twice: no luck" in said
    assert (cells[0].dir / "terminal.log").read_text().count("attempt") == 2  # nothing overwritten
    again, _ = run(cells)  # the same command again: only what is not complete
    assert sorted(again.skipped) == ["good", "lucky"] and (cells[0].dir / "tries").read_text() == "xxxx"


def test_an_exit_status_of_zero_without_a_summary_is_a_failure(tmp_path):
    silent = Cell("gtpo", 1, tmp_path / "silent", (sys.executable, "-c", ""), 3)
    outcome, _ = run([silent])
    assert outcome.failed == ["silent"]


def test_the_bar_says_how_far_the_running_cells_are_also_when_none_has_ended(tmp_path):
    out, cells = io.StringIO(), [cell(tmp_path, "first", steps=None), cell(tmp_path, "second", steps=None)]

    class Job:
        """The first cell is done at once; the second takes a step a poll until the bar has said so."""

        def __init__(self, command, log):
            self.record, self.polls = RunRecord(log.parent), 0

        def poll(self):
            self.polls += 1
            self.record.write_metrics(self.polls, {})
            if self.record.dir.name == "second" and "second step 3" not in out.getvalue() and self.polls < 500:
                return None
            (self.record.dir / "summary.json").write_text(json.dumps({"steps": [0, self.polls]}))
            return 0

    assert run_matrix(cells, Job, parallel=1, hours=1, out=out).complete == ["first", "second"]
    assert "1/2" in next(part for part in out.getvalue().split("\r") if "second step 3" in part)


@pytest.fixture
def in_the_background():
    """A matrix that a script starts with `&` ignores SIGINT; a cell that inherited it would live for another minute."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_cell_beyond_its_limit_is_ended_by_its_id(tmp_path, in_the_background):
    program = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    folder = tmp_path / "slow"
    command = (sys.executable, "-c", f"import os; os.chdir({str(folder)!r}); " + program)
    began = time.monotonic()
    outcome, _ = run([Cell("gtpo", 1, folder, command, 3)], hours=0.5 / 3600)
    assert outcome.failed == ["slow"] and time.monotonic() - began < 30
    assert not psutil.pid_exists(int((folder / "pid").read_text()))


def test_an_interrupt_ends_what_runs(tmp_path):
    jobs = []

    class Interrupted(LocalJob):
        def __init__(self, command, log):
            super().__init__(command, log)
            jobs.append(self)
            self.polls = 0

        def poll(self):
            self.polls += 1
            if self.polls == 3:
                raise KeyboardInterrupt
            return super().poll()

    command = (sys.executable, "-c", "import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        run_matrix([Cell("gtpo", 1, tmp_path / "on", command, 3)], Interrupted, parallel=1, hours=1, out=io.StringIO())
    assert jobs[0].poll() is not None


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_while_a_cell_starts_ends_that_cell_too(tmp_path):
    """It came between the start of the process and the return of the call that starts it."""
    jobs = []

    def start(command, log):
        jobs.append(LocalJob(command, log))
        signal.raise_signal(signal.SIGINT)
        return jobs[0]

    command = (sys.executable, "-c", "import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        run_matrix([Cell("gtpo", 1, tmp_path / "on", command, 3)], start, parallel=1, hours=1, out=io.StringIO())
    assert jobs[0].poll() is not None


@pytest.mark.usefixtures("interruptible")
def test_every_cell_is_ended_where_one_cannot_be_and_a_second_signal_comes(tmp_path):
    ended = []

    class Stubborn:
        def __init__(self, command, log):
            self.name = log.parent.name

        def poll(self):
            raise KeyboardInterrupt

        def stop(self):
            ended.append(self.name)
            signal.raise_signal(signal.SIGINT)
            raise ConnectionError("the cluster is gone")

    cells = [Cell("gtpo", seed, tmp_path / str(seed), (), 3) for seed in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        run_matrix(cells, Stubborn, parallel=3, hours=1, out=io.StringIO())
    assert sorted(ended) == ["1", "2", "3"]


class Cluster:
    """A job client. `answers` are its status replies, one a call; an exception is raised."""

    def __init__(self, *answers):
        self.answers, self.stopped = list(answers), []

    def get_job_status(self, _):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop_job(self, job):
        self.stopped.append(job)


def ray_job(client):
    job = compare.RayJob.__new__(compare.RayJob)
    job._client, job._id, job._address, job._silent_since = client, "raysubmit_1", "http://head:8265", None
    return job


def test_a_job_server_that_is_away_for_a_moment_ends_no_matrix():
    away, busy = ConnectionError("Failed to connect to Ray"), RuntimeError("Request failed with status code 500")
    job = ray_job(Cluster(away, busy, JobStatus.RUNNING, away, JobStatus.SUCCEEDED))
    assert [job.poll() for _ in range(5)] == [None, None, None, None, 0]


def test_one_that_stays_away_ends_it_with_one_line_and_the_jobs_names(monkeypatch, capsys):
    away = ConnectionError("Failed to connect to Ray")
    job = ray_job(Cluster(away, away, away))
    assert job.poll() is None
    monkeypatch.setattr(compare, "_SILENT_SECONDS", 0.0)
    with pytest.raises(compare.ClusterError, match=r"^ray=http://head:8265 does not answer: ConnectionError: Failed"):
        job.poll()
    job.stop()
    assert "ray job stop --address http://head:8265 raysubmit_1" in capsys.readouterr().err


def test_a_job_that_runs_is_stopped_and_one_that_ended_is_not():
    running, ended = Cluster(JobStatus.RUNNING), Cluster(JobStatus.FAILED)
    ray_job(running).stop()
    ray_job(ended).stop()
    assert running.stopped == ["raysubmit_1"] and ended.stopped == []


def test_an_address_where_no_job_server_is_is_one_line(tmp_path, capsys):
    arguments = ["methods=gtpo", "seeds=1", f"out={tmp_path}", "ray=http://127.0.0.1:9", "parallel=1"]
    assert compare.main(arguments) == 1
    assert "compare: error: no job at ray=http://127.0.0.1:9: ConnectionError: " in capsys.readouterr().err


class YoungCluster:
    """A job client whose cluster has no agent for its first `refusals` jobs."""

    def __init__(self, refusals: int, said: str = "Request failed with status code 500: No available agent") -> None:
        self.refusals, self.said = refusals, said

    def submit_job(self, *, entrypoint: str) -> str:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError(self.said)
        return f"id of {entrypoint}"


def test_a_cluster_that_has_just_started_is_asked_again_and_another_error_is_not():
    assert compare.submit(YoungCluster(2), "train", pauses=(0, 0)) == "id of train"
    with pytest.raises(RuntimeError, match="No available agent"):
        compare.submit(YoungCluster(3), "train", pauses=(0, 0))
    other = YoungCluster(1, "no such runtime environment")
    with pytest.raises(RuntimeError, match="no such"):
        compare.submit(other, "train", pauses=(0,))
    assert other.refusals == 0


def test_an_unknown_method_ends_the_command_with_one_line(capsys):
    assert compare.main(["methods=nope"]) == 1
    assert capsys.readouterr().err.startswith("compare: error: unknown method 'nope'")


def test_finished_cells_of_other_overrides_are_not_counted_as_done(tmp_path, capsys):
    """The same out= with another learning rate used to report the first rate's runs as the second's."""
    arguments = ["methods=gtpo", "seeds=1", f"out={tmp_path}"]
    (one,) = matrix(*parse([*arguments, "actor_rollout_ref.actor.optim.lr=1e-3"]))
    one.dir.mkdir()
    start = {"command": ["main.py", *one.overrides]}
    (one.dir / "versions.json").write_text(json.dumps([start]))
    compare.refuse_others([one])
    compare.refuse_others(matrix(*parse([*arguments, "actor_rollout_ref.actor.optim.lr=1e-3", "trainer.save_freq=5"])))
    assert compare.main([*arguments, "actor_rollout_ref.actor.optim.lr=2e-3"]) == 1
    assert "was made by other overrides" in capsys.readouterr().err


def test_finished_cells_of_a_reward_function_that_was_edited_are_not_counted_as_done(tmp_path, capsys):
    """The cells that are still to run would be scored by another."""
    (reward := tmp_path / "my_reward.py").write_text("before = 1")
    arguments = ["methods=gtpo", "seeds=1", f"out={tmp_path}", f"reward.custom_reward_function.path={reward}"]
    (one,) = matrix(*parse(arguments))
    config = {"algorithm": {"gtpo": {"format_rule": "x"}}, "reward": {"custom_reward_function": {"path": reward}}}
    claim(RunRecord(one.dir), OmegaConf.create(config))
    (one.dir / "versions.json").write_text(json.dumps([{"command": ["main.py", *one.overrides]}]))
    compare.refuse_others([one])
    reward.write_text("after = 1")
    assert compare.main(arguments) == 1
    assert f"the reward function {reward} has changed since {one.dir} was begun with it" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["experiment=horizon4", "experiment=first_call", "engine=twin"])
def test_finished_cells_of_another_experiment_are_not_counted_as_done(tmp_path, other, capsys):
    """The default out= is the same for all: horizon 4 would be reported as the answer for horizon 6."""
    common = ["methods=gtpo", "seeds=1", f"out={tmp_path}"]
    (made,) = matrix(*parse([*common, "experiment=horizon6"]))
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 20: 0.5})
    (made.dir / "versions.json").write_text(json.dumps([{"command": ["twin/__main__.py", *made.overrides]}]))
    compare.refuse_others([made])
    assert compare.main([*common, other]) == 1
    assert "was made by other overrides" in capsys.readouterr().err


def test_finished_cells_of_another_engine_are_not_counted_as_done(tmp_path, capsys):
    arguments = ["methods=gtpo", "seeds=1", "steps=20", f"out={tmp_path}"]
    (made,) = matrix(*parse([*arguments, "engine=twin"]))
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 20: 0.5})
    (made.dir / "versions.json").write_text(json.dumps([{"command": ["twin/__main__.py", *made.overrides]}]))
    compare.refuse_others([made])
    assert compare.main(arguments) == 1
    assert "gtpo-seed1 was made by engine=twin" in capsys.readouterr().err


def test_the_report_is_of_this_matrix_and_other_runs_of_its_folder_are_counted(tmp_path, capsys):
    """Runs of another learning rate and of other seeds used to be pooled with those that were asked for."""
    arguments = ["methods=gtpo,grpo", f"out={tmp_path}", "engine=twin"]
    for cell in matrix(*parse([*arguments, "seeds=1..2"])):
        make_run(tmp_path, cell.method, cell.seed, {0: 0.2, 20: 0.5 + 0.1 * cell.seed})
        start = {"command": ["twin/__main__.py", *cell.overrides]}
        (cell.dir / "versions.json").write_text(json.dumps([start]))
    assert compare.main([*arguments, "seeds=2"]) == 0
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {run["seed"] for run in facts["runs"]} == {2}
    assert "compare: 2 other finished runs in" in said


def test_a_trial_of_few_steps_is_not_counted_as_the_whole_run(tmp_path):
    arguments = ["methods=gtpo", "seeds=1", f"out={tmp_path}"]
    (trial,) = matrix(*parse([*arguments, "steps=2"]))
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 2: 0.5})
    (trial.dir / "versions.json").write_text(json.dumps([{"command": ["main.py", *trial.overrides]}]))
    compare.refuse_others([trial])
    compare.refuse_others(matrix(*parse([*arguments, "steps=40"])))  # goes on from there
    with pytest.raises(ValueError, match=r"gtpo-seed1 was made with steps=2, and here steps= is not given"):
        compare.refuse_others(matrix(*parse(arguments)))


def test_a_cell_made_when_its_method_had_another_meaning_is_not_counted_as_done(tmp_path):
    """`method=grpo` compared the summed reward before there was `algorithm.gtpo.trajectory_reward`."""
    cells = matrix(*parse(["methods=gtpo,grpo", "seeds=1", f"out={tmp_path}"]))
    for one in cells:
        make_run(tmp_path, one.method, 1, {0: 0.2, 1: 0.5}, reward=None)
        (one.dir / "versions.json").write_text(json.dumps([{"command": ["main.py", *one.overrides]}]))
    with pytest.raises(ValueError, match=r"grpo-seed1 was made when method=grpo .*today's names it is grpo_sum"):
        compare.refuse_others(cells)
    compare.refuse_others(cells[:1])  # GTPO is what it was


def test_a_cell_made_before_there_was_a_format_rule_is_not_counted_as_done(tmp_path):
    """All that breaks the format was charged; only a published result still asks for that."""
    (cell,) = matrix(*parse(["methods=gtpo", "seeds=1", f"out={tmp_path}"]))
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 1: 0.5}, rule=None)
    (cell.dir / "versions.json").write_text(json.dumps([{"command": ["main.py", *cell.overrides]}]))
    with pytest.raises(
        ValueError, match=r"gtpo-seed1 was made when every break .* algorithm\.gtpo\.format_rule=strict"
    ):
        compare.refuse_others([cell])
    arguments = ["experiment=horizon6", "methods=gtpo", "seeds=1", f"out={tmp_path}"]
    (published,) = matrix(*parse(arguments))
    (cell.dir / "versions.json").write_text(json.dumps([{"command": ["twin/__main__.py", *published.overrides]}]))
    compare.refuse_others([published])


def test_the_default_is_the_fair_set_of_rivals():
    own, rest = parse([])
    methods = [cell.method for cell in matrix(own | {"seeds": "1"}, rest)]
    assert methods == list(compare.FAIR) and {"gtpo", "grpo"} < set(methods)
    listed = compare.__doc__.split("each on the reward of its source:")[1].split("(fair)")[0]
    assert [name.strip() for name in listed.split(",")] == methods
    more = matrix(*parse(["methods=grpo_sum,fair", "seeds=1"]))
    assert [cell.method for cell in more] == ["grpo_sum", *methods]
    with pytest.raises(ValueError, match="methods=fair,grpo: each once"):
        matrix(*parse(["methods=fair,grpo"]))
