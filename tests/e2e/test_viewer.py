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
from viewer_runs import EQUAL, FAULTY, HOSTILE, MIXED, call, hostile, say, trajectory, write

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements/dev.txt)")
expect = sync_api.expect

pytestmark = pytest.mark.e2e

#: The group of the README's picture. Its last row (the fourth there) solved the problem after a malformed call.
PICTURE = [json.loads(line) for line in (ROOT / "docs" / "credit_group.jsonl").read_text().splitlines()]
#: As many groups as need two pages of the list.
MANY = [trajectory(f"nuts {number}", say("x")) for number in range(130)]
#: Rollout correction left out its first turn and three of the ten tokens of its second, which two steps sampled. The
#: pool is of its returns 0.9 and 1.
POOL = {"pool_mean": 0.95, "divisor": 0.07071}
MASKED = trajectory(
    "masked",
    say(r"\(x^2\)") | POOL | {"return": 0.9, "masked": 10, "weights": [3, 3]},
    say("x") | POOL | {"return": 1.0, "masked": 3, "weights": [3, 4]},
    acc=1.0,
    advantages=[0.0, 0.7071],
)
#: A success that is paid 0.3 bounds what closeness to it pays by 0.15: the first failure has that, for 0.45.
BOUNDED = [
    trajectory("bounds", call("3 + 4"), acc=1.0, outcome=0.3, session=0),
    *(
        trajectory(
            "bounds",
            call(f"{n} * 4") | {"rewards": {"outcome": 0.0, "shaping": paid, "format": 0.0}, "reward": paid},
            session=n,
            partners=[{"session": 0, "similarity": similarity}],
        )
        for n, similarity, paid in ((1, 0.9, 0.15), (2, 0.2, 0.1))
    ),
]
ACCURACY = "val-core/arithmetic/acc/mean@4"
#: What stands beside it: the first two by verl, the last two by evaluate.
BEST = ("best@4/mean", "maj@4/mean", "maj@4", "pass@4")
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
    lines = [
        {"step": step, "metrics": {f"val-core/arithmetic/acc/{name}": 0.9 for name in BEST} | {ACCURACY: 0.1 * step}}
        for step in range(4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write(folder, {1: PICTURE, 2: [*FAULTY, *EQUAL], 3: [*hostile(), MASKED]})


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another run: it solved plums in step 2, where the first did not."""
    solved = [one | {"acc": 1.0} for one in EQUAL]
    return write(tmp_path_factory.mktemp("other"), {2: solved, 5: EQUAL, 6: MANY, 7: BOUNDED})


@pytest.fixture(scope="module")
def address(folder, other, tmp_path_factory) -> Iterator[str]:
    """Of a viewer that has read both runs."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-m", "verl_ext.viewer", str(folder), str(other), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        for _ in (folder, other):
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


def test_the_ledger_works_out_every_number_where_it_stands(page, address):
    page.goto(address)
    page.locator("ol.groups button").first.click()
    cell(page, 0, 1).click()
    ledger = page.locator(".ledger")
    # By the picture: 23 turns of the prompt; the return, the mean, the divisor and the advantage, each worked out.
    expect(ledger).to_contain_text("of 23 returns: all turns of the prompt")
    expect(ledger.locator(".right")).to_have_count(4)
    ledger.get_by_text("the returns").click()
    expect(ledger.locator(".pool dd")).to_have_count(8)
    assert sum(len(line.split()) for line in ledger.locator(".pool dd").all_inner_texts()) == 23
    page.get_by_label("method").select_option("gtpo_turn")
    expect(ledger).to_contain_text("of 8 returns: this turn of the prompt")
    expect(page.locator("select[name=format_rule]")).to_have_value("strict")  # the run's own: no method sets it
    page.get_by_label("method").select_option("gtpo_bootstrap")
    expect(ledger).to_contain_text("turns of the prompt whose tools had said the same")
    expect(ledger).to_contain_text("taken from all siblings that its tools led to the same state")
    assert "undefined" not in ledger.inner_text()


def test_the_ledger_knows_that_shaping_pays_no_more_than_its_share_of_the_least_success(page, address):
    page.goto(f"{address}#run=1&step=7")
    page.locator("ol.groups button").first.click()
    shaping = page.locator(".ledger tr", has_text="shaping")
    for row, said in ((1, "0.5 × 0.3000 ✓"), (2, "0.5 / 1 × (0.200) ✓")):
        cell(page, row, 0).click()
        expect(shaping).to_contain_text(said)
    expect(shaping).not_to_contain_text("bounds")
    cell(page, 1, 0).click()
    expect(shaping).to_contain_text("the least that a solved sibling got bounds 0.5 / 1 × (0.900)")


def test_a_conversation_has_formulas_coloured_code_and_the_code_that_shaping_compares_with(page, address):
    page.goto(address)
    page.locator("ol.groups button").first.click()
    cell(page, 0, 0).click()
    expect(page.locator(".talk .hljs-number").first).to_have_text("1350")
    page.locator(".partners .chip").first.click()
    expect(page.locator(".diff .added").first).to_contain_text("+")
    page.goto(f"{address}#step=3")
    page.locator("ol.groups button", has_text="sum of masked").click()
    expect(page.locator(".talk math")).to_have_count(1)


def test_a_text_is_copied_whole_and_all_of_a_conversation_opens(page, address):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address.rstrip("/"))
    page.goto(f"{address}#step=3")
    page.locator("ol.groups button").first.click()
    cell(page, len(HOSTILE) - 1, 0).click()
    turn = page.locator(".talk article").first
    expect(turn).to_contain_text("20,000 of 200,000 characters")
    turn.locator("h4").get_by_role("button", name="copy").click()
    expect(turn.locator("h4").get_by_role("button", name="copied")).to_have_count(1)
    assert page.evaluate("navigator.clipboard.readText()") == "A" * 200_000

    folds = page.locator(".talk details")
    shut = page.locator(".talk details:not([open])")
    expect(shut).not_to_have_count(0)
    page.get_by_role("button", name="open all").click()
    expect(shut).to_have_count(0)
    page.keyboard.press("e")
    expect(shut).to_have_count(folds.count())


def test_the_same_prompt_is_laid_side_by_side_in_the_steps_that_both_runs_have(page, address):
    page.goto(address)
    page.locator("ol.groups button", has_text="sum of plums").click()
    page.get_by_role("link", name="same prompt").click()
    rows = page.locator("table.pairs > tbody > tr")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("1 steps together")
    expect(rows.nth(0)).to_contain_text("2/2 solved: 100 % (+100 points)")
    assert [row.locator("> th").inner_text() for row in rows.all()[1:]] == ["step 2", "step 5"]
    expect(rows.nth(1).locator("table.grid")).to_have_count(2)
    expect(rows.nth(2).locator("table.grid")).to_have_count(1)
    rows.nth(2).locator("button.cell").nth(1).click()
    expect(page.get_by_label("run", exact=True)).to_have_value("1")
    expect(page.locator(".title")).to_contain_text("step 5")
    expect(page.locator("tr.here th")).to_have_text("2")


def test_n_and_p_go_on_where_the_list_ends_or_has_the_group_elsewhere(page, address):
    page.goto(f"{address}#run=1&step=6")
    page.locator("ol.groups button").nth(99).click()
    title = page.locator(".title h2")
    expect(title).to_contain_text("nuts 99?")
    page.keyboard.press("n")
    expect(title).to_contain_text("nuts 100?")
    expect(page.locator("ol.groups button")).to_have_count(30)
    page.keyboard.press("p")
    expect(title).to_contain_text("nuts 99?")
    expect(page.locator("ol.groups button")).to_have_count(100)
    page.keyboard.press("n")
    expect(title).to_contain_text("nuts 100?")
    other = page.context.new_page()  # a link to a group that the list has on its second page
    other.goto(re.sub("&offset=100", "", page.url))
    expect(other.locator("ol.groups button")).to_have_count(100)
    expect(other.locator(".title h2")).to_contain_text("nuts 100?")
    other.keyboard.press("n")
    expect(other.locator(".title h2")).to_contain_text("nuts 101?")
    other.close()


def test_the_address_has_the_order_of_the_siblings(page, address):
    page.goto(address)
    page.locator("ol.groups button").first.click()
    page.get_by_label("order of siblings").select_option("outcome")
    first = page.locator("table.grid tbody th").first
    expect(first).not_to_have_text("1")
    number = first.inner_text()
    page.reload()
    expect(first).to_have_text(number)


def test_tokens_that_rollout_correction_masked_are_drawn_apart(page, address):
    page.goto(address)
    page.locator("ol.groups button", has_text="sum of masked").click()
    expect(cell(page, 0, 0).locator(".bar")).to_have_class("bar masked")
    expect(cell(page, 0, 1).locator("i.masked")).to_have_attribute("style", "width: 30%;")
    cell(page, 0, 1).click()
    ledger = page.locator(".ledger")
    expect(ledger).to_contain_text("7 tokens; 3 more are masked")
    expect(ledger).to_contain_text("gives the same advantage")
    cell(page, 0, 0).click()
    expect(ledger).to_contain_text("none of its tokens was trained on")
    expect(ledger).not_to_contain_text("The method's own code")
    expect(ledger).not_to_contain_text("the pool is flat or silenced")
    expect(ledger.locator(".bad")).to_have_count(0)
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
    expect(page.locator(".plot .u-title")).to_have_text(ACCURACY)
    page.goto(f"{address}#view=gradient")
    expect(page.locator(".plot canvas")).to_have_count(3)
    expect(page.locator("main")).to_contain_text("by reward part")
    page.goto(f"{address}#view=runs")
    expect(page.locator("main")).to_contain_text("Fewer than two runs with a config")
    expect(page.locator("table.plain tbody tr").first).to_contain_text("0.000 (step 0) → 0.300 (step 3)")
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


def test_curves_and_runs_follow_metrics_that_come_after_the_trajectories_of_any_run(page, address, folder):
    path = folder / "metrics.jsonl"
    before = path.read_text()
    runs = page.context.new_page()
    page.goto(f"{address}#run=1&view=curves")
    runs.goto(f"{address}#run=1&view=runs")
    expect(page.locator(".plot .u-title")).to_have_text([ACCURACY])
    accuracy = runs.locator("table.plain tbody tr").first
    expect(accuracy).to_contain_text("→ 0.300 (step 3)")
    path.write_text(before + json.dumps({"step": 4, "metrics": {ACCURACY: 0.5, "gtpo/acc/mean": 0.5}}) + "\n")
    try:
        expect(page.locator(".plot .u-title")).to_have_text([ACCURACY, "gtpo/acc/mean"])
        runs.bring_to_front()
        expect(accuracy).to_contain_text("→ 0.500 (step 4)")
    finally:
        path.write_text(before)
        runs.close()


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
    for typed, count in {
        "sum of plums": 1,
        '"of sum"': 0,
        "plum": 1,
        "plum ": 0,
        "language": 0,
        "PEARS malformed": 0,
    }.items():
        page.locator("#search").fill(typed)  # as the server takes words, and nothing but the texts
        expect(page.locator("ol.groups button")).to_have_count(count)
    page.goto(f"{out.as_uri()}#view=groups&step=3")
    page.locator("ol.groups button").first.click()
    for row in range(len(HOSTILE)):
        cell(page, row, 0).click()
        expect(page.locator(".talk h3")).to_contain_text(f"Trajectory {row + 1}")
        assert page.evaluate("window.hacked === undefined && location.protocol === 'file:'")
    expect(page.locator(".talk")).to_contain_text("cut after 20,000 of 10,000,000 characters")


def test_a_page_that_could_not_compare_programs_says_so_where_that_is_needed(page, tmp_path):
    """Its run did not shape, and the server of its similarities is gone."""
    folder, out = write(tmp_path / "run", {1: MIXED}), tmp_path / "page.html"
    similarity = {"backend": "http", "url": "http://127.0.0.1:1/v1"}
    config = {"enable": False} | {f"similarity.{name}": value for name, value in similarity.items()}
    (folder / "config.json").write_text(json.dumps({f"algorithm.gtpo.shaping.{k}": v for k, v in config.items()}))
    command = [sys.executable, "-m", "verl_ext.viewer", str(folder), "--export", str(out)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=5 * SECONDS, capture_output=True, text=True)
    assert done.returncode == 0 and "2 pairs of programs are not compared" in done.stderr, done.stderr
    page.goto(f"{out.as_uri()}#view=groups")
    page.locator("ol.groups button").first.click()
    page.get_by_label("method").select_option("grpo_outcome")
    expect(page.locator(".ledger h3")).to_contain_text("what if")
    page.get_by_label("method").select_option("gtpo")
    expect(page.locator(".whatif .bad")).to_contain_text("whose similarity is not in this page")
    expect(page.locator(".ledger h3")).to_contain_text("record")  # and not the what-if before
    assert "NaN" not in page.locator("body").inner_text()
