"""A rollout through the real agent loop: verl's Continuous Token builder and a tiny Qwen2 tokenizer with its template.

Only the two ends are fakes: a server that says what a test wrote down, and tools that answer what a test wrote down.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from composition import compose
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.workers.rollout.replica import TokenOutput

from recipe.gtpo.agent_loop import GTPOAgentLoop
from recipe.gtpo.method.turns import TRAJECTORY, Trajectory
from recipe.gtpo.tasks.arithmetic.policy import TURN_END

QUESTION = [{"role": "user", "content": "What is 2+3?"}]
CALL = '<tool_call>{"name": "python", "arguments": {"code": "2+3"}}</tool_call>'
RIGHT, WRONG = r"It is \boxed{5}.", r"It is \boxed{6}."


class ScriptedServer:
    """Says `turns` one after the other: a text ends with the end-of-turn token, a list of ids is said as it is.

    Like a real server it stops at `max_tokens`. Tokens of turn k have the log-probs -k-0.001, -k-0.002, ...
    """

    def __init__(self, tokenizer, turns):
        end = tokenizer.convert_tokens_to_ids(TURN_END)
        encode = tokenizer.encode
        self.script = [[*encode(t, add_special_tokens=False), end] if isinstance(t, str) else t for t in turns]
        self.said: list[list[int]] = []
        self.requests: list[dict[str, Any]] = []

    async def generate(self, *, request_id, prompt_ids, sampling_params) -> TokenOutput:
        turn = len(self.said)
        self.requests.append({"request_id": request_id, "prompt_ids": list(prompt_ids), **sampling_params})
        ids = self.script[turn][: sampling_params["max_tokens"]]
        self.said.append(ids)
        log_probs = [-turn - i / 1000 for i in range(1, len(ids) + 1)] if sampling_params["logprobs"] else None
        steps = {"global_steps": turn + 3, "min_global_steps": turn + 3, "max_global_steps": turn + 3}
        return TokenOutput(token_ids=ids, log_probs=log_probs, stop_reason="completed", extra_fields=steps)


class ContextServer(ScriptedServer):
    """verl's vLLM server as the agent loop sees it, with a context of `context` tokens.

    It clamps what was asked for, says "completed" for either end, and raises where not a token fits.
    """

    context: int
    held_back = 0  # tokens that the server keeps for itself

    @classmethod
    def of(cls, context):
        return type(cls.__name__, (cls,), {"context": context})

    async def generate(self, *, prompt_ids, sampling_params, **kwargs) -> TokenOutput:
        room = self.context - len(prompt_ids) - self.held_back
        if room < 1 - self.held_back:
            raise ValueError(f"Prompt length ({len(prompt_ids)}) leaves no room to generate")
        clamped = {**sampling_params, "max_tokens": min(sampling_params["max_tokens"], room)}
        output = await super().generate(prompt_ids=prompt_ids, sampling_params=clamped, **kwargs)
        output.stop_reason = self.reason(output.token_ids, self.script[len(self.said) - 1])
        return output

    def reason(self, said, script):
        return "completed"


#: The words that SGLang 0.5.12 takes in a request; tests/test_requirements.py compares them with its own class.
SGLANG_WORDS = {
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema", "regex"),
    *("ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"),
    *("no_stop_trim", "custom_params", "stream_interval", "logit_bias", "sampling_seed"),
}
#: Those that verl's server takes out of a request before SGLang sees it.
VERLS_WORDS = {"max_tokens", "max_new_tokens", "logprobs", "prompt_logprobs"}


class SGLangServer(ContextServer):
    """verl's SGLang server: it never fills the context's last token, says "length", and knows its own words only.

    Where log-probs and tokens differ in number, it hands out neither, and says how generation ended all the same:
    `mismatch` is the turn in which that happens.
    """

    held_back = 1
    mismatch: int | None = None

    async def generate(self, *, sampling_params, **kwargs) -> TokenOutput:
        if unknown := sampling_params.keys() - SGLANG_WORDS - VERLS_WORDS:
            raise TypeError(f"SamplingParams.__init__() got an unexpected keyword argument '{unknown.pop()}'")
        turn = len(self.said)
        output = await super().generate(sampling_params=sampling_params, **kwargs)
        if turn == self.mismatch:
            output.token_ids, output.log_probs = [], []
        return output

    def reason(self, said, script):
        return "stop" if said == script else "length"


class FakePython(BaseTool):
    """The tool `python`: hands back the next of `answers`: a text, (text, outcome[, detail]) or an exception."""

    def __init__(self, *answers: Any, schema: OpenAIFunctionToolSchema | None = None):
        parameters = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
        function = {"name": "python", "description": "Run Python code.", "parameters": parameters}
        super().__init__({}, schema or OpenAIFunctionToolSchema(type="function", function=function))
        self.answers = list(answers)
        self.ran: list[str] = []
        self.open = 0

    async def create(self, instance_id=None, **kwargs):
        self.open += 1
        return await super().create(instance_id, **kwargs)

    async def execute(self, instance_id, parameters, **kwargs):
        self.ran.append(parameters["code"])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        text, *about = (answer,) if isinstance(answer, str) else answer
        return ToolResponse(text=text), 0.0, dict(zip(("outcome", "detail"), about, strict=False))

    async def release(self, instance_id, **kwargs):
        self.open -= 1


class Rollout:
    """One trajectory and everything that went in and out of it."""

    def __init__(
        self, tokenizer, turns, tool=None, changes=None, sampling=None, server=ScriptedServer, kind="qwen2", **row
    ):
        self.tokenizer = tokenizer
        self.tool = tool or FakePython()
        self.server = server(tokenizer, turns)
        config = compose("data.max_prompt_length=256", "data.max_response_length=256")
        for key, value in (changes or {}).items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        row = {
            "raw_prompt": QUESTION,
            "data_source": "arithmetic",
            "reward_model": {"ground_truth": "5"},
            "index": 4,
            "session_id": 1,
            "global_steps": 9,
        } | row
        sampling = {"temperature": 1.0, "logprobs": config.actor_rollout_ref.rollout.calculate_log_probs}

        async def run():
            # inside a running event loop, as in verl's worker: the base class takes the current one
            loop = make_loop(config, tokenizer, self.server, [self.tool], kind)
            return await loop.run(sampling, **row)

        self.output = asyncio.run(run())
        # as the trainer reads it
        self.trajectory = Trajectory.from_dict(self.output.extra_fields[TRAJECTORY])
        self.info = self.output.extra_fields["reward_extra_info"]

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    @property
    def broken(self):
        return [turn.broken for turn in self.trajectory.turns]

    @property
    def outcomes(self):
        return [[outcome.outcome for outcome in turn.outcomes] for turn in self.trajectory.turns]

    @property
    def context(self):
        """What stands in the response between the turns: one text a gap."""
        ends = [turn.end for turn in self.trajectory.turns]
        starts = [turn.start for turn in self.trajectory.turns[1:]] + [len(self.output.response_ids)]
        return [self.decode(self.output.response_ids[a:b]) for a, b in zip(ends, starts, strict=True)]


def make_loop(config, tokenizer, server, tools, kind="qwen2"):
    """`kind`: the model_type by which verl chooses what builds a conversation."""
    return GTPOAgentLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=tokenizer,
        processor=None,
        dataset_cls=None,
        data_config=DictConfigWrap(config.data),
        hf_model_type=kind,
        tools=ToolListWrap(tools) if tools is not None else None,
    )


def assert_leaves_the_loop(rollout):
    """What verl does with an output and the run's record of it, without an error."""
    rollout.output.as_dict()
    json.dumps(rollout.output.extra_fields[TRAJECTORY], allow_nan=False).encode()


MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
