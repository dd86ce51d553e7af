"""The logs of the toy's runs: reads them, makes them small, and says which are older than the maths.

python results/logs.py thin RUN DIRECTORY   # RUN's args.json, and its metrics.jsonl as means of ten steps
python results/logs.py check                # of each log: its commit, and what has changed since
"""

import ast
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETS = ("toy", "chats", "mixed", "kl")
BLOCK = 10  # steps whose means a line of a small log has
DECIDES = (  # what decides the numbers of a run, with the script that it started
    "train_dpo.py", "train_grpo.py", "window.py", "sampler.py", "sampler_hf.py", "policy.py", "packing.py",
    "loading.py", "rewards.py", "reward_models.py", "data.py", "tokenizer.py", "metrics.py", "validate.py",
    "flags.py", "toy",
)  # fmt: skip


def read(directory: Path) -> list[dict]:
    """Lines of metrics.jsonl: those of steps as means of ten, {"step": the last, "steps": how many, ...}, and
    those of validations as they are.
    """
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return lines if any("steps" in line for line in lines) else means(lines)


def means(lines: list[dict]) -> list[dict]:
    """The same of a run's own lines, one a step. Four digits; what is not finite (null) is in no mean."""
    found, block = [], []
    for line in lines:
        if "loss" in line:
            block.append(line)
        if block and (len(block) == BLOCK or "loss" not in line or line is lines[-1]):
            mean = {"step": block[-1]["step"], "steps": len(block)}
            for name in sorted({name for one in block for name in one} - {"step"}):
                values = [one[name] for one in block if one.get(name) is not None]
                mean |= {name: float(f"{statistics.fmean(values):.4g}")} if values else {}
            found.append(mean)
            block = []
        if "loss" not in line:
            found.append(line)
    return found


def thin(run: Path, directory: Path):
    lines = means([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    directory.mkdir(parents=True)
    args = (run / "args.json").read_text().replace(f"{HERE.parent}/", "")
    (directory / "args.json").write_text(args)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def check():
    for directory in sorted(d for s in SETS for d in (HERE / s).glob("*-seed[0-9]")):
        facts = json.loads((directory / "args.json").read_text())
        changed = since(facts["commit"], facts["command"][0])
        print(f"{directory.relative_to(HERE.parent)}  {str(facts['commit'])[:9]}  {changed}")


@functools.cache
def since(commit: str | None, script: str) -> str:
    """What of the files that decide its numbers has changed, comments and docstrings aside."""
    git = ["git", "-C", HERE.parent]
    diff = [*git, "diff", "--name-only", str(commit), "--", *DECIDES, script]
    done = subprocess.run(diff, capture_output=True, text=True, check=False)
    if done.returncode:
        return "its commit is not in this repository"
    changed = []
    for name in done.stdout.split():
        then = subprocess.run([*git, "show", f"{commit}:{name}"], capture_output=True, check=False).stdout
        path = HERE.parent / name
        if not (path.suffix == ".py" and path.exists() and bare(path.read_bytes()) == bare(then)):
            changed.append(name)
    return f"older than {' '.join(changed)}" if changed else "as the maths is now"


def bare(source: bytes) -> str:
    """Python without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        check()
    elif sys.argv[1:2] == ["thin"] and len(sys.argv) == 4:
        thin(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
