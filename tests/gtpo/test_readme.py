"""The blocks of the README and of docs/ run as they stand there, and what the pages name exists."""

from __future__ import annotations

import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from composition import compose, compose_with_choices, names
from hydra._internal.utils import get_args_parser  # what hydra.main reads its command line with
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.dataset.rl_dataset import RLHFDataset

from recipe.gtpo.conversation import read_score
from recipe.gtpo.evaluate.request import Request, find_benchmarks
from recipe.gtpo.evaluate.request import overrides_of as settings_of
from recipe.gtpo.experiments.compare import matrix, parse
from recipe.gtpo.main import validate
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.run.checks import ROLLOUTS, check, prepare
from recipe.gtpo.run.memory import GB, QWEN25, Machines, Settings, choose, default_size, generation, host, update

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
METHOD_PAGE = "recipe/gtpo/README.md"
NODE_PAGE = "docs/first_node.md"
GUIDE = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PAGES = (*GUIDE, METHOD_PAGE, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
RUN, COMPARE = "examples/run_gtpo_qwen.sh", "examples/compare_baselines.sh"


# -- the blocks -------------------------------------------------------------------------------------------------------


def section(heading: str) -> str:
    """What stands under a heading of the README or of a page in docs/, to the next of its level or above."""
    (found,) = [
        match
        for page in GUIDE
        for match in re.finditer(rf"^(#+) {re.escape(heading)}\n", (ROOT / page).read_text(), re.MULTILINE)
    ]
    return re.split(rf"^#{{1,{len(found[1])}}} (?=[A-Z0-9])", found.string[found.end() :], flags=re.MULTILINE)[0]


def blocks(heading: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", section(heading), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def write_files(heading: str, folder: Path) -> list[Path]:
    """The Python and YAML blocks of a section, in `folder`, under the names that they bear."""
    paths = []
    for text in blocks(heading, "python", "yaml"):
        path = folder / re.search(r"^# (my_[\w/]+\.\w+)$", text, re.MULTILINE)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths.append(path)
    return paths


#: The shell reads the block, with its quotes and variables; what it would start is printed instead: one record a
#: command, ended by \1, of PYTHONPATH, ROLLOUT, script, arguments, each ended by \0.
STUBS = r"""
bash() { printf '%s\0' "${PYTHONPATH:-}" "${ROLLOUT:-}" "$@"; printf '\1'; }
python() { :; }
"""


def commands(heading: str, folder: Path) -> list[tuple[str, str, str, list[str]]]:
    (block,) = blocks(heading, "bash")
    shell = ["env", "-i", "bash", "-euc", STUBS + block]
    said = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
    records = [record.split("\0")[:-1] for record in said.split("\1")[:-1]]
    return [(path, rollout, script, arguments) for path, rollout, script, *arguments in records]


def overrides_of(arguments: Sequence[str], hardware: str, rollout: str = "") -> tuple[str, ...]:
    """What hydra makes of the arguments of run_gtpo_qwen.sh, which puts the machine's two groups before them."""
    stack = [f"hardware={hardware}", f"rollout={rollout or ROLLOUTS[hardware][0]}"]
    parsed = get_args_parser().parse_args([*stack, *arguments])
    if parsed.config_dir is None:
        return tuple(parsed.overrides)
    folder = Path(parsed.config_dir)
    assert folder.is_absolute()
    return (*parsed.overrides, f"hydra.searchpath=[pkg://verl.trainer.config,file://{folder}]")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1e13))  # a run checks its disk
    monkeypatch.setenv("TENSORBOARD_DIR", "unused")  # else `prepare` sets it for the whole process
    return tmp_path


def assert_verl_reads(config: DictConfig, split: str) -> pd.DataFrame:
    """The rows of a data file, after verl's own data set has read them."""
    file = config.data[f"{split}_files"]
    rows = pd.read_parquet(file)
    options = OmegaConf.merge(config.data, {"filter_overlong_prompts": False})  # that needs a tokenizer
    dataset = RLHFDataset(data_files=file, tokenizer=None, config=options)
    (message,) = dataset[0]["raw_prompt"]
    assert len(dataset) == len(rows) and message["role"] == "user"
    index = [row["index"] for row in rows.extra_info]
    assert len(set(index)) == len(index)
    if split == "train":
        assert len(rows) >= config.data.train_batch_size  # verl drops an incomplete batch
    return rows


@pytest.mark.parametrize("heading", ["Your own data and reward", "Your own task", "Your own method variant"])
def test_a_block_to_copy_has_fifteen_lines_at_most(heading):
    found = blocks(heading, "python", "yaml", "bash")
    assert len(found) >= 2
    for text in found:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("# ")]
        assert len(lines) <= 15 and max(map(len, lines)) <= 120, text


def test_own_data_and_reward(folder):
    _, data_program = write_files("Your own data and reward", folder)
    runpy.run_path(str(data_program))
    ((_, _, script, arguments),) = commands("Your own data and reward", folder)
    assert script == RUN
    config, choices = compose_with_choices(*overrides_of(arguments, "single_gpu"))
    check(config, choices)
    task = prepare(config)
    validate(config)

    rows = assert_verl_reads(config, "train")
    assert_verl_reads(config, "val")
    row = rows.iloc[0]
    said, truth = "The tool says so.\n#### 1891", row.reward_model["ground_truth"]
    assert task.extract_answer(said) == truth == "1891"
    score = get_custom_reward_fn(config)

    def outcome(text: str) -> tuple[float, bool, str]:
        return read_score(score(row.data_source, text, truth, row.extra_info))

    assert outcome(said) == (1.0, True, "1891")
    assert outcome("#### 1892") == (0.0, False, "1892") and outcome("1891") == (0.0, False, "")


def test_own_task(folder, monkeypatch):
    write_files("Your own task", folder)
    ((path, _, script, arguments),) = commands("Your own task", folder)
    assert script == RUN
    monkeypatch.syspath_prepend(path)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    config, choices = compose_with_choices(*overrides_of(arguments, "single_gpu"))
    check(config, choices)
    task = prepare(config)
    validate(config)
    assert (type(task).__module__, type(task).__name__, task.name) == ("my_task", "Products", config.task.name)

    rows = assert_verl_reads(config, "train")
    assert_verl_reads(config, "val")
    assert Path(config.data.train_files).parent == folder
    row = rows.iloc[0]
    for text, expected in ((r"So \boxed{1891}.", 1.0), (r"\boxed{1892}", 0.0), ("1891", 0.0)):
        scored = task.score(row.data_source, text, row.reward_model["ground_truth"], row.extra_info)
        assert read_score(scored) == (expected, expected == 1, "")
    assert task.extract_answer(r"So \boxed{1891}.") == "1891" and task.extract_answer("1891") is None


def test_own_method_variant(folder):
    write_files("Your own method variant", folder)
    ((_, _, script, arguments),) = commands("Your own method variant", folder)
    assert script == RUN
    config, choices = compose_with_choices(*overrides_of(arguments, "cpu"))
    assert check(config, choices) == GTPOOptions(leave_one_out=True, scale="none")
    assert config.algorithm.adv_estimator == "gtpo"
    assert config.trainer.experiment_name == "arithmetic-gtpo_leave_one_out-seed1"


# -- what the page says of commands, groups and numbers ---------------------------------------------------------------


def test_every_command_to_run_it_your_way_composes(folder):
    for _, rollout, script, arguments in commands("Run it your way", folder):
        if script == COMPARE:
            assert matrix(*parse(arguments))
            continue
        assert script == RUN
        hardware = dict(argument.split("=", 1) for argument in arguments).get("hardware", "cpu")
        check(*compose_with_choices(*overrides_of(arguments, hardware, rollout)))


def test_every_command_that_evaluates_composes():
    for line in blocks("Evaluate a model", "bash")[0].splitlines():
        arguments = line.removeprefix("python -m recipe.gtpo.evaluate ").split()
        request = Request.parse(arguments)
        for one in find_benchmarks(request.benchmarks, None):
            assert check(*compose_with_choices(*settings_of(one, request, run=(), run_task=None)))


def test_the_first_commands_name_scripts_that_exist(folder):
    for heading in ("Two commands", "Tests"):
        for _, _, script, _ in commands(heading, folder):
            assert (ROOT / script).is_file()


def test_the_table_of_groups_is_the_config_folder():
    table = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| ", section("Run it your way"), re.MULTILINE)
    assert {group: sorted(choices.split(", ")) for group, choices in table} == {
        group: names(group) for group in ("task", "hardware", "mode", "model", "chat_template", "rollout", "experiment")
    }


def test_the_table_of_methods_is_the_config_folder():
    rows = re.findall(r"^\| (`.*?`) \| ", section("Methods"), re.MULTILINE)
    named = [name for row in rows[1:] for name in re.findall(r"`(\w+)`", row)]  # the first is the table's head
    assert sorted(named) == names("method")


def test_what_the_page_says_fits_is_what_the_arithmetic_says():
    rows = re.findall(r"^\| (\d+ x [^|]+) \| ([\d.]+B) \| ([\d.]+B) \|$", section("What fits"), re.MULTILINE)
    assert len(rows) == 4
    longest = int(re.search(r"trajectories of ([\d,]+) tokens", section("What fits"))[1].replace(",", ""))
    assert longest == sum(compose("task=verl_data").data[f"max_{part}_length"] for part in ("prompt", "response"))
    for machines, *largest in rows:
        for one in machines.split(", "):
            *nodes, gpus, size = re.findall(r"\d+", one)
            there = Machines(int(gpus), float(size) * GB, int(nodes[0]) if nodes else 1)
            for rank, name in zip((0, 32), largest, strict=True):
                settings = Settings(tokens=longest, longest=longest, lora_rank=rank)
                fitting = [size for size, shape in QWEN25.items() if choose(shape, there, settings)]
                assert fitting[-1] == name, one


def test_what_that_page_says_of_a_node_s_own_memory_is_what_the_arithmetic_says():
    page, longest = (ROOT / NODE_PAGE).read_text(), 9216

    def needed(size, gpus, **asked):
        """As whole GB that are enough."""
        there = Machines(gpus, 80 * GB)
        return math.ceil(sum(host(QWEN25[size], there, Settings(longest, longest, **asked)).values()) / GB)

    line = re.search(r"arithmetic: (\d+) GB for a 7B, (\d+) where it is offloaded .* 3B (\d+) a GPU", page)
    one, away, small = line.groups()
    assert (int(one), int(away)) == (needed("7B", 2), needed("7B", 2, offload=True))
    on_one, on_eight = re.search(r"(\d+) GB for a 3B on\none GPU, (\d+) on eight", page).groups()
    assert int(small) == int(on_one) == needed("3B", 1) and int(on_eight) == needed("3B", 8)
    (sglang,) = re.search(r"(\d+) GB for a 7B on eight GPUs", page).groups()
    kept = host(QWEN25["7B"], Machines(8, 80 * GB), Settings(longest, longest, sglang=True))
    assert int(sglang) == math.ceil(kept["weights of sleeping rollouts"] / GB)


def test_what_that_page_says_of_sglang_is_what_the_arithmetic_says():
    text = re.search(r"With SGLang it is the same in full\..*?\n\n", section("What fits"), re.DOTALL)[0]
    named = {machines: size for size, machines in re.findall(r"([\d.]+B) on (\d x \d+ GB)", text)}
    longest = sum(compose("task=verl_data").data[f"max_{part}_length"] for part in ("prompt", "response"))
    less = {}
    for count, gigabytes in ((1, 24), (1, 80), (2, 80), (8, 80)):
        there, vllm = Machines(count, gigabytes * GB), Settings(tokens=longest, longest=longest)
        for rank in (0, 32):
            asked = replace(vllm, lora_rank=rank)
            by_vllm, by_sglang, merged = (
                [size for size, shape in QWEN25.items() if choose(shape, there, settings)][-1]
                for settings in (asked, replace(asked, sglang=True), replace(asked, sglang=True, merged=True))
            )
            assert merged == by_vllm and (rank or by_sglang == by_vllm)
            if by_sglang != by_vllm:
                less[str(there)] = by_sglang
    assert less == named != {}


def test_the_doctor_s_command_composes():
    (command,) = re.findall(r"^python -m recipe\.gtpo\.doctor (.*?)  +#", README, re.MULTILINE)
    check(*compose_with_choices(*command.split()))


def test_the_commands_of_the_page_for_a_first_node_compose():
    page = (ROOT / NODE_PAGE).read_text()
    found = re.findall(
        r"^(python -m recipe\.gtpo\.(?:doctor|main)|.*train\.sbatch|.*submit\.sh) (.*?)(?: --cfg job)? +#",
        page,
        re.MULTILINE,
    )
    assert len(found) == 4
    for program, arguments in found:
        apart = ["hardware=multi_node", "rollout=vllm"] if "examples" in program else []
        check(*compose_with_choices(*apart, *arguments.split()))


def test_the_presets_of_that_page_are_what_a_run_chooses():
    page = (ROOT / NODE_PAGE).read_text()
    rows = re.findall(
        r"^\| (\d+ x .*? GB) \| ([\d.]+B) \| (\d+) \| ([\d.]+) \| (yes|no) \| (\d+) \| (\d+) \|$", page, re.MULTILINE
    )
    assert len(rows) == 5
    longest = sum(compose("task=math").data[f"max_{part}_length"] for part in ("prompt", "response"))
    asked = Settings(tokens=longest, longest=longest)
    for machines, size, tokens, share, offload, in_update, in_generation in rows:
        *nodes, gpus, memory = re.findall(r"\d+", machines)
        there = Machines(int(gpus), float(memory) * GB, int(nodes[0]) if nodes else 1)
        assert default_size(there, asked) == size
        found = choose(QWEN25[size], there, asked)
        assert (found.tokens, found.share, found.offload) == (int(tokens), float(share), offload == "yes")
        sums = [round(sum(f(QWEN25[size], there, found).values()) / GB) for f in (update, generation)]
        assert sums == [int(in_update), int(in_generation)]


def test_the_options_of_that_page_are_keys_of_the_config():
    page = (ROOT / NODE_PAGE).read_text()
    config = compose("hardware=single_node", "rollout=vllm", "task=math")
    named = re.findall(r"`((?:actor_rollout_ref|trainer|data)\.[\w.]+)", page)
    assert len(named) >= 8
    for key in named:
        assert OmegaConf.select(config, key, default="absent") != "absent", key


def test_the_results_are_those_of_the_results_page():
    page = (ROOT / "recipe/gtpo/experiments/RESULTS.md").read_text()
    rows = re.findall(r"^\| (\d), (\d+) \| `(\w+)`[^|]*\| (.*?) \| (.*?) \| (\d+)", README, re.MULTILINE)
    assert len(rows) == 4
    for horizon, steps, method, final, area, seeds in rows:
        assert f"| {horizon} | {steps} | `{method}` | {seeds} | {final} | {area} |" in page


def test_the_caption_s_numbers_are_drawn():
    from recipe.gtpo.experiments import draw_credit

    (group,) = draw_credit.by_prompt(map(json.loads, draw_credit.EXAMPLE.read_text().splitlines())).values()
    (row,) = [i for i, one in enumerate(group) if one.acc and one.turns[0].broken]
    drawn = (draw_credit.grpo_advantages(group)[row], draw_credit.gtpo_advantages(group)[row][0])
    assert re.findall(r"\((\+[\d.]+)\)", README.split("\n## ")[0]) == [f"{value:+.2f}" for value in drawn]


def test_the_run_s_folder_is_named_as_the_page_says():
    assert compose("seed=3").trainer.experiment_name == "arithmetic-gtpo-seed3"
    assert "`outputs/<task>-<method>-seed<seed>/`" in README


# -- paths, links, programs -------------------------------------------------------------------------------------------

TOP = [
    path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "outputs"
]
TREE = [
    str(path.relative_to(ROOT))
    for name in ("recipe", "verl_ext", "tests", "examples", "benchmarks", "docs", "requirements")
    for path in (ROOT / name).rglob("*")
] + [path.name for path in ROOT.iterdir()]


def exists(path: str) -> bool:
    """In the repository, from its root or as the end of a path (`rewards.py`, `method/turns.py`)."""
    path = path.rstrip("/")
    return any(known == path or known.endswith(f"/{path}") for known in TREE)


def paths_in(text: str) -> set[str]:
    """What looks like a path of the repository: below one of its folders anywhere, else a file in a code span. NAME
    stands for a name that the reader chooses; cause.txt is in a run's folder."""
    below = re.findall(rf"(?<![\w./-])((?:{'|'.join(TOP)})/[\w./-]*\w/?)(?![\w*{{])", text)
    spans = re.findall(r"`([\w./-]+\.(?:py|md|sh|yaml|txt|jinja|toml|png))`", text)
    return {path for path in (*below, *spans) if not path.startswith("my_") and "NAME" not in path} - {"cause.txt"}


def prose(page: Path) -> str:
    """A page without its blocks: what begins with # there is no heading, and what looks like a link is none."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The links of a page to files and headings that are not there. Addresses of other hosts are not looked at."""
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        linked = (page.parent / target).resolve() if target else page
        if not target.startswith("http") and not (linked.exists() and (not anchor or anchor in anchors(linked))):
            broken.append(f"{target}#{anchor}")
    return broken


@pytest.mark.parametrize("page", [name for name in TREE if name.endswith(".md") and "node_modules" not in name])
def test_every_link_of_every_page_leads_somewhere(page):
    assert broken_links(ROOT / page) == []


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "b.md").write_text("# Two words, `code`\n```bash\n# not this\n```\n")
    page = tmp_path / "a.md"
    page.write_text("# Here\n[1](b.md) [2](b.md#two-words-code) [3](#here)[4](https://x.y) [5](b.md#not-this)[6](c.md)")
    assert broken_links(page) == ["b.md#not-this", "c.md#"]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_program_of_a_page_exists(page):
    text = (ROOT / page).read_text()
    assert sorted(path for path in paths_in(text) if not exists(path)) == []
    for module in re.findall(r"python -m ((?:recipe|verl_ext)[\w.]+)", text):
        place = ROOT / module.rstrip(".").replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


def test_the_paths_of_a_page_are_found_and_a_wrong_one_is_noticed():
    assert {"docs/credit.png", "recipe/gtpo/README.md"} <= paths_in(README)
    assert {"recipe/gtpo/method/", "plugin.py"} <= paths_in((ROOT / "CONTRIBUTING.md").read_text())
    assert exists("recipe/gtpo/method/") and exists("method/turns.py") and not exists("method/spins.py")
