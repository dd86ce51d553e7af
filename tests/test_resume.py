"""A run that was cut off goes on bit for bit: metrics (times aside), samples, final weights."""

import json
import shutil

import pytest
import torch
from conftest import SUMS, TOY, require_vllm
from resume_matrix import CUTS, STEPS
from safetensors.torch import load_file

TIMES = ("time/", "tokens_per_second/", "memory/")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same(run, other):
    assert metrics(run) == metrics(other)
    for file in ("samples.jsonl", "model/model.safetensors"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def matrix(request, script, tmp_path_factory):
    directory = tmp_path_factory.mktemp(f"matrix{request.param}")
    valid = SUMS.read_text().splitlines(keepends=True)
    (directory / "valid.jsonl").write_text("".join(valid[:20]))
    script("tests/resume_matrix.py", directory, ranks=request.param)
    return directory


@pytest.mark.parametrize("name", ["train_dpo", "train_grpo"])
@pytest.mark.parametrize(("s", "cut"), [(s, cut) for s, cuts in CUTS.items() for cut in cuts])
def test_going_on_is_as_if_nothing_had_happened(matrix, name, s, cut):
    straight, again = matrix / f"{name}-{s}", matrix / f"{name}-{s}-{cut}"
    assert [m["step"] for m in metrics(straight) if "loss" in m] == list(range(STEPS))
    assert_same(straight, again)
    assert json.loads((again / "args.json").read_text())["resumed"] == [{"at": cut, "changed": {}}]
    toy = load_file(TOY / "model.safetensors")
    assert all(not torch.equal(toy[name], tensor) for name, tensor in weights(straight).items())


def test_with_vllm_and_two_ranks(torchrun, tmp_path):
    """Inside a window, which is on disk since the first checkpoint that fell inside it."""
    require_vllm()
    valid = SUMS.read_text().splitlines(keepends=True)
    (tmp_path / "valid.jsonl").write_text("".join(valid[:20]))
    flags = "--steps 9 --sync-steps 5 --prompts-per-step 5 --samples-per-prompt 4"
    flags = [*flags.split(), *"--eval-every 4 --save-every 1 --keep 9 --log-samples -1 --eval-data".split()]
    flags += [tmp_path / "valid.jsonl", "--data", SUMS]
    torchrun(2, "train_dpo.py", *flags, "--out", tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "again", ignore=shutil.ignore_patterns("model"))
    for later in (8, 9):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-00000{later}")
    torchrun(2, "train_dpo.py", *flags, "--out", tmp_path / "again", "--resume", "auto")
    assert_same(tmp_path / "straight", tmp_path / "again")
    assert [m["sync/age"] for m in metrics(tmp_path / "again") if "loss" in m] == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_two_ranks_go_on_as_one(script, tmp_path):
    """Shards are put together anew, and the unread part of the window is dealt out anew."""
    flags = "--steps 6 --sync-steps inf --prompts-per-step 5 --samples-per-prompt 4"
    flags = [*flags.split(), *"--eval-every 0 --save-every 2 --keep 3 --log-samples -1 --sampler hf".split()]
    flags += ["--data", SUMS]
    script("train_dpo.py", *flags, "--out", tmp_path / "two", ranks=2)
    shutil.copytree(tmp_path / "two", tmp_path / "one", ignore=shutil.ignore_patterns("model"))
    resume = ["--out", tmp_path / "one", "--resume", tmp_path / "one" / "checkpoints" / "step-000002"]
    script("train_dpo.py", *flags, *resume)
    assert (tmp_path / "one/samples.jsonl").read_bytes() == (tmp_path / "two/samples.jsonl").read_bytes()
    one, two = (torch.cat([t.flatten() for t in weights(tmp_path / r).values()]) for r in ("one", "two"))
    assert (one - two).norm() / two.norm() < 1e-5
    toy = torch.cat([t.flatten() for t in load_file(TOY / "model.safetensors").values()])
    assert (toy - two).norm() / two.norm() > 1e-3
    assert [d.name for d in sorted((tmp_path / "one/checkpoints").iterdir())] == [
        "step-000002", "step-000004", "step-000004.aside", "step-000006", "step-000006.aside",
    ]  # fmt: skip


def test_more_steps_fill_in_an_offline_window_and_end_another(script, tmp_path):
    flags = ["--sampler", "hf", "--prompts-per-step", 4, "--samples-per-prompt", 2, "--eval-every", 0]
    flags += ["--data", SUMS, "--log-samples", -1, "--save-every", 4]
    said, samples = {}, {}
    for s, first, steps in (("inf", 12, 25), (15, 20, 40)):
        for name, *more in ((f"{s}", first), (f"{s}", steps, "--resume", "auto"), (f"{s}-straight", steps)):
            out = ["--out", tmp_path / name, "--sync-steps", s, "--steps"]
            done = script("train_grpo.py", *flags, *out, *more)
            said[name, len(more)] = done.stdout
            text = (tmp_path / name / "samples.jsonl").read_text()
            samples[name] = [json.loads(line) for line in text.splitlines()]
    assert [line["sync/age"] for line in metrics(tmp_path / "inf")] == list(range(25))
    ages = [*range(15), *range(5), *range(15), *range(5)]
    assert [line["sync/age"] for line in metrics(tmp_path / "15")] == ages
    assert "a new one begins at step 20" in said["15", 3] and "a new one begins" not in said["inf", 3]
    # the first call was for the same ten steps; then the prompts are the same, the calls are not
    again, straight = samples["inf"], samples["inf-straight"]
    assert again[:80] == straight[:80] and len(again) == len(straight) == 200
    assert [s["prompt"] for s in again] == [s["prompt"] for s in straight]
    assert {s["version"] for s in again} == {0}


def clock_flags(directory):
    """A copy of the toy whose chat template writes the day of the month, and what a short run of it needs."""
    model = directory / "clock"
    shutil.copytree(TOY, model)
    template = (TOY / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }}:" + template)
    rows = SUMS.read_text().splitlines(keepends=True)
    (directory / "valid.jsonl").write_text("".join(rows[:20]))
    flags = f"--model {model} --data {SUMS} --eval-data {directory}/valid.jsonl --sampler hf"
    flags += (
        " --max-prompt-tokens 30 --max-new-tokens 7 --prompts-per-step 8 --samples-per-prompt 4 --lr 2e-4"
    )
    return (flags + " --beta 3 --save-every 2 --eval-every 2 --log-samples -1").split()


def test_steps_that_have_nothing_to_learn_from_are_no_updates_after_a_resume_either(script, tmp_path):
    """Two completions of one prompt are often equally right: then Adam's count of steps stays where it is."""
    flags = "--sampler hf --prompts-per-step 1 --samples-per-prompt 2 --save-every 4 --eval-every 0".split()
    flags += ["--data", SUMS]
    for name, *more in (("straight", 8), ("again", 4), ("again", 8, "--resume", "auto")):
        script("train_dpo.py", *flags, "--out", tmp_path / name, "--steps", *more)
    pairs = [line["pairs"] for line in metrics(tmp_path / "straight")]
    assert {0, 1} == {*pairs[:4]} == {*pairs[4:]}
    assert_same(tmp_path / "again", tmp_path / "straight")


@pytest.mark.parametrize("name", ["train_dpo.py", "train_grpo.py"])
def test_a_run_without_any_update_yet_is_saved_and_goes_on(script, name, tmp_path):
    """Four steps of sums of which none is right, saved after two: the optimizer then has no state at all."""
    rows = [{"prompt": f"{i}+1=", "reward": "exact", "answer": "never"} for i in range(20)]
    (tmp_path / "never.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--sampler", "hf", "--data", tmp_path / "never.jsonl", "--prompts-per-step", 2]
    flags += ["--save-every", 2, "--eval-every", 0]
    for out, *more in (("straight", 4), ("again", 2), ("again", 4, "--resume", "auto")):
        script(name, *flags, "--out", tmp_path / out, "--steps", *more)
    state = json.loads((tmp_path / "again/checkpoints/step-000002/state.json").read_text())
    assert state["updates"] == 0
    assert_same(tmp_path / "again", tmp_path / "straight")


def test_a_whole_experiment_has_the_date_of_its_start(script, tmp_path):
    """Today is another day than 2025-06-26 whenever this test runs: whoever forgets the date sees it."""
    flags, day = clock_flags(tmp_path), ["--date", "2025-06-26"]
    other = ["--date", "2025-06-27"]
    for name, steps, more in (("straight", 4, day), ("again", 2, day), ("other", 2, other)):
        script("train_dpo.py", *flags, "--steps", steps, "--out", tmp_path / name, *more)
    assert metrics(tmp_path / "other") != metrics(tmp_path / "again")  # the date is in the prompts

    again = ["--steps", 4, "--out", tmp_path / "again", "--resume", "auto"]
    refused = script("train_dpo.py", *flags, *again, *other, code=2)
    said = "would be another run with --date 2025-06-27 (was 2025-06-26)"
    assert said in refused.stderr
    script("train_dpo.py", *flags, *again)
    assert metrics(tmp_path / "again") == metrics(tmp_path / "straight")

    out = ["--data", tmp_path / "valid.jsonl", "--samples", 2, "--sampler", "hf", "--out"]
    script("evaluate.py", "--model", tmp_path / "again", *out, tmp_path / "evaluation")
    settings = json.loads((tmp_path / "evaluation" / "args.json").read_text())["settings"]
    wanted = {"date": "2025-06-26", "max_prompt_tokens": 30, "max_new_tokens": 7}
    assert {name: settings[name] for name in wanted} == wanted

    # of a model that is no run's, begun on that day and gone on with today
    lengths = ["--model", tmp_path / "clock", "--max-prompt-tokens", 30, "--max-new-tokens", 7]
    out.append(tmp_path / "of-a-model")
    script("evaluate.py", *lengths, *day, *out)
    done = script("evaluate.py", *lengths, *out)
    assert "40 of 40 completions are there already" in done.stdout
