"""From problems to finished conversations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from recipe.gtpo.conversation import Conversation, Rules
from recipe.gtpo.experiments.twin.decoder import Decoder
from recipe.gtpo.method.turns import Trajectory
from recipe.gtpo.parsing import read_tokens
from recipe.gtpo.tasks.arithmetic.calculator import run_call
from recipe.gtpo.tasks.arithmetic.policy import TokenStream
from recipe.gtpo.tasks.arithmetic.problems import DATA_SOURCE, Problem, compute_score, take


@dataclass
class Row:
    """One conversation while it is sampled: `ids` from `prompt_length` on are the response."""

    problem: Problem
    ids: list[int]
    prompt_length: int
    conversation: Conversation
    turn_start: int = 0  # in the response
    log_probs: list[float] = field(default_factory=list)  # one a response token, 0.0 where it was not sampled
    forced: deque[int] = field(default_factory=deque)  # tool tokens still to be fed

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def finished(self) -> bool:
        return self.conversation.finish is not None

    def advance(self, sampled: int, log_prob: float, stream: TokenStream) -> None:
        """Append the next token: a forced one if there is one, else the sampled one, which may end the turn."""
        if self.forced:
            self.ids.append(self.forced.popleft())
            self.log_probs.append(0.0)
            self.turn_start = self.response_length
            return
        self.ids.append(sampled)
        self.log_probs.append(log_prob)
        ended = sampled == stream.eos_id
        if ended or self.response_length >= self.conversation.rules.response_length:
            self._end_turn(stream, cut=not ended)

    def _end_turn(self, stream: TokenStream, cut: bool) -> None:
        """As the agent loop does it (`agent_loop.GTPOAgentLoop.run`); a test plays one script through both."""
        start, end = self.turn_start, self.response_length
        said = read_tokens(self.ids[self.prompt_length + start :], {stream.eos_id}, stream.tokenizer)
        calls = self.conversation.end_turn(start, end, said.text, cut=cut, ended_by=said.ended_by)
        if not self.finished:
            replies = self.conversation.hear(tuple(map(run_call, calls)), stream.as_data)
            self.forced.extend(stream.observation(replies))
            self.conversation.check_room(end + len(self.forced), self.prompt_length)

    def trajectory(self) -> Trajectory:
        """The finished conversation as the record that credit assignment reads."""
        said = self.conversation.final_words
        return self.conversation.trajectory(compute_score(DATA_SOURCE, said, str(self.problem.answer)))


@torch.inference_mode()
def roll_out(
    model: PreTrainedModel, stream: TokenStream, problems: Sequence[Problem], rules: Rules, *, greedy: bool = False
) -> list[Row]:
    """One finished conversation a problem. Samples at temperature 1, from torch's generator, unless `greedy`."""
    rows = []
    for problem in problems:
        prompt = stream.prompt(problem.messages)
        rows.append(Row(problem, prompt, len(prompt), Conversation(rules)))
    running = rows
    decoder = Decoder(model, [row.ids for row in rows], int(rules.response_length), stream.pad_id)
    logits = decoder.first
    while True:
        log_probs = torch.log_softmax(logits, dim=-1)
        tokens = log_probs.argmax(-1, keepdim=True) if greedy else _sample(log_probs)
        chosen = log_probs.gather(1, tokens)
        for row, token, log_prob in zip(running, tokens[:, 0].tolist(), chosen[:, 0].tolist(), strict=True):
            if not row.finished:
                row.advance(token, log_prob, stream)
        keep = [i for i, row in enumerate(running) if not row.finished]
        if not keep:
            return rows
        # Compact only when it pays: it copies the cache.
        if len(keep) <= 0.8 * len(running):
            running = [running[i] for i in keep]
            decoder.keep(torch.tensor(keep))
        logits = decoder.step(torch.tensor([row.ids[-1] for row in running]))


def _sample(log_probs: torch.Tensor) -> torch.Tensor:
    """(rows, 1) a token a row, by inverting the distribution function: one random number a row, not one a token."""
    reached = log_probs.exp().cumsum(-1)
    return torch.searchsorted(reached, torch.rand(len(reached), 1) * reached[:, -1:], right=True).clamp_max(
        log_probs.shape[1] - 1
    )


def draw(
    model: PreTrainedModel,
    stream: TokenStream,
    source: Iterator[Problem],
    rules: Rules,
    *,
    prompts: int,
    rollouts: int,
) -> tuple[list[Row], list[str]]:
    """One training batch: `rollouts` conversations for each of the next `prompts` problems, and their group labels."""
    problems = [problem for problem in take(source, prompts) for _ in range(rollouts)]
    return roll_out(model, stream, problems, rules), [str(i // rollouts) for i in range(len(problems))]
