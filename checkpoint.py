"""How a run outlives its machine: a checkpoint holds what the loop needs to go on bit for bit.

checkpoints/step-000100 in the run's directory is written after 100 steps and holds

    *.distcp, .metadata    weights, Adam's moments and, inside a window, the reference where it follows: each
                           rank writes its shards, any number of ranks reads them
    state.json             the rest of the loop's state, and the run's flags
    manifest.json          size and checksum (XXH3) of each of these

It is written under another name and renamed when all of it is on disk; only then do older ones go. The
completions of the window that it falls in are beside it, in windows/ (window.py). Nothing else has a state:
the order of prompts is a function of --seed and the step, each draw is seeded by --seed, step and rank, and
so is the choice of pairs. The generators' states are kept for forks that draw from them.

On several nodes the run's directory must be the same one for all, on a shared file system.
"""

import io
import json
import os
import pickle
import shutil
import sys
import time
from argparse import ArgumentError
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.utils.serialization import config as torch_save

from flags import Flags
from processes import Fault, error_line, everywhere, on_rank_0
from window import window_fault

# A run goes on with other values of these: they do not change what it computes, or its rows say more than
# their path does (`data.fingerprint`). --micro-batch-tokens, --packing and --shard-ranks change the order of
# sums, and so the last bits.
MAY_DIFFER = (
    "out resume steps save_every keep eval_every log_samples wandb tensorboard data eval_data rollouts"
    " gpu_memory sleep packing micro_batch_tokens shard_ranks activation_checkpointing trust_remote_code"
    " preflight reward_timeout reward_workers reward_offload judge_url judge_timeout judge_concurrency"
    " max_failed max_skipped"
).split()


@dataclass
class Progress:
    """What the loop knows at the end of a step, beside the weights and the window."""

    step: int = 0  # steps that are done
    first: tuple = ("accuracy", float("nan"))  # the validation before the first step, its name and score
    last: tuple = ("accuracy", float("nan"))  # and the newest
    skipped: int = 0  # updates that were not finite
    skipped_in_a_row: int = 0
    saved: int = 0  # the step of the newest checkpoint

    def advance(self, finite: bool):
        """A step is done; finite: whether its update was, or was skipped."""
        self.step += 1
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1


@dataclass
class Checkpoint:
    directory: Path
    state: dict  # of state.json
    changed: dict  # flags that are not as they were: name -> (then, now)

    def check(self, fingerprint: int):
        if fingerprint != self.state["fingerprint"]:
            raise ArgumentError(None, f"{self.directory}: --data or --eval-data held other rows at that time")


class Checkpoints:
    """Writes a run's checkpoints, and brings one back. What it is given is what a checkpoint is made of."""

    def __init__(self, run, prompts, *, window, policy, reference, optimizer):
        self.run, self.prompts, self.window = run, prompts, window
        self.policy, self.reference, self.optimizer = policy, reference, optimizer

    def due(self, step: int) -> bool:
        """Whether one comes after `step` steps: every --save-every, and where a window ends and the next
        takes more than one call to sample, so that its chunks belong to weights that are on disk.
        """
        args = self.run.args
        ends = step == self.window.end < args.steps and self.window.takes_chunks
        return args.save_every > 0 and (step % args.save_every == 0 or ends)

    def save(self, progress: Progress):
        """Writes a checkpoint; removes all but the --keep newest, and windows that none of them needs.
        Collective.

        Raises SystemExit on every rank if one of them fails; earlier checkpoints are then as they were.
        """
        rank, began, progress.saved = dist.get_rank(), time.perf_counter(), progress.step
        folder = on_rank_0(lambda: self.run.directory / "checkpoints")
        partial = folder / f"step-{progress.step:06d}.partial"
        try:
            self.window.save(progress.step)
            on_rank_0(lambda: _prepare(partial))
            tensors = self.tensors(self.window.state(), progress.step)
            parts = everywhere(lambda: write_tensors(partial, tensors))
            generators = everywhere(_generators)
            on_rank_0(lambda: self._finish(partial, progress, parts, generators))
        except Fault as error:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise SystemExit(f"stopped: the checkpoint {partial.stem} cannot be written ({error})") from error
        self.run.say(f"step {progress.step}: checkpoint in {time.perf_counter() - began:.2f} s")

    def _finish(self, partial: Path, progress: Progress, parts: list[dict], generators: list):
        """Adds what is no tensor, gives the directory its name and removes what is old; on rank 0."""
        updates = max((int(moments.get("step", 0)) for moments in self.optimizer.state.values()), default=0)
        state = vars(progress) | {
            "updates": updates,  # Adam's own count: a step with nothing to learn from is none
            "window": self.window.state(), "generators": generators, "fingerprint": self.prompts.fingerprint,
            "logs": self.run.sizes(), "facts": self.run.facts,
        }  # fmt: skip
        manifest = {name: entry for part in parts for name, entry in part.items()}
        manifest["state.json"] = _write(partial / "state.json", json.dumps(state, default=str))
        _write(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        final = partial.with_suffix("")
        if final.exists():
            _remove(final)
        partial.rename(final)
        _sync(partial.parent)
        inside = self.window.start < progress.step < self.window.end and len(self.window.chunks) > 1
        for old in _found(partial.parent)[self.run.args.keep :]:
            if not (inside and int(old.name[5:]) == self.window.start):
                _remove(old)  # the weights that wrote the window stay as long as it does
        self.window.forget()

    def load(self, checkpoint: Checkpoint) -> Progress:
        """Brings back weights, Adam's moments and the reference, where it follows, and returns the loop's
        state; collective.
        """
        state, directory = checkpoint.state, checkpoint.directory
        progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})
        for p in self.policy.lm.parameters():
            p.grad = None
            updates = torch.tensor(float(state["updates"]), device=p.device)
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": updates, **moments}
        try:
            read_tensors(directory, self.tensors(state["window"], progress.step))
        except (ValueError, dcp.CheckpointException) as error:
            # its files are whole, so it is of another model
            reason = f"not of this --model ({error_line(error)})"
            raise ArgumentError(None, f"--resume {directory}: {reason}") from error
        if self.reference.follows:
            self.reference.step = state["window"]["start"]
        rank, generators = dist.get_rank(), state.get("generators", [])
        if rank == 0:  # later ones are damaged, or of a way that is not taken
            for later in _found(directory.parent):
                if later.name > directory.name:
                    shutil.rmtree(later.with_name(later.name + ".aside"), ignore_errors=True)
                    later.rename(later.with_name(later.name + ".aside"))
        if rank < len(generators):
            cpu, cuda = generators[rank]
            torch.set_rng_state(torch.tensor(cpu, dtype=torch.uint8))
            if cuda and torch.cuda.is_available():
                torch.cuda.set_rng_state(torch.tensor(cuda, dtype=torch.uint8))
        return progress

    def tensors(self, window: dict, step: int) -> dict[str, torch.Tensor]:
        """Name -> tensor of all that is saved at `step`, sharded as the policy is; loading writes into these.

        window: its state. The reference that follows is the policy of its first step; that of step 0 is the
        model.
        """
        tensors = {}
        for name, p in self.policy.lm.named_parameters():
            tensors[f"policy.{name}"] = p.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state[p]  # empty if no update was finite so far
                tensors[f"{moment}.{name}"] = state[moment] if state else torch.zeros_like(p)
        inside = 0 < window["start"] < step < window["ends"][-1]
        if inside and self.reference.follows and self.reference.model:
            model = self.reference.model.lm
            tensors |= {f"reference.{name}": p.detach() for name, p in model.named_parameters()}
        return tensors


def find_checkpoint(args: Flags) -> Checkpoint | None:
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
    candidates = on_rank_0(lambda: [asked] if exact else _found(run / "checkpoints"))
    fault = "no checkpoint in it"
    for directory in candidates:
        fault = next(filter(None, everywhere(lambda d=directory: _fault(d))), None)
        if not fault:
            state = json.loads((directory / "state.json").read_text())
            fault = window_fault(run, state["window"], state["step"])
        if not fault:
            break
        say(f"{directory}: {fault}")
    else:
        if args.resume == "auto" and not candidates:
            return None
        raise ArgumentError(None, f"--resume {args.resume}: nothing to go on from ({fault})")
    changed = changed_flags(args, state["facts"])
    other = [f", --{name.replace('_', '-')} {new} (was {old})" for name, (old, new) in changed.items()]
    say(f"going on from {directory}{''.join(other)}")
    if args.steps < state["step"]:
        raise ArgumentError(None, f"--steps {args.steps}: {directory} is {state['step']} steps on already")
    return Checkpoint(directory, state, changed)


def changed_flags(args: Flags, facts: dict) -> dict:
    """Flags that are not as in `facts` (args.json): name -> (then, now). A flag that the run did not have yet
    counts as its default. Raises ArgumentError for those that would make it another run.
    """
    had = facts["args"]
    then = args.defaults | had
    for name in had.keys() - vars(args).keys():
        if had[name]:  # not one that was off
            flag = f"--{name.replace('_', '-')} {had[name]}"
            raise ArgumentError(
                None, f"--resume {args.resume}: the run has {flag}, which this script does not know"
            )
    changed = {k: (then.get(k), new) for k, new in vars(args).items() if str(new) != str(then.get(k))}
    other = [f"--{name.replace('_', '-')} {new} (was {old})" for name, (old, new) in changed.items()
             if name not in MAY_DIFFER]  # fmt: skip
    if other:
        raise ArgumentError(None, f"--resume {args.resume}: would be another run with {', '.join(other)}")
    return {name: change for name, change in changed.items() if name not in ("out", "resume")}


def _prepare(partial: Path):
    for old in partial.parent.glob("*.partial"):
        shutil.rmtree(old)
    partial.mkdir(parents=True)


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
        if "window.jsonl" in manifest:
            return "written by an earlier version (it has a window.jsonl), in a form that only that one reads"
        names = sorted(manifest)
        buffer = memoryview(bytearray(PIECE))  # one for all: fresh memory costs more than the checksum
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            (size, expected), checksum = manifest[name], xxhash.xxh3_64()
            with open(directory / name, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    checksum.update(buffer[:count])
                if stream.tell() != size:
                    return f"{name} has {stream.tell()} bytes of {size}"
            if checksum.hexdigest() != expected:
                return f"{name} is damaged (its checksum is another one)"
        return None if "state.json" in manifest else "manifest.json does not name state.json"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror.lower()}"
    except (ValueError, TypeError, AttributeError):
        return "manifest.json is damaged"


def _write(file: Path, text: str) -> list:
    """Returns size and checksum."""
    content = text.encode()
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return [len(content), xxhash.xxh3_64_hexdigest(content)]


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


# ---- tensors

PIECE = 2**20  # bytes; what the processor's cache holds is not fetched from memory twice
READERS = 4  # threads of a rank; one spends most of its time on fresh memory that torch.load reads into

# All that the .metadata of tensors refers to. BytesStorageMetadata must not be here: torch would load the
# object that it announces with weights_only=False.
_DCP = "torch.distributed.checkpoint"
_METADATA = {
    *(("torch", name) for name in "Size float64 float32 float16 bfloat16 int64 int32 uint8 bool".split()),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    """Writes each shard once, whichever ranks hold it, and returns {file name: [size, checksum]} of the files
    that this rank wrote. They are on the disk then. Collective.

    The checksum is of the bytes on their way to the file, so what the disk makes of them is found later.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=False)  # _SummedFiles syncs them
    writer.fs = _SummedFiles()
    dcp.save(tensors, storage_writer=writer)
    return writer.fs.written


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor]):
    """Fills `tensors` in place, however many ranks wrote them. Collective.

    Nothing in the files can run code. Raises ValueError on every rank if .metadata holds anything but the
    description of tensors in this folder, and CheckpointException if these are not the tensors in it.
    """
    reader = _Reader(folder)
    try:
        everywhere(reader.open)
    except Fault as error:
        raise ValueError(str(error)) from error
    dcp.load(tensors, storage_reader=reader)


class _SummedFiles(FileSystem):
    """Files with a checksum; `written` has those that are on the disk: name -> [size, checksum]."""

    def __init__(self):
        self.written = {}

    @contextmanager
    def create_stream(self, path, mode):
        # torch.save's own checksums take three times as long as ours, and nothing reads them.
        with open(path, mode) as file, torch_save.patch({"save.compute_crc32": False}):
            stream = _SummedStream(file)
            try:
                yield stream
            except RuntimeError as error:  # torch.save's own, of a file that it cannot finish
                raise stream.error or error from error
            file.flush()
            os.fsync(file.fileno())
        self.written[path.name] = [stream.size, stream.checksum.hexdigest()]

    def rename(self, path, new_path):
        super().rename(path, new_path)
        self.written[new_path.name] = self.written.pop(path.name)


class _SummedStream:
    """All that torch.save and pickle ask of a file. It has no seek, so bytes come in the file's order."""

    def __init__(self, file):
        self.file, self.size, self.checksum = file, 0, xxhash.xxh3_64()
        self.error = None

    def write(self, data) -> int:
        data = memoryview(data)
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self.checksum.update(piece)
            try:
                self.file.write(piece)
            except OSError as error:
                self.error = error
                raise
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self):
        self.file.flush()

    def close(self):
        """Torch closes it before it can be synced; `create_stream` does both."""


class _Reader(dcp.FileSystemReader):
    """Reads with several threads, and trusts nobody's .metadata, which is a pickle."""

    def open(self):
        content = (self.path / ".metadata").read_bytes()
        try:
            self.metadata = _Unpickler(io.BytesIO(content)).load()
            files = {shard.relative_path for shard in self.metadata.storage_data.values()}
        except Exception as error:  # a damaged pickle raises almost any
            raise ValueError(f".metadata is not the description of tensors ({error})") from error
        if outside := files - set(os.listdir(self.path)):  # a path that leads elsewhere is not in this list
            raise ValueError(f".metadata refers to {min(map(repr, outside))}, which is not beside it")

    def read_metadata(self):
        return self.metadata

    def read_data(self, plan, planner):
        read = super().read_data
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda item: read(dcp.LoadPlan([item]), planner), plan.items))
        return read(dcp.LoadPlan([]), planner)  # the future of nothing


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _METADATA:  # whole names: "torch" with "os.system" would be found as well
            raise ValueError(f"it names {module}.{name}")
        return super().find_class(module, name)
