"""The viewer in a real browser: what a person does with it, what hostile text does not, and the page from disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT
from viewer_runs import EQUAL, FAULTY, HOSTILE, hostile, say, trajectory, write

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements/dev.txt)")
expect = sync_api.expect

pytestmark = pytest.mark.e2e

#: The group of the README's picture. Its last row (the fourth there) solved the problem after a malformed call.
PICTURE = [json.loads(line) for line in (ROOT / "docs" / "credit_group.jsonl").read_text().splitlines()]
#: Rollout correction left out its first turn and three of the ten tokens of its second, which two steps sampled.
MASKED = trajectory(
    "masked",
    say("x") | {"masked": 10, "weights": [3, 3]},
    say("x") | {"masked": 3, "weights": [3, 4]},
    advantages=[0.5, -0.5],
)
SECONDS = 20  # for what a busy machine may take; everything is waited for, nothing is slept


def launch(playwright) -> sync_api.Browser:
    """The system's Chromium, else playwright's own. Skips, with what each said, where there is none that starts."""
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root with it
    said = []
    for name in (*filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None):
        try:
            return playwright.chromium.launch(executable_path=name, args=sandbox)
        except sync_api.Error as error:
            said.append(f"{name or 'playwright'}: {str(error).strip().splitlines()[0]}")
    pytest.skip(f"no Chromium starts here ({'; '.join(said)}): python -m playwright install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps({"algorithm.adv_estimator": "gtpo", "algorithm.gtpo.gamma": 0.9}))
    lines = [{"step": step, "metrics": {"val-core/arithmetic/acc/mean@1": 0.1 * step}} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write(folder, {1: PICTURE, 2: [*FAULTY, *EQUAL], 3: [*hostile(), MASKED]})


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory) -> Iterator[str]:
    """Of a viewer that has read the run."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-m", "verl_ext.viewer", str(folder), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert "lines read" in process.stderr.readline()
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)


@pytest.fixture
def page(browser) -> Iterator[sync_api.Page]:
    """A page of its own; the test fails where anything was refused, raised or asked for elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on(
        "request",
        lambda asked: asked.url.startswith(("http://127.0.0.1", "file:", "data:")) or faults.append(asked.url),
    )
    yield page
    context.close()
    assert faults == []


def cell(page, row: int, turn: int):
    return page.locator("table.grid").first.locator("tbody tr").nth(row).locator("button.cell").nth(turn)


def test_a_reader_finds_a_group_and_asks_what_if(page, address):
    page.goto(address)
    groups = page.locator("ol.groups button")
    expect(groups).to_have_count(5)
    page.get_by_role("button", name="timeout", exact=True).click()
    expect(groups).to_have_count(1)
    groups.first.click()
    expect(page.locator(".title")).to_contain_text("sum of pears")
    for state in ("dropped", "unassigned"):
        assert page.locator(f"table.grid .bar.{state}").count() == (state == "dropped")
    page.get_by_role("button", name="timeout", exact=True).click()
    expect(groups).to_have_count(5)

    groups.first.click()
    expect(page.locator("table.grid tbody tr")).to_have_count(8)
    expect(cell(page, 7, 0)).to_contain_text("+0.07")
    cell(page, 7, 0).click()
    expect(page.locator(".ledger")).to_contain_text("gives the same advantage")
    expect(page.locator(".talk article.here")).to_contain_text("turn 0")
    page.get_by_label("method").select_option("grpo_sum")
    for turn in range(4):
        expect(cell(page, 7, turn)).to_contain_text("+0.79")
        expect(page.locator(".talk .pill").nth(turn)).to_have_text("A +0.79?")  # a guess, and said to be one

    other = page.context.new_page()  # a link shows what its sender saw
    other.goto(page.url)
    expect(cell(other, 7, 0)).to_contain_text("+0.79")
    expect(other.locator(".ledger")).to_contain_text("what if")
    other.close()
    page.get_by_role("button", name="back to the record").click()
    expect(cell(page, 7, 0)).to_contain_text("+0.07")


def test_tokens_that_rollout_correction_masked_are_drawn_apart(page, address):
    page.goto(address)
    page.locator("ol.groups button", has_text="sum of masked").click()
    expect(cell(page, 0, 0).locator(".bar")).to_have_class("bar masked")
    expect(cell(page, 0, 1).locator("i.masked")).to_have_attribute("style", "width: 30%;")
    cell(page, 0, 1).click()
    expect(page.locator(".ledger")).to_contain_text("7 tokens; 3 more are masked")
    expect(page.locator(".talk article h4").nth(0)).to_contain_text("weights of step 3 ")  # they changed meanwhile
    expect(page.locator(".talk article h4").nth(1)).to_contain_text("weights of step 3 to 4")


def test_keys_do_what_the_help_says(page, address):
    page.goto(address)
    expect(page.locator("ol.groups button")).to_have_count(5)
    titles = page.locator(".title h2")
    page.keyboard.press("n")
    first = titles.inner_text()
    page.keyboard.press("n")
    expect(titles).not_to_have_text(first)
    page.keyboard.press("p")
    expect(titles).to_have_text(first)
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    expect(page.locator("tr.here th")).to_have_text("2")
    expect(page.locator(".ledger h3")).to_contain_text("turn 1")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("next, previous group")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("/")
    page.keyboard.type("plums")
    expect(page.locator("ol.groups button")).to_have_count(1)
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    expect(page.locator(".title h2")).to_contain_text("plums")
    page.get_by_role("button", name="log-prob gap").click()
    expect(page.locator(".tokens span").nth(1)).to_have_attribute("title", re.compile("−0.2500"))


def test_other_views_are_drawn(page, address):
    page.goto(f"{address}#view=curves")
    expect(page.locator(".plot canvas")).to_have_count(1)
    page.goto(f"{address}#view=gradient")
    expect(page.locator(".plot canvas")).to_have_count(3)
    expect(page.locator("main")).to_contain_text("by reward part")
    page.goto(f"{address}#view=runs")
    expect(page.locator("main")).to_contain_text("Fewer than two runs with a config")
    page.locator("header button").first.click()
    theme = page.locator("html").get_attribute("data-theme")
    page.locator("header button").first.click()
    expect(page.locator("html")).not_to_have_attribute("data-theme", theme)


def test_hostile_text_is_text(page, address):
    page.goto(f"{address}#step=3")
    page.locator("ol.groups button").first.click()
    rows = page.locator("table.grid tbody tr")
    expect(rows).to_have_count(len(HOSTILE))
    for row in range(len(HOSTILE)):
        cell(page, row, 0).click()
        expect(page.locator(".talk h3")).to_contain_text(f"Trajectory {row + 1}")
        raw = page.locator(".talk h4 button", has_text="as written")
        if raw.count():  # a turn whose call could not be read is shown as written from the start
            raw.first.click()
        assert page.evaluate("window.hacked === undefined && location.hostname === '127.0.0.1'")
        assert (
            page.evaluate(
                "document.querySelectorAll('.talk :is(script,img,iframe,svg,style,link,meta,base,object)').length"
            )
            == 0
        )
        if row == 15:
            expect(page.locator(".talk")).to_contain_text("⟨U+202E⟩evil reversed⟨U+202C⟩")
        if row == 16:
            expect(page.locator(".talk")).to_contain_text("␛[31mred␛[0m")
    expect(page.locator(".talk")).to_contain_text("20,000 of 10,000,000 characters")


def test_a_page_follows_the_run(page, address, folder):
    page.goto(address)
    groups = page.locator("ol.groups button")
    expect(groups).to_have_count(5)
    write(folder, {4: [trajectory("late")]})
    try:
        expect(groups).to_have_count(6)
    finally:
        (folder / "trajectories" / "4.jsonl").unlink()
    expect(groups).to_have_count(5)


def test_the_exported_page_works_from_disk_without_a_network(page, folder, tmp_path):
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "verl_ext.viewer", str(folder), "--export", str(out)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=5 * SECONDS, capture_output=True)
    page.context.set_offline(True)
    page.goto(f"{out.as_uri()}#view=groups")
    expect(page.locator("ol.groups button")).to_have_count(5)
    page.locator("ol.groups button").first.click()
    expect(cell(page, 7, 0)).to_contain_text("+0.07")
    expect(page.locator(".ledger")).to_contain_text("gives the same advantage")
    page.get_by_label("method").select_option("grpo_sum")
    expect(cell(page, 7, 0)).to_contain_text("+0.79")
    page.locator("#search").fill("sum of plums")
    expect(page.locator("ol.groups button")).to_have_count(1)
    page.goto(f"{out.as_uri()}#view=groups&step=3")
    page.locator("ol.groups button").first.click()
    cell(page, 0, 0).click()
    expect(page.locator(".talk")).to_contain_text("<script>window.hacked")
    assert page.evaluate("window.hacked") is None
