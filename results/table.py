"""Prints the README's table from results/toy/: final validation accuracy, mean and sd over seeds."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

runs = defaultdict(list)
for directory in sorted((Path(__file__).parent / "toy").glob("*-seed[0-9]")):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    runs[directory.name.rsplit("-", 1)[0]].append((accuracy[0], accuracy[-1]))
print("| run | seeds | start | after 400 steps | sd | each |\n|---|---|---|---|---|---|")
for name, accuracies in sorted(runs.items(), key=lambda run: -statistics.mean(last for _, last in run[1])):
    first, last = ([pair[k] for pair in accuracies] for k in (0, 1))
    cells = [name, len(last), f"{statistics.mean(first):.2f}", f"**{statistics.mean(last):.2f}**"]
    cells += [f"{statistics.stdev(last):.2f}", ", ".join(f"{x:.2f}" for x in last)]
    print("| " + " | ".join(map(str, cells)) + " |")
