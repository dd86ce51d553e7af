"""Whole runs: torchrun, gloo ranks, the real vLLM, real files."""

import json
import shutil
from argparse import ArgumentError

import pytest
import torch
from conftest import ROOT, SUMS, TOY, require_vllm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from export import rehearse_export
from loading import load_policy

SHORT = f"--prompts-per-step 9 --samples-per-prompt 4 --data {SUMS} --eval-data {{tmp}}/valid.jsonl".split()


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    valid = SUMS.read_text().splitlines(keepends=True)
    (directory / "valid.jsonl").write_text("".join(valid[:30]))
    return directory


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def flat(model):
    tensors = load_file(model / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def short(tmp, *arguments):
    return [str(argument).format(tmp=tmp) for argument in [*SHORT, *arguments]]


def test_two_ranks_with_vllm_sync_when_they_should(torchrun, tmp):
    require_vllm()
    out = tmp / "vllm"
    flags = "--steps 6 --sync-steps 3 --eval-every 2 --log-samples -1".split()
    done = torchrun(2, "train_dpo.py", *short(tmp, *flags, "--out", out))
    metrics = read(out / "metrics.jsonl")
    steps, evals = [m for m in metrics if "loss" in m], [m for m in metrics if "eval/accuracy" in m]
    assert [m["step"] for m in steps] == list(range(6))
    # validation loads newer weights in between (steps 2, 4), the window goes on with its own
    assert [m["sync/age"] for m in steps] == [0, 1, 2, 0, 1, 2]
    assert [m["step"] for m in evals] == [0, 2, 4, 6] and {m["eval/prompts"] for m in evals} == {30}
    # each window is sampled in one call
    assert [m["step"] for m in steps if "tokens_per_second/sample" in m] == [0, 3]
    tested = {m["step"]: m["sampler/logp_gap_max"] for m in steps if "sampler/logp_gap_max" in m}
    assert tested.keys() == {0, 3} and max(tested.values()) < 1e-3
    # reference = sampler's weights: at steps 0 and 3 the policy is the reference
    assert [m["rewards/margins"] == 0 for m in steps] == [True, False, False] * 2

    samples = read(out / "samples.jsonl")
    assert len(samples) == 6 * 9 * 4
    assert {(s["step"], s["version"]) for s in samples} == {(i, i // 3 * 3) for i in range(6)}
    assert all(s["reward"] == float(s["text"].strip() == s["answer"]) for s in samples)
    group = [s["text"] for s in samples if s["step"] == 0]
    assert len({tuple(group[i : i + 4]) for i in range(0, 36, 4)}) == 9  # the ranks did not draw the same

    facts = json.loads((out / "args.json").read_text())
    assert (
        facts["ranks"] == 2
        and facts["args"]["sync_steps"] == 3
        and facts["versions"]["torch"] == torch.__version__
    )
    assert (
        f"{evals[0]['eval/accuracy']:.3f} before, {evals[-1]['eval/accuracy']:.3f} after 6 steps"
        in done.stdout
    )
    trained, toy = (AutoModelForCausalLM.from_pretrained(path) for path in (out / "model", TOY))
    moved = [(a - b).abs().max().item() for a, b in zip(trained.parameters(), toy.parameters(), strict=True)]
    assert min(moved) > 0 and max(moved) < 6 * 4e-4  # every tensor, by about lr a step


@pytest.fixture(scope="module")
def rollouts(torchrun, tmp):
    """What an offline run sampled; the next tests train on it."""
    flags = ["--steps", 8, "--sync-steps", "inf", "--eval-every", 4, "--sampler", "hf", "--log-samples", 0]
    out = ["--out", tmp / "offline", "--save-rollouts", tmp / "r.jsonl"]
    torchrun(1, "train_dpo.py", *short(tmp, *flags, *out))
    return tmp / "r.jsonl"


def test_offline_keeps_its_first_weights_and_saves_what_it_sampled(rollouts, tmp):
    steps = [m for m in read(tmp / "offline" / "metrics.jsonl") if "loss" in m]
    assert [m["sync/age"] for m in steps] == list(range(8))
    assert not (tmp / "offline" / "samples.jsonl").exists()
    groups = read(rollouts)
    assert len(groups) == 8 * 9 and {c["version"] for g in groups for c in g["completions"]} == {0}
    for group in groups:
        for c in group["completions"]:
            assert c["reward"] == float(c["text"] == group["answer"]) and len(c["ids"]) == len(c["logps"])
    wanted = [
        sum(c["reward"] for g in groups[i * 9 : i * 9 + 9] for c in g["completions"]) / 36 for i in range(8)
    ]
    assert [m["reward"] for m in steps] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "smallest", "flags"),
    [
        ("train_dpo.py", 64, []),
        ("train_grpo.py", 32, []),
        ("train_grpo.py", 32, ["--loss-norm", "token", "--no-std-norm", "--beta", 0.1]),
    ],
)
def test_ranks_and_micro_batches_do_not_change_the_update(script, rollouts, tmp, name, smallest, flags):
    """13 prompts over 2 ranks: unequal shares, and unequal numbers of micro-batches."""
    norms, weights = {}, {}
    common = ["--rollouts", rollouts, "--sync-steps", "inf", "--steps", 2, "--eval-every", 0, *flags]
    common += ["--sampler", "hf", "--prompts-per-step", 13]
    for ranks, tokens in [(1, 4096), (1, 100), (1, smallest), (2, smallest)]:
        out = tmp / f"{name}{len(flags)}-{ranks}-{tokens}"
        more = ["--micro-batch-tokens", tokens, "--out", out]
        script(name, *short(tmp, *common, *more), ranks=ranks)
        norms[ranks, tokens] = [m["grad_norm"] for m in read(out / "metrics.jsonl")]
        weights[ranks, tokens] = torch.cat(
            [t.flatten() for t in load_file(out / "model/model.safetensors").values()]
        )
    wanted = weights.pop((1, 4096))
    assert (wanted - flat(TOY)).norm() / wanted.norm() > 1e-4
    for key, got in weights.items():
        assert norms[key] == pytest.approx(norms[1, 4096], rel=1e-5)
        assert (got - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("name", ["train_dpo.py", "train_grpo.py"])
def test_two_replicas_of_two_shards_are_like_one_rank(script, rollouts, tmp, name):
    """On the same rollouts, and on the rest of a window that one rank goes on with."""
    common = ["--sampler", "hf", "--prompts-per-step", 13, "--eval-every", 0]
    file = ["--rollouts", rollouts, "--sync-steps", "inf", "--steps", 2, "--micro-batch-tokens", 64]
    one, four = (tmp / f"shards-{name}-{ranks}" for ranks in (1, 4))
    script(name, *short(tmp, *common, *file, "--out", one))
    script(name, *short(tmp, *common, *file, "--shard-ranks", 2, "--out", four), ranks=4)
    norms = [[m["grad_norm"] for m in read(out / "metrics.jsonl")] for out in (one, four)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert (flat(four / "model") - flat(one / "model")).norm() / flat(one / "model").norm() < 1e-5

    straight, again = (tmp / f"{kind}-{name}" for kind in ("straight", "again"))
    flags = [*common, "--sync-steps", 2, "--sync-ref", "--steps", 4, "--save-every", 3]
    script(name, *short(tmp, *flags, "--shard-ranks", 2, "--out", straight), ranks=4)
    gaps = [m["sampler/logp_gap_max"] for m in read(straight / "metrics.jsonl") if m["step"] % 2 == 0]
    assert len(gaps) == 2 and max(gaps) < 1e-4  # reloads from the two shards of a replica
    shutil.copytree(straight, again, ignore=shutil.ignore_patterns("model"))
    script(name, *short(tmp, *flags, "--out", again, "--resume", "auto"))
    wanted = flat(straight / "model")
    assert (flat(again / "model") - wanted).norm() / wanted.norm() < 1e-5
    held = sum(file.stat().st_size for file in (straight / "checkpoints" / "step-000003").glob("*.distcp"))
    # weights, two moments and the reference, of 4 bytes: each shard once, though two ranks hold it
    assert 4 * 4 * len(wanted) < held < 1.2 * 4 * 4 * len(wanted)


def test_grpo_with_stale_samples_and_a_moving_reference(script, tmp):
    out = tmp / "grpo"
    flags = "--steps 4 --sync-steps 2 --eval-every 3 --sync-ref --lr 1e-3 --beta 0.01 --sampler hf".split()
    script("train_grpo.py", *short(tmp, *flags, "--out", out), ranks=2)
    steps = [m for m in read(out / "metrics.jsonl") if "loss" in m]
    assert [m["sync/age"] for m in steps] == [0, 1, 0, 1]
    # right after a reload the policy is the reference, and nothing is clipped
    assert [m["kl"] == 0 for m in steps] == [True, False, True, False]
    assert [m["clip_ratio"] == 0 for m in steps] == [True, False, True, False]
    assert all(0 < m["entropy"] < 4.2 and 0 < m["kl"] + 1e-9 < 1 for m in steps)


def test_online_grpo_needs_no_reference_that_follows(script, tmp):
    out = tmp / "online"
    script("train_grpo.py", *short(tmp, "--steps", 2, "--sync-ref", "--sampler", "hf", "--out", out))
    assert [m["kl"] for m in read(out / "metrics.jsonl") if "loss" in m] == [0, 0]


def test_grpo_without_anything_to_learn_changes_nothing(script, tmp):
    """Rewards that are all equal: counted, no gradient, and weights as they were (no decay either)."""
    rows = [{"prompt": f"{i}+{i}=", "reward": "exact", "answer": "never"} for i in range(20)]
    (tmp / "never.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp / "equal"
    flags = ["--data", tmp / "never.jsonl", "--steps", 2, "--eval-every", 0, "--sampler", "hf", "--out", out]
    script("train_grpo.py", *short(tmp, *flags), ranks=2)
    steps = read(out / "metrics.jsonl")
    assert [(m["frac_reward_zero_std"], m["grad_norm"], m["loss"], m["reward"]) for m in steps] == [
        (1, 0, 0, 0)
    ] * 2
    assert torch.equal(flat(out / "model"), flat(TOY))


def test_a_sampler_that_keeps_its_weights_stops_the_run_at_the_first_reload(script, tmp):
    flags = short(tmp, "--steps", 4, "--sampler", "hf", "--out", tmp / "stuck")
    program = tmp / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport processes, sampler_hf, train_dpo\n"
        "def reload(self, weights, version):\n"
        "    list(weights)\n"
        "    self.version = version\n"
        "sampler_hf.HFSampler.reload = reload\n"
        f"processes.launch(lambda: train_dpo.main({flags!r}))\n"
    )
    done = script(program, code=1)
    last = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert last.startswith("the sampler (version 1) does not hold the policy's weights")
    assert [m["step"] for m in read(tmp / "stuck" / "metrics.jsonl") if "loss" in m] == [0]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7, "top_p": 0.8}, {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True}],
)
def test_a_generation_config_that_transformers_would_not_save_is_carried_over(settings, script, tmp):
    """It loads, and saving it again raises: after the whole run, if nobody looks before."""
    model = shutil.copytree(TOY, tmp / f"odd{len(settings)}")
    text = json.dumps({"eos_token_id": 3, **settings})
    (model / "generation_config.json").write_text(text)
    lengths = ["--max-prompt-tokens", "24", "--max-new-tokens", "8"]
    flags = ["--sampler", "hf", "--steps", "1", "--eval-every", "0", "--no-activation-checkpointing"]
    out = tmp / f"run{len(settings)}"
    script("train_dpo.py", *short(tmp, "--model", model, *lengths, *flags, "--out", out), ranks=2)
    assert (out / "model" / "generation_config.json").read_text() == text
    AutoModelForCausalLM.from_pretrained(out / "model")


def test_what_cannot_be_saved_is_said_before_the_run(device, tokenizer, monkeypatch):
    policy = load_policy(str(TOY), device, len(tokenizer), 1.0)
    rehearse_export(policy, tokenizer, "the toy")

    def refuse(*_):
        raise ValueError("no such thing\nas this")

    monkeypatch.setattr(type(policy.lm.config), "save_pretrained", refuse)
    with pytest.raises(ArgumentError, match=r"--model the toy: cannot be saved \(no such thing\)"):
        rehearse_export(policy, tokenizer, "the toy")
