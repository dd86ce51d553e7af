#!/usr/bin/env bash
# Runs the commands of exercises.md and compares what they log with its tables, a line for each row. Exit code 1
# if a number is off. About ten minutes on two free cores; what the runs write is deleted.
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
ROW = re.compile(r"^\| `runs/(\S+)` \| `(\S+)` \| (\d+)(?: to (\d+))? \| (\S+) ± (\S+) \|", re.M)
exercises = re.split(r"^## (?=\d)", Path("teaching/exercises.md").read_text(), flags=re.M)[1:]
asked = [text for text in exercises if len(sys.argv) == 1 or text.split(".")[0] in sys.argv[1:]]


def mean(log, metric, first, last):
    """Over the steps `first` to `last` of a run; NaN where they are not all there."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    values = [line[metric] for line in lines if metric in line and first <= line["step"] <= last]
    return statistics.fmean(values) if len(values) == last - first + 1 else float("nan")


off = 0
with tempfile.TemporaryDirectory() as folder:
    for text in asked:
        print(text.split("\n")[0], flush=True)
        began, good = time.monotonic(), True
        # one process needs no launcher
        commands = "".join(COMMANDS.findall(text)).replace("torchrun ", "python ").replace("runs/", f"{folder}/")
        done = subprocess.run(["bash", "-ec", commands], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        for run, metric, first, last, expected, within in ROW.findall(text):
            found = mean(Path(folder, run, "metrics.jsonl"), metric, int(first), int(last or first))
            ok = abs(found - float(expected)) <= float(within)
            good &= ok
            steps = f"{first} to {last}" if last else first
            row = f"runs/{run:11} {metric:22} {steps:9} expected {expected} ± {within}, found {found:.4g}"
            print(f"   {'ok ' if ok else 'OFF'} {row}", flush=True)
        print(f"   {time.monotonic() - began:.0f} seconds", flush=True)
        if not good:
            off += 1
            print(done.stderr.replace("\r", "\n")[-1500:])
print(f"{len(asked) - off} of {len(asked)} exercises as expected")
sys.exit(off > 0 or not asked)
END
