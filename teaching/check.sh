#!/usr/bin/env bash
# Runs the commands of exercises.md and compares what they log with its tables, a line for each row. Exit code 1
# if a number is off. About seven minutes on a free core; what the runs write is deleted.
#
#     bash teaching/check.sh          all exercises
#     bash teaching/check.sh 5 8      these
cd "$(dirname "$0")/.." && exec python - "$@" <<'END'
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = re.compile(r"^```\n(.*?)^```", re.M | re.S)
ROW = re.compile(r"^\| (`runs/[^|]+) \| `(\S+)` \| (\d[^|]*) \| (\S+) ± (\S+) \|", re.M)


def found_in(log, metric, first, last):
    """The metric's mean over the steps `first` to `last`, NaN where they are not all there; for `steps` how
    many of them the run has done.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if first <= line["step"] <= last]
    if metric == "steps":
        return sum("loss" in line for line in lines)
    values = [line[metric] for line in lines if metric in line]
    return statistics.fmean(values) if len(values) == last - first + 1 else float("nan")


exercises = re.split(r"^## (?=\d)", Path("teaching/exercises.md").read_text(), flags=re.M)[1:]
asked = [text for text in exercises if len(sys.argv) == 1 or text.split(".")[0] in sys.argv[1:]]
as_expected = 0
with tempfile.TemporaryDirectory() as runs:
    for text in asked:
        print(text.split("\n")[0], flush=True)
        began, off = time.monotonic(), 0
        commands = re.sub(r"\bruns\b", runs, "".join(COMMANDS.findall(text)))
        commands = commands.replace("torchrun ", "python ")  # one process needs no launcher
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-ec", commands], **quiet)
        for cell, metric, steps, expected, within in ROW.findall(text):
            names, span = re.findall(r"runs/(\w+)", cell), [int(step) for step in steps.split(" to ")]
            found = [found_in(Path(runs, name, "metrics.jsonl"), metric, span[0], span[-1]) for name in names]
            found = found[0] / found[1] if len(found) > 1 else found[0]  # `runs/a` / `runs/b`: a ratio
            ok = abs(found - float(expected)) <= float(within)
            off += not ok
            where = f"{' / '.join(names):15} {metric:18} {steps:8}"
            print(f"{'ok ' if ok else 'OFF'} {where} expected {expected} ± {within}, found {found:.4g}")
        print(f"    {time.monotonic() - began:.0f} seconds", flush=True)
        if off:
            print(done.stderr.replace("\r", "\n")[-1500:])
        as_expected += not off
print(f"{as_expected} of {len(asked)} exercises as expected")
sys.exit(as_expected < len(asked) or not asked)
END
