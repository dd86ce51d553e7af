"""What README.md, GUIDE.md, results/README.md and paper/ say is so: commands parse, names exist, numbers are
those of the logs.
"""

import ast
import contextlib
import functools
import importlib.util
import json
import math
import re
import shlex
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, TOY
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "results"))
sys.path.insert(0, str(ROOT / "paper"))
import benchmark
import logs
import prepare
import table
import versus_trl

import evaluate
import train_dpo
import train_grpo
from rewards import Verifiers

DOCS = {name: (ROOT / name).read_text() for name in ("README.md", "GUIDE.md", "results/README.md")}
README, GUIDE, RESULTS = DOCS.values()
SCRIPTS = {
    "train_dpo.py": train_dpo, "train_grpo.py": train_grpo, "evaluate.py": evaluate,
    "results/benchmark.py": benchmark, "results/versus_trl.py": versus_trl, "paper/prepare.py": prepare,
}  # fmt: skip
PAPER_RUNS = {  # Tables 1, 2, 3 and 5 of the paper
    "t1-offline": "53.7 / 36.4 / 28.8", "t1-s100": "58.9 / 39.3 / 35.1", "t1-s10": "57.2 / 39.4 / 31.4",
    "t1-s1": "58.7 / 39.6 / 32.9", "t1-grpo": "58.1 / 38.8 / 33.6", "t5-4": "55.7 / 37.7 / 30.6",
    "t5-12": "57.6 / 38.4 / 32.2", "t2-offline": "53.2 / 38.3", "t2-s100": "too unstable",
    "t2-s10": "81.6 / 59.4", "t2-s5": "78.7 / 60.7", "t2-s1": "83.1 / 60.1", "t2-grpo": "75.2 / 55.0",
    "t3-both": "50.2 / 22.3 / 71.0 / 57.7", "t3-chat-then-maths": "53.4 / 25.3 / 82.2 / 69.0",
}  # fmt: skip


def shell(*command):
    """What a command of the project prints."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def listed():
    """Name -> what the list of paper/runs.sh says of it."""
    lines = [
        re.split(r"  +", line.strip(), maxsplit=1) for line in shell("bash", "paper/runs.sh").splitlines()
    ]
    return {line[0]: "".join(line[1:]) for line in lines if re.match(r"(data|t\d|ab)-", line[0])}


@pytest.fixture(scope="module")
def commands(listed):
    """Every command in the documents, in blocks and in backticks, and those that paper/ prints."""
    found = []
    for text in DOCS.values():
        for block in text.split("```")[1::2]:  # every second piece is code
            found += block.replace("\\\n", " ").splitlines()
        found += re.findall(r"`((?:python|torchrun|bash|make) [^`]+)`", re.sub(r"\n", " ", text))
    evaluations = [f"{kind}-of-{run}" for kind in ("maths", "chat") for run in ("seed", "t1-s1", "t3-both")]
    for name in [*listed, *evaluations]:
        found.append(shell("bash", "paper/runs.sh", "--print", name).strip())
    for flags in ([], ["--small"]):
        found += shell("bash", "paper/one_gpu.sh", "--print", *flags).splitlines()
    return found


def flags_of(command, script):
    flags = shlex.split(command.split(script, maxsplit=1)[1])
    return [flag for flag in flags if flag != "[RUN" and flag != "...]"]


def test_every_command_parses(commands, monkeypatch):
    monkeypatch.chdir(ROOT)
    count = dict.fromkeys(SCRIPTS, 0)
    for command in commands:
        for name, script in SCRIPTS.items():
            if re.search(rf"(python|torchrun) .*{name}|^{name}", command) and "<" not in command:
                script.get_args(flags_of(command, name))
                count[name] += 1
    assert all(count.values()) and sum(count.values()) > 70, count


def test_every_variant_parses(commands, script, tmp_path):
    variants = [command.split("-m ")[1] for command in commands if "-m teaching." in command]
    (tmp_path / "program.py").write_text(
        f"import importlib, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_dpo, train_grpo\n"
        "importlib.import_module(sys.argv[1])\nall_pairs = ['--all-pairs'] * ('dpo_grpo' in sys.argv[1])\n"
        "(train_grpo if 'rloo' in sys.argv[1] else train_dpo).get_args(all_pairs + sys.argv[2:])\n"
    )
    assert len(variants) >= 8
    for variant in {variant for variant in variants if "ROWS" not in variant}:
        script(tmp_path / "program.py", *shlex.split(variant))


def test_every_flag_named_is_declared(commands, script, capsys):
    for module in SCRIPTS.values():
        with contextlib.suppress(SystemExit):
            module.get_args(["--help"])
    declared = capsys.readouterr().out + "".join(
        script(command, "--help").stdout
        for command in ("teaching.dpo_grpo", "results/memory.py", "tests/kills.py")
    )
    # the first does not even start without matplotlib
    declared += "".join((ROOT / "results" / name).read_text() for name in ("plot.py", "paper_on_a_laptop.sh"))
    others = "--no-deps --extra-index-url --help --dry-run --python-version --only-binary --target"  # pip's
    others += " --dist --nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint"  # pytest-xdist's, torchrun's
    others += " --model_outputs --small --print"  # alpaca_eval's, and those of the scripts in paper/
    text = "\n".join([*DOCS.values(), *commands])
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))
    assert len(named) > 60 and {flag for flag in named if flag not in declared} <= set(others.split())


def test_every_file_named_exists(commands):
    named = set()
    for name, text in DOCS.items():
        folder = (ROOT / name).parent
        links = re.findall(r"\]\((?!http|#)([^)]+)\)", text)
        assert [link for link in links if not (folder / link).exists()] == []
        named |= set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh)|(?:toy|teaching|paper|results)/[\w/.]*)`", text))
    for command in commands:
        named |= {word for word in command.split() if re.fullmatch(r"\w\S+\.(py|sh)|requirements\S*", word)}
        named |= {f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (teaching\.\w+)", command)}
    made = {"unit_tests.py"}  # by the reader of GUIDE.md
    assert len(named) > 40 and "teaching/rloo.py" in named
    assert [name for name in named - made if not (ROOT / name).exists()] == []


def test_the_files_of_the_reading_list_have_about_that_many_lines():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    lines = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    assert {name: n for name, n in lines.items() if abs(n - int(dict(rows)[name])) > 10} == {}


def test_the_loop_of_the_readme_calls_what_the_script_calls():
    loop = README.split("```python")[1].split("```")[0]
    called = set(re.findall(r"(?<!\))\b[\w.]+(?=\()", loop)) - {"range"}
    script = (ROOT / "train_dpo.py").read_text()
    assert len(called) >= 10 and [name for name in called if f"{name}(" not in script] == []


def test_every_metric_logged_is_explained_and_the_other_way_round():
    table = GUIDE.split("| metric |")[1].split("\n\n")[0].splitlines()[2:]
    explained = {name for line in table for name in re.findall(r"`(\w[\w/]+)`", line.split("|")[1])}
    logs = [ROOT / "results" / "toy" / run / "metrics.jsonl" for run in ("dpo-s10-seed0", "grpo-s10-seed0")]
    logged = {name for log in logs for line in log.read_text().splitlines() for name in json.loads(line)}
    logged |= {"reward/exact", "reward/gsm8k", "reward/math", "reward/rm", "reward/judge"}
    logged |= {"eval/reward", "eval/reward_per_token", "eval/length"}
    logged |= {"memory/held_gib", "memory/peak_gib", "skipped", "time/write"}
    assert logged - {"step", "steps"} == explained  # the latter is of small logs alone


def test_messages_quoted_as_symptoms_are_the_programs():
    table = GUIDE.split("| symptom |")[1].split("\n\n")[0]
    source = " ".join(" ".join(path.read_text() for path in ROOT.glob("*.py")).split())
    quoted = [
        q for line in table.splitlines() for q in re.findall(r"`([a-z' ]+ [a-z' .]+)`", line.split("|")[1])
    ]
    assert len(quoted) >= 3
    assert [part for q in quoted for part in q.split(" ... ") if part not in source] == []


def test_tables_are_those_of_the_logs(script):
    tables = script("results/table.py").stdout.strip().split("\n\n")
    glance, *rest = tables
    assert [table.count("\n") for table in tables[:2]] == [7, 9] and len(tables) == len(table.TABLES) == 10
    assert glance + "\n\n" in README and all(table + "\n\n" in RESULTS for table in rest)
    assert script("results/memory.py").stdout in GUIDE
    assert script("results/memory.py", "--cards").stdout in GUIDE


@pytest.fixture(scope="module")
def laptop():
    """Name of a run of the toy -> what python is to run."""
    lines = shell("bash", "results/paper_on_a_laptop.sh", "--list").splitlines()
    return {name: command.split() for name, command in (line.split(maxsplit=1) for line in lines)}


def test_the_script_would_make_each_log_again(laptop, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [path.parent for path in (ROOT / "results").glob("*/*-seed[0-9]/args.json")]
    assert len(found) >= 39
    for directory in found:
        words = laptop[f"{directory.parent.name}/{directory.name}"]
        logged = json.loads((directory / "args.json").read_text())["args"]
        if "teaching.dpo_grpo" in words:  # it adds a flag, and sets one
            words = ["train_dpo.py", "--all-pairs", *words[2:]]
            place = words.index("--grpo-weight")
            assert logged.pop("grpo_weight") == float(words[place + 1])
            del words[place : place + 2]
        if "results.no_ratio" in words:
            words = ["train_grpo.py", *words[2:]]
        if "results.kl" in words:
            words = [f"train_{words[2]}.py", *words[3:]]
        script = {"train_dpo.py": train_dpo, "train_grpo.py": train_grpo}[words[0]]
        args = vars(script.get_args(words[1:]))
        args["sync_steps"] = "inf" if args["sync_steps"] == math.inf else args["sync_steps"]
        # where it is, what it keeps, a flag that only a GPU knows, and what day it was
        others = {"out", "model", "save_every", "log_samples", "gpu_memory", "date"}
        assert {n for n in logged.keys() & args.keys() - others if logged[n] != args[n]} == set(), directory


def test_every_claim_names_runs_of_the_script(laptop):
    lines = [line.split(" · ") for line in (ROOT / "results" / "claims.txt").read_text().splitlines()]
    lines = [line for line in lines if line[0] and not line[0].startswith("#")]
    assert len(lines) > 30 and {len(line) for line in lines} <= {6, 7}  # with a sentence or without
    named = {run.partition("@")[0] for line in lines for run in (line[3], line[5])} - {"0"}
    assert named <= {name.rpartition("-seed")[0] for name in laptop}
    assert {line[4] for line in lines} == {"above", "below", "alike"}


@pytest.mark.parametrize(
    ("ours", "base", "relation", "gain", "said"),
    [  # the standard deviation of three numbers x - d, x, x + d is d
        ([0.5, 0.6, 0.7], [0.8, 0.9, 1.0], "below", 0, "agrees"),  # 0.3 apart, 0.2 of noise
        ([0.5, 0.6, 0.7], [0.8, 0.9, 1.0], "above", 0, "disagrees"),
        ([0.5, 0.6, 0.7], [0.65, 0.75, 0.85], "below", 0, "cannot tell"),  # 0.15 apart, 0.2 of noise
        ([0.90, 0.91, 0.92], [0.90, 0.92, 0.94], "alike", 0.8, "agrees"),  # 0.01 + 0.03 of 0.12 allowed
        ([0.84, 0.85, 0.86], [0.90, 0.92, 0.94], "alike", 0.8, "partly"),  # 0.07: seen, and allowed
        ([0.70, 0.71, 0.72], [0.90, 0.92, 0.94], "alike", 0.8, "disagrees"),
        ([0.80, 0.90, 1.00], [0.90, 0.92, 0.94], "alike", 0.8, "cannot tell"),  # 0.02 + 0.12 are too much
        ([0.5], [0.8, 0.9, 1.0], "below", 0, "cannot tell"),
        ([], [0.8, 0.9, 1.0], "below", 0, "not run yet"),
    ],
)
def test_a_verdict_is_that_of_its_rule(ours, base, relation, gain, said):
    assert table.verdict(ours, base, relation, gain) == said


def test_small_logs_are_means_of_ten_steps():
    steps = [{"step": i, "loss": 1.0, "kl": float(i), "time/step": 2.0} for i in range(14)]
    steps[3]["kl"] = None  # was not finite
    validations = [{"step": i, "eval/accuracy": 0.123456} for i in (0, 12, 14)]
    lines = logs.means([validations[0], *steps[:12], validations[1], *steps[12:], validations[2]])
    assert [line["step"] for line in lines] == [0, 9, 11, 12, 13, 14]
    assert [lines[i] for i in (0, 3, 5)] == validations
    assert lines[1] == {"step": 9, "steps": 10, "kl": 4.667, "loss": 1.0, "time/step": 2.0}  # 42 / 9
    assert (lines[2]["steps"], lines[2]["kl"], lines[4]["kl"]) == (2, 10.5, 12.5)


def test_numbers_in_sentences_are_those_of_the_logs_and_the_code():
    first = [json.loads(line) for line in (ROOT / "results" / "first_run" / "metrics.jsonl").open()]
    scores = [line["eval/accuracy"] for line in first if "eval/accuracy" in line]
    assert f"`validation accuracy {scores[0]:.3f} before, {scores[-1]:.3f} after 300 steps: " in README
    command = json.loads((ROOT / "results" / "first_run" / "args.json").read_text())["command"]
    assert "train_dpo.py --sync-steps 10" in " ".join(command)

    def accuracies(run):
        logs = [(ROOT / "results/toy" / f"{run}-seed{seed}" / "metrics.jsonl").open() for seed in range(3)]
        lines = [[json.loads(line) for line in log] for log in logs]
        return [[x["eval/accuracy"] for x in log if "eval/accuracy" in x][-1] for log in lines]

    online, ten, hundred = (accuracies(f"dpo-s{s}") for s in (1, 10, 100))
    mean = statistics.fmean
    assert (
        f"as good as online: {mean(ten):.2f} and {mean(online):.2f}, with each seed a little lower" in README
    )
    assert all(0 < a - b < 0.05 for a, b in zip(online, ten, strict=True))
    assert f"loses {mean(online) - mean(hundred):.2f} and" in README
    toy, papers = train_dpo.get_args([]), train_dpo.get_args(["--model", "m", "--data", "d"])
    assert f"{toy.lr / papers.lr:.0f} times" in README and f"its β is {toy.beta:g}" in README
    assert f"the paper's β of {papers.beta:g}" in README
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(TOY).parameters())
    assert f"{parameters / 1e6:.2f} million parameters" in README
    names = set(re.findall(r"-m teaching\.(\w+)", README))
    lines = {name: len((ROOT / "teaching" / f"{name}.py").read_text().splitlines()) for name in names}
    assert f"have 15 lines or less, the last one {lines.pop('dpo_grpo')}:" in README
    assert max(lines.values()) <= 15


def test_the_list_of_the_papers_runs_has_its_numbers(listed):
    assert {name: listed[name] for name in PAPER_RUNS} == PAPER_RUNS
    assert {name for name in listed if name.startswith("t")} == PAPER_RUNS.keys()


def test_the_papers_runs_have_its_settings(listed):
    """Table 4, and what each name promises."""
    steps = {"offline": math.inf, "s100": 100, "s10": 10, "s5": 5, "s1": 1, "grpo": 1}
    for name in PAPER_RUNS:
        command = shell("bash", "paper/runs.sh", "--print", name)
        script = "train_grpo.py" if "train_grpo.py" in command else "train_dpo.py"
        args = SCRIPTS[script].get_args(flags_of(command, script))
        maths = name.startswith(("t1", "t5")) or name == "t3-chat-then-maths"
        assert (str(args.out), args.resume) == (f"runs/{name}", "auto")
        assert (args.lr, args.grad_clip, args.temperature) == (1e-6, 0.1, 1.0)
        assert (args.max_new_tokens, args.prompts_per_step) == ((2048, 64) if maths else (1024, 32))
        assert args.sync_steps == steps.get(name.split("-")[1], 1)
        assert args.samples_per_prompt == {"t5-4": 4, "t5-12": 12}.get(name, 8)
        assert args.steps == (1000 if maths else 1500)  # 1500 on chat; the others are open
        if script == "train_grpo.py":
            assert (args.beta, args.sync_ref, args.std_norm) == (0.001, False, False)
        else:
            settings = (0.1, 1e-4, True) if maths else (0.01, 1e-8, False)
            assert (args.beta, args.adam_eps, args.sync_ref) == settings


def test_the_papers_data_has_its_sizes():
    """Rows to train on; NuminaMath's 1,980 to validate and as many to test; of chats 470 to validate."""
    sizes = {"numinamath": None, "numinamath-100k": 100_000, "wildchat": 1000, "wildchat-50k": 50_000}
    for name, train in sizes.items():
        command = shell("bash", "paper/runs.sh", "--print", f"data-{name}")
        held_out = {"valid": 470} if "wildchat" in name else {"valid": 1980, "test": 1980}
        splits = prepare.get_args(flags_of(command, "paper/prepare.py")).splits
        assert splits == held_out | {"train": train}


# ---- the table of section 14: `file` `name` or `--flag` and its default; tests

LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in GUIDE.split("| paper | what it says |")[1].split("\n\n")[0].splitlines()[2:]
]


def claims(cell):
    """(file, name, value or "") of all that a cell names. Files that stand side by side share the names
    behind them.
    """
    found, files, fresh = [], [], False
    for name, value in re.findall(r"`([^`]+)`(?: (on|off|sum|\d+(?:\.\d+)?(?:e-\d+)?)\b)?", cell):
        if re.search(r"\.(py|sh)(::|$)", name):
            files, fresh = [*(files if fresh else []), name], True
        else:
            found, fresh = found + [(file, name, value) for file in files or [""]], False
    return found


@functools.cache
def names_in(file):
    """The functions, classes, methods (Class.method) and constants of a Python file, each with its node; the
    variables and runs of a shell script.
    """
    text, found = (ROOT / file).read_text(), {}
    if file.endswith(".sh"):
        return dict.fromkeys(re.findall(r"^([\w-]+)(?:=| \| )", text, re.M))
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            found |= {getattr(target, "id", ""): node.value for target in node.targets}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            names = [f"{node.name}.{part.name}" for part in inner if isinstance(part, ast.FunctionDef)]
            found |= dict.fromkeys([node.name, *names], node)
    return found


def fault(file, name, value):
    """What is wrong with a claim of the table, or None."""
    if not (ROOT / file).is_file():
        return f"{file or name}: no such file"
    if name.startswith("--"):
        defaults = SCRIPTS[file].get_args(["--model", "m", "--data", "d"]).defaults
        if name[2:].replace("-", "_") not in defaults:
            return f"{file} {name}: no such flag"
        default = defaults[name[2:].replace("-", "_")]
    elif name not in names_in(file):
        return f"{file} {name}: no such name"
    elif not value:
        return None
    else:
        default = ast.literal_eval(names_in(file)[name])
    default = {"True": "on", "False": "off"}.get(str(default), str(default))
    same = value == default or (value[:1].isdigit() and float(value) == float(default))
    return None if same else f"{file} {name}: {default}, not {value or 'said'}"


def faults(here, tests):
    """What is wrong with the last two cells of a line."""
    found = [fault(*claim) for claim in claims(here)] if claims(here) else ["nothing is named"]
    for test in re.findall("`([^`]+)`", tests) or ["no test"]:
        file, _, name = test.partition("::")
        whole = re.fullmatch(r"tests/test_\w+\.py::test_\w+", test) and (ROOT / file).is_file()
        if not whole or name not in names_in(file):
            found.append(f"{test}: no such test")
    return list(filter(None, found))


def test_what_the_table_from_paper_to_line_names_exists():
    assert 30 < len(LINES) <= 45 and {len(line) for line in LINES} == {4}
    assert [fault for _, _, here, tests in LINES for fault in faults(here, tests)] == []


@pytest.mark.parametrize(
    ("here", "tests", "said"),
    [
        ("`train_dpo.py` `dpo_los`", "", "train_dpo.py dpo_los: no such name"),
        ("`policy.py` `Reference.reload`", "", "policy.py Reference.reload: no such name"),
        ("`polices.py` `Reference`", "", "polices.py: no such file"),
        ("`dpo_loss`", "", "dpo_loss: no such file"),
        ("`train_dpo.py`, `train_grpo.py` `dpo_loss`", "", "train_grpo.py dpo_loss: no such name"),
        ("`train_dpo.py` `--is-cap` 2", "", "train_dpo.py --is-cap: no such flag"),
        ("`train_dpo.py` `--beta` 0.01", "", "train_dpo.py --beta: 0.1, not 0.01"),
        ("`train_dpo.py` `--beta`", "", "train_dpo.py --beta: 0.1, not said"),
        ("`train_dpo.py`, `train_grpo.py` `--sync-ref` on", "", "train_grpo.py --sync-ref: off, not on"),
        ("`train_grpo.py` `--loss-norm` off", "", "train_grpo.py --loss-norm: sum, not off"),
        ("`evaluate.py` `SAMPLES` 40", "", "evaluate.py SAMPLES: 50, not 40"),
        ("`paper/runs.sh` `FIXD`", "", "paper/runs.sh FIXD: no such name"),
        ("", "", "nothing is named"),
        ("`train_dpo.py` `dpo_loss`", "none", "no test: no such test"),
        ("`train_dpo.py` `dpo_loss`", "`tests/test_maths.py::test_by_hand`", "test_by_hand: no such test"),
        ("`train_dpo.py` `dpo_loss`", "`tests/test_math.py::test_loss_by_hand`", "by_hand: no such test"),
        ("`train_dpo.py` `dpo_loss`", "`test_maths.py::test_loss_by_hand`", "by_hand: no such test"),
    ],
)
def test_a_wrong_name_in_that_table_is_found(here, tests, said):
    assert any(fault.endswith(said) for fault in faults(here, tests or LINES[0][3]))


def test_every_flag_that_cites_the_paper_is_in_that_table():
    named = {(file, name) for _, _, here, _ in LINES for file, name, _ in claims(here)}
    cited = set()
    for script in ("train_dpo.py", "train_grpo.py", "evaluate.py"):

        def add(flag, help="", default=None, script=script, **_):
            cited.update([(script, flag)] if "paper" in help and default is not None else [])

        SCRIPTS[script].add_flags(add)
    assert len(cited) > 30 and cited - named == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("runs.sh t9-s1", "runs.sh: error: t9-s1: no such run; without arguments the list is printed"),
        ("runs.sh --print", "runs.sh: error: : no such run"),
        ("runs.sh maths-of-t9", "runs.sh: error: t9: no such run"),
        ("runs.sh t1-s1", "t1-s1 reads datasets/numinamath/train.jsonl: bash paper/runs.sh data-numinamath"),
        ("runs.sh t3-chat-then-maths", "reads runs/t2-s1/model: bash paper/runs.sh t2-s1"),
        ("runs.sh chat-of-t2-s1", "reads runs/t2-s1: bash paper/runs.sh t2-s1"),
        ("one_gpu.sh --tiny", "one_gpu.sh: error: --tiny: the flags are --small and --print"),
    ],
)
def test_a_mistake_with_the_papers_runs_is_one_line(arguments, said, tmp_path):
    (tmp_path / "paper").mkdir()
    script, *rest = arguments.split()
    copy = tmp_path / "paper" / script
    copy.write_text((ROOT / "paper" / script).read_text())  # here nothing has been prepared or run
    done = subprocess.run(["bash", copy, *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr


def test_one_gpu_says_the_memory_that_the_arithmetic_gives(script):
    found = re.findall(
        r"python (results/memory.py [^#\n]+)# ([\d.]+) and ([\d.]+) GiB",
        (ROOT / "paper/one_gpu.sh").read_text(),
    )
    assert len(found) == 2
    for command, training, sampler in found:
        rows = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+)", script(*command.split()).stdout, re.M))
        assert (rows["all, while training"], rows["the sampler's weights, while sampling"]) == (
            training,
            sampler,
        )


def test_plot_draws_runs_of_ones_own(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [f"results/{run}" for run in ("toy/dpo-s10-seed0", "mixed/both-seed0")]
    assert (
        shell(sys.executable, "results/plot.py", *runs, "--out", tmp_path / "a.png") == f"{tmp_path}/a.png\n"
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    command = [sys.executable, ROOT / "results" / "plot.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"plot.py: error: {tmp_path}: no metrics.jsonl")


def test_the_reward_of_the_guide_runs_code(tmp_path):
    """As its reader would: saved as a file beside the scripts, and asked in the workers."""
    code = next(block for block in GUIDE.split("```python\n")[1:] if "def unit_tests" in block).split("```")[
        0
    ]
    (tmp_path / "unit_tests.py").write_text(code)
    spec = importlib.util.spec_from_file_location("unit_tests", tmp_path / "unit_tests.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    verifiers = Verifiers({"unit_tests"}, timeout=2.0, workers=2)
    texts = ["def f(x): return x + 2", "def f(x): return x", "while True: pass", "not Python"]
    jobs = [("unit_tests", None, text, {"prompt": "p", "tests": "assert f(2) == 4"}) for text in texts]
    assert verifiers(jobs) == [1.0, 0.0, 0.0, 0.0]
    verifiers.close()
