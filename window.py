"""The dial's memory: which completions belong to which step, kept and found again.

A window is the steps from one sync to the next, `--sync-steps` of them. One set of weights writes its
completions, so all of them are sampled at the sync, in chunks of ten steps, and nobody needs these weights
any more. Each step then reads its own completions. In the run's directory

    windows/step-000100-5f3a09c1/                       the window that begins with step 100
        steps-000110-000120.rank0of2.8f14e45f.jsonl     what rank 0 of 2 sampled for steps 110 to 119

A line is a prompt with its completions, as --save-rollouts writes it, but without rewards: completions are
scored at their step, and a judge that is down must leave nothing behind that a resumed run reads. 5f3a09c1 is
a checksum of all that the first window depends on (model, rows, flags of sampling, seed): a run finds the
chunks of one that died before its first checkpoint. 8f14e45f is a checksum of the file. A window of one chunk
stays in memory; it is written when a checkpoint falls inside it.
"""

import contextlib
import json
import os
import re
import shutil
import statistics
import zlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data import Prompts, read_rollout, rollout_line
from processes import Fault, everywhere, interleave, on_rank_0
from sampler import sample
from sampler_check import self_test

CHUNK = 10  # steps that are sampled in one call
# flags that decide what the first window's completions are, beside the model's files and the rows
SAMPLING = (
    "data_weights date prompts_per_step samples_per_prompt max_new_tokens temperature sampler seed".split()
)


class Window:
    """The steps from `start` up to, but not including, `end`, and this rank's completions of them.

    ends: where it was to end and, if a run was resumed with more --steps, where it ends now.
    """

    scored = False  # the completions have no rewards yet

    def __init__(self, directory: Path, args: Namespace, prompts: Prompts):
        """directory: the run's."""
        files = [
            (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in Path(args.model).glob("*.safetensors")
        ]
        flags = [getattr(args, name) for name in SAMPLING]
        self.key = zlib.crc32(repr([args.model, sorted(files), flags, prompts.fingerprint]).encode())
        self.folder, self.args, self.prompts = directory / "windows", args, prompts
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.start, self.ends = 0, [0]  # empty: it ends where the first one begins
        self.files: dict[tuple, list[Path]] = {}  # chunk -> what this rank reads for it
        self.groups: dict[int, list] = {}  # step -> (row, completions), of the chunk in hand
        self.rewards: list[float] = []  # of the steps so far

    @property
    def end(self) -> int:
        return self.ends[-1]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(first step, step behind the last one) of each; steps added later have chunks of their own."""
        return _chunks(self.start, self.ends)

    @property
    def takes_chunks(self) -> bool:
        """Whether a whole window takes more than one call to sample."""
        return self.args.sync_steps > CHUNK

    def on_policy(self, step: int) -> bool:
        """Whether the policy of this step has the very weights that wrote the step's completions."""
        return step == self.start

    def begin(self, step: int):
        """A new window, from `step` on; collective. Chunks that a killed run has left are taken over."""
        self.start, self.ends = step, [min(step + self.args.sync_steps, self.args.steps)]
        self.files, self.groups, self.rewards = {}, {}, []
        if len(self.chunks) > 1:
            on_rank_0(self.forget)
            self._find(step)
        elif self.rank == 0:  # a single chunk is sampled again sooner than it is checked
            shutil.rmtree(self._directory, ignore_errors=True)

    def restore(self, step: int, state: dict | None, say: Callable):
        """Takes up the window of a checkpoint's `state` at `step`, or of none at step 0; collective. Windows
        of other runs, and of steps that the run has not reached, are deleted.
        """
        self.start, self.ends = (state["start"], state["ends"]) if state else (0, [0])
        if self.start > 0:  # --model's files have no part in it any more
            self.key = state["key"]
        end = min(self.start + self.args.sync_steps, self.args.steps)
        # more --steps: the first window is extended, since a new sampler has its weights, --model's; a later
        # one ends where it was to end
        if self.start == 0 < step and end > self.end:
            self.ends = [*self.ends, end]
        elif step > self.start > 0 and end > self.end:
            steps = f"steps {self.start} to {self.end - 1}"
            say(f"the window of {steps} ends where --steps ended it: a new one begins at step {self.end}")
        if step in (self.start, self.end):  # between two windows: the next one begins at this step
            self.start, self.ends = step, [step]
        on_rank_0(lambda: self.forget(say))
        self._find(step)

    def missing(self, step: int) -> list[tuple[int, int]]:
        """Chunks from `step` on that are still to be sampled."""
        known = self.files.keys() | {chunk for chunk in self.chunks if chunk[0] in self.groups}
        return [c for c in self.chunks if c not in known and step < c[1] and c[0] < self.args.steps]

    def fill(self, step: int, sampler, policy, interrupt, sums) -> bool:
        """Samples what is missing from `step` on, chunk by chunk; collective. Returns whether all is there:
        after a signal on any rank the next chunks are left missing.

        The first completions after a reload are compared with the policy that the weights came from. Adds the
        tokens that this rank has sampled to `sums`, and what it took.
        """
        missing = self.missing(step)
        if self.on_policy(step) and self.chunks[0] in self.files:  # a killed run has left it
            self.groups = self._read(self.chunks[0])
            sums.notes |= self_test(sampler, policy, sum(self.groups.values(), []))
        bar = tqdm(
            total=sum(last - first for first, last in missing), desc=f"sampling, up to step {self.end - 1}",
            unit="step", leave=False, disable=self.rank > 0 or len(missing) < 2,
        )  # fmt: skip
        completions = 0
        for chunk in missing:
            self.groups = {}  # of the chunk before
            rows = {i: self._deal(i) for i in range(*chunk)}
            n = self.args.samples_per_prompt
            groups = sample(sampler, sum(rows.values(), []), n, self.args, chunk[0])
            rest = iter(groups)
            self.groups = {i: [next(rest) for _ in part] for i, part in rows.items()}
            if step == chunk[0] == self.start:  # later, the policy has gone on from these weights
                sums.notes |= self_test(sampler, policy, groups)
            sums.add(sampled=sum(len(c.ids) for _, group in groups for c in group))
            sums.lap("sample")
            completions += self.world * sum(len(group) for _, group in groups)
            del groups, rest  # a long window's chunk is large: it goes before the next one comes
            if len(self.chunks) > 1:
                asked = self._write(chunk, interrupt)
                sums.lap("write")
                bar.update(chunk[1] - chunk[0])
                bar.set_postfix(completions=completions)
                if asked and chunk != missing[-1]:
                    break
        bar.close()
        return not self.missing(step)

    def _deal(self, step: int) -> list:
        """This rank's share of one step's prompts."""
        size = self.args.prompts_per_step
        return self.prompts.take(step * size, size)[self.rank :: self.world]

    def __getitem__(self, step: int) -> list:
        """This rank's (row, completions) of one step."""
        if step not in self.groups:
            [chunk] = [c for c in self.chunks if c[0] <= step < c[1]]
            self.groups = self._read(chunk)
        return self.groups[step]

    def report(self, step: int, reward: float, say: Callable):
        """Says how the first chunk of a long window was rewarded: a bad start has to show early."""
        self.rewards.append(reward)  # of the steps since this process began
        chunk_ends, seen_whole = step + 1 == self.start + CHUNK, len(self.rewards) == CHUNK
        if chunk_ends and seen_whole and len(self.chunks) > 1:
            mean = f"mean reward {statistics.fmean(self.rewards):.3f}"
            say(f"steps {self.start} to {step}, of {self.end - self.start} in this window: {mean}")

    # ---- what a checkpoint needs of it

    def state(self) -> dict:
        return {"start": self.start, "ends": self.ends, "key": self.key}

    def save(self, step: int):
        """Writes the chunk in hand if a run that goes on at `step` would need it; collective."""
        for chunk in self.chunks:
            if chunk[0] < step < chunk[1] and chunk not in self.files:
                self._write(chunk)

    def forget(self, say: Callable | None = None):
        """Deletes the other windows that no checkpoint falls inside. say: names those of other runs."""
        needed = {self._directory}
        for file in self.folder.parent.glob("checkpoints/step-*[0-9]/state.json"):
            with contextlib.suppress(ValueError):  # a damaged checkpoint needs nothing
                state = json.loads(file.read_text())
                if state["step"] < state["window"]["ends"][-1]:
                    needed.add(self.folder / _name(state["window"]["start"], state["window"]["key"]))
        for window in sorted({*self.folder.glob("step-*")} - needed):
            if say and not window.name.endswith(f"-{self.key:08x}"):
                say(f"{window}: of another model, other rows or other flags; deleted")
            shutil.rmtree(window)

    # ---- files

    @property
    def _directory(self) -> Path:
        return self.folder / _name(self.start, self.key)

    def _write(self, chunk: tuple[int, int], interrupt=None) -> bool:
        """Writes `groups`, which are the chunk's; collective, every rank writes its part. Returns whether a
        signal came on any rank.
        """
        name = f"{_stem(chunk)}.rank{self.rank}of{self.world}"

        def write():
            self._directory.mkdir(parents=True, exist_ok=True)
            lines = [
                rollout_line(row, [replace(c, reward=None) for c in completions], step=step)
                for step, groups in self.groups.items() for row, completions in groups
            ]  # fmt: skip
            content = "".join(lines).encode()
            partial = self._directory / f"{name}.partial"
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            final = self._directory / f"{name}.{_checksum(content, partial, self.key)}.jsonl"
            partial.rename(final)
            for other in self._directory.glob(f"{name}.*"):
                if other != final:  # of a run that was killed before all ranks had written theirs
                    other.unlink()
            self.files[chunk] = [final]
            return bool(interrupt and interrupt.asked)

        try:
            return any(everywhere(write))
        except Fault as error:
            raise SystemExit(f"stopped: {self._directory / name} cannot be written ({error})") from error

    def _read(self, chunk: tuple[int, int]) -> dict[int, list]:
        """step -> this rank's (row, completions). What other numbers of ranks wrote is dealt out anew."""
        read = []  # of each part
        for file in self.files[chunk]:
            content = file.read_bytes()
            if not _is_whole(file, content, self.key):
                raise SystemExit(f"stopped: {file} is damaged; --resume auto goes on without it")
            read.append({step: [] for step in range(*chunk)})
            for line in map(json.loads, content.splitlines()):
                read[-1][line["step"]].append(read_rollout(line, str(file)))
        if f".rank{self.rank}of{self.world}." in file.name:
            return read[0]
        return {i: interleave([part[i] for part in read])[self.rank :: self.world] for i in read[0]}

    def _find(self, step: int):
        """Notes the chunks from `step` on that are there whole, names and deletes other files; collective."""
        for chunk in [c for c in self.chunks if c[1] > step]:
            files, bad = _parts(self._directory, chunk, self.key, self.world)
            on_rank_0(lambda bad=bad: [file.unlink() for file in bad])
            for file in bad if self.rank == 0 else []:
                done = "deleted" if files else "sampled anew"
                tqdm.write(f"{file}: damaged, or of another window; {done}")
            if files:
                self.files[chunk] = [files[self.rank]] if len(files) == self.world else files


class Rollouts(Window):
    """The window of a run that trains on files of rollouts: they are there, scored, and nobody samples."""

    scored, chunks = True, []

    def __init__(self, directory: Path, args: Namespace, prompts: Prompts):
        super().__init__(directory, args, prompts)
        self.ends = [args.steps]

    def restore(self, step: int, state: dict | None, say: Callable):
        pass

    def on_policy(self, step: int) -> bool:
        return False

    def __getitem__(self, step: int) -> list:
        return self._deal(step)


def window_fault(directory: Path, state: dict, step: int) -> str | None:
    """Why a run cannot go on at `step` in the window of a checkpoint's `state`, or None; collective.

    directory: the run's. What the first window lacks can be sampled from --model, so that it is no fault.
    """
    folder = directory / "windows" / _name(state["start"], state["key"])
    for chunk in _chunks(state["start"], state["ends"]) if 0 < state["start"] < step else []:
        if step < chunk[1]:
            files, bad = _parts(folder, chunk, state["key"], dist.get_world_size())
            if not files:
                damaged = f"{bad[0]}: damaged, or of another window" if bad else None
                return damaged or f"{folder / _stem(chunk)}: not there"
    return None


def _parts(folder: Path, chunk: tuple[int, int], key: int, world: int) -> tuple[list[Path], list[Path]]:
    """A chunk's files, one for each rank that there was (as many as now, if there are such), or none where it
    is not whole; and those that are damaged or were put there from elsewhere. Collective.
    """
    files = on_rank_0(lambda: sorted(folder.glob(f"{_stem(chunk)}.rank*.jsonl")))
    mine = files[dist.get_rank() :: dist.get_world_size()]
    bad = sum(everywhere(lambda: [file for file in mine if not _is_whole(file, file.read_bytes(), key)]), [])
    parts = {}  # number of ranks -> rank -> its file
    for file in files:
        if file not in bad:
            rank, ranks = map(int, re.search(r"\.rank(\d+)of(\d+)\.", file.name).groups())
            parts.setdefault(ranks, {})[rank] = file
    whole = {
        ranks: [found[i] for i in sorted(found)] for ranks, found in parts.items() if len(found) == ranks
    }
    return whole.get(world) or next(iter(whole.values()), []), bad


def _chunks(start: int, ends: list[int]) -> list[tuple[int, int]]:
    spans = zip([start, *ends], ends, strict=False)
    return [(i, min(i + CHUNK, end)) for first, end in spans for i in range(first, end, CHUNK)]


def _name(start: int, key: int) -> str:
    return f"step-{start:06d}-{key:08x}"


def _stem(chunk: tuple[int, int]) -> str:
    return f"steps-{chunk[0]:06d}-{chunk[1]:06d}"


def _checksum(content: bytes, file: Path, key: int) -> str:
    """Of a file's content, its place and the run's key: what was put there from elsewhere has another one."""
    place = [file.parent.name, *file.name.split(".")[:2]]
    return f"{zlib.crc32(content, zlib.crc32(repr(place).encode(), key)):08x}"


def _is_whole(file: Path, content: bytes, key: int) -> bool:
    return file.name.endswith(f".{_checksum(content, file, key)}.jsonl")
