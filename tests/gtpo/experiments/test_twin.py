"""The plain-PyTorch twin: its rollouts are what the model would say, its credit is the recipe's, its loop runs."""

from __future__ import annotations

import json
from collections import deque

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe.gtpo.experiments import twin
from recipe.gtpo.experiments.report import Run
from recipe.gtpo.method.turns import Finish, FormatReason, ToolCall, ToolOutcome
from recipe.gtpo.tasks.arithmetic.experts import write_answer, write_call
from recipe.gtpo.tasks.arithmetic.problems import Problem, Step, sample_problems, take

pytestmark = pytest.mark.unit

PROBLEM = Problem(1234, (Step("add", 567), Step("mul", 89)), wording=0)


def converse(stream, *texts: str):
    """A conversation in which the policy says `texts`; what the tool says in between is fed by the twin."""
    prompt = stream.prompt(PROBLEM.messages)
    conversation = twin.Conversation(PROBLEM, list(prompt), len(prompt))
    script = deque(token for text in texts for token in stream.turn(text))
    while conversation.finish is None:
        forced = bool(conversation.forced)
        conversation.advance(0 if forced else script.popleft(), -0.5, stream)
    assert not script
    return conversation


def test_conversation_is_recorded_like_a_rollout(stream):
    texts = (write_call("1234+567"), write_call("1801*"), write_call("1801*89"), write_answer(160289))
    conversation = converse(stream, *texts)
    trajectory = conversation.trajectory()
    assert (trajectory.finish, trajectory.acc, trajectory.pred) == (Finish.ANSWER, 1.0, "160289")
    assert tuple(turn.text for turn in trajectory.turns) == texts
    assert [[o.outcome for o in turn.outcomes] for turn in trajectory.turns] == [["ok"], ["syntax_error"], ["ok"], []]
    assert [turn.broken for turn in trajectory.turns] == [None] * 4
    response = conversation.ids[conversation.prompt_length :]
    for turn, text in zip(trajectory.turns, texts, strict=True):
        assert response[turn.start : turn.end] == stream.turn(text)
    generated = {t for turn in trajectory.turns for t in range(turn.start, turn.end)}
    assert [p == -0.5 for p in conversation.log_probs] == [t in generated for t in range(len(response))]


def test_an_answer_that_only_the_tool_said_does_not_score(stream):
    trajectory = converse(stream, write_call("160289"), "I do not know.").trajectory()
    assert trajectory.turns[0].outcomes[0].output == "160289\n"
    assert (trajectory.acc, trajectory.pred) == (0.0, "")
    assert trajectory.turns[-1].broken is FormatReason.NO_ANSWER


def test_limits_end_a_conversation_and_are_not_the_policys_fault(stream):
    trajectory = converse(stream, *[write_call("1+1")] * twin.LIMITS.turns).trajectory()
    assert trajectory.finish is Finish.TURN_LIMIT
    assert trajectory.turns[-1].outcomes == () and trajectory.turns[-1].broken is None


def test_shared_cache_gives_the_log_probs_of_a_fresh_forward_pass(stream, toy_policy, monkeypatch):
    """Also for prompts that rows share, after tool messages were fed, and after finished rows left the batch."""
    outcome = ToolOutcome("ok", "42", 0.0)
    monkeypatch.setattr(twin, "respond", lambda text, schemas: ((ToolCall("python", {"code": "42"}),), (outcome,)))
    torch.manual_seed(1)
    # The toy policy is close to uniform: a turn ends with probability 1/512 a token, somewhere in most conversations.
    model = AutoModelForCausalLM.from_pretrained(toy_policy).eval()
    problems = [p for p in take(sample_problems("train", 1, {1: 1, 6: 1}), 12) for _ in range(2)]  # of a group
    conversations = twin.roll_out(model, stream, problems)
    assert sum(len(c.turns) > 1 for c in conversations) >= 3
    assert len({len(c.ids) for c in conversations}) > 1
    for conversation in conversations:
        with torch.inference_mode():
            logits = model(torch.tensor([conversation.ids])).logits[0, :-1]
        fresh = torch.log_softmax(logits, dim=-1)
        for turn in conversation.turns:
            at = conversation.prompt_length + torch.arange(turn.start, turn.end)
            tokens = torch.tensor(conversation.ids)[at]
            recorded = torch.tensor(conversation.log_probs[turn.start : turn.end])
            assert torch.allclose(fresh[at - 1, tokens], recorded, atol=1e-4)


def rolled_out(stream, *, failed: int, solved: int):
    """A group: `solved` right conversations, then `failed` ones that answer at once."""
    right = (write_call("1234+567"), write_call("1801*89"), write_answer(160289))
    return [converse(stream, *right) for _ in range(solved)] + [
        converse(stream, write_answer(1234)) for _ in range(failed)
    ]


def test_grpo_gives_one_advantage_a_trajectory_and_gtpo_one_a_turn(stream):
    trajectories = [c.trajectory() for c in rolled_out(stream, solved=2, failed=2)]
    groups = ["a"] * 4
    _, grpo, credit = twin.turn_advantages(trajectories, groups, twin.Method.load("grpo", []), None)
    # rewards 1, 1, -0.1, -0.1: mean 0.45, std 0.6351
    assert torch.allclose(grpo[0], torch.tensor([0.55] * 3) / 0.6351, atol=1e-3)
    assert torch.allclose(grpo[2], torch.tensor([-0.55, 0.0, 0.0]) / 0.6351, atol=1e-3)
    overrides = ["gtpo.shaping.enable=false", "gtpo.scale=none"]
    _, gtpo, _ = twin.turn_advantages(trajectories, groups, twin.Method.load("gtpo", overrides), None)
    returns = torch.tensor([0.81, 0.9, 1.0])
    mean = (2 * returns.sum() - 0.2) / 8
    assert torch.allclose(gtpo[0], returns - mean, atol=1e-6)
    assert torch.equal(credit.turn_mask.sum(dim=1), torch.tensor([3, 3, 1, 1]))


def test_update_raises_what_was_rewarded_and_leaves_quiet_rows_out(stream, toy_policy):
    model = AutoModelForCausalLM.from_pretrained(toy_policy).eval()
    conversations = rolled_out(stream, solved=1, failed=1)

    def log_prob(c):
        with torch.inference_mode():
            fresh = torch.log_softmax(model(torch.tensor([c.ids])).logits[0, :-1], dim=-1)
        at = torch.arange(c.prompt_length, len(c.ids))
        return fresh[at - 1, torch.tensor(c.ids)[at]]

    for c in conversations:  # as if sampled from this policy
        c.log_probs = log_prob(c).tolist()
    before = [log_prob(c).sum() for c in conversations]
    advantages = [torch.ones(conversations[0].response_length), torch.zeros(conversations[1].response_length)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norm = twin.update(model, optimizer, conversations, advantages, 100, stream.pad_id)
    assert norm > 0
    assert log_prob(conversations[0]).sum() > before[0]
    frozen = twin.update(model, optimizer, conversations[1:], advantages[1:], 100, stream.pad_id)
    assert frozen == 0.0


def test_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r"methods: .*grpo, gtpo"):
        twin.Method.load("gtop", [])
    with pytest.raises(ValueError, match="the twin has gtpo and grpo"):
        twin.Method.load("rloo", [])
    with pytest.raises(ValueError, match="unknown option 'gama'"):
        twin.Method.load("gtpo", ["gtpo.gama=1.0"])


def test_two_steps_leave_the_record_that_a_run_under_verl_leaves(toy_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(twin, "PROMPTS", 2)
    twin.train(
        name="gtpo",
        method=twin.Method.load("gtpo", []),
        policy=toy_policy,
        seed=1,
        steps=2,
        learning_rate=1e-3,
        horizon=1,
        eval_problems=4,
        eval_every=1,
        run_dir=tmp_path,
    )
    run = Run.load(tmp_path)
    assert list(run.curve) == [0, 1, 2] and run.engine == "twin"
    assert run.median("timing_s/step") > 0 and run.last("turns") >= 1
    assert set(run.classes) <= {"no modal fault", "first turn"} and run.classes  # of one call a problem
    assert {"gtpo/acc/mean", "gtpo/by_turn/advantage/mean/t0", "actor/grad_norm"} <= run.lines[1]["metrics"].keys()
    assert "val-aux/arithmetic/greedy_acc/mean@1" in run.lines[-1]["metrics"]
    assert json.loads((tmp_path / "summary.json").read_text())["horizon"] == 1
