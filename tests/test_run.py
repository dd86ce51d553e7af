"""The model card, and the loggers that are asked for by flag."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SUMS

from export import model_card
from metrics import Sums
from run import Run

FACTS = {
    "args": {
        "model": "org/base", "data": ["a.jsonl", "org/set"], "rollouts": None, "sync_steps": "inf",
        "steps": 7,
    },
    "command": ["/somewhere/train_grpo.py", "--model", "org/base", "--out", "a b"],
    "ranks": 2, "commit": "abc", "versions": {"torch": "2"},
}  # fmt: skip


def test_the_card_names_base_data_command_and_results():
    card = model_card(FACTS, {"accuracy after": 0.51234, "reward": 0.5})
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert head.splitlines() == [
        "base_model: org/base", "library_name: transformers", "pipeline_tag: text-generation",
        "tags:", "- reinforcement-learning", "- grpo",
    ]  # fmt: skip
    assert (
        "Data: a.jsonl, org/set. The sampler kept its first weights." in body
        and "train_grpo.py --model org/base --out 'a b'\n" in body
    )
    assert "| accuracy after | 0.5123 |\n| reward | 0.5 |\n" in body
    assert (
        "2 rank(s), at commit abc" in body and "Licence: yet to be chosen" in body and "license:" not in head
    )


def test_a_local_base_model_is_no_hub_name(tmp_path):
    card = model_card(FACTS | {"args": FACTS["args"] | {"model": str(tmp_path)}}, {})
    assert "\nbase_model:" not in card


def sums_of(groups):
    sums = Sums(["exact", "judge", "math", "rm"])
    sums.add_groups(0, groups)
    return sums


def test_a_reward_that_fails_is_seen_beside_one_that_does_not():
    """16 completions without a judgement, 48 scored sums: a quarter of all, but all of the chats."""
    c = lambda reward, length=3: SimpleNamespace(reward=reward, ids=[1] * length, finish="stop", version=0)  # noqa: E731
    chats = [(SimpleNamespace(reward="judge"), [c(None) for _ in range(4)]) for _ in range(4)]
    right = [(SimpleNamespace(reward="exact"), [c(1.0) for _ in range(4)]) for _ in range(12)]
    run = SimpleNamespace(args=SimpleNamespace(max_failed=0.5, max_skipped=3))
    well = SimpleNamespace(skipped_in_a_row=0)
    assert Run.reason_to_stop(run, sums_of(right), well, []) is None
    code, said = Run.reason_to_stop(run, sums_of(chats + right), well, [])
    assert code == 1 and said.startswith("16 of 16 completions of the last step have no reward `judge`")


def test_the_reward_per_token_is_over_the_chats_tokens():
    c = lambda reward, length: SimpleNamespace(reward=reward, ids=[1] * length, finish="stop", version=0)  # noqa: E731
    groups = [(SimpleNamespace(reward="rm"), [c(5.0, 100)])] * 4
    groups += [(SimpleNamespace(reward="math"), [c(1.0, 900)])] * 16
    metrics = sums_of(groups).validation_metrics()
    assert metrics["eval/reward_per_token"] == 0.05 and metrics["eval/length"] == 740
    assert metrics["eval/accuracy"] == 1 and metrics["eval/reward"] == 5


FAKE_WANDB = """
import json
class Run:
    def log(self, metrics, step):
        print("logged", json.dumps([step, metrics]), file=out)
    def finish(self):
        print("finished", file=out)
def init(project, name, config, dir, id, resume):
    global out
    out = open("wandb.txt", "w", buffering=1)
    print(project, name, config["sync_steps"], id, resume, file=out)
    return Run()
"""


@pytest.fixture
def short(script, tmp_path):
    """A short run in a directory of its own, in which it looks for modules first. before: a program's lines
    that come before it.
    """
    valid = SUMS.read_text().splitlines(keepends=True)
    (tmp_path / "valid.jsonl").write_text("".join(valid[:8]))

    def run(*flags, before="", code=0):
        main = "import processes, train_grpo\nprocesses.launch(train_grpo.main)\n"
        path = f"import sys\nsys.path.insert(1, {str(ROOT)!r})\n"
        (tmp_path / "program.py").write_text(path + before + main)
        common = ["--sampler", "hf", "--steps", "2", "--eval-every", "2", "--prompts-per-step", "4"]
        common += ["--data", SUMS, "--eval-data", "valid.jsonl", "--out", "run"]
        return script(tmp_path / "program.py", *common, *flags, cwd=tmp_path, code=code)

    return run


def test_wandb_gets_what_the_file_gets(short, tmp_path):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    done = short("--wandb", "proj")
    first, *logged, last = (tmp_path / "wandb.txt").read_text().splitlines()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    number = json.loads((tmp_path / "run" / "args.json").read_text())["id"]  # a resumed run keeps it
    assert first == f"proj run 1 {number} allow" and last == "finished"
    assert [json.loads(line.removeprefix("logged ")) for line in logged] == [[m["step"], m] for m in metrics]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| accuracy after | {metrics[-1]['eval/accuracy']:.4g} |" in card and "--wandb proj" in card
    assert "--wandb" not in done.stderr


def test_memory_of_a_gpu_is_counted_without_the_samplers_pool(monkeypatch):
    resets, gib = [], 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 * gib)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    metrics = sums_of([]).metrics(pool=30 * gib)
    assert (metrics["memory/held_gib"], metrics["memory/peak_gib"]) == (60, 40)
    assert resets == [1]  # so that the next step's peak is its own


def records(data: bytes):
    """Those of a .wandb file, LevelDB's log format: in blocks of 32 KiB, after a header of 7 bytes, pieces of
    a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    place, record = 7, b""
    while place + 7 < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def history(directory):
    """(id, {step: metrics}) of the offline run that W&B has written in a directory since the last look."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = directory.glob("wandb/offline-run-*/run-*.wandb")
    steps, name = {}, None
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        name = record.run.run_id or name
        pairs = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        if pairs:
            metrics = {key: json.loads(value) for key, value in pairs.items() if not key.startswith("_")}
            steps.setdefault(json.loads(pairs["_step"]), {}).update(metrics)
    shutil.rmtree(directory / "wandb")
    return name, steps


def test_the_real_wandb_gets_what_the_file_gets_also_from_a_resumed_run(short, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found, names = {}, set()
    for steps in ("2", "4"):
        short("--wandb", "proj", "--resume", "auto", "--save-every", "2", "--steps", steps)
        name, logged = history(tmp_path / "run")
        names.add(name)
        for step, metrics in logged.items():
            found.setdefault(step, {}).update(metrics)
    wanted = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        wanted.setdefault(metrics["step"], {}).update(metrics)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for step, metrics in wanted.items():
        assert found[step] == pytest.approx(metrics)
    assert names == {json.loads((tmp_path / "run" / "args.json").read_text())["id"]}


def test_tensorboard_gets_what_the_file_gets(short, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    short("--tensorboard")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "reward" in m]
    assert [event.step for event in events.Scalars("reward")] == [m["step"] for m in steps]
    assert [event.value for event in events.Scalars("reward")] == pytest.approx([m["reward"] for m in steps])
    assert len(events.Scalars("eval/accuracy")) == 2


@pytest.mark.parametrize(
    ("flags", "package"), [(["--wandb", "p"], "wandb"), (["--tensorboard"], "tensorboard")]
)
def test_a_missing_logger_is_one_line(short, tmp_path, flags, package):
    hide = f"""
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a)
"""
    done = short(*flags, before=hide, code=2)
    assert done.stderr.count("\n") == 1
    assert f"--{package}: not installed; `pip install {package}`" in done.stderr
    assert not (tmp_path / "run").exists()
