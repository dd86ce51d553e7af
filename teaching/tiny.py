"""Semi-online DPO and GRPO (arXiv 2506.21495) without the machinery: the toy, on one CPU, in plain PyTorch.

    python teaching/tiny.py --algorithm dpo --sync-steps 10 --steps 100

The policy is trained. The sampler, a second copy of the model, writes the completions that it is trained on.
Every `--sync-steps` steps the sampler takes over the policy's weights: 1 is online, inf is offline. Given the
same completions of the toy, train_dpo.py and train_grpo.py compute the same losses and gradients.

Shapes: G prompts, N completions of each, B in all; T tokens of one, L with its prompt; P pairs; V vocabulary.
"""

import argparse
import copy
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOY = Path(__file__).parent.parent / "toy"
G, N, MAX_NEW_TOKENS = 32, 8, 8


@torch.no_grad()
def sample(model, tokenizer, rows):
    """A completion for each row at temperature 1: ids_BL, mask_BL (0 at padding), start of completions."""
    texts = [f"<|user|>{row['prompt']}<|assistant|>" for row in rows]
    ids_BL, mask_BL = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").values()
    start, going_B1 = ids_BL.shape[1], torch.ones_like(ids_BL[:, :1])
    unread_BL, cache = ids_BL, None
    while going_B1.any() and ids_BL.shape[1] < start + MAX_NEW_TOKENS:
        out = model(unread_BL, attention_mask=mask_BL, past_key_values=cache, logits_to_keep=1)
        unread_BL, cache = out.logits[:, -1].softmax(-1).multinomial(1), out.past_key_values
        ids_BL, mask_BL = torch.cat([ids_BL, unread_BL], -1), torch.cat([mask_BL, going_B1], -1)
        going_B1 = going_B1 * (unread_BL != tokenizer.eos_token_id)
    return ids_BL, mask_BL, start


def score(tokenizer, ids_BL, mask_BL, start, rows):
    """reward_B: 1 where the completion is the row's answer, spaces around it aside, else 0."""
    texts = tokenizer.batch_decode((ids_BL * mask_BL)[:, start:], skip_special_tokens=True)  # id 0 is padding
    right = [text.strip() == row["answer"].strip() for text, row in zip(texts, rows, strict=True)]
    return torch.tensor(right).float()


def token_logps(model, ids_BL, mask_BL, start):
    """logps_BT: the log-prob of each token of the completions, 0 at padding."""
    logps_BTV = model(ids_BL, attention_mask=mask_BL).logits[:, start - 1 : -1].log_softmax(-1)
    return logps_BTV.gather(-1, ids_BL[:, start:, None]).squeeze(-1) * mask_BL[:, start:]


def dpo_loss(logps_BT, ref_BT, reward_B, seed, beta=3.0):
    """Paper, eq. 3: a right (chosen) and a wrong completion, at random, of each prompt that has both."""
    chosen_P, rejected_P = [], []
    for number, group in enumerate(torch.arange(G * N).split(N)):
        rng = random.Random(f"{seed} {number}")
        right, wrong = (group[reward_B[group] == reward].tolist() for reward in (1, 0))
        if right and wrong:
            chosen_P.append(rng.choice(right))
            rejected_P.append(rng.choice(wrong))
    log_ratio_B = (logps_BT - ref_BT).sum(-1)
    margin_P = log_ratio_B[chosen_P] - log_ratio_B[rejected_P]
    return -torch.nn.functional.logsigmoid(beta * margin_P).sum() / G


def grpo_loss(logps_BT, ref_BT, sampler_BT, mask_BT, reward_B, beta=0.001, clip=0.2, cap=2.0):
    """Paper, eq. 1, with PPO's clip and a cap for A < 0. At a sync the ratio is 1: plain policy gradient."""
    reward_GN = reward_B.view(G, N)
    adv_GN = (reward_GN - reward_GN.mean(-1, keepdim=True)) / (reward_GN.std(-1, keepdim=True) + 1e-6)
    adv_B1 = adv_GN.view(-1, 1)
    ratio_BT = (logps_BT - sampler_BT).exp()
    gain_BT = torch.min(ratio_BT.clamp(max=cap) * adv_B1, ratio_BT.clamp(1 - clip, 1 + clip) * adv_B1)
    kl_BT = (ref_BT - logps_BT).exp() - (ref_BT - logps_BT) - 1  # Schulman's k3
    return ((beta * kl_BT - gain_BT) * mask_BT * (adv_B1 != 0)).sum() / (G * N)  # where A is 0, not even KL


def train(algorithm, sync_steps, steps, seed):
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    policy = AutoModelForCausalLM.from_pretrained(TOY / "model")
    sampler = copy.deepcopy(policy).requires_grad_(False)
    reference = sampler if algorithm == "dpo" else copy.deepcopy(sampler)  # DPO's follows at each sync
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1)
    train_rows = [json.loads(line) for line in (TOY / "train.jsonl").open()]
    valid_rows = [json.loads(line) for line in (TOY / "valid.jsonl").open()]
    accuracy = score(tokenizer, *sample(policy, tokenizer, valid_rows), valid_rows).mean()
    print(f"validation accuracy {accuracy:.3f} before")
    for step in range(steps):
        # ---- sync: the sampler takes over the policy's weights
        if step % sync_steps == 0:
            sampler.load_state_dict(policy.state_dict())

        # ---- sample: step by step, since the sampler stays as it is until the next sync
        rows = [row for row in random.Random(f"{seed} {step}").sample(train_rows, G) for _ in range(N)]
        ids_BL, mask_BL, start = sample(sampler, tokenizer, rows)

        # ---- score
        reward_B = score(tokenizer, ids_BL, mask_BL, start, rows)

        # ---- update
        logps_BT, ref_BT = (token_logps(model, ids_BL, mask_BL, start) for model in (policy, reference))
        if algorithm == "dpo":
            loss = dpo_loss(logps_BT, ref_BT, reward_B, f"{seed} pair {step}")
        else:
            sampler_BT = token_logps(sampler, ids_BL, mask_BL, start)
            loss = grpo_loss(logps_BT, ref_BT, sampler_BT, mask_BL[:, start:], reward_B)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log
        if step % 10 == 0:
            print(f"step {step}: reward {reward_B.mean():.3f}, loss {loss:.4f}, grad norm {grad_norm:.2f}")
    accuracy = score(tokenizer, *sample(policy, tokenizer, valid_rows), valid_rows).mean()
    print(f"validation accuracy {accuracy:.3f} after {steps} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("--algorithm", choices=["dpo", "grpo"], default="dpo")
    parser.add_argument("--sync-steps", type=float, default=1, help="1 is online, inf is offline")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, of sampling and of pairs")
    args = parser.parse_args()
    if args.steps < 1 or not args.sync_steps >= 1 or args.sync_steps % 1 > 0:
        parser.error(f"--steps {args.steps} --sync-steps {args.sync_steps:g}: whole numbers above 0, or inf")
    train(**vars(args))
