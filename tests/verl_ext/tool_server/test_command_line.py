"""The command and the README's first lines: what a newcomer types, and what it answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from lab import REPOSITORY, Server

from verl_ext.tool_server import Limits, start_server
from verl_ext.tool_server.__main__ import limits_of, parse_arguments
from verl_ext.tool_server.launch import LIMITS, ServerStartError
from verl_ext.tool_server.types import MIB

README = (REPOSITORY / "verl_ext" / "tool_server" / "README.md").read_text()
SMALL = ("--packages", "numpy")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "verl_ext.tool_server", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "500", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.unit
def test_the_help_has_a_sentence_and_a_default_for_every_option() -> None:
    options = re.findall(r"^  (--[a-z-]+)(?: \S+)?\s+(.*)$", command("--help").stdout, re.MULTILINE)
    assert len(options) >= 23
    for name, text in options:
        assert text[0].isupper() and "." in text, name
        assert re.search(r"\(default: \S+\)$|default: \S+\.$|; default: ", text), name


@pytest.mark.unit
def test_without_options_the_limits_are_the_librarys() -> None:
    assert limits_of(parse_arguments([])) == Limits()


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--wall-seconds 0", "argument --wall-seconds: 0 is not above 0"),
        ("--wall-seconds nan", "argument --wall-seconds: nan is not a finite number"),
        ("--wall-seconds inf", "argument --wall-seconds: inf is not a finite number"),
        ("--wall-seconds soon", "argument --wall-seconds: 'soon' is not a number"),
        ("--port 99999", "argument --port: 99999 is not at least 0 and at most 65535"),
        ("--port -1", "argument --port: -1 is not at least 0 and at most 65535"),
        ("--cpu-seconds 0", "argument --cpu-seconds: 0 is not at least 1"),
        ("--cpu-seconds 1.5", "argument --cpu-seconds: '1.5' is not an integer"),
        ("--memory-mib 0", "argument --memory-mib: 0 is not at least 1"),
        ("--scratch-mib 0", "argument --scratch-mib: 0 is not at least 1"),  # to the kernel: without a limit
        ("--open-files 3", "argument --open-files: 3 is not at least 8"),
        ("--threads 0", "argument --threads: 0 is not at least 1"),
        ("--code-kib -5", "argument --code-kib: -5 is not at least 1"),
        ("--output-kib 0", "argument --output-kib: 0 is not at least 1"),
        ("--output-kib 9000", "argument --output-kib: more than --output-kill-mib"),
        ("--workers 0", "argument --workers: 0 is not at least 1"),
        ("--queue-size -1", "argument --queue-size: -1 is not at least 0"),
        ("--queue-seconds 0", "argument --queue-seconds: 0 is not above 0"),
        ("--drain-seconds -1", "argument --drain-seconds: -1 is not at least 0"),
        ("--parent-pid 0", "argument --parent-pid: 0 is not at least 1"),
        ("--ready-file /nowhere/ready", "argument --ready-file: cannot write in /nowhere"),
        ("--isolation best", "argument --isolation: invalid choice: 'best'"),
        ("--wall 5", "unrecognized arguments: --wall 5"),
        ("--host 0.0.0.0", "--host 0.0.0.0 can be reached from elsewhere: set $TOOL_SERVER_TOKEN"),
    ],
)
def test_senseless_values_are_refused_in_a_line(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOOL_SERVER_TOKEN", raising=False)
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith(f"tool_server: error: {said}")


@pytest.mark.e2e
def test_an_address_that_is_taken_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = command("--port", str(taken.getsockname()[1]))
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 3 and "cannot listen on 127.0.0.1:" in line and "in use" in line


@pytest.mark.e2e
def test_there_is_something_to_see_while_it_starts() -> None:
    """Also where the runtime has yet to be built, which takes longest."""
    seen: list[str] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as cache:
        os.chmod(cache, 0o755)  # as root the programs are another user's
        arguments = ("--packages", "", "--runtime-dir", cache)
        with start_server(workers=1, progress=seen.append, extra_arguments=arguments) as server:
            told = [line.partition(" INFO ")[2] for line in seen]
            assert told[0] == "starting: isolation auto, 1 workers, packages none"
            assert told[1].startswith(f"building the tool runtime in {cache}/")
            assert told[2] == "attacking isolation tier 'strong', to see whether it holds here"
            assert "loading interpreter 1 of 3 (bare)" in told
            assert f"serving on {server.url}, isolation " in server.log()


@pytest.mark.e2e
def test_a_launcher_sets_limits_and_packages() -> None:
    limits = {"wall_seconds": 12.5, "cpu_seconds": 1, "memory_mib": 64, "code_kib": 1, "queue_size": None}
    with start_server(workers=1, limits=limits, packages=("numpy",)) as server:
        handle = Server(server.url, server.pid, server.isolation)
        assert post(handle, {"code": "while True: pass"})["output"] == "[timeout: stopped after 1 s of CPU time]"
        assert post(handle, {"code": "x = bytearray(2**27)"})["outcome"] == "memory"
        assert post(handle, {"code": "#" * 1025})["output"] == "[error: not run, code is larger than 1024 bytes]"
        assert post(handle, {"code": "import numpy, sympy"})["output"].endswith("No module named 'sympy'\n")
        assert post(handle, {"code": "1"})["timeout"] == 12.5


@pytest.mark.unit
def test_every_limit_of_a_launcher_is_an_option() -> None:
    for name in LIMITS:
        value = getattr(parse_arguments([f"--{name.replace('_', '-')}", "9"]), name)
        assert value == 9
    assert limits_of(parse_arguments(["--memory-mib", "9"])).memory_bytes == 9 * MIB


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"memory": 5}, "the tool server has no limit 'memory'; known: wall_seconds, "),
        ({"threads": 0}, "--threads: 0 is"),
    ],
)
def test_a_launchers_wrong_limit_is_named(limits: dict[str, float], said: str) -> None:
    with pytest.raises(ServerStartError, match=re.escape(said)):
        start_server(limits=limits)


def post(server: Server, body: dict[str, object]) -> dict[str, object]:
    """The README's curl line, at another port and with another program."""
    (line,) = re.findall(r"^curl .*$", README, re.MULTILINE)
    line = line.replace("http://127.0.0.1:8080", server.url).replace("""'{"code": "6 * 7"}'""", '"$BODY"')
    environment = {**os.environ, "BODY": json.dumps(body)}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readmes_curl_line_answers(strong_server: Server) -> None:
    answer = post(strong_server, {"code": "6 * 7"})
    assert (answer["outcome"], answer["output"]) == ("ok", "42\n")


@pytest.mark.e2e
def test_the_readmes_first_block_runs_as_a_file(tmp_path: Path) -> None:
    """Where the README says: anywhere, as long as the package can be imported."""
    (block, *_) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "first.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "first.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == r"ok 'array([0, 2, 4])\n'" + "\n" and done.stderr == ""
    assert f"# {done.stdout.strip()}" in block, "the README says what it prints"
