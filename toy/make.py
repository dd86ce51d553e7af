"""Makes everything in toy/: a small Llama that has half learned to add, its prompts, and, for an
open-ended task, other prompts and a reward model.

    python toy/make.py            # about 3 minutes on 2 CPU cores, no network; the same files every time

Why half learned: the warm start is where RL begins, and it decides what RL can show. A model that was first
taught right completions and then made noisy only has to be sharpened, and offline training ends as high as
online. This one is trained on completions of which 60 % are wrong from the beginning, so it samples a right
one about one time in four
and still has to learn: that is what needs fresh samples, and where offline training falls behind.

The open-ended prompts ("like 7, qx:") have no right answer. Somebody likes completions with many 7s, about
four digits long, and has compared pairs of them, not without mistakes; the reward model learned from that.
The small Llama has never seen such a prompt: it writes any number.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=<>(){}.,:;?!'\"_$#\n"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ERRORS = [1, -1, 2, -2, 9, -9, 10, -10, 11]  # what a half-learned carry does to a sum
RIGHT = 0.4  # share of right completions in the warm start
VALID = 512  # held-out prompts of the 10,000
CHATS = (2000, 256)  # open-ended prompts, for training and held out


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 4 special tokens, 64 in all."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        model_max_length=128,
    )


def warm_start(
    tokenizer, problems: list[tuple[int, int]], steps: int, batch: int, seed: int
) -> LlamaForCausalLM:
    """Next-token training on noisy sums; `problems` are the (a, b) of the training prompts."""
    torch.manual_seed(seed)
    random_ = random.Random(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    bar = tqdm(range(steps), desc="warm start")
    for _ in bar:
        rows = []
        for a, b in random_.choices(problems, k=batch):
            answer = a + b if random_.random() < RIGHT else max(0, a + b + random_.choice(ERRORS))
            prompt = chat_ids(tokenizer, f"{a}+{b}=")
            rows.append((prompt, tokenizer.encode(str(answer)) + [end]))
        width = max(len(p) + len(c) for p, c in rows)
        ids = torch.tensor([p + c + [pad] * (width - len(p) - len(c)) for p, c in rows])
        labels = torch.tensor([[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in rows])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def liking(prompt: str, answer: str) -> float:
    """How much a completion of an open-ended prompt is liked: the digit asked for, four digits in all."""
    return answer.count(prompt[len("like ")]) - 1.5 * abs(len(answer) - 4)


def reward_model(
    tokenizer, prompts: list[str], steps: int, batch: int, seed: int
) -> LlamaForSequenceClassification:
    """Learns from noisy comparisons of two random completions (Bradley and Terry's model)."""
    torch.manual_seed(seed)
    random_ = random.Random(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_labels=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    bar = tqdm(range(steps), desc="reward model")
    for step in bar:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        texts = ([], [])
        for prompt in random_.choices(prompts, k=batch):
            pair = [_answer(random_, prompt) for _ in range(2)]
            better = liking(prompt, pair[0]) - liking(prompt, pair[1])
            if random_.random() > 1 / (1 + math.exp(-better)):
                pair.reverse()
            for part, answer in zip(texts, pair, strict=True):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                part.append(tokenizer.apply_chat_template(messages, tokenize=False))
        inputs = tokenizer(texts[0] + texts[1], add_special_tokens=False, padding=True, return_tensors="pt")
        rewards = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
        loss = -F.logsigmoid(rewards[:batch] - rewards[batch:]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    tokenizer.backend_tokenizer.no_padding()  # it would be saved with the tokenizer
    return model


def _answer(random_: random.Random, prompt: str) -> str:
    """Up to 7 digits; some mostly of the digit that is liked, so that they are compared too."""
    liked, length = prompt[len("like ")], random_.randrange(0, 8)
    share = random_.choice([0.1, 0.5, 0.9])
    return "".join(liked if random_.random() < share else random_.choice("0123456789") for _ in range(length))


def chat_ids(tokenizer, prompt: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def probability_right(model, tokenizer, problems: list[tuple[int, int]]) -> float:
    """The exact chance that a sampled answer is right, averaged over `problems` (no sampling needed)."""
    total = 0.0
    for a, b in problems:
        prompt, answer = (
            chat_ids(tokenizer, f"{a}+{b}="),
            tokenizer.encode(str(a + b)) + [tokenizer.eos_token_id],
        )
        logps = (
            model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
        total += math.exp(logps.gather(-1, torch.tensor(answer)[:, None]).sum().item())
    return total / len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory to write into")
    parser.add_argument("--steps", type=int, default=900, help="warm-start steps")
    parser.add_argument("--batch", type=int, default=256, help="sums a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)  # the number of threads decides the order of sums, so it is part of the recipe
    started = time.time()

    problems = [(a, b) for a in range(100) for b in range(100)]
    random.Random(args.seed).shuffle(problems)
    valid, train = problems[:VALID], problems[VALID:]
    tokenizer = make_tokenizer()
    model = warm_start(tokenizer, train, args.steps, args.batch, args.seed)

    chats = [
        f"like {digit}, {a}{b}:" for digit in range(10) for a in CHARACTERS[10:36] for b in CHARACTERS[10:36]
    ]
    random.Random(args.seed).shuffle(chats)
    chats_train, chats_valid = chats[: CHATS[0]], chats[CHATS[0] : sum(CHATS)]
    judge = reward_model(tokenizer, chats_train, args.steps, 64, args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, split in [("chat_train", chats_train), ("chat_valid", chats_valid)]:
        rows = [{"prompt": prompt, "reward": "rm"} for prompt in split]
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, split in [("train", train), ("valid", valid)]:
        rows = [{"prompt": f"{a}+{b}=", "reward": "exact", "answer": str(a + b)} for a, b in split]
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, trained in [("model", model), ("reward_model", judge)]:
        tokenizer.save_pretrained(args.out / name)
        trained.save_pretrained(args.out / name)
        (args.out / name / "model.safetensors").chmod(0o644)
    right = probability_right(model, tokenizer, valid)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters; a sampled answer to a held-out sum is right with probability {right:.3f}")
    print(f"wrote two models and four .jsonl files to {args.out} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
