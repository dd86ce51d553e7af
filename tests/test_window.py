"""The completions of a window: which calls sample them, which files keep them, how they are found again."""

import json
import math
import os
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
from conftest import ROOT, TOY

from data import Completion, Prompts, load_prompts
from metrics import Sums
from window import Window, window_fault

CALM = SimpleNamespace(asked=False)


@pytest.fixture(scope="module")
def prompts(device, tokenizer):
    source = [str(ROOT / "toy" / "valid.jsonl")]
    sources, _ = load_prompts(source, tokenizer, len(tokenizer), 24, "2026-01-01")
    return Prompts(sources, None, 0)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """What a window asks of the sampler and of the policy, answered by `Sampler` below."""
    monkeypatch.setattr("window.sample", lambda sampler, rows, n, args, first: sampler.sample(rows, first))
    monkeypatch.setattr("window.self_test", lambda sampler, policy, groups: sampler.test(groups))


@pytest.fixture
def open_window(prompts, tmp_path):
    """A new window of a run of `steps` steps in `name`, on one of `world` ranks."""

    def make(s=25, steps=60, rank=0, world=1, seed=0, name="run"):
        args = Namespace(
            model=str(TOY), data_weights=None, date="2026-01-01", prompts_per_step=5, samples_per_prompt=2,
            max_new_tokens=8, temperature=1.0, sampler="hf", seed=seed, sync_steps=s, steps=steps,
        )  # fmt: skip
        window = Window(tmp_path / name, args, prompts)
        window.rank, window.world = rank, world
        return window

    return make


class Sampler:
    """Writes the number of the call, the row's place in it, and the sample's; notes its calls."""

    def __init__(self, text=""):
        self.calls, self.tested, self.text = [], [], text

    def sample(self, rows, first):
        self.calls.append(first)
        logps = lambda i: [-0.1, -1 / 3, -math.pi * i]  # noqa: E731
        text = f"{self.text}{first}"
        return [
            (row, [Completion([first, i, k], logps(i), text, "stop", 0) for k in (0, 1)])
            for i, row in enumerate(rows)
        ]

    def test(self, groups):
        self.tested.append(len(groups))
        return {"gap": 0.5}

    def fill(self, window, step, interrupt=CALM):
        """What the window added to a step's sums, and whether it is all there."""
        sums = Sums([])
        done = window.fill(step, self, None, interrupt, sums)
        assert done == (not window.missing(step))
        return sums


def whole(window, steps=None):
    """(row, ids and log-probs of its completions) of each step."""
    steps = range(window.start, window.end) if steps is None else steps
    return {i: [(row, [(c.ids, c.logps) for c in cs]) for row, cs in window[i]] for i in steps}


def files(window):
    return sorted(window._directory.glob("*.jsonl"))


def test_all_of_a_window_is_sampled_at_its_start_in_calls_of_ten_steps(open_window, prompts):
    window, sampler = open_window(), Sampler()
    assert window.end == 0  # so that the first window begins with step 0
    window.begin(0)
    sums = sampler.fill(window, 0)
    assert (window.start, window.end, sampler.calls) == (0, 25, [0, 10, 20])
    assert sampler.tested == [50]  # the first call's completions, once
    assert sums["sampled"] == 25 * 5 * 2 * 3 and sums.notes == {"gap": 0.5} and sums.seconds["write"] > 0
    for step, groups in whole(window).items():
        assert [row for row, _ in groups] == prompts.take(step * 5, 5)
        first = step // 10 * 10
        assert [[ids for ids, _ in cs] for _, cs in groups] == [
            [[first, (step - first) * 5 + i, k] for k in (0, 1)] for i in range(5)
        ]
    assert sampler.fill(window, 1)["sampled"] == 0 and sampler.calls == [0, 10, 20]

    window.begin(25)
    sampler.fill(window, 25)
    assert (window.end, sampler.calls[3:]) == (50, [25, 35, 45])
    window.begin(50)  # the run ends before the window does
    sampler.fill(window, 50)
    assert (window.end, sampler.calls[6:]) == (60, [50])
    assert not files(window), "a window of one call stays in memory"
    assert [window.on_policy(step) for step in (50, 51)] == [True, False]


def test_a_chunk_is_lines_of_rollouts_without_rewards(open_window, prompts):
    """Also where they are scored by the time that a checkpoint asks for them."""
    window, sampler = open_window(s=4), Sampler()
    window.begin(4)
    sampler.fill(window, 4)
    for _, completions in window[4]:
        completions[0].reward = 1.0
    window.save(8)  # nothing of it is left after step 7
    assert not files(window)
    window.save(5)
    [file] = files(window)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [4] * 5 + [5] * 5 + [6] * 5 + [7] * 5
    for line, row in zip(lines, prompts.take(20, 20), strict=True):
        assert (line["prompt"], line["ids"], line["answer"]) == (row.prompt, row.ids, row.answer)
        assert [c["reward"] for c in line["completions"]] == [None, None]
    again = open_window(s=4)
    again.restore(5, window.state(), print)
    assert whole(again, (5, 6, 7)) == whole(window, (5, 6, 7)) and not again.missing(5)


@pytest.mark.parametrize(("wrote", "reads"), [(2, 1), (1, 2), (3, 2), (2, 2)])
def test_what_other_ranks_wrote_is_dealt_out_anew(open_window, prompts, wrote, reads):
    for rank in range(wrote):
        window = open_window(rank=rank, world=wrote)
        window.begin(0)
        Sampler().fill(window, 0)
    for rank in range(reads):
        window = open_window(rank=rank, world=reads)
        window.restore(3, {"start": 0, "ends": [25], "key": window.key}, print)
        assert not window.missing(3)
        for step, groups in whole(window, range(3, 25)).items():
            assert [row for row, _ in groups] == prompts.take(step * 5, 5)[rank::reads]
            for i, (_, [(ids, _), _]) in enumerate(groups):
                place = rank + i * reads
                of_rank = len(range(place % wrote, 5, wrote))
                assert ids == [step // 10 * 10, step % 10 * of_rank + place // wrote, 0]


def test_a_signal_leaves_what_is_sampled_and_the_next_run_goes_on(open_window):
    window, sampler = open_window(), Sampler()
    window.begin(0)
    sampler.fill(window, 0, SimpleNamespace(asked=True))
    assert sampler.calls == [0] and window.missing(0) == [(10, 20), (20, 25)]
    again = open_window()
    again.restore(0, None, print)
    again.begin(0)
    assert sampler.fill(again, 0).notes == {"gap": 0.5}  # the first completions are compared again
    assert sampler.calls == [0, 10, 20] and sampler.tested == [50, 50]
    straight = open_window(name="straight")
    straight.begin(0)
    Sampler().fill(straight, 0)
    assert whole(again) == whole(straight)
    assert [f.read_bytes() for f in files(again)] == [f.read_bytes() for f in files(straight)]
    assert [f.name for f in files(again)] == [f.name for f in files(straight)]


def truncate(path, _):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, _):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path, _):
    path.write_bytes(b"")


def foreign(path, other):
    """The same steps of a run with another seed, under the name that is looked for, and under its own."""
    path.unlink()
    shutil.copy(other, path)
    shutil.copy(other, path.parent)


def moved(path, _):
    """Another chunk of the same window."""
    other = next(file for file in path.parent.iterdir() if "000000-" in file.name)
    path.unlink()
    shutil.copy(other, path.with_name(other.name.replace("000000-000010", "000010-000020")))


@pytest.mark.parametrize("damage", [truncate, flip, empty, foreign, moved])
def test_a_damaged_or_foreign_chunk_is_named_and_sampled_anew(open_window, damage, capsys):
    window, other = open_window(), open_window(seed=1, name="other")
    for each, text in ((window, ""), (other, "other ")):
        each.begin(0)
        Sampler(text).fill(each, 0)
    wanted = [file.read_bytes() for file in files(window)]
    damage(files(window)[1], files(other)[1])
    again, sampler = open_window(), Sampler()
    again.restore(12, window.state(), print)
    said = capsys.readouterr().out
    assert f"{window._directory}/steps-000010-000020" in said and "sampled anew" in said
    sampler.fill(again, 12)
    assert sampler.calls == [10] and [file.read_bytes() for file in files(again)] == wanted


def test_a_first_chunk_that_is_sampled_anew_later_is_not_compared_with_the_policy_of_then(open_window):
    """The sampler has --model's weights then, and the policy has not any more."""
    window, sampler = open_window(), Sampler()
    window.begin(0)
    sampler.fill(window, 0)
    files(window)[0].unlink()
    again = open_window()
    again.restore(5, window.state(), print)
    sampler.fill(again, 5)
    assert sampler.calls == [0, 10, 20, 0] and sampler.tested == [50] and not again.missing(5)
    assert whole(again, range(5, 25)) == whole(window, range(5, 25))


def test_a_window_with_other_weights_than_the_models_cannot_be_filled_in(open_window, tmp_path):
    window = open_window()
    window.begin(25)
    Sampler().fill(window, 25)
    state, run = window.state(), tmp_path / "run"
    assert window_fault(run, state, 36) is None
    files(window)[0].unlink()
    assert window_fault(run, state, 36) is None  # its steps are done
    flip(files(window)[0], None)
    assert "steps-000035-000045" in window_fault(run, state, 36)
    files(window)[0].unlink()
    assert window_fault(run, state, 36).endswith("steps-000035-000045: not there")
    assert window_fault(run, state, 45) is None
    assert window_fault(run, state, 25) is None  # at its sync everything can be sampled again
    assert window_fault(run, state | {"start": 0}, 36) is None  # and of --model's weights always


def test_more_steps(open_window):
    """The first window goes on with --model's weights, a later one ends where it was to end."""
    window, sampler, said = open_window(s=math.inf, steps=25), Sampler(), []
    window.begin(0)
    sampler.fill(window, 0)
    longer = open_window(s=math.inf, steps=48)
    longer.restore(25, window.state(), said.append)
    assert (longer.start, longer.end, longer.missing(25), said) == (0, 48, [(25, 35), (35, 45), (45, 48)], [])
    sampler.fill(longer, 25)
    assert sampler.calls == [0, 10, 20, 25, 35, 45]
    again = open_window(s=math.inf, steps=48)
    again.restore(30, longer.state(), said.append)
    assert not again.missing(30) and whole(again, range(25, 48)) == whole(longer, range(25, 48))

    window = open_window(s=30, steps=45, name="later")
    window.begin(30)
    Sampler().fill(window, 30)
    longer = open_window(s=30, steps=90, name="later")
    longer.restore(40, window.state(), said.append)
    assert (longer.start, longer.end, longer.missing(40)) == (30, 45, [])
    assert said == ["the window of steps 30 to 44 ends where --steps ended it: a new one begins at step 45"]


def test_windows_of_an_abandoned_future_and_of_other_runs_go(open_window, tmp_path):
    for start in (0, 25, 50):
        window = open_window(steps=99)
        window.begin(start)
        Sampler().fill(window, start)
        (tmp_path / "run" / "checkpoints" / f"step-{start + 1:06d}").mkdir(parents=True)
        state = {"step": start + 1, "window": window.state()}
        (tmp_path / "run" / "checkpoints" / f"step-{start + 1:06d}" / "state.json").write_text(
            json.dumps(state)
        )
    folder, key = tmp_path / "run" / "windows", f"{window.key:08x}"
    names = lambda: sorted(directory.name for directory in folder.iterdir())  # noqa: E731
    assert names() == [f"step-{start:06d}-{key}" for start in (0, 25, 50)]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000001")
    window.forget()  # no checkpoint falls inside the first one any more
    assert names() == [f"step-{start:06d}-{key}" for start in (25, 50)]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    said = []
    open_window(seed=1).restore(0, None, said.append)
    assert names() == [] and len(said) == 2 and "of another model, other rows or other flags" in said[0]

    window, folder_of = open_window(steps=99), lambda start: folder / f"step-{start:06d}-{key}"
    window.begin(25)
    Sampler().fill(window, 25)
    for state in ({"start": 0, "ends": [25], "key": window.key}, window.state()):
        shutil.copytree(folder_of(25), folder_of(50))
        again = open_window(steps=99)
        again.restore(25, state, said.append)  # at its sync: the chunks are of weights that are there
        assert names() == [f"step-000025-{key}"] and again.end == 25
        again.begin(25)
        assert not again.missing(25)
    open_window(steps=99).restore(24, {"start": 0, "ends": [25], "key": window.key}, said.append)
    assert names() == [] and len(said) == 2
