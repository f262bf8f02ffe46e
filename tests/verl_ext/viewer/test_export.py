"""The exported page: one file, its policy names exactly what is in it, and no text of a model changes it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from viewer_runs import DIVERGED, EQUAL, FAULTY, MIXED, hostile, write

from verl_ext.viewer import __main__ as command
from verl_ext.viewer import export, queries
from verl_ext.viewer.runs import Run

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(folder, steps, wanted=None) -> tuple[str, str]:
    run = Run(write(folder / "run", steps), None)
    run.update()
    said = export.write([run], folder / "page.html", wanted)
    return said, (folder / "page.html").read_text()


def data(page: str) -> dict:
    (packed,) = re.findall(r'<script type="application/json" id="data">([A-Za-z0-9+/=]*)</script>', page)
    text = gzip.decompress(base64.b64decode(packed))
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"a browser reads no {name}"))


def test_the_policy_names_the_hash_of_every_script_and_style_in_it(tmp_path):
    _, page = make(tmp_path, {1: MIXED})
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    named = set(re.findall(r"'(sha256-[^']*)'", policy))
    inline = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.DOTALL)
    hashes = {f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}" for text in inline}
    assert named == hashes and len(inline) == 3
    assert "unsafe" not in policy and "connect-src" not in policy and "default-src 'none'" in policy


def test_nothing_is_loaded_and_nothing_around_the_data_depends_on_it(tmp_path):
    _, plain = make(tmp_path / "a", {1: MIXED})
    said, attacked = make(tmp_path / "b", {1: hostile()})
    strip = re.compile(r'id="data">[^<]*<')
    assert strip.sub("", plain) == strip.sub("", attacked)
    markup = re.sub(r"<(script|style)>.*?</\1>", "", strip.sub("", attacked), flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="([^"]*)"', markup) == ["data:,"]
    assert re.search(r"[1-9]\d* texts cut to 20000 characters", said)


def test_the_data_is_what_the_server_would_answer(tmp_path):
    said, page = make(tmp_path, {1: MIXED, 2: [*FAULTY, *EQUAL]})
    run = Run(tmp_path / "run", None)
    (found,) = data(page)["runs"]
    assert "9 trajectories of 1 run(s)" in said
    assert found["groups"] == queries.all_groups(run)
    assert found["rows"]["train/2"] == json.loads(json.dumps(queries.step_rows(run, "train", 2)))
    assert found["conversations"]["1"] == queries.conversation(run, 1)


class Silent:
    """A method that can compare no two programs."""

    JAVASCRIPT = Path(__file__)  # any text

    @staticmethod
    def settings_of(config):
        return {}

    @staticmethod
    def uncontrolled(config):
        return {}

    @staticmethod
    def controls():
        return []

    @staticmethod
    def presets():
        return {}

    @staticmethod
    def recompute(rows, settings, config, codes):
        raise RuntimeError("no server")

    @staticmethod
    def similarities(rows, config, codes):
        return [row["similar"] or {} for row in rows], len(rows), "no server:\nrefused"


def test_what_cannot_be_compared_is_one_line_on_stderr_and_no_end(tmp_path, capsys):
    run = Run(write(tmp_path / "run", {1: MIXED, 2: EQUAL}), Silent)
    run.update()
    assert "5 trajectories" in export.write([run], tmp_path / "page.html", None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"viewer: {run.path}: 5 pairs of programs are not compared")
    assert line.endswith(": no server: refused")
    assert data((tmp_path / "page.html").read_text())["runs"][0]["rows"]["train/1"][0]["similar"] == {}


def test_a_run_that_diverged_is_still_a_page(tmp_path):
    _, page = make(tmp_path, {1: DIVERGED})
    (found,) = data(page)["runs"]
    assert found["rows"]["train/1"][0]["turns"][0]["log_prob"] is None
    assert found["conversations"]["1"]["turns"][0]["tokens"] == [["5 ", None], ["7 ", -0.25]]


def test_steps_can_be_chosen(tmp_path):
    said, page = make(tmp_path, {1: MIXED, 2: FAULTY}, {2})
    assert "4 trajectories" in said
    assert data(page)["overview"]["runs"][0]["steps"] == {"train": [2]}
    assert list(data(page)["runs"][0]["rows"]) == ["train/2"]


def test_too_much_for_a_page_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MOST", 5)
    with pytest.raises(ValueError, match=r"has 9 trajectories, more than 5: choose some with --steps"):
        make(tmp_path, {1: MIXED, 2: [*FAULTY, *EQUAL]})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        ([".", "--steps", "1"], "--steps belongs to --export"),
        ([".", "--export", "x.html", "--steps", "one"], "'one' is no step"),
        ([".", "--export", "x.html"], "no recorded trajectory"),
        ([], "required: run_dir"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        command.main(arguments)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and said in error and error.startswith("viewer: error:") and error.count("\n") == 1


def test_the_command_writes_the_page(tmp_path, capsys):
    folder = write(tmp_path / "run", {1: MIXED, 3: MIXED, 4: MIXED})
    command.main([str(folder), "--export", str(tmp_path / "out" / "page.html"), "--steps", "1,3-9"])
    assert "9 trajectories" in capsys.readouterr().out and (tmp_path / "out" / "page.html").exists()
