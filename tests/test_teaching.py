"""The files of teaching/, each run for some steps, against numbers that follow from their equations."""

import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY, engine
from transformers import AutoModelForCausalLM

import evaluate
import sampler_hf
import train_dpo
import train_grpo
from data import Row
from sampler_check import SyncError, self_test

FLAGS = "--sampler hf --prompts-per-step 8 --eval-every 0 --save-every 0 --log-samples -1".split()
# each run is a process of its own, forked from one that has imported what takes seconds
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(
    ["pytest", "transformers.models.llama.modeling_llama", "train_dpo", "train_grpo", "sampler_hf"]
)


def as_script(module, argv):
    sys.argv = [module, *map(str, argv)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SUMS = read(ROOT / "toy" / "train.jsonl")[::40]  # checking all rows would take longer than the steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a file of teaching/, or a script itself; returns metrics, samples and the groups of step 0."""
    folder = tmp_path_factory.mktemp("teaching")

    sums = write(folder / "sums.jsonl", SUMS)

    def run(module, *flags, data=sums, steps=12):
        out = folder / f"{module}-{len(list(folder.iterdir()))}"
        rollouts = folder / f"{out.name}.jsonl"
        argv = [*FLAGS, "--data", data, "--steps", steps, "--out", out, "--save-rollouts", rollouts, *flags]
        process = FRESH.Process(target=as_script, args=(module, argv))
        process.start()
        process.join(300)
        assert process.exitcode == 0
        metrics = read(out / "metrics.jsonl")
        assert [m["step"] for m in metrics] == list(range(steps)) and all(m["skipped"] == 0 for m in metrics)
        groups = [g for g in read(rollouts) if g["step"] == 0]
        return metrics, read(out / "samples.jsonl"), groups

    return run


@pytest.fixture
def replaced(monkeypatch):
    """Imports a file of teaching/ into this process; what it replaces there is put back after the test."""

    def replaced(name, where, function):
        monkeypatch.setattr(where, function, getattr(where, function))
        return runpy.run_path(str(ROOT / "teaching" / name))

    return replaced


def pairs_of(group):
    """All (chosen, rejected) completions."""
    return [(c, r) for c in group["completions"] for r in group["completions"] if c["reward"] > r["reward"]]


def test_every_short_file_is_short():
    lines = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "teaching").glob("*.py")}
    short = "rloo ipo simpo curriculum short_answers even long_answers no_clip forgotten".split()
    assert all(lines[f"{name}.py"] <= 15 for name in short) and lines["dpo_grpo.py"] <= 40


def test_rloo(run):
    """r - mean of the other 7 is 8/7 of r - mean of all 8, and so is the gradient."""
    rloo, *_ = run("teaching.rloo")
    grpo, *_ = run("train_grpo", "--no-std-norm", steps=1)
    assert rloo[0]["reward"] == grpo[0]["reward"]
    assert rloo[0]["grad_norm"] / grpo[0]["grad_norm"] == pytest.approx(8 / 7, rel=1e-5)


def test_ipo(run):
    """At a margin of 0: loss (1 / 2 beta)^2, slope -1 / beta where DPO's is -beta / 2. Here beta is 3."""
    ipo, *_ = run("teaching.ipo", "--sync-steps", "10")
    dpo, *_ = run("train_dpo", "--sync-steps", "10", steps=10)
    assert ipo[0]["pairs"] == dpo[0]["pairs"] > 3
    assert ipo[0]["loss"] == pytest.approx(ipo[0]["pairs"] / 8 / 36, rel=1e-5)
    assert ipo[0]["grad_norm"] / dpo[0]["grad_norm"] == pytest.approx(2 / 9, rel=1e-4)


def test_simpo(run):
    """The loss of step 0 from the sampler's own log-probs; nothing is ever held to a reference."""
    metrics, _, groups = run("teaching.simpo", "--all-pairs", "--sync-steps", "10")
    mean = lambda c: statistics.fmean(c["logps"])  # noqa: E731
    by_hand = sum(
        statistics.fmean(math.log(1 + math.exp(0.5 - 3 * (mean(c) - mean(r)))) for c, r in pairs_of(group))
        for group in groups if pairs_of(group)
    )  # fmt: skip
    assert metrics[0]["loss"] == pytest.approx(by_hand / 8, rel=1e-4)
    assert all(m["rewards/margins"] == 0 for m in metrics)  # implicit rewards are relative to a reference


def test_curriculum(run):
    _, samples, _ = run("teaching.curriculum")
    shortest = sorted(len(row["prompt"]) for row in SUMS)[: 12 * 8]
    assert [len(sample["prompt"]) for sample in samples[::8]] == shortest


def test_a_reward_that_reads_another_column(run, tmp_path):
    """The toy's sums, each with a limit of characters that about half of the right answers keep."""
    rows = [row | {"reward": "short", "limit": 2 + i % 2} for i, row in enumerate(SUMS)]
    _, samples, groups = run("teaching.short_answers", data=write(tmp_path / "rows.jsonl", rows))
    limit = {row["prompt"]: row["limit"] for row in rows}
    wanted = [
        float(s["text"].strip() == s["answer"] and len(s["text"]) <= limit[s["prompt"]]) for s in samples
    ]
    assert [s["reward"] for s in samples] == wanted and 0.02 < statistics.fmean(wanted) < 0.5
    too_long = [s for s in samples if s["text"].strip() == s["answer"] and s["reward"] == 0]
    assert too_long and all(group["columns"] == {"limit": limit[group["prompt"]]} for group in groups)


def test_a_reward_for_even_digits(run, tmp_path):
    """The share of them, counted with other means."""
    rows = [row | {"reward": "even"} for row in SUMS]
    metrics, samples, _ = run("teaching.even", data=write(tmp_path / "rows.jsonl", rows))
    counted = [len(re.findall("[02468]", s["text"])) / max(1, len(s["text"])) for s in samples]
    assert [s["reward"] for s in samples] == pytest.approx(counted, abs=1e-6)
    assert len({round(reward, 2) for reward in counted}) > 3
    rewards = [m["reward/even"] for m in metrics]
    assert rewards[0] == pytest.approx(statistics.fmean(counted[:64]), abs=1e-6)


def test_a_bonus_for_length(run, tmp_path):
    """Characters counted in tokens, of which the last is the end; each row has a bonus of its own."""
    rows = [row | {"reward": "long", "bonus": i % 3 / 2} for i, row in enumerate(SUMS)]
    _, _, groups = run("teaching.long_answers", data=write(tmp_path / "rows.jsonl", rows), steps=1)
    assert len({group["columns"]["bonus"] for group in groups}) == 3
    found = [(c, group) for group in groups for c in group["completions"]]
    for c, group in found:
        characters = len(c["ids"]) - (c["finish"] == "stop")
        bonus = group["columns"]["bonus"] * characters
        assert c["reward"] == pytest.approx(bonus + (c["text"] == group["answer"]))
    assert 0.05 < statistics.fmean(c["text"] == group["answer"] for c, group in found) < 0.6


def test_without_a_clip_the_gradient_is_that_of_the_reward(replaced):
    """Its mean over what the sampler draws is the gradient of the policy's expected advantage, here summed
    over all 5 tokens that there are; with the clip it is not.
    """
    generator = torch.Generator().manual_seed(0)
    logits_V, sampler_V, adv_V = (torch.randn(5, generator=generator) * 2 for _ in range(3))
    logits_V.requires_grad_()
    expected = (logits_V.softmax(-1) * adv_V).sum()
    [wanted_V] = torch.autograd.grad(expected, logits_V)

    def gradient(policy_loss):
        logps_B1, drawn_B1 = logits_V.log_softmax(-1)[:, None], sampler_V.log_softmax(-1)[:, None]
        loss_B1, _ = policy_loss(logps_B1, drawn_B1, adv_V, True, clip_low=0.2, clip_high=0.2, is_cap=2.0)
        return torch.autograd.grad((drawn_B1.exp() * loss_B1).sum(), logits_V)[0]

    clipped = train_grpo.policy_loss
    torch.testing.assert_close(
        gradient(replaced("no_clip.py", train_grpo, "policy_loss")["policy_loss"]), -wanted_V
    )
    assert (gradient(clipped) + wanted_V).abs().max() > 0.1


def test_a_forgotten_tensor_is_found(replaced, policy, tokenizer, device, prompts):
    """All weights change; the sampler gets all tensors but one, and the gap is that of its own model."""
    sampler = sampler_hf.HFSampler(str(TOY), **engine(tokenizer, device))
    old, held = AutoModelForCausalLM.from_pretrained(TOY), dict(sampler.lm.named_parameters())
    new = AutoModelForCausalLM.from_pretrained(TOY)
    with torch.no_grad():
        for parameter in [*policy.parameters(), *new.parameters()]:
            parameter.mul_(1.05)
    replaced("forgotten.py", sampler_hf.HFSampler, "reload")
    sampler.reload(policy.full_weights(sampler.dtype), 1)
    [name] = [name for name in held if not torch.equal(held[name], new.get_parameter(name))]
    assert torch.equal(held[name], old.get_parameter(name))

    groups = sampler.generate(prompts, 1, 8, 1.0, seed=0)
    gaps = []
    for ids, [c] in zip(prompts, groups, strict=True):
        logp_TV = new(torch.tensor([ids + c.ids])).logits[0].log_softmax(-1)
        ends = range(len(ids), len(ids) + min(4, len(c.ids)))  # the test reads so many tokens of each
        gaps += [abs(logp_TV[t - 1, c.ids[t - len(ids)]].item() - c.logps[t - len(ids)]) for t in ends]
    rows = [Row("", ids, None, None) for ids in prompts]
    with pytest.raises(SyncError, match="does not hold the policy's weights") as caught:
        self_test(sampler, policy, list(zip(rows, groups, strict=True)))
    said = float(re.search(r"differ by (\S+) on average", str(caught.value))[1])
    assert said == pytest.approx(statistics.fmean(gaps), rel=0.05)  # it has two digits


def test_group_dpo_with_a_grpo_loss(run):
    """Step 0: log 2 for each prompt with a pair; and weight x mean over its completions of -A x tokens."""
    metrics, _, groups = run("teaching.dpo_grpo", "--grpo-weight", "0.1", "--sync-steps", "10")
    by_hand = 0.0
    for group in groups:
        if pairs_of(group):
            rewards = [c["reward"] for c in group["completions"]]
            mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
            grpo = [-(c["reward"] - mean) / (spread + 1e-6) * len(c["ids"]) for c in group["completions"]]
            by_hand += math.log(2) + 0.1 * statistics.fmean(grpo)
    assert metrics[0]["loss"] == pytest.approx(by_hand / 8, rel=1e-4)
    plain, *_ = run("train_dpo", "--all-pairs", "--sync-steps", "10", steps=10)
    assert abs(metrics[0]["grad_norm"] - plain[0]["grad_norm"]) > 1e-3  # it does pull


def test_the_commands_of_the_exercises_parse_and_write_what_the_tables_read():
    scripts = {"train_dpo": train_dpo, "train_grpo": train_grpo, "evaluate": evaluate}
    exercises = re.split(r"^## (?=\d)", (ROOT / "teaching" / "exercises.md").read_text(), flags=re.M)[1:]
    assert len(exercises) == 10
    for exercise in exercises:
        commands = "".join(re.findall(r"^```\n(.*?)^```", exercise, re.M | re.S)).replace("\\\n", " ")
        written = set()
        for command in re.findall(r"^torchrun (?:-m )?(.*)", commands, re.M):
            script, *flags = shlex.split(command)
            if script.startswith("teaching."):
                answer = (ROOT / f"{script.replace('.', '/')}.py").read_text()
                script = re.search(r"launch\((?:lambda: )?(\w+)\.main", answer)[1]
            args = scripts[script.removesuffix(".py")].get_args(flags)
            assert args.sampler == "hf" and args.seed == 0
            written.add(str(args.out))
        rows = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| `.*", exercise, re.M)]
        assert rows and {run for _, cell, *_ in rows for run in re.findall(r"`(\S+)`", cell)} <= written
        assert all(re.fullmatch(r"\S+ ± \S+", expected) for _, _, _, _, expected, *_ in rows)


PAGE = """# Exercises

## 1. As expected

```
mkdir -p runs/a && printf '{"step": %s, "reward": %s, "loss": 1}\\n' 0 0.1 1 0.2 \\
    2 0.6 > runs/a/metrics.jsonl
mkdir runs/b && sed s/0.2/0.4/ runs/a/metrics.jsonl > runs/b/metrics.jsonl
```

| run | metric | step | expected |
|---|---|---|---|
| `runs/a` | `reward` | 0 to 2 | 0.25 ± 0.06 |
| `runs/a` | `steps` | 0 to 99 | 3 ± 0 |
| `runs/a` / `runs/b` | `reward` | 1 | 0.5 ± 0.0001 |

## 2. Off: a number, and a step that is not there

| `runs/a` | `reward` | 2 | 0.5 ± 0.09 |
| `runs/a` | `reward` | 2 to 3 | 0.6 ± 1 |
"""


def test_the_check_of_the_exercises_finds_what_is_off(tmp_path):
    (tmp_path / "teaching").mkdir()
    script = shutil.copy(ROOT / "teaching" / "check.sh", tmp_path / "teaching")
    (tmp_path / "teaching" / "exercises.md").write_text(PAGE)

    def check(*numbers):
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # the script asks for `python`
        command = ["bash", script, *numbers]
        done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=False)
        found = re.findall(r"^(ok |OFF) .* found (\S+)", done.stdout, re.M)
        return done.returncode, found, done.stdout.splitlines()[-1]

    good, off = [("ok ", "0.3"), ("ok ", "3"), ("ok ", "0.5")], [("OFF", "0.6"), ("OFF", "nan")]
    assert check() == (1, good + off, "1 of 2 exercises as expected")
    assert check("1") == (0, good, "1 of 1 exercises as expected")
    assert check("3") == (1, [], "0 of 0 exercises as expected")
    assert not (tmp_path / "runs").exists()
