"""Semi-online DPO (arXiv 2506.21495): sample answers, pair a right one with a wrong one, learn.

    loss = -log sigmoid( beta * [ log pi/ref (chosen) - log pi/ref (rejected) ] )      (paper, eq. 3)

`--sync-steps s` is the dial: optimizer steps between two reloads of the sampler's weights. 1 is
online, inf is offline (the sampler keeps its first weights), anything between is semi-online. It is
an interval, not a bound on the age of samples.

    torchrun train_dpo.py --sync-steps 100         # no --model: the toy, on a laptop
    torchrun --nproc-per-node 8 train_dpo.py --sync-steps 100 --data FILE \\
        --model meta-llama/Llama-3.1-8B-Instruct   # the defaults are then the paper's for maths

Departures from the paper:
- Every window has s updates; the original code's first one has s - 1.
- A window's completions are all sampled at its sync (window.py). Its weights do not change, so neither does
  the distribution.
- An answer whose reward could not be had leaves its group; the original code scores it 0.
- Chosen and rejected are drawn at random, as the text says; the original code takes the first ones.
- The learning rate is constant after the warm-up; the paper does not state its schedule.

Shapes: P pairs of a micro-batch, B answers of at most T tokens (each pair's chosen one, then its rejected).
"""

import argparse
import math
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
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
        "activation_checkpointing": False, "lr": 2e-4, "adam_eps": 1e-8, "grad_clip": 1.0, "beta": 3.0,
    }  # fmt: skip
    # fmt: off
    # what; (T4) is the paper's Table 4
    add("--model", help="directory or hub name; paper: Llama-3.1-8B-Instruct")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--data", nargs="+", help=".jsonl, .parquet or hub names")
    add("--data-weights", nargs="+", type=size, help="shares of the sources in a mix (default: sizes)")
    add("--eval-data", nargs="+", default=[], help="rows for validation; none: no validation")
    add("--date", type=runs.day, help="what a chat template with a clock writes (default: today)")
    add("--out", type=Path, help="run directory (default: runs/dpo-s<sync-steps>-<time>)")
    # how long, and the dial
    add("--steps", type=count, default=300, help="optimizer steps; paper: 1500 chat, maths not stated")
    add("--sync-steps", type=runs.number(int, inf=True), default=1,
        help="optimizer steps between reloads of the sampler: 1 online, inf offline")
    add("--sync-ref", action=switch, default=True,
        help="the reference moves with the sampler; paper (T4): yes for maths DPO, no elsewhere")
    # sampling
    add("--prompts-per-step", type=count, default=64, help="over all ranks; paper (T4): 64 maths, 32 chat")
    add("--samples-per-prompt", type=count, default=8, help="paper: not stated for DPO, 8 for GRPO")
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
    add("--lr", type=size, default=1e-6, help="AdamW's learning rate; paper (T4): 1e-6")
    add("--adam-eps", type=size, default=1e-4, help="paper (T4): 1e-4 maths DPO (stabler), 1e-8 elsewhere")
    add("--weight-decay", type=size0, default=0.1, help="paper: not stated; the original code's default")
    add("--grad-clip", type=size, default=0.1, help="largest gradient norm; paper (T4): 0.1")
    add("--warmup-steps", type=count0, default=0, help="steps of linear warm-up; paper: not stated")
    add("--beta", type=size, default=0.1, help="DPO's beta; paper (T4): 0.1 maths, 0.01 chat")
    # ablations of the paper, all off by default
    add("--all-pairs", action="store_true", help="GroupDPO (eq. 4): the mean over all pairs of a prompt")
    add("--nll-weight", type=size0, default=0.0, help="of chosen answers' NLL, a mean over tokens; paper: 1")
    add("--length-normalize", action="store_true", help="log-probs are means over tokens, not sums")
    add("--entropy-weight", type=size0, default=0.0, help="of chosen answers' entropy; paper: up to 5e-4")
    add("--grpo-weight", type=size0, default=0.0, help="of a GRPO loss beside GroupDPO; paper: 0.01, 0.001")
    add("--seed", type=int, default=0, help="of the order of prompts, of sampling and of pairs")
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
    unit, rows = ("group", args.samples_per_prompt) if args.all_pairs else ("pair", 2)
    if args.micro_batch_tokens < rows * longest:
        parser.error(f"--micro-batch-tokens {args.micro_batch_tokens}: a {unit} can have {rows * longest}, "
                     f"{rows} x (--max-prompt-tokens + --max-new-tokens); raise it to that")  # fmt: skip
    if args.grpo_weight and not args.all_pairs:
        parser.error(f"--grpo-weight {args.grpo_weight:g}: goes with --all-pairs (paper, B.2)")
    if args.samples_per_prompt < 2:
        parser.error(f"--samples-per-prompt {args.samples_per_prompt}: a pair needs 2")
    args.eval_every = args.eval_every if args.eval_data else 0
    if args.data_weights and len(args.data_weights) != len(args.data or []):
        parser.error(f"--data-weights: {len(args.data_weights)} weights for {len(args.data or [])} sources")
    if args.gpu_memory >= 1:
        parser.error(f"--gpu-memory {args.gpu_memory:g}: a share of the GPU, between 0 and 1")
    if args.rollouts and args.sync_steps != math.inf:
        parser.error(f"--rollouts {args.rollouts[0]}: they cannot follow the policy; add --sync-steps inf")
    return args


# ---- maths


def pick_pairs(rewards: list, rng: random.Random, every: bool) -> list[tuple[int, int]]:
    """Which answers are (chosen, rejected): one of the best and one of the worst at random, which for a
    verifier means a right and a wrong one; none where all are equal (paper, section 3.2). None: no verdict.

    every: all pairs of a better and a worse answer (GroupDPO, eq. 4).
    """
    scored = [i for i, reward in enumerate(rewards) if reward is not None]
    if every:
        return [(i, j) for i in scored for j in scored if rewards[i] > rewards[j]]
    if len({rewards[i] for i in scored}) < 2:
        return []
    ends = (pick(rewards[i] for i in scored) for pick in (max, min))
    return [tuple(rng.choice([i for i in scored if rewards[i] == end]) for end in ends)]


def lay_out(units: list, device) -> tuple:
    """Where in a forward over all answers of `units`, one unit after the other, the two of each pair are.

    Returns each pair's chosen and rejected answer, its weight (1 / the pairs of its prompt), each answer's
    advantage and the share of its group that it is.
    """
    pairs, advantages, shares, first = [], [], [], 0
    for _, answers, places in units:
        pairs += [(first + chosen, first + rejected, len(places)) for chosen, rejected in places]
        rewards = [c.reward for c in answers]
        mean = statistics.fmean(rewards)
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
        advantages += [(reward - mean) / (spread + 1e-6) for reward in rewards]
        shares += [1 / len(answers)] * len(answers)
        first += len(answers)
    chosen_P, rejected_P, size_P = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 3).T
    return chosen_P, rejected_P, 1 / size_P, *(torch.tensor(x, device=device) for x in (advantages, shares))


def dpo_loss(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta: float):
    """Paper, eq. 3, on log-probs summed over the tokens of each answer (nats); one loss per pair."""
    log_ratio_chosen_P = chosen_P - ref_chosen_P
    log_ratio_rejected_P = rejected_P - ref_rejected_P
    return -F.logsigmoid(beta * (log_ratio_chosen_P - log_ratio_rejected_P))


def pair_losses(logps_BT, ref_BT, entropy_BT, mask_BT, chosen_P, rejected_P, chosen_tokens: float, args):
    """The loss of each pair with the terms of the ablations that are on, and each answer's implicit reward.

    chosen_tokens: the mean length of the step's chosen answers, which makes the NLL a mean over tokens.
    """
    length_B = mask_BT.sum(-1).clamp(min=1)
    logps_B, ref_B = logps_BT.sum(-1), ref_BT.sum(-1)
    if args.length_normalize:
        logps_B, ref_B = logps_B / length_B, ref_B / length_B
    loss_P = dpo_loss(logps_B[chosen_P], logps_B[rejected_P], ref_B[chosen_P], ref_B[rejected_P], args.beta)
    if args.nll_weight:
        loss_P = loss_P - args.nll_weight * logps_BT.sum(-1)[chosen_P] / chosen_tokens
    if args.entropy_weight:
        loss_P = loss_P - args.entropy_weight * (entropy_BT.sum(-1) / length_B)[chosen_P]
    return loss_P, args.beta * (logps_B - ref_B).detach()


def grpo_loss(logps_BT, ref_BT, mask_BT, adv_B, beta=0.001):
    """For --grpo-weight: the on-policy GRPO loss of each answer, summed over tokens, with its KL (k3)."""
    gain_BT = (logps_BT - logps_BT.detach()).exp() * adv_B[:, None]
    log_ratio_BT = (ref_BT - logps_BT).clamp(max=20)
    return ((beta * (log_ratio_BT.exp() - log_ratio_BT - 1) - gain_BT) * mask_BT).sum(-1)


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
    run = runs.Run(args, f"dpo-s{s}", rank == 0, checkpoint)

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
    reference = None if online else policies.load_policy(*where, trainable=False, **more)

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
    run.say(f"{prompts.epoch_size} prompts, {dropped} more dropped for length; writing {run.directory}")
    if args.eval_every and not checkpoint:
        now.first = now.last = validate(0)
    interrupt, stop = runs.Interrupt(), None
    state = (run, now, fingerprint, window, policy, optimizer, follower)  # what a checkpoint is made of
    bar = tqdm(range(now.step, args.steps), initial=now.step, total=args.steps, desc="DPO", disable=rank > 0)
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
        units = []  # for each prompt with a pair: its ids, the answers in pairs, the pairs as places in those
        for i, (row, completions) in enumerate(groups):
            rng = random.Random(f"{args.seed} pair {step} {rank + i * world}")
            pairs = pick_pairs([c.reward for c in completions], rng, args.all_pairs)
            used = list(dict.fromkeys(sum(pairs, ())))  # each answer once, however many pairs it is in
            places = [(used.index(chosen), used.index(rejected)) for chosen, rejected in pairs]
            units += [(row.ids, [completions[i] for i in used], places)] if pairs else []
        clock.append(time.perf_counter())

        # ---- update
        sums = runs.group_sums(step, groups)
        sums["sampled"] = sampled
        tokens = sum(len(answers[c].ids) / len(pairs) for _, answers, pairs in units for c, _ in pairs)
        total = policies.sum_over_ranks(Counter(pairs=len(units), tokens=tokens))
        chosen_tokens = total["tokens"] / max(1, total["pairs"])  # of an average pair, over all ranks
        segments = []  # of each unit: prompt ids, and the ids of the answers that share them
        for prompt, answers, _ in units:
            parts = policy.split(len(prompt), [len(c.ids) for c in answers], args.micro_batch_tokens)
            segments.append([(prompt, [answers[i].ids for i in part]) for part in parts])
        widths = [max(policies.segment_width(*segment) for segment in unit) for unit in segments]
        for micro_batch in policies.micro_batches(widths, [*map(len, segments)], args.micro_batch_tokens):
            chosen_P, rejected_P, weight_P, adv_B, share_B = lay_out([units[i] for i in micro_batch], device)
            n, part = len(adv_B), [segment for i in micro_batch for segment in segments[i]]
            inputs = policy.collate(part)
            logps_BT, entropy_BT, mask_BT = policy(*inputs)
            with torch.no_grad():  # the reference is the policy itself until the first update after it moved
                ref_BT = logps_BT if step == reference_step else reference(*inputs)[0]
            each = (logps_BT, ref_BT.detach(), entropy_BT, mask_BT)
            loss_P, implicit_B = pair_losses(*each, chosen_P, rejected_P, chosen_tokens, args)
            loss = (loss_P * weight_P).sum()
            if args.grpo_weight:
                grpo_B = grpo_loss(logps_BT[:n], ref_BT[:n].detach(), mask_BT[:n], adv_B)
                loss = loss + args.grpo_weight * (grpo_B * share_B).sum()
            # a mean over all prompts of the step, pairless ones too (the original code's); x world, because
            # FSDP averages gradients over ranks
            (loss / batch_size * world).backward()
            margin_P = implicit_B[chosen_P] - implicit_B[rejected_P]
            sums.update(
                loss=loss.item(), ordered=((margin_P > 0) * weight_P).sum().item(),
                chosen=(implicit_B[chosen_P] * weight_P).sum().item(),
                rejected=(implicit_B[rejected_P] * weight_P).sum().item(),
                entropy=entropy_BT[:n].sum().item(), tokens=mask_BT[:n].sum().item(),
                trained=sum(len(prompt) + len(ids) for prompt, answers in part for ids in answers),
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
        n, tokens = max(1, total["pairs"]), max(1, sums["tokens"])
        metrics |= runs.group_metrics(sums) | runs.timings(clock, sums, metrics) | {
            "loss": sums["loss"] / batch_size,
            "pairs": total["pairs"],
            "rewards/chosen": sums["chosen"] / n,
            "rewards/rejected": sums["rejected"] / n,
            "rewards/margins": (sums["chosen"] - sums["rejected"]) / n,
            "rewards/accuracies": sums["ordered"] / n,
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
