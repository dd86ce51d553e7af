"""What a run will take: --preflight does a little of everything, prints a screen, and leaves nothing behind.

It has the run's own flags, model, rows and ranks, and does in a run's order: the largest micro-batches that
the flags allow, with optimizer steps; a checkpoint; a reload; PROMPTS prompts sampled, compared with the
policy and scored; and the update that they make. The forecast takes the rest of the run to be like them.
"""

import contextlib
import itertools
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import write_tensors
from data import Completion, Row, rollout_line
from metrics import Sums
from packing import micro_batches, split
from policy import clip_gradients, local
from processes import complain, everywhere, on_rank_0, over_ranks, stop
from results.memory import GIB, NOT_FOR_PARAMETERS, memory, shape_of
from sampler import sample
from sampler_check import self_test
from window import CHUNK

PROMPTS = 64  # that are sampled, on all ranks together
# warnings: share of the memory in use, sequences at one time, share of unequal groups, of cut completions
FULL, FEW_SEQUENCES, FEW_UNEQUAL, MANY_CUT = 0.92, 32, 0.1, 0.2


@dataclass
class Found:
    """What was measured: seconds of the slowest rank, bytes on rank 0 unless it says otherwise."""

    parameters: int
    capacity: int  # bytes of the GPU; on a CPU, of the machine
    tensors: dict[str, int]  # bytes that are there at all times of an update, by what they are for
    derived: float | None  # bytes of all else that an update needs, by results/memory.py
    most: int  # bytes that torch held at one time in the largest micro-batches; on a CPU, the process
    in_update: int  # bytes in use on the GPU then, whoever has them; on a CPU, as above
    while_sampling: int
    sequences: float  # of full length that a sampler works on at one time
    unequal: float  # share of groups whose rewards are not all equal
    length: float  # tokens of a completion
    cut: float  # share of completions that --max-new-tokens ended
    failed: float  # share of completions without a reward
    sampled: float  # tokens of the PROMPTS prompts' completions, on all ranks
    trained: float  # tokens that their update read, prompts included, on all ranks
    seconds: dict[str, float]  # of each part; sample, score and update: of PROMPTS prompts
    checkpoint: int  # bytes, of all ranks
    rollouts: float  # bytes of a prompt with its completions in a window's file
    disk: int  # bytes free where the run is to be written
    valid: int  # prompts of a validation


def preflight(args, make_examples, *, scorer, sampler, **parts):
    """Prints the screen and closes what was opened; collective.

    make_examples: the script's, (groups, step, args) -> examples; parts: what `measure` takes. Where the
    memory is not enough, it ends with exit code 2 and a line that names the flag that helps.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # not without tidying up
    found = measure(args, make_examples, scorer=scorer, sampler=sampler, **parts)
    if dist.get_rank() == 0:
        print("\n".join([*screen(found, args), *warnings(found, args)]), flush=True)
    scorer.close()
    sampler.close()
    stop()


def measure(
    args, make_examples, *, prompts, policy, reference, optimizer, scorer, sampler, window, checkpoints
) -> Found:
    """Does what is said above, in that order; collective."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), policy.device
    sums = Sums(prompts.kinds)
    bar = tqdm(total=4 if window.scored else 6, desc="preflight", disable=rank > 0, leave=False)

    def lap(part: str):
        over_ranks(0)  # when the slowest rank is here
        sums.lap(part)
        bar.update()

    def update(groups: list) -> int:
        """Returns the tokens that were read. Its gradients stay, to be counted."""
        tokens = 0
        optimizer.zero_grad()
        for batch in micro_batches(make_examples(groups, 0, args), policy, args.micro_batch_tokens):
            logps_BT, _ = policy(batch)
            ref_BT = reference(batch, logps_BT, step=1)  # at step 0 it would not run
            ((logps_BT - ref_BT) * batch.mask_BT).sum().backward()  # what the loss is makes no difference
            tokens += batch.tokens_used
        clip_gradients(policy, args.grad_clip)
        optimizer.step()
        return tokens

    optimizer.param_groups[0]["lr"] = 0.0  # Adam's moments come into being, the weights stay as they are
    sampler.sleep()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with enough_memory("the largest update", update_ways(args)):
        for groups in largest_batches(args, make_examples, policy):
            update(groups)
    tensors = tensor_bytes(policy, reference, optimizer, scorer.model, sampler)
    most, in_update = most_held(sampler.pool), in_use()
    optimizer.zero_grad()  # as in a run, they are not there while it samples
    lap("largest update")

    inside = 1 < args.sync_steps < args.steps  # of a window: then the reference is saved too
    window_state = {"start": int(inside), "ends": [3]}
    parent = next(p for p in checkpoints.run.directory.absolute().parents if p.exists())
    folder = Path(on_rank_0(lambda: tempfile.mkdtemp(prefix="preflight-", dir=parent)))
    try:
        written = everywhere(lambda: write_tensors(folder, checkpoints.tensors(window_state, step=2)))
    finally:
        if rank == 0:
            shutil.rmtree(folder)
    lap("checkpoint")

    with enough_memory("the sampler's wake-up", "lower --gpu-memory"):
        sampler.reload(policy.full_weights(sampler.dtype, sampler.as_in_files), version=0)
    lap("reload")

    groups = prompts.take(0, PROMPTS)[rank::world]
    if not window.scored:  # with --rollouts these are completions already
        groups = sample(sampler, groups, args.samples_per_prompt, args, 0)
        sums.add(sampled=sum(len(c.ids) for _, cs in groups for c in cs))
        lap("sample")
    while_sampling = in_use()
    sums.add(bytes=sum(len(rollout_line(row, cs, step=0).encode()) for row, cs in groups))
    if not window.scored:
        with enough_memory("a comparison with the sampler", "lower --gpu-memory"):
            self_test(sampler, policy, groups)
        if not prompts.valid:  # only a validation scores while the sampler is awake
            sampler.sleep()
        sums.lap("self-test")
        with enough_memory("the reward model", "add --reward-offload or lower --gpu-memory"):
            scorer.score(groups)
        lap("score")

    sampler.sleep()
    sums.lap("sleep")
    with enough_memory("an update", update_ways(args)):
        sums.add(trained=update(groups))
    lap("update")
    bar.close()
    sums.add_groups(0, groups)
    sums.reduce()
    metrics = sums.metrics(sampler.pool)
    return Found(
        parameters=sum(p.numel() for p in policy.parameters()),
        capacity=capacity(), tensors=tensors, derived=derive(args, policy),
        most=most, in_update=in_update, while_sampling=while_sampling, sequences=sampler.sequences,
        unequal=1 - metrics["frac_reward_zero_std"],
        length=metrics["completions/length"], cut=metrics["completions/clipped_ratio"],
        failed=metrics["rewards/failed"] / sums["completions"],
        sampled=sums["sampled"], trained=sums["trained"],
        seconds={"sample": 0.0, "score": 0.0} | sums.seconds,
        checkpoint=sum(size for files in written for size, _ in files.values()),
        rollouts=sums["bytes"] / sums["groups"], disk=shutil.disk_usage(parent).free,
        valid=len(prompts.valid),
    )  # fmt: skip


def largest_batches(args, make_examples, policy) -> list[list]:
    """(row, completions) groups that fill a micro-batch each, of the tokenizer's ids in turn; every other
    completion is right. First as many as fit of full length; then more, just short enough to fit, which may
    be more tokens in all. Then both again: the first update had none of Adam's moments beside it.
    """

    def group(share: float) -> tuple:
        prompt, new = (max(1, int(share * size)) for size in (args.max_prompt_tokens, args.max_new_tokens))
        ids = [i % policy.vocab for i in range(max(prompt, new))]
        completions = [
            Completion(ids[:new], [0.0] * new, "", "length", 0, reward=float(i % 2))
            for i in range(args.samples_per_prompt)
        ]
        return Row("", ids[:prompt], None, None), completions

    def fitting(share: float) -> tuple[int, int]:
        """Sequences that fit into a micro-batch, and those of a group."""
        [example] = make_examples([group(share)], 0, args)
        sequences = split(example, policy, args.micro_batch_tokens)
        together = len(sequences) if example.pairs else 1
        width = max(sequence.width for sequence in sequences)
        return max(1, args.micro_batch_tokens // (width * together)) * together, len(sequences)

    most = fitting(1)[0]
    shorter = (percent / 100 for percent in range(99, 0, -1))
    shares = [1.0, *itertools.islice((share for share in shorter if fitting(share)[0] > most), 1)]
    counts = [math.ceil(fit / of_a_group) for fit, of_a_group in map(fitting, shares)]
    return [[group(share)] * count for share, count in zip(shares, counts, strict=True)] * 2


# ---- memory


def tensor_bytes(policy, reference, optimizer, reward_model, sampler) -> dict[str, int]:
    """This rank's bytes of what is there during an update, by what it is for."""
    here = lambda tensors: [x for x in tensors if x.device.type == policy.device.type]  # noqa: E731
    size = lambda tensors: sum(local(x.detach()).nbytes for x in here(tensors))  # noqa: E731
    weights = list(policy.parameters())
    moments = [optimizer.state[p][name] for p in weights for name in ("exp_avg", "exp_avg_sq")]
    return {
        "master weights": size(weights),
        "gradients": size(p.grad for p in weights if p.grad is not None),
        "Adam's moments": size(moments),
        "reference": size(reference.model.parameters()) if reference.model else 0,
        "reward model": size(reward_model.model.parameters()) if reward_model else 0,
        "transformers' sampler": size(sampler.lm.parameters()) if hasattr(sampler, "lm") else 0,
    }


def derive(args, policy) -> float | None:
    """Bytes that results/memory.py expects beside these; None for a model whose shape it does not know."""
    shape = shape_of(policy.lm.config.get_text_config())
    parameters = sum(p.numel() for p in policy.parameters())
    if not shape or not math.isclose(shape.parameters, parameters, rel_tol=2e-3):  # it knows no biases
        return None
    row = args.max_prompt_tokens + args.max_new_tokens
    tokens = max(args.micro_batch_tokens, row)
    found = memory(shape, 1, tokens, args.activation_checkpointing, row)
    return sum(found[name] for name in NOT_FOR_PARAMETERS)


def in_use() -> int:
    """Bytes in use on this rank's GPU; on a CPU, the most that this process has held."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def most_held(pool: int) -> int:
    """Bytes of torch's tensors at the peak, without the sleeping sampler's pool; on a CPU, as `in_use`."""
    return torch.cuda.max_memory_allocated() - pool if torch.cuda.is_available() else in_use()


def capacity() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def enough_memory(what: str, ways: str):
    """Running out of memory becomes one line that says what may help, and exit code 2."""
    try:
        yield
    except RuntimeError as error:  # torch's, and vLLM's own
        said = str(error).lower()
        known = "out of memory" in said or "alloc_failed" in said  # the latter is cuBLAS's
        if not known and not isinstance(error, torch.OutOfMemoryError):
            raise
        time.sleep(5 * bool(dist.get_rank()))  # where rank 0 has run out too, its line is enough
        complain(f"error: rank {dist.get_rank()} runs out of memory in {what}: {ways}")
        raise SystemExit(2) from error


def update_ways(args) -> str:
    ways = [f"lower --micro-batch-tokens {args.micro_batch_tokens}"]
    ways += [] if args.activation_checkpointing else ["turn --activation-checkpointing on"]
    ways += ["take more GPUs" + (" or a larger --shard-ranks" if args.shard_ranks else "")]
    return ", ".join(ways)


# ---- what is printed


@dataclass
class Forecast:
    step: dict[str, float]  # seconds of sampling, scoring, update
    steps: int  # of a window
    window: float  # seconds, the reload included
    on_disk: float  # bytes of a window, 0 where it stays in memory
    run: float  # seconds
    bound: str  # a GPU takes little longer for more prompts in a call, and little less for fewer
    checkpoints: int
    validations: int


def forecast(found: Found, args) -> Forecast:
    seconds, share = found.seconds, args.prompts_per_step / PROMPTS
    step = {part: seconds[part] * share for part in ("sample", "score", "update")}
    steps = min(args.sync_steps, args.steps)
    takes_chunks = steps > CHUNK
    saved = set()
    if args.save_every:  # and where a window of several chunks begins
        saved = {*range(args.save_every, args.steps + 1, args.save_every)}
        saved |= {*range(steps, args.steps, steps)} if takes_chunks else set()
    validations = 1 + math.ceil(args.steps / args.eval_every) if args.eval_every else 0
    completions = found.valid / (PROMPTS * args.samples_per_prompt)  # of a validation, one a prompt
    validation = seconds["reload"] + completions * (seconds["sample"] + seconds["score"])
    run = args.steps * sum(step.values()) + math.ceil(args.steps / steps) * seconds["reload"]
    in_a_call = min(steps, CHUNK) * args.prompts_per_step
    bound = ""
    if torch.cuda.is_available() and in_a_call != PROMPTS:
        bound = "at most " if in_a_call > PROMPTS else "at least "
    return Forecast(
        step=step, steps=steps,
        window=seconds["reload"] + steps * sum(step.values()),
        on_disk=steps * args.prompts_per_step * found.rollouts if takes_chunks else 0,
        run=run + len(saved) * seconds["checkpoint"] + validations * validation,
        bound=bound, checkpoints=len(saved), validations=validations,
    )  # fmt: skip


def screen(found: Found, args) -> list[str]:
    ahead, seconds = forecast(found, args), found.seconds
    room, rest = f"of {_size(found.capacity)}", found.most - sum(found.tensors.values())
    held = [f"{name} {_size(size)}" for name, size in found.tensors.items() if size]
    held.append(f"activations, logits and all else {_size(rest)}")
    if found.derived and torch.cuda.is_available():
        held[-1] += f" (derived: {_size(found.derived)})"
    at_a_time = f"room for {found.sequences:,.0f} sequences of full length at a time"
    speed = f"{found.sampled / seconds['sample']:,.0f} tokens/s" if found.sampled else "-"
    parts = ", ".join(f"{part} {_time(ahead.steps * took)}" for part, took in ahead.step.items())
    disk = f"{_size(ahead.on_disk)} on disk" if ahead.on_disk else "stays in memory"
    saves = f"{ahead.checkpoints} checkpoint(s) and {ahead.validations} validation(s) included"
    rows = [
        ("model", f"{found.parameters:,} parameters on {dist.get_world_size()} rank(s)"),
        ("memory, largest update", f"{_size(found.in_update)} {room} on a rank"),
        *(("", line) for line in held),
        ("memory, sampling", f"{_size(found.while_sampling)} {room}, {at_a_time}"),
        ("unequal rewards", f"in {found.unequal:.0%} of {PROMPTS} groups of {args.samples_per_prompt}"),
        (
            "completions",
            f"{found.length:,.1f} tokens, {found.cut:.0%} cut, {found.failed:.0%} without a reward",
        ),
        ("speed", f"sampling {speed}, update {found.trained / seconds['update']:,.0f} tokens/s"),
        ("reload", f"{seconds['reload']:.2f} s"),
        ("checkpoint", f"{seconds['checkpoint']:.2f} s, {_size(found.checkpoint)}"),
        (f"a window of {ahead.steps}", f"{ahead.bound}{_time(ahead.window)} ({parts}), {disk}"),
        (f"the run of {args.steps}", f"{ahead.bound}{_time(ahead.run)}, {saves}"),
    ]
    return [f"{name:24}{text}" for name, text in rows]


def warnings(found: Found, args) -> list[str]:
    """What is likely to go wrong, each with the flag that helps."""
    full, sampling = found.in_update / found.capacity, found.while_sampling / found.capacity
    disk = (args.keep + 1) * found.checkpoint + 2 * forecast(found, args).on_disk
    said = []
    if full > FULL:
        said.append(f"the largest update takes {full:.0%} of the memory: {update_ways(args)}")
    if sampling > FULL:
        said.append(f"sampling takes {sampling:.0%} of the memory: lower --gpu-memory")
    if found.sequences < FEW_SEQUENCES:
        few = f"room for {found.sequences:.0f} sequences at a time, fewer than {FEW_SEQUENCES}"
        ways = "raise --gpu-memory (on a CPU VLLM_CPU_KVCACHE_SPACE) or lower --max-new-tokens"
        said.append(f"the sampler has {few}: {ways}")
    if found.unequal < FEW_UNEQUAL:
        few = f"only {found.unequal:.0%} of the groups have unequal rewards, the others teach nothing"
        said.append(f"{few}: raise --samples-per-prompt or take other rows (GUIDE.md, section 10)")
    if found.cut > MANY_CUT:
        said.append(f"{found.cut:.0%} of the completions are cut: raise --max-new-tokens")
    if found.failed > args.max_failed:
        limit = f"more than --max-failed {args.max_failed:g}"
        said.append(f"{found.failed:.0%} of the completions have no reward, {limit}: see to what scores them")
    if disk > found.disk:
        sizes = f"up to {_size(disk)}, {_size(found.disk)} are free"
        said.append(f"checkpoints and windows take {sizes}: lower --keep or choose another --out")
    return [f"warning: {text}" for text in said]


def _time(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s"


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count > GIB / 10 else f"{count / 2**20:.2f} MiB"
