"""The scripts that some twins of the paper's experiments start: results/kl.py and results/no_ratio.py."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY, engine
from transformers import AutoModelForCausalLM

from data import Row
from sampler import load_sampler

sys.path.insert(0, str(ROOT / "results"))


@pytest.fixture(autouse=True)
def scripts_as_they_were(monkeypatch):
    import train_dpo
    import train_grpo

    for script, name in ((train_dpo, "Validation"), (train_grpo, "Validation"), (train_grpo, "policy_loss")):
        monkeypatch.setattr(script, name, getattr(script, name))


def plain_logp(model, prompt, completion):
    logps = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(completion)[:, None]).sum()


@torch.no_grad()
def test_kl_is_the_mean_log_ratio_of_what_the_policy_writes(device, tokenizer, policy):
    import kl

    rows = [
        Row(prompt, tokenizer(prompt)["input_ids"], "exact", "7") for prompt in ("55+22=", "1+1=", "9+80=")
    ]
    recorded = []
    validation = kl.Validation(
        SimpleNamespace(valid=rows, kinds=["exact"]),
        SimpleNamespace(seed=0, max_new_tokens=8, temperature=1.0, micro_batch_tokens=64),
        policy=policy, scorer=SimpleNamespace(score=lambda groups: None),
        sampler=load_sampler("hf", str(TOY), **engine(tokenizer, device)),
        run=SimpleNamespace(say=lambda line: None, record=recorded.append),
    )  # fmt: skip
    start, moved = (AutoModelForCausalLM.from_pretrained(TOY) for _ in range(2))
    for mine, theirs in zip(policy.lm.parameters(), moved.parameters(), strict=True):
        mine.mul_(1.1)  # as if it had been trained
        theirs.mul_(1.1)
    generate, drawn = validation.sampler.generate, []
    validation.sampler.generate = lambda *args: drawn.extend(generate(*args)) or drawn
    validation(4)
    ratios = [
        plain_logp(moved, r.ids, c.ids) - plain_logp(start, r.ids, c.ids)
        for r, [c] in zip(rows, drawn, strict=True)
    ]
    assert recorded[0] == {"step": 4, "eval/kl": pytest.approx(sum(ratios).item() / 3, abs=1e-4)}
    assert abs(recorded[0]["eval/kl"]) > 0.01


def test_without_a_ratio_the_gradient_is_that_of_the_log_probs():
    import no_ratio

    logps_BT = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], requires_grad=True)
    far_BT = torch.tensor([[-9.0, -0.1], [-1.0, -7.0]])  # the sampler's, which must not matter
    loss_BT, clipped_BT = no_ratio.policy_loss(
        logps_BT, far_BT, torch.tensor([2.0, -0.5]), stale=True, clip_low=0.2, clip_high=0.2, is_cap=5.0
    )
    assert loss_BT.tolist() == [[-2.0, -2.0], [0.5, 0.5]] and not clipped_BT.any()
    loss_BT.sum().backward()
    assert logps_BT.grad.tolist() == [[-2.0, -2.0], [0.5, 0.5]]
