"""Semi-online GRPO (arXiv 2506.21495): sample a group of answers, learn from those above its mean.

    loss = - sum over tokens of  min( ratio A, clip(ratio) A )  +  beta KL        (paper, eq. 1)
    A = reward - mean of its group [/ standard deviation],   ratio = pi / pi of the sampler

`--sync-steps s` is the dial: optimizer steps between two reloads of the sampler's weights. 1 is
online, inf is offline (the sampler keeps its first weights), anything between is semi-online. It is
an interval, not a bound on the age of samples.

    torchrun train_grpo.py --sync-steps 10         # no --model: the toy, on a laptop
    torchrun --nproc-per-node 8 train_grpo.py --sync-steps 10 --data FILE \\
        --model meta-llama/Llama-3.1-8B-Instruct   # the defaults are then the paper's for maths

Departures from the paper:
- Every window has s updates; the original code's first one has s - 1.
- A window's completions are all sampled at its sync (window.py). Its weights do not change, so neither does
  the distribution.
- An answer whose reward could not be had leaves its group; the original code scores it 0.
- Advantages are divided by the group's standard deviation, so that hard and easy prompts weigh alike, as in
  the original code; --no-std-norm is the text's eq. 1.
- A group of equal rewards contributes nothing, not even KL, and costs no forward.
- The paper is on-policy and corrects nothing. Here the ratio is to the sampler's own log-probs: in the step
  after a reload it can only be rounding, and weighs the plain policy gradient; later it is clipped as in PPO.
- The learning rate is constant after the warm-up; the paper does not state its schedule.

Shapes: B answers of a micro-batch, T target positions.
"""

import argparse
import math
import os
import random
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint as checkpoints
import data
import policy as policies
import rewards
import run as runs
import sampler as samplers
import window as windows


def get_args(argv=None) -> argparse.Namespace:
    count, count0 = runs.number(int), runs.number(int, zero=True)
    size, size0 = runs.number(float), runs.number(float, zero=True)
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = runs.fail
    add = parser.add_argument
    folder = os.path.relpath(Path(__file__).parent / "toy")
    toy = {  # without --model it is the toy, with values of its own
        "model": f"{folder}/model", "data": [f"{folder}/train.jsonl"], "eval_data": [f"{folder}/valid.jsonl"],
        "prompts_per_step": 32, "max_prompt_tokens": 24, "max_new_tokens": 8, "micro_batch_tokens": 4096,
        "activation_checkpointing": False, "lr": 2e-4, "grad_clip": 1.0, "std_norm": True,
    }  # fmt: skip
    # fmt: off
    # what; (T4) is the paper's Table 4
    add("--model", help="directory or hub name; paper: Llama-3.1-8B-Instruct")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--data", nargs="+", help=".jsonl, .parquet or hub names")
    add("--data-weights", nargs="+", type=size, help="shares of the sources in a mix (default: sizes)")
    add("--eval-data", nargs="+", default=[], help="rows for validation; none: no validation")
    add("--date", type=runs.day, help="what a chat template with a clock writes (default: today)")
    add("--out", type=Path, help="run directory (default: runs/grpo-s<sync-steps>-<time>)")
    # how long, and the dial
    add("--steps", type=count, default=300, help="optimizer steps; paper: 1500 chat, maths not stated")
    add("--sync-steps", type=runs.number(int, inf=True), default=1,
        help="optimizer steps between reloads of the sampler: 1 online, inf offline")
    add("--sync-ref", action=switch, default=False,
        help="the reference moves with the sampler; paper (T4): no")
    # sampling
    add("--prompts-per-step", type=count, default=64, help="over all ranks; paper (T4): 64 maths, 32 chat")
    add("--samples-per-prompt", type=count, default=8, help="the group; paper (T5): 8, tried 4 and 12")
    add("--max-prompt-tokens", type=count, default=1024, help="longer ones are dropped; paper: not stated")
    add("--max-new-tokens", type=count, default=2048, help="of an answer; paper (T4): 2048 maths, 1024 chat")
    add("--temperature", type=size, default=1.0, help="of sampling and of all log-probs; paper: 1.0")
    add("--rollouts", nargs="+", type=Path,
        help="train on these rollouts: files or directories (needs --sync-steps inf)")
    add("--save-rollouts", type=Path, help="write every scored rollout to this new .jsonl file")
    add("--sampler", choices=["vllm", "hf"], default="vllm", help="hf: transformers, needs no vLLM")
    add("--gpu-memory", type=size, default=0.6,
        help="vLLM's share of a GPU; beside a reward model that stays there about 0.4")
    add("--sleep", action=switch, default=True, help="vLLM frees the GPU while the policy trains")
    # rewards
    rewards.add_flags(add, count, size)
    add("--max-failed", type=size0, default=0.5, help="stop where more of a step's answers have no reward")
    # update
    add("--micro-batch-tokens", type=count, default=16384,
        help="padded tokens of one forward, changes memory only")
    add("--activation-checkpointing", action=switch, default=True, help="less memory, slower")
    add("--shard-ranks", type=count, help="shard over so many ranks, replicate over the rest (default: all)")
    add("--lr", type=size, default=1e-6, help="AdamW's learning rate; paper (T4): 1e-6 chat, maths garbled")
    add("--adam-eps", type=size, default=1e-8, help="paper (T4): 1e-8 chat, maths garbled")
    add("--weight-decay", type=size0, default=0.1, help="paper: not stated; the original code's default")
    add("--grad-clip", type=size, default=0.1, help="largest gradient norm; paper (T4): 0.1")
    add("--warmup-steps", type=count0, default=0, help="steps of linear warm-up; paper: not stated")
    add("--beta", type=size0, default=0.001, help="of the KL to the reference, 0: none; paper (T4): 0.001")
    add("--std-norm", action=switch, default=False,
        help="divide advantages by the group's standard deviation (original code); paper (eq. 1): no")
    add("--loss-norm", choices=["seq", "token", "sum"], default="sum",
        help="mean over an answer's tokens (paper: less stable), over the step's tokens, or sum (paper)")
    add("--clip-low", type=size, default=0.2, help="of stale samples ratios below 1 - this are clipped")
    add("--clip-high", type=size, default=0.2, help="and those above 1 + this; paper: no clip")
    add("--is-cap", type=size, default=2.0, help="bound on policy / sampler of a token; original code: 2")
    add("--seed", type=int, default=0, help="of the order of prompts, and of sampling")
    # save and log
    add("--save-every", type=count0, default=50, help="steps between checkpoints, 0: only when stopped")
    add("--keep", type=count, default=2, help="newest checkpoints that stay")
    add("--resume", metavar="auto|DIR", help="auto: go on from --out's newest; or from a run or checkpoint")
    add("--max-skipped", type=count, default=3, help="stop when as many updates in a row were not finite")
    add("--eval-every", type=count0, default=50, help="steps between validations, 0: none")
    add("--log-samples", type=int, default=8, help="answers a step for samples.jsonl, -1: all")
    add("--wandb", metavar="PROJECT", help="also log to this project of Weights & Biases")
    add("--tensorboard", action="store_true", help="also write TensorBoard's files into the run directory")
    # fmt: on
    args = runs.parse(parser, argv, toy)

    if not (args.data or args.rollouts):
        parser.error(f"--model {args.model}: needs --data, rows to train on (the toy's go with the toy)")
    longest = args.max_prompt_tokens + args.max_new_tokens
    if args.micro_batch_tokens < longest:
        parser.error(f"--micro-batch-tokens {args.micro_batch_tokens}: an answer can have {longest}, "
                     "--max-prompt-tokens + --max-new-tokens; raise it to that or more")  # fmt: skip
    if args.samples_per_prompt < 2:
        parser.error(f"--samples-per-prompt {args.samples_per_prompt}: a group needs 2")
    if args.clip_low >= 1:
        parser.error(f"--clip-low {args.clip_low:g}: ratios are above 0, so between 0 and 1")
    if args.is_cap < 1 + args.clip_high:
        parser.error(f"--is-cap {args.is_cap:g}: must not be below 1 + --clip-high = {1 + args.clip_high:g}")
    args.eval_every = args.eval_every if args.eval_data else 0
    if args.data_weights and len(args.data_weights) != len(args.data or []):
        parser.error(f"--data-weights: {len(args.data_weights)} weights for {len(args.data or [])} sources")
    if args.gpu_memory >= 1:
        parser.error(f"--gpu-memory {args.gpu_memory:g}: a share of the GPU, between 0 and 1")
    if args.rollouts and args.sync_steps != math.inf:
        parser.error(f"--rollouts {args.rollouts[0]}: they cannot follow the policy; add --sync-steps inf")
    return args


# ---- maths


def advantages(rewards: list, std_norm: bool) -> list:
    """Reward - mean [/ sample standard deviation] of its group; None for an answer without a verdict, and for
    all answers of a group whose rewards are equal (paper, section 2.1).
    """
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) < 2:
        return [None] * len(rewards)
    mean = statistics.fmean(known)
    spread = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    scale = spread + 1e-6 if std_norm else 1.0
    return [None if reward is None else (reward - mean) / scale for reward in rewards]


def policy_loss(logps_BT, sampler_BT, adv_B, stale: bool, clip_low: float, clip_high: float, is_cap: float):
    """Loss of each token, and whether the clip took its gradient (paper, eq. 1).

    sampler_BT: log-probs that the sampler drew the tokens with. Not stale: policy and sampler hold the same
    weights and differ by rounding alone, for which their ratio, cut at `is_cap`, weighs the policy gradient.
    Stale: the ratio carries the gradient and is clipped; `is_cap` bounds it where the clip does not (A < 0).
    """
    adv_B1 = adv_B[:, None]
    ratio_BT = (logps_BT - sampler_BT).clamp(max=20).exp()  # inf times a gradient of 0 would be NaN
    capped_BT = ratio_BT.clamp(max=is_cap)
    if not stale:
        gain_BT = capped_BT.detach() * (logps_BT - logps_BT.detach()).exp() * adv_B1
        return -gain_BT, torch.zeros_like(logps_BT, dtype=torch.bool)
    gain_BT = torch.min(capped_BT * adv_B1, ratio_BT.clamp(1 - clip_low, 1 + clip_high) * adv_B1)
    clipped_BT = torch.where(adv_B1 > 0, ratio_BT > 1 + clip_high, ratio_BT < 1 - clip_low)
    return -gain_BT, clipped_BT


def kl_to_reference(logps_BT, ref_BT):
    """Schulman's k3 of each token (nats): never negative, unbiased for tokens that the policy sampled."""
    log_ratio_BT = (ref_BT - logps_BT).clamp(max=20)
    return log_ratio_BT.exp() - log_ratio_BT - 1


def token_weight(norm: str, length_B, answers: int, tokens: int):
    """What a token of each answer weighs in the loss; answers, tokens: of the whole step, all ranks."""
    per_answer_B = 1 / length_B.clamp(min=1) if norm == "seq" else torch.ones_like(length_B)
    return per_answer_B / (tokens if norm == "token" else answers)


# ---- main


def main(argv=None):
    args = get_args(argv)
    batch_size, s = args.prompts_per_step, args.sync_steps

    # 1 processes and run directory
    samplers.require(args.sampler)
    rank, world, device = policies.start()
    mesh, dtype = policies.device_mesh(device, args.shard_ranks), policies.compute_dtype(device)
    checkpoint = checkpoints.find(args)
    args.date = args.date or policies.gather([time.strftime("%Y-%m-%d")])[0]  # one for the whole experiment
    run = runs.Run(args, f"grpo-s{s}", rank == 0, checkpoint)

    # 2 data: what is wrong with it comes out here, before anything long starts
    length = args.max_prompt_tokens + args.max_new_tokens
    trust = args.trust_remote_code
    tokenizer, vocab = policies.load_tokenizer(args.model, length, trust)
    stop_ids = samplers.end_tokens(args.model, tokenizer, vocab, trust)
    checks = (tokenizer, vocab, rewards.complaint, args.max_prompt_tokens, args.date, rank == 0)
    if args.rollouts:
        fits = (tokenizer, samplers.Completion, vocab, length)
        sources, dropped = [data.load_rollouts(args.rollouts, *fits)], 0
    else:
        sources, dropped = data.load_prompts(args.data, *checks)
    prompts = data.Prompts(sources, None if args.rollouts else args.data_weights, args.seed)
    valid = sum(data.load_prompts(args.eval_data, *checks)[0], [])
    fingerprint = data.fingerprint([*sources, valid])
    if checkpoint:
        checkpoint.check(fingerprint)
    to_score = valid if args.rollouts else sum(sources, valid)
    scorer = rewards.Scorer(to_score, args, device, dtype, talks=rank == 0)

    # 3 policy and reference
    where = (args.model, device, vocab, args.temperature)
    more = {"trust": trust, "mesh": mesh}
    policy = policies.load_policy(*where, activation_checkpointing=args.activation_checkpointing, **more)
    online = s == 1 and args.sync_ref  # then the reference is the policy of the step itself, and never runs
    reference = None if online or not args.beta else policies.load_policy(*where, trainable=False, **more)

    # 4 sampler
    engine = (tokenizer, vocab, stop_ids, device, dtype, length, args.gpu_memory, args.sleep)
    sampler = samplers.load_sampler(args.sampler, args.model, *engine, trust)

    def sample(rows, n, *key):
        """(row, n completions) for each row; key, rank and --seed make the seed: no two calls draw alike."""
        seed = random.Random(f"{args.seed} {key} {rank}").getrandbits(63)
        groups = sampler.generate([row.ids for row in rows], n, args.max_new_tokens, args.temperature, seed)
        return list(zip(rows, groups, strict=True))

    def sample_chunk(rows, first):
        return sample(rows, args.samples_per_prompt, first)

    def self_test(groups):
        return samplers.self_test(sampler, policy.logps, groups)

    def validate(step):
        """Scores an answer to each held-out prompt, with the policy's weights of now. Returns the name of the
        score (accuracy, or reward where nothing is verifiable) and its mean.
        """
        reloaded = sampler.version != step
        if reloaded:
            sampler.reload(policy.full_weights(dtype), step)
        groups = sample(valid[rank::world], 1, "valid", step)
        if reloaded:
            self_test(groups)
        scorer.score(groups)
        metrics = runs.validation_metrics(policies.sum_over_ranks(runs.group_sums(step, groups)))
        run.record({"step": step, **metrics})
        name, score = runs.headline(metrics)
        run.say(f"step {step}: validation {name} {score:.3f} on {metrics['eval/prompts']} prompts")
        for row, [c] in groups[:3]:
            run.say(f"    reward {c.reward}   {row.prompt!r} -> {c.text!r}"[:160])
        return name, score

    # 5 optimizer, and what an earlier run has got to
    adam = {"betas": (0.9, 0.95), "eps": args.adam_eps, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, **adam)
    now, follower = checkpoints.Progress(), reference if args.sync_ref else None
    if checkpoint:
        now = checkpoints.load(checkpoint, policy, optimizer, follower)
    kind = windows.Rollouts if args.rollouts else windows.Window
    window = kind(run.directory, args, prompts, fingerprint)

    # 6 the loop
    run.begin(world)
    window.go_on(now.step, checkpoint and checkpoint.state["window"], run.say)
    run.say(f"sampler: {sampler.capacity}")
    run.say(f"{batch_size} prompts x {args.samples_per_prompt} samples a step over {world} rank(s)")
    run.say(
        "the loss prints near 0 or goes with length, as advantages add up to 0: watch reward, kl, entropy"
    )
    run.say(f"{prompts.epoch_size} prompts, {dropped} more dropped for length; writing {run.directory}")
    if args.eval_every and not checkpoint:
        now.first = now.last = validate(0)
    interrupt, stop = runs.Interrupt(), None
    state = (run, now, fingerprint, window, policy, optimizer, follower)  # what a checkpoint is made of
    bar = tqdm(range(now.step, args.steps), initial=now.step, total=args.steps, desc="GRPO", disable=rank > 0)
    for step in bar:
        lr = args.lr * min(1, (step + 1) / (args.warmup_steps + 1))
        optimizer.param_groups[0]["lr"] = lr
        metrics = {"step": step, "learning_rate": lr}
        clock = [time.perf_counter()]  # and the time at the end of each part

        # ---- sync: the sampler takes over the policy's weights, the reference too where it follows
        if step == window.end:  # not every s steps: a run may have been given more --steps
            if sampler.version != step:
                sampler.reload(policy.full_weights(dtype), step)
            if follower:
                follower.follow(policy)
            window.begin(step)
        reference_step = window.start if args.sync_ref else 0  # the step that the reference is from
        clock.append(time.perf_counter())

        # ---- sample: everything that these weights will ever write, until the next sync
        sampled, found = window.fill(step, sample_chunk, self_test, interrupt)
        if window.missing(step):
            stop = runs.BY_SIGNAL  # what is sampled so far stays
            break
        sampler.sleep()  # its weights are dropped: nobody needs them before the next reload
        groups = window[step]
        metrics |= found
        clock.append(time.perf_counter())

        # ---- score
        if not window.scored:
            scorer.score(groups)
        segments = []  # prompt ids, and (completion, advantage) of the answers that share them
        for row, completions in groups:
            advs = advantages([c.reward for c in completions], args.std_norm)
            known = [(c, a) for c, a in zip(completions, advs, strict=True) if a is not None]
            parts = policy.split(len(row.ids), [len(c.ids) for c, _ in known], args.micro_batch_tokens)
            segments += [(row.ids, [known[i] for i in part]) for part in parts]
        clock.append(time.perf_counter())

        # ---- update
        sums = runs.group_sums(step, groups)
        sums["sampled"] = sampled
        # the denominators count all answers of the step, those of equal rewards too (the original code's)
        total = policies.sum_over_ranks(sums)
        count = (total["completions"], max(1, total["length"]))
        stale = not window.on_policy(step)
        widths = [policies.segment_width(prompt, [c.ids for c, _ in answers]) for prompt, answers in segments]
        for micro_batch in policies.micro_batches(widths, [1] * len(widths), args.micro_batch_tokens):
            part = [segments[i] for i in micro_batch]
            answers = [answer for _, answers in part for answer in answers]
            n, ids = len(answers), [(prompt, [c.ids for c, _ in answers]) for prompt, answers in part]
            inputs = policy.collate(ids)
            logps_BT, entropy_BT, mask_BT = policy(*inputs)
            with torch.no_grad():  # the reference is the policy itself until the first update after it moved
                ref_BT = logps_BT if not reference or step == reference_step else reference(*inputs)[0]
            sampler_BT, adv_B = logps_BT.detach().clone(), torch.zeros(len(logps_BT), device=device)
            if n:
                sampler_BT[mask_BT] = torch.tensor([x for c, _ in answers for x in c.logps], device=device)
                adv_B = torch.tensor([a for _, a in answers], device=device)
            clip = (args.clip_low, args.clip_high, args.is_cap)
            loss_BT, clipped_BT = policy_loss(logps_BT, sampler_BT, adv_B, stale, *clip)
            kl_BT = kl_to_reference(logps_BT, ref_BT.detach())
            weight_B = token_weight(args.loss_norm, mask_BT.sum(-1), *count)
            loss_B = ((loss_BT + args.beta * kl_BT) * mask_BT).sum(-1) * weight_B
            (loss_B[:n].sum() * world).backward()  # x world, because FSDP averages gradients over ranks
            sums.update(
                loss=loss_B[:n].sum().item(), kl=(kl_BT * mask_BT)[:n].sum().item(),
                clipped_tokens=(clipped_BT & mask_BT)[:n].sum().item(),
                entropy=entropy_BT[:n].sum().item(), tokens=mask_BT[:n].sum().item(),
                trained=sum(len(prompt) + len(c) for prompt, answers in ids for c in answers),
            )  # fmt: skip
        grad_norm = policies.clip_gradients(policy, args.grad_clip)
        sums["asked"] = interrupt.asked
        sums = policies.sum_over_ranks(sums)
        finite = math.isfinite(grad_norm) and math.isfinite(sums["loss"])
        if finite:
            optimizer.step()
        now.skipped += not finite
        now.skipped_in_a_row = 0 if finite else now.skipped_in_a_row + 1
        optimizer.zero_grad()
        now.step = step + 1
        clock.append(time.perf_counter())

        # ---- log, evaluate, save
        tokens = max(1, sums["tokens"])
        metrics |= runs.group_metrics(sums) | runs.timings(clock, sums, metrics) | {
            "loss": sums["loss"],
            "kl": sums["kl"] / tokens,
            "clip_ratio": sums["clipped_tokens"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "grad_norm": grad_norm,
            "skipped": now.skipped,
        }  # fmt: skip
        run.record(metrics)
        run.record_rollouts(step, groups)
        window.report(step, metrics["reward"], run.say)
        if args.eval_every and (now.step % args.eval_every == 0 or now.step == args.steps):
            now.last = validate(now.step)
        shown = {"reward": metrics["reward"], now.last[0]: now.last[1], "age": metrics["sync/age"]}
        bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        stop = runs.reason_to_stop(args, sums, now.skipped_in_a_row, [row for row, _ in groups])
        if stop:
            break
        if checkpoints.due(args, now.step, window.end):
            checkpoints.save(*state)

    # 7 export and close
    if stop and now.step > now.saved:
        checkpoints.save(*state)
    if not stop:
        policy.export(run.directory / "model", tokenizer)
        run.end(now.first, now.last)
    scorer.close()
    sampler.close()
    policies.stop()
    run.leave(stop)


if __name__ == "__main__":
    runs.launch(main)
