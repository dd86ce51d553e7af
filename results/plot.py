"""Draws the README's figures from the logs in results/toy/ (needs matplotlib, which training does not).

python results/plot.py             # writes results/toy.png and results/brake.png
"""

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


def main():
    matplotlib.rcParams.update({"font.size": 10, "figure.dpi": 110})
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
