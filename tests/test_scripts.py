"""The two scripts are siblings: what both have means the same. Defaults: the paper's, or the toy's."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, TOY

import evaluate
import train_dpo
import train_grpo

# flags of both whose default or advice is the algorithm's; GRPO's beta may be 0, which is no KL
OWN = {"--sync-ref", "--samples-per-prompt", "--lr", "--adam-eps", "--beta", "--out", "--seed"}


def declared(script):
    flags = {}
    script.add_flags(lambda name, **how: flags.update({name: how}))
    return flags


def test_shared_flags_are_declared_alike_and_in_the_same_order():
    dpo, grpo = declared(train_dpo), declared(train_grpo)
    shared = [name for name in dpo if name in grpo]
    assert len(shared) > 35 and shared == [name for name in grpo if name in dpo]
    assert {name for name in shared if dpo[name] != grpo[name]} == OWN
    for name in OWN:  # and these differ in nothing but that
        mine, other = (
            {k: v for k, v in flags[name].items() if k not in ("default", "help")} for flags in (dpo, grpo)
        )
        assert mine == other or name == "--beta"


def test_shared_flags_do_the_same(script, tmp_path):
    """Both scripts ask the same prompts at the same steps, reload at the same steps, and, as long as the
    sampler has its first weights, draw the same completions and log them alike.
    """
    flags = ["--sampler", "hf", "--steps", "5", "--sync-steps", "2", "--prompts-per-step", "4", "--seed", "3"]
    flags += [
        "--samples-per-prompt",
        "3",
        "--max-new-tokens",
        "6",
        "--temperature",
        "0.8",
        "--log-samples",
        "7",
    ]
    flags += ["--eval-every", "2", "--save-every", "2", "--keep", "1", "--warmup-steps", "2", "--lr", "1e-4"]
    found = []
    for algorithm in ("train_dpo", "train_grpo"):
        out = tmp_path / algorithm
        script(f"{algorithm}.py", *flags, "--out", out)
        samples, metrics = (
            [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
            for name in ("samples", "metrics")
        )
        places = [(s["step"], s["version"], s["prompt"]) for s in samples]
        first = [s for s in samples if s["version"] == 0]
        rates = {m["step"]: m["learning_rate"] for m in metrics if "loss" in m}
        validated = [m["step"] for m in metrics if "eval/accuracy" in m]
        kept = sorted(path.name for path in (out / "checkpoints").iterdir())
        found.append((places, first, rates, validated, kept, metrics[0]))
    assert found[0] == found[1]
    places, first, rates, validated, kept, _ = found[0]
    assert [place[:2] for place in places[::7]] == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4)]
    assert len(first) == 2 * 7 and validated == [0, 2, 4, 5] and kept == ["step-000004"]
    assert [*rates.values()] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4, 1e-4, 1e-4])


# the paper's Tables 4 and 5, maths, and what it leaves open; and what results/toy/ was trained with
TABLE_4 = {"lr": 1e-6, "grad_clip": 0.1, "prompts_per_step": 64, "max_new_tokens": 2048, "temperature": 1.0}
TABLE_4 |= {"samples_per_prompt": 8, "max_prompt_tokens": 1024, "weight_decay": 0.1, "warmup_steps": 0}
OF_THE_TOY = {"lr": 2e-4, "grad_clip": 1.0, "prompts_per_step": 32, "max_new_tokens": 8, "temperature": 1.0}
OF_DPO = ({"beta": 0.1, "adam_eps": 1e-4, "sync_ref": True}, {"beta": 3.0, "adam_eps": 1e-8})
OF_GRPO = ({"beta": 0.001, "sync_ref": False, "std_norm": False, "loss_norm": "sum"}, {"std_norm": True})
OF_GRPO[0]["adam_eps"] = 1e-8


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
    # the flags of results/paper_on_a_laptop.sh, and one that only a GPU knows
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
