"""Semi-online DPO (arXiv 2506.21495): sample completions, pair a right one with a wrong one, learn.

    loss = -log sigmoid( beta * [ log pi/ref (chosen) - log pi/ref (rejected) ] )      (paper, eq. 3)

`--sync-steps s` is the dial: optimizer steps between two reloads of the sampler's weights. 1 is
online, inf is offline (the sampler keeps its first weights), anything between is semi-online:
a completion is at most s - 1 steps old.

    torchrun train_dpo.py --sync-steps 100         # no --model: the toy, on a laptop
    torchrun --nproc-per-node 8 train_dpo.py --sync-steps 100 --data FILE \\
        --model meta-llama/Llama-3.1-8B-Instruct   # the defaults are then the paper's for maths

Where this differs from the paper, or the paper from its own code:
- Every window has s updates; in the original code the run's first window has s - 1.
- A window's completions are all sampled at its sync (window.py). The sampler's weights are fixed inside a
  window, so sampling early draws from the same distribution.
- A completion whose reward could not be had leaves its group; the original code scores it 0.
- Chosen and rejected are drawn at random, as the text says; the original code takes the first ones.
- The learning rate is constant after the warm-up; the paper does not state its schedule.

Shapes: P pairs of a micro-batch, B completions of at most T tokens.
"""

import math
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import flags
import processes
from checkpoint import Checkpoints, Progress, find_checkpoint
from data import load_rows
from export import export, rehearse_export
from flags import count, count_or_0, day, positive, positive_or_0, steps_or_inf, switch
from loading import load_policy, load_reference
from metrics import Sums
from packing import Example, micro_batches
from policy import clip_gradients
from preflight import preflight
from rewards import Scorer, add_reward_flags
from run import BY_SIGNAL, Interrupt, Run
from sampler import load_sampler, require_sampler
from tokenizer import load_tokenizer
from validate import Validation
from window import Rollouts, Window

TOY = {  # without --model it is the toy, with values of its own
    "model": "toy/model", "data": ["toy/train.jsonl"], "eval_data": ["toy/valid.jsonl"],
    "prompts_per_step": 32, "max_prompt_tokens": 24, "max_new_tokens": 8, "micro_batch_tokens": 4096,
    "activation_checkpointing": False, "lr": 2e-4, "adam_eps": 1e-8, "grad_clip": 1.0, "beta": 3.0,
}  # fmt: skip


def add_flags(add):
    # fmt: off
    # what; (T4) is the paper's Table 4
    add("--model", help="directory or hub name; paper: Llama-3.1-8B-Instruct")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--data", nargs="+", help=".jsonl, .parquet or hub names")
    add("--data-weights", nargs="+", type=positive, help="shares of the sources (default: sizes)")
    add("--eval-data", nargs="+", default=[], help="rows for validation; none: no validation")
    add("--date", type=day, help="what a chat template with a clock writes (default: today)")
    add("--out", type=Path, help="run directory (default: runs/dpo-s<sync-steps>-<time>)")
    add("--preflight", action="store_true", help="try everything once, say what the run will take, end")
    # how long, and the dial
    add("--steps", type=count, default=300, help="optimizer steps; paper: 1500 chat, maths not stated")
    add("--sync-steps", type=steps_or_inf, default=1,
        help="optimizer steps between reloads of the sampler: 1 online, inf offline")
    add("--sync-ref", action=switch, default=True,
        help="the reference moves with the sampler; paper (T4): yes for maths DPO, no elsewhere")
    # sampling
    add("--prompts-per-step", type=count, default=64, help="over all ranks; paper (T4): 64 maths, 32 chat")
    add("--samples-per-prompt", type=count, default=8, help="paper: not stated for DPO, 8 for GRPO")
    add("--max-prompt-tokens", type=count, default=1024, help="longer ones are dropped; paper: not stated")
    add("--max-new-tokens", type=count, default=2048, help="paper (T4): 2048 maths, 1024 chat")
    add("--temperature", type=positive, default=1.0, help="of sampling and of all log-probs; paper: 1.0")
    add("--rollouts", nargs="+", type=Path,
        help="train on these rollouts: files or directories (needs --sync-steps inf)")
    add("--save-rollouts", type=Path, help="write every scored rollout to this new .jsonl file")
    add("--sampler", choices=["vllm", "hf"], default="vllm", help="hf: transformers, needs no vLLM")
    add("--gpu-memory", type=positive, default=0.6,
        help="vLLM's share of a GPU; beside a reward model that stays there about 0.4")
    add("--sleep", action=switch, default=True, help="vLLM frees the GPU while the policy trains")
    # rewards
    add_reward_flags(add)
    add("--max-failed", type=positive_or_0, default=0.5, help="share of rewards that may fail in a step")
    # update
    add("--micro-batch-tokens", type=count, default=16384,
        help="padded tokens of one forward, changes memory only")
    add("--packing", action=switch, default=True,
        help="completions share prompts and rows, under a mask; the flash kernel needs --no-packing")
    add("--activation-checkpointing", action=switch, default=True, help="less memory, slower")
    add("--shard-ranks", type=count, help="shard over so many, replicate over the rest (default: all)")
    add("--lr", type=positive, default=1e-6, help="AdamW's learning rate; paper (T4): 1e-6")
    add("--adam-eps", type=positive, default=1e-4, help="paper (T4): 1e-4 maths DPO, 1e-8 elsewhere")
    add("--weight-decay", type=positive_or_0, default=0.1, help="paper: not stated; as the original code")
    add("--grad-clip", type=positive, default=0.1, help="largest gradient norm; paper (T4): 0.1")
    add("--warmup-steps", type=count_or_0, default=0, help="steps of linear warm-up; paper: not stated")
    add("--beta", type=positive, default=0.1, help="DPO's beta; paper (T4): 0.1 maths, 0.01 chat")
    # ablations of the paper, all off by default
    add("--all-pairs", action="store_true", help="GroupDPO (eq. 4): the mean over all pairs of a prompt")
    add("--nll-weight", type=positive_or_0, default=0.0, help="of chosen ones' NLL, by token; paper: 1")
    add("--length-normalize", action="store_true", help="log-probs are means over tokens, not sums")
    add("--entropy-weight", type=positive_or_0, default=0.0, help="of chosen ones' entropy; paper: to 5e-4")
    add("--seed", type=int, default=0, help="of the order of prompts, of sampling and of pairs")
    # save and log
    add("--save-every", type=count_or_0, default=50, help="steps between checkpoints, 0: none but at a stop")
    add("--keep", type=count, default=2, help="newest checkpoints that stay")
    add("--resume", metavar="auto|DIR", help="auto: go on from --out's newest; or from a run or checkpoint")
    add("--max-skipped", type=count, default=3, help="stop after so many updates in a row are not finite")
    add("--eval-every", type=count_or_0, default=50, help="steps between validations, 0: none")
    add("--log-samples", type=int, default=8, help="completions a step for samples.jsonl, -1: all")
    add("--wandb", metavar="PROJECT", help="also log to this project of Weights & Biases")
    add("--tensorboard", action="store_true", help="also write TensorBoard's files into the run directory")
    # fmt: on


def get_args(argv=None) -> flags.Flags:
    args = flags.parse(argv, __doc__, add_flags, TOY)
    if args.all_pairs:
        flags.check(args, sequences=args.samples_per_prompt, what="a group")
    else:
        flags.check(args, sequences=2, what="a pair")
    return args


# ---- maths


def pick_pairs(rewards: list, rng: random.Random, every: bool) -> list[tuple[int, int]]:
    """Which completions are (chosen, rejected): one of the best and one of the worst at random, which for a
    verifier means a right and a wrong one; none where all are equal (paper, section 3.2). A reward may be
    None: unknown.

    every: all pairs of a better and a worse completion (GroupDPO, eq. 4).
    """
    scored = [i for i, reward in enumerate(rewards) if reward is not None]
    if every:
        return [(i, j) for i in scored for j in scored if rewards[i] > rewards[j]]
    if len({rewards[i] for i in scored}) < 2:
        return []
    best, worst = max(rewards[i] for i in scored), min(rewards[i] for i in scored)
    chosen = rng.choice([i for i in scored if rewards[i] == best])
    return [(chosen, rng.choice([i for i in scored if rewards[i] == worst]))]


def make_examples(groups: list, step: int, args) -> list[Example]:
    """This rank's prompts with their completions and pairs; each prompt draws with a seed of its own."""
    examples = []
    for i, (row, completions) in enumerate(groups):
        # of the prompt in the step, on any number of ranks
        number = dist.get_rank() + i * dist.get_world_size()
        rng = random.Random(f"{args.seed} pair {step} {number}")
        pairs = pick_pairs([c.reward for c in completions], rng, args.all_pairs)
        examples.append(Example(row, completions, pairs=pairs))
    return examples


def mean_chosen_length(examples: list[Example]) -> float:
    """Tokens of a chosen completion: a mean over prompts, on all ranks, of the mean over their pairs;
    collective.
    """
    tokens = sum(len(e.completions[chosen].ids) / len(e.pairs) for e in examples for chosen, _ in e.pairs)
    pairs = sum(bool(example.pairs) for example in examples)
    tokens, pairs = processes.over_ranks(tokens, pairs)
    return tokens / max(1, pairs)


def needs_reference(args) -> bool:
    """False online with --sync-ref: the reference is then the policy itself at every step, and never runs."""
    return args.sync_steps > 1 or not args.sync_ref


def dpo_loss(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta: float):
    """Paper, eq. 3, on log-probs summed over the tokens of each completion (nats); one loss per pair."""
    log_ratio_chosen_P = chosen_P - ref_chosen_P
    log_ratio_rejected_P = rejected_P - ref_rejected_P
    return -F.logsigmoid(beta * (log_ratio_chosen_P - log_ratio_rejected_P))


def batch_loss(batch, logps_BT, ref_BT, entropy_BT, chosen_length: float, args):
    """The loss of a micro-batch, summed over prompts, with the terms of the ablations that are on; and, for
    the log, the implicit rewards beta log pi/ref, summed alike.

    chosen_length: the mean length of the step's chosen completions, which makes the NLL a mean over tokens.
    """
    chosen, rejected = batch.chosen_index_P, batch.rejected_index_P
    length_B = batch.mask_BT.sum(-1).clamp(min=1)
    logps_B, ref_B = logps_BT.sum(-1), ref_BT.sum(-1)
    if args.length_normalize:
        logps_B, ref_B = logps_B / length_B, ref_B / length_B
    loss_P = dpo_loss(logps_B[chosen], logps_B[rejected], ref_B[chosen], ref_B[rejected], args.beta)
    if args.nll_weight:
        loss_P = loss_P - args.nll_weight * logps_BT.sum(-1)[chosen] / chosen_length
    if args.entropy_weight:
        loss_P = loss_P - args.entropy_weight * (entropy_BT.sum(-1) / length_B)[chosen]
    reward_B = args.beta * (logps_B - ref_B).detach()
    logged = {
        "chosen": (reward_B[chosen] * batch.weight_P).sum(),
        "rejected": (reward_B[rejected] * batch.weight_P).sum(),
        "ordered": ((reward_B[chosen] > reward_B[rejected]) * batch.weight_P).sum(),
    }
    return (loss_P * batch.weight_P).sum(), logged


# ---- main


def main(argv=None):
    args = get_args(argv)

    # 1 processes and run directory
    require_sampler(args.sampler)
    rank, world, device = processes.start()
    mesh, dtype = processes.device_mesh(device, args.shard_ranks), processes.compute_dtype(device)
    checkpoint = find_checkpoint(args)  # takes over --out and --date of its run
    args.date = args.date or processes.gather([time.strftime("%Y-%m-%d")])[0]  # one for the whole experiment
    run = Run(args, f"dpo-s{args.sync_steps}", checkpoint)

    # 2 data: what is wrong with it comes out here, before anything long starts
    length, trust = args.max_prompt_tokens + args.max_new_tokens, args.trust_remote_code
    tokenizer, vocab, stop_ids = load_tokenizer(args.model, length, trust)
    prompts = load_rows(args, tokenizer, vocab, talks=rank == 0)
    if checkpoint:
        checkpoint.check(prompts.fingerprint)
    scorer = Scorer(prompts.to_score, args, device, dtype, talks=rank == 0)

    # 3 policy, reference, optimizer
    policy = load_policy(
        args.model, device=device, mesh=mesh, vocab=vocab, temperature=args.temperature, trust=trust,
        activation_checkpointing=args.activation_checkpointing, packing=args.packing,
    )  # fmt: skip
    rehearse_export(policy, tokenizer, args.model)
    reference = load_reference(
        args.model, device=device, mesh=mesh, vocab=vocab, temperature=args.temperature, trust=trust,
        needed=needs_reference(args), follows=args.sync_ref,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=args.adam_eps,
        weight_decay=args.weight_decay, fused=True,
    )  # fmt: skip

    # 4 sampler, and what an earlier run has got to
    sampler = load_sampler(
        args.sampler, args.model, tokenizer=tokenizer, vocab=vocab, stop_ids=stop_ids, device=device,
        dtype=dtype, max_length=length, gpu_memory=args.gpu_memory, sleep=args.sleep, trust=trust,
    )  # fmt: skip
    window = (Rollouts if args.rollouts else Window)(run.directory, args, prompts)
    validate = Validation(prompts, args, sampler=sampler, policy=policy, scorer=scorer, run=run)
    checkpoints = Checkpoints(
        run, prompts, window=window, policy=policy, reference=reference, optimizer=optimizer
    )
    if args.preflight:
        return preflight(
            args, make_examples, prompts=prompts, policy=policy, reference=reference, optimizer=optimizer,
            scorer=scorer, sampler=sampler, window=window, checkpoints=checkpoints,
        )  # fmt: skip
    progress = checkpoints.load(checkpoint) if checkpoint else Progress()

    # 5 the loop
    run.begin()
    window.restore(progress.step, checkpoint and checkpoint.state["window"], run.say)
    run.announce(prompts, sampler)
    if args.eval_every and not checkpoint:
        progress.first = progress.last = validate(0)
    interrupt, stop = Interrupt(), None
    todo = range(progress.step, args.steps)
    bar = tqdm(todo, desc="DPO", initial=progress.step, total=args.steps, disable=rank > 0)
    for step in bar:
        sums = Sums(prompts.kinds)
        lr = args.lr * min(1, (step + 1) / (args.warmup_steps + 1))
        optimizer.param_groups[0]["lr"] = lr

        # ---- sync: the sampler takes over the policy's weights, the reference too where it follows
        if step == window.end:  # every s steps, if the run was not resumed with more --steps
            sampler.follow(policy, step)
            reference.follow(policy, step)
            window.begin(step)
        sums.lap("sync")

        # ---- sample: everything that these weights will ever write, until the next sync
        if not window.fill(step, sampler, policy, interrupt, sums):
            stop = BY_SIGNAL  # what is sampled so far stays
            break
        sampler.sleep()  # in each step, since a validation may have woken it: the update gets the GPU
        groups = window[step]
        sums.lap("sample")

        # ---- score
        if not window.scored:
            scorer.score(groups)  # fills in the reward of each completion
        sums.add_groups(step, groups)
        sums.lap("score")

        # ---- update
        examples = make_examples(groups, step, args)
        chosen_length = mean_chosen_length(examples) if args.nll_weight else 0.0
        sums.add(pairs=sum(bool(example.pairs) for example in examples))
        for batch in micro_batches(examples, policy, args.micro_batch_tokens):  # as many on every rank
            logps_BT, entropy_BT = policy(batch)
            ref_BT = reference(batch, logps_BT, step)  # online the policy's own: loss log 2, rewards/... 0
            loss, logged = batch_loss(batch, logps_BT, ref_BT, entropy_BT, chosen_length, args)
            # divided by all prompts of the step, also those without a pair, as the original code does; times
            # world, because FSDP averages gradients over ranks
            (loss / args.prompts_per_step * world).backward()
            sums.add(loss=loss, **logged, entropy=entropy_BT.sum())
            sums.add(tokens=batch.mask_BT.sum(), tokens_used=batch.tokens_used)
        grad_norm = clip_gradients(policy, args.grad_clip)
        sums.add(interrupted=interrupt.asked)
        sums.reduce()
        finite = math.isfinite(grad_norm) and math.isfinite(sums["loss"])
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        progress.advance(finite)
        sums.lap("update")

        # ---- log, validate, save
        paired = max(1, sums["pairs"])  # prompts with a pair
        metrics = sums.metrics(sampler.pool) | {
            "step": step,
            "learning_rate": lr,
            "loss": sums["loss"] / args.prompts_per_step,
            "pairs": round(sums["pairs"]),
            "rewards/chosen": sums["chosen"] / paired,
            "rewards/rejected": sums["rejected"] / paired,
            "rewards/margins": (sums["chosen"] - sums["rejected"]) / paired,
            "rewards/accuracies": sums["ordered"] / paired,
            "grad_norm": grad_norm,
            "skipped": progress.skipped,
        }
        run.record(metrics)
        run.record_rollouts(step, groups)
        window.report(step, metrics["reward"], run.say)
        if validate.due(progress.step):
            progress.last = validate(progress.step)
        name, score = progress.last
        bar.set_postfix({"reward": metrics["reward"], f"eval {name}": score, "age": metrics["sync/age"]})
        stop = run.reason_to_stop(sums, progress, groups)
        if stop:
            break
        if checkpoints.due(progress.step):
            checkpoints.save(progress)

    # 6 export and close
    if stop and progress.step > progress.saved:
        checkpoints.save(progress)
    if not stop:
        export(policy, tokenizer, run.directory / "model")
        run.end(progress.first, progress.last)
    scorer.close()
    sampler.close()
    processes.stop()
    run.leave(stop)


if __name__ == "__main__":
    processes.launch(main)
