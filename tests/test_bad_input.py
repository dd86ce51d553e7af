"""A user's mistake: one line that names the value and what to do, exit code 2, nothing written."""

import datetime
import functools
import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentError

import pandas
import pytest
import torch
import xxhash
from conftest import ROOT, TOY
from safetensors.torch import load_file, save_file

import evaluate
import processes
import train_dpo
import train_grpo

pytest.importorskip("vllm")  # else its absence is the first mistake that the scripts find

GOOD = {"prompt": "1+2=", "reward": "exact", "answer": "3"}


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def without(*keys, **more):
    return {key: value for key, value in (GOOD | more).items() if key not in keys}


def completion(*ids):
    return {"ids": ids, "logps": [-1.0] * len(ids), "text": "", "finish": "stop", "version": 0, "reward": 0}


FILES = {
    "good.jsonl": lines(GOOD),
    "empty.jsonl": "",
    "broken.jsonl": lines(*[GOOD] * 16, '{"prompt": "1+2=", ', GOOD),
    "noprompt.jsonl": lines(GOOD, without("prompt", question="1+2=")),
    "noreward.jsonl": lines(without("reward")),
    "unknown.jsonl": lines(GOOD, GOOD, without(reward="numina")),
    "listreward.jsonl": lines(without(reward=["exact"])),
    "noanswer.jsonl": lines(GOOD, without("answer", reward="math")),
    "listanswer.jsonl": lines(without(answer=["3"])),
    "list.jsonl": lines([1, 2]),
    "turns.jsonl": lines(
        without(prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    ),
    "messages.jsonl": lines(without(prompt=[{"text": "a"}])),
    "blank.jsonl": lines(without(prompt="  ")),
    "latin.jsonl": b'{"prompt": "\xe9"}\n',
    "table.parquet": b"not a table",
    "rollouts.jsonl": lines(GOOD),
    "foreign.jsonl": lines({**GOOD, "ids": [1, 5], "completions": [completion(9, 3), completion(64, 3)]}),
    "long.jsonl": lines({**GOOD, "ids": [1] * 30, "completions": [completion(9, 3), completion(9, 9, 3)]}),
    # what JSON reads and nothing else can hold
    "surrogate.jsonl": lines(GOOD, '{"prompt": "1+2=\\ud800", "reward": "exact", "answer": "3"}'),
    "columnsurrogate.jsonl": lines(without(note={"by": ["\ud800"]})),
    "digits.jsonl": lines(GOOD, '{"prompt": "1", "reward": "exact", "answer": ' + "7" * 5000 + "}"),
    "deep.jsonl": lines(GOOD, '{"prompt": "1", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "nested.jsonl": lines(without(note=functools.reduce(lambda inner, _: [inner], range(300), []))),
    "array.json": json.dumps([GOOD, GOOD | {"reward": "numina"}], indent=1),
    "arraycomma.json": json.dumps([GOOD, GOOD], indent=1).replace('"3"', '"3",', 1),
    "deeparray.json": '[{"prompt": "1", "more": ' + "[" * 100_000 + "]" * 100_000 + "}]",
    "nullcontent.jsonl": lines(without(prompt=[{"role": "user", "content": None}])),
    "image.jsonl": lines(
        without(prompt=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}])
    ),
    "parts.jsonl": lines(without(prompt=[{"role": "user", "content": ["1+2="]}])),
    "three.jsonl": lines(GOOD, without(reward="gsm8k", answer="three")),
    "percent.jsonl": lines(without(reward="gsm8k", answer="50%")),
    "nan.jsonl": lines(GOOD, '{"prompt": "1+2=", "reward": "exact", "answer": NaN}'),
    "inf.jsonl": lines('{"prompt": "1+2=", "reward": "math", "answer": -Infinity}'),
    "unparsable.jsonl": lines(GOOD, without(reward="math", answer=r"\text{}")),
    "newtoken.jsonl": lines(GOOD, without(prompt="1+2=<|new|>")),
    "strange.jsonl": lines(GOOD, without(prompt="\u4e00\u4e8c")),
    "rm.jsonl": lines(without("answer", reward="rm")),
    "judge.jsonl": lines(without("answer", reward="judge")),
    "taken/metrics.jsonl": "",
    "damaged/args.json": "{",
    "listed/args.json": "[1]",
    "remote/evil.py": "open('{tmp}/executed', 'w')\n",
    "remote/config.json": json.dumps(
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    ),
    "exported/model/config.json": "{}",
    "other/args.json": "{}",
    "file": "",
}

CASES = [
    ("--resume auto", "--resume auto: goes with --out"),
    ("--resume {tmp}/nowhere", "--resume {tmp}/nowhere: no such directory"),
    ("--resume {tmp}/taken", "--resume {tmp}/taken: nothing to go on from (no checkpoint in it)"),
    ("--resume {tmp}/damaged", "{tmp}/damaged/args.json: damaged"),
    ("--resume {tmp}/old --beta 7", "would be another run with --beta 7.0 (was 3.0)"),
    ("--resume {tmp}/old --sync-steps inf --seed 4", "run with --sync-steps inf (was 1), --seed 4 (was 0)"),
    ("--resume {tmp}/old --steps 2", "--steps 2: {tmp}/old/checkpoints/step-000004 is 4 steps on already"),
    ("--resume {tmp}/old --out {tmp}/other", "--out {tmp}/other: a resumed run goes on where it is"),
    ("--resume {tmp}/old --data {tmp}/good.jsonl", "step-000004: --data or --eval-data held other rows"),
    ("--resume {tmp}/old/checkpoints/step-000005", "--resume {tmp}/old/checkpoints/step-000005: no such"),
    ("--resume {tmp}/short", "{tmp}/short/metrics.jsonl: shorter than when the checkpoint was written"),
    ("--resume {tmp}/torn", "nothing to go on from (state.json has"),
    ("--resume {tmp}/rotten/checkpoints/step-000004", "nothing to go on from (state.json is damaged"),
    ("--resume {tmp}/first", "nothing to go on from (written by an earlier version"),
    ("--out {tmp}/old", "--out {tmp}/old: already holds a run (args.json); go on with --resume auto"),
    ("--save-every -1", "--save-every: -1 is not"),
    ("--keep 0", "--keep: 0 is not"),
    ("--max-skipped 0", "--max-skipped: 0 is not"),
    ("{toy} --model {tmp}/remote", "it brings code of its own, which runs only with --trust-remote-code"),
    ("{toy} --model {tmp}/pickled --sampler hf", "--model {tmp}/pickled: cannot be loaded"),
    ("{toy} --model {tmp}/cut --sampler hf", "--model {tmp}/cut: cannot be loaded"),
    ("{toy} --model {tmp}/nowhere", "--model {tmp}/nowhere"),
    ("{toy} --model {tmp}/template", "no chat template"),
    ("--model {tmp}/cut", "--model {tmp}/cut: needs --data"),
    ("--date yesterday", "--date: yesterday is not a date like 2025-06-26"),
    ("--date 2025-02-30", "--date: 2025-02-30 is not a date"),
    (
        "{toy} --model {tmp}/handful",
        "handful: its tokenizer has 6 tokens, its matrix 64 rows: is a file missing?",
    ),
    ("{toy} --model {tmp}/handful2", "handful2: its tokenizer has 5 tokens, its matrix 64 rows: is a file"),
    ("{toy} --model {tmp}/nobackend", "--model {tmp}/nobackend: no model with a tokenizer there"),
    ("{toy} --model {tmp}/hollow", "--model {tmp}/hollow: no model with a tokenizer there"),
    ("{toy} --model {tmp}/nodigits", "train.jsonl line 1: the tokenizer makes '<|user|>?"),
    ("{toy} --model {tmp}/narrow", "its tokenizer has ids up to 63, its matrix 40 rows: they are not of one"),
    (
        "{toy} --data {tmp}/newtoken.jsonl --model {tmp}/newtoken",
        "line 2: id 64 in the prompt: the tokenizer goes up to 64, the matrix has 64 rows",
    ),
    (
        "{toy} --model {tmp}/farstop --sampler hf",
        "{tmp}/farstop: its end token 64 cannot be sampled, ids go from",
    ),
    (
        "{toy} --model {tmp}/wide --sampler hf",
        "{tmp}/wide: its files have no lm_head.weight of the shape that",
    ),
    ("{toy} --model {tmp}/headless --sampler hf", "{tmp}/headless: its files have no lm_head.weight of the"),
    ("{toy} --model {tmp}/wrongstop --sampler hf", "{tmp}/wrongstop: its end token 99 cannot be sampled"),
    ("{toy} --model {tmp}/textstop --sampler hf", "{tmp}/textstop: its end token '3' cannot be sampled"),
    ("{toy} --model {tmp}/nostop --sampler hf", "generation_config.json nor config.json names an end token"),
    ("{toy} --model {tmp}/tornstop --sampler hf", "{tmp}/tornstop: generation_config.json is damaged"),
    ("{toy} --model {tmp}/gptq --sampler hf", "{tmp}/gptq: cannot be loaded (quantized weights cannot be"),
    (
        "{toy} --model {tmp}/fp8 --sampler hf",
        "{tmp}/fp8: cannot be loaded (quantized weights cannot be trained",
    ),
    ("--temperature 0.009", "--temperature 0.009: vLLM takes 0.01 for all that is lower"),
    ("--temperature 1e-9 --sampler hf", "--temperature 1e-09: vLLM takes 0.01 for all that is lower"),
    ("--data {tmp}/three.jsonl", "line 2: reward `gsm8k` needs a number as `answer`, not 'three'"),
    ("--data {tmp}/percent.jsonl", "line 1: reward `gsm8k` needs a number as `answer`, not '50%'"),
    ("--data {tmp}/nan.jsonl", "{tmp}/nan.jsonl, line 2: `answer` is nan, which is no number"),
    ("--data {tmp}/inf.jsonl", "{tmp}/inf.jsonl, line 1: `answer` is -inf, which is no number"),
    ("--data {tmp}/unparsable.jsonl", "unparsable.jsonl line 2: Math-Verify cannot parse or compare the"),
    ("--data {tmp}/strange.jsonl", "strange.jsonl line 2: the tokenizer makes '<|user|>"),
    ("--data {tmp}/missing.jsonl", "{tmp}/missing.jsonl: no such file"),
    ("--data {tmp}/empty.jsonl", "{tmp}/empty.jsonl: no rows"),
    ("--data {tmp}/broken.jsonl", "{tmp}/broken.jsonl, line 17: not JSON"),
    ("--data {tmp}/noprompt.jsonl", "noprompt.jsonl, line 2: no `prompt` (it has: reward, answer, question)"),
    ("--data {tmp}/noreward.jsonl", "line 1: no `reward` (one of exact, gsm8k, math, rm, judge)"),
    ("--data {tmp}/unknown.jsonl", "line 3: unknown reward 'numina'"),
    ("--data {tmp}/listreward.jsonl", "line 1: unknown reward ['exact']"),
    ("--data {tmp}/noanswer.jsonl", "line 2: reward `math` needs an `answer`"),
    ("--data {tmp}/listanswer.jsonl", "line 1: reward `exact` needs an `answer`"),
    ("--data {tmp}/list.jsonl", "line 1: a row is a JSON object, not [1, 2]"),
    ("--data {tmp}/turns.jsonl", "line 1: `prompt` must end with a message of the user"),
    ("--data {tmp}/messages.jsonl", "line 1: `prompt` holds a message without role and content"),
    ("--data {tmp}/surrogate.jsonl", "{tmp}/surrogate.jsonl, line 2: 'utf-8' codec can't encode character"),
    ("--data {tmp}/columnsurrogate.jsonl", "line 1: 'utf-8' codec can't encode character '\\ud800'"),
    ("--data {tmp}/digits.jsonl", "{tmp}/digits.jsonl, line 2: not JSON (Exceeds the limit (4300 digits)"),
    ("--data {tmp}/deep.jsonl", "{tmp}/deep.jsonl, line 2: not JSON (RecursionError: maximum recursion"),
    ("--data {tmp}/nested.jsonl", "{tmp}/nested.jsonl, line 1: nested more than 100 levels deep"),
    (
        "--data {tmp}/arraycomma.json",
        "{tmp}/arraycomma.json: not one JSON array (line 6: ",
    ),
    ("--data {tmp}/deeparray.json", "{tmp}/deeparray.json: not one JSON array (RecursionError: maximum"),
    ("--data {tmp}/array.json", "{tmp}/array.json, row 1: unknown reward 'numina'"),
    (
        "--data {tmp}/times.parquet",
        "times.parquet, row 0: `prompt` must be a text or a list of messages, not",
    ),
    (
        "--data {tmp}/bytes.parquet",
        "bytes.parquet, row 0: `prompt` must be a text or a list of messages, not",
    ),
    ("--data {tmp}/nullcontent.jsonl", "line 1: `prompt` holds a message whose content is null"),
    ("--data {tmp}/image.jsonl", "a message with a part of type 'image_url', of which only 'text' can"),
    ("--data {tmp}/parts.jsonl", "a message with a part of type 'str', of which only 'text' can be read"),
    ("--data {tmp}/blank.jsonl", "line 1: `prompt` must be a text"),
    ("--data {tmp}/latin.jsonl", "latin.jsonl: not UTF-8"),
    ("--data {tmp}/table.parquet", "table.parquet: neither"),
    ("--data {tmp}/missing.parquet", "missing.parquet: no such file"),
    ("--data {tmp}/good.jsonl --eval-data {tmp}/broken.jsonl", "broken.jsonl, line 17"),
    ("--max-prompt-tokens 3", "no prompt fits --max-prompt-tokens 3"),
    ("--rollouts {tmp}/rollouts.jsonl --sync-steps inf", "rollouts.jsonl, line 1: not a saved rollout"),
    ("--rollouts {tmp}/foreign.jsonl --sync-steps inf", "foreign.jsonl, line 1: id 64 is not"),
    ("--rollouts {tmp}/long.jsonl --sync-steps inf", "long.jsonl, line 1: 33 tokens are more than"),
    ("--rollouts {tmp}/rollouts.jsonl", "--sync-steps inf"),
    ("--sync-steps 0", "--sync-steps: 0 is not a whole number above 0, nor inf"),
    ("--sync-steps -3", "--sync-steps: -3 is not a whole number above 0, nor inf"),
    ("--sync-steps ten", "--sync-steps: ten is not"),
    ("--sync-steps 1.5", "--sync-steps: 1.5 is not"),
    ("--beta 0", "--beta: 0 is not a number above 0"),
    ("--beta nan", "--beta: nan is not"),
    ("--lr 0.0", "--lr: 0.0 is not a number above 0"),
    ("--lr inf", "--lr: inf is not"),
    ("--steps 0", "--steps: 0 is not"),
    ("--samples-per-prompt 1", "--samples-per-prompt 1: a pair, or a group to compare, needs 2"),
    ("--micro-batch-tokens 63", "--micro-batch-tokens 63: a pair can have 64, 2 x (--max-prompt"),
    ("--max-new-tokens 200", "its context of 128 tokens is less than"),
    ("--gpu-memory 1.2", "--gpu-memory 1.2"),
    ("--data {tmp}/good.jsonl --data-weights 1 2", "--data-weights: 2 weights for 1 sources"),
    ("--data-weights 0", "--data-weights: 0 is not a number above 0"),
    ("--data-weights -1", "--data-weights: -1 is not a number above 0"),
    ("--data {tmp}/rm.jsonl", "rows with reward rm need --reward-model"),
    ("--data {tmp}/judge.jsonl", "rows with reward judge need --judge-url and --judge-model"),
    ("--data {tmp}/judge.jsonl --judge-url http://127.0.0.1:9/v1", "need --judge-url and --judge-model"),
    (
        "--data {tmp}/judge.jsonl --judge-model m --judge-url localhost",
        "--judge-url localhost: not an address",
    ),
    ("--data {tmp}/rm.jsonl --reward-model {tmp}/labels", "{tmp}/labels: it has 2 labels"),
    ("--data {tmp}/rm.jsonl --reward-model {tmp}/nowhere", "{tmp}/nowhere: cannot be loaded"),
    ("--judge-url http://127.0.0.1:9/v1 --judge-model m", "http://127.0.0.1:9/v1: no row has reward judge"),
    (
        "--data {tmp}/judge.jsonl --judge-model m --judge-url http://a:port/v1",
        "--judge-url http://a:port/v1:",
    ),
    ("--data {tmp}/rm.jsonl --reward-model {tmp}/cutrm", "--reward-model {tmp}/cutrm: cannot be loaded"),
    ("--shard-ranks 3", "--shard-ranks 3: does not divide the 1 rank(s)"),
    ("--shard-ranks 0", "--shard-ranks: 0 is not a whole number above 0"),
    ("--max-failed -1", "--max-failed: -1 is not a number from 0 on"),
    ("--judge-votes 0", "--judge-votes: 0 is not"),
    ("--nll-weight -1", "--nll-weight: -1 is not"),
    ("--all-pairs --micro-batch-tokens 255", "--micro-batch-tokens 255: a group can have 256"),
    ("--sampler sglang", "invalid choice: 'sglang'"),
    ("--sync-step 3", "unrecognized arguments: --sync-step 3"),
    ("--out {tmp}/taken", "--out {tmp}/taken: already holds a run"),
    ("--out {tmp}/exported", "--out {tmp}/exported: already holds a run (model)"),
    ("--out {tmp}/file", "--out {tmp}/file: a file"),
    ("--out {tmp}/file/deeper", "cannot be written"),
    ("--out /proc/none/run", "/proc/none/run: cannot be written"),
    ("--save-rollouts {tmp}/good.jsonl", "--save-rollouts {tmp}/good.jsonl: exists already"),
]

GRPO_CASES = [
    ("--data {tmp}/broken.jsonl", "{tmp}/broken.jsonl, line 17: not JSON"),
    ("--sync-steps 0", "--sync-steps: 0 is not a whole number above 0, nor inf"),
    ("--samples-per-prompt 1", "--samples-per-prompt 1: a pair, or a group to compare, needs 2"),
    ("--micro-batch-tokens 31", "--micro-batch-tokens 31: a completion can have 32"),
    ("--beta -1", "--beta: -1 is not a number from 0 on"),
    ("--loss-norm mean", "invalid choice: 'mean'"),
    ("--temperature 0.005", "--temperature 0.005: vLLM takes 0.01 for all that is lower"),
    ("--clip-low 1", "--clip-low 1: ratios are above 0"),
    ("--clip-high 0", "--clip-high: 0 is not a number above 0"),
    ("--is-cap 1.1", "--is-cap 1.1: must not be below 1 + --clip-high = 1.2"),
    ("--out {tmp}/taken", "--out {tmp}/taken: already holds a run"),
]
EVALUATE_CASES = [
    ("--temperature 0.001", "--temperature 0.001: vLLM takes 0.01 for all that is lower; take that or more"),
    ("{toy} --model {tmp}/nowhere", "--model {tmp}/nowhere"),
    ("{toy} --model {tmp}/taken", "--model {tmp}/taken: no config.json in it or in its model/"),
    ("--model {tmp}/cut", "--model {tmp}/cut: needs --data"),
    ("{toy} --model {tmp}/damaged", "{tmp}/damaged/args.json: damaged"),
    ("{toy} --model {tmp}/listed", "--model {tmp}/listed: no config.json in it"),
    ("--out {tmp}/damaged", "{tmp}/damaged/args.json: damaged"),
    ("--data {tmp}/three.jsonl", "line 2: reward `gsm8k` needs a number as `answer`, not 'three'"),
    ("--data {tmp}/missing.jsonl", "{tmp}/missing.jsonl: no such file"),
    ("--data {tmp}/unknown.jsonl", "line 3: unknown reward 'numina'"),
    ("--samples 0", "--samples: 0 is not"),
    ("--top-p 1.5", "--top-p 1.5: a share"),
    ("--temperature 0", "--temperature: 0 is not a number above 0"),
    ("--greedy --samples 3", "--samples 3: --greedy gives the same completion every time"),
    ("--pass-k 8 --samples 4", "--pass-k 8: needs as many completions of a prompt; there are 4"),
    ("--pass-k 0", "--pass-k: 0 is not"),
    ("--max-new-tokens 200", "its context of 128 tokens is less than"),
    ("--reward-model {tmp}/labels", "--reward-model {tmp}/labels: no row has reward rm"),
    ("--data {tmp}/noreward.jsonl --reward-model {tmp}/nowhere", "{tmp}/nowhere: cannot be loaded"),
    ("--data {tmp}/noreward.jsonl --reward-model {tmp}/labels", "{tmp}/labels: it has 2 labels"),
    ("--out {tmp}/file/deeper", "{tmp}/file/deeper: cannot be written"),
    ("--out {tmp}/file", "--out {tmp}/file: a file, not a directory"),
    ("--out {tmp}/other", "--out {tmp}/other: holds something else"),
    ("--name org/model", "--name org/model: becomes a file's name"),
]
# for a model that is named: the defaults are then not the toy's
WITH_THE_TOYS_DATA = f"--data {TOY.parent / 'train.jsonl'} --max-prompt-tokens 24 --max-new-tokens 8"
ALL = [
    pytest.param(script, *case, id=f"{script.__name__} {case[0]}")
    for script, cases in ((train_dpo, CASES), (train_grpo, GRPO_CASES), (evaluate, EVALUATE_CASES))
    for case in cases
]


def make_runs(directory, monkeypatch):
    """Runs with one checkpoint, of which the first can be gone on from."""
    monkeypatch.chdir(directory)  # the toy's path is relative
    args = vars(train_dpo.get_args([]))
    facts = {"args": json.loads(json.dumps(args, default=str)), "ranks": 1}
    for name, size in (("old", 0), ("short", 99), ("torn", 0), ("rotten", 0), ("first", 0)):
        checkpoint = directory / name / "checkpoints" / "step-000004"
        checkpoint.mkdir(parents=True)
        (directory / name / "args.json").write_text(json.dumps(facts))
        window = {"start": 0, "ends": [300], "key": 0}
        state = {"step": 4, "logs": {"metrics": size}, "facts": facts, "fingerprint": 1, "window": window}
        manifest = {}
        other = "window.jsonl" if name == "first" else ".metadata"
        for file, content in (("state.json", json.dumps(state)), (other, "")):
            (checkpoint / file).write_text(content)
            manifest[file] = [len(content), xxhash.xxh3_64_hexdigest(content.encode())]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    state = (directory / "torn/checkpoints/step-000004/state.json", "rb+")
    os.truncate(state[0], 50)
    rotten = directory / "rotten/checkpoints/step-000004/state.json"
    rotten.write_text(rotten.read_text().replace("4", "5"))


def make_models(directory):
    """Copies of the toy with a tokenizer that does not fit, or with end tokens that do not."""

    def copy(name, **files):
        """files: the JSON file's name without its end -> what to change in it, or None to leave it out."""
        shutil.copytree(TOY, directory / name)
        for file, change in files.items():
            path = directory / name / f"{file}.json"
            content = json.loads(path.read_text())
            path.unlink()
            if change is not None:
                path.write_text(json.dumps(content | change))

    copy("handful", tokenizer=None, tokenizer_config={"tokenizer_class": "LlamaTokenizerFast"})
    copy("handful2", tokenizer=None, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    copy("nobackend", tokenizer=None)
    copy("hollow")
    (directory / "hollow/tokenizer.json").write_text("{}")
    tokens = json.loads((TOY / "tokenizer.json").read_text())
    kept = {token: i for token, i in tokens["model"]["vocab"].items() if not token.isdigit()}
    copy("nodigits", tokenizer={"model": tokens["model"] | {"vocab": kept}})
    copy("narrow", config={"vocab_size": 40})
    copy("wide", config={"vocab_size": 80})
    copy("headless")
    tensors = load_file(TOY / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "headless/model.safetensors", {"format": "pt"})
    added = tokens["added_tokens"] + [tokens["added_tokens"][-1] | {"id": 64, "content": "<|new|>"}]
    copy("newtoken", tokenizer={"added_tokens": added})
    copy("farstop", tokenizer={"added_tokens": added}, tokenizer_config={"eos_token": "<|new|>"})
    copy("wrongstop", generation_config={"eos_token_id": [3, 99]})
    copy(
        "nostop", generation_config=None, config={"eos_token_id": None}, tokenizer_config={"eos_token": None}
    )
    copy("textstop", generation_config={"eos_token_id": ["3"]})
    copy("gptq", config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    copy("fp8", config={"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}})
    copy("tornstop")
    (directory / "tornstop/generation_config.json").write_text('{"eos_token_id"')


@pytest.fixture(scope="module")
def tmp(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        content = content.replace("{tmp}", str(directory)) if isinstance(content, str) else content
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    when = datetime.datetime(2026, 1, 1)
    for name, prompt in (("times", when), ("bytes", b"1+2=")):
        pandas.DataFrame([GOOD | {"prompt": prompt}]).to_parquet(directory / f"{name}.parquet")
    for name in ("pickled", "cut"):
        (directory / name).mkdir()
        for file in TOY.iterdir():
            if file.suffix != ".safetensors":
                (directory / name / file.name).write_bytes(file.read_bytes())
    evil = f"c__builtin__\nopen\n(V{directory}/executed\nVw\ntR."  # unpickling it would make a file
    (directory / "pickled" / "pytorch_model.bin").write_bytes(evil.encode())
    (directory / "cut" / "model.safetensors").write_bytes((TOY / "model.safetensors").read_bytes()[:9999])
    (directory / "cutrm").mkdir()
    for file in (TOY.parent / "reward_model").iterdir():
        (directory / "cutrm" / file.name).write_bytes(
            file.read_bytes()[: 9999 if "safe" in file.name else None]
        )
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_runs(directory, monkeypatch)
    make_models(directory)
    (directory / "template").mkdir()
    for file in TOY.iterdir():
        if "template" not in file.name:
            (directory / "template" / file.name).write_bytes(file.read_bytes())
    (directory / "labels").mkdir()
    for file in TOY.iterdir():
        (directory / "labels" / file.name).write_bytes(file.read_bytes())
    config = json.loads((TOY / "config.json").read_text()) | {"num_labels": 2}
    (directory / "labels" / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("script", "flags", "said"), ALL)
def test_bad_input(script, flags, said, tmp, device, capsys, monkeypatch):
    argv = flags.format(tmp=tmp, toy=WITH_THE_TOYS_DATA).split()
    monkeypatch.chdir(tmp)
    before = sorted(tmp.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        processes.launch(lambda: script.main(argv))
    error = capsys.readouterr().err.strip()
    error = error[error.rfind("\r") + 1 :]  # after the progress bars
    error = error.removeprefix(error[: error.find("\n") + 1] if error.startswith("Loading weights") else "")
    if "--resume" in flags:  # what it goes on from, or why not, has a line before
        error = error.splitlines()[-1]
    assert stopped.value.code == 2
    assert said.format(tmp=tmp) in error and error.count("\n") == 0 and ": error: " in error
    assert sorted(tmp.rglob("*")) == before


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK is '0': "),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is '0': "),
    ],
)
def test_ranks_without_torchrun(script, tmp, monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = script("train_grpo.py", "--sampler", "hf", cwd=tmp, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"train_grpo.py: error: {said}") and "torchrun" in done.stderr


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ArgumentError, match=r"rank 4 .* has 4 GPU.*--nproc-per-node"):
        processes.start()


def test_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(
        ArgumentError, match=r"Tesla V100 has no bfloat16, .* take a newer GPU \(A100 or later\)"
    ):
        processes.start()


def test_as_a_command_it_is_one_line_and_exit_code_2(tmp):
    command = [sys.executable, str(ROOT / "train_dpo.py"), "--data", str(tmp / "broken.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"train_dpo.py: error: {tmp}/broken.jsonl, line 17: not JSON (Expecting property name "
        + ("enclosed in double quotes)\n")
    )


def test_a_mistake_that_another_rank_alone_finds_is_said(script, tmp_path):
    """Such as a second GPU that has too little memory."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import argparse, os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport processes, train_dpo\n"
        "load_rows = train_dpo.load_rows\n"
        "def mistaken(*args, **more):\n    if os.environ['RANK'] == '1':\n"
        "        raise argparse.ArgumentError(None, '--model large: too large for rank 1')\n"
        "    return load_rows(*args, **more)\n"
        "train_dpo.load_rows = mistaken\nprocesses.launch(train_dpo.main)\n"
    )
    done = script(program, "--sampler", "hf", "--out", tmp_path / "run", ranks=2, code=2)
    assert done.stderr.count("program.py: error: --model large: too large for rank 1\n") == 1
    assert "Traceback" not in done.stderr
