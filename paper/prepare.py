"""The paper's datasets as rows: filtered, split, and with a manifest of what was dropped and why.

    python paper/prepare.py numinamath        # writes datasets/numinamath/{train,valid,test}.jsonl

The filters are the paper's (section 3); what it leaves open is said in GUIDE.md. A prompt that comes twice is
kept once. Of NuminaMath, rows whose own solution Math-Verify cannot match with their answer go too, since no
completion could ever be rewarded.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import processes
from data import read_source
from rewards import Verifiers
from run import check_writable, write_whole

# the paper's prompt (figure 4); the model's chat template goes around it
PROBLEM = (
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {problem}\n"
    "Your response should end with 'The final answer is $\\boxed{{[answer]}}$. I hope it is correct.' "
    "where [answer] is the response to the problem."
)
SYNTHETIC = {"orca_math", "synthetic_amc", "synthetic_math"}  # subsets that the paper leaves out
PROOF = re.compile(r"\b(prove|show|demonstrate|verify) that\b|^\W*(prove|show)\b", re.I)
CHOICES = re.compile(r"(\(A\)|\bA[.)]|\\text(bf)?\{\(?A\)?).*(\(B\)|\bB[.)]|\\text(bf)?\{\(?B\)?)", re.S)


# ---- one raw row to a row, or to the reason why there is none


def numinamath(raw: dict) -> dict | str:
    """NuminaMath-1.5 names proofs and multiple choice; NuminaMath-CoT does not, and has the answer in the
    solution alone.
    """
    if raw["source"] in SYNTHETIC or raw.get("synthetic"):
        return "synthetic"
    kind, answer = raw.get("question_type"), raw.get("answer")
    if kind == "proof" or answer == "proof" or (kind is None and PROOF.search(raw["problem"])):
        return "proof"
    if kind == "MCQ" or (kind is None and CHOICES.search(raw["problem"])):
        return "multiple choice"
    answer = last_boxed(raw["solution"] or "") if answer is None else answer
    if not answer.strip() or answer == "notfound":
        return "no answer"
    return maths_row(raw["problem"], answer) | {"source": raw["source"], "solution": raw["solution"]}


def wildchat(raw: dict) -> dict | str:
    """Of a conversation only the first message is kept."""
    first = raw["conversation"][0]
    if first.get("language", raw["language"]) != "English":
        return "not English"
    if raw["toxic"] or first.get("toxic"):
        return "toxic"
    if not first["content"].strip():
        return "empty"
    return {"prompt": first["content"], "reward": "rm"}


def math500(raw: dict) -> dict:
    return maths_row(raw["problem"], raw["answer"])


def amc23(raw: dict) -> dict:
    return maths_row(raw["question"], str(raw["answer"]).removesuffix(".0"))


def gsm8k(raw: dict) -> dict:
    return maths_row(raw["question"], raw["answer"].split("####")[-1].strip().replace(",", ""))


def alpaca_eval(raw: dict) -> dict:
    """Without a reward: its own judge compares the completions that evaluate.py writes."""
    return {"prompt": raw["instruction"]}


def maths_row(problem: str, answer) -> dict:
    return {
        "prompt": PROBLEM.format(problem=problem.strip()),
        "reward": "math",
        "answer": str(answer).strip(),
    }


def last_boxed(text: str) -> str:
    r"""What stands in the last \boxed{...}, braces balanced; "" without one."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for end in range(start, len(text) if start >= len("\\boxed{") else 0):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return ""


@dataclass(frozen=True)
class Dataset:
    source: str  # of the hub, as --data names it
    columns: list[str]  # without which it is another dataset
    row: Callable[[dict], dict | str]
    splits: dict[str, int | None]  # rows of each, taken in this order; None: all that are left


DATASETS = {
    # the paper holds out 1,980 for validation and as many for test
    "numinamath": Dataset(
        "AI-MO/NuminaMath-1.5", ["problem", "solution", "source"], numinamath,
        {"valid": 1980, "test": 1980, "train": None},
    ),
    # as many for validation as the paper's selection set has, which is another one
    "wildchat": Dataset(
        "allenai/WildChat-1M", ["conversation", "language", "toxic"], wildchat, {"valid": 470, "train": 1000}
    ),
    "math500": Dataset("HuggingFaceH4/MATH-500:test", ["problem", "answer"], math500, {"test": None}),
    "amc23": Dataset("zwhe99/amc23:test", ["question", "answer"], amc23, {"test": None}),
    # its hub page has a script, which `datasets` does not run: the file itself has to be there
    "alpaca_eval": Dataset("alpaca_eval.json", ["instruction"], alpaca_eval, {"test": None}),
    "gsm8k": Dataset("openai/gsm8k:test:main", ["question", "answer"], gsm8k, {"test": None}),
    "gsm8k-train": Dataset(  # not of the paper: paper/one_gpu.sh trains on it
        "openai/gsm8k:train:main", ["question", "answer"], gsm8k, {"valid": 473, "train": None}
    ),
}  # fmt: skip


# ---- all rows of a dataset to files


def prepare(name: str, source: str, revision: str | None, out: Path, splits: dict, seed: int) -> dict:
    """Writes one .jsonl a split and manifest.json into `out`; returns the manifest."""
    check_writable(out / "manifest.json")
    revision = revision or newest_revision(source)
    raw, where = read_source(source, revision)
    rows, dropped, seen = [], Counter(), set()
    for number, line in tqdm(raw, desc=name):
        row = convert(DATASETS[name], line, f"{source}, {where} {number}")
        if isinstance(row, dict):
            key = " ".join(row["prompt"].lower().split())
            row = "duplicate" if key in seen else row
            seen.add(key)
        if isinstance(row, dict):
            rows.append(row)
        else:
            dropped[row] += 1
    if name == "numinamath":
        found = len(rows)
        rows = with_right_solution(rows)
        dropped["Math-Verify does not find the answer in the solution"] += found - len(rows)
    random.Random(seed).shuffle(rows)
    manifest = {
        "name": name, "source": source, "revision": revision, "seed": seed,
        "read": len(raw), "dropped": dict(dropped), "left": len(rows), "files": {},
    }  # fmt: skip
    files = {}
    for split, size in splits.items():
        part, rows = (rows, []) if size is None else (rows[:size], rows[size:])
        if not part or (size and len(part) < size):
            wanted = f"{len(part)} rows are left for {split}, wanted {size or 'some'}"
            raise ArgumentError(None, f"{source}: {wanted}")
        files[split] = "".join(json.dumps(row) + "\n" for row in part)
        facts = {"rows": len(part), "sha256": hashlib.sha256(files[split].encode()).hexdigest()}
        manifest["files"][f"{split}.jsonl"] = facts
    out.mkdir(parents=True, exist_ok=True)
    for split, text in files.items():
        write_whole(out / f"{split}.jsonl", text)
    write_whole(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def convert(dataset: Dataset, raw, where: str) -> dict | str:
    """dataset.row of a raw row; ArgumentError, naming `where`, for one that is not as the hub's rows are."""
    if not isinstance(raw, dict):
        raise ArgumentError(None, f"{where}: not an object with columns")
    for column in dataset.columns:
        if column not in raw:
            raise ArgumentError(None, f"{where}: no column {column!r} (it has: {', '.join(raw)})")
    try:
        return dataset.row(raw)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        shown = json.dumps(raw, default=str)[:100]
        raise ArgumentError(None, f"{where}: not as expected: {shown}") from error


def with_right_solution(rows: list[dict]) -> list[dict]:
    """The rows whose own solution Math-Verify scores 1, without that solution."""
    verifiers = Verifiers({"math"}, timeout=5.0, workers=os.cpu_count() or 2)
    kept = []
    for start in tqdm(range(0, len(rows), 1024), desc="checking solutions"):
        part = rows[start : start + 1024]
        rewards = verifiers([("math", row["answer"], row.pop("solution"), {}) for row in part])
        kept += [row for row, reward in zip(part, rewards, strict=True) if reward == 1]
    verifiers.close()
    return kept


def newest_revision(source: str) -> str | None:
    """The newest commit of a dataset on the hub; None for a file, and where the hub cannot be asked."""
    if Path(source).suffix in (".jsonl", ".json", ".parquet"):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.split(":")[0]).sha
    except Exception:  # offline: read_source says so, or finds it in the cache
        return None


def get_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = processes.fail
    parser.add_argument("name", choices=list(DATASETS))
    parser.add_argument("--source", help="another copy of it: .jsonl, .parquet, hub name[:split[:config]]")
    parser.add_argument("--revision", help="commit of the hub's dataset (default: the newest)")
    parser.add_argument("--out", type=Path, help="directory (default: datasets/<name>)")
    parser.add_argument("--train", type=int, help="training rows; paper: 1000 WildChat, mixed 100000, 50000")
    parser.add_argument("--valid", type=int, help="validation rows (default: the paper's)")
    parser.add_argument("--test", type=int, help="test rows (default: the paper's)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows")
    args = parser.parse_args(argv)
    args.splits = dict(DATASETS[args.name].splits)
    for split in ("train", "valid", "test"):
        size = getattr(args, split)
        if size is not None and (size < 1 or split not in args.splits):
            has = ", ".join(args.splits)
            parser.error(f"--{split} {size}: {args.name} has the splits {has}, of 1 row or more")
        if size is not None:
            args.splits[split] = size
    args.out = args.out or Path("datasets") / args.name
    if (args.out / "manifest.json").exists():
        parser.error(f"--out {args.out}: holds rows already (manifest.json); name another directory")
    return args


def main(argv=None):
    args = get_args(argv)
    source = args.source or DATASETS[args.name].source
    manifest = prepare(args.name, source, args.revision, args.out, args.splits, args.seed)
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    processes.launch(main)
