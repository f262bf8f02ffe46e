"""The record of one trajectory: one line of JSON, in this schema. `schema.json` beside this is the same as JSON Schema.

None (null) is "was not assigned", which is not 0: a dropped trajectory and one of a validation have no reward by turn,
no return and no advantage. Keys that a reader does not know are passed over, and those that an older record has not got
have their defaults, so that a reader takes records of other versions; `VERSION` counts changes that need more.

Versions:
    0   has no key `version`: turn rewards and advantages in two lists beside the turns, nothing of the prompt
    1   as below
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(_Part):
    """A chat message. Its content may be a list of parts (text, images), as chat templates take it."""

    role: str = Field(description="system, user, ...: the chat template's word")
    content: Any = Field(description="text, or a list of parts")


class Call(_Part):
    """A tool call as the policy wrote it."""

    name: str = Field(description="of the tool; empty: it could not be read")
    arguments: dict[str, Any] = Field({}, description="by name; code of a tool that runs code is in `code`")
    error: str | None = Field(None, description="why it is no valid call; null: it is one")
    detail: str = Field("", description="what the policy was told about a call that is not valid")


class Outcome(_Part):
    """What became of the call at the same place in `Turn.calls`."""

    outcome: str = Field(description="ok, error, timeout, ...: the tool's word; malformed, over_limit: it did not run")
    output: str = Field(description="what the policy was told")
    seconds: float = Field(description="wall time of the call, its waiting included")


class Turn(_Part):
    """What the policy wrote in one go, and what it earned."""

    start: int = Field(description="first token, counted from the response's first")
    end: int = Field(description="behind the last token")
    text: str = Field(description="its tokens decoded, special ones as text, without the one that ended it")
    calls: list[Call] = Field([], description="in the order of the text; those in thoughts are none")
    outcomes: list[Outcome] = Field([], description="one a call; fewer where a limit ended the trajectory")
    broken: str | None = Field(None, description="how the turn breaks the format; null: it does not")
    ended_by: str = Field("", description="the control token that ended it; empty: it was cut")
    overrun: int = Field(
        0, description="tokens that the server sampled behind that token; they are no part of the turn"
    )
    weights: list[int] | None = Field(
        None, description="the first and last step whose weights sampled it; null: the server did not say"
    )
    token_ids: list[int] | None = Field(None, description="end - start tokens, control tokens among them")
    rewards: dict[str, float] | None = Field(
        None, description="by part: outcome, shaping, format; they add up to reward"
    )
    reward: float | None = Field(None, description="of this turn, all parts")
    return_: float | None = Field(None, alias="return", description="discounted, of GTPO; null: another estimator")
    pool_mean: float | None = Field(None, description="of the returns that this one is compared with")
    pool_std: float | None = Field(None, description="standard deviation of the same")
    divisor: float | None = Field(None, description="advantage = (return - pool_mean) / divisor, or 0: README.md")
    advantage: float | None = Field(None, description="what each of its tokens was trained with")
    masked: int | None = Field(None, description="of its tokens, how many rollout correction left out of the update")
    log_prob: float | None = Field(None, description="mean over its tokens, of the policy that is updated")
    log_prob_gap: float | None = Field(None, description="mean of |rollout's - policy's| over its tokens")
    log_prob_gaps: list[float] | None = Field(None, description="the same, token by token: rollout's - policy's")


class Partner(_Part):
    """A solved sibling whose code a failed trajectory's was compared with."""

    session: int = Field(description="of the sibling, as in `Record.session`")
    similarity: float = Field(description="of the two programs, 0 to 1")


class Record(_Part):
    """One trajectory of one step."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    version: int = Field(0, description="of this schema, as listed above")
    step: int | None = Field(None, description="the training step, from 1; a validation before training is 0")
    split: Literal["train", "validation"] = Field("train", description="nothing is trained on a validation")
    group: str = Field(description="equal for the trajectories of one prompt in one step")
    session: int | None = Field(None, description="which of the group's rollouts")
    index: int | None = Field(None, description="the row in the data files, from 0, counted on from file to file")
    data_source: str = Field("", description="the row's, as metrics name it")
    prompt: list[Message] | None = Field(None, description="the messages before the first turn")
    gold: Any = Field(None, description="the row's ground truth")
    seed: int | None = Field(None, description="of the run")
    weights: list[int] = Field([], description="the first and last step whose weights sampled it")
    turns: list[Turn] = Field(description="in order")
    finish: str = Field(description="answer, turn_limit, length, infra, fault")
    acc: float = Field(description="1: solved; never shaped")
    pred: str = Field("", description="the answer that was read; empty: none")
    outcome: float | None = Field(None, description="what the reward function said; null: acc")
    shaped: float | None = Field(None, description="what the last turn's outcome and shaping add up to")
    partners: list[Partner] = Field([], description="whom its code was compared with, to be shaped")
    fault: str = Field("", description="finish=fault: what failed, and on which row")
    dropped: bool = Field(False, description="left out of the update: the tool server failed it, or truncated=drop")
    update: int = Field(0, description="of its step, from 0: pools and scales are of one; separate_async has several")


class NewerRecordError(ValueError):
    """A record of a version that this reader does not know."""


def upgrade(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of any version as one of this version.

    Raises NewerRecordError for a version that is newer than this reader.
    """
    version = line.get("version", 0)
    if version > VERSION:
        raise NewerRecordError(f"a record of version {version}, and this reader knows {VERSION}: install a newer one")
    if version == VERSION:
        return dict(line)
    rewards, advantages = line.get("turn_rewards") or [], line.get("advantages") or []
    turns = [
        turn
        | ({"reward": rewards[k]} if k < len(rewards) else {})
        | ({"advantage": advantages[k]} if k < len(advantages) else {})
        for k, turn in enumerate(line["turns"])
    ]
    return {**line, "version": 0, "turns": turns}


def json_schema() -> dict[str, Any]:
    """`schema.json` beside this file: `python -m verl_ext.records --schema` prints it anew."""
    return Record.model_json_schema()
