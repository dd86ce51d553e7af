"""What the README says is so: its commands parse, its files exist, its table is the logs'."""

import contextlib
import json
import math
import re
import shlex
import subprocess
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import benchmark
import versus_trl

import data
import evaluate
import train_dpo
import train_grpo

README = (ROOT / "README.md").read_text()
BLOCKS = [block.removeprefix("\n") for block in README.split("```")[1::2]]  # every second piece is code


def expanded(block):
    """The block's commands with its shell variables in place."""
    values, commands = {}, []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda match: values[match[1]], line)
        assignment = re.fullmatch(r'(\w+)="(.*)"', line)
        if assignment:
            values[assignment[1]] = assignment[2]
        else:
            commands.append(line.split("  # ")[0])
    return commands


COMMANDS = [command for block in BLOCKS for command in expanded(block)]


SCRIPTS = {"train_dpo.py": train_dpo, "train_grpo.py": train_grpo, "evaluate.py": evaluate}
MEASURING = {"results/benchmark.py": benchmark, "results/versus_trl.py": versus_trl}


def test_every_command_parses():
    found = [(s, shlex.split(c.split(s)[1])) for c in COMMANDS for s in SCRIPTS if s in c]
    assert len(found) >= 24 and {script for script, _ in found} == set(SCRIPTS)
    for script, flags in found:
        SCRIPTS[script].get_args(flags)
    measured = [(s, shlex.split(c.split(s)[1])) for c in COMMANDS for s in MEASURING if s in c]
    assert {script for script, _ in measured} == set(MEASURING)
    for script, flags in measured:
        MEASURING[script].get_args(flags)
    prepared = [shlex.split(c.split("data.py")[1]) for c in COMMANDS if c.startswith("python data.py")]
    assert {flags[0] for flags in prepared} == {"numinamath", "wildchat", "math500", "amc23"}
    for flags in prepared:
        data.get_args(flags)


def test_the_recipes_have_the_papers_settings():
    """Table 4, by run directory; what a recipe reads, another command writes."""
    found = {}
    for command in COMMANDS:
        for name in ("train_dpo.py", "train_grpo.py"):
            if "runs/t" in command and name in command:
                args = SCRIPTS[name].get_args(shlex.split(command.split(name)[1]))
                found[args.out.name] = args
    assert len(found) == 14
    for name, args in found.items():
        maths = name.startswith(("t1", "t5")) or name == "t3-chat-then-maths"
        assert (args.lr, args.grad_clip, args.temperature) == (1e-6, 0.1, 1.0)
        assert args.max_new_tokens == (2048 if maths else 1024) and args.prompts_per_step == (
            64 if maths else 32
        )
        if "grpo" in name or name.startswith("t5"):
            assert (args.beta, args.sync_ref, args.std_norm, args.sync_steps) == (0.001, False, False, 1)
            assert args.samples_per_prompt == {"t5-4": 4, "t5-12": 12}.get(name, 8)
        else:
            assert (args.beta, args.adam_eps, args.sync_ref) == (
                (0.1, 1e-4, True) if maths else (0.01, 1e-8, False)
            )
    steps = {name: found[name].sync_steps for name in ("t1-offline", "t1-s100", "t1-s10", "t1-s1", "t2-s5")}
    assert list(steps.values()) == [math.inf, 100, 10, 1, 5]


def test_every_file_named_exists():
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh)|toy/|results/\w*/?)`", README))
    named |= {
        word
        for c in COMMANDS
        for word in c.split()
        if re.fullmatch(r"requirements\S*\.txt|\S+\.(py|sh)", word)
    }
    named |= {f"{module.replace('.', '/')}.py" for module in re.findall(r"-m (teaching\.\w+)", README)}
    assert len(named) > 8 and "teaching/rloo.py" in named
    assert [name for name in named if not list(ROOT.glob(name)) and not list(ROOT.glob(f"toy/{name}"))] == []


def test_every_flag_named_is_declared(capsys):
    for script in [*SCRIPTS.values(), *MEASURING.values()]:
        with contextlib.suppress(SystemExit):
            script.get_args(["--help"])
    with contextlib.suppress(SystemExit):
        data.get_args(["--help"])
    command = [sys.executable, "-m", "teaching.dpo_grpo", "--help"]
    print(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    declared = capsys.readouterr().out
    others = {"--no-deps", "--extra-index-url", "--help", "--model_outputs"}
    others |= {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}
    assert {flag for flag in re.findall(r"--[a-z][a-z_-]+", README) if flag not in declared} <= others


def test_every_metric_logged_is_explained_and_the_other_way_round():
    table = README.split("| metric |")[1].split("\n\n")[0].splitlines()[2:]
    explained = {name for line in table for name in re.findall(r"`(\w[\w/]+)`", line.split("|")[1])}
    logs = [ROOT / "results" / "toy" / run / "metrics.jsonl" for run in ("dpo-s10-seed0", "grpo-s10-seed0")]
    logged = {name for log in logs for line in log.read_text().splitlines() for name in json.loads(line)}
    logged |= {"reward/exact", "reward/gsm8k", "reward/math", "reward/rm", "reward/judge"}
    logged |= {
        "eval/reward",
        "eval/reward_per_token",
        "eval/length",
        "memory/peak_gib",
        "skipped",
        "time/write",
    }
    assert logged - {"step"} == explained


def test_the_results_are_those_of_the_logs():
    done = subprocess.run(
        [sys.executable, ROOT / "results" / "table.py"], capture_output=True, text=True, check=True
    )
    toy, mixed, versus, parts = done.stdout.split("\n\n")
    assert toy.count("\n") == 1 + 8 and mixed.count("\n") == 1 + 6 and versus.count("\n") == 1 + 6
    assert all(table + "\n\n" in README for table in (toy, mixed, versus, parts.rstrip("\n")))


def test_the_memory_table_is_the_scripts():
    command = [sys.executable, ROOT / "results" / "memory.py"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout in README
