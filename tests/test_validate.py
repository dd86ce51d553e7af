"""A validation: whose weights it scores, when it comes, what it shows."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TOY, engine

from data import Row, render
from sampler import load_sampler
from sampler_check import SyncError
from validate import Validation


@pytest.fixture
def parts(device, tokenizer, policy):
    """A validation of three rows by the toy, whose scorer likes completions of two digits; what it said."""
    question = {"role": "user", "content": "99+1=" * 60 + "55+22="}
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, question]
    rows = [Row(prompt, [], "exact", "77") for prompt in ("55+22=", chat, "1+1=")]
    for row in rows:
        row.ids.extend(tokenizer(render(tokenizer, row.messages, "2026-01-01"))["input_ids"][-20:])

    def score(groups):
        for _, completions in groups:
            for c in completions:
                c.reward = float(len(c.text) == 2)

    said, recorded = [], []
    args = SimpleNamespace(seed=0, max_new_tokens=8, temperature=1.0, eval_every=3, steps=10)
    validation = Validation(
        SimpleNamespace(valid=rows, kinds=["exact"]), args,
        policy=policy, scorer=SimpleNamespace(score=score),
        sampler=load_sampler("hf", str(TOY), **engine(tokenizer, device)),
        run=SimpleNamespace(say=said.append, record=recorded.append),
    )  # fmt: skip
    return validation, rows, said, recorded


def test_it_shows_the_end_of_the_question_and_what_the_model_said(parts):
    validation, _, said, recorded = parts
    generate, drawn = validation.sampler.generate, []
    validation.sampler.generate = lambda *args: drawn.append(generate(*args)) or drawn[-1]
    name, score = validation(0)
    texts = [c.text for [c] in drawn[0]]
    assert score == sum(len(text) == 2 for text in texts) / 3 and name == "accuracy"
    assert recorded[0]["eval/accuracy"] == score and recorded[0]["eval/prompts"] == 3
    rewards = [float(len(text) == 2) for text in texts]
    assert said[0] == f"step 0: validation accuracy {score:.3f} on 3 prompts"
    assert said[1] == f"    reward {rewards[0]}   '55+22=' -> {texts[0]!r}"
    # of a chat, the last 80 characters of its last message, and not its list
    end = ("99+1=" * 60 + "55+22=")[-80:]
    assert said[2] == f"    reward {rewards[1]}   '...{end}' -> {texts[1]!r}"


def test_a_long_completion_is_shown_with_its_end(parts):
    validation, _, said, _ = parts
    generate = validation.sampler.generate

    def long(*args):
        groups = generate(*args)
        for [c] in groups:
            c.text = "so " * 100 + "the answer is 77"
        return groups

    validation.sampler.generate = long
    validation(0)
    assert said[1].endswith("the answer is 77'") and "-> '..." in said[1] and len(said[1]) < 300


def test_it_scores_the_policys_weights_of_now_and_sees_a_reload_that_failed(parts):
    validation, *_ = parts
    sampler, policy = validation.sampler, validation.policy
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.2)
    validation(4)
    assert sampler.version == 4
    held = dict(sampler.lm.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in policy.full_weights(torch.float32))
    with torch.no_grad():
        policy.lm.lm_head.weight.mul_(1.5)
    validation(4)  # the sampler has that version: nothing to reload, nothing to compare
    sampler.reload = lambda weights, version: setattr(sampler, "version", version)
    with pytest.raises(SyncError):
        validation(5)


def test_it_comes_every_so_many_steps_and_at_the_end(parts):
    validation, *_ = parts
    assert [step for step in range(1, 11) if validation.due(step)] == [3, 6, 9, 10]
    validation.args.eval_every = 0
    assert not any(validation.due(step) for step in range(1, 11))
