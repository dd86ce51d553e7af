"""teaching/tiny.py, against the scripts that it is the short form of, and against the plain model."""

import ast
import json
import math
import re
import runpy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, TOY
from transformers import AutoModelForCausalLM

import train_dpo
import train_grpo
from teaching import tiny

FILE = ROOT / "teaching" / "tiny.py"
END = 3


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def padded(groups):
    """A step's rollouts as `tiny.sample` returns them, and the row of each completion."""
    start = max(len(group["ids"]) for group in groups)
    longest = max(len(completion["ids"]) for group in groups for completion in group["completions"])
    ids, mask, rows = [], [], []
    for group in groups:
        for completion in group["completions"]:
            sequence = group["ids"] + completion["ids"]
            before, after = start - len(group["ids"]), longest - len(completion["ids"])
            ids.append([0] * before + sequence + [0] * after)
            mask.append([0] * before + [1] * len(sequence) + [0] * after)
            rows.append(group)
    return torch.tensor(ids), torch.tensor(mask), start, rows


def note(monkeypatch, owner, name, results):
    """Notes what a function returns, and lets it go on as it is."""
    function = getattr(owner, name)

    def noting(*args, **more):
        results.append(function(*args, **more))
        return results[-1]

    monkeypatch.setattr(owner, name, noting)


@pytest.mark.parametrize(("algorithm", "sync_steps"), [("dpo", 4), ("grpo", 3)])
def test_losses_and_gradient_norms_are_those_of_the_script(algorithm, sync_steps, tmp_path, monkeypatch):
    """Ten steps on the completions that the script has sampled, and on nothing else of it: syncs, rewards,
    pairs or advantages, the log-probs of all three models, loss and update are tiny.py's own.
    """
    rollouts, out = tmp_path / "rollouts.jsonl", tmp_path / "run"
    flags = f"--sync-steps {sync_steps} --steps 10 --sampler hf --eval-every 0"
    files = ["--save-rollouts", rollouts, "--out", out, "--save-every", "0", "--log-samples", "0"]
    command = [sys.executable, f"train_{algorithm}.py", *flags.split(), *files]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    metrics, groups = read(out / "metrics.jsonl"), read(rollouts)
    steps = [padded([group for group in groups if group["step"] == step]) for step in range(10)]

    calls = [steps[0], *steps, steps[0]]  # the first and the last are for the validations
    sampled, scored, score = iter(calls), iter(calls), tiny.score
    monkeypatch.setattr(tiny, "sample", lambda model, tokenizer, rows: next(sampled)[:3])
    monkeypatch.setattr(tiny, "score", lambda tokenizer, *_: score(tokenizer, *next(scored)))
    rewards, losses, norms = [], [], []
    note(monkeypatch, tiny, "score", rewards)
    note(monkeypatch, tiny, f"{algorithm}_loss", losses)
    note(monkeypatch, torch.nn.utils, "clip_grad_norm_", norms)
    tiny.train(algorithm, float(sync_steps), steps=10, seed=0)

    rewarded = [completion["reward"] for group in groups for completion in group["completions"]]
    assert torch.cat(rewards[1:-1]).tolist() == rewarded
    assert [x.item() for x in losses] == pytest.approx([m["loss"] for m in metrics], rel=1e-4, abs=1e-6)
    assert [x.item() for x in norms] == pytest.approx([m["grad_norm"] for m in metrics], rel=1e-4)
    if algorithm == "grpo":  # and the clip had something to do
        assert [m["clip_ratio"] > 0 for m in metrics[:4]] == [False, True, True, False]


@pytest.mark.parametrize("script", [train_dpo, train_grpo])
def test_a_step_has_the_size_of_the_scripts(script):
    args = script.get_args([])
    assert (args.prompts_per_step, args.samples_per_prompt) == (tiny.G, tiny.N)
    assert args.max_new_tokens == tiny.MAX_NEW_TOKENS


def test_the_ratio_is_clipped_and_capped_as_in_the_script(monkeypatch):
    """Ratios that ten steps of the toy hardly have, each with a positive and a negative advantage."""
    ratio_B = torch.tensor([0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 1.99, 2.01, 10.0]).repeat_interleave(2)
    sampler_B1, reward_B = torch.full((18, 1), -3.0), torch.tensor([1.0, 0.0]).repeat(9)
    adv_B = torch.tensor(train_grpo.advantages([1.0, 0.0], std_norm=True)).repeat(9)
    monkeypatch.setattr(tiny, "G", 9)
    monkeypatch.setattr(tiny, "N", 2)

    def tinys(logps_B1):
        return tiny.grpo_loss(logps_B1, sampler_B1, sampler_B1, torch.ones(18, 1), reward_B, beta=0.0)

    def scripts(logps_B1):
        bounds = {"clip_low": 0.2, "clip_high": 0.2, "is_cap": 2.0}
        return train_grpo.policy_loss(logps_B1, sampler_B1, adv_B, stale=True, **bounds)[0].mean()

    found = []
    for loss in (tinys, scripts):
        logps_B1 = (sampler_B1 + ratio_B.log()[:, None]).requires_grad_()
        value = loss(logps_B1)
        value.backward()
        found.append([value.item(), *logps_B1.grad.flatten().tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[1].count(0) == 8  # A > 0 and a ratio above 1.2; A < 0 and one below 0.8 or above 2


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_teach_nothing(reward):
    logps_BT = torch.randn(tiny.G * tiny.N, 4, requires_grad=True)
    zeros_BT, reward_B = torch.zeros(logps_BT.shape), torch.full((tiny.G * tiny.N,), reward)
    dpo = tiny.dpo_loss(logps_BT, zeros_BT, reward_B, "0")
    grpo = tiny.grpo_loss(logps_BT, zeros_BT, zeros_BT, torch.ones(logps_BT.shape), reward_B)
    (dpo + grpo).backward()
    assert dpo == grpo == 0 and not logps_BT.grad.any()


def test_completions_are_as_frequent_as_the_plain_model_says(tokenizer):
    """Of a short prompt, padded for a longer one; the plain model has no padding, no mask and no cache."""
    torch.manual_seed(0)
    model, n = AutoModelForCausalLM.from_pretrained(TOY), 1000
    rows = [{"prompt": "5+3="}] * n + [{"prompt": "99+98="}]
    ids_BL, mask_BL, start = tiny.sample(model, tokenizer, rows)
    logps_BT = tiny.token_logps(model, ids_BL, mask_BL, start)
    chat = [{"role": "user", "content": "5+3="}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    sequences = [tuple(ids[mask > 0].tolist()) for ids, mask in zip(ids_BL, mask_BL, strict=True)][:n]
    for sequence, count in Counter(sequences).most_common(5):
        completion = sequence[len(prompt) :]
        assert sequence[: len(prompt)] == tuple(prompt)
        with torch.no_grad():
            logps_TV = model(torch.tensor([sequence])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps = logps_TV[range(len(completion)), completion].tolist()
        p = math.exp(sum(logps))
        assert abs(count / n - p) < 4 * math.sqrt(p * (1 - p) / n) and count > 20
        zeros = [0.0] * (logps_BT.shape[1] - len(logps))
        assert logps_BT[sequences.index(sequence)].tolist() == pytest.approx(logps + zeros, abs=1e-5)
    for sequence in sequences:
        ended = sequence[-1] == END or len(sequence) == len(prompt) + tiny.MAX_NEW_TOKENS
        assert ended and END not in sequence[:-1]


def test_a_completion_is_cut_at_the_bound(tokenizer, monkeypatch):
    monkeypatch.setattr(tiny, "MAX_NEW_TOKENS", 2)
    model = AutoModelForCausalLM.from_pretrained(TOY)
    ids_BL, mask_BL, start = tiny.sample(model, tokenizer, [{"prompt": "99+98="}, {"prompt": "1+1="}])
    assert ids_BL.shape[1] == mask_BL.shape[1] == start + 2 and mask_BL[0, start:].tolist() == [1, 1]


def test_a_reward_is_for_the_answer_alone(tokenizer):
    """Spaces around it aside, up to the end token; what stands in the padding is no part of the text."""
    texts = [" 13 ", "13", "13<|end|>", "134", "1 3", ""]
    ids = [tokenizer.encode(text) for text in texts]
    prompt = tokenizer.encode("13")  # which is not read
    ids_BL = torch.tensor([prompt + part + [9] * (4 - len(part)) for part in ids])
    mask_BL = torch.tensor([[1, 1] + [1] * len(part) + [0] * (4 - len(part)) for part in ids])
    rewards = tiny.score(tokenizer, ids_BL, mask_BL, len(prompt), [{"answer": "13"}] * len(texts))
    assert rewards.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("sync_steps", "starts"),
    [(1.0, [0, 1, 2, 3, 4, 5, 6]), (3.0, [0, 0, 0, 3, 3, 3, 6]), (math.inf, [0] * 7)],
)
def test_the_sampler_has_the_weights_that_the_policy_had_at_the_start_of_the_window(
    sync_steps, starts, monkeypatch
):
    samplers, policies = [], []
    sample, score, clip = tiny.sample, tiny.score, torch.nn.utils.clip_grad_norm_

    def noting_sample(model, tokenizer, rows):
        samplers.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return sample(model, tokenizer, rows[:16])

    def noting_clip(parameters, max_norm):
        assert max_norm == train_dpo.TOY["grad_clip"] == train_grpo.TOY["grad_clip"]
        parameters = list(parameters)
        policies.append(torch.cat([p.detach().flatten() for p in parameters]))
        return clip(parameters, max_norm)

    monkeypatch.setattr(tiny, "G", 2)
    monkeypatch.setattr(tiny, "sample", noting_sample)
    monkeypatch.setattr(tiny, "score", lambda *args: score(*args[:-1], args[-1][:16]))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting_clip)
    tiny.train("dpo", sync_steps, steps=7, seed=0)
    samplers = samplers[1:-1]  # without the validations, which sample from the policy
    assert [next(i for i, p in enumerate(policies) if torch.equal(p, w)) for w in samplers] == starts
    assert not any(torch.equal(policies[i], policies[i + 1]) for i in range(6))


def test_it_learns(monkeypatch, capsys):
    """With half of the toy's prompts in a step."""
    monkeypatch.setattr(tiny, "G", 16)
    tiny.train("grpo", 5.0, steps=25, seed=0)
    before, after = re.findall(r"^validation accuracy (\S+) ", capsys.readouterr().out, re.M)
    assert 0.17 < float(before) < 0.27 and float(after) > float(before) + 0.08


def test_the_command_runs_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(FILE), *"--algorithm grpo --sync-steps inf --steps 1".split()])
    runpy.run_path(str(FILE), run_name="__main__")
    before, step, after = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"validation accuracy 0\.\d{3} before", before)
    assert re.fullmatch(r"step 0: reward 0\.\d{3}, loss -?0\.\d{4}, grad norm \d\.\d\d", step)
    assert re.fullmatch(r"validation accuracy 0\.\d{3} after 1 steps", after)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--steps 0", "--steps 0 --sync-steps 1: whole numbers above 0, or inf"),
        ("--sync-steps 2.5", "--sync-steps 2.5: whole numbers above 0, or inf"),
        ("--sync-steps -3", "--sync-steps -3: whole numbers above 0, or inf"),
        ("--sync-steps nan", "--sync-steps nan: whole numbers above 0, or inf"),
        ("--sync-steps often", "--sync-steps: invalid float value: 'often'"),
        ("--algorithm ppo", "--algorithm: invalid choice: 'ppo'"),
        ("--sync 0", "unrecognized arguments: --sync 0"),
    ],
)
def test_a_bad_flag_is_one_line(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(FILE), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FILE), run_name="__main__")
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith("tiny.py: error: ") and said in error


def test_it_is_short_and_needs_nothing_of_the_project():
    text = FILE.read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert len(text.splitlines()) <= 130
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "transformers"}
