"""How a run outlives its machine: a checkpoint holds what the loop needs to go on bit for bit.

checkpoints/step-000100 in the run's directory is written after 100 steps and holds

    *.safetensors    weights, Adam's moments and, inside a window, the sampler's weights: each rank writes its
                     shards, and any number of ranks reads them (torch.distributed.checkpoint)
    window.jsonl     rollouts that are generated but not yet trained on
    state.json       the rest of the loop's state, and the run's flags
    manifest.json    size and CRC-32 of each of these

It is written under another name and renamed when all of it is on disk; only then do older ones go. Nothing
else has a state: the order of prompts is a function of --seed and the step, each draw is seeded by --seed,
step and rank, and so is the choice of pairs. The generators' states are kept for forks that draw from them.

On several nodes the run's directory must be the same one for all, on a shared file system.
"""

import functools
import json
import os
import shutil
import sys
import time
import zlib
from argparse import ArgumentError, Namespace
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

FILE_BYTES = 2**32  # of tensors in one file, over all ranks; a rank holds its part of a file twice in writing
# A run goes on with other values of these: they do not change what it computes, or its rows say more than
# their path does (`data.fingerprint`). --micro-batch-tokens and --shard-ranks change the order of sums,
# and so the last bits.
MAY_DIFFER = (
    "out resume save_every keep eval_every log_samples wandb tensorboard data eval_data rollouts"
    " gpu_memory sleep micro_batch_tokens shard_ranks activation_checkpointing reward_timeout reward_offload"
    " judge_url judge_timeout judge_concurrency max_failed max_skipped trust_remote_code steps"
).split()


@dataclass
class Progress:
    """What the loop knows at the end of a step, beside the weights."""

    step: int = 0  # steps that are done
    window_step: int = 0  # the step that the sampler's weights are from
    window: list | None = None  # those weights: this rank's shards, for as long as the window lasts
    tested: list = field(default_factory=list)  # what the sampler answered with them to the self-test
    queue: deque = field(default_factory=deque)  # generated ahead: for each step this rank's groups
    first: tuple = ("accuracy", float("nan"))  # the validation before the first step, its name and score
    last: tuple = ("accuracy", float("nan"))  # and the newest
    skipped: int = 0  # updates that were not finite
    skipped_in_a_row: int = 0


@dataclass
class Checkpoint:
    directory: Path
    state: dict  # of state.json
    changed: dict  # flags that are not as they were: name -> (then, now)

    @property
    def rollouts(self) -> Path | None:
        """The unread part of the window: prompts-per-step lines for each step, those of all ranks."""
        path = self.directory / "window.jsonl"
        return path if path.stat().st_size else None

    def check(self, fingerprint: int):
        if fingerprint != self.state["fingerprint"]:
            raise ArgumentError(None, f"{self.directory}: --data or --eval-data held other rows at that time")


def save(run, progress: Progress, fingerprint: int, policy, optimizer, queue: list, keep: int):
    """Writes a checkpoint and removes all but the `keep` newest; collective.

    queue: the groups of all ranks for each step that is generated ahead. Raises SystemExit on every rank if
    one of them fails; the checkpoints from before are then as they were.
    """
    rank, began = dist.get_rank(), time.perf_counter()
    folder = _everywhere(lambda: run.directory / "checkpoints")[0]
    partial = folder / f"step-{progress.step:06d}.partial"
    fail = lambda e: SystemExit(f"stopped: the checkpoint {partial.stem} cannot be written ({e})")  # noqa: E731

    def prepare():
        if rank == 0:
            for old in folder.glob("*.partial"):
                shutil.rmtree(old)
            partial.mkdir(parents=True)

    def write():
        tensors = _tensors(policy, optimizer, progress)
        files, total = {}, 0
        for name, tensor in tensors.items():
            files[name] = 1 + total // FILE_BYTES
            total += tensor.numel() * tensor.element_size()
        writer = dcp.HuggingFaceStorageWriter(str(partial), files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)

    def describe(generators):
        updates = max((int(moments.get("step", 0)) for moments in optimizer.state.values()), default=0)
        state = {k: v for k, v in vars(progress).items() if k not in ("window", "queue", "tested")} | {
            "updates": updates,  # Adam's own count: a step with nothing to learn from is none
            "tested": [asdict(c) for c in progress.tested], "window": progress.window is not None,
            "generators": generators, "fingerprint": fingerprint, "logs": run.sizes(), "facts": run.facts,
        }  # fmt: skip
        lines = [
            json.dumps({**asdict(row), "completions": [asdict(c) for c in completions]}) + "\n"
            for groups in queue for row, completions in groups
        ]  # fmt: skip
        _write(partial / "window.jsonl", "".join(lines))
        _write(partial / "state.json", json.dumps(state, default=str))

    def check():
        mine = sorted(partial.iterdir())[rank :: dist.get_world_size()]
        return {file.name: _size_and_crc(file, sync=True) for file in mine}

    def finish(parts):
        manifest = {name: entry for part in parts for name, entry in part.items()}
        _write(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        final = partial.with_suffix("")
        if final.exists():
            _remove(final)
        partial.rename(final)
        _sync(folder)
        for old in _found(folder)[keep:]:
            _remove(old)

    try:
        _everywhere(prepare)
        _everywhere(write)
        generators = _everywhere(_generators)
        _everywhere(lambda: rank == 0 and describe(generators))
        parts = _everywhere(check)
        _everywhere(lambda: rank == 0 and finish(parts))
    except Fault as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise fail(error) from error
    run.say(f"step {progress.step}: checkpoint in {time.perf_counter() - began:.2f} s")


def find(args: Namespace) -> Checkpoint | None:
    """The checkpoint that --resume asks for, or None; sets --out and --date to its run's. Collective.

    auto: the newest good one of --out, or None where there is none yet. A run's directory: its newest good
    one. A checkpoint's: that one. A damaged one is named on the console. Raises ArgumentError if nothing is
    good, or if flags differ that would change the result; SystemExit(0) if the run is complete.
    """
    if not args.resume:
        return None
    if args.resume == "auto" and not args.out:
        raise ArgumentError(None, "--resume auto: goes with --out DIRECTORY, whose run is to go on")
    asked = Path(args.out if args.resume == "auto" else args.resume)
    exact = asked.absolute().parent.name == "checkpoints"
    run = Path(os.path.relpath(asked.absolute().parent.parent)) if exact else asked
    if args.out and args.out.resolve() != run.resolve():
        raise ArgumentError(None, f"--out {args.out}: a resumed run goes on where it is, in {run}")
    if args.resume != "auto" and not asked.is_dir():
        raise ArgumentError(None, f"--resume {args.resume}: no such directory")
    args.out = run
    say = lambda text: dist.get_rank() or print(text, file=sys.stderr, flush=True)  # noqa: E731
    if (run / "args.json").exists():
        try:
            facts = json.loads((run / "args.json").read_text())
        except ValueError as error:
            raise ArgumentError(None, f"{run}/args.json: damaged ({error})") from error
        args.date = args.date or facts["args"].get("date")  # prompts must not change half-way
        changed_flags(args, facts)
        if (run / "model").exists() and args.steps <= facts["args"]["steps"]:
            say(f"{run} has done its {facts['args']['steps']} steps")
            raise SystemExit(0)
    candidates = _everywhere(lambda: [asked] if exact else _found(run / "checkpoints"))[0]
    fault = "no checkpoint in it"
    for directory in candidates:
        fault = next(filter(None, _everywhere(lambda d=directory: _fault(d))), None)
        if not fault:
            break
        say(f"{directory}: {fault}")
    else:
        if args.resume == "auto" and not candidates:
            return None
        raise ArgumentError(None, f"--resume {args.resume}: nothing to go on from ({fault})")
    state = json.loads((directory / "state.json").read_text())
    changed = changed_flags(args, state["facts"])
    other = [f", --{name.replace('_', '-')} {new} (was {old})" for name, (old, new) in changed.items()]
    say(f"going on from {directory}{''.join(other)}")
    if args.steps < state["step"]:
        raise ArgumentError(None, f"--steps {args.steps}: {directory} is {state['step']} steps on already")
    return Checkpoint(directory, state, changed)


def changed_flags(args: Namespace, facts: dict) -> dict:
    """Flags that are not as in `facts` (args.json): name -> (then, now). Raises ArgumentError for those that
    would make it another run.
    """
    then = facts["args"]
    changed = {k: (then.get(k), new) for k, new in vars(args).items() if str(new) != str(then.get(k))}
    other = [f"--{name.replace('_', '-')} {new} (was {old})" for name, (old, new) in changed.items()
             if name not in MAY_DIFFER]  # fmt: skip
    if other:
        raise ArgumentError(None, f"--resume {args.resume}: would be another run with {', '.join(other)}")
    return {name: change for name, change in changed.items() if name not in ("out", "resume")}


def load(checkpoint: Checkpoint, policy, optimizer, dtype, completion: type) -> Progress:
    """Brings weights and Adam's moments back and returns the loop's state, without its queue; collective.

    dtype: of the sampler's weights; completion: the class to make of what `tested` holds.
    """
    state, directory = checkpoint.state, checkpoint.directory
    names = Progress.__dataclass_fields__.keys() - {"window", "queue", "tested"}
    progress = Progress(**{name: state[name] for name in names})
    progress.tested = [completion(**fields) for fields in state["tested"]]
    if state["window"]:
        progress.window = policy.snapshot(dtype)  # of the right shapes; its values are overwritten
    for p in policy.lm.parameters():
        p.grad = None
        updates = torch.tensor(float(state["updates"]), device=p.device)
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": updates, **moments}
    tensors = _tensors(policy, optimizer, progress)
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(directory)))
    except dcp.CheckpointException as error:  # its files are whole, so it is of another model
        raise ArgumentError(None, f"--resume {directory}: not of this --model ({_reason(error)})") from error
    rank = dist.get_rank()
    if rank == 0:  # later ones are damaged, or of a way that is not taken
        for later in _found(directory.parent):
            if later.name > directory.name:
                shutil.rmtree(later.with_name(later.name + ".aside"), ignore_errors=True)
                later.rename(later.with_name(later.name + ".aside"))
    if rank < len(state["generators"]):
        cpu, cuda = state["generators"][rank]
        torch.set_rng_state(torch.tensor(cpu, dtype=torch.uint8))
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(cuda, dtype=torch.uint8))
    return progress


def _tensors(policy, optimizer, progress: Progress) -> dict[str, torch.Tensor]:
    """Name -> tensor of all that is saved, sharded as the policy is; loading writes into them, in place."""
    tensors = {}
    for i, (name, p) in enumerate(policy.lm.named_parameters()):
        tensors[f"policy.{name}"] = p.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[p]  # empty if no update was finite so far
            tensors[f"{moment}.{name}"] = state[moment] if state else torch.zeros_like(p)
        if progress.window is not None:
            shard = progress.window[i]
            if isinstance(p, DTensor):
                like = {"shape": p.shape, "stride": p.stride()}
                shard = DTensor.from_local(shard, _host(p.device_mesh), p.placements, **like)
            tensors[f"window.{name}"] = shard
    return tensors


@functools.cache  # a mesh of two dimensions makes process groups of its own
def _host(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks for tensors in host memory, where the window's shards are, and stay."""
    return mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh)


def _generators() -> tuple[list, list]:
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else []
    return torch.get_rng_state().tolist(), cuda


def _found(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((d for d in folder.glob("step-*") if d.name[5:].isdigit()), reverse=True)


def _fault(directory: Path) -> str | None:
    """What is wrong with this rank's part of a checkpoint's files, or None."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        names = sorted(manifest)
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            size, crc = manifest[name]
            found, check = _size_and_crc(directory / name)
            if found != size:
                return f"{name} has {found} bytes of {size}"
            if check != crc:
                return f"{name} is damaged (its CRC-32 is another one)"
        return None if "state.json" in manifest else "manifest.json does not name state.json"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror.lower()}"
    except (ValueError, TypeError, AttributeError):
        return "manifest.json is damaged"


def _size_and_crc(file: Path, sync=False) -> list[int]:
    crc = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(2**24):
            crc = zlib.crc32(chunk, crc)
        if sync:
            os.fsync(stream.fileno())
        return [stream.tell(), crc]


def _write(file: Path, text: str):
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path):
    """The names in a directory reach the disk only when it is synced itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _remove(directory: Path):
    """Its name goes first: a checkpoint with half of its files must not be found."""
    doomed = directory.with_name(directory.name + ".old.partial")  # not the name that is being written
    directory.rename(doomed)
    shutil.rmtree(doomed)


class Fault(Exception):
    """An error on one rank, told to all."""


def _everywhere(work: Callable) -> list:
    """Runs `work` on every rank and returns the results of all; Fault on every rank where one of them fails,
    so that none waits for another that has left.
    """
    result, reason = None, None
    try:
        result = work()
    except (OSError, ValueError, dcp.CheckpointException) as error:
        reason = f"rank {dist.get_rank()}: {_reason(error)}"
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, reason))
    for _, reason in outcomes:
        if reason:
            raise Fault(reason)
    return [result for result, _ in outcomes]


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException):  # it holds the ranks' own errors
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error).strip().split("\n")[0][:200]
