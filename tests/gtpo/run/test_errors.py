"""The last line of a run names its cause, without colours, through whatever the error was wrapped in."""

from __future__ import annotations

import traceback

import pytest
from composition import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from ray import cloudpickle as pickle
from ray.exceptions import ActorDiedError, RayTaskError
from transformers import GPT2Config
from verl.models.transformers.monkey_patch import apply_monkey_patch

from recipe.gtpo.run.errors import one_line, plain

pytestmark = pytest.mark.unit


def raised(function, *args, **kwargs) -> Exception:
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    return caught.value


def sent(error: Exception, by: str = "ray::WorkerDict.init_model") -> Exception:
    """As Ray hands an error of another process to whoever asks for the result."""
    report = "".join(traceback.format_exception(error))
    failed = RayTaskError(by, report, error, proctitle=by, pid=17, ip="10.0.0.1")
    return pickle.loads(pickle.dumps(failed)).as_instanceof_cause()


class Patched:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8)


def test_an_override_that_hydra_cannot_read_is_told_how_to_quote():
    cli_word = "task.answer=#### (.+)"
    message = one_line(raised(OverridesParser.create().parse_overrides, [cli_word]))
    assert message.startswith(f"{cli_word} is no override that Hydra can read.") and "\n" not in message
    quoted = OverridesParser.create().parse_override('task.answer="#### (.+)"')  # what the message advises
    assert quoted.value() == "#### (.+)" and """'task.answer="#### (.+)"'""" in message


def test_a_group_that_is_set_to_null_is_named_and_no_traceback():
    with pytest.raises(HydraException, match="cannot be set to null by an override: leave it out"):
        compose("model=null")


CAUSE = "AttributeError: 'GPT2Config' object has no attribute 'num_key_value_heads'"


def test_an_architecture_that_verl_cannot_patch_is_named_through_rays_wrappers():
    error = raised(apply_monkey_patch, Patched())
    assert one_line(error) == CAUSE
    once = sent(error)
    assert str(once).startswith("\x1b[36mray::WorkerDict")  # what the last line was
    assert one_line(once) == CAUSE
    assert one_line(sent(once, "ray::GTPOTaskRunner.run")) == CAUSE


def test_an_actor_that_failed_to_start_is_named_by_what_it_raised():
    task = RayTaskError("f", "".join(traceback.format_exception(raised(apply_monkey_patch, Patched()))), ValueError())
    died = ActorDiedError(task)
    assert "\x1b[36m" in str(died)
    assert one_line(died) == CAUSE


class Unsendable(Exception):
    def __reduce__(self):
        raise TypeError("no")


def fail():
    raise Unsendable("the disk is full\nand more of it")


def test_an_error_that_cannot_be_sent_is_named_by_its_traceback():
    error = raised(fail)
    report = "".join(traceback.format_exception(error))
    assert one_line(RayTaskError("f", report, error)) == f"{Unsendable.__module__}.Unsendable: the disk is full"


def test_a_dead_process_is_named_by_its_class():
    report = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: workers.<locals>.WorkerDict\n"
        "\tactor_id: 45c8\n\tpid: 9351\n\tnamespace: 6c9a\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits. Some common causes include: (1) ..."
    )
    said = "a process of the run died: class_name workers.<locals>.WorkerDict, pid 9351, Worker exit type SYSTEM_ERROR"
    assert one_line(RuntimeError(report)) == said


def test_what_a_class_raised_that_hydra_called_is_the_cause():
    error = raised(instantiate, {"_target_": "decimal.Decimal", "value": "x"})
    assert "Error in call to target" in str(error)
    assert one_line(error) == "InvalidOperation: [<class 'decimal.ConversionSyntax'>]"
    lost = pickle.loads(pickle.dumps(error))  # between processes a cause is lost, the text is not
    assert one_line(lost).startswith("InstantiationException: Error in call to target 'decimal.Decimal': InvalidOp")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError("\n\n one \n"), "ValueError: one"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("\x1b[1m\x1b[31mred\x1b[0m thing"), "RuntimeError: red thing"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_an_error_of_this_process_is_its_type_and_first_line(error, line):
    assert one_line(error) == line


def test_a_fault_in_a_yaml_file_is_named_with_its_line(tmp_path):
    (tmp_path / "tools.yaml").write_text("tools:\n  - config: {a: 1\n  - b\n")
    line = one_line(raised(OmegaConf.load, tmp_path / "tools.yaml"))
    assert line.startswith(f"ParserError: line 4 of {tmp_path}/tools.yaml: expected ','")


def test_an_error_that_is_its_own_cause_does_not_hang():
    error = ValueError("round")
    error.cause = error
    assert one_line(error) == "ValueError: round"


def test_plain_keeps_the_text():
    assert plain("\x1b[36mray::f()\x1b[39m (pid=1)") == "ray::f() (pid=1)"
