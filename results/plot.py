"""Draws a run's curves, or the project's own figures (needs matplotlib, which training does not).

python results/plot.py RUN [RUN ...]   # reward, validation, entropy, length, age against steps
python results/plot.py                 # results/toy.png and brake.png from results/toy/, and dial.png
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

try:
    import matplotlib
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py: error: matplotlib is not installed; `pip install matplotlib`")

HERE = Path(__file__).parent
# colours of Okabe and Ito, which stay apart for colour-blind eyes; dashes for GRPO, so that colour is not all
RUNS = {
    "dpo-s1": ("DPO s = 1 (online)", "#0072B2", "-"),
    "dpo-s10": ("DPO s = 10", "#56B4E9", "-"),
    "dpo-s100": ("DPO s = 100", "#009E73", "-"),
    "dpo-sinf": ("DPO s = inf (offline)", "#D55E00", "-"),
    "grpo-s1": ("GRPO s = 1", "#CC79A7", "--"),
    "grpo-s10": ("GRPO s = 10", "#000000", "--"),
}
BRAKES = {
    "dpo-s100-beta0.1": ("beta = 0.1", "#D55E00", "-"),
    "dpo-s100-beta1": ("beta = 1", "#56B4E9", "-"),
    "dpo-s100": ("beta = 3", "#009E73", "-"),
}


def curves(name: str) -> list[tuple[list, list, list]]:
    """(steps, seconds, accuracies) of each seed; seconds of training, without validation."""
    found = []
    for directory in sorted((HERE / "toy").glob(f"{name}-seed[0-9]")):
        steps, seconds, accuracies, spent = [], [], [], 0.0
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            spent += metrics.get("time/step", 0.0)
            if "eval/accuracy" in metrics:
                steps.append(metrics["step"])
                seconds.append(spent)
                accuracies.append(metrics["eval/accuracy"])
        found.append((steps, seconds, accuracies))
    return found


def draw(axis, names: dict, against: str):
    """A line for the mean over seeds, a band from the lowest to the highest, a label at the line's end."""
    ends = []
    for name, (label, colour, dash) in names.items():
        seeds = curves(name)
        if not seeds:
            continue
        per_step = defaultdict(list)
        for steps, seconds, accuracies in seeds:
            for step, second, accuracy in zip(steps, seconds, accuracies, strict=True):
                per_step[step].append((second, accuracy))
        x = [s if against == "step" else statistics.fmean(t for t, _ in v) for s, v in per_step.items()]
        values = [[accuracy for _, accuracy in v] for v in per_step.values()]
        mean = [statistics.fmean(v) for v in values]
        axis.plot(x, mean, dash, color=colour, linewidth=1.8)
        axis.fill_between(x, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.15, linewidth=0)
        ends.append([mean[-1], x[-1], label, colour])
    ends.sort(key=lambda end: end[0])
    right, places, top = max(end[1] for end in ends), [], 0.99
    for y, *_ in reversed(ends):  # from the top down; labels that would overlap move apart
        places.insert(0, min(y, top))
        top = places[0] - 0.06
    for place, (y, x, label, colour) in zip(places, ends, strict=True):
        axis.annotate(
            label, (x, y), (right * 1.04, place), color=colour, va="center", fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
    axis.set(xlim=(0, right), ylim=(0, 1))
    axis.set_xlabel("optimizer step" if against == "step" else "seconds of training")
    axis.set_ylabel("validation accuracy")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def dial():
    """Which weights write the completions of each step, for three values of s: weights k are those that k
    updates have made.
    """
    figure, axis = plt.subplots(figsize=(10, 2.9), layout="constrained")
    steps, colours = 9, matplotlib.colormaps["YlGnBu"]
    for row, (s, name) in enumerate(
        [(1, "s = 1\nonline"), (3, "s = 3\nsemi-online"), (99, "s = inf\noffline")]
    ):
        axis.text(-0.65, -row, name, ha="right", va="center", fontsize=10)
        for step in range(steps):
            weights = step // s * s
            shade = weights / steps
            box = plt.Rectangle((step - 0.46, -row - 0.3), 0.92, 0.6, color=colours(0.08 + 0.8 * shade))
            axis.add_patch(box)
            text = {"ha": "center", "va": "center", "color": "white" if shade > 0.5 else "black"}
            axis.text(step, -row + 0.08, f"weights {weights}", fontsize=9, **text)
            axis.text(step, -row - 0.16, f"age {step - weights}", fontsize=8, **text)
            if step and step == weights:  # a reload of the sampler
                axis.plot([step - 0.5] * 2, [-row - 0.36, -row + 0.36], color="#D55E00", linewidth=2.5)
    for step in range(steps):
        axis.text(step, 0.5, f"step {step}", ha="center", fontsize=9, color="0.35")
    axis.plot(
        [], [], color="#D55E00", linewidth=2.5, label="the sampler is reloaded with the policy's weights"
    )
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=9)
    axis.set(xlim=(-2.0, steps - 0.5), ylim=(-2.75, 0.75))
    axis.axis("off")
    figure.savefig(HERE / "dial.png")


PANELS = {
    "reward": "reward of the step",
    "eval/accuracy": "validation accuracy",
    "eval/reward": "validation reward",
    "entropy": "entropy (nats)",
    "completions/length": "length (tokens)",
    "sync/age": "age of the completions (steps)",
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]


def read(run: Path) -> list[dict]:
    """The lines of its metrics.jsonl. Ends the program where there is none, or nothing in it."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except OSError as error:
        fail(f"{run}: no metrics.jsonl to be read ({error.strerror.lower()}); give a run's directory")
    except ValueError as error:  # also a torn line
        fail(f"{run / 'metrics.jsonl'}: not the metrics of a run ({error})")
    return lines or fail(f"{run}: its metrics.jsonl is empty; the first step is not done yet")


def draw_runs(runs: list[Path], out: Path):
    """A panel a metric, a colour a run; metrics of each step thin, their mean over 20 steps thick."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), layout="constrained")
    logs = {name: read(run) for name, run in zip(names(runs), runs, strict=True)}
    for axis, (metric, title) in zip(axes.flat, PANELS.items(), strict=True):
        for number, lines in enumerate(logs.values()):
            colour = COLOURS[number % len(COLOURS)]
            found = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
            steps, values = zip(*found, strict=True) if found else ((), ())
            if metric in ("reward", "entropy", "completions/length"):
                axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
                values = [statistics.fmean(values[max(0, i - 19) : i + 1]) for i in range(len(values))]
            axis.plot(steps, values, color=colour, linewidth=1.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(any(line.get(metric) is not None for lines in logs.values() for line in lines))
    lines = [plt.Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=1.8) for i in range(len(runs))]
    figure.legend(lines, logs, loc="outside lower center", ncols=4, frameon=False)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        fail(f"--out {out}: cannot be written ({error})")
    print(out)


def names(runs: list[Path]) -> list[str]:
    """What to call runs: their directories' names, or their paths where two are called alike."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(runs) else [str(run) for run in runs]


def fail(message: str):
    print(f"plot.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="directories of runs")
    parser.add_argument("--out", type=Path, help="the picture (default: curves.png in the first RUN)")
    args = parser.parse_args()
    matplotlib.rcParams.update({"font.size": 10, "figure.dpi": 110})
    if args.runs:
        return draw_runs(args.runs, args.out or args.runs[0] / "curves.png")
    dial()
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.2), layout="constrained")
    draw(axes[0], RUNS, "step")
    draw(axes[1], RUNS, "time")
    figure.suptitle("The toy, 400 steps, 3 seeds: mean, lowest and highest", fontsize=11)
    figure.savefig(HERE / "toy.png")
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    draw(axis, BRAKES, "step")
    axis.set_title("DPO with s = 100: beta is the brake of a window", fontsize=11)
    figure.savefig(HERE / "brake.png")


if __name__ == "__main__":
    main()
