"""Generated problems: no problem in two splits, a verifier's partial credit counts as nothing, settings are checked."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
from decimal import Decimal

import pyarrow.parquet
import pytest

from recipe.gtpo.conversation import read_score
from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.tasks import reasoning_gym as module
from recipe.gtpo.tasks import task as task_module
from recipe.gtpo.tasks.prepared import Unusable
from recipe.gtpo.tasks.reasoning_gym import EVALUATE_ANSWERS

pytestmark = pytest.mark.unit

if importlib.util.find_spec("reasoning_gym") is None:
    pytest.skip("reasoning-gym is not installed (requirements/reasoning_gym.txt)", allow_module_level=True)

SMALL = ("task.train_problems=40", "task.validation_problems=8", "task.train_seed=100")


def task(*settings, folder="unused"):
    return make_task("reasoning_gym", [f"task.folder={folder}", *SMALL, *settings])


def rows_of(file):
    return pyarrow.parquet.read_table(file).to_pylist()


def problems(file):
    return [row["prompt"][-1]["content"] for row in rows_of(file)]


def test_a_run_makes_its_data_and_makes_them_again_when_the_settings_differ(tmp_path):
    files = task(folder=tmp_path / "data").prepare()
    first = problems(files["data.train_files"])
    assert task(folder=tmp_path / "data").prepare() == files
    written = (tmp_path / "data").stat().st_ino
    assert task(folder=tmp_path / "data").prepare() == files and (tmp_path / "data").stat().st_ino == written
    task("task.train_seed=200", folder=tmp_path / "data").prepare()
    assert problems(files["data.train_files"]) != first


def test_a_generator_set_to_null_is_left_out(tmp_path):
    files = task("task.generators.lcm=null", "task.generators.products=null", folder=tmp_path / "data").prepare()
    rows = pyarrow.parquet.read_table(files["data.train_files"]).to_pylist()
    assert {row["data_source"] for row in rows} == {"chain_sum", "simple_equations"}
    with pytest.raises(ValueError, match=r"task\.generators is empty"):
        task(*(f"task.generators.{name}=null" for name in ("lcm", "products", "chain_sum", "simple_equations")))


def test_no_problem_is_in_both_splits_and_metrics_are_grouped_by_generator(tmp_path):
    files = task("task.train_problems=400", folder=tmp_path / "data").prepare()
    (validation,) = files["data.val_files"]
    assert not set(problems(files["data.train_files"])) & set(problems(validation))
    sources = {row["data_source"] for row in pyarrow.parquet.read_table(validation).to_pylist()}
    assert sources == {"chain_sum", "products", "lcm", "simple_equations"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["task.train_seed=1", "task.validation_seed=8"],
            "task.train_seed=1 and task.validation_seed=8 share problems",
        ),
        (
            ["task.train_seed=0", "task.validation_seed=0"],
            "task.train_seed=0 and task.validation_seed=0 share problems",
        ),
        (["task.train_problems=3"], "task.train_problems and task.validation_problems: at least one for each"),
        (["task.generators.chain_sums={}"], "task.generators.chain_sums is no generator of reasoning-gym; it has "),
        (["task.generators.countdown={}"], "task.generators.countdown: its verifier runs the answer as Python"),
        (["task.generators.lcm.colour=red"], "task.generators.lcm: "),
        (["task.generators.lcm.min_numbers=0"], "task.generators.lcm: "),
    ],
)
def test_what_cannot_be_generated_is_refused(settings, message):
    with pytest.raises(ValueError) as refused:
        task(*settings)
    assert str(refused.value).startswith(f"task=reasoning_gym: {message}")


def test_ranges_that_only_touch_share_nothing():
    """40 problems of 4 generators: seeds 1 to 10 and 11 onwards."""
    task("task.train_seed=1", "task.validation_seed=11")
    with pytest.raises(ValueError, match="at least 10 apart"):
        task("task.train_seed=1", "task.validation_seed=10")


def test_the_refused_generators_are_those_whose_verifiers_evaluate():
    known = module._package().factory.DATASETS
    evaluate = re.compile(r"\beval\(|\bexec\(|parse_expr|sympify")
    assert {
        n for n, (cls, _) in known.items() if evaluate.search(inspect.getsource(cls.score_answer))
    } == EVALUATE_ANSWERS


def first_row(asked):
    (source,) = asked.training
    return asked.row(asked.read(next(iter(asked.rows(source))), source), source, 0)


def scored(asked, row, said):
    truth = row["reward_model"]["ground_truth"]
    return read_score(asyncio.run(asked.score("x", said.replace("ANSWER", truth), truth, row["extra_info"])))


def test_full_credit_is_right_and_less_is_wrong():
    asked = task()
    row = first_row(asked)
    assert scored(asked, row, r"\boxed{ANSWER}")[1] is True and scored(asked, row, r"\boxed{ANSWER.0}")[1] is True
    for wrong in (r"\boxed{ANSWER and more}", r"\boxed{7 7}", r"\boxed{}", "ANSWER", r"\boxed{text}"):
        assert scored(asked, row, wrong)[:2] == (0.0, False)


def only(generator, *settings, folder="unused"):
    """A task of this generator alone."""
    left_out = [f"task.generators.{name}=null" for name in ("chain_sum", "products", "lcm", "simple_equations")]
    chosen = [f"task.generators.{generator}={{}}", *(f"task.generators.{generator}.{one}" for one in settings)]
    return task(*left_out, *chosen, folder=folder)


def test_a_verifier_has_the_settings_that_the_problems_were_made_with():
    """decimal_arithmetic's tolerance is the last of the decimal places that it is set to, 3 where it is not."""
    asked = only(
        "decimal_arithmetic", "precision=12", "min_num_decimal_places=8", "max_num_decimal_places=8", "max_terms=2"
    )
    row = first_row(asked)
    gold = Decimal(row["reward_model"]["ground_truth"])
    assert scored(asked, row, r"\boxed{ANSWER}")[1] is True
    assert scored(asked, row, rf"\boxed{{{gold + Decimal('0.0001')}}}")[1] is False


def test_a_verifier_gets_the_metadata_that_the_generator_made():
    """rearc's compares a board of tuples."""
    asked = only("rearc")
    row = first_row(asked)
    assert scored(asked, row, r"\boxed{ANSWER}")[1] is True
    assert scored(asked, row, r"\boxed{1 2}")[1] is False


@pytest.mark.parametrize(
    "made",
    [
        {"board": ((1, 2), [3, (4,)]), "empty": [(), [], {}], "text": None},
        {"moves": {1: "a", (2, 3): ("b",)}, "plain": {"1": [0.5, True]}},
    ],
)
def test_tuples_and_keys_that_are_no_text_survive_a_file(made):
    read = module._from_json(module._to_json(made))
    assert read == made and repr(read) == repr(made)


def test_metadata_of_an_earlier_form_are_read_and_folders_with_them_made_again(tmp_path):
    assert module._from_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    asked = task(folder=tmp_path / "data")
    asked.prepare()
    file = tmp_path / "data/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["settings"]["row_form"]
    file.write_text(json.dumps(manifest))
    asked.prepare()
    assert json.loads(file.read_text())["settings"] == asked.settings


def test_a_problem_whose_own_answer_counts_as_wrong_is_left_out_and_counted(tmp_path, monkeypatch, capsys):
    def odd_only(answer, entry):
        return 1.0 if int(answer) % 2 else 0.5

    monkeypatch.setattr(module, "_verifier", lambda generator, settings: odd_only)
    asked = only("chain_sum", folder=tmp_path / "data")
    answers = [int(row["answer"]) for row in asked.rows(asked.training[0])]
    files = asked.prepare()
    kept = [int(row["reward_model"]["ground_truth"]) for row in rows_of(files["data.train_files"])]
    assert kept == [answer for answer in answers if answer % 2] and 0 < len(kept) < len(answers)
    assert f"{len(answers) - len(kept)} left out, its own answer counts as wrong" in capsys.readouterr().out


def test_a_problem_with_several_right_answers_is_kept_where_its_metadata_are_whole():
    """rush_hour's answer is None: its verifier plays the moves that are answered, on the board in the metadata."""
    asked = only("rush_hour")
    (source,) = asked.training
    row = next(iter(asked.rows(source)))
    assert row["answer"] is None
    asyncio.run(asked.check(asked.read(row, source)))
    with pytest.raises(Unusable, match="metadata that cannot be written"):
        asked.read({**row, "metadata": {"board_config": {1, 2}}}, source)


def test_a_row_of_another_generator_is_none_of_the_task():
    """Of countdown the verifier would run the row's own answer as Python, in the process that prepares."""
    asked = task()
    row = {"generator": "countdown", "question": "x", "answer": "1", "metadata": {}}
    with pytest.raises(Unusable, match=r"not in task\.generators"):
        asked.read(row, asked.training[0])


def test_without_the_package_the_remedy_is_named(monkeypatch):
    module._package.cache_clear()
    task_module._make.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="reasoning-gym is not installed: pip install --no-deps -r requirements/"):
        task()
    module._package.cache_clear()
