"""Ours against TRL on the same work, side by side: python results/versus_trl.py

Beforehand `pip install trl`. Both sides train the same model on the same prompts with the same number of
answers, lengths, reward, optimizer, learning rate and dtype (float32 on a CPU; TRL's vLLM too, which TRL
leaves at bfloat16 otherwise: --trl-dtype auto). Each side is a process of its own with --threads threads;
the sides alternate. The reward is 1 for a right answer, plus a thousandth of the answer's place in its group,
so that no group is without a signal and both sides train on every answer. Before any ratio is printed, tokens
and answers of both sides are compared. What is measured: the time between ends of windows (s steps), so
everything a step does is in it: generation, reward, update, reload, logging. Start-up is reported beside it.
"""

import argparse
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RUNS = ["grpo 1 vllm", "grpo 1 hf", "grpo 10 vllm", "grpo 10 hf"]
RUNS += ["dpo 1 vllm", "dpo 1 hf", "dpo 10 vllm", "dpo 10 hf"]  # TRL's online DPO has no window: always s = 1
RATE = 1e-6  # learning rate: the answers' lengths stay those of the model


def get_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--runs", nargs="+", default=RUNS, help="'ALGORITHM SYNC_STEPS SAMPLER'")
    add("--model", default=str(ROOT / "toy" / "model"))
    add("--prompts", type=int, default=32, help="a step")
    add("--beta", type=float, default=0.001, help="GRPO's, the paper's; TRL's default is 0: no reference")
    add("--samples", type=int, default=8, help="of a prompt; DPO: always 2, TRL knows no other number")
    add("--new-tokens", type=int, default=8)
    add("--max-prompt-tokens", type=int, default=24)
    add(
        "--windows",
        type=int,
        default=6,
        help="that are measured, after one that is not; of 10 steps at s = 1",
    )
    add("--pairs", type=int, default=3, help="of runs of both sides")
    add("--threads", type=int, default=1, help="of torch, on both sides")
    add("--trl-dtype", default="float32", help="of TRL's vLLM; auto: what TRL's users get")
    add("--json", type=Path, help="write the table's numbers to this file")
    add("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)  # the process that is measured
    return parser.parse_args()


# ---- the sides: each prints {"times": the end of each step, "tokens", "answers": of each step}


def jitter(place: int) -> float:
    return place / 1000


def ours(args, algorithm: str, s: int, sampler: str, steps: int, report: dict):
    sys.path.insert(0, str(ROOT))
    import rewards
    import run as runs
    import train_dpo
    import train_grpo

    score, record = rewards.Scorer.score, runs.Run.record

    def score_and_jitter(self, groups):
        score(self, groups)
        for _, completions in groups:
            for place, c in enumerate(completions):
                c.reward += jitter(place)

    def note(self, metrics):
        record(self, metrics)
        report["times"].append(time.time())
        report["tokens"].append(metrics["completions/length"] * args.prompts * args.samples)
        report["answers"].append((1 - metrics["frac_reward_zero_std"]) * args.prompts * args.samples)

    rewards.Scorer.score, runs.Run.record = score_and_jitter, note
    flags = f"--model {args.model} --sync-steps {s} --generate-ahead {s} --sampler {sampler} --steps {steps}"
    flags += (
        f" --prompts-per-step {args.prompts} --samples-per-prompt {args.samples} --lr {RATE} --eval-every 0"
    )
    flags += f" --max-new-tokens {args.new_tokens} --max-prompt-tokens {args.max_prompt_tokens} --no-sync-ref"
    flags += f" --out {tempfile.mkdtemp()}/run --save-every 0"
    if algorithm == "grpo":
        train_grpo.main([*flags.split(), "--beta", str(args.beta)])
    else:
        train_dpo.main(flags.split())


def trl(args, algorithm: str, s: int, sampler: str, steps: int, report: dict):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}  # these as ours
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29555", "TORCH_COMPILE_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import functools

    import datasets
    import transformers

    if sampler == "vllm":
        import vllm

        more = {} if args.trl_dtype == "auto" else {"dtype": args.trl_dtype}
        vllm.LLM = functools.partial(vllm.LLM, enforce_eager=True, **more)
    lines = (ROOT / "toy" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    messages = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in rows]
    told = [0, 0]

    def reward(completions, completion_ids, answer, **_):
        end = tokenizer.eos_token_id  # the online DPO pads
        told[0] += sum(ids.index(end) + 1 if end in ids else len(ids) for ids in completion_ids)
        told[1] += len(completions)
        n = args.samples
        place = (lambda i: i % n) if algorithm == "grpo" else (lambda i: i // args.prompts)
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        return [
            float(t.strip() == a) + jitter(place(i))
            for i, (t, a) in enumerate(zip(texts, answer, strict=True))
        ]

    class Note(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            report["times"].append(time.time())

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    common = {
        "output_dir": tempfile.mkdtemp(), "max_steps": steps, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "weight_decay": 0.1,
        "beta": args.beta, "temperature": 1.0, "seed": 0, "use_vllm": sampler == "vllm",
    }  # fmt: skip
    if sampler == "vllm":
        common |= {"vllm_mode": "colocate", "vllm_enable_sleep_mode": False}
    context = args.max_prompt_tokens + args.new_tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    data = datasets.Dataset.from_list(messages)
    if algorithm == "grpo":
        from trl import GRPOConfig, GRPOTrainer
        from trl.generation.vllm_generation import VLLMGeneration

        more = {"vllm_max_model_length": context} if sampler == "vllm" else {}
        batch = args.prompts * args.samples
        config = GRPOConfig(
            **common, **more, per_device_train_batch_size=batch, num_generations=args.samples,
            steps_per_generation=s, max_completion_length=args.new_tokens,
        )  # fmt: skip
        kind, more = GRPOTrainer, {"args": config}
        VLLMGeneration.sync_weights = lambda self: lend(self.llm, self._iter_named_params())
    else:
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        common |= {"beta": 3.0, "max_new_tokens": args.new_tokens, "max_length": context}
        config = OnlineDPOConfig(**common, per_device_train_batch_size=args.prompts)
        reference = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        kind, more = OnlineDPOTrainer, {"args": config, "ref_model": reference}
        kind._move_model_to_vllm = lambda self: lend(self.llm, self.model.named_parameters())
    more |= {"reward_funcs": reward, "train_dataset": data, "processing_class": tokenizer}
    trainer = kind(model, callbacks=[Note()], **more)
    trainer.train()
    report["tokens"], report["answers"] = [told[0] / steps] * steps, [told[1] / steps] * steps


def lend(llm, parameters):
    """Our reload, for TRL: its own fails on a CPU, where vLLM has packed away what it would write to."""
    weights = ((name, p.data) for name, p in parameters)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    llm.reset_prefix_cache()


def measure(args):
    """In the process of one side: runs it and prints its report."""
    [run] = args.runs
    algorithm, s, sampler = run.split()
    s, window = int(s), max(10, int(s))
    report = {"times": [], "tokens": [], "answers": [], "began": time.time()}
    side = ours if args.side == "ours" else trl
    side(args, algorithm, s, sampler, window * (1 + args.windows), report)
    used = resource.getrusage(resource.RUSAGE_SELF)
    report |= {"peak": used.ru_maxrss * 1024, "cpu": used.ru_utime + used.ru_stime, "ended": time.time()}
    import torch

    report["threads"] = torch.get_num_threads()
    print("REPORT" + json.dumps(report))


# ---- the comparison


def one(args, run: str, side: str) -> dict:
    """Runs a side; samples a second of each window, tokens an answer, seconds until the first step, bytes."""
    flags = []
    for name in sorted(vars(args).keys() - {"runs", "pairs", "json", "side", "threads"}):
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if run.startswith("dpo"):
        flags[flags.index("--samples") + 1] = "2"
    command = [sys.executable, __file__, "--runs", run, "--side", side, *flags]
    threads = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
    if done.returncode or "REPORT" not in done.stdout:
        raise SystemExit(f"{side} {run} failed:\n{done.stderr[-3000:]}")
    report = json.loads(done.stdout.split("REPORT")[1])
    window = max(10, int(run.split()[1]))
    ends = report["times"][window - 1 :: window]
    answers = sum(report["answers"]) / len(report["answers"])
    return {
        "speed": [answers * window / (b - a) for a, b in itertools.pairwise(ends)],
        "answers": answers, "length": sum(report["tokens"]) / sum(report["answers"]),
        "start": report["times"][0] - report["began"], "peak": report["peak"], "threads": report["threads"],
    }  # fmt: skip


def main():
    args = get_args()
    if args.side:
        return measure(args)
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install trl")
    sys.path[:0] = [str(ROOT), str(ROOT / "results")]
    from benchmark import hardware

    import run as runs

    found = {}
    for run in tqdm(args.runs, disable=None):
        found[run] = {"ours": [], "trl": []}
        for pair in range(args.pairs):
            for side in ("ours", "trl") if pair % 2 == 0 else ("trl", "ours"):
                found[run][side].append(one(args, run, side))
        mine, theirs = ([report["length"] for report in found[run][side]] for side in ("ours", "trl"))
        if not 0.95 < statistics.fmean(mine) / statistics.fmean(theirs) < 1.05:
            raise SystemExit(f"{run}: not the same work: {mine} against {theirs} tokens an answer")
        same = {(round(r["answers"]), r["threads"]) for side in found[run].values() for r in side}
        if len(same) > 1:
            raise SystemExit(f"{run}: not the same work: (answers a step, threads) are {same}")
    print(f"{' '.join(sys.argv)}\n{json.dumps(hardware())}\n")
    print("| run | ours: samples/s | TRL: samples/s | ratio | tokens an answer | start, s | peak, GB |")
    print("|---|---|---|---|---|---|---|")
    for run, sides in found.items():
        cells = []
        for reports in sides.values():
            speeds = [statistics.median(report["speed"]) for report in reports]
            cells.append(f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})")
        ratios = [
            statistics.median(mine["speed"]) / statistics.median(theirs["speed"])
            for mine, theirs in zip(*sides.values(), strict=True)
        ]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        for key, scale, form in (("length", 1, "%.2f"), ("start", 1, "%.1f"), ("peak", 1e9, "%.2f")):
            values = [statistics.median(report[key] for report in reports) for reports in sides.values()]
            cells.append(" / ".join(form % (value / scale) for value in values))
        print(f"| {run} | {' | '.join(cells)} |")
    if args.json:
        facts = {**runs.provenance(), "trl": version("trl"), "hardware": hardware(), "found": found}
        runs.write_whole(args.json, json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
