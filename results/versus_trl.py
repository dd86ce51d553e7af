"""Ours against TRL on the same work, side by side: python results/versus_trl.py

Beforehand `pip install trl`. Both sides train the same model on the same prompts with the same number of
answers, lengths, reward, micro-batch (the whole step), optimizer, learning rate and dtype (float32 on a CPU;
TRL's vLLM too, which TRL leaves at bfloat16 otherwise: --trl-dtype auto). Each side is a process of its own
with --threads threads; the sides alternate. `results/timed_run.py` is our side, and says how every answer
comes to train. Before any ratio is printed, tokens and answers of both sides are compared.

What is measured: the time between ends of windows (s steps; at s = 1 five), so everything that a step does is
in it: generation, reward, update, reload, logging. Start-up is reported beside it. At s = 1 also the update
alone: from its first forward to its end, TRL's scoring of answers in between left out, seconds, the process's
memory at its peak, and how much of that the update added. On TRL's side it holds one forward more where vLLM
samples: the policy's, for the ratio to the sampler, which ours has from the forward that it trains with.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import timed_run as timed
from timed_run import ROOT
from tqdm import tqdm

RUNS = ["grpo 1 vllm", "grpo 1 hf", "grpo 10 vllm", "grpo 10 hf"]
RUNS += ["dpo 1 vllm", "dpo 1 hf"]  # TRL's online DPO has no window


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    timed.add_flags(add)
    add(
        "--runs",
        nargs="+",
        default=RUNS,
        help="'ALGORITHM SYNC_STEPS SAMPLER'; DPO: 2 samples, as TRL",
    )
    add("--windows", type=int, default=5, help="that are measured, after one that is not")
    add("--window-steps", type=int, default=5, help="of a window at s = 1; otherwise it has s")
    add("--pairs", type=int, default=3, help="of runs of both sides")
    add("--threads", type=int, default=1, help="of torch, on both sides")
    add("--trl-dtype", default="float32", help="of TRL's vLLM; auto: what TRL's users get")
    add("--json", type=Path, help="write the table's numbers to this file")
    add("--trl", nargs=2, help=argparse.SUPPRESS)  # the process of TRL's side: steps and rows
    return parser.parse_args(argv)


# ---- TRL's side


def trl(args, folder: str) -> dict:
    """TRL's side, with the fields of `timed_run.report`; it writes into `folder`."""
    found, [algorithm, s, sampler] = timed.report(), args.runs[0].split()
    steps, s = int(args.trl[0]), int(s)
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
    lines = Path(args.trl[1]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    messages = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in rows]
    told, began = [0, 0], []

    def reward(completions, completion_ids, answer, **_):
        scoring = time.time()
        end = tokenizer.eos_token_id  # the online DPO pads
        told[0] += sum(ids.index(end) + 1 if end in ids else len(ids) for ids in completion_ids)
        told[1] += len(completions)
        n = args.samples
        place = (lambda i: i % n) if algorithm == "grpo" else (lambda i: i // args.prompts)
        texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
        scores = [
            float(t.strip() == a) + timed.jitter(place(i))
            for i, (t, a) in enumerate(zip(texts, answer, strict=True))
        ]
        began[:] = [start + time.time() - scoring for start in began]
        return scores

    class Note(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            found["times"].append(time.time())
            found["peak"].append(timed.bytes_at_most())
            found["update"].append(found["times"][-1] - began.pop())

    def update_begins(forward):
        """`forward` is the first thing of an update."""

        def call(*args, **kwargs):
            if not began:
                found["before"].append(timed.forget_peak(found))
                began.append(time.time())
            return forward(*args, **kwargs)

        return call

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    common = {
        "output_dir": folder, "max_steps": steps, "learning_rate": timed.RATE,
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
        kind._get_per_token_logps_and_entropies = update_begins(kind._get_per_token_logps_and_entropies)
        VLLMGeneration.sync_weights = lambda self: lend(self.llm, self._iter_named_params())
    else:
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        common |= {"beta": 3.0, "max_new_tokens": args.new_tokens, "max_length": context}
        config = OnlineDPOConfig(**common, per_device_train_batch_size=args.prompts)
        reference = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        kind, more = OnlineDPOTrainer, {"args": config, "ref_model": reference}
        kind._forward = update_begins(kind._forward)
        kind._move_model_to_vllm = lambda self: lend(self.llm, self.model.named_parameters())
    more |= {"reward_funcs": reward, "train_dataset": data, "processing_class": tokenizer}
    trainer = kind(model, callbacks=[Note()], **more)
    trainer.train()
    return found | {"tokens": [told[0] / steps] * steps, "answers": [told[1] / steps] * steps}


def lend(llm, parameters):
    """Our reload, for TRL: its own fails on a CPU, where vLLM has packed away what it would write to. A tied
    output matrix stays as it was, which costs TRL nothing.
    """
    weights = ((name, p.data) for name, p in parameters)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    llm.reset_prefix_cache()


# ---- the comparison


def one(args, run: str, side: str, data: str) -> dict:
    """Runs a side; samples a second of each window, tokens an answer, seconds until the first step, bytes."""
    algorithm, s, sampler = run.split()
    samples = args.samples if algorithm == "grpo" else 2
    window = max(int(s), args.window_steps if s == "1" else 0)
    steps = window * (1 + args.windows)
    same = [("model", args.model), ("prompts", args.prompts), ("samples", samples), ("beta", args.beta),
            ("max-prompt-tokens", args.max_prompt_tokens), ("new-tokens", args.new_tokens)]  # fmt: skip
    flags = [text for name, value in same for text in (f"--{name}", str(value))]
    if side == "ours":
        command = ["timed_run.py", "--algorithm", algorithm, "--sync-steps", s, "--sampler", sampler]
        command += ["--steps", str(steps), "--data", data]
    else:
        command = ["versus_trl.py", "--trl", str(steps), data, "--runs", run, "--trl-dtype", args.trl_dtype]
    command = [sys.executable, str(ROOT / "results" / command[0]), *command[1:], *flags]
    threads = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
    if done.returncode or "REPORT" not in done.stdout:
        raise SystemExit(f"{side} {run} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.split("REPORT")[1])
    ends = found["times"][window - 1 :: window]
    answers = sum(found["answers"]) / len(found["answers"])
    alone = s == "1"  # at s > 1 TRL's references belong to the window, not to the update
    added = [peak - before for peak, before in zip(found["peak"], found["before"], strict=True)]
    return {
        "speed": [answers * window / (b - a) for a, b in itertools.pairwise(ends)],
        "answers": answers, "length": sum(found["tokens"]) / sum(found["answers"]),
        "start": found["times"][0] - found["began"], "peak": found["all"], "threads": found["threads"],
        "update": statistics.median(found["update"]) if alone else math.nan,
        "added": statistics.median(added[1:]) if alone else math.nan,
        "highest": statistics.median(found["peak"][1:]) if alone else math.nan,
    }  # fmt: skip


def main():
    args = get_args()
    if args.trl:
        with tempfile.TemporaryDirectory() as folder:
            return timed.say(trl(args, folder))
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install trl")
    sys.path.insert(0, str(ROOT))
    from run import provenance, write_whole

    temporary = tempfile.TemporaryDirectory()
    found, data, folder = {}, str(ROOT / "toy" / "train.jsonl"), temporary.name
    if args.random:
        sizes = (args.max_prompt_tokens, args.new_tokens)
        args.model, data = timed.random_model(args.random, folder, *sizes)
    flags = {name: str(value) for name, value in vars(args).items()}
    for run in tqdm(args.runs, disable=None):
        found[run] = {"ours": [], "trl": []}
        for pair in range(args.pairs):
            for side in ("ours", "trl") if pair % 2 == 0 else ("trl", "ours"):
                found[run][side].append(one(args, run, side, data))
        mine, theirs = ([report["length"] for report in found[run][side]] for side in ("ours", "trl"))
        if not 0.95 < statistics.fmean(mine) / statistics.fmean(theirs) < 1.05:
            raise SystemExit(f"{run}: not the same work: {mine} against {theirs} tokens an answer")
        same = {(round(r["answers"]), r["threads"]) for side in found[run].values() for r in side}
        if len(same) > 1:
            raise SystemExit(f"{run}: not the same work: (answers a step, threads) are {same}")
        if args.json:  # after each, so that what is measured is kept
            facts = {"flags": flags, **provenance(), "trl": version("trl"), "hardware": timed.hardware()}
            write_whole(args.json, json.dumps(facts | {"found": found}, indent=1) + "\n")
    print(f"{' '.join(sys.argv)}\n{json.dumps(timed.hardware())}\n")
    columns = "run", "ours: samples/s", "TRL: samples/s", "ratio", "tokens an answer", "start, s", "peak, GB"
    columns += "update, s", "its peak, GB", "added, GB"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for run, sides in found.items():
        cells = []
        for reports in sides.values():
            speeds = [statistics.median(one["speed"]) for one in reports]
            cells.append(f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})")
        ratios = [
            statistics.median(mine["speed"]) / statistics.median(theirs["speed"])
            for mine, theirs in zip(*sides.values(), strict=True)
        ]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        forms = [("length", 1, "%.2f"), ("start", 1, "%.1f"), ("peak", 1e9, "%.2f")]
        forms += [("update", 1, "%.3f"), ("highest", 1e9, "%.2f"), ("added", 1e9, "%.3f")]
        for key, scale, form in forms:
            values = [statistics.median(one[key] for one in reports) for reports in sides.values()]
            cells.append(" / ".join(form % (v / scale) for v in values) if values[0] == values[0] else "")
        print(f"| {run} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
