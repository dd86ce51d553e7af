"""Prints the tables of README.md and results/README.md from the logs: results/toy/, chats/ and mixed/ (of
results/paper_on_a_laptop.sh) and results/speed/ (of results/versus_trl.py and results/benchmark.py).

    python results/table.py
    python results/table.py results/README.md   # and writes them into it, over those that it has
"""

import json
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

from logs import read

HERE = Path(__file__).resolve().parent
ALIKE = 0.15  # of what training gains: the most by which results differ that the paper calls alike (Table 1)


def main():
    tables = ["\n".join(table()) for table in TABLES]
    print("\n\n".join(tables))
    for document in map(Path, sys.argv[1:]):
        text = document.read_text()
        for table in tables:  # found by its first line; what stands there goes up to the next empty line
            place = text.find(table[: table.index("\n") + 1])
            if place >= 0:
                text = text[:place] + table + text[text.index("\n\n", place) :]
        document.write_text(text)


# ---- numbers of a run, one for each seed that is complete


@cache
def logs(name: str) -> list[list[dict]]:
    """The lines of each seed; name: of a run, without its seed, such as toy/dpo-s10."""
    return [read(directory) for directory in sorted(HERE.glob(f"{name}-seed[0-9]"))]


def at(name: str, metric: str, step: int | None = None) -> list[float]:
    """A validation's metric after so many steps, or at the end."""
    found = [{line["step"]: line[metric] for line in lines if metric in line} for lines in logs(name)]
    return [values[max(values) if step is None else step] for values in found]


def tens(name: str, metric: str, number: int) -> list[float]:
    """A step's metric, as the mean of the first (0), second (1) ... or last (-1) ten steps."""
    return [[line[metric] for line in lines if "steps" in line][number] for lines in logs(name)]


def seconds(name: str, part: str) -> list[float]:
    return [
        sum(line["steps"] * line[f"time/{part}"] for line in lines if "steps" in line) for lines in logs(name)
    ]


def sampled(name: str) -> list[float]:
    """Tokens in all."""
    args = settings(name)["args"]
    a_step = args["prompts_per_step"] * args["samples_per_prompt"]
    lengths = ([x["steps"] * x["completions/length"] for x in lines if "steps" in x] for lines in logs(name))
    return [a_step * sum(each) for each in lengths]


def settings(name: str) -> dict:
    return json.loads((next(HERE.glob(f"{name}-seed[0-9]")) / "args.json").read_text())


def command(name: str) -> str:
    """Script and flags, without those that say where a run is, which seed it has and what it keeps."""
    script, *words = settings(name)["command"]
    for flag in ("--out", "--seed", "--log-samples", "--save-every"):
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    return " ".join([script if "/" in script else Path(script).name, *words])


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) > 1:
        return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
    return f"{values[0]:.2f} (one seed)" if values else "-"


def mean_sd(values: list[float]) -> list[str]:
    return [f"{f(values):.2f}" for f in (statistics.mean, statistics.stdev)]


# ---- the dial


PAPER = {"s1": ("58.7", "58.1"), "s10": ("57.2", "-"), "s100": ("58.9", "-"), "sinf": ("53.7", "-")}


def glance():
    """The dial, on the toy and in the paper (its Table 1); runs of which all three seeds are there."""
    yield "| | toy, DPO | toy, GRPO | paper, DPO | paper, GRPO |\n|---|---|---|---|---|"
    start = statistics.mean(value for name in DIAL for value in at(f"toy/{name}", "eval/accuracy", 0))
    yield f"| before | {start:.2f} | {start:.2f} | 47.4 | 47.4 |"
    names = {"s1": "s = 1 (online)", "s10": "s = 10", "s100": "s = 100", "sinf": "s = inf (offline)"}
    for s, name in names.items():
        found = [at(f"toy/{algorithm}-{s}", "eval/accuracy") for algorithm in ("dpo", "grpo")]
        cells = [spread(accuracies) if len(accuracies) == 3 else "-" for accuracies in found]
        yield "| " + " | ".join([name, *cells, *PAPER[s]]) + " |"
    yield f"| s = 100, β = 0.1 | {spread(at('toy/dpo-s100-beta0.1', 'eval/accuracy'))} | - | - | - |"


DIAL = [
    "grpo-s1",
    "dpo-s1",
    "grpo-s10",
    "dpo-s10",
    "dpo-s100",
    "dpo-s100-beta1",
    "dpo-sinf",
    "dpo-s100-beta0.1",
]


def toy():
    yield (
        "| command | accuracy | sd | each seed | seconds | of it sampling | sampled tokens/s | log |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for name in DIAL:
        accuracies, run = at(f"toy/{name}", "eval/accuracy"), f"toy/{name}"
        speed = [tokens / time for tokens, time in zip(sampled(run), seconds(run, "sample"), strict=True)]
        times = [statistics.median(seconds(run, part)) for part in ("step", "sample")]
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        cells = [f"`{command(run)}`", *mean_sd(accuracies), each, *(f"{time:.0f}" for time in times)]
        yield "| " + " | ".join([*cells, f"{statistics.median(speed):,.0f}", f"{run}-seed*"]) + " |"


def chats():
    """The open-ended task (the paper's Table 2)."""
    yield "| run | reward | tokens of an answer | reward a token | seeds |\n|---|---|---|---|---|"
    start = {name: at("chats/dpo-s1", f"eval/{name}", 0) for name in ("reward", "length", "reward_per_token")}
    yield "| before | " + " | ".join(spread(values) for values in start.values()) + " | |"
    for name in sorted(
        {directory.name[:-6] for directory in (HERE / "chats").glob("*-seed[0-9]")}, key=in_order
    ):
        values = [at(f"chats/{name}", f"eval/{metric}") for metric in start]
        yield "| " + " | ".join([f"chats/{name}", *map(spread, values), str(len(values[0]))]) + " |"


def in_order(name: str) -> list:
    """A key: by algorithm and variant, then by s."""
    algorithm, s, *variant = name.split("-")
    return ["-".join(variant), algorithm, float(s[1:])]


def mixed():
    yield (
        "| trained on | accuracy: sums | sd | reward: chats | sd | tokens of an answer |\n"
        "|---|---|---|---|---|---|"
    )
    names = ("eval/accuracy", "eval/reward", "eval/length")
    for name in ("nothing", "sums", "chats", "both", "sums-then-chats", "chats-then-sums"):
        run, step = ("mixed/sums", 0) if name == "nothing" else (f"mixed/{name}", None)
        accuracy, reward, length = (at(run, metric, step) for metric in names)
        cells = [*mean_sd(accuracy), *mean_sd(reward), f"{statistics.mean(length):.1f}"]
        yield "| " + " | ".join([name.replace("-", " "), *cells]) + " |"


# ---- beside the paper


def verdict(ours: list[float], base: list[float], relation: str, gain: float = 0.0) -> str:
    """Whether ours is "above" or "below" the base, or "alike", as the paper has it. A difference of means is
    seen if it exceeds the sum of both standard deviations. gain: what training changes, for "alike".
    """
    if min(len(ours), len(base)) < 2:
        return "not run yet" if not ours or not base else "cannot tell"
    difference = statistics.fmean(ours) - statistics.fmean(base)
    noise = statistics.stdev(ours) + statistics.stdev(base)
    seen = abs(difference) > noise
    if relation == "alike":
        if seen:
            return "partly" if abs(difference) <= ALIKE * gain else "disagrees"
        return "agrees" if abs(difference) + noise <= ALIKE * gain else "cannot tell"
    if not seen:
        return "cannot tell"
    return "agrees" if (difference > 0) == (relation == "above") else "disagrees"


def values(metric: str, run: str) -> list[float]:
    """Of each seed. metric: of a validation; entropy or chosen (log pi/ref of chosen answers, nats), of the
    last ten steps; entropy left: in units of the first ten. run: NAME, or NAME@STEP; @0 is the start.
    """
    name, _, step = run.partition("@")
    if metric == "entropy left":
        first, end = values("entropy", f"{name}@0"), values("entropy", run)
        return [b / a for a, b in zip(first, end, strict=True)]
    if metric == "chosen":
        return [value / settings(name)["args"]["beta"] for value in tens(name, "rewards/chosen", -1)]
    if metric == "entropy":
        return tens(name, "entropy", max(0, int(step) // 10 - 1) if step else -1)
    return at(name, f"eval/{metric}", int(step) if step else None)


def seeds():
    """How many runs of the script are there."""
    script = ["bash", HERE / "paper_on_a_laptop.sh", "--list"]
    listed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split()[0].rpartition("-seed")[0] for line in listed}
    found = [len(logs(name)) for name in names]
    yield "| seeds that are complete | 3 | 2 | 1 | 0 |\n|---|---|---|---|---|"
    yield "| runs | " + " | ".join(str(found.count(n)) for n in (3, 2, 1, 0)) + " |"


def agreement():
    yield "| the paper says | its numbers | ours: runs | mean ± sd | verdict | |\n|---|---|---|---|---|---|"
    for line in filter(None, (HERE / "claims.txt").read_text().splitlines()):
        if line.startswith("#"):
            continue
        says, numbers, metric, run, relation, other, *why = line.split(" · ")
        ours = values(metric, run)
        base = [0.0] * 3 if other == "0" else values(metric, other)
        start = values(metric, f"{other.partition('@')[0]}@0") if relation == "alike" else base
        gain = abs(statistics.fmean(base) - statistics.fmean(start)) if base else 0.0
        cells = [says, numbers, f"{metric}: {run} against {other}", f"{spread(ours)} against {spread(base)}"]
        yield "| " + " | ".join([*cells, f"**{verdict(ours, base, relation, gain)}**", *(why or [""])]) + " |"


def old_completions():
    """Beyond the paper: GRPO on completions that are up to s - 1 steps old."""
    yield "| GRPO | ratio, clipped (default) | ratio, no clip | no ratio, no clip |\n|---|---|---|---|"
    for s in ("1", "10", "100", "inf"):
        cells = [
            spread(values("accuracy", f"toy/grpo-s{s}{variant}")) for variant in ("", "-noclip", "-noratio")
        ]
        yield "| " + " | ".join([f"s = {s}", *cells]) + " |"


def variants():
    """Every other run on sums: after 300 steps, beside the run without its flag."""
    yield "| run | command | accuracy | tokens of an answer | entropy | seeds |\n|---|---|---|---|---|---|"
    names = {directory.name[:-6] for directory in (HERE / "toy").glob("*-seed[0-9]")} - {*DIAL}
    names = {name for name in names if settings(f"toy/{name}")["args"]["steps"] == 300}
    for base in ("dpo-s1", "dpo-s10", "dpo-s100", "dpo-sinf", "grpo-s1"):
        rows = [f"{base}@300", *sorted(name for name in names if name.startswith(f"{base}-"))]
        for name in rows if len(rows) > 1 else []:
            run = f"toy/{name}"
            found = [values(metric, run) for metric in ("accuracy", "length")]
            entropy = tens(run.partition("@")[0], "entropy", 29)
            what = "(as in the table above, after 300 steps)" if "@" in name else f"`{command(run)}`"
            yield "| " + " | ".join([run, what, *map(spread, [*found, entropy]), str(len(entropy))]) + " |"


def versus():
    found = [json.loads((HERE / "speed" / f"versus-{n}.json").read_text())["found"] for n in (1, 2)]
    yield (
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
        yield "| " + " | ".join(cells) + " |"


LEFT_OUT = ("window of 4", "window of 64", "32 prompts", "128 prompts", ": most memory",  # of what is printed
            "save inside a window", "10 steps ahead")  # fmt: skip


def parts():
    yield "| what | median (least to most) | | model |\n|---|---|---|---|"
    read = lambda name: json.loads((HERE / "speed" / f"{name}.json").read_text())["figures"]  # noqa: E731
    figures = {"toy": read("toy") | read("rows") | read("window"), "30m": read("30m"), "135m": read("135m")}
    for name in figures:
        for what, figure in figures[name].items():
            if any(words in what for words in LEFT_OUT):
                continue
            middle, least, most = (f(figure["values"]) for f in (statistics.median, min, max))
            middle, least, most = (f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in (middle, least, most))
            yield f"| {what} | {middle} ({least} to {most}) | {figure['unit']} | {name} |"


TABLES = (glance, toy, chats, mixed, seeds, agreement, old_completions, variants, versus, parts)

if __name__ == "__main__":
    main()
