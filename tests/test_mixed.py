"""Open-ended rewards: reward models in both layouts, and whole runs that mix them with verifiable rows."""

import argparse
import json
import shutil
import statistics
from argparse import ArgumentError

import pytest
import torch
from conftest import ROOT, SUMS, TOY
from safetensors.torch import load_file, save_file
from test_judge import serving
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, LlamaModel

from data import Row
from reward_models import RewardModel

F32, DAY = torch.float32, "2026-01-01"
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in [
        ("like 1, ab:", "11"),
        ("like 2, cd:", "222222"),
        ("like 0, ef:", ""),
        ("a", "b"),
    ]
]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def model_of(kind, directory, tokenizer, **more):
    torch.manual_seed(3)
    model = kind(
        LlamaConfig(vocab_size=len(tokenizer) + 1, pad_token_id=tokenizer.eos_token_id, **SHAPE, **more)
    )
    with torch.no_grad():  # transformers' initialization is so small that all rewards are alike
        for p in model.parameters():
            p.mul_(5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def by_hand(backbone, head_1H, conversation, tokenizer, *behind):
    """One conversation alone, spelled out: the toy's template by f-string, the head on the last token."""
    text = f"<|user|>{conversation[0]['content']}<|assistant|>{conversation[1]['content']}<|end|>"
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) + list(behind)
    return (head_1H[0] @ backbone(torch.tensor([ids])).last_hidden_state[0, -1]).item()


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory, tokenizer):
    """In the hub's format; the padding token is also the last one of every text."""
    directory = tmp_path_factory.mktemp("rm")
    return directory, model_of(LlamaForSequenceClassification, directory, tokenizer, num_labels=1)


@pytest.fixture(scope="module")
def athene(tmp_path_factory):
    """Athene-RM-8B's layout: a bare Llama and `v_head`, a class of another name, and a CLS token."""
    directory = tmp_path_factory.mktemp("athene")
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    tokenizer.add_special_tokens({"cls_token": "<|cls|>"})
    model = model_of(LlamaModel, directory, tokenizer)
    head_1H = torch.randn(1, 32) / 10
    tensors = {f"model.{name}": tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors | {"v_head.weight": head_1H}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["CustomAutoModelForSequenceClassification"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory, model, head_1H, tokenizer


def test_a_hub_model_scores_as_by_hand(hub_model, tokenizer, device):
    directory, model = hub_model
    scores = RewardModel(str(directory), device, F32, DAY)(CHATS)
    wanted = [by_hand(model.model, model.score.weight, chat, tokenizer) for chat in CHATS]
    assert scores == pytest.approx(wanted, abs=1e-5) and statistics.stdev(scores) > 0.01


def test_athene_scores_as_by_hand_at_the_cls_token(athene, device):
    directory, model, head_1H, tokenizer = athene
    scores = RewardModel(str(directory), device, F32, DAY)(CHATS)
    wanted = [by_hand(model, head_1H, chat, tokenizer, tokenizer.cls_token_id) for chat in CHATS]
    assert scores == pytest.approx(wanted, abs=1e-5) and statistics.stdev(scores) > 0.01


def test_a_reward_model_reads_its_begin_token_once(hub_model, begins, device):
    model = RewardModel(str(hub_model[0]), device, F32, DAY)
    model.tokenizer = begins
    assert begins.decode(model.encode(CHATS[0])) == "<|pad|><|user|>like 1, ab:<|assistant|>11<|end|>"


@pytest.mark.parametrize("layout", ["hub_model", "athene"])
def test_scores_do_not_depend_on_the_batch(layout, request, device):
    directory = str(request.getfixturevalue(layout)[0])
    whole = RewardModel(directory, device, F32, DAY)(CHATS)
    small = RewardModel(directory, device, F32, DAY, offload=True, batch_tokens=40)
    assert small(CHATS) == pytest.approx(whole, abs=1e-5)
    assert [small([chat])[0] for chat in reversed(CHATS)] == pytest.approx(whole[::-1], abs=1e-5)
    assert small([]) == []


def test_a_template_with_a_clock_writes_the_date_of_the_run(hub_model, device):
    for date in ("2025-06-26", "2031-12-01"):
        model = RewardModel(str(hub_model[0]), device, F32, date)
        model.tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}:{{ messages[-1].content }}"
        assert model.tokenizer.decode(model.encode(CHATS[0])) == f"{date}:11"


STRICT = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{{ m.content }}{% endfor %}"""
CHATTY = [  # of rows whose template the toy's model takes
    [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}],
    [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}],
]


@pytest.mark.parametrize("prompt", CHATTY)
def test_a_conversation_that_the_models_template_refuses_is_named_with_its_row(hub_model, device, prompt):
    model = RewardModel(str(hub_model[0]), device, F32, DAY)
    model.tokenizer.chat_template = STRICT
    rows = [Row("1", [], "rm", None, where="a line 1"), Row(prompt, [], "rm", None, where="a line 2")]
    said = r"^a line 2: the reward model's chat template refuses it \(TemplateError: roles must alternate"
    with pytest.raises(ArgumentError, match=said):
        model.check(rows)
    model.check(rows[:1])
    scores = model([CHATS[0], [*prompt, CHATS[0][1]]])  # of a completion that nobody could check before
    assert scores[0] is not None and scores[1] is None


def test_the_run_is_refused_before_it_starts(script, hub_model, tmp_path):
    directory = shutil.copytree(hub_model[0], tmp_path / "strict")
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": STRICT}))
    rows = [{"prompt": prompt, "reward": "rm"} for prompt in ("1", CHATTY[1])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--sampler", "hf", "--reward-model", directory, "--data", tmp_path / "rows.jsonl"]
    done = script("train_dpo.py", *flags, "--out", tmp_path / "run", code=2)
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    assert f"error: {tmp_path}/rows.jsonl line 2: the reward model's chat template refuses it" in done.stderr


def test_the_reward_of_what_is_too_long_is_unknown(hub_model, device):
    model = RewardModel(str(hub_model[0]), device, F32, DAY, max_tokens=18)
    scores = model(CHATS)
    assert [score is None for score in scores] == [False, True, False, False]


def without_tokenizer(directory, tokenizer):
    """transformers makes one of a handful of tokens, and every text is empty."""
    model_of(LlamaForSequenceClassification, directory, tokenizer, num_labels=1)
    (directory / "tokenizer.json").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"})
    )


def test_the_reward_of_an_id_beyond_the_matrix_is_unknown(hub_model, device):
    model = RewardModel(str(hub_model[0]), device, F32, DAY)
    model.tokenizer.add_tokens(["<|new1|>", "<|new2|>"])  # ids 64 and 65; the matrix has 65 rows
    news = [[{"role": "user", "content": f"<|new{i}|>"}, CHATS[0][1]] for i in (1, 2)]
    assert [score is None for score in model([CHATS[0], *news])] == [False, False, True]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d, t: model_of(LlamaForSequenceClassification, d, t, num_labels=2), "it has 2 labels"),
        (lambda d, t: model_of(LlamaModel, d, t, num_labels=1), "it lacks score.weight"),
        (lambda d, t: None, "cannot be loaded"),
        (without_tokenizer, r"its tokenizer does not keep its text \('1\+1=' comes back as"),
    ],
)
def test_what_is_no_reward_model_is_named(make, said, tokenizer, device, tmp_path):
    make(tmp_path, tokenizer)
    with pytest.raises(argparse.ArgumentError, match=said):
        RewardModel(str(tmp_path), device, F32, DAY)


@pytest.fixture(scope="module")
def run(script):
    """A short run with the hf sampler, and a few sums and chats to validate with: (process, metrics)."""

    def run(tmp_path, name, *flags, code=0):
        for file in ("valid", "chat_valid"):
            lines = (ROOT / "toy" / f"{file}.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / f"{file}.jsonl").write_text("".join(lines[:16]))
        short = ["--sampler", "hf", "--out", tmp_path / "run", "--steps", "4", "--prompts-per-step", "12"]
        short += ["--data", SUMS, "--sync-steps", "2", "--eval-every", "4", "--log-samples", "-1"]
        done = script(name, *short, *flags, code=code)
        metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return done, [json.loads(line) for line in metrics]

    return run


@pytest.mark.parametrize("name", ["train_dpo.py", "train_grpo.py"])
def test_both_kinds_in_one_run(run, name, tmp_path):
    flags = ["--data", SUMS, ROOT / "toy/chat_train.jsonl", "--data-weights", 1, 1]
    flags += ["--eval-data", tmp_path / "valid.jsonl", tmp_path / "chat_valid.jsonl"]
    done, metrics = run(tmp_path, name, *flags, "--reward-model", ROOT / "toy/reward_model")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    model = RewardModel(str(ROOT / "toy" / "reward_model"), "cpu", F32, DAY)
    for step, line in enumerate(m for m in metrics if "loss" in m):
        mine = [s for s in samples if s["step"] == step]
        sums, chats = (
            [s for s in mine if s["prompt"].startswith("like") == open_] for open_ in (False, True)
        )
        assert (
            sums
            and chats
            and line["reward/exact"] == pytest.approx(statistics.fmean(s["reward"] for s in sums))
        )
        assert line["reward/rm"] == pytest.approx(statistics.fmean(s["reward"] for s in chats))
        pairs = [
            ({"role": "user", "content": s["prompt"]}, {"role": "assistant", "content": s["text"]})
            for s in chats
        ]
        assert [s["reward"] for s in chats] == pytest.approx(model([list(pair) for pair in pairs]), abs=1e-4)
    validation = [m for m in metrics if "eval/accuracy" in m]
    assert len(validation) == 2 and all(m["eval/prompts"] == 32 for m in validation)
    for m in validation:
        assert 0 <= m["eval/accuracy"] <= 1
        per_token = (
            m["eval/reward"] / m["eval/reward_per_token"]
        )  # the length of the chats' completions alone
        assert 1 <= per_token <= 8 and per_token != pytest.approx(m["eval/length"], abs=1e-3)
    assert "validation accuracy" in done.stdout.splitlines()[-1]


def test_a_run_without_anything_verifiable_reports_the_reward(run, tmp_path):
    flags = ["--data", ROOT / "toy/chat_train.jsonl", "--eval-data", tmp_path / "chat_valid.jsonl"]
    done, metrics = run(tmp_path, "train_dpo.py", *flags, "--reward-model", ROOT / "toy/reward_model")
    assert done.stdout.splitlines()[-1].startswith(
        f"validation reward {metrics[0]['eval/reward']:.3f} before"
    )


def judged(tmp_path):
    rows = [
        {"prompt": f"{i}+{i}=", "reward": "judge" if i % 2 else "exact", "answer": str(2 * i)}
        for i in range(40)
    ]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--data",
        tmp_path / "judged.jsonl",
        "--eval-data",
        tmp_path / "valid.jsonl",
        "--judge-model",
        "m",
    ]


def test_a_judge_that_dies_in_mid_run_costs_its_completions_alone(run, tmp_path):
    """It answers 60 questions, then nothing but errors: the run goes on, and no failure is scored 0."""
    pytest.importorskip("openai")
    asked = []

    def reply(text, _):
        asked.append(text)
        return (
            f"<score>{1 + len(text) % 9}</score>"
            if len(asked) <= 60
            else (400, {"error": {"message": "gone"}})
        )

    with serving(reply) as (url, _):
        _, metrics = run(tmp_path, "train_dpo.py", *judged(tmp_path), "--judge-url", url, "--max-failed", "1")
    failed = [m["rewards/failed"] for m in metrics if "loss" in m]
    assert len(failed) == 4 and sum(failed) > 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    mine = [s["reward"] for s in samples if (int(s["answer"]) // 2) % 2]
    assert mine.count(None) == sum(failed) and 0 not in mine and any(reward for reward in mine)
    assert all(s["reward"] in (0, 1) for s in samples if not (int(s["answer"]) // 2) % 2)


def test_too_many_failures_stop_the_run_with_a_line(run, tmp_path):
    pytest.importorskip("openai")
    with serving(lambda *_: "no score") as (url, _):
        flags = ["--judge-url", url, "--max-failed", "0.1"]
        done, metrics = run(tmp_path, "train_grpo.py", *judged(tmp_path), *flags, code=1)
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()
    [stopped] = [i for i, line in enumerate(said) if line.startswith("stopped: ")]
    assert said[stopped].endswith("have no reward `judge`, more than --max-failed 0.1")
    assert said[stopped + 1] == f"saved; go on with --resume auto --out {tmp_path / 'run'}"
    assert len([m for m in metrics if "loss" in m]) == 1


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    _, metrics = run(directory, "train_dpo.py", "--eval-data", directory / "valid.jsonl")
    return [m for m in metrics if "loss" in m]


ABLATIONS = ["--nll-weight 0.5", "--entropy-weight 1", "--length-normalize", "--all-pairs"]


@pytest.mark.parametrize("flags", ABLATIONS)
def test_an_ablation_changes_the_update_alone(run, flags, plain, tmp_path):
    _, metrics = run(tmp_path, "train_dpo.py", "--eval-data", tmp_path / "valid.jsonl", *flags.split())
    steps = [m for m in metrics if "loss" in m]
    assert (
        steps[0]["reward"] == plain[0]["reward"] and steps[0]["pairs"] == plain[0]["pairs"]
    )  # the same completions
    assert steps[1]["grad_norm"] != pytest.approx(plain[1]["grad_norm"], rel=1e-4)
