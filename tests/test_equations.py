"""Updates of both scripts against the paper's equations, one completion at a time on the plain model."""

import importlib
import json
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import processes
import train_dpo
import train_grpo
from data import Completion, Row, rollout_line

# of the completions of five prompts; None: unknown. The last three and five have no pair and no advantages
REWARDS = [(1, 0, 0.5), (0.25, 0, 1), (None, 0.5, -1), (1, 1, 1), (0, None, 0)]


def plain(model, prompt, ids):
    """Log-prob and entropy of each token of one completion, by the model's own logits."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1)
    return logps.gather(-1, torch.tensor(ids)[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.fixture(scope="module")
def groups(tokenizer):
    """(prompt, ids of its completions, the sampler's log-probs, rewards); these log-probs are up to 0.9 nats
    off the toy's, so that some ratios are clipped and some capped.
    """
    rng, toy, found = random.Random(0), AutoModelForCausalLM.from_pretrained(TOY).requires_grad_(False), []
    for rewards in REWARDS:
        prompt = tokenizer(f"<|user|>{rng.randrange(100)}+{rng.randrange(9)}=<|assistant|>").input_ids
        completions = [[rng.randrange(4, 14) for _ in range(rng.randrange(1, 6))] + [3] for _ in rewards]
        drawn = [[x + rng.uniform(-0.9, 0.9) for x in plain(toy, prompt, c)[0].tolist()] for c in completions]
        found.append((prompt, completions, drawn, rewards))
    return found


def dpo(logps, refs, drawn, rewards, every=False):
    """Equations 3 and 4 for one prompt, with a beta of 0.5; and which of its completions are read."""
    known = [i for i, reward in enumerate(rewards) if reward is not None]
    pairs = [(i, j) for i in known for j in known if rewards[i] > rewards[j]]
    if not every and pairs:
        pairs = [max(pairs, key=lambda pair: rewards[pair[0]] - rewards[pair[1]])]
    ratio = [(logp - ref).sum() for logp, ref in zip(logps, refs, strict=True)]
    losses = [-(0.5 * (ratio[i] - ratio[j])).sigmoid().log() for i, j in pairs]
    return sum(losses) / max(1, len(pairs)), {i for pair in pairs for i in pair}


def group_dpo(*group):
    return dpo(*group, every=True)


def grpo(logps, refs, drawn, rewards):
    """Equation 1 for one prompt, with the clip and a KL of weight 0.1: sums over tokens, a mean over
    completions. The ratio is at most 2.
    """
    known = {i: reward for i, reward in enumerate(rewards) if reward is not None}
    used, loss = known if len({*known.values()}) > 1 else {}, 0.0
    for i in used:
        advantage = rewards[i] - statistics.fmean(known.values())
        ratio = (logps[i] - torch.tensor(drawn[i])).exp()
        gain = torch.min(ratio.clamp(max=2) * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = loss + (0.1 * k3(logps[i], refs[i]) - gain).sum() / len(rewards)
    return loss, used


def group_dpo_and_grpo(logps, refs, drawn, rewards):
    """Appendix B.2 for one prompt: GroupDPO, and 10 times the on-policy GRPO loss of what it reads, whose
    advantages are divided by the standard deviation.
    """
    loss, used = group_dpo(logps, refs, drawn, rewards)
    known = [reward for reward in rewards if reward is not None]
    for i in used:
        advantage = (rewards[i] - statistics.fmean(known)) / (statistics.stdev(known) + 1e-6)
        gain = advantage * (logps[i] - logps[i].detach()).exp()
        loss = loss + 10 * (0.001 * k3(logps[i], refs[i]) - gain).sum() / len(used)
    return loss, used


def k3(logp, ref):
    return (ref - logp).exp() - (ref - logp) - 1


COMMANDS = {
    "train_dpo --beta 0.5": dpo,
    "train_dpo --beta 0.5 --all-pairs": group_dpo,
    "train_grpo --beta 0.1 --no-std-norm": grpo,
    "teaching.dpo_grpo --beta 0.5 --all-pairs --grpo-weight 10": group_dpo_and_grpo,
}
FLAGS = "--sync-steps inf --steps 2 --samples-per-prompt 3 --prompts-per-step 5 --eval-every 0 --sampler hf "
FLAGS += "--micro-batch-tokens 96 --lr 1e-3 --adam-eps 1e-4 --grad-clip 0.1"


@pytest.fixture
def run(groups, device, tokenizer, tmp_path, monkeypatch):
    """Runs a command in this process on rollouts of the groups; returns its metrics and weights."""
    lines = []
    for prompt, ids, drawn, rewards in groups:
        texts = [tokenizer.decode(c, skip_special_tokens=True) for c in ids]
        parts = zip(ids, drawn, texts, rewards, strict=True)
        completions = [Completion(c, logps, text, "stop", 0, reward) for c, logps, text, reward in parts]
        lines.append(rollout_line(Row("1+1=", prompt, "exact", "2"), completions))
    (tmp_path / "rollouts.jsonl").write_text("".join(lines))
    monkeypatch.setattr(processes, "stop", lambda: None)  # other tests use the process group
    for script in (train_dpo, train_grpo):
        monkeypatch.setattr(script, "Interrupt", lambda: SimpleNamespace(asked=False))
    for name in ("add_flags", "make_examples", "batch_loss"):  # a variant replaces them: to be undone
        monkeypatch.setattr(train_dpo, name, getattr(train_dpo, name))

    def run(command):
        name, *flags = f"{command} {FLAGS} --rollouts {tmp_path}/rollouts.jsonl --out {tmp_path}/run".split()
        script = importlib.import_module(name)
        (script if hasattr(script, "main") else train_dpo).main(flags)
        metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
        return metrics, load_file(tmp_path / "run" / "model" / "model.safetensors")

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_two_updates_are_those_of_the_papers_equations(command, run, groups):
    """Loss, entropy, norm of the gradient and weights. At the second update the policy is no longer the
    reference; Adam has betas of 0.9 and 0.95, and a weight decay of 0.1.
    """
    found, weights = run(command)
    model = AutoModelForCausalLM.from_pretrained(TOY)
    toy = AutoModelForCausalLM.from_pretrained(TOY).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    assert len(found) == 2
    for metrics in found:
        total, entropies = 0.0, []
        for prompt, ids, drawn, rewards in groups:
            logps, entropy = zip(*(plain(model, prompt, c) for c in ids), strict=True)
            refs = [plain(toy, prompt, c)[0] for c in ids]
            loss, used = COMMANDS[command](logps, refs, drawn, rewards)
            total = total + loss / len(groups)
            entropies += [entropy[i] for i in used]
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.1
        assert metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    wanted, start = (dict(lm.named_parameters()) for lm in (model, toy))
    off = sum((weights[name] - wanted[name]).square().sum() for name in wanted) ** 0.5
    assert off < 1e-3 * sum((start[name] - wanted[name]).square().sum() for name in wanted) ** 0.5
