"""Draws a run's curves, or the project's own figures (needs matplotlib, which training does not).

python results/plot.py RUN [RUN ...]   # reward, validation, entropy, length, age against steps
python results/plot.py                 # the project's own, as results/*.png
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

import logs
from table import values

HERE = Path(__file__).parent
# a colour (Okabe and Ito's, which colour-blind eyes tell apart) and a marker for each s; GRPO has dashes
BLUE, SKY, GREEN, ORANGE, BLACK = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#000000"
S = {
    "dpo-s1": ("DPO, s = 1 (online)", BLUE, "o-"),
    "dpo-s5": ("DPO, s = 5 (chats)", BLACK, "s-"),
    "dpo-s10": ("DPO, s = 10", SKY, "^-"),
    "dpo-s100": ("DPO, s = 100", GREEN, "D-"),
    "dpo-sinf": ("DPO, s = inf (offline)", ORANGE, "v-"),
    "grpo-s1": ("GRPO, s = 1 (online)", BLUE, "o--"),
    "grpo-s10": ("GRPO, s = 10 (sums)", SKY, "^--"),
    "grpo-s100": ("GRPO, s = 100 (sums)", GREEN, "D--"),
    "grpo-sinf": ("GRPO, s = inf (sums)", ORANGE, "v--"),
}
BRAKES = {
    "dpo-s100": ("β = 3", GREEN, "D-"),
    "dpo-s100-beta1": ("β = 1", GREEN, "D--"),
    "dpo-s100-beta0.1": ("β = 0.1", GREEN, "D:"),
}
FIRST = ("dpo-s1", "dpo-s5", "dpo-s10", "dpo-s100", "dpo-sinf", "grpo-s1")  # what the first figure shows


def curve(axis, task: str, name: str, metric: str, style: tuple) -> int:
    """The mean over seeds, and a band from the lowest to the highest. Returns how many seeds there are."""
    per_step, seeds = defaultdict(list), sorted((HERE / task).glob(f"{name}-seed[0-9]"))
    for directory in seeds:
        for line in logs.read(directory):
            if line.get(metric) is not None:  # a mean of ten steps stands in their middle
                per_step[line["step"] - line.get("steps", 0) / 2].append(line[metric])
    values, (_, colour, dash) = [*per_step.values()], style
    every = max(1, len(values) // 8)
    look = {"linewidth": 1.8, "markersize": 4.5, "markevery": (every // 2, every)}
    axis.plot([*per_step], [*map(statistics.fmean, values)], dash, color=colour, **look)
    axis.fill_between(
        [*per_step], [*map(min, values)], [*map(max, values)], color=colour, alpha=0.15, linewidth=0
    )
    return len(seeds) if per_step else 0


def tidy(axis, title: str = "", ylabel: str = ""):
    axis.set(title=title, ylabel=ylabel, xlim=(0, None))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def legend(figure, styles: dict, columns: int = 3):
    lines = [
        plt.Line2D([], [], color=colour, marker=dash[0], linestyle=dash[1:], linewidth=1.8, markersize=4.5)
        for _, colour, dash in styles.values()
    ]
    names = [label for label, *_ in styles.values()]
    figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False)


def sweep():
    """The s sweep of both tasks."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4.4), layout="constrained")
    panels = (
        ("toy", "eval/accuracy", "sums, with a verifier", "validation accuracy"),
        ("chats", "eval/reward", "chats, with a reward model", "validation reward (the model's score)"),
    )
    for axis, (task, metric, title, ylabel) in zip(axes, panels, strict=True):
        seeds = min(filter(None, [curve(axis, task, name, metric, S[name]) for name in FIRST]))
        tidy(axis, f"{title} ({seeds} seeds)", ylabel)
        axis.set_xlabel("optimizer step")
    axes[0].set_ylim(0, 1)
    legend(figure, {name: S[name] for name in FIRST})
    figure.savefig(HERE / "toy.png")


DYNAMICS = {
    "reward": "reward of the step",
    "completions/length": "tokens of a sample",
    "entropy": "entropy (nats a token)",
    "eval/kl": "KL to the start\n(nats an answer)",
}
TASKS = {"toy": "sums", "chats": "chats"}


def dynamics():
    """What the paper's section 4.2 and 5 look at, for each s, on both tasks."""
    figure, axes = plt.subplots(4, 2, figsize=(8.5, 9.5), layout="constrained")
    for row, (metric, ylabel) in zip(axes, DYNAMICS.items(), strict=True):
        for axis, (task, title) in zip(row, TASKS.items(), strict=True):
            where = ("kl", f"{title}-") if metric == "eval/kl" else (task, "")
            drawn = [curve(axis, where[0], where[1] + name, metric, style) for name, style in S.items()]
            title = f"{title} ({min(filter(None, drawn))} seeds)" if metric == "reward" else ""
            tidy(axis, title, ylabel if task == "toy" else "")
            if metric == "completions/length":
                axis.set_ylim(0, 7)
            elif metric != "reward":
                axis.set_ylim(0, None)
            axis.set_visible(any(drawn))
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    legend(figure, S)
    figure.savefig(HERE / "dynamics.png")


ABLATIONS = [  # groups of run -> what it is called; the first of a group is what the others differ from
    {
        "dpo-s1@300": "online DPO",
        "dpo-s1-allpairs": "GroupDPO (all pairs)",
        "dpo-s1-grpo0.01": "GroupDPO + 0.01 GRPO",
        "dpo-s1-grpo0.001": "GroupDPO + 0.001 GRPO",
        "dpo-s1-nll": "+ NLL of the chosen",
        "dpo-s1-lengthnorm": "means over tokens",
        "dpo-s1-eps1e-4": "Adam's epsilon 1e-4",
        "dpo-s1-entropy1e-4": "entropy bonus 1e-4",
        "dpo-s1-entropy5e-4": "entropy bonus 5e-4",
        "dpo-s1-entropy0.5": "entropy bonus 0.5",
        "dpo-s1-entropy5": "entropy bonus 5",
        "dpo-s1-fixed": "reference fixed",
        "dpo-s1-fixed-beta0.1": "reference fixed, β = 0.1",
    },
    {
        "dpo-s10@300": "DPO, s = 10",
        "dpo-s10-fixed": "reference fixed",
        "dpo-s10-fixed-beta0.1": "reference fixed, β = 0.1",
    },
    {
        "dpo-s100@300": "DPO, s = 100",
        "dpo-s100-fixed": "reference fixed",
        "dpo-s100-beta0.1@300": "β = 0.1",
        "dpo-s100-beta0.1-eps1e-4": "β = 0.1, epsilon 1e-4",
    },
    {"dpo-sinf@300": "offline DPO", "dpo-sinf-nll": "+ NLL of the chosen"},
    {
        "grpo-s1@300": "online GRPO, groups of 8",
        "grpo-s1-n4": "groups of 4",
        "grpo-s1-n12": "groups of 12",
        "grpo-s1-seqnorm": "means over tokens",
    },
]


def ablations():
    """Accuracy on sums after 300 steps: mean and range over seeds, beside what each group differs from."""
    labels, y = {}, 0.0
    figure, axis = plt.subplots(figsize=(8.5, 8), layout="constrained")
    for group in ABLATIONS:
        found = {run: values("accuracy", f"toy/{run}") for run in group}
        found = {run: accuracies for run, accuracies in found.items() if accuracies}
        if len(found) < 2:
            continue
        for number, (run, accuracies) in enumerate(found.items()):
            mean, (colour, marker) = statistics.fmean(accuracies), (BLUE, "o") if number else (BLACK, "D")
            if number == 0:
                axis.plot([mean] * 2, [y, y - len(found) + 1], ":", color="0.5", linewidth=1.2, zorder=0)
            axis.plot([min(accuracies), max(accuracies)], [y, y], color=colour, linewidth=2.5)
            axis.plot(mean, y, marker, color=colour, markersize=7)
            labels[y] = group[run] if len(accuracies) > 1 else f"{group[run]} (one seed)"
            y -= 1
        y -= 0.6
    figure.set_size_inches(8.5, 1 + 0.3 * -y)
    axis.set_yticks([*labels], labels.values())
    tidy(axis)
    axis.set(xlim=(0, 1), ylim=(y + 1, 1))
    axis.set_xlabel("validation accuracy after 300 steps: mean, lowest and highest seed")
    figure.savefig(HERE / "ablations.png")


def brake():
    figure, axis = plt.subplots(figsize=(8.5, 3.9), layout="constrained")
    for name, style in BRAKES.items():
        curve(axis, "toy", name, "eval/accuracy", style)
    tidy(axis, "DPO with s = 100: β is the brake of a window", "validation accuracy")
    axis.set(ylim=(0, 1), xlabel="optimizer step")
    legend(figure, BRAKES)
    figure.savefig(HERE / "brake.png")


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
    matplotlib.rcParams["figure.dpi"] = 200  # twice the width that a README has
    for draw in (sweep, dynamics, ablations, brake):
        draw()


if __name__ == "__main__":
    main()
