"""Error bars and pass@k against brute force; real evaluations: on ranks, killed and continued, of chats."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pandas
import pytest
import torch
from conftest import ROOT, TOY
from transformers import LlamaConfig, LlamaForSequenceClassification

import evaluate
import policy as policies
import rewards

COMMON = ["--temperature", "1", "--top-p", "1", "--samples", "6", "--chunk", "60", "--sampler", "hf"]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluations")
    valid = (ROOT / "toy" / "valid.jsonl").read_text().splitlines(keepends=True)
    (directory / "valid.jsonl").write_text("".join(valid[:100]))
    chats = [{"prompt": "12+3=", "uid": "a1"}, {"prompt": [{"role": "user", "content": "4+4="}], "uid": "b2"}]
    chats += [{"prompt": "1+1=", "reward": "exact", "answer": "2"}, {"prompt": "5+5=", "reward": None}]
    (directory / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return directory


@pytest.fixture
def keep_group(device, monkeypatch):
    """An evaluation in this process must not end the process group that other tests use."""
    monkeypatch.setattr(policies, "stop", lambda: None)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, right):
    answers = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        wanted = statistics.fmean(any(drawn) for drawn in itertools.combinations(answers, k))
        assert evaluate.pass_at_k(n, right, k) == pytest.approx(wanted)


def answer(problem, sample, reward, tokens=3, finish="stop"):
    kind = "exact"
    return {
        "problem": problem,
        "sample": sample,
        "reward": reward,
        "tokens": tokens,
        "finish": finish,
        "kind": kind,
    }


def test_summary_by_hand():
    rewards = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, None]]
    answers = [answer(i, k, r) for i, row in enumerate(rewards) for k, r in enumerate(row)]
    answers[0] |= {"tokens": 15, "finish": "length"}
    found = evaluate.summary(answers, [2, 4])
    assert (found["problems"], found["samples"], found["failed"]) == (3, 4, 1)
    assert found["mean"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["se_problems"] == pytest.approx(0.5 / 3**0.5)  # of 0.5, 0 and 1: sd 0.5
    drawings = [2 / 3, 2 / 3, 1 / 3, 0]
    assert found["sd_samples"] == pytest.approx(statistics.stdev(drawings))
    assert found["se_samples"] == pytest.approx(statistics.stdev(drawings) / 2)
    assert found["pass@2"] == pytest.approx((5 / 6 + 0 + 1) / 3)  # 1 - C(2,2)/C(4,2)
    assert found["pass@4"] == pytest.approx((1 + 0) / 2)  # the third has only 3 scored answers
    assert found["length"] == 4 and found["truncated"] == pytest.approx(1 / 12)


def test_one_answer_or_one_problem_leave_error_bars_open():
    found = evaluate.summary([answer(0, 0, 1.0)], [])
    assert found["mean"] == 1 and found["se_samples"] is None and found["se_problems"] is None


@pytest.fixture(scope="module")
def whole(torchrun, tmp):
    torchrun(1, "evaluate.py", "--data", tmp / "valid.jsonl", "--out", tmp / "whole", *COMMON)
    return tmp / "whole"


def test_the_files_agree_with_each_other_and_with_the_model(whole):
    answers, facts = read(whole / "completions.jsonl"), json.loads((whole / "results.json").read_text())
    assert len(answers) == 600 and [a["problem"] for a in answers] == [
        i for i in range(100) for _ in range(6)
    ]
    assert all(a["reward"] == float(a["text"].strip() == a["answer"]) for a in answers)
    [result] = facts["results"]
    assert result["mean"] == pytest.approx(statistics.fmean(a["reward"] for a in answers))
    assert abs(result["mean"] - 0.222) < 4 * result["se_problems"]  # what toy/make.py measured
    assert sorted(f.name for f in whole.iterdir()) == ["args.json", "completions.jsonl", "results.json"]


def test_ranks_do_not_change_the_answers(whole, torchrun, tmp):
    torchrun(2, "evaluate.py", "--data", tmp / "valid.jsonl", "--out", tmp / "two", *COMMON)
    assert (tmp / "two" / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()


def test_a_killed_evaluation_goes_on_to_the_same_answers(whole, tmp):
    out = tmp / "killed"
    command = [sys.executable, ROOT / "evaluate.py", "--data", tmp / "valid.jsonl", "--out", out, *COMMON]
    part = out / "completions.rank0.jsonl"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (part.exists() and part.stat().st_size) and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / "results.json").exists()
    with open(part, "a") as file:
        file.write('{"chunk": 9, "data"')  # a line that the kill cut off
    (out / "completions.jsonl").write_bytes(
        part.read_bytes()
    )  # and one between two writes: a chunk is there twice
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "answers are there already" in done.stdout
    assert (out / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    results = [json.loads((x / "results.json").read_text())["results"] for x in (out, whole)]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tokenizer):
    """A tiny classifier in the hub's format whose padding token is also the last token of every text."""
    directory = tmp_path_factory.mktemp("rm")
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.eos_token_id, **shape
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_a_reward_model_reads_the_last_token_whatever_else_is_in_the_batch(reward_model, tokenizer, device):
    model = rewards.RewardModel(
        reward_model, device, torch.float32, "2026-01-01", max_tokens=40, batch_tokens=90
    )
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in [("1+2=", "3"), ("35+7=", "42"), ("99+98=", "197000"), ("0+0=", ""), ("1+1=", "2" * 50)]
    ]
    together, alone = model(chats), [model([chat])[0] for chat in chats]
    assert together[:4] == pytest.approx(alone[:4], abs=1e-5) and together[4] is alone[4] is None
    lm = LlamaForSequenceClassification.from_pretrained(reward_model)
    for chat, reward in zip(chats[:4], together, strict=False):
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)
        hidden = lm.model(torch.tensor([ids["input_ids"]])).last_hidden_state[0, -1]
        assert reward == pytest.approx((lm.score.weight[0] @ hidden).item(), abs=1e-5)
    assert len(set(together[:4])) == 4


def test_chats_become_files_for_alpaca_eval_and_arena_hard(reward_model, tmp, keep_group):
    out = tmp / "chats"
    flags = ["--data", tmp / "chats.jsonl", "--reward-model", reward_model, "--name", "ours", "--out", out]
    evaluate.main([*map(str, flags), "--sampler", "hf", "--pass-k", "1"])
    alpaca = pandas.read_json(out / "alpaca_eval.json", dtype=False)  # AlpacaEval reads it with this function
    assert list(alpaca.columns) == ["instruction", "output", "generator"]
    assert list(alpaca["instruction"]) == ["5+5="] and set(alpaca["generator"]) == {"ours"}
    arena = {line["uid"]: line for line in read(out / "arena_hard" / "ours.jsonl")}
    answers = [line for line in read(out / "completions.jsonl") if line["kind"] == "rm"]
    texts = [line["text"] for line in answers]
    assert texts[2:] == list(alpaca["output"]) and arena.keys() == {"a1", "b2"}
    for uid, text in zip(["a1", "b2"], texts, strict=False):
        assert arena[uid]["messages"][-1] == {"role": "assistant", "content": {"answer": text}}
        assert arena[uid]["model"] == "ours"
    accuracy, result = json.loads((out / "results.json").read_text())["results"]
    assert (accuracy["measure"], accuracy["samples"]) == ("accuracy", 50) and accuracy["pass@1"] is not None
    assert (result["measure"], result["samples"]) == ("reward model", 1) and result["pass@1"] is None
    assert (
        result["mean"] == pytest.approx(statistics.fmean(a["reward"] for a in answers))
        and result["mean"] != 0
    )


def test_greedy_is_one_answer_and_always_the_same(tmp, keep_group):
    for name in ("greedy1", "greedy2"):
        seed = ["--seed", name[-1]]
        flags = ["--data", tmp / "valid.jsonl", "--greedy", "--sampler", "hf", "--out", tmp / name]
        evaluate.main([*map(str, flags), *seed])
    one, two = (
        [a["text"] for a in read(tmp / name / "completions.jsonl")] for name in ("greedy1", "greedy2")
    )
    assert len(one) == 100 and one == two


def test_a_run_directory_a_model_directory_and_a_hub_name_are_all_models(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert evaluate.find_model(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert evaluate.find_model(str(tmp_path / "run" / "model")) == str(tmp_path / "run" / "model")
    assert evaluate.find_model(str(TOY)) == str(TOY)
    assert evaluate.find_model("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"


def test_an_evaluation_is_not_mixed_with_another(whole, tmp):
    command = [sys.executable, ROOT / "evaluate.py", "--data", tmp / "valid.jsonl", "--out", whole, *COMMON]
    before = {f.name: f.stat().st_mtime_ns for f in whole.iterdir()}
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [*command, "--seed", "5"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2 and "holds an evaluation with other settings (--seed 0, now 5)" in done.stderr
    assert before == {f.name: f.stat().st_mtime_ns for f in whole.iterdir()}
