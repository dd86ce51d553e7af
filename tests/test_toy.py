"""The embedded default: what make.py makes, and that it makes the same every time."""

import json
import random
import statistics
import subprocess
import sys

import make
import torch
from conftest import ROOT, TOY
from transformers import AutoModelForCausalLM

from reward_models import RewardModel


def rows(name):
    return [json.loads(line) for line in (ROOT / "toy" / name).read_text().splitlines()]


def test_prompts_are_all_sums_once_and_disjoint():
    train, valid = ({row["prompt"] for row in rows(name)} for name in ("train.jsonl", "valid.jsonl"))
    assert not train & valid and len(train | valid) == 10_000 and len(valid) == 512
    for row in rows("valid.jsonl"):
        a, b = row["prompt"].rstrip("=").split("+")
        assert row["answer"] == str(int(a) + int(b)) and row["reward"] == "exact"


def test_the_model_is_small_and_half_knows_how_to_add(tokenizer):
    assert sum(file.stat().st_size for file in TOY.iterdir()) < 3e6
    model = AutoModelForCausalLM.from_pretrained(TOY)
    valid = [tuple(map(int, row["prompt"][:-1].split("+"))) for row in rows("valid.jsonl")]
    assert 0.18 < make.probability_right(model, tokenizer, valid) < 0.30


def test_the_tokenizer_is_one_token_a_character_and_reversible(tokenizer):
    text = make.CHARACTERS
    ids = tokenizer.encode(text)
    assert len(tokenizer) == 64 and len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("<|user|>1<|end|>"), skip_special_tokens=True) == "1"


def test_the_open_ended_prompts_are_disjoint_and_the_reward_model_knows_what_is_liked(device):
    train, valid = ([row["prompt"] for row in rows(f"chat_{name}.jsonl")] for name in ("train", "valid"))
    assert (len(set(train)), len(set(valid))) == make.CHATS and not set(train) & set(valid)
    model = RewardModel(str(ROOT / "toy" / "reward_model"), device, torch.float32, "2026-01-01")
    random_ = random.Random(1)
    answers = [(prompt, make._answer(random_, prompt)) for prompt in valid]
    scores = model(
        [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in answers]
    )
    liked = [make.liking(prompt, answer) for prompt, answer in answers]
    assert statistics.correlation(scores, liked) > 0.95


def test_make_twice_makes_the_same(tmp_path):
    for name in "ab":
        command = [
            sys.executable,
            str(ROOT / "toy" / "make.py"),
            "--steps",
            "3",
            "--out",
            str(tmp_path / name),
        ]
        subprocess.run(command, check=True, capture_output=True)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    same = ["train.jsonl", "valid.jsonl", "chat_train.jsonl", "chat_valid.jsonl"]
    for model in ("model", "reward_model"):
        same += [f"{model}/tokenizer.json", f"{model}/chat_template.jinja"]
    for name in same:
        assert (tmp_path / "a" / name).read_bytes() == (ROOT / "toy" / name).read_bytes()
