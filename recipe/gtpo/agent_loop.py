"""The multi-turn rollout: token in, token out, every assistant turn recorded while it happens.

verl calls `run` once a trajectory. Tokens are only ever appended (verl's Continuous Token builder): a finished
conversation is never rendered again, so the policy trains on exactly what it sampled.

    prompt -> [assistant turn -> tool message]* -> assistant turn without a call -> Trajectory, raw outcome
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    ToolListWrap,
)
from verl.tools.schemas import ToolResponse
from verl.trainer.ppo.reward import get_custom_reward_fn

from recipe.gtpo.method.turns import (
    TRAJECTORY,
    TRUNCATED,
    Finish,
    ToolCall,
    ToolOutcome,
    Trajectory,
    Turn,
    validation_info,
)
from recipe.gtpo.parsing import extract_answer, judge_format, parse_calls

logger = logging.getLogger(__name__)


class GTPOAgentLoop(AgentLoopBase):
    """Chat with the policy, run its tool calls, record turns.

    Limits are verl's own `rollout.multi_turn.*` keys. Tools are verl tools (`multi_turn.tool_config_path`). A tool
    may report an outcome of the tool server's closed set in its metrics ("outcome"), otherwise it is "ok"; one that
    raises is "infra". The raw outcome comes from `reward.custom_reward_function`, called with the *final assistant
    turn* only.
    """

    def __init__(self, *args: Any, tools: ToolListWrap | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tools = {tool.name: tool for tool in (tools.tools if tools else [])}
        if not self.tools:
            raise ValueError("gtpo_agent has no tool: set actor_rollout_ref.rollout.multi_turn.tool_config_path")
        # serialize_as_any: a tool's schema may be a subclass that says more than verl's (maxLength)
        self.tool_schemas = [
            tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True, serialize_as_any=True)
            for tool in self.tools.values()
        ]
        self.argument_schemas = {s["function"]["name"]: s["function"]["parameters"] for s in self.tool_schemas}
        self.limits = self.rollout_config.multi_turn
        self.response_length = self.rollout_config.response_length
        self.score = get_custom_reward_fn(self.config)
        if self.score is None:
            raise ValueError("gtpo_agent needs reward.custom_reward_function.path and .name (a task= sets them)")
        eos = self.tokenizer.eos_token_id
        self.eos = set(eos) if isinstance(eos, (list, tuple)) else {eos}

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        messages = [dict(m) for m in kwargs["raw_prompt"]]
        prompt_ids = await self.ct_build_initial_tokens(messages, tools=self.tool_schemas)
        ids = list(prompt_ids)  # prompt and response; what follows is of the response only
        mask: list[int] = []
        log_probs: list[float] | None = [] if self.rollout_config.calculate_log_probs else None
        turns: list[Turn] = []
        seconds = {"generate": 0.0, "tools": 0.0}
        versions: list[int] = []  # of the weights each turn was sampled with
        request_id = self._request_id(kwargs)
        finish: Finish | None = None

        while finish is None:
            budget = self.response_length - len(mask)
            began = time.perf_counter()
            output = await self.server_manager.generate(
                request_id=request_id,
                prompt_ids=ids,
                sampling_params=self._sampling(sampling_params, budget, kwargs, turn=len(turns)),
            )
            seconds["generate"] += time.perf_counter() - began
            if not output.token_ids:
                raise RuntimeError(f"the rollout server generated no token (stop_reason={output.stop_reason})")
            for key in ("min_global_steps", "max_global_steps"):
                if output.extra_fields.get(key) is not None:
                    versions.append(output.extra_fields[key])
            merged, mask, log_probs = await self.ct_merge_assistant_token(
                ids,
                output.token_ids,
                mask,
                log_probs,
                assistant_logprobs=None if log_probs is None else output.log_probs,
            )
            ids = merged.token_ids
            text = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
            calls = parse_calls(text, self.argument_schemas)
            cut = len(output.token_ids) >= budget and output.token_ids[-1] not in self.eos
            outcomes: tuple[ToolOutcome, ...] = ()

            if cut:
                finish = Finish.LENGTH
            elif not calls:
                finish = Finish.ANSWER
            elif len(turns) + 1 >= (self.limits.max_assistant_turns or float("inf")):
                finish = Finish.TURN_LIMIT
            else:
                began = time.perf_counter()
                outcomes = await self._run_calls(calls)
                seconds["tools"] += time.perf_counter() - began
                if any(o.outcome == "infra" for o in outcomes):
                    finish = Finish.INFRA
                else:
                    before = [*messages, {"role": "assistant", "content": text}]
                    messages = [*before, *({"role": "tool", "content": o.output} for o in outcomes)]
                    context, new_mask, new_log_probs = await self.ct_merge_context_msg(
                        before, messages, ids, mask, log_probs, tools=self.tool_schemas
                    )
                    if len(new_mask) >= self.response_length:
                        finish = Finish.LENGTH  # the tool's answer would not leave room for another token
            # The span is read off the mask *before* the tool's tokens are appended.
            turns.append(Turn(len(mask) - len(output.token_ids), len(mask), text, calls, outcomes))
            if finish is None:
                ids, mask, log_probs = context.token_ids, new_mask, new_log_probs

        trajectory = await self._judge(turns, finish, kwargs)
        return AgentLoopOutput(
            prompt_ids=ids[: len(ids) - len(mask)],
            response_ids=ids[len(ids) - len(mask) :],
            response_mask=mask,
            response_logprobs=log_probs,
            # The raw outcome. On training rows the trainer replaces it by turn rewards; validation keeps it.
            reward_score=trajectory.acc,
            num_turns=len(turns),
            metrics=AgentLoopMetrics(generate_sequences=seconds["generate"], tool_calls=seconds["tools"]),
            extra_fields={
                TRAJECTORY: trajectory.to_dict(),
                "reward_extra_info": validation_info(trajectory),
                "min_global_steps": min(versions, default=None),
                "max_global_steps": max(versions, default=None),
            },
        )

    def _request_id(self, row: Mapping[str, Any]) -> str:
        if not self.rollout_config.full_determinism:
            return uuid4().hex
        return f"{row['global_steps']}-{row['index']}-{row['session_id']}"

    def _sampling(self, base: dict[str, Any], budget: int, row: Mapping[str, Any], turn: int) -> dict[str, Any]:
        params = {**base, "max_tokens": budget}
        if self.rollout_config.full_determinism:
            # One seed a turn, from what identifies it across runs: requests reach the server in any order.
            name = f"{self.rollout_config.seed}/{self._request_id(row)}/{turn}"
            params["seed"] = zlib.crc32(name.encode())
        return params

    # -- tools ----------------------------------------------------------------------------------------------------

    async def _run_calls(self, calls: tuple[ToolCall, ...]) -> tuple[ToolOutcome, ...]:
        """One outcome a call, in order. Well-formed calls run concurrently, at most `max_parallel_calls` of them."""
        allowed = self.limits.max_parallel_calls
        jobs = []
        for call in calls:
            if call.error is not None:
                jobs.append(_said(ToolOutcome("malformed", f"Error: {call.detail}", 0.0)))
            elif allowed == 0:
                text = f"Error: not run: at most {self.limits.max_parallel_calls} tool call(s) a turn"
                jobs.append(_said(ToolOutcome("over_limit", text, 0.0)))
            else:
                allowed -= 1
                jobs.append(self._execute(call))
        return tuple(await asyncio.gather(*jobs))

    async def _execute(self, call: ToolCall) -> ToolOutcome:
        tool = self.tools[call.name]
        began = time.perf_counter()
        try:
            instance_id, _ = await tool.create()
            try:
                response, _, metrics = await tool.execute(instance_id, call.arguments)
            finally:
                await tool.release(instance_id)
            outcome, detail = metrics.get("outcome", "ok"), metrics.get("detail", "")
        except Exception as e:
            # A tool that raises is broken, whatever the model wrote: failing code is a result, not an exception.
            outcome, detail = "infra", f"{type(e).__name__}: {e}"
            response = ToolResponse(text=f"Error: {detail}")
        if outcome == "infra":
            logger.error("tool %s failed on our side: %s", call.name, detail)
        return ToolOutcome(outcome, self._shorten(response.text or ""), time.perf_counter() - began)

    def _shorten(self, text: str) -> str:
        """At most `max_tool_response_length` characters, the cut marked, on the side verl's config names."""
        limit = self.limits.max_tool_response_length
        if len(text) <= limit:
            return text
        side = self.limits.tool_response_truncate_side
        if side == "left":
            return "(truncated)..." + text[len(text) - limit :]
        if side == "right":
            return text[:limit] + "...(truncated)"
        return text[: limit // 2] + "...(truncated)..." + text[len(text) - limit // 2 :]

    # -- outcome --------------------------------------------------------------------------------------------------

    async def _judge(self, turns: list[Turn], finish: Finish, row: Mapping[str, Any]) -> Trajectory:
        """Format verdicts of all turns, and the raw outcome of the final one."""
        last = len(turns) - 1
        judged = tuple(
            replace(
                turn,
                broken=judge_format(
                    is_first=k == 0,
                    is_last=k == last,
                    truncated=k == last and (finish in TRUNCATED or finish is Finish.INFRA),
                    calls=turn.calls,
                    has_answer=extract_answer(turn.text) is not None,
                ),
            )
            for k, turn in enumerate(turns)
        )
        if finish is Finish.INFRA:
            return Trajectory(judged, finish, acc=0.0)
        scored = self.score(
            data_source=row["data_source"],
            solution_str=turns[-1].text,  # never the tool's words: an answer that a tool printed is not the model's
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=row.get("extra_info"),
        )
        if inspect.isawaitable(scored):
            scored = await scored
        if not isinstance(scored, Mapping):
            scored = {"acc": float(scored)}
        acc = float(scored["acc"])
        if acc not in (0.0, 1.0):
            raise ValueError(f"the reward function returned acc={acc}: GTPO's outcome is 0 or 1 (algorithm, part 1)")
        return Trajectory(judged, finish, acc=acc, pred=str(scored.get("pred", "")))


async def _said(outcome: ToolOutcome) -> ToolOutcome:
    return outcome
