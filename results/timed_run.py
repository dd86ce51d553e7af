"""A run of train_dpo.py or train_grpo.py that times itself: python results/timed_run.py --algorithm grpo

The real script, with two things added: an answer gets a thousandth of its place in the group on top of its
reward, so that every group has a signal and every step trains on all answers; and the clock is read. Prints a
line that begins with REPORT; `report` explains its fields. `results/benchmark.py` and `results/versus_trl.py`
start it.
"""

import argparse
import builtins
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RATE = 1e-6  # learning rate: the answers' lengths stay those of the model


def add_flags(add):
    """What both sides of a comparison, and the parts of the benchmark, are told."""
    add("--model", default=os.path.relpath(ROOT / "toy" / "model"))
    add("--random", metavar="SHAPE", help="a random model instead: hidden,layers,heads,key-value heads,"
        "intermediate,vocabulary; 576,30,9,3,1536,49152 is SmolLM2-135M's")  # fmt: skip
    add("--prompts", type=int, default=32, help="a step")
    add("--samples", type=int, default=8, help="answers to a prompt")
    add("--max-prompt-tokens", type=int, default=24)
    add("--new-tokens", type=int, default=8, help="most tokens of an answer; a random model uses all")
    add("--micro-batch-tokens", type=int, help="default: all of a step")
    add("--beta", type=float, default=0.001, help="GRPO's, the paper's; TRL's default is 0: no reference")


def micro_batch_tokens(args) -> int:
    whole = args.prompts * args.samples * (args.max_prompt_tokens + args.new_tokens)
    return args.micro_batch_tokens or whole


def report() -> dict:
    """Seconds since the epoch: began, imported (torch, transformers, the script) and times, the end of each
    step. Engine: seconds of vLLM's import. All: bytes of the process at most. Of each step: tokens, answers
    that were sampled for groups with a signal, update (seconds), before and peak (bytes when the update
    began, and at most in it).
    """
    return {key: [] for key in ("times", "tokens", "answers", "update", "peak", "before")} | {
        "began": time.time(),
        "all": 0,
    }


def random_model(shape: str, directory: str, prompt_tokens: int, new_tokens: int) -> tuple[str, str]:
    """A Llama of that shape with tied matrices, a tokenizer whose words are w2, w3, ..., and 2,000 prompts of
    `prompt_tokens` of them; returns where model and rows are.
    """
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, heads, kv, intermediate, vocab = map(int, shape.split(","))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=True, bos_token_id=None,
        max_position_embeddings=max(256, prompt_tokens + new_tokens), eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(2, vocab)} | {"<end>": 0, "<pad>": 1}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", chat_template=template
    ).save_pretrained(directory)
    rng = random.Random(0)
    rows = Path(directory) / "rows.jsonl"
    with open(rows, "w") as file:
        for _ in range(2000):
            prompt = " ".join(f"w{rng.randrange(2, vocab)}" for _ in range(prompt_tokens))
            file.write(json.dumps({"prompt": prompt, "reward": "exact", "answer": "w2"}) + "\n")
    return directory, str(rows)


def jitter(place: int) -> float:
    return place / 1000


def bytes_at_most() -> int:
    """Of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def forget_peak(found: dict) -> int:
    """Begins to look for the peak anew, once `found` has the one so far; returns the bytes of now."""
    found["all"] = max(found["all"], bytes_at_most())
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets it in getrusage too
    return bytes_at_most()


def hardware() -> dict:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    wide = any("avx512f" in line for line in lines if line.startswith("flags"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": names[:1], "avx512": wide, "cores": os.cpu_count(), "gpu": gpu}


def measure(args, folder: str) -> dict:
    """Trains, with its run in `folder`."""
    found = report()
    sys.path.insert(0, str(ROOT))
    import train_dpo
    import train_grpo
    from metrics import Sums
    from rewards import Scorer
    from run import Run

    found["imported"] = time.time()
    plain, found["engine"] = builtins.__import__, 0.0

    def timed(name, *more, **others):
        began = time.time()
        module = plain(name, *more, **others)
        if name == "vllm":
            found["engine"] = max(found["engine"], time.time() - began)
        return module

    builtins.__import__ = timed
    score, record, sums = Scorer.score, Run.record, Sums.add_groups

    def score_and_jitter(self, groups):
        score(self, groups)
        for _, completions in groups:
            for place, c in enumerate(completions):
                c.reward += jitter(place)

    def update_begins(self, step, groups):
        found["before"].append(forget_peak(found))
        sums(self, step, groups)

    def step_ends(self, metrics):
        record(self, metrics)
        found["peak"].append(bytes_at_most())
        found["times"].append(time.time())
        found["tokens"].append(metrics["completions/length"] * args.prompts * args.samples)
        found["answers"].append((1 - metrics["frac_reward_zero_std"]) * args.prompts * args.samples)
        found["update"].append(metrics["time/update"])

    Scorer.score, Run.record, Sums.add_groups = score_and_jitter, step_ends, update_begins
    flags = [
        "--model", args.model, "--data", args.data, "--eval-data", args.data, "--eval-every", 0,
        "--sync-steps", args.sync_steps, "--sampler", args.sampler, "--steps", args.steps,
        "--prompts-per-step", args.prompts, "--samples-per-prompt", args.samples,
        "--max-prompt-tokens", args.max_prompt_tokens, "--lr", RATE,
        "--max-new-tokens", args.new_tokens, "--micro-batch-tokens", micro_batch_tokens(args),
        "--no-sync-ref", "--out", f"{folder}/run", "--save-every", 0, "--no-activation-checkpointing",
        "--grad-clip", 1, "--adam-eps", 1e-8,
    ]  # fmt: skip
    flags += ["--beta", args.beta, "--std-norm"] if args.algorithm == "grpo" else ["--beta", 3]
    (train_grpo if args.algorithm == "grpo" else train_dpo).main([*map(str, flags)])
    return found


def say(found: dict):
    import torch

    more = {"threads": torch.get_num_threads(), "all": max(found["all"], bytes_at_most())}
    print("REPORT" + json.dumps(found | more))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_flags(parser.add_argument)
    parser.add_argument("--algorithm", choices=["dpo", "grpo"], default="grpo")
    parser.add_argument("--sync-steps", default="1")
    parser.add_argument("--sampler", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", default=str(ROOT / "toy" / "train.jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        say(measure(parser.parse_args(), folder))
