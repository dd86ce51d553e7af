"""The files of teaching/, each run for 20 steps, against numbers that follow from their papers' equations."""

import json
import math
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

FLAGS = [
    "--sampler",
    "hf",
    "--steps",
    "20",
    "--prompts-per-step",
    "8",
    "--eval-every",
    "0",
    "--save-every",
    "0",
]
FLAGS += ["--log-samples", "-1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a file of teaching/, or a script itself; returns metrics, samples and the groups of step 0."""
    folder = tmp_path_factory.mktemp("teaching")
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731

    def run(module, *flags):
        out = folder / f"{module}-{len(list(folder.iterdir()))}"
        rollouts = folder / f"{out.name}.jsonl"
        command = [sys.executable, "-m", module, *FLAGS, "--out", out, "--save-rollouts", rollouts, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        metrics = read(out / "metrics.jsonl")
        assert [m["step"] for m in metrics] == list(range(20)) and all(m["skipped"] == 0 for m in metrics)
        groups = [g for g in read(rollouts) if g["step"] == 0]
        return metrics, read(out / "samples.jsonl"), groups

    return run


def pairs_of(group):
    """All (chosen, rejected) completions."""
    return [(c, r) for c in group["completions"] for r in group["completions"] if c["reward"] > r["reward"]]


def test_every_short_file_is_short():
    lines = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "teaching").glob("*.py")}
    short = ("rloo.py", "ipo.py", "simpo.py", "curriculum.py", "short_answers.py")
    assert all(lines[name] <= 15 for name in short) and lines["dpo_grpo.py"] <= 40


def test_rloo(run):
    """r - mean of the other 7 is 8/7 of r - mean of all 8, and so is the gradient."""
    rloo, *_ = run("teaching.rloo")
    grpo, *_ = run("train_grpo", "--no-std-norm")
    assert rloo[0]["reward"] == grpo[0]["reward"]
    assert rloo[0]["grad_norm"] / grpo[0]["grad_norm"] == pytest.approx(8 / 7, rel=1e-5)


def test_ipo(run):
    """At a margin of 0: loss (1 / 2 beta)^2, slope -1 / beta where DPO's is -beta / 2. Here beta is 3."""
    ipo, *_ = run("teaching.ipo", "--sync-steps", "10")
    dpo, *_ = run("train_dpo", "--sync-steps", "10")
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
    rows = [json.loads(line) for line in (ROOT / "toy" / "train.jsonl").read_text().splitlines()]
    shortest = sorted(len(row["prompt"]) for row in rows)[: 20 * 8]
    assert [len(sample["prompt"]) for sample in samples[::8]] == shortest


def test_a_reward_that_reads_another_column(run, tmp_path):
    """The toy's sums, each with a limit of characters that about half of the right answers keep."""
    rows = [json.loads(line) for line in (ROOT / "toy" / "train.jsonl").read_text().splitlines()[:200]]
    rows = [row | {"reward": "short", "limit": 2 + i % 2} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, samples, groups = run("teaching.short_answers", "--data", str(tmp_path / "rows.jsonl"))
    limit = {row["prompt"]: row["limit"] for row in rows}
    wanted = [
        float(s["text"].strip() == s["answer"] and len(s["text"]) <= limit[s["prompt"]]) for s in samples
    ]
    assert [s["reward"] for s in samples] == wanted and 0.02 < statistics.fmean(wanted) < 0.5
    too_long = [s for s in samples if s["text"].strip() == s["answer"] and s["reward"] == 0]
    assert too_long and all(group["columns"] == {"limit": limit[group["prompt"]]} for group in groups)


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
    plain, *_ = run("train_dpo", "--all-pairs", "--sync-steps", "10")
    assert abs(metrics[0]["grad_norm"] - plain[0]["grad_norm"]) > 1e-3  # it does pull
