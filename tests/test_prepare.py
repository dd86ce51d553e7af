"""The hub's datasets to rows: filters, splits and manifest, on small files with the real columns."""

import argparse
import hashlib
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "paper"))
import prepare

FRAME = (
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {}\n"
    "Your response should end with 'The final answer is $\\boxed{{[answer]}}$. I hope it is correct.' "
    "where [answer] is the response to the problem."
)


def numina(problem, answer, solution, kind="math-word-problem", source="olympiads", **more):
    return {
        "problem": problem, "solution": solution, "answer": answer, "problem_type": "Algebra",
        "question_type": kind, "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": source,
        "synthetic": False, **more,
    }  # fmt: skip


def chat(text, language="English", toxic=False, **more):
    first = {"role": "user", "content": text, "language": language, "toxic": toxic, "redacted": False}
    conversation = [first, {"role": "assistant", "content": "ok"}]
    return {
        "conversation_hash": "x", "model": "gpt-4", "conversation": conversation, "turn": 1,
        "language": language, "toxic": toxic, "redacted": False, **more,
    }  # fmt: skip


def prepared(tmp_path, name, rows, **splits):
    source = tmp_path / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepare.prepare(
        name, str(source), None, tmp_path / "out", splits or prepare.DATASETS[name].splits, 0
    )
    found = {}
    for file, facts in manifest["files"].items():
        content = (tmp_path / "out" / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == facts["sha256"]
        found[file.removesuffix(".jsonl")] = [json.loads(line) for line in content.decode().splitlines()]
        assert len(found[file.removesuffix(".jsonl")]) == facts["rows"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    return manifest, found


def test_numinamath(tmp_path):
    good = [numina(f"What is {i}+1?", str(i + 1), rf"It is $\boxed{{{i + 1}}}$.") for i in range(10)]
    bad = [
        numina("Prove that 1=1.", "proof", "Clear.", kind="proof"),
        numina("Which? (A) 1 (B) 2", "B", r"$\boxed{B}$", kind="MCQ"),
        numina("How many?", "3", r"$\boxed{3}$", source="orca_math"),
        numina("How much?", "3", r"$\boxed{3}$", source="synthetic_math"),
        numina("Why?", "notfound", "Because."),
        numina("Who?", None, "No box here."),
        numina(" what is 0+1? ", "1", r"$\boxed{1}$"),
        numina("What is 50+1?", "51", r"Some other number: $\boxed{52}$."),
        numina("What is it?", r"\text{}", r"$\boxed{}$"),
    ]
    manifest, found = prepared(tmp_path, "numinamath", good + bad, valid=2, test=3, train=None)
    assert manifest["dropped"] == {
        "proof": 1, "multiple choice": 1, "synthetic": 2, "no answer": 2, "duplicate": 1,
        "Math-Verify does not find the answer in the solution": 2,
    }  # fmt: skip
    assert (manifest["read"], manifest["left"]) == (19, 10)
    assert [len(found[split]) for split in ("valid", "test", "train")] == [2, 3, 5]
    rows = sum(found.values(), [])
    assert sorted(row["answer"] for row in rows) == sorted(str(i + 1) for i in range(10))
    assert {row["reward"] for row in rows} == {"math"} and not any("solution" in row for row in rows)
    assert all(row["prompt"] == FRAME.format(f"What is {int(row['answer']) - 1}+1?") for row in rows)


@pytest.mark.parametrize(
    ("problem", "solution", "verdict"),
    [
        ("Prove that $n$ is even.", "Clear.", "proof"),
        ("Let $n$ be odd. Show that $n^2$ is odd.", "Clear.", "proof"),
        ("Which is it?\nA. 1\nB. 2\nC. 3", r"$\boxed{A}$", "multiple choice"),
        (r"Which? $\textbf{(A)}\ 1 \qquad \textbf{(B)}\ 2$", r"$\boxed{A}$", "multiple choice"),
        ("Find x.", "x is 3.", "no answer"),
        ("Find x.", r"First $\boxed{1}$, no: $\boxed{\frac{1}{2^{3}}}$.", r"\frac{1}{2^{3}}"),
        ("A circle and a Box. Find the area.", r"$\boxed{\pi}$", r"\pi"),
    ],
)
def test_numinamath_cot_has_neither_kinds_nor_answers(problem, solution, verdict):
    found = prepare.numinamath({"source": "cn_k12", "problem": problem, "solution": solution, "messages": []})
    assert (found if isinstance(found, str) else found["answer"]) == verdict


def test_wildchat(tmp_path):
    good = [chat(f"Tell me about {i}") for i in range(6)]
    bad = [chat("Bonjour", language="French"), chat("bad", toxic=True), chat("  "), chat("tell  me about 1")]
    bad[1]["toxic"] = False  # flagged on the message alone
    bad.append(chat("a later message is") | {"toxic": True})
    manifest, found = prepared(tmp_path, "wildchat", good + bad, valid=2, train=4)
    assert manifest["dropped"] == {"not English": 1, "toxic": 2, "empty": 1, "duplicate": 1}
    rows = found["train"] + found["valid"]
    assert sorted(row["prompt"] for row in rows) == [f"Tell me about {i}" for i in range(6)]
    assert {row["reward"] for row in rows} == {"rm"} and len(found["train"]) == 4


@pytest.mark.parametrize(
    ("name", "raw", "problem", "answer"),
    [
        ("math500", {"problem": "P", "solution": "S", "answer": r"\frac12", "level": 1}, "P", r"\frac12"),
        ("amc23", {"id": 0, "question": "P", "answer": 27.0}, "P", "27"),
        ("gsm8k", {"question": "P", "answer": "2+2=4\n#### 1,234"}, "P", "1234"),
    ],
)
def test_evaluation_sets(tmp_path, name, raw, problem, answer):
    _, found = prepared(tmp_path, name, [raw])
    assert found == {"test": [{"prompt": FRAME.format(problem), "reward": "math", "answer": answer}]}


def test_alpaca_evals_file_is_one_array(tmp_path):
    """Written over several lines, as the hub has it; nothing scores these rows."""
    raw = [{"instruction": f"Say {i}.", "output": "", "dataset": "helpful_base"} for i in range(3)]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(raw, indent=2))
    source = str(tmp_path / "alpaca_eval.json")
    prepare.prepare("alpaca_eval", source, None, tmp_path / "out", {"test": None}, 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == ["Say 0.", "Say 1.", "Say 2."]
    assert {tuple(row) for row in rows} == {("prompt",)}


def test_the_order_depends_on_the_seed_alone(tmp_path):
    rows = [chat(f"Tell me about {i}") for i in range(50)]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"train": 20}
    made = [
        prepare.prepare("wildchat", str(tmp_path / "w.jsonl"), None, tmp_path / str(k), splits, seed)
        for k, seed in enumerate([0, 0, 1])
    ]
    hashes = [manifest["files"]["train.jsonl"]["sha256"] for manifest in made]
    assert hashes[0] == hashes[1] != hashes[2]


def test_missing_columns_and_too_few_rows_are_named(tmp_path):
    with pytest.raises(
        argparse.ArgumentError, match=r"wildchat.jsonl, line 1: no column 'toxic' \(it has: co"
    ):
        prepared(tmp_path, "wildchat", [{"conversation": [], "language": "English"}])
    with pytest.raises(argparse.ArgumentError, match=r"wildchat.jsonl: 2 rows are left for train, wanted 3"):
        prepared(tmp_path, "wildchat", [chat("a"), chat("b")], train=3)
    assert not (tmp_path / "out" / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("wildchat --source {tmp}/columns.jsonl", "{tmp}/columns.jsonl, line 1: no column 'conversation'"),
        ("wildchat --source {tmp}/missing.jsonl", "{tmp}/missing.jsonl: no such file"),
        ("wildchat --train -5", "--train -5: wildchat has the splits valid, train, of 1 row or more"),
        ("wildchat --test 5", "--test 5: wildchat has the splits valid, train"),
        ("imagenet", "invalid choice: 'imagenet'"),
        ("gsm8k --source {tmp}/number.jsonl", "{tmp}/number.jsonl, line 1: not an object"),
        ("gsm8k --source {tmp}/null.jsonl", "{tmp}/null.jsonl, line 1: not as expected: {{"),
        (
            "gsm8k --source {tmp}/null.jsonl --out {tmp}/null.jsonl",
            "{tmp}/null.jsonl/manifest.json: cannot be written (not a directory)",
        ),
        ("amc23 --out {tmp}/done", "{tmp}/done: holds rows already"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, flags, said, tmp_path):
    (tmp_path / "columns.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "number.jsonl").write_text("5\n")
    (tmp_path / "null.jsonl").write_text('{"question": "P", "answer": null}\n')
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "manifest.json").write_text("{}")
    done = script("paper/prepare.py", *flags.format(tmp=tmp_path).split(), cwd=tmp_path, code=2)
    error = done.stderr[done.stderr.rfind("\r") + 1 :].strip()
    assert "Traceback" not in done.stderr
    assert error.splitlines()[-1].startswith("prepare.py: error: ") and said.format(tmp=tmp_path) in error
    assert not (tmp_path / "datasets").exists()
