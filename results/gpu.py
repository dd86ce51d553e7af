"""What results/first_gpu_run.sh needs beside the scripts: random models, a reward, vLLM alone, the report.

python results/gpu.py model DIRECTORY SHAPE PROMPT NEW      a random Qwen2, a tokenizer and rows for it
python -m results.gpu dpo|grpo FLAGS                        trains one: half of what it writes is right
python results/gpu.py alone MODEL PROMPTS SAMPLES PROMPT NEW    tokens/s of vLLM in a process of its own
python results/gpu.py report DIRECTORY FILE                 a report of what the script has run there
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from rewards import verifier  # noqa: E402

PADDING = 64  # rows of the matrices that the tokenizer has no ids for
# dense bfloat16 operations a second, as the makers give them
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "A10": 125e12, "L4": 121e12,
}  # fmt: skip


@verifier("coin", on_timeout=0.0)
def coin(answer, text, /, **columns):
    """1 for about half of all texts: a random model has to be trained on something."""
    return float(sum(map(ord, text)) % 2)


def model(directory: str, shape: str, prompt_tokens: int, new_tokens: int):
    """shape: hidden,layers,heads,key-value heads,intermediate,vocabulary. A prompt is small letters, each of
    them a token; most other ids are words of the form w123.
    """
    import random

    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    hidden, layers, heads, kv, intermediate, vocab = map(int, shape.split(","))
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=True, bos_token_id=None,
        max_position_embeddings=max(256, int(prompt_tokens) + int(new_tokens)), eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(config).to(torch.bfloat16)
    for name, p in lm.named_parameters():
        if name.endswith("bias"):  # else they are zeros, and one that is left out would not show
            torch.nn.init.normal_(p, std=0.1)
    lm.save_pretrained(directory)
    words = ["<end>", *sorted(ByteLevel.alphabet())]
    words += [f"w{i}" for i in range(vocab - PADDING - len(words))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Qwen2Tokenizer(vocab=ids, unk_token="<end>", eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    letters, rng = "abcdefghijklmnopqrstuvwxyz", random.Random(0)
    with open(Path(directory) / "rows.jsonl", "w") as file:
        for _ in range(1000):
            prompt = "".join(rng.choices(letters, k=int(prompt_tokens)))
            file.write(json.dumps({"prompt": prompt, "reward": "coin", "answer": ""}) + "\n")


def alone(directory: str, prompts: int, samples: int, prompt_tokens: int, new_tokens: int):
    """Nothing else is in the process, and no log-probs are asked for. The second of two calls counts."""
    import time

    import torch
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer, cuda = AutoTokenizer.from_pretrained(directory), torch.cuda.is_available()
    lines = (Path(directory) / "rows.jsonl").read_text().splitlines()[: int(prompts)]
    prompts = [{"prompt_token_ids": tokenizer(json.loads(line)["prompt"])["input_ids"]} for line in lines]
    llm = LLM(
        directory, skip_tokenizer_init=True, max_model_len=int(prompt_tokens) + int(new_tokens),
        enforce_eager=not cuda, gpu_memory_utilization=0.5, dtype="bfloat16" if cuda else "float32",
    )  # fmt: skip
    params = SamplingParams(n=int(samples), max_tokens=int(new_tokens), stop_token_ids=[0], detokenize=False)
    for _ in range(2):
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
    tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    print(f"ALONE {tokens / seconds:.1f}")


# ---- the report


def report(directory: str, file: str):
    from timed_run import hardware

    from run import provenance, write_whole

    out, facts = Path(directory), provenance()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# First GPU run",
        "",
        f"`bash results/first_gpu_run.sh`, {_date(out)}, commit {facts['commit']}.",
        f"{hardware()['gpu'] or 'No GPU'}; {versions}.",
        "",
        *steps(out), *tests(out), *toy(out), *reloads(out), *speed(out), *preflight(out),
    ]  # fmt: skip
    write_whole(Path(file), "\n".join(lines) + "\n")
    print(file)


def _date(out: Path) -> str:
    import time

    newest = max((f.stat().st_mtime for f in out.glob("*.log")), default=time.time())
    return time.strftime("%Y-%m-%d", time.gmtime(newest))


def steps(out: Path) -> list[str]:
    found = ["| step | seconds | command |", "|---|---|---|"]
    for log in sorted(out.glob("*.log"), key=lambda log: log.stat().st_mtime):
        text = log.read_text(errors="replace").splitlines()
        done = log.with_suffix(".done")
        said = [line for line in text[1:] if line.strip()]
        last = next((line for line in reversed(said) if "rror" in line), said[-1] if said else "")
        took = done.read_text().strip() if done.exists() else f"failed: `{last[-150:]}`"
        found.append(f"| {log.stem} | {took} | `{text[0][2:]}` |")
    return [*found, ""]


def lines_of(directory: Path) -> list[dict]:
    file = directory / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tests(out: Path) -> list[str]:
    log = out / "tests.log"
    said = re.findall(r"^.*\b(?:passed|failed)\b.*$", log.read_text(), re.MULTILINE) if log.exists() else []
    return ["## Tests", "", f"`{said[-1].strip('= ')}`", ""] if said else []


def toy(out: Path) -> list[str]:
    found = [
        "## The toy",
        "",
        "| run | accuracy before | after | sync/age at most | largest gap | GiB held |",
    ]
    found.append("|---|---|---|---|---|---|")
    for run in sorted(out.glob("toy-*/metrics.jsonl")):
        lines = lines_of(run.parent)
        most = lambda name, lines=lines: max((line[name] for line in lines if name in line), default=0)  # noqa: E731
        accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
        cells = [f"{x:.3f}" for x in (accuracy[0], accuracy[-1])] if accuracy else ["-", "-"]
        cells += [f"{most('sync/age'):.0f}", f"{most('sampler/logp_gap_max'):.2g}"]
        found.append(f"| {run.parent.name} | {' | '.join(cells)} | {most('memory/held_gib'):.1f} |")
    return [*found, ""] if len(found) > 4 else []


def reloads(out: Path) -> list[str]:
    found = [
        "## Policy against sampler after each reload, nats",
        "",
        "| run | reloads | mean | max |",
        "|---|---|---|---|",
    ]
    for run in sorted(out.glob("reloads-*/metrics.jsonl")):
        lines = [line for line in lines_of(run.parent) if "sampler/logp_gap_mean" in line]
        if not lines:
            continue
        mean = statistics.fmean(line["sampler/logp_gap_mean"] for line in lines)
        worst = max(line["sampler/logp_gap_max"] for line in lines)
        found.append(f"| {run.parent.name} | {len(lines)} | {mean:.2g} | {worst:.2g} |")
    return [*found, ""] if len(found) > 4 else []


def medians(directory: Path) -> dict[str, float]:
    """Of the metrics of all steps but the first, in which kernels are chosen and graphs captured."""
    lines = [line for line in lines_of(directory) if line["step"] and "loss" in line]
    names = {name for line in lines for name in line}
    return {name: statistics.median(line[name] for line in lines if name in line) for name in names}


def speed(out: Path) -> list[str]:
    head = [
        "run",
        "update, tokens/s",
        "MFU",
        "sampling, tokens/s",
        "vLLM alone",
        "reload, s",
        "checkpoint, s",
        "peak, GiB",
    ]
    found = ["## Speed and memory", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in sorted(out.glob("*packing/metrics.jsonl")):
        size, name = run.parent.name.split("-")[0], run.parent.name
        m, log = medians(run.parent), (out / f"{name}.log").read_text(errors="replace")
        saves = [float(seconds) for seconds in re.findall(r"checkpoint in ([\d.]+) s", log)]
        other = (out / f"{size}-alone.log").read_text() if (out / f"{size}-alone.log").exists() else ""
        vllm = re.findall(r"ALONE ([\d.]+)", other)
        synced = [
            line["time/sync"]
            for line in lines_of(run.parent)
            if line["step"] and line.get("time/sync", 0) > 0.01
        ]
        update, sampling = (m.get(f"tokens_per_second/{part}", 0) for part in ("update", "sample"))
        cells = [name, f"{update:,.0f}", mfu(out / size, update), f"{sampling:,.0f}"]
        cells.append(f"{float(vllm[-1]):,.0f}" if vllm else "-")
        cells += [f"{statistics.median(x):.2f}" if x else "-" for x in (synced, saves)]
        peak = max((line.get("memory/peak_gib", 0) for line in lines_of(run.parent)), default=0)
        found.append(f"| {' | '.join([*cells, f'{peak:.1f}'])} |")
    note = (
        "A prompt counts as often as it has completions, also where they share it. MFU counts 6 operations a "
        "parameter and token, no attention, no recomputation and no reference."
    )
    return [*found, "", note, ""] if len(found) > 4 else []


def mfu(model: Path, speed: float) -> str:
    import torch
    from memory import shape_of
    from transformers import AutoConfig

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    return f"{6 * shape_of(AutoConfig.from_pretrained(model)).parameters * speed / peak:.0%}" if peak else "-"


def preflight(out: Path) -> list[str]:
    """The screen, and what the run of the same flags then had."""
    if not all((out / f"{step}.done").exists() for step in ("preflight", "large-packing")):
        return []
    screen = (out / "preflight.log").read_text(errors="replace")
    screen = screen[screen.index("\nmodel  ") + 1 :].splitlines()
    steps = [line for line in lines_of(out / "large-packing") if "loss" in line]
    m, mean = medians(out / "large-packing"), lambda name: statistics.fmean(s[name] for s in steps)
    took = sum(step["time/step"] for step in steps)
    had = [
        f"unequal rewards in {1 - mean('frac_reward_zero_std'):.0%} of the groups",
        f"completions of {mean('completions/length'):.1f} tokens",
        f"{mean('completions/clipped_ratio'):.0%} of them cut",
        f"sampling {m['tokens_per_second/sample']:,.0f} tokens/s",
        f"update {m['tokens_per_second/update']:,.0f} tokens/s",
        f"{took:.1f} s for {len(steps)} steps, without checkpoints and validations",
    ]
    if "memory/peak_gib" in m:
        had.append(f"peak of torch's tensors {max(s['memory/peak_gib'] for s in steps):.2f} GiB")
    return [
        "## --preflight, and the run",
        "",
        "```",
        *screen,
        "```",
        "",
        "The run had:",
        *(f"- {x}" for x in had),
        "",
    ]


if __name__ == "__main__":
    what, *more = sys.argv[1:] or [""]
    if what in ("dpo", "grpo"):
        import processes
        import train_dpo
        import train_grpo

        processes.launch(lambda: {"dpo": train_dpo, "grpo": train_grpo}[what].main(more))
    elif what in ("model", "alone", "report"):
        {"model": model, "alone": alone, "report": report}[what](*more)
    else:
        sys.exit(__doc__)
