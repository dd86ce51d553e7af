"""How good a checkpoint is: accuracy with error bars, pass@k, and files for AlpacaEval and Arena-Hard.

    python evaluate.py --model runs/dpo-s10-<time> --data toy/valid.jsonl
    torchrun --nproc-per-node 8 evaluate.py --model meta-llama/Llama-3.1-8B-Instruct --data math500.jsonl

Each prompt gets N sampled completions (the paper's evaluation: N = 50, temperature 0.6, top-p 0.9). Rows with
a verifiable reward are scored by it. The others are chats: their first completions go to the files that
AlpacaEval and Arena-Hard read, and a reward model or a judge scores them all.

Prompts are taken in chunks that depend on the settings alone, each with a seed of its own, and a chunk is on
disk before the next begins: the same command, on any number of ranks, goes on with an interrupted evaluation
and ends with the completions that it would have had. completions.jsonl holds them as rollouts, a line a
prompt, on which --rollouts can train.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import flags
import processes
from data import fingerprint, load_prompts, read_jsonl, read_rollout, rollout_line
from flags import count, day, positive
from rewards import OPEN_ENDED, Scorer, add_reward_flags
from run import check_writable, provenance, write_whole
from sampler import load_sampler, require_sampler
from tokenizer import load_tokenizer

SAMPLES = 50  # of a verifiable prompt, as in the paper; 1 of a chat
# flags that change nothing in the completions: the same evaluation may go on with others
FREE = {"out", "name", "pass_k", "gpu_memory", "reward_timeout", "reward_workers", "reward_offload"}
FREE |= {"judge_timeout", "judge_concurrency", "trust_remote_code"}
LEGEND = """mean: of the prompts' mean rewards; se: its standard error, over drawings and over prompts;
pass@K: the chance that one of K completions is right, which is a reward of 1 or more"""
TOY = {  # without --model it is the toy, with values of its own
    "model": "toy/model", "data": ["toy/valid.jsonl"], "max_prompt_tokens": 24, "max_new_tokens": 8,
}  # fmt: skip


def add_flags(add):
    # fmt: off
    add("--model", help="run directory, model directory or hub name; a run's lengths and date are taken over")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--data", nargs="+", help=".jsonl, .parquet or hub names")
    add("--date", type=day, help="what a chat template with a clock writes (default: today)")
    add("--out", type=Path, help="where the completions and results go (default: runs/eval-<model's name>)")
    add("--name", help="what the files of completions call the model (default: its directory or hub name)")
    add("--samples", type=count, help=f"to each prompt (default: {SAMPLES}, as in the paper; of a chat 1)")
    add("--temperature", type=positive, default=0.6, help="of sampling; paper: 0.6")
    add("--top-p", type=positive, default=0.9, help="nucleus sampling; paper: 0.9")
    add("--greedy", action="store_true", help="one completion each, always the likeliest token")
    add("--pass-k", nargs="+", type=count, default=[], metavar="K",
        help="also print pass@K, the chance that one of K completions is right")
    add("--max-prompt-tokens", type=count, default=1024, help="longer ones are left out")
    add("--max-new-tokens", type=count, default=2048, help="of a completion; paper: not stated")
    add_reward_flags(add)
    add("--chunk", type=count, default=1024, help="about how many completions to sample in one call")
    add("--sampler", choices=["vllm", "hf"], default="vllm", help="hf: transformers, needs no vLLM")
    add("--gpu-memory", type=positive, default=0.6, help="vLLM's share of a GPU (weights and KV cache)")
    add("--seed", type=int, default=0, help="of sampling")
    # fmt: on


def get_args(argv=None) -> flags.Flags:
    args = flags.parse(argv, __doc__, add_flags, TOY)
    args = flags.parse(argv, __doc__, add_flags, TOY, settings_of_run(args.model))
    if not args.data:
        flags.fail(f"--model {args.model}: needs --data, rows to evaluate on (the toy's go with the toy)")
    if args.top_p > 1:
        flags.fail(f"--top-p {args.top_p:g}: a share of the probability, at most 1")
    flags.check_sampling(args)
    if args.greedy and (args.samples or 1) > 1:
        flags.fail(f"--samples {args.samples}: --greedy gives the same completion every time; leave one out")
    samples = 1 if args.greedy else args.samples or SAMPLES
    if max(args.pass_k, default=1) > samples:
        flags.fail(f"--pass-k {max(args.pass_k)}: needs as many completions of a prompt; there are {samples}")
    if "/" in (args.name or ""):
        flags.fail(f"--name {args.name}: becomes a file's name, so no /")
    if args.greedy:
        args.temperature, args.top_p = 0.0, 1.0
    return args


def find_model(model: str) -> str:
    """The directory with the weights, also of a run's directory; a hub name as it is."""
    path = Path(model)
    if not path.exists():
        return model
    for directory in (path, path / "model"):
        if (directory / "config.json").exists():
            return str(directory)
    raise argparse.ArgumentError(None, f"--model {model}: no config.json in it or in its model/")


def read_args(directory: Path) -> dict:
    """What its args.json says; {} without one."""
    file = directory / "args.json"
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise argparse.ArgumentError(None, f"{file}: damaged ({error})") from error
    return found if isinstance(found, dict) else {}


def settings_of_run(model: str) -> dict:
    """Lengths and date that a model was trained with, where it is a run's directory, or the model/ in one."""
    path = Path(model).resolve()
    found = read_args(path.parent if path.name == "model" else path).get("args")
    found = found if isinstance(found, dict) else {}
    return {name: found[name] for name in ("max_prompt_tokens", "max_new_tokens", "date") if found.get(name)}


def measure_of(reward: str | None) -> str:
    return "-" if reward is None else OPEN_ENDED.get(reward, "accuracy")


# ---- maths


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n completions, drawn without putting back, hold a right one: unbiased for pass@k
    (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def summary(groups: list[tuple], ks: list[int], verifiable=True) -> dict:
    """What is known from all (row, completions) groups of one source; None where there is too little to tell.

    mean is that over prompts ("problems") of the mean reward of a prompt's scored completions. Two ways in
    which another evaluation would differ: se_samples, the standard error over the N drawings of all prompts
    (sd_samples, the standard deviation of one drawing, is what the paper's tables seem to print behind the
    +-), and se_problems, that over prompts, as if other prompts had been drawn. Right, for pass@k, is a
    reward of 1 or more.
    """
    drawn = [completions for _, completions in groups]
    flat = [c for completions in drawn for c in completions]
    problems, drawings = (
        [rewards for part in parts if (rewards := [c.reward for c in part if c.reward is not None])]
        for parts in (drawn, zip(*drawn, strict=True))
    )
    means = [statistics.fmean(rewards) for rewards in problems]
    sd = statistics.stdev(map(statistics.fmean, drawings)) if len(drawings) > 1 else None
    found = {
        "problems": len(groups),
        "samples": len(drawn[0]),
        "mean": statistics.fmean(means) if means else None,
        "sd_samples": sd,
        "se_samples": None if sd is None else sd / math.sqrt(len(drawings)),
        "se_problems": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
    }
    for k in ks:
        scored = [(len(rewards), sum(r >= 1 for r in rewards)) for rewards in problems]
        enough = [pass_at_k(n, right, k) for n, right in scored if n >= k]
        found[f"pass@{k}"] = statistics.fmean(enough) if enough and verifiable else None
    return found | {
        "length": statistics.fmean(len(c.ids) for c in flat),
        "truncated": statistics.fmean(c.finish == "length" for c in flat),
        "failed": sum(map(failed, groups)),
    }


def table(results: list[dict]) -> str:
    """Markdown, a line a source."""
    cells = [[*results[0]]]
    for result in results:
        cells.append(
            ["-" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in result.values()]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells)


# ---- files


def settings(args, model: str, sources: list) -> dict:
    """All that decides what the completions will be: flags, prompts, weights."""
    weights = [
        (f.name, f.stat().st_size, f.stat().st_mtime) for f in sorted(Path(model).glob("*.safetensors"))
    ]
    found = {name: value for name, value in vars(args).items() if name not in FREE}
    found = {**found, "model": model, "rows": fingerprint(sources), "weights": weights}
    return json.loads(json.dumps(found))


def earlier_settings(out: Path) -> dict:
    """Those of the evaluation that `out` holds or that began there. Raises ArgumentError for other uses."""
    if out.exists() and not out.is_dir():
        raise argparse.ArgumentError(None, f"--out {out}: a file, not a directory")
    if not (out / "args.json").exists():
        check_writable(out)
        return {}
    found = read_args(out).get("settings")
    if found is None:
        raise argparse.ArgumentError(None, f"--out {out}: holds something else; name another directory")
    return found


def check_settings(out: Path, found: dict, wanted: dict):
    """Raises ArgumentError where the evaluation that `out` holds has other settings."""
    for name, value in wanted.items() if found else []:
        if found.get(name) != value:
            what = f"--{name.replace('_', '-')} {found.get(name)}, now {value}"
            what = {"rows": "other rows in --data", "weights": "other weights in --model"}.get(name, what)
            raise argparse.ArgumentError(
                None, f"--out {out}: holds an evaluation with other settings ({what}); name another directory"
            )


def failed(group: tuple) -> int:
    """How many completions of a group could not be scored."""
    row, completions = group
    return sum(c.reward is None for c in completions) if row.reward is not None else 0


def read_groups(files: Iterable[Path]) -> dict[tuple, tuple]:
    """Their (row, completions) groups, in order, by chunk, source and number in the source."""
    found = {}
    for file in files:
        for number, line in read_jsonl(file):
            group = read_rollout(line, f"{file}, line {number}")
            found[line["chunk"], line["data"], line["problem"]] = group
    return dict(sorted(found.items()))


def write_groups(path: Path, groups: dict[tuple, tuple]):
    lines = (rollout_line(*groups[c, d, i], chunk=c, data=d, problem=i) for c, d, i in groups)
    write_whole(path, "".join(lines))


def write_chunk(folder: Path, chunk: int, groups: dict[tuple, tuple]):
    """A chunk is done if CHUNK.jsonl is there. One in which a reward failed, a judge's perhaps, is
    CHUNK.failed.jsonl until it is done again.
    """
    done, again = folder / f"{chunk}.jsonl", folder / f"{chunk}.failed.jsonl"
    if any(map(failed, groups.values())):
        write_groups(again, groups)
    else:
        write_groups(done, groups)
        again.unlink(missing_ok=True)


def chunk_files(folder: Path) -> list[Path]:
    """What is done comes last, so that it counts where a killed evaluation has left both."""
    return sorted(folder.glob("*.jsonl"), key=lambda file: file.stem.isdigit())


def unpack(file: Path, folder: Path):
    """An evaluation that came to its end, as the files of its chunks again."""
    chunks = defaultdict(dict)
    for key, group in read_groups([file] if file.exists() else []).items():
        chunks[key[0]][key] = group
    folder.mkdir(parents=True, exist_ok=True)
    for chunk, groups in chunks.items():
        write_chunk(folder, chunk, groups)
    file.unlink(missing_ok=True)


def write_chats(out: Path, name: str, chats: list[tuple]):
    """(row, text) pairs, as AlpacaEval and, of its own questions, Arena-Hard read them."""
    alpaca, arena = [], []
    for row, text in chats:
        messages = row.messages
        if not row.uid:  # that tool takes the mean length over all that the file holds
            alpaca.append({"instruction": messages[-1]["content"], "output": text, "generator": name})
        else:
            reply = {"role": "assistant", "content": {"answer": text}}
            ids = {"uid": row.uid, "ans_id": uuid.uuid4().hex, "model": name}
            arena.append({**ids, "messages": [*messages, reply], "tstamp": time.time()})
    if alpaca:
        write_whole(out / "alpaca_eval.json", json.dumps(alpaca, indent=1) + "\n")
    if arena:
        (out / "arena_hard").mkdir(exist_ok=True)
        lines = "".join(json.dumps(line) + "\n" for line in arena)
        write_whole(out / "arena_hard" / f"{name}.jsonl", lines)


# ---- main


def main(argv=None):
    args = get_args(argv)

    # 1 processes and model
    require_sampler(args.sampler)
    rank, world, device = processes.start()
    dtype = processes.compute_dtype(device)
    model = find_model(args.model)
    path = Path(args.model).absolute()
    name = args.name or (path.parent if path.name == "model" and path.exists() else path).name
    out = args.out or Path("runs") / f"eval-{name}"
    earlier = earlier_settings(out)
    args.date = args.date or earlier.get("date") or processes.gather([time.strftime("%Y-%m-%d")])[0]

    # 2 prompts, in chunks: (source, [(number in it, row)], completions of each)
    length = args.max_prompt_tokens + args.max_new_tokens
    tokenizer, vocab, stop_ids = load_tokenizer(model, length, args.trust_remote_code)
    sources, dropped = load_prompts(
        args.data,
        tokenizer,
        vocab,
        max_tokens=args.max_prompt_tokens,
        date=args.date,
        talks=rank == 0,
        scored=False,
    )
    kind = "rm" if args.reward_model else "judge" if args.judge_url else None
    if kind:  # rows without a reward are then scored by it
        sources = [[replace(row, reward=row.reward or kind) for row in rows] for rows in sources]
    wanted = settings(args, model, sources)
    check_settings(out, earlier, wanted)
    chunks = []
    for source, rows in enumerate(sources):
        for measure in ("accuracy", "reward model", "judge", "-"):
            part = [(i, row) for i, row in enumerate(rows) if measure_of(row.reward) == measure]
            n = 1 if args.greedy else args.samples or (SAMPLES if measure == "accuracy" else 1)
            size = max(1, args.chunk // n)
            chunks += [(source, part[i : i + size], n) for i in range(0, len(part), size)]
    sizes = [len(part) * n for _, part, n in chunks]

    # 3 reward model, scorer, sampler
    scorer = Scorer(sum(sources, []), args, device, dtype, talks=rank == 0)
    sampler = load_sampler(
        args.sampler, model, tokenizer=tokenizer, vocab=vocab, stop_ids=stop_ids, device=device,
        dtype=dtype, max_length=length, gpu_memory=args.gpu_memory, sleep=False, trust=args.trust_remote_code,
    )  # fmt: skip

    # 4 what an interrupted evaluation has left
    whole, folder, done = out / "completions.jsonl", out / "completions", set()
    if rank == 0:
        unpack(whole, folder)
        done = {int(file.stem) for file in chunk_files(folder) if file.stem.isdigit()}
        facts = {"settings": wanted, "ranks": world, **provenance()}
        write_whole(out / "args.json", json.dumps(facts, indent=1, default=str) + "\n")
    done = processes.gather([done])[0]
    todo = [c for c in range(len(chunks)) if c not in done]
    if rank == 0 and done:
        print(f"{sum(sizes[c] for c in done)} of {sum(sizes)} completions are there already", flush=True)

    # 5 sample, score, write
    mine = todo[rank::world]
    bar = tqdm(total=sum(sizes[c] for c in mine), desc="evaluating", unit="completion", disable=rank > 0)
    for c in mine:
        source, part, n = chunks[c]
        seed = random.Random(f"{args.seed} evaluate {c}").getrandbits(63)
        ids = [row.ids for _, row in part]
        completions = sampler.generate(ids, n, args.max_new_tokens, args.temperature, seed, args.top_p)
        groups = {
            (c, args.data[source], i): (row, cs) for (i, row), cs in zip(part, completions, strict=True)
        }
        scorer.score([*groups.values()])
        write_chunk(folder, c, groups)
        bar.update(sizes[c])
    bar.close()
    processes.gather([rank])  # all of them are on disk

    # 6 results
    if rank == 0:
        groups = read_groups(chunk_files(folder))
        write_groups(whole, groups)
        shutil.rmtree(folder)
        by_source = defaultdict(list)
        for (_, source, _), (row, completions) in groups.items():
            by_source[source, measure_of(row.reward)].append((row, completions))
        chats = [(row, cs[0].text) for row, cs in groups.values() if measure_of(row.reward) != "accuracy"]
        results = [
            {"data": source, "measure": measure, **summary(part, args.pass_k, measure == "accuracy")}
            for (source, measure), part in by_source.items()
        ]
        facts |= {"name": name, "dropped": dropped, "results": results}
        write_whole(out / "results.json", json.dumps(facts, indent=1, default=str) + "\n")
        if chats:
            write_chats(out, name, chats)
        print(f"{table(results)}\n{LEGEND}")
        left_out = f"; {dropped} prompts over --max-prompt-tokens were left out" if dropped else ""
        print(f"{sum(sizes)} completions and results.json: {out}{left_out}", flush=True)
    scorer.close()
    sampler.close()
    processes.stop()


if __name__ == "__main__":
    processes.launch(main)
