"""The tasks on published problems: every form is read, answers are scored, a folder that does not fit is refused."""

from __future__ import annotations

import asyncio
import inspect
import json

import pytest
from composition import compose, names
from published import MATH_FORMS, write_jsonl

from recipe.gtpo.conversation import read_score
from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.data.prepare import prepare
from recipe.gtpo.run.checks import ConfigError
from recipe.gtpo.run.checks import prepare as prepare_run
from recipe.gtpo.tasks.code import function_under_test
from recipe.gtpo.tasks.commonsense import is_right
from recipe.gtpo.tasks.math import FORMS
from recipe.gtpo.tasks.prepared import DataSet, PreparedTask, Unusable, text
from recipe.gtpo.tasks.task import load_task
from recipe.gtpo.tasks.unit_tests import UnitTests

pytestmark = pytest.mark.unit

ANY = DataSet("any", "", "test")
PUBLISHED = ("code", "commonsense", "gsm8k", "math")


def score(task, said, row):
    """As the agent loop scores a last turn."""
    scored = task.score("any", said, row["reward_model"]["ground_truth"], row["extra_info"])
    return read_score(asyncio.run(scored) if inspect.isawaitable(scored) else scored)


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_task_is_a_class_and_a_file_of_its_name(name):
    task = make_task(name)
    assert isinstance(task, PreparedTask) and type(task).__module__ == f"recipe.gtpo.tasks.{name}"
    config = compose(f"task={name}")
    assert load_task(config) == task and task.scores
    assert task.folder == f"outputs/data/{name}" and set(task.validation or ()) <= {one.name for one in task.evaluation}
    assert len({one.name for one in task.evaluation}) == len(task.evaluation)


def test_no_task_is_forgotten():
    assert {*PUBLISHED, "reasoning_gym", "arithmetic", "verl_data"} == set(names("task"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_without_data_says_how_to_make_them(name, tmp_path):
    config = compose(f"task={name}", f"task.folder={tmp_path}")
    with pytest.raises(ConfigError) as refused:
        prepare_run(config)
    assert str(refused.value) == (
        f"task={name}: task.folder={tmp_path} has no prepared data; make them first: "
        f"python -m recipe.gtpo.data prepare task={name} out={tmp_path}"
    )


@pytest.fixture
def folder(tmp_path):
    for split, rows in {"train": ["2+3", "2+4"], "test": ["1+1"]}.items():
        problems = [{"question": f"What is {sum_}?", "answer": f"#### {eval(sum_)}"} for sum_ in rows]
        write_jsonl(tmp_path / f"local/gsm8k/{split}.jsonl", problems)
    prepare(make_task("gsm8k"), tmp_path / "out", local=tmp_path / "local")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("task.system=Think.", "task.system is not what "),
        ("task.validation=[svamp]", "task.validation: 'svamp' is not in "),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_with_the_remedy(folder, settings, message):
    task = make_task("gsm8k", [f"task.folder={folder}", settings])
    with pytest.raises(ValueError) as refused:
        task.prepare()
    assert str(refused.value).startswith(message)
    assert f"python -m recipe.gtpo.data prepare task=gsm8k out={folder}" in str(refused.value)
    with pytest.raises(ValueError, match="holds data of task=gsm8k"):
        make_task("math", [f"task.folder={folder}"]).prepare()


def test_a_folder_without_an_evaluation_set_is_refused(tmp_path):
    write_jsonl(tmp_path / "gsm8k/train.jsonl", [{"question": "What is 2+3?", "answer": "#### 5"}])
    prepare(make_task("gsm8k"), tmp_path / "out", local=tmp_path)
    with pytest.raises(ValueError, match="has no evaluation set to validate on; make them first"):
        make_task("gsm8k", [f"task.folder={tmp_path}/out"]).prepare()


# -- gsm8k, math ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", MATH_FORMS)
def test_every_published_form_is_the_same_problem(form):
    example = make_task("math").read(MATH_FORMS[form], ANY)
    assert (example.problem, example.answer) == ("What is 2+3?", "5")


def test_every_form_that_is_known_is_tested():
    read = [next(i for i, (columns, _, _) in enumerate(FORMS) if columns <= row.keys()) for row in MATH_FORMS.values()]
    assert set(read) == set(range(len(FORMS)))


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ({"problem": "x", "answer": None}, "any", "no answer"),
        ({"problem": "x", "answer": " "}, "any", "no answer"),
        ({"problem": "x", "solution": "no box"}, "any", "no answer"),
        ({"problem": "", "answer": "1"}, "any", "no problem"),
        ({"problem": "x", "answer": float("nan")}, "any", "no answer"),
        ({"problem": {"text": "x"}, "answer": "1"}, "any", "a dict where a text or a number should be"),
        ({"sQuestion": "x", "lSolutions": [1, 2]}, "any", "not one answer"),
        ({"frage": "x"}, "any", "columns of no known form: frage"),
        ({"problem": "x", "answer": "1", "url": "Problems/2022_AMC_12B_Problems"}, "amc23", "a problem of 2022"),
    ],
)
def test_a_row_that_is_no_problem_says_why(row, name, reason):
    with pytest.raises(Unusable) as refused:
        make_task("math").read(row, DataSet(name, "", "test"))
    assert str(refused.value) == reason


def test_numbers_of_a_table_are_written_as_a_solver_writes_them():
    assert [text(value) for value in (27.0, 27, "27.0", 0.1, None, " a ")] == ["27", "27", "27", "0.1", "", "a"]


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_the_last_box_is_scored(name):
    task = make_task(name)
    row = task.row(task.read({"question": "What is 600+600?", "answer": "#### 1,200"}, ANY), ANY, 0)
    assert score(task, r"First \boxed{3}, no: \boxed{\$1200}.", row) == (1.0, True, r"\$1200")
    assert score(task, r"First \boxed{1200}, no: \boxed{3}.", row) == (0.0, False, "3")
    assert score(task, "1200", row) == (0.0, False, "")


def test_an_answer_that_cannot_be_checked_is_no_training_problem():
    task = make_task("math")
    with pytest.raises(Unusable, match="its answer cannot be checked"):
        asyncio.run(task.check(task.read({"problem": "x", "answer": r"\frac{"}, ANY)))


# -- commonsense ------------------------------------------------------------------------------------------------------

CHOICES = {"label": ["A", "B"], "text": ["bank", "river bed"]}


@pytest.mark.parametrize(
    ("gold", "words", "right", "wrong"),
    [
        ("yes", "", ["yes", "Yes.", r"\text{Yes}", "True"], ["no", "", "yes and no", "y"]),
        ("no", "", ["no", "False"], ["yes", "not"]),
        ("B", "bed", ["B", "b", "(B)", "B.", r"\text{(B)}", "Bed", "B. bed"], ["A", "bank", "B. bank", "AB"]),
        (
            *("B", "washington d.c."),
            ["B", "washington d.c.", "Washington D.C", "B. washington d.c.", r"\text{(B) Washington D.C.}"],
            ["A", "A. washington d.c.", "washington", "d.c.", ""],
        ),
    ],
)
def test_yes_no_and_choices(gold, words, right, wrong):
    assert [answer for answer in right if not is_right(gold, words, answer)] == []
    assert [answer for answer in wrong if is_right(gold, words, answer)] == []


def test_both_commonsense_sets_have_the_same_columns_and_are_scored():
    task = make_task("commonsense")
    rows = [
        {"question": "Where is money kept?", "choices": CHOICES, "answerKey": "A", "question_concept": "money"},
        {"question": "Is fire hot?", "answer": True, "facts": "Fire is hot."},
    ]
    choice, yes = (task.row(task.read(row, ANY), ANY, i) for i, row in enumerate(rows))
    assert choice["prompt"][-1]["content"] == "Where is money kept?\nA. bank\nB. river bed"
    assert choice["extra_info"].keys() == yes["extra_info"].keys()
    assert score(task, r"\boxed{A}", choice)[1] and not score(task, r"\boxed{B}", choice)[1]
    assert score(task, r"\boxed{yes}", yes)[1] and not score(task, "yes", yes)[1]
    authors = [{"label": "A", "text": "bank"}, {"label": "B", "text": "river bed"}]
    for row in (
        {"question": {"stem": "Where is money kept?", "choices": authors}, "answerKey": "A"},
        {"question": "Where is money kept?", "choices": authors, "answerKey": "A"},
    ):
        assert task.row(task.read(row, ANY), ANY, 0) == choice
    assert task.read({"question": "Is ice hot?", "answer": "No"}, ANY).answer == "no"
    for row, reason in (
        ({"question": "x", "choices": CHOICES, "answerKey": ""}, "no answer"),
        ({"question": "x", "choices": CHOICES | {"text": ["bank"]}, "answerKey": "A"}, "not as many"),
        ({"question": "x"}, "an ans"),
    ):
        with pytest.raises(Unusable, match=reason):
            task.read(row, ANY)


# -- code: reading. Its scores, on a tool server: test_unit_tests.py --------------------------------------------------


def test_the_last_block_of_python_is_the_answer():
    task = make_task("code")
    said = "```python\ndef f(): return 1\n```\nBetter:\n```python\ndef f(): return 2\n```\nDone."
    assert task.extract_answer(said) == "def f(): return 2\n"
    assert task.extract_answer("```\nx = 1\n```") == "x = 1\n"
    assert task.extract_answer("def f(): return 1") is None and task.extract_answer("```python\nx = 1") is None


@pytest.mark.parametrize(
    ("said", "program"),
    [
        ("It printed\n```output\n3\n```\nso it works:\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nIt prints\n```text\n3\n```\nas it should.", "x = 1\n"),
        ("It printed\n```output\n3\n```\nso it works.", None),
        ("```Python\nx = 1\n```", "x = 1\n"),
        ("``` PY3\nx = 1\n```", None),
        ("```python3 title=a.py\r\nx = 1\r\n```", "x = 1\r\n"),
        ("````python\nx = 1\n````", "x = 1\n"),
        ("1. So:\n    ```py\n    x = 1\n    ```", "    x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```python\nx = 2", "x = 1\n"),  # cut off
        ("It printed\n```output\n3\n```python\nx = 1\n```", "x = 1\n"),  # the first is never closed
        ("```python\nx = 1\n```Done.", "x = 1\n"),
        ("Call `f`:\n```f(1)``` is 2, ```not``` 3.\n```python\nx = 1\n```\n`f` and\n```f(2)``` are right.", "x = 1\n"),
        ("x = 1 ```python\n```", None),
    ],
)
def test_fences_are_read_in_pairs(said, program):
    assert make_task("code").extract_answer(said) == program


def test_both_forms_of_mbpp_and_humaneval_are_read():
    task = make_task("code")
    code, tests = (
        "def helper(): pass\ndef twice(x):\n    return 2 * x\n",
        ["assert twice(2) == 4", "assert twice(0) == 0"],
    )
    full = {"text": "Write twice.", "code": code, "test_list": tests, "test_setup_code": "", "challenge_test_list": []}
    sanitized = {"prompt": "Write twice.", "code": code, "test_list": tests, "test_imports": ["import math"]}
    for row, setup in ((full, ""), (sanitized, "import math\n")):
        example = task.read(row, ANY)
        assert UnitTests.from_json(example.answer) == UnitTests("twice", setup, "\n".join(tests))
        assert example.problem == "Write twice.\nThe function's name is `twice`. For example: `assert twice(2) == 4`"
        assert tests[1] not in example.problem  # what is asked for is not only what is shown
    human = {
        "prompt": "def f(x):\n",
        "canonical_solution": "    return x\n",
        "test": "def check(c): ...",
        "entry_point": "f",
    }
    example = task.read(human, ANY)
    assert json.loads(example.answer)["tests"].endswith("check(f)") and example.reference == "def f(x):\n    return x\n"


@pytest.mark.parametrize("tests", [["assert other(1)"], ["assert twice(1"], ["assert True"]])
def test_tests_that_call_nothing_of_the_solution_are_no_problem(tests):
    with pytest.raises(Unusable):
        function_under_test("def twice(x): return 2 * x", tests)
