"""The two scripts differ in some flags, the maths and the update alone: what should be equal is."""

import difflib
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TOY

import evaluate
import train_dpo
import train_grpo

DPO, GRPO = ((ROOT / f"train_{name}.py").read_text().replace(name, "NAME").replace(name.upper(), "NAME")
             for name in ("dpo", "grpo"))  # fmt: skip
OWN_FLAGS = {  # another default, help or meaning, or there in one script only
    "--sync-ref", "--samples-per-prompt", "--lr", "--adam-eps", "--beta", "--seed",
    "--std-norm", "--loss-norm", "--clip-low", "--clip-high", "--is-cap",
    "--all-pairs", "--nll-weight", "--length-normalize", "--entropy-weight", "--grpo-weight",
}  # fmt: skip


def blocks(script):
    """The parts of main() by the first word of their heading: `# 2 data: why` or `# ---- sync: why`."""
    parts = re.split(r"^ +# (?:\d|----) (\w+).*\n", script, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def flags(script):
    return dict(re.findall(r'^    add\("(--[\w-]+)"(.*?)\)\n(?=    [a#])', script, flags=re.M | re.S))


def test_the_same_headings_in_the_same_order():
    steps = ["sync", "sample", "score", "update", "log"]
    assert list(blocks(DPO)) == list(blocks(GRPO))
    assert [name for name in blocks(DPO) if name in steps] == steps


def test_blocks_that_should_be_equal_are():
    for name in ["processes", "data", "sampler", "optimizer", "sync", "sample", "export"]:
        assert blocks(DPO)[name] == blocks(GRPO)[name], name


def test_flags_that_should_be_equal_are_and_stand_in_the_same_order():
    dpo, grpo = (
        [(name, text) for name, text in flags(script).items() if name not in OWN_FLAGS]
        for script in (DPO, GRPO)
    )
    assert len(dpo) > 25 and dpo == grpo


def test_seven_lines_in_ten_are_the_same():
    a, b = DPO.splitlines(), GRPO.splitlines()
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    assert same / max(len(a), len(b)) >= 0.7


# the paper's Table 4, maths, and what results/toy/ was trained with
TABLE_4 = {"lr": 1e-6, "grad_clip": 0.1, "prompts_per_step": 64, "max_new_tokens": 2048, "temperature": 1.0}
OF_THE_TOY = {"lr": 2e-4, "grad_clip": 1.0, "prompts_per_step": 32, "max_new_tokens": 8, "temperature": 1.0}
OF_DPO = ({"beta": 0.1, "adam_eps": 1e-4, "sync_ref": True}, {"beta": 3.0, "adam_eps": 1e-8})
OF_GRPO = ({"beta": 0.001, "sync_ref": False, "std_norm": False, "loss_norm": "sum"}, {"std_norm": True})


@pytest.mark.parametrize(("script", "own"), [(train_dpo, OF_DPO), (train_grpo, OF_GRPO)])
def test_a_model_that_is_named_gets_the_papers_values_and_the_toy_its_own(script, own, capsys):
    named = vars(script.get_args(["--model", "org/8b", "--data", "rows.jsonl"]))
    wanted = TABLE_4 | own[0]
    assert {name: named[name] for name in wanted} == wanted
    assert (named["model"], named["data"], named["eval_data"]) == ("org/8b", ["rows.jsonl"], [])
    assert named["eval_every"] == 0  # the toy's sums say nothing about another model
    toy = vars(script.get_args([]))
    wanted = OF_THE_TOY | own[1]
    assert {name: toy[name] for name in wanted} == wanted
    assert [Path(toy["model"]).resolve(), Path(toy["data"][0]).resolve()] == [TOY, TOY.parent / "train.jsonl"]
    logged = json.loads((ROOT / "results/toy" / f"{script.__name__[6:]}-s10-seed0/args.json").read_text())[
        "args"
    ]
    changed = {name for name in logged.keys() & toy.keys() if str(logged[name]) != str(toy[name])}
    # the flags of results/sweep.sh, and one that only a GPU knows
    assert changed == {"steps", "sync_steps", "log_samples", "out", "gpu_memory"}
    with pytest.raises(SystemExit):
        script.get_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "(default: 1e-06; without --model 0.0002)" in shown and "(default: 2048; without --model 8)" in shown
    )


def test_an_evaluation_takes_over_the_lengths_and_the_date_of_a_run(tmp_path):
    flags = {"max_prompt_tokens": 77, "max_new_tokens": 99, "date": "2025-06-26", "lr": 1.0}
    (tmp_path / "args.json").write_text(json.dumps({"args": flags}))
    (tmp_path / "model").mkdir()
    for model, more, wanted in (
        (tmp_path, [], (77, 99, "2025-06-26")),
        (tmp_path / "model", ["--max-new-tokens", "5"], (77, 5, "2025-06-26")),
        ("org/8b", [], (1024, 2048, None)),
        (None, [], (24, 8, None)),
    ):
        args = evaluate.get_args([*(["--model", str(model), "--data", "rows.jsonl"] if model else []), *more])
        assert (args.max_prompt_tokens, args.max_new_tokens, args.date) == wanted
