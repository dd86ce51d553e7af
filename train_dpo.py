"""Semi-online DPO (arXiv 2506.21495): sample answers, pair a right one with a wrong one, learn.

    loss = -log sigmoid( beta * [ log pi/ref (chosen) - log pi/ref (rejected) ] )      (paper, eq. 3)

`--sync-steps s` is the dial: optimizer steps between two reloads of the sampler's weights. 1 is
online, inf is offline (the sampler keeps its first weights), anything between is semi-online. It is
an interval, not a bound on the age of samples.

    torchrun train_dpo.py --sync-steps 100         # the toy, on a laptop: all defaults are the toy's
    torchrun --nproc-per-node 8 train_dpo.py --sync-steps 100 --data FILE \\
        --model meta-llama/Llama-3.1-8B-Instruct   # and the flags whose --help names the paper's value

Departures from the paper:
- Every window has s updates; the original code's first one has s - 1.
- A window's prompts are generated in one call (--generate-ahead). Its weights do not change, so
  neither does the distribution.
- An answer whose reward could not be had leaves its group; the original code scores it 0.
- Chosen and rejected are drawn at random, as the text says; the original code takes the first ones.
- The learning rate is constant after the warm-up; the paper does not state its schedule.

Shapes: P pairs of a micro-batch, B = 2P sequences (all chosen, then all rejected), T target positions.
"""

import argparse
import math
import os
import random
import time
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import policy as policies
import rewards
import run as runs
import sampler as samplers

TOY = Path(os.path.relpath(Path(__file__).parent)) / "toy"


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
    # fmt: off
    # what; (T4) is the paper's Table 4
    add("--model", default=str(TOY / "model"), help="directory or hub name; paper: Llama-3.1-8B-Instruct")
    add("--data", nargs="+", default=[str(TOY / "train.jsonl")], help=".jsonl, .parquet or hub names")
    add("--data-weights", nargs="+", type=size, help="shares of the sources in a mix (default: sizes)")
    add("--eval-data", nargs="+", default=[str(TOY / "valid.jsonl")], help="rows for validation accuracy")
    add("--out", type=Path, help="run directory (default: runs/dpo-s<sync-steps>-<time>)")
    # how long, and the dial
    add("--steps", type=count, default=300, help="optimizer steps; paper: 1500 chat, maths not stated")
    add("--sync-steps", type=runs.number(int, inf=True), default=1,
        help="optimizer steps between reloads of the sampler: 1 online, inf offline")
    add("--sync-ref", action=switch, default=True,
        help="the reference moves with the sampler; paper (T4): yes for maths DPO, no elsewhere")
    # sampling
    add("--prompts-per-step", type=count, default=32, help="over all ranks; paper (T4): 64 maths, 32 chat")
    add("--samples-per-prompt", type=count, default=8, help="paper: not stated for DPO, 8 for GRPO")
    add("--max-prompt-tokens", type=count, default=24, help="longer ones are dropped; 8B runs: 1024")
    add("--max-new-tokens", type=count, default=8, help="of an answer; paper (T4): 2048 maths, 1024 chat")
    add("--temperature", type=size, default=1.0, help="of sampling and of all log-probs; paper: 1.0")
    add("--generate-ahead", type=count, default=10, help="most steps to generate in one call (memory)")
    add("--rollouts", type=Path, help="train on this file of rollouts (needs --sync-steps inf)")
    add("--save-rollouts", type=Path, help="write every scored rollout to this new .jsonl file")
    add("--sampler", choices=["vllm", "hf"], default="vllm", help="hf: transformers, slower, no vLLM")
    add("--gpu-memory", type=size, default=0.3, help="vLLM's share of a GPU (weights and KV cache)")
    add("--sleep", action=switch, default=True, help="vLLM frees the GPU while the policy trains")
    add("--reward-timeout", type=size, default=5.0, help="seconds until an answer goes unscored")
    # update
    add("--micro-batch-tokens", type=count, default=4096,
        help="padded tokens of one forward, changes memory only; 8B runs: 16384")
    add("--activation-checkpointing", action="store_true", help="less memory, slower; 8B runs: on")
    add("--lr", type=size, default=2e-4, help="AdamW's learning rate; paper (T4): 1e-6")
    add("--adam-eps", type=size, default=1e-8, help="paper (T4): 1e-4 maths DPO (stabler), 1e-8 elsewhere")
    add("--weight-decay", type=size0, default=0.1, help="paper: not stated; the original code's default")
    add("--grad-clip", type=size, default=1.0, help="largest gradient norm; paper (T4): 0.1")
    add("--warmup-steps", type=count0, default=0, help="steps of linear warm-up; paper: not stated")
    add("--beta", type=size, default=3.0, help="DPO's beta; paper (T4): 0.1 maths, 0.01 chat")
    add("--seed", type=int, default=0, help="of the order of prompts, of sampling and of pairs")
    # log
    add("--eval-every", type=count0, default=50, help="steps between validations, 0: none")
    add("--log-samples", type=int, default=8, help="answers a step for samples.jsonl, -1: all")
    add("--wandb", metavar="PROJECT", help="also log to this project of Weights & Biases")
    add("--tensorboard", action="store_true", help="also write TensorBoard's files into the run directory")
    # fmt: on
    args = parser.parse_args(argv)

    longest = args.max_prompt_tokens + args.max_new_tokens
    if args.micro_batch_tokens < 2 * longest:
        parser.error(f"--micro-batch-tokens {args.micro_batch_tokens}: a pair can have {2 * longest}, twice "
                     "--max-prompt-tokens + --max-new-tokens; raise it to that or more")  # fmt: skip
    if args.samples_per_prompt < 2:
        parser.error(f"--samples-per-prompt {args.samples_per_prompt}: a pair needs 2")
    if args.data_weights and len(args.data_weights) != len(args.data):
        parser.error(f"--data-weights: {len(args.data_weights)} weights for {len(args.data)} sources")
    if args.gpu_memory >= 1:
        parser.error(f"--gpu-memory {args.gpu_memory:g}: a share of the GPU, between 0 and 1")
    if args.rollouts and args.sync_steps != math.inf:
        parser.error(f"--rollouts {args.rollouts}: they cannot follow the policy; add --sync-steps inf")
    return args


# ---- maths


def pick_pair(completions: list, rng: random.Random):
    """(chosen, rejected): a right and a wrong answer at random, None without both (paper, section 3.2)."""
    right = [c for c in completions if c.reward == 1]
    wrong = [c for c in completions if c.reward == 0]
    return (rng.choice(right), rng.choice(wrong)) if right and wrong else None


def dpo_loss(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta: float):
    """Paper, eq. 3, on log-probs summed over the tokens of each answer (nats); one loss per pair."""
    log_ratio_chosen_P = chosen_P - ref_chosen_P
    log_ratio_rejected_P = rejected_P - ref_rejected_P
    return -F.logsigmoid(beta * (log_ratio_chosen_P - log_ratio_rejected_P))


# ---- main


def main(argv=None):
    args = get_args(argv)
    batch_size, s = args.prompts_per_step, args.sync_steps

    # 1 processes and run directory
    samplers.require(args.sampler)
    rank, world, device = policies.start()
    dtype = policies.compute_dtype(device)
    run = runs.Run(args, f"dpo-s{s}", writes=rank == 0)

    # 2 data: what is wrong with it comes out here, before anything long starts
    length = args.max_prompt_tokens + args.max_new_tokens
    tokenizer = policies.load_tokenizer(args.model, length)
    checks = (tokenizer, rewards.complaint, args.max_prompt_tokens, rank == 0)
    if args.rollouts:
        rollouts = data.load_rollouts(args.rollouts, samplers.Completion, len(tokenizer), length)
        prompts, dropped = data.Prompts([rollouts], None, args.seed), 0
    else:
        sources, dropped = data.load_prompts(args.data, *checks)
        prompts = data.Prompts(sources, args.data_weights, args.seed)
    valid = sum(data.load_prompts(args.eval_data, *checks)[0], [])
    kinds = {row.reward for row in (valid if args.rollouts else sum(sources, valid))}

    # 3 policy and reference
    where = (args.model, device, len(tokenizer), args.temperature)
    policy = policies.load_policy(*where, activation_checkpointing=args.activation_checkpointing)
    online = s == 1 and args.sync_ref  # then the reference is the policy of the step itself, and never runs
    reference = None if online else policies.load_policy(*where, trainable=False)

    # 4 sampler and scorer
    engine = (tokenizer, device, dtype, length, args.gpu_memory, args.sleep)
    sampler = samplers.load_sampler(args.sampler, args.model, *engine)
    scorer = rewards.Scorer(kinds, args.reward_timeout)

    def sample(rows, n, *key):
        """(row, n completions) for each row; key, rank and --seed make the seed: no two calls draw alike."""
        seed = random.Random(f"{args.seed} {key} {rank}").getrandbits(63)
        groups = sampler.generate([row.ids for row in rows], n, args.max_new_tokens, args.temperature, seed)
        return list(zip(rows, groups, strict=True))

    def validate(step):
        """Accuracy of one sampled answer per held-out prompt, with the policy's weights of now."""
        if sampler.version != step:
            sampler.reload(policy.full_weights(dtype), step)
            samplers.self_test(sampler, policy.logps, *test)
        groups = sample(valid[rank::world], 1, "valid", step)
        scorer.score(groups)
        sums = policies.sum_over_ranks(runs.group_sums(step, groups))
        accuracy = sums["reward"] / max(1, sums["scored"])
        run.record({"step": step, "eval/accuracy": accuracy, "eval/prompts": sums["scored"]})
        run.say(f"step {step}: validation accuracy {accuracy:.3f} on {sums['scored']} prompts, for example")
        for row, [c] in groups[:3]:
            run.say(f"    reward {c.reward}   {row.prompt!r} -> {c.text!r}"[:160])
        return accuracy

    # 5 optimizer
    adam = {"betas": (0.9, 0.95), "eps": args.adam_eps, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, **adam)
    warmup = lambda step: min(1, (step + 1) / (args.warmup_steps + 1))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)

    # 6 the loop
    run.begin(world)
    run.say(f"{batch_size} prompts x {args.samples_per_prompt} samples a step over {world} rank(s)")
    run.say(f"{prompts.epoch_size} prompts, {dropped} more dropped for length; writing {run.directory}")
    test = ([row.ids for row in valid[:8]], args.max_new_tokens, args.temperature)
    window, window_step = None, 0  # the weights that the sampler keeps, and the step they are from
    tested = []  # what the sampler answered with them to the self-test
    reference_step = 0  # the step that the reference is from
    queue = deque()  # generated ahead: for each step this rank's groups, a group being (row, completions)
    first = accuracy = validate(0) if args.eval_every else math.nan
    if args.rollouts:
        sampler.sleep(2)
    bar = tqdm(range(args.steps), desc="DPO", disable=rank > 0)
    for step in bar:
        metrics = {"step": step, "learning_rate": optimizer.param_groups[0]["lr"]}
        clock = [time.perf_counter()]  # and the time at the end of each part

        # ---- sync: the sampler takes over the policy's weights, the reference too where it follows
        if step % s == 0 and not args.rollouts:
            if sampler.version != step:
                sampler.reload(policy.full_weights(dtype), step)
            window_step = step
            if s > 1:  # the window goes on with these weights even after a validation has loaded others
                window = policy.snapshot(dtype)
            if args.sync_ref:
                reference_step = step
                if reference:
                    reference.restore(window)
            gaps, tested = samplers.self_test(sampler, policy.logps, *test)
            metrics |= gaps
        clock.append(time.perf_counter())

        # ---- sample: in one call for the whole window, or for as much of it as --generate-ahead allows
        fresh = []
        if not queue:
            end = min(window_step + s, args.steps, step + args.generate_ahead)
            steps = [prompts.take(i * batch_size, batch_size)[rank::world] for i in range(step, end)]
            if args.rollouts:
                queue.extend(steps)
            else:
                if sampler.version != window_step:  # a validation has put newer weights into it
                    sampler.reload(policy.full_weights(dtype, window), window_step)
                    samplers.same_test(sampler, tested, *test)
                fresh = sample(sum(steps, []), args.samples_per_prompt, step)
                groups = iter(fresh)
                queue.extend([next(groups) for _ in rows] for rows in steps)
                sampler.sleep(2 if end in (window_step + s, args.steps) else 1)
        groups = queue.popleft()
        clock.append(time.perf_counter())

        # ---- score
        if not args.rollouts:
            scorer.score(groups)
        pairs = []  # (prompt ids, chosen ids, rejected ids)
        for i, (row, completions) in enumerate(groups):
            pair = pick_pair(completions, random.Random(f"{args.seed} pair {step} {rank + i * world}"))
            pairs += [(row.ids, pair[0].ids, pair[1].ids)] if pair else []
        clock.append(time.perf_counter())

        # ---- update
        sums = runs.group_sums(step, groups)
        sums["sampled"] = sum(len(c.ids) for _, completions in fresh for c in completions)
        widths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs]
        for micro_batch in policies.micro_batches(widths, 2, args.micro_batch_tokens):
            n, part = len(micro_batch), [pairs[i] for i in micro_batch]
            inputs = policies.collate([(p, c) for p, c, _ in part] + [(p, r) for p, _, r in part], device)
            logps_BT, entropy_BT, mask_BT = policy(*inputs)
            with torch.no_grad():  # the reference is the policy itself until the first update after it moved
                ref_BT = logps_BT if step == reference_step else reference(*inputs)[0]
            logps_B, ref_B = logps_BT.sum(-1), ref_BT.detach().sum(-1)
            loss_P = dpo_loss(logps_B[:n], logps_B[n : 2 * n], ref_B[:n], ref_B[n : 2 * n], args.beta)
            # a mean over all prompts of the step, pairless ones too (the original code's); x world, because
            # FSDP averages gradients over ranks
            (loss_P.sum() / batch_size * world).backward()
            implicit_B = args.beta * (logps_B - ref_B).detach()
            chosen_P, rejected_P = implicit_B[:n], implicit_B[n : 2 * n]
            sums.update(
                loss=loss_P.sum().item(), pairs=n, ordered=(chosen_P > rejected_P).sum().item(),
                chosen=chosen_P.sum().item(), rejected=rejected_P.sum().item(),
                entropy=entropy_BT[: 2 * n].sum().item(), tokens=mask_BT[: 2 * n].sum().item(),
                trained=inputs[2][: 2 * n].sum().item(),
            )  # fmt: skip
        grad_norm = policies.clip_gradients(policy, args.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.append(time.perf_counter())

        # ---- log, evaluate
        sums = policies.sum_over_ranks(sums)
        n, tokens = max(1, sums["pairs"]), max(1, sums["tokens"])
        metrics |= runs.group_metrics(sums) | runs.timings(clock, sums) | {
            "loss": sums["loss"] / batch_size,
            "pairs": sums["pairs"],
            "rewards/chosen": sums["chosen"] / n,
            "rewards/rejected": sums["rejected"] / n,
            "rewards/margins": (sums["chosen"] - sums["rejected"]) / n,
            "rewards/accuracies": sums["ordered"] / n,
            "entropy": sums["entropy"] / tokens,
            "grad_norm": grad_norm,
        }  # fmt: skip
        run.record(metrics)
        run.record_rollouts(step, policies.gather(groups))
        if args.eval_every and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            accuracy = validate(step + 1)
            if (step + 1) % s:  # the next step does not sample with these weights
                sampler.sleep(2)
        shown = {"reward": metrics["reward"], "accuracy": accuracy, "age": metrics["sync/age"]}
        bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})

    # 7 export and close
    policy.export(run.directory / "model", tokenizer)
    run.end({"accuracy before": first, "accuracy after": accuracy})
    run.say(
        f"validation accuracy {first:.3f} before, {accuracy:.3f} after {args.steps} steps: {run.directory}"
    )
    scorer.close()
    sampler.close()
    policies.stop()


if __name__ == "__main__":
    runs.launch(main)
