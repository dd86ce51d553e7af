"""Machines die, disks fill up, ranks get lost, gradients overflow: what is left, and that it can go on."""

import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentError, Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from conftest import ROOT, SUMS
from safetensors.torch import load_file
from test_resume import assert_same, metrics
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import checkpoint
from checkpoint import Checkpoints, Progress, find_checkpoint
from flags import Flags
from policy import Reference
from window import SAMPLING, Rollouts

SHORT = "--prompts-per-step 5 --samples-per-prompt 4 --sync-steps 4 --sampler hf".split()
SHORT += ["--data", str(SUMS), "--eval-every", "0", "--log-samples", "-1"]


def start(*flags, program=ROOT / "train_dpo.py", ranks=0):
    """A run in a session of its own; its console is in `.console` once `finish` has seen the end."""
    command = [sys.executable, program]
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, program]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, [*command, *SHORT, *flags])], **pipes, start_new_session=True)


def finish(process, seconds=100):
    """(exit code, console without progress bars)"""
    try:
        console = process.communicate(timeout=seconds)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = re.split(r"[\r\n]+", console)
    return process.returncode, "\n".join(line for line in lines if not re.search("it/s|s/it", line))


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-2000:]
        time.sleep(0.02)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the disk of a killed process, and of a broken one


@pytest.fixture
def save(policy, tmp_path):
    """Saves a policy whose parameters are all `value`, with Adam's moments."""
    optimizer = torch.optim.AdamW(policy.parameters())
    facts = {"args": {"beta": 1, "steps": 9}}
    run = SimpleNamespace(directory=tmp_path, facts=facts, sizes=lambda: {}, say=print, args=Namespace())
    args = Namespace(model="toy", steps=99, **dict.fromkeys(SAMPLING))
    prompts = SimpleNamespace(fingerprint=0)
    parts = {"policy": policy, "reference": Reference(None, follows=False), "optimizer": optimizer}
    checkpoints = Checkpoints(run, prompts, window=Rollouts(tmp_path, args, prompts), **parts)

    def save(step, keep=2):
        with torch.no_grad():
            for p in policy.parameters():
                p.fill_(step)
                p.grad = torch.ones_like(p)
        optimizer.step()
        run.args.keep = keep
        checkpoints.save(Progress(step))

    save.load, save.optimizer = checkpoints.load, optimizer
    return save


def resume(where, **flags):
    args = {"resume": str(where), "out": None, "steps": 9, "beta": 1, "fresh": 5} | flags
    asked = Flags(**args)
    asked.defaults = {"beta": 2, "fresh": 5}
    return find_checkpoint(asked)


def shards(directory):
    """Name -> tensor of a checkpoint, as torch's own converter reads it."""
    dcp_to_torch_save(directory, directory.with_suffix(".pt"))
    found = torch.load(directory.with_suffix(".pt"))
    directory.with_suffix(".pt").unlink()
    return found


class Killed(BaseException):
    """Nothing catches it and no buffer is left unwritten: the disk is as after SIGKILL."""


STAGES = [
    (checkpoint, "_write"), (checkpoint, "_sync"), (checkpoint, "write_tensors"), (checkpoint.dcp, "save"),
    (shutil, "rmtree"), (Path, "rename"), (Path, "mkdir"),
]  # fmt: skip


class Reaper:
    """Kills at the n-th of the calls that it watches, before or after it has done its work."""

    def __init__(self, at: int, when: str):
        self.at, self.when, self.calls, self.inside = at, when, 0, False

    def watch(self, real):
        def call(*args, **kwargs):
            if self.inside:  # torch's saving is one stage
                return real(*args, **kwargs)
            self.calls += 1
            if self.calls == self.at and self.when == "before":
                raise Killed
            self.inside = True
            try:
                result = real(*args, **kwargs)
            finally:
                self.inside = False
            if self.calls == self.at:
                raise Killed
            return result

        return call


def test_a_checkpoint_of_the_same_step_is_replaced(save, tmp_path):
    save(3)
    first = shards(tmp_path / "checkpoints" / "step-000003")
    save(3)
    assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    second = shards(resume(tmp_path).directory)
    assert second.keys() == first.keys()
    moment = "exp_avg.model.norm.weight"  # the second update is in it: 0.1, then 0.19
    assert (first[moment] < 0.11).all() and (second[moment] > 0.18).all()


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_stage_of_saving(save, tmp_path, when):
    """A checkpoint is found whole or not at all, and the one before stays until then."""
    whole = [step for step in (1, 2) if not save(step)]
    killed = True
    for step in range(3, 99):
        if not killed:  # the last save ran through
            break
        reaper = Reaper(step - 2, when)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in STAGES:
                patch.setattr(owner, name, reaper.watch(getattr(owner, name)))
            try:
                save(step)
                killed = False
            except Killed:
                pass
        found = resume("auto", out=tmp_path, steps=99)
        if not killed or found.state["step"] == step:  # killed after the renaming, it is there
            whole.append(step)
        assert found.state["step"] == whole[-1]
        assert checkpoint._fault(found.directory) is None
        for name, tensor in shards(found.directory).items():
            if name.startswith("policy."):
                assert (tensor - found.state["step"]).abs().max() < 0.1, name
    assert step - 4 >= 9, "there are more stages than that to be killed at"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in whole[-2:]
    ]


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(save, tmp_path, capsys, name, damage):
    save(1)
    save(2)
    newest = tmp_path / "checkpoints" / "step-000002"
    damage(newest / name)
    assert resume("auto", out=tmp_path).state["step"] == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{newest}: ") and f"going on from {newest.with_name('step-000001')}" in said
    assert name.split(".")[0] in said or damage is flip  # a bit of the manifest may be another file's entry
    with pytest.raises(ArgumentError, match="nothing to go on from"):
        resume(newest)
    assert resume(tmp_path).state["step"] == 1


def test_old_checkpoints_go_and_a_run_that_goes_back_puts_later_ones_aside(save, policy, tmp_path):
    for step in (1, 2, 3, 4):
        save(step, keep=3)
    folder = tmp_path / "checkpoints"
    assert [d.name for d in sorted(folder.iterdir())] == ["step-000002", "step-000003", "step-000004"]
    found = resume(folder / "step-000002")
    assert save.load(found).step == 2
    for p in policy.parameters():
        assert (p - 2).abs().max() < 0.1 and save.optimizer.state[p]["exp_avg"].min() > 0.05
        assert save.optimizer.state[p]["step"] == 2
    names = ["step-000002", "step-000003.aside", "step-000004.aside"]
    assert [d.name for d in sorted(folder.iterdir())] == names
    assert resume("auto", out=tmp_path).state["step"] == 2


def test_a_flag_that_an_older_run_did_not_have_counts_as_its_default(save, tmp_path):
    save(1)
    assert resume(tmp_path, fresh=5).state["step"] == 1
    with pytest.raises(ArgumentError, match=r"another run with --fresh 6 \(was 5\)"):
        resume(tmp_path, fresh=6)
    with pytest.raises(ArgumentError, match=r"another run with --beta 2 \(was 1\)"):
        resume(tmp_path, beta=2)  # the run had it, so that its default does not count


def test_a_flag_that_only_an_older_run_has_must_have_been_off(save, tmp_path):
    state = tmp_path / "checkpoints" / "step-000001" / "state.json"
    for value, known in ((0.0, True), (0.5, False)):
        save(1)
        facts = json.loads(state.read_text())
        facts["facts"]["args"]["gone"] = value
        rewrite(state, facts)
        if known:
            assert resume(tmp_path).state["step"] == 1
        else:
            with pytest.raises(
                ArgumentError, match=r"the run has --gone 0.5, which this script does not know"
            ):
                resume(tmp_path)


def test_a_field_that_an_older_state_does_not_have_is_that_of_a_new_run(save, tmp_path):
    save(1)
    state = tmp_path / "checkpoints" / "step-000001" / "state.json"
    fields = json.loads(state.read_text())
    for name in ("skipped", "skipped_in_a_row", "first", "generators"):
        del fields[name]
    rewrite(state, fields)
    progress = save.load(resume(tmp_path))
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (1, 0, 0)
    assert progress.first[0] == "accuracy" and math.isnan(progress.first[1])


def rewrite(state, fields):
    """With the manifest's entry for it."""
    state.write_text(json.dumps(fields))
    manifest = json.loads((state.parent / "manifest.json").read_text())
    manifest["state.json"] = [state.stat().st_size, xxhash.xxh3_64_hexdigest(state.read_bytes())]
    (state.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("what", ["checkpoint", "metrics.jsonl"])
def test_a_full_disk_stops_the_run_with_a_line(script, tmp_path, what):
    """No file may grow beyond a limit that is set in mid-run: what a full disk does, without one."""
    run = tmp_path / "run"
    flags = ["--steps", 9, "--out", run, "--save-every", 3, "--prompts-per-step", 40]
    process = start(*flags)
    wait_for((run / "checkpoints" / "step-000003").exists, process)
    size = 10**6 if what == "checkpoint" else (run / "metrics.jsonl").stat().st_size + 100
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    code, console = finish(process)
    assert code == 1 and "Traceback" not in console
    [said] = [line for line in console.splitlines() if "cannot be written" in line]
    assert said.startswith("stopped: ") and what in said and "file too large" in said.lower()
    assert [d.name for d in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert [m["step"] for m in lines(run / "metrics.jsonl")] == list(range(len(lines(run / "metrics.jsonl"))))
    script("train_dpo.py", *SHORT, *flags, "--resume", "auto")
    assert len(lines(run / "metrics.jsonl")) == 9 and (run / "model" / "model.safetensors").exists()


# ---- signals


@pytest.fixture(scope="module")
def straight(script, tmp_path_factory):
    """A run of 12 steps that nothing happens to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    script("train_dpo.py", *SHORT, "--steps", 12, "--out", run)
    return run


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)]
)
def test_a_signal_saves_and_stops(number, ranks, straight, script, tmp_path):
    """Ctrl-C reaches all processes of the terminal, a preemption perhaps torchrun alone."""
    run = tmp_path / "run"
    flags = ["--steps", 12, "--out", run]
    process = start(*flags, "--save-every", 0, ranks=ranks)
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size, process)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    code, console = finish(process)
    assert code == (1 if ranks else 75)  # torchrun has a code of its own
    assert f"{number.name}: stopping after this step" in console
    assert f"saved; go on with --resume auto --out {run}" in console
    steps = len(lines(run / "metrics.jsonl"))
    assert [d.name for d in (run / "checkpoints").iterdir()] == [f"step-{steps:06d}"] and steps < 12
    if not ranks:
        script("train_dpo.py", *SHORT, *flags, "--resume", "auto")
        assert_same(straight, run)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_signal_while_a_long_window_is_sampled_keeps_its_chunks(ranks, script, tmp_path):
    """The ranks stop together after the chunk in hand; what goes on samples the rest, and nothing twice."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    flags = ["--steps", 30, "--sync-steps", "inf", "--prompts-per-step", 100]
    process = start(*flags, "--out", run, ranks=ranks)
    wait_for(lambda: [*run.glob("windows/*/*.jsonl")], process)
    (os.killpg if ranks else os.kill)(process.pid, signal.SIGTERM)
    code, console = finish(process)
    assert code == (1 if ranks else 75) and "SIGTERM: stopping after this step, or this chunk" in console
    assert f"saved; go on with --resume auto --out {run}" in console and not (run / "checkpoints").exists()
    kept = {file: file.stat().st_mtime_ns for file in run.glob("windows/*/*")}
    parts = max(1, ranks)
    assert len(kept) in (parts, 2 * parts) and all(file.suffix == ".jsonl" for file in kept)
    script("train_dpo.py", *SHORT, *flags, "--out", run, "--resume", "auto", ranks=ranks)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    script("train_dpo.py", *SHORT, *flags, "--out", straight, ranks=ranks)
    assert_same(straight, run)


def test_a_second_signal_ends_it_at_once(tmp_path):
    run = tmp_path / "run"
    process = start("--steps", 3, "--prompts-per-step", 4000, "--out", run)  # a step of half a minute
    wait_for((run / "args.json").exists, process)
    time.sleep(2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, console = finish(process, 20)
    assert code == 128 + signal.SIGTERM and time.monotonic() - began < 5
    assert "once more to stop at once" in console and not (run / "checkpoints").exists()


# ---- ranks

FAULTS = {
    "raises": "raise ValueError('a bug on rank 1')",
    "leaves": "raise sampler.SyncError('the sampler of rank 1 is stale')",
    "is killed": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_rank_ends_the_others(tmp_path, fault):
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport processes, rewards, sampler, train_dpo\n"
        "real, calls = rewards.Scorer.score, []\n"
        "def score(self, groups):\n    calls.append(1)\n"
        f"    if os.environ['RANK'] == '1' and len(calls) == 3:\n        {FAULTS[fault]}\n"
        "    real(self, groups)\n"
        "rewards.Scorer.score = score\nprocesses.launch(train_dpo.main)\n"
    )
    process = start("--steps", 2000, "--out", tmp_path / "run", program=program, ranks=2)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    began = time.monotonic()
    code, console = finish(process)
    assert code == 1 and time.monotonic() - began < 20
    assert "rank 0 ends too: another rank has left" in console
    said = {"raises": "ValueError: a bug on rank 1", "leaves": "the sampler of rank 1 is stale"}.get(
        fault, ""
    )
    assert said in console and console.count("[rank0]") == 0  # no traceback of the rank that is well
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_rank_without_prompts_takes_part(script, tmp_path):
    """One prompt a step for two ranks: the update is that of one rank."""
    flags = [*SHORT, "--steps", 3, "--prompts-per-step", 1, "--samples-per-prompt", 16]
    for ranks in (1, 2):
        script("train_dpo.py", *flags, "--out", tmp_path / str(ranks), ranks=ranks)
    one, two = (load_file(tmp_path / r / "model/model.safetensors") for r in ("1", "2"))
    assert sum(m["pairs"] for m in metrics(tmp_path / "1")) > 0
    for name in one:
        assert (one[name] - two[name]).norm() / one[name].norm() < 1e-5, name


def test_two_agents_are_like_one_with_two_ranks(script, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def agents(*flags):
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += [*rendezvous, "127.0.0.1", str(ROOT / "train_dpo.py"), *map(str, flags)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # torchrun's own choice for several ranks
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in "12"]
        for process in both:
            console = process.communicate(timeout=100)[1]
            assert process.returncode == 0, console[-2000:]

    flags = [*SHORT, "--steps", 6, "--save-every", 3]
    script("train_dpo.py", *flags, "--out", tmp_path / "one", ranks=2)
    agents(*flags, "--out", tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "model")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000006")
    agents(*flags, "--out", tmp_path / "two", "--resume", "auto")
    assert_same(tmp_path / "one", tmp_path / "two")


# ---- numbers that are not finite


@pytest.mark.parametrize(("name", "loss"), [("train_dpo", "dpo_loss"), ("train_grpo", "kl_to_reference")])
def test_updates_that_are_not_finite_are_skipped(script, tmp_path, name, loss):
    """Steps 1, 3 and 4 overflow: 1 is passed over, at the second in a row the run saves and stops."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport processes, {name} as script\n"
        f"real, steps = script.{loss}, iter([0, 1, 0, 1, 1, 0])\n"
        f"script.{loss} = lambda *args: real(*args) * (float('inf') if next(steps) else 1)\n"
        "processes.launch(script.main)\n"
    )
    run = tmp_path / "run"
    flags = [*SHORT, "--steps", 7, "--max-skipped", 2, "--save-every", 1, "--keep", 9, "--out", run]
    flags += ["--micro-batch-tokens", 99999]
    console = script(program, *flags, code=1).stderr
    assert "Traceback" not in console
    [said] = [line for line in console.splitlines() if line.startswith("stopped: ")]
    names = re.findall(rf"{SUMS} line (\d+)", said)
    assert "loss or gradient was not finite 2 times in a row" in said and len(names) == 5
    prompts = [lines(SUMS)[int(n) - 1]["prompt"] for n in names]
    assert prompts == [s["prompt"] for s in lines(run / "samples.jsonl") if s["step"] == 4][::4]
    got = lines(run / "metrics.jsonl")
    assert [m["skipped"] for m in got] == [0, 1, 1, 2, 3]
    assert [m["loss"] is None or m["grad_norm"] is None for m in got] == [False, True, False, True, True]
    saved = [shards(run / "checkpoints" / f"step-00000{step}") for step in (1, 2, 3, 4, 5)]
    parts = [[k for k in a if not k.startswith("reference")] for a in saved]
    pairs = zip(saved, saved[1:], parts, strict=False)
    same = [all(torch.equal(a[k], b[k]) for k in keys) for a, b, keys in pairs]
    assert same == [True, False, True, True]
    script(f"{name}.py", *flags, "--resume", "auto")
    assert [m["skipped"] for m in lines(run / "metrics.jsonl")] == [0, 1, 1, 2, 3, 3, 3]
