"""--preflight against real runs with the same flags, and its forecast against sums by hand."""

import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, require_vllm
from transformers import AutoConfig, GPT2Config

import preflight
import train_dpo
from data import Completion, Row
from preflight import GIB, Found, forecast, warnings
from results.memory import MODELS, shape_of

READ = {
    "parameters": r"model +([\d,]+) parameters on 2 rank",
    "unequal": r"unequal rewards +in (\d+)% of 64 groups of 8",
    "length": r"completions +([\d.]+) tokens",
    "cut": r"tokens, (\d+)% cut",
    "checkpoint": r"checkpoint +[\d.]+ s, ([\d.]+) MiB",
    "disk": r"\), ([\d.]+) MiB on disk",
    "master": r"master weights ([\d.]+) MiB",
    "gradients": r"gradients ([\d.]+) MiB",
    "moments": r"Adam's moments ([\d.]+) MiB",
    "reference": r"reference ([\d.]+) MiB",
}
SMALL = ["--prompts-per-step", "32", "--sync-steps", "2", "--max-new-tokens", "3", "--sampler", "hf"]


def found(name, screen):
    return float(re.search(READ[name], screen)[1].replace(",", ""))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["train_dpo.py", "train_grpo.py"])
def test_it_finds_what_the_run_then_has(script, tmp_path, name):
    """The first window has the 64 prompts that are tried; many completions are cut after 3 tokens."""
    flags = [*SMALL, "--steps", "4", "--eval-every", "0", "--save-every", "3", "--log-samples", "0"]
    done = script(name, *flags, "--out", tmp_path / "run", "--preflight", ranks=2)
    assert list(tmp_path.iterdir()) == []
    said = {
        name: re.search(form, done.stdout)[1].replace(",", "")
        for name, form in READ.items()
        if name != "disk"
    }
    said = {name: float(value) for name, value in said.items()}
    cut = re.findall("^warning: .*", done.stdout, re.MULTILINE)
    assert len(cut) == 1 and cut[0].endswith("are cut: raise --max-new-tokens")

    script(name, *flags, "--out", tmp_path / "run", ranks=2)
    first = read(tmp_path / "run" / "metrics.jsonl")[:2]
    mean = lambda metric: sum(line[metric] for line in first) / 2  # noqa: E731
    assert said["unequal"] == pytest.approx(100 * (1 - mean("frac_reward_zero_std")), abs=0.5)
    assert said["length"] == pytest.approx(mean("completions/length"), abs=0.05)
    assert said["cut"] == pytest.approx(100 * mean("completions/clipped_ratio"), abs=0.5)
    files = (tmp_path / "run" / "checkpoints" / "step-000003").glob("*distcp")  # inside a window
    assert said["checkpoint"] == pytest.approx(sum(f.stat().st_size for f in files) / 2**20, rel=0.02)
    # half of each tensor on each of two ranks, in float32
    half = said["parameters"] * 4 / 2 / 2**20
    assert [said[what] / half for what in ("master", "gradients", "moments", "reference")] == pytest.approx(
        [1, 1, 2, 1], rel=0.01
    )


def test_a_long_window_of_vllm(torchrun, tmp_path):
    """Its size on disk, and how often it saves and validates, against a run."""
    require_vllm()
    flags = (
        "--sync-steps 12 --steps 25 --save-every 10 --eval-every 10 --prompts-per-step 16 --keep 9".split()
    )
    done = torchrun(1, "train_dpo.py", *flags, "--out", tmp_path / "run", "--preflight")
    assert list(tmp_path.iterdir()) == []
    written = found("disk", done.stdout) * 2**20
    times = re.search(r"(\d+) checkpoint\(s\) and (\d+) validation\(s\)", done.stdout).groups()
    ran = torchrun(1, "train_dpo.py", *flags, "--out", tmp_path / "run").stdout
    assert [ran.count(word) for word in (": checkpoint in ", ": validation accuracy")] == [*map(int, times)]
    files = (tmp_path / "run" / "windows").glob("step-000012-*/*.jsonl")
    assert written == pytest.approx(sum(f.stat().st_size for f in files), rel=0.1)


def test_on_saved_completions(script, tmp_path):
    """Nothing is sampled or scored again: the shares are those of the file."""
    common, file = ["--sampler", "hf", "--eval-every", "0"], tmp_path / "rollouts.jsonl"
    first = [*SMALL, *common, "--steps", "2", "--save-rollouts", file, "--out", tmp_path / "first"]
    script("train_dpo.py", *first)
    second = [*common, "--sync-steps", "inf", "--rollouts", file, "--out", tmp_path / "second"]
    done = script("train_dpo.py", *second, "--preflight")
    groups = [[c["reward"] for c in group["completions"]] for group in read(file)]
    assert len(groups) == 64
    unequal = 100 * sum(len(set(rewards)) > 1 for rewards in groups) / 64
    assert found("unequal", done.stdout) == pytest.approx(unequal, abs=0.5)
    assert "sampling -, update" in done.stdout and "(sample 0.00 s, score 0.00 s," in done.stdout


FOUND = Found(
    parameters=10, capacity=100 * GIB, tensors={"master weights": 10 * GIB}, derived=None, most=50 * GIB,
    in_update=60 * GIB, while_sampling=70 * GIB, sequences=100.0, unequal=0.5, length=400.0, cut=0.1,
    failed=0.0, sampled=64 * 8 * 400.0, trained=1e6,
    seconds={"reload": 5.0, "checkpoint": 20.0, "sample": 64.0, "score": 16.0, "update": 32.0},
    checkpoint=100 * GIB, rollouts=2.0**20, disk=1000 * GIB, valid=128,
)  # fmt: skip


def flags(**more):
    more = {"model": "m", "data": ["d"], "prompts_per_step": 32, "samples_per_prompt": 8, "steps": 25} | more
    words = [f"--{name.replace('_', '-')}={value}" for name, value in more.items() if name not in ("data",)]
    return train_dpo.get_args([*words, "--data", "d", "--eval-data", "e"])


def test_the_forecast_by_hand():
    """Half of 64 prompts a step: 32 + 8 + 16 s. Steps 10 and 20 are saved, and 12 and 24, where long windows
    begin. A validation has a quarter of the 512 completions that took 80 s.
    """
    ahead = forecast(FOUND, flags(sync_steps=12, save_every=10, eval_every=10))
    assert ahead.step == {"sample": 32.0, "score": 8.0, "update": 16.0}
    assert ahead.window == 5 + 12 * 56 and ahead.on_disk == 12 * 32 * 2**20
    assert (ahead.checkpoints, ahead.validations) == (4, 4)
    assert ahead.run == 25 * 56 + 3 * 5 + 4 * 20 + 4 * (5 + 80 / 4)
    online = forecast(FOUND, flags(sync_steps=1, save_every=0, eval_every=0))
    assert (online.window, online.on_disk, online.run) == (5 + 56, 0, 25 * 61)
    offline = forecast(FOUND, flags(sync_steps="inf", save_every=25, eval_every=0))
    assert (offline.steps, offline.run) == (25, 25 * 56 + 5 + 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"in_update": 95 * GIB}, ["95%", "--micro-batch-tokens 16384", "GPUs"]),
        ({"while_sampling": 95 * GIB}, ["sampling takes 95%", "--gpu-memory"]),
        ({"sequences": 31.4}, ["31 sequences", "--gpu-memory", "--max-new-tokens"]),
        ({"unequal": 0.09}, ["9%", "--samples-per-prompt"]),
        ({"cut": 0.21}, ["21%", "--max-new-tokens"]),
        ({"failed": 0.6}, ["60%", "--max-failed 0.5"]),
        ({"disk": 299 * GIB}, ["300.00 GiB", "299.00 GiB", "--keep"]),
    ],
)
def test_each_warning_names_the_flag_that_helps(change, words):
    said = warnings(replace(FOUND, **change), flags())
    assert len(said) == bool(change) and all(word in said[0] for word in words)


def test_too_little_memory_is_one_line(monkeypatch, policy, device, capsys):
    """The card's own error, from the first forward on."""
    args = train_dpo.get_args([])

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nMore.")

    monkeypatch.setattr(policy, "forward", full)
    parts = SimpleNamespace(kinds=[], valid=[], scored=False, sleep=lambda: None)
    with pytest.raises(SystemExit) as stopped:
        preflight.measure(
            args, train_dpo.make_examples, prompts=parts, policy=policy, reference=None,
            optimizer=torch.optim.AdamW(policy.parameters()), scorer=None, sampler=parts, window=parts,
            checkpoints=None,
        )  # fmt: skip
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stopped.value.code == 2 and "out of memory in the largest update" in line
    assert "--micro-batch-tokens 4096" in line and "--activation-checkpointing" in line


@pytest.mark.parametrize("script", ["train_dpo", "train_grpo"])
@pytest.mark.parametrize(("limit", "prompt", "new"), [(1000, 24, 8), (900, 100, 300), (1100, 200, 330)])
def test_no_micro_batch_is_larger_than_those_that_are_tried(policy, script, limit, prompt, new):
    """Beside batches of 200 examples whose lengths are drawn up to the limits."""
    module = __import__(script)
    flags = {"micro-batch-tokens": limit, "max-prompt-tokens": prompt, "max-new-tokens": new}
    args = module.get_args([f"--{name}={value}" for name, value in flags.items()])

    def sizes(groups):
        batches = preflight.micro_batches(module.make_examples(groups, 0, args), policy, limit)
        return [batch.ids_RL.numel() for batch in batches]

    tried = preflight.largest_batches(args, module.make_examples, policy)
    largest = [max(sizes(groups)) for groups in tried]
    assert largest[:2] == largest[2:] and max(largest) <= limit
    [(row, completions), *_] = tried[0]
    assert (len(row.ids), {len(c.ids) for c in completions}) == (prompt, {new})
    rng, drawn = random.Random(0), []
    for _ in range(200):
        part = rng.random()
        ids = [[20] * max(1, int(part * size)) for size in (prompt, new)]
        group = [Completion(ids[1], [0.0] * len(ids[1]), "", "stop", 0, float(i % 2)) for i in range(8)]
        drawn.append((Row("", ids[0], None, None), group))
    # a batch is so small here that whole tokens leave a few percent
    assert max(sizes(drawn)) <= 1.05 * max(largest)


def test_the_shape_of_a_model_from_its_config():
    toy = shape_of(AutoConfig.from_pretrained(ROOT / "toy" / "model"))
    assert toy.parameters == 672_896 and shape_of(GPT2Config()) is None
    small = SimpleNamespace(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    assert shape_of(small) == MODELS["Qwen2.5 0.5B"]
