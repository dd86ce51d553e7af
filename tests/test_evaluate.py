"""Error bars and pass@k against brute force; real evaluations: on ranks, killed and continued, of chats."""

import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from argparse import ArgumentError

import pandas
import pytest
import torch
from conftest import ROOT, TOY
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, TopPLogitsWarper

import data
import evaluate
import processes
from data import Completion
from reward_models import RewardModel

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
    monkeypatch.setattr(processes, "stop", lambda: None)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion(n, right):
    drawings = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        wanted = statistics.fmean(any(drawn) for drawn in itertools.combinations(drawings, k))
        assert evaluate.pass_at_k(n, right, k) == pytest.approx(wanted)


def group(*rewards, reward="exact"):
    completions = [Completion([1, 2, 3], [-1.0] * 3, "", "stop", 0, r) for r in rewards]
    return data.Row("1+2=", [1], reward, "3"), completions


def test_summary_by_hand():
    groups = [group(1, 1, 0, 0), group(0, 0, 0, 0), group(1, 1, 1, None)]
    groups[0][1][0].ids, groups[0][1][0].finish = [1] * 15, "length"
    found = evaluate.summary(groups, [2, 4])
    assert (found["problems"], found["samples"], found["failed"]) == (3, 4, 1)
    assert found["mean"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["se_problems"] == pytest.approx(0.5 / 3**0.5)  # of 0.5, 0 and 1: sd 0.5
    drawings = [2 / 3, 2 / 3, 1 / 3, 0]
    assert found["sd_samples"] == pytest.approx(statistics.stdev(drawings))
    assert found["se_samples"] == pytest.approx(statistics.stdev(drawings) / 2)
    assert found["pass@2"] == pytest.approx((5 / 6 + 0 + 1) / 3)  # 1 - C(2,2)/C(4,2)
    assert found["pass@4"] == pytest.approx((1 + 0) / 2)  # the third has only 3 scored completions
    assert found["length"] == 4 and found["truncated"] == pytest.approx(1 / 12)


def test_one_completion_or_one_prompt_leave_error_bars_open():
    found = evaluate.summary([group(1.0)], [])
    assert found["mean"] == 1 and found["se_samples"] is None and found["se_problems"] is None


def test_completions_that_nothing_scores_leave_the_mean_open_and_are_no_failures():
    found = evaluate.summary([group(None, None, reward=None)] * 2, [1])
    assert found["mean"] is None and found["pass@1"] is None and found["failed"] == 0
    assert (found["problems"], found["samples"], found["length"]) == (2, 2, 3)
    assert evaluate.summary([group(None, None)], [])["failed"] == 2


@pytest.fixture(scope="module")
def whole(script, tmp):
    script("evaluate.py", "--data", tmp / "valid.jsonl", "--out", tmp / "whole", *COMMON, ranks=1)
    return tmp / "whole"


def test_the_files_agree_with_each_other_and_with_the_model(whole):
    lines, facts = read(whole / "completions.jsonl"), json.loads((whole / "results.json").read_text())
    assert [line["problem"] for line in lines] == [*range(100)]
    assert {len(line["completions"]) for line in lines} == {6}
    answers = [(line["answer"], c) for line in lines for c in line["completions"]]
    assert all(c["reward"] == float(c["text"].strip() == answer) for answer, c in answers)
    [result] = facts["results"]
    assert result["mean"] == pytest.approx(statistics.fmean(c["reward"] for _, c in answers))
    assert result["length"] == pytest.approx(statistics.fmean(len(c["ids"]) for _, c in answers))
    assert abs(result["mean"] - 0.222) < 4 * result["se_problems"]  # what toy/make.py measured
    assert sorted(f.name for f in whole.iterdir()) == ["args.json", "completions.jsonl", "results.json"]


def test_ranks_do_not_change_the_completions(whole, script, tmp):
    script("evaluate.py", "--data", tmp / "valid.jsonl", "--out", tmp / "two", *COMMON, ranks=2)
    assert (tmp / "two" / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()


def test_a_killed_evaluation_goes_on_to_the_same_completions(whole, tmp):
    out = tmp / "killed"
    command = [sys.executable, ROOT / "evaluate.py", "--data", tmp / "valid.jsonl", "--out", out, *COMMON]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not [*out.glob("completions/*.jsonl")] and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / "results.json").exists()
    assert not (out / "completions.jsonl").exists()
    (out / "completions" / "9.jsonl").unlink(missing_ok=True)
    (out / "completions" / "9.jsonl.partial").write_text('{"chunk": 9, "data"')  # what the kill cut off
    [part, *_] = out.glob("completions/*.jsonl")  # and another kill, at the end: a chunk is there twice
    (out / "completions.jsonl").write_bytes(part.read_bytes())
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "completions are there already" in done.stdout
    assert (out / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert sorted(f.name for f in out.iterdir()) == ["args.json", "completions.jsonl", "results.json"]
    results = [json.loads((x / "results.json").read_text())["results"] for x in (out, whole)]
    assert results[0] == results[1]


def test_a_chunk_with_a_completion_that_was_not_scored_is_done_again(whole, tmp, keep_group, capsys):
    out, wanted = tmp / "again", (whole / "completions.jsonl").read_bytes()
    shutil.copytree(whole, out)
    lines = read(out / "completions.jsonl")
    for completion in lines[15]["completions"]:  # 10 problems a chunk
        completion |= {"text": "lost"}
    lines[15]["completions"][2]["reward"] = None
    (out / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(["--data", str(tmp / "valid.jsonl"), "--out", str(out), *COMMON])
    assert "540 of 600 completions are there already" in capsys.readouterr().out
    assert (out / "completions.jsonl").read_bytes() == wanted


def test_completions_in_another_form_are_refused_and_kept(whole, tmp, keep_group):
    out = tmp / "other"
    shutil.copytree(whole, out)
    (out / "completions.jsonl").write_text('{"chunk": 0, "problem": 0, "sample": 0, "text": "3"}\n')
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(ArgumentError, match=r"completions.jsonl, line 1: not a saved rollout"):
        evaluate.main(["--data", str(tmp / "valid.jsonl"), "--out", str(out), *COMMON])
    assert before == {f.name: f.read_bytes() for f in out.iterdir()}


def test_an_evaluation_is_an_offline_set(tmp, tokenizer, keep_group):
    """Groups with the ids, log-probs and rewards that the plain model and plain arithmetic give."""
    out = tmp / "set"
    flags = ["--data", tmp / "valid.jsonl", tmp / "chats.jsonl", "--samples", "4", "--chunk", "90"]
    flags += ["--temperature", "0.7", "--top-p", "1", "--sampler", "hf", "--out", out]
    evaluate.main([*map(str, flags)])
    groups = data.load_rollouts([out], tokenizer, 64, 32)
    valid = read(tmp / "valid.jsonl") + [{"prompt": "1+1=", "answer": "2"}]  # nothing scores the other chats
    assert [row.prompt for row, _ in groups] == [line["prompt"] for line in valid]
    lm = AutoModelForCausalLM.from_pretrained(TOY)
    for (row, completions), line in zip(groups, valid, strict=True):
        assert tokenizer.decode(row.ids) == f"<|user|>{line['prompt']}<|assistant|>"
        assert (row.answer, row.reward, len(completions)) == (line["answer"], "exact", 4)
        for c in completions:
            assert c.reward == float(tokenizer.decode(c.ids).removesuffix("<|end|>") == line["answer"])
            assert (c.ids[-1] == tokenizer.eos_token_id) == (c.finish == "stop") and c.version == 0
    for row, completions in groups[:100:9]:
        for c in completions:
            logits = lm(torch.tensor([row.ids + c.ids])).logits[0, len(row.ids) - 1 : -1] / 0.7
            logps = logits.log_softmax(-1)[range(len(c.ids)), c.ids]
            assert c.logps == pytest.approx(logps.tolist(), abs=1e-4)
    mean = statistics.fmean(c.reward for _, completions in groups for c in completions)
    assert 0.2 < mean < 0.5 and len({c.text for _, completions in groups for c in completions}) > 50


def test_by_default_it_draws_as_the_paper_does(tmp, keep_group):
    """50 completions of each prompt at temperature 0.6, from the likeliest tokens that make up 0.9."""
    (tmp / "few.jsonl").write_text("".join((tmp / "valid.jsonl").read_text().splitlines(keepends=True)[:2]))
    evaluate.main(["--data", str(tmp / "few.jsonl"), "--sampler", "hf", "--out", str(tmp / "few")])
    lm = AutoModelForCausalLM.from_pretrained(TOY)
    for line in read(tmp / "few" / "completions.jsonl"):
        assert len(line["completions"]) == 50
        for c in {tuple(c["ids"]): c for c in line["completions"]}.values():
            logits = lm(torch.tensor([line["ids"] + c["ids"]])).logits[0, len(line["ids"]) - 1 : -1]
            logps = TopPLogitsWarper(0.9)(None, logits / 0.6).log_softmax(-1)
            assert c["logps"] == pytest.approx(logps[range(len(c["ids"])), c["ids"]].tolist(), abs=1e-4)


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
    model = RewardModel(reward_model, device, torch.float32, "2026-01-01", max_tokens=40, batch_tokens=90)
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
    answers = [line["completions"] for line in read(out / "completions.jsonl") if line["reward"] == "rm"]
    answers = [completion for [completion] in answers]
    texts = [completion["text"] for completion in answers]
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


def test_greedy_is_one_completion_and_always_the_same(tmp, keep_group):
    for name in ("greedy1", "greedy2"):
        seed = ["--seed", name[-1]]
        flags = ["--data", tmp / "valid.jsonl", "--greedy", "--sampler", "hf", "--out", tmp / name]
        evaluate.main([*map(str, flags), *seed])
    one, two = (
        [line["completions"] for line in read(tmp / name / "completions.jsonl")]
        for name in ("greedy1", "greedy2")
    )
    assert [len(completions) for completions in one] == [1] * 100 and one == two


def test_a_run_directory_a_model_directory_and_a_hub_name_are_all_models(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert evaluate.find_model(str(tmp_path / "run")) == str(tmp_path / "run" / "model")
    assert evaluate.find_model(str(tmp_path / "run" / "model")) == str(tmp_path / "run" / "model")
    assert evaluate.find_model(str(TOY)) == str(TOY)
    assert evaluate.find_model("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"


def test_an_evaluation_is_not_mixed_with_another(whole, script, tmp, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    before = {f.name: f.stat().st_mtime_ns for f in whole.iterdir()}
    flags = ["--data", tmp / "valid.jsonl", "--out", whole, *COMMON, "--seed", "5"]
    done = script("evaluate.py", *flags, code=2)
    assert "holds an evaluation with other settings (--seed 0, now 5)" in done.stderr
    assert before == {f.name: f.stat().st_mtime_ns for f in whole.iterdir()}
