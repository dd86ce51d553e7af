"""Semi-online GRPO (arXiv 2506.21495): sample a group of completions, learn from those above its mean.

    loss = - sum over tokens of  min( ratio A, clip(ratio) A )  +  beta KL     (paper, eq. 1, with PPO's clip)
    A = reward - mean of its group [/ standard deviation],   ratio = pi / pi of the sampler

`--sync-steps s` is the dial: optimizer steps between two reloads of the sampler's weights. 1 is
online, inf is offline (the sampler keeps its first weights), anything between is semi-online:
a completion is at most s - 1 steps old.

    torchrun train_grpo.py --sync-steps 10         # no --model: the toy, on a laptop
    torchrun --nproc-per-node 8 train_grpo.py --sync-steps 10 --data FILE \\
        --model meta-llama/Llama-3.1-8B-Instruct   # the defaults are then the paper's for maths

Where this differs from the paper, or the paper from its own code:
- Every window has s updates; in the original code the run's first window has s - 1.
- A window's completions are all sampled at its sync (window.py). The sampler's weights are fixed inside a
  window, so sampling early draws from the same distribution.
- A completion whose reward could not be had leaves its group; the original code scores it 0.
- Advantages are not divided by the group's standard deviation, as in eq. 1; the original code divides them,
  so that hard and easy prompts weigh alike: --std-norm, the toy's default.
- A group of equal rewards contributes nothing, not even KL, and costs no forward.
- The paper is on-policy and corrects nothing. Here the ratio is to the sampler's own log-probs: in the step
  after a reload it can only be rounding, and weighs the plain policy gradient; later it is clipped as in PPO.
- The learning rate is constant after the warm-up; the paper does not state its schedule.

Shapes: B completions of a micro-batch, of at most T tokens.
"""

import math
import statistics
import time
from pathlib import Path

import torch
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
    "activation_checkpointing": False, "lr": 2e-4, "grad_clip": 1.0, "std_norm": True,
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
    add("--out", type=Path, help="run directory (default: runs/grpo-s<sync-steps>-<time>)")
    add("--preflight", action="store_true", help="try everything once, say what the run will take, end")
    # how long, and the dial
    add("--steps", type=count, default=300, help="optimizer steps; paper: 1500 chat, maths not stated")
    add("--sync-steps", type=steps_or_inf, default=1,
        help="optimizer steps between reloads of the sampler: 1 online, inf offline")
    add("--sync-ref", action=switch, default=False,
        help="the reference moves with the sampler; paper (T4): no")
    # sampling
    add("--prompts-per-step", type=count, default=64, help="over all ranks; paper (T4): 64 maths, 32 chat")
    add("--samples-per-prompt", type=count, default=8, help="the group; paper (T5): 8, tried 4 and 12")
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
    add("--lr", type=positive, default=1e-6, help="AdamW's; paper (T4): 1e-6 chat, maths garbled")
    add("--adam-eps", type=positive, default=1e-8, help="paper (T4): 1e-8 chat, maths garbled")
    add("--weight-decay", type=positive_or_0, default=0.1, help="paper: not stated; as the original code")
    add("--grad-clip", type=positive, default=0.1, help="largest gradient norm; paper (T4): 0.1")
    add("--warmup-steps", type=count_or_0, default=0, help="steps of linear warm-up; paper: not stated")
    add("--beta", type=positive_or_0, default=0.001, help="of the KL to the reference; paper (T4): 0.001")
    add("--std-norm", action=switch, default=False,
        help="divide advantages by the group's standard deviation (original code); paper (eq. 1): no")
    add("--loss-norm", choices=["seq", "token", "sum"], default="sum",
        help="mean over a completion's tokens (paper: less stable), over the step's tokens, or sum (paper)")
    add("--clip-low", type=positive, default=0.2, help="stale samples: ratios below 1 - this are clipped")
    add("--clip-high", type=positive, default=0.2, help="and those above 1 + this; paper: no clip")
    add("--is-cap", type=positive, default=2.0, help="bound on a token's policy / sampler; original code: 2")
    add("--seed", type=int, default=0, help="of the order of prompts, and of sampling")
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
    flags.check(args, sequences=1, what="a completion")
    if args.clip_low >= 1:
        flags.fail(f"--clip-low {args.clip_low:g}: ratios are above 0, so between 0 and 1")
    if args.is_cap < 1 + args.clip_high:
        flags.fail(f"--is-cap {args.is_cap:g}: must not be below 1 + --clip-high = {1 + args.clip_high:g}")
    return args


# ---- maths


def advantages(rewards: list, std_norm: bool) -> list:
    """Reward - mean [/ sample standard deviation] of its group; None where the reward is unknown, and for all
    of a group whose rewards are equal (paper, section 2.1).
    """
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) < 2:
        return [None] * len(rewards)
    mean = statistics.fmean(known)
    spread = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    scale = spread + 1e-6 if std_norm else 1.0
    return [None if reward is None else (reward - mean) / scale for reward in rewards]


def make_examples(groups: list, _step: int, args) -> list[Example]:
    """This rank's prompts with their completions and advantages."""
    return [
        Example(row, group, advantages=advantages([c.reward for c in group], args.std_norm))
        for row, group in groups
    ]


def policy_loss(logps_BT, sampler_BT, adv_B, stale: bool, clip_low: float, clip_high: float, is_cap: float):
    """Loss of each token, and whether the clip took its gradient (paper, eq. 1).

    sampler_BT: log-probs that the sampler drew the tokens with. Not stale: policy and sampler hold the same
    weights and differ by rounding alone, for which their ratio, cut at `is_cap`, weighs the policy gradient.
    Stale: the ratio carries the gradient and is clipped; `is_cap` bounds it where the clip does not (A < 0).
    """
    adv_B1 = adv_B[:, None]
    ratio_BT = (logps_BT - sampler_BT).clamp(max=20).exp()  # inf times a gradient of 0 would be NaN
    capped_BT = ratio_BT.clamp(max=is_cap)
    if not stale:  # the product with exp is 1 in value, and has the gradient of the log-prob
        gain_BT = capped_BT.detach() * (logps_BT - logps_BT.detach()).exp() * adv_B1
        return -gain_BT, torch.zeros_like(logps_BT, dtype=torch.bool)
    gain_BT = torch.min(capped_BT * adv_B1, ratio_BT.clamp(1 - clip_low, 1 + clip_high) * adv_B1)
    clipped_BT = torch.where(adv_B1 > 0, ratio_BT > 1 + clip_high, ratio_BT < 1 - clip_low)
    return -gain_BT, clipped_BT


def needs_reference(args) -> bool:
    """False where the KL weighs nothing, and online with --sync-ref: the reference is then the policy itself
    at every step.
    """
    return args.beta > 0 and (args.sync_steps > 1 or not args.sync_ref)


def kl_to_reference(logps_BT, ref_BT):
    """Schulman's k3 of each token (nats): never negative, unbiased for tokens that the policy sampled."""
    log_ratio_BT = (ref_BT - logps_BT).clamp(max=20)
    return log_ratio_BT.exp() - log_ratio_BT - 1


def token_weight(norm: str, length_B, completions: float, tokens: float):
    """What a token of each completion weighs in the loss. completions, tokens: of the whole step on all
    ranks, also of groups of equal rewards, as in the original code.
    """
    weight_B = 1 / length_B.clamp(min=1) if norm == "seq" else torch.ones_like(length_B)
    return weight_B / (max(1, tokens) if norm == "token" else completions)


# ---- main


def main(argv=None):
    args = get_args(argv)

    # 1 processes and run directory
    require_sampler(args.sampler)
    rank, world, device = processes.start()
    mesh, dtype = processes.device_mesh(device, args.shard_ranks), processes.compute_dtype(device)
    checkpoint = find_checkpoint(args)  # takes over --out and --date of its run
    args.date = args.date or processes.gather([time.strftime("%Y-%m-%d")])[0]  # one for the whole experiment
    run = Run(args, f"grpo-s{args.sync_steps}", checkpoint)

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
    run.say("the loss prints near 0 or goes with length: advantages add up to 0; watch reward, kl, entropy")
    if args.eval_every and not checkpoint:
        progress.first = progress.last = validate(0)
    interrupt, stop = Interrupt(), None
    todo = range(progress.step, args.steps)
    bar = tqdm(todo, desc="GRPO", initial=progress.step, total=args.steps, disable=rank > 0)
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
        # the denominators of the loss, which the backward needs before the other sums are known
        completions, sampled = processes.over_ranks(sums["completions"], sums["length"])
        for batch in micro_batches(examples, policy, args.micro_batch_tokens):  # as many on every rank
            logps_BT, entropy_BT = policy(batch)
            loss_BT, clipped_BT = policy_loss(
                logps_BT, batch.sampler_BT, batch.advantage_B, stale=not window.on_policy(step),
                clip_low=args.clip_low, clip_high=args.clip_high, is_cap=args.is_cap,
            )  # fmt: skip
            kl_BT = kl_to_reference(logps_BT, reference(batch, logps_BT, step))
            weight_B = token_weight(args.loss_norm, batch.mask_BT.sum(-1), completions, sampled)
            loss = (((loss_BT + args.beta * kl_BT) * batch.mask_BT).sum(-1) * weight_B).sum()
            (loss * world).backward()  # x world, because FSDP averages gradients over ranks
            sums.add(loss=loss, kl=(kl_BT * batch.mask_BT).sum(), entropy=entropy_BT.sum())
            sums.add(clipped=(clipped_BT & batch.mask_BT).sum())
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
        tokens = max(1, sums["tokens"])
        metrics = sums.metrics(sampler.pool) | {
            "step": step,
            "learning_rate": lr,
            "loss": sums["loss"],
            "kl": sums["kl"] / tokens,
            "clip_ratio": sums["clipped"] / tokens,
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
