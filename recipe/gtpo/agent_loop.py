"""The multi-turn rollout: token in, token out, every assistant turn recorded while it happens.

verl calls `run` once a trajectory. Tokens are only ever appended (verl's Continuous Token builder): a finished
conversation is never rendered again, so the policy trains on exactly what it sampled.

    prompt -> [assistant turn -> tool message]* -> assistant turn without a call -> Trajectory, raw outcome
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    ToolListWrap,
)
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.utils import get_max_position_embeddings

from recipe.gtpo.conversation import Conversation, Rules, was_cut
from recipe.gtpo.dataset import file_row
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.turns import TRAJECTORY, Finish, ToolCall, ToolOutcome, Trajectory, validation_info
from recipe.gtpo.parsing import BREAK, THOUGHT, as_data, encode_data, opens_thought, read_tokens
from recipe.gtpo.run.scoring import Score, ScoreError, load_score, reward_arguments
from recipe.gtpo.run.tools import call_tool, schema_of
from recipe.gtpo.tasks.task import load_task

logger = logging.getLogger(__name__)

#: What a rollout server calls the seed of one request, where that is not "seed". verl hands our words on as they are,
#: and SGLang refuses a word that it does not know.
SEED_KEYS = {"sglang": "sampling_seed"}


class GTPOAgentLoop(AgentLoopBase):
    """Chat with the policy, run its tool calls, record turns.

    Limits are verl's own `rollout.multi_turn.*` keys. Tools are verl tools (`multi_turn.tool_config_path`). A tool
    may report an outcome of the tool server's closed set in its metrics ("outcome"), otherwise it is "ok"; one that
    raises is "infra". The raw outcome comes from `reward.custom_reward_function`, or else from the task, asked about
    the *final assistant turn* only, its thoughts left out. What every turn leads to is decided in `conversation.py`.
    """

    def __init__(self, *args: Any, tools: ToolListWrap | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tools = {tool.name: tool for tool in (tools.tools if tools else [])}
        if not self.tools:
            raise ValueError("gtpo_agent has no tool: set actor_rollout_ref.rollout.multi_turn.tool_config_path")
        self.tool_schemas = [schema_of(tool) for tool in self.tools.values()]
        task = load_task(self.config)
        score = load_score(self.config, task)
        if score is None:
            raise ValueError("gtpo_agent needs reward.custom_reward_function.path and .name, or a task= that scores")
        self.score: Score = score
        schemas = {s["function"]["name"]: s["function"].get("parameters", {}) for s in self.tool_schemas}
        options = GTPOOptions.from_config(OmegaConf.select(self.config, "algorithm.gtpo"))
        rules = Rules.of(self.rollout_config, options, schemas, task.extract_answer)
        model_stops, model_length = model_facts(self.config)
        # the servers take the model's length where max_model_len is not set
        self.rules = replace(rules, context_length=min(rules.context_length, model_length))
        stops = ids_of(self.tokenizer.eos_token_id) | model_stops  # at which every server stops
        self.turn_close = turn_close(self.tokenizer)
        self.ends = stops | ids_of(turn_end(self.tokenizer))
        self.asked_stops = sorted(self.ends - stops)  # a base model's server does not know its template's
        builder = self.continuous_token_builder
        builder.tokenizer = DataEncoder(self.tokenizer)
        # a multimodal processor encodes by itself
        mark = " " if builder.supports_multimodal() else BREAK
        self.as_data = functools.partial(as_data, control=frozenset(self.tokenizer.get_added_vocab()), mark=mark)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """One trajectory. Never raises for what a model, a tool, a server or a reward function did.

        verl leaves a trajectory that raised out of the batch without a word. Here a failure of ours is a record with
        finish=FAULT and its cause, which the trainer counts (`max_lost_trajectories`).
        """
        conversation = Conversation(self.rules)
        try:
            return await self._roll_out(conversation, sampling_params, kwargs)
        except Exception as e:
            logger.exception("a trajectory is lost")
            fault = f"row {_name(kwargs)}: {e if isinstance(e, ScoreError) else f'{type(e).__name__}: {e}'}"
            # verl needs a token; nothing of the row is trained on.
            ids = [self.tokenizer.pad_token_id or 0]
            return self._output(conversation.lost(fault), ids, ids, [0], None, {}, self._present(kwargs))

    async def _roll_out(
        self, conversation: Conversation, sampling_params: dict[str, Any], kwargs: Mapping[str, Any]
    ) -> AgentLoopOutput:
        messages = [dict(m) for m in kwargs["raw_prompt"]]
        prompt_ids = await self.ct_build_initial_tokens(messages, tools=self.tool_schemas)
        ids = list(prompt_ids)  # prompt and response; what follows is of the response only
        mask: list[int] = []
        log_probs: list[float] | None = [] if self.rollout_config.calculate_log_probs else None
        seconds = {"generate": 0.0, "tools": 0.0}
        versions: list[int] = []  # of the weights that sampled, first and last of each turn
        request_id = self._request_id(kwargs)
        conversation.check_room(0, len(ids))
        after_turn = (ids, mask, log_probs)  # without the tool messages that follow it

        while conversation.finish is None:
            room = int(self.rules.room(len(mask), len(prompt_ids)))
            began = time.perf_counter()
            output = await self.server_manager.generate(
                request_id=request_id,
                prompt_ids=ids,
                sampling_params=self._sampling(sampling_params, room, kwargs, turn=len(conversation.turns)),
            )
            seconds["generate"] += time.perf_counter() - began
            weights = sampled_with(output.extra_fields)
            versions += weights or ()
            if not output.token_ids:
                if output.stop_reason != "length" or room > 1:  # SGLang's drops what it cannot pair with log-probs
                    raise RuntimeError(f"the rollout server generated no token (stop_reason={output.stop_reason})")
                conversation.out_of_room()  # SGLang keeps the context's last token for itself
                ids, mask, log_probs = after_turn
                break
            said = read_tokens(output.token_ids, self.ends, self.tokenizer)
            text = f"{THOUGHT}\n{said.text}" if self._thinks(ids) else said.text
            merged, mask, log_probs = await self.ct_merge_assistant_token(
                ids,
                output.token_ids[: said.kept],
                mask,
                log_probs,
                assistant_logprobs=None if log_probs is None else (output.log_probs or [])[: said.kept],
            )
            ids = merged.token_ids
            after_turn = (ids, mask, log_probs)
            # The span is read off the mask *before* the tool's tokens are appended.
            calls = conversation.end_turn(
                len(mask) - said.kept,
                len(mask),
                text,
                cut=was_cut(
                    ended=said.ended_by != "",
                    stop_reason=output.stop_reason,
                    generated=len(output.token_ids),
                    room=room,
                ),
                ended_by=said.ended_by,
                overrun=len(output.token_ids) - said.kept,
                weights=weights,
            )
            if conversation.finish is not None:
                break
            began = time.perf_counter()
            replies = conversation.hear(await asyncio.gather(*map(self._execute, calls)), self.as_data)
            seconds["tools"] += time.perf_counter() - began
            if conversation.finish is not None:
                break
            before = [*messages, {"role": "assistant", "content": text}]
            messages = [*before, *({"role": "tool", "content": reply} for reply in replies)]
            # The template's end of turn, unless the model wrote it, and the newline after it: verl's builder appends
            # what follows both. Those of Qwen and MiniMax put a newline themselves, behind the end of turn alone.
            close = self.turn_close[ids[-1:] == self.turn_close[:1] :]
            ids, mask = [*ids, *close], [*mask, *[0] * len(close)]
            log_probs = None if log_probs is None else [*log_probs, *[0.0] * len(close)]
            context, new_mask, new_log_probs = await self.ct_merge_context_msg(
                before, messages, ids, mask, log_probs, tools=self.tool_schemas
            )
            conversation.check_room(len(new_mask), len(prompt_ids))
            if conversation.finish is None:
                ids, mask, log_probs = context.token_ids, new_mask, new_log_probs
            else:  # the response ends with the turn
                ids, mask, log_probs = after_turn

        if not conversation.turns:  # no room for a first token: one that nobody sampled, and that nothing trains on
            conversation.end_turn(0, 1, "", cut=True)
            ids, mask = [*ids, self.tokenizer.pad_token_id], [0]
            log_probs = None if log_probs is None else [0.0]
            versions = versions or self._present(kwargs)
        scored = None if conversation.finish is Finish.INFRA else await self._score(conversation.final_words, kwargs)
        trajectory = conversation.trajectory(scored)
        start = len(ids) - len(mask)
        return self._output(trajectory, ids[:start], ids[start:], mask, log_probs, seconds, versions)

    def _output(
        self,
        trajectory: Trajectory,
        prompt_ids: list[int],
        response_ids: list[int],
        mask: list[int],
        log_probs: list[float] | None,
        seconds: Mapping[str, float],
        versions: Sequence[int],
    ) -> AgentLoopOutput:
        if log_probs is None and self.rollout_config.calculate_log_probs:
            log_probs = [0.0] * len(mask)
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=mask,
            response_logprobs=log_probs,
            # The raw outcome. On training rows the trainer replaces it by turn rewards; validation keeps it.
            reward_score=trajectory.raw_outcome,
            num_turns=len(trajectory.turns),
            metrics=AgentLoopMetrics(
                generate_sequences=seconds.get("generate", 0.0), tool_calls=seconds.get("tools", 0.0)
            ),
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

    @staticmethod
    def _present(row: Mapping[str, Any]) -> list[int]:
        """The weights that would have spoken where none did: verl counts with a number in every row."""
        return [row["global_steps"] - 1]

    def _thinks(self, ids: list[int]) -> bool:
        """Whether the turn after these tokens begins inside a thought: the template's generation prompt opened one."""
        return opens_thought(self.tokenizer.decode(ids[-16:]))

    def _sampling(self, base: dict[str, Any], room: int, row: Mapping[str, Any], turn: int) -> dict[str, Any]:
        params = {**base, "max_tokens": room}
        if self.asked_stops:
            params["stop_token_ids"] = self.asked_stops
        if self.rollout_config.full_determinism:
            # One seed a turn, from what identifies it across runs: requests reach the server in any order.
            name = f"{self.rollout_config.seed}/{self._request_id(row)}/{turn}"
            params[SEED_KEYS.get(self.rollout_config.name, "seed")] = zlib.crc32(name.encode())
        return params

    async def _execute(self, call: ToolCall) -> ToolOutcome:
        tool = self.tools[call.name]
        began = time.perf_counter()
        try:
            text, metrics = await call_tool(tool, call.arguments)
            outcome, detail = metrics.get("outcome", "ok"), metrics.get("detail", "")
            if not isinstance(outcome, str):
                raise TypeError(f"its outcome is {outcome!r}, not a name")
        except Exception as e:
            # A tool that raises is broken, whatever the model wrote: failing code is a result, not an exception.
            text, outcome, detail = "", "infra", f"{type(e).__name__}: {e}"
        if outcome == "infra":
            logger.error("tool %s failed on our side: %s", call.name, detail)
            text = detail or text  # the conversation ends here: a text for the model would keep the cause from us
        return ToolOutcome(outcome, text, time.perf_counter() - began)

    async def _score(self, text: str, row: Mapping[str, Any]) -> Any:
        """What the reward function says of the final assistant turn."""
        return await self.score(**reward_arguments(text, row))


def sampled_with(told: Mapping[str, Any]) -> tuple[int, int] | None:
    """First and last step whose weights sampled an answer of verl's client; None where its server has not said.

    They differ where verl's async trainers interrupted it and went on with newer weights. verl's client keeps the first
    server's word for the first: of vLLM and SGLang also where it was interrupted before its first token.
    """
    first, last = (told.get(f"{end}_global_steps") for end in ("min", "max"))
    return None if first is None or last is None else (first, last)


def _name(row: Mapping[str, Any]) -> str:
    """Which row of the data a trajectory is of, as a user finds it."""
    return f"{file_row(row)} of the data files ({row.get('data_source', 'data')})"


# -- the model and its tokenizer, the same for every trajectory of a worker --------------------------------------------


class DataEncoder:
    """The tokenizer that verl's builder renders with: what `as_data` marked becomes ordinary tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if BREAK not in text:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return encode_data(self._tokenizer, text)

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool = True, **kwargs: Any) -> Any:
        if tokenize and any(BREAK in str(message.get("content")) for message in messages):
            return encode_data(self._tokenizer, self.apply_chat_template(messages, tokenize=False, **kwargs))
        return self._tokenizer.apply_chat_template(messages, tokenize=tokenize, **kwargs)


def ids_of(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)


def model_facts(config: Any) -> tuple[frozenset[int], float]:
    """The end tokens of the model's generation config, and the longest context it takes; nothing without a model."""
    model = config.actor_rollout_ref.model
    if model.path is None:
        return frozenset(), float("inf")
    return _model_facts(json.dumps(OmegaConf.to_container(model, resolve=True), sort_keys=True))


@functools.lru_cache(maxsize=4)
def _model_facts(section: str) -> tuple[frozenset[int], float]:
    model = omega_conf_to_dataclass(OmegaConf.create(json.loads(section) | {"load_tokenizer": False}), HFModelConfig)
    stops = ids_of(None if model.generation_config is None else model.generation_config.eos_token_id)
    try:
        return stops, get_max_position_embeddings(model.hf_config)
    except ValueError:  # a model without one
        return stops, float("inf")


def turn_end(tokenizer: Any) -> int | None:
    """The control token with which the chat template ends an assistant turn; None where it writes none after one."""
    return next(iter(turn_close(tokenizer)), None)


@functools.lru_cache(maxsize=4)
def turn_close(tokenizer: Any) -> list[int]:
    """That token and what the chat template writes between it and the next message, mostly a newline."""
    words = "The end of this turn"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template's own complaint; the run will hear it with its real messages
        return []
    after = rendered.rpartition(words)[2] if words in rendered else ""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ids = tokenizer.encode(after, add_special_tokens=False)
    return next((ids[i:] for i, token in enumerate(ids) if token in special), [])
