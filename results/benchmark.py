"""How fast each part is, and the whole loop: python results/benchmark.py

The toy by default; `--random 576,30,9,3,1536,49152` makes a random model of that shape (hidden, layers,
heads, key-value heads, intermediate, vocabulary; this one is SmolLM2-135M's) with as many words in its
tokenizer. Every figure is the median of --repeats, least and most in brackets; what is compared takes turns
in one process. The parts `loop`, `start` and `window` are runs of the scripts (`results/timed_run.py`).
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import timed_run as timed
from timed_run import ROOT

sys.path.insert(0, str(ROOT))
PARTS = ["generate", "update", "padding", "reload", "save", "linear", "loop", "start", "window"]


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    timed.add_flags(add)
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--sampler", choices=["vllm", "hf"], default="vllm")
    add("--prompt-tokens", type=int, default=8, help="of the made-up prompts of the parts")
    add("--windows", type=int, nargs="+", default=[1, 4, 16, 64], help="steps generated in one call")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=1, help="of torch on a CPU")
    add("--json", type=Path, help="also write the figures, versions, commit and hardware to this file")
    return parser.parse_args(argv)


def repeated(repeats: int, *jobs) -> list[list[float]]:
    """Seconds of each job, which take turns; each runs once more before, uncounted."""
    import torch

    seconds = [[] for _ in jobs]
    for turn in range(repeats + 1):
        for job, taken in zip(jobs, seconds, strict=True):
            began = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                taken.append(time.perf_counter() - began)
    return seconds


class Bench:
    def __init__(self, args):
        import torch

        import processes
        from loading import load_policy
        from sampler import load_sampler
        from tokenizer import load_tokenizer

        self.args, self.found, model = args, {}, args.model
        self.micro_batch_tokens = timed.micro_batch_tokens(args)
        if not set(args.parts) - {"loop", "start", "window"}:
            return
        torch.set_num_threads(args.threads)
        _, _, self.device = processes.start()
        self.dtype, length = processes.compute_dtype(self.device), args.prompt_tokens + args.new_tokens
        tokenizer, self.vocab, stop_ids = load_tokenizer(model, length)
        self.policy = load_policy(model, self.device, self.vocab, 1.0)
        self.sampler = load_sampler(
            args.sampler, model, tokenizer=tokenizer, vocab=self.vocab, stop_ids=stop_ids, device=self.device,
            dtype=self.dtype, max_length=length, gpu_memory=0.3, sleep=False, trust=False,
        )  # fmt: skip
        self.bytes = sum(p.numel() * p.element_size() for p in self.policy.parameters())
        self.rng = random.Random(0)

    def ids(self, tokens: int) -> list[int]:
        return [self.rng.randrange(4, min(self.vocab, 2**15)) for _ in range(tokens)]

    def prompts(self, count: int) -> list[list[int]]:
        return [self.ids(self.args.prompt_tokens) for _ in range(count)]

    def examples(self, count: int) -> list:
        """`count` prompts, with completions of heavy-tailed lengths (log-normal)."""
        from data import Completion, Row
        from packing import Example

        examples, most = [], self.args.new_tokens
        for prompt in self.prompts(count):
            lengths = [
                min(most, 1 + int(self.rng.lognormvariate(math.log(most / 4), 1)))
                for _ in range(self.args.samples)
            ]
            group = [Completion(self.ids(length), [-1.0] * length, "", "stop", 0) for length in lengths]
            examples.append(Example(Row("", prompt, None, None), group))
        return examples

    def put(self, name: str, values: list[float], unit: str):
        self.found[name] = {"unit": unit, "values": values}
        middle, least, most = (f"{f(values):,.4g}" for f in (statistics.median, min, max))
        print(f"| {name} | {middle} ({least} to {most}) | {unit} |", flush=True)

    def put_ratio(self, name: str, over: list[float], under: list[float]):
        self.put(name, [a / b for a, b in zip(over, under, strict=True)], "times")

    # ---- the parts

    def generate(self):
        args, tokens = self.args, {}

        def job(window, prompts):
            def run():
                groups = self.sampler.generate(prompts, args.samples, args.new_tokens, 1.0, seed=0)
                tokens[window] = sum(len(c.ids) for group in groups for c in group)

            return run

        jobs = [job(window, self.prompts(window * args.prompts)) for window in args.windows]
        speeds = {}
        for window, seconds in zip(args.windows, repeated(args.repeats, *jobs), strict=True):
            speeds[window] = [tokens[window] / s for s in seconds]
            self.put(f"generate, window of {window}", speeds[window], "tokens/s")
        first, *others = args.windows
        for window in others:
            self.put_ratio(f"generate, window of {window} against {first}", speeds[window], speeds[first])

    def forward_backward(self, examples, backward=True, packing=True):
        import torch

        from packing import micro_batches

        can = self.policy.shares

        def run():
            self.policy.shares = can and packing
            for batch in micro_batches(examples, self.policy, self.micro_batch_tokens):
                with torch.set_grad_enabled(backward):
                    logps_BT, _ = self.policy(batch)
                    if backward:
                        logps_BT.sum().backward()
            self.policy.zero_grad()
            self.policy.shares = can

        return run

    def update(self):
        examples = self.examples(self.args.prompts)
        tokens = sum(len(e.row.ids) + len(c.ids) for e in examples for c in e.completions)
        jobs = [
            self.forward_backward(examples, backward=False),
            self.forward_backward(examples),
            self.forward_backward(examples, packing=False),
        ]
        forward, both, apart = repeated(self.args.repeats, *jobs)
        self.put("log-probs, forward", [tokens / s for s in forward], "tokens/s")
        self.put("log-probs, forward and backward", [tokens / s for s in both], "tokens/s")
        self.put_ratio("the same with --no-packing, against it", apart, both)

    def padding(self):
        from packing import micro_batches, split

        shares = []
        for _ in range(self.args.repeats):
            examples = self.examples(self.args.prompts)
            sequences = [s for e in examples for s in split(e, self.policy, self.micro_batch_tokens)]
            batches = micro_batches(examples, self.policy, self.micro_batch_tokens)
            padded = sum(batch.ids_RL.numel() for batch in batches)
            shares.append(100 * (1 - sum(sequence.width for sequence in sequences) / padded))
        self.put("padding of the update's tokens", shares, "%")

    def reload(self):
        from itertools import count

        version, held = count(1), dict(self.policy.full_weights(self.dtype))
        size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        jobs = [
            lambda: self.sampler.reload(self.policy.full_weights(self.dtype), next(version)),
            lambda: [tensor.clone() for tensor in held.values()],
        ]
        seconds, copies = repeated(self.args.repeats, *jobs)
        self.put("reload", seconds, "s")
        self.put("reload: speed", [size / s / 1e9 for s in seconds], "GB/s")
        self.put_ratio("reload against a copy in memory", seconds, copies)

    def save(self):
        import torch

        from checkpoint import Checkpoints, Progress
        from policy import Reference
        from window import SAMPLING, Rollouts

        optimizer = torch.optim.AdamW(self.policy.parameters())
        with tempfile.TemporaryDirectory() as folder:
            args = SimpleNamespace(keep=1, steps=9, model="", **dict.fromkeys(SAMPLING))
            run = SimpleNamespace(
                directory=Path(folder), facts={}, sizes=dict, say=lambda text: None, args=args
            )
            prompts = SimpleNamespace(fingerprint=0)
            window = Rollouts(run.directory, args, prompts)
            parts = {"policy": self.policy, "reference": Reference(None, False), "optimizer": optimizer}
            checkpoints = Checkpoints(run, prompts, window=window, **parts)
            [seconds] = repeated(self.args.repeats, lambda: checkpoints.save(Progress()))
            size = sum(file.stat().st_size for file in Path(folder).rglob("*.distcp"))
        self.put("save", seconds, "s")
        self.put("save: speed", [size / s / 1e9 for s in seconds], "GB/s")

    def linear(self):
        sizes = [8, 32, 128, 256]
        examples = {size: self.examples(size) for size in sizes}
        prompts = {size: self.prompts(size) for size in sizes}
        n = self.args.samples
        jobs = [self.forward_backward(examples[size]) for size in sizes]
        jobs += [
            lambda size=size: self.sampler.generate(prompts[size], n, self.args.new_tokens, 1.0, seed=0)
            for size in sizes
        ]
        seconds = repeated(self.args.repeats, *jobs)
        for name, part in (("update", seconds[:4]), ("generate", seconds[4:])):
            for size, taken in zip(sizes, part, strict=True):
                self.put(f"{name}, {size} prompts", [size * n / s for s in taken], "answers/s")

    # ---- runs of the scripts, each a process of its own

    def run(self, algorithm: str, s: str, steps: int) -> dict:
        args = self.args
        same = "model prompts samples max_prompt_tokens new_tokens beta sampler".split()
        flags = {name.replace("_", "-"): getattr(args, name) for name in same}
        flags |= {"algorithm": algorithm, "sync-steps": s, "steps": steps, "data": args.data}
        flags |= {"micro-batch-tokens": self.micro_batch_tokens}
        command = [sys.executable, str(ROOT / "results" / "timed_run.py")]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.split("REPORT")[1])

    def loop(self):
        for algorithm, s in itertools.product(("grpo", "dpo"), (1, 10)):
            window = max(5, s)
            found = self.run(algorithm, s, window * (1 + self.args.repeats))
            ends = found["times"][window - 1 :: window]
            sampled = window * self.args.prompts * self.args.samples
            speeds = [sampled / (b - a) for a, b in itertools.pairwise(ends)]
            self.put(f"whole loop, {algorithm}, s = {s}", speeds, "sampled answers/s")
            self.put(f"whole loop, {algorithm}, s = {s}: most memory", [found["all"] / 1e9], "GB")

    def start(self):
        """From the command to the end of the first step."""
        found = [self.run("dpo", 10, 1) for _ in range(self.args.repeats)]
        whole = [one["times"][0] - one["began"] for one in found]
        imports = [one["imported"] - one["began"] for one in found]
        engine = [one["engine"] for one in found]
        self.put("start: until the first step is done", whole, "s")
        self.put("start: of it importing torch and transformers", imports, "s")
        self.put("start: of it importing vLLM", engine, "s")
        rest = [all_ - a - b for all_, a, b in zip(whole, imports, engine, strict=True)]
        self.put("start: of it the rest: data, models, engine, the step", rest, "s")

    def window(self):
        """No more than a chunk of completions is in memory, however long the window is."""
        for s in ("10", "100", "inf"):
            found = self.run("grpo", s, 40)
            self.put(f"s = {s}: peak in 40 steps", [found["all"] / 1e9], "GB")


def main():
    args = get_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        args.data = os.path.relpath(ROOT / "toy" / "train.jsonl")
        if args.random:
            args.max_prompt_tokens = args.prompt_tokens
            sizes = (args.prompt_tokens, args.new_tokens)
            args.model, args.data = timed.random_model(args.random, folder, *sizes)
        print(f"{' '.join(sys.argv)}\n{json.dumps(timed.hardware())}, {args.threads} thread(s)")
        bench = Bench(args)
        print("| what | median (least to most) | |\n|---|---|---|")
        for part in args.parts:
            getattr(bench, part)()
    if args.json:
        from run import provenance, write_whole

        flags = {name: str(value) for name, value in vars(args).items()}
        facts = {"flags": flags, **provenance(), "hardware": timed.hardware(), "figures": bench.found}
        write_whole(args.json, json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
