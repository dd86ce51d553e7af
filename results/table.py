"""Prints the tables of README.md and results/README.md from the logs: results/toy/ (validation accuracy
over seeds, and where the time went), results/mixed/ (both kinds of tasks at the end of each run) and
results/speed/ (what results/versus_trl.py and results/benchmark.py have measured).

    python results/table.py
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent


def facts(directory: Path) -> dict:
    """Of one run: command, accuracy before and after, seconds of training, tokens sampled a second."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    calls = [line for line in steps if "tokens_per_second/sample" in line]
    sampled = sum(line["tokens_per_second/sample"] * line["time/sample"] for line in calls)
    command = json.loads((directory / "args.json").read_text())["command"]
    flags = [*zip(command[1::2], command[2::2], strict=True)]
    flags = [f"{flag} {value}" for flag, value in flags if flag not in ("--out", "--seed", "--log-samples")]
    accuracies = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    return {
        "command": " ".join([Path(command[0]).name, *flags]),
        "start": accuracies[0],
        "accuracy": accuracies[-1],
        "seconds": sum(line["time/step"] for line in steps),
        "speed": sampled / sum(line["time/sample"] for line in calls),
    }


def main():
    runs = defaultdict(list)
    for directory in sorted((HERE / "toy").glob("*-seed[0-9]")):
        runs[directory.name.rsplit("-", 1)[0]].append(facts(directory))
    for table in (lambda: glance(runs), lambda: toy(runs), mixed, versus, parts):
        table()
        print()


PAPER = {"s1": ("58.7", "58.1"), "s10": ("57.2", "-"), "s100": ("58.9", "-"), "sinf": ("53.7", "-")}


def glance(runs: dict):
    """The dial, on the toy and in the paper (its Table 1)."""
    print("| | toy, DPO | toy, GRPO | paper, DPO | paper, GRPO |\n|---|---|---|---|---|")
    starts = [seed["start"] for seeds in runs.values() for seed in seeds]
    print(f"| before | {statistics.mean(starts):.2f} | {statistics.mean(starts):.2f} | 47.4 | 47.4 |")
    names = {"s1": "s = 1 (online)", "s10": "s = 10", "s100": "s = 100", "sinf": "s = inf (offline)"}
    for s, name in names.items():
        cells = [spread(runs.get(f"{algorithm}-{s}")) for algorithm in ("dpo", "grpo")]
        print("| " + " | ".join([name, *cells, *PAPER[s]]) + " |")
    print(f"| s = 100, β = 0.1 | {spread(runs['dpo-s100-beta0.1'])} | - | - | - |")


def spread(seeds: list | None) -> str:
    accuracies = [seed["accuracy"] for seed in seeds or []]
    return f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}" if accuracies else "-"


def toy(runs: dict):
    print("| command | accuracy | sd | each seed | seconds | sampled tokens/s | log: results/toy/ |")
    print("|---|---|---|---|---|---|---|")
    for name, seeds in sorted(runs.items(), key=lambda run: -statistics.mean(f["accuracy"] for f in run[1])):
        accuracies = [seed["accuracy"] for seed in seeds]
        seconds, speed = (statistics.median(seed[key] for seed in seeds) for key in ("seconds", "speed"))
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        cells = [f"{statistics.mean(accuracies):.2f}", f"{statistics.stdev(accuracies):.2f}", each]
        cells = [f"`{seeds[0]['command']}`", *cells, f"{seconds:.0f}", f"{speed:,.0f}", name + "-seed*"]
        print("| " + " | ".join(cells) + " |")


def mixed():
    print(
        "| trained on | accuracy: sums | sd | reward: chats | sd | tokens of an answer |\n"
        "|---|---|---|---|---|---|"
    )
    names = ("eval/accuracy", "eval/reward", "eval/length")
    ends = {name: [] for name in ("nothing", "sums", "chats", "both", "sums-then-chats", "chats-then-sums")}
    for directory in sorted((HERE / "mixed").glob("*-seed[0-9]")):
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        evaluations = [[line[name] for name in names] for line in lines if "eval/accuracy" in line]
        ends[directory.name.rsplit("-", 1)[0]].append(evaluations[-1])
        if directory.name.startswith("sums-seed"):
            ends["nothing"].append(evaluations[0])
    for name, seeds in ends.items():
        accuracy, reward, length = zip(*seeds, strict=True)
        cells = [f"{f(x):.2f}" for x in (accuracy, reward) for f in (statistics.mean, statistics.stdev)]
        print("| " + " | ".join([name.replace("-", " "), *cells, f"{statistics.mean(length):.1f}"]) + " |")


def versus():
    found = [json.loads((HERE / "speed" / f"versus-{n}.json").read_text())["found"] for n in (1, 2)]
    print(
        "| samples a second | 1 thread: ours | TRL | ratio | 2 threads: ours | TRL | ratio |\n"
        "|---|---|---|---|---|---|---|"
    )
    names = {"grpo": "GRPO", "dpo": "DPO", "vllm": "vLLM", "hf": "transformers"}
    for run in found[0]:
        algorithm, s, sampler = run.split()
        cells = [f"{names[algorithm]}, s = {s}, {names[sampler]}"]
        for threads in found:
            ours, trl = (
                [statistics.median(one["speed"]) for one in threads[run][side]] for side in ("ours", "trl")
            )
            cells += [f"{statistics.median(speeds):,.0f}" for speeds in (ours, trl)]
            each = [a / b for a, b in zip(ours, trl, strict=True)]
            cells.append(f"**{statistics.median(each):.2f}** ({min(each):.2f} to {max(each):.2f})")
        print("| " + " | ".join(cells) + " |")


LEFT_OUT = ("window of 4", "window of 64", "32 prompts", "128 prompts", ": most memory",  # of what is printed
            "save inside a window", "10 steps ahead")  # fmt: skip


def parts():
    print("| what | median (least to most) | | model |\n|---|---|---|---|")
    read = lambda name: json.loads((HERE / "speed" / f"{name}.json").read_text())["figures"]  # noqa: E731
    figures = {"toy": read("toy") | read("rows") | read("window"), "30m": read("30m"), "135m": read("135m")}
    for name in figures:
        for what, figure in figures[name].items():
            if any(words in what for words in LEFT_OUT):
                continue
            middle, least, most = (f(figure["values"]) for f in (statistics.median, min, max))
            middle, least, most = (f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in (middle, least, most))
            print(f"| {what} | {middle} ({least} to {most}) | {figure['unit']} | {name} |")


if __name__ == "__main__":
    main()
