"""What the README says is so: its commands parse, its files exist, its table is the logs'."""

import contextlib
import json
import re
import shlex
import subprocess
import sys

from conftest import ROOT

import evaluate
import train_dpo
import train_grpo

README = (ROOT / "README.md").read_text()
BLOCKS = [block.removeprefix("\n") for block in README.split("```")[1::2]]  # every second piece is code
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


SCRIPTS = {"train_dpo.py": train_dpo, "train_grpo.py": train_grpo, "evaluate.py": evaluate}


def test_every_command_parses():
    found = [(s, shlex.split(c.split(s)[1])) for c in COMMANDS for s in SCRIPTS if s in c]
    assert len(found) >= 7 and {script for script, _ in found} == set(SCRIPTS)
    for script, flags in found:
        SCRIPTS[script].get_args(flags)


def test_every_file_named_exists():
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh)|toy/|results/\w*/?)`", README))
    named |= {
        word
        for c in COMMANDS
        for word in c.split()
        if re.fullmatch(r"requirements\S*\.txt|\S+\.(py|sh)", word)
    }
    assert len(named) > 8
    assert [name for name in named if not list(ROOT.glob(name)) and not list(ROOT.glob(f"toy/{name}"))] == []


def test_every_flag_named_is_declared(capsys):
    for script in SCRIPTS.values():
        with contextlib.suppress(SystemExit):
            script.get_args(["--help"])
    declared = capsys.readouterr().out
    others = {"--no-deps", "--extra-index-url", "--nproc-per-node", "--help", "--model_outputs"}
    assert {flag for flag in re.findall(r"--[a-z][a-z_-]+", README) if flag not in declared} <= others


def test_every_metric_logged_is_explained_and_the_other_way_round():
    table = README.split("| metric |")[1].split("\n\n")[0].splitlines()[2:]
    explained = {name for line in table for name in re.findall(r"`(\w[\w/]+)`", line.split("|")[1])}
    logs = [ROOT / "results" / "toy" / run / "metrics.jsonl" for run in ("dpo-s10-seed0", "grpo-s10-seed0")]
    logged = {name for log in logs for line in log.read_text().splitlines() for name in json.loads(line)}
    assert logged - {"step"} == explained - {"memory/peak_gib"}


def test_the_results_are_those_of_the_logs():
    done = subprocess.run(
        [sys.executable, ROOT / "results" / "table.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 2 + 8 and done.stdout in README
