"""One step of training in slow motion, then its window up to the next sync: python teaching/walkthrough.py

It follows one prompt, the first one with a pair, through `train_dpo.py --sync-steps 10 --sampler hf` on the
toy. The scripts' own functions make all numbers but those that are worked out beside them by hand. It takes
ten seconds on one core and prints what stands in walkthrough.txt.

Shapes: B completions of at most T tokens, of a pair the chosen one first; N tokens of all completions.
"""

import math
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU would draw other completions
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

import processes
import train_dpo
import train_grpo
from data import load_rows
from loading import load_policy, load_reference
from metrics import Sums
from packing import Example, MicroBatch, micro_batches
from policy import clip_gradients
from rewards import Scorer
from sampler import load_sampler, sample
from sampler_check import SyncError, self_test
from tokenizer import load_tokenizer
from window import Window

FLAGS = ["--sync-steps", "10", "--sampler", "hf", "--date", "2025-06-26"]
FORGOTTEN = "model.layers.2.mlp.down_proj.weight"
BOLD, DIM, RED, GREEN = 1, 2, 31, 32


def paint(text: str, colour: int) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain or not colour else f"\033[{colour}m{text}\033[0m"


def scene(text: str):
    """text: a line that is the heading, then sentences."""
    title, sentences = text.split("\n", 1)
    print(f"\n{paint(title, BOLD)}")
    say(sentences)


def say(text: str, colour: int = 0):
    for line in textwrap.wrap(" ".join(text.split()), 100, break_on_hyphens=False):
        print(paint(line, colour))


def fixed(number: float) -> str:
    return f"{round(number, 3) + 0:.3f}"  # + 0: no minus before 0.000


def table(columns: str, rows: list[list], right: list | None = None):
    """columns: names, two spaces or more apart; right: whether a row is green or red."""
    colours = [GREEN if r else RED for r in right] if right else [0] * len(rows)
    rows = [[fixed(x) if isinstance(x, float) else str(x) for x in row] for row in rows]
    rows = [re.split("  +", columns), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, colour in zip(rows, [DIM, *colours], strict=True):
        print(paint("".join(f"  {x:>{width}}" for x, width in zip(row, widths, strict=True)), colour))


class Toy:
    """What train_dpo.main makes before its loop, and the completions of the first window."""

    def __init__(self):
        self.args = args = train_dpo.get_args(FLAGS)
        _, _, device = processes.start()
        dtype, length = processes.compute_dtype(device), args.max_prompt_tokens + args.max_new_tokens
        self.tokenizer, vocab, stop_ids = load_tokenizer(args.model, length)
        prompts = load_rows(args, self.tokenizer, vocab, talks=False)
        self.scorer = Scorer(prompts.to_score, args, device, dtype, talks=False)
        self.policy = load_policy(args.model, device=device, vocab=vocab, temperature=args.temperature)
        self.reference = load_reference(
            args.model, device=device, vocab=vocab, temperature=args.temperature,
            needed=train_dpo.needs_reference(args), follows=args.sync_ref,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=args.adam_eps,
            weight_decay=args.weight_decay, fused=True,
        )  # fmt: skip
        self.sampler = load_sampler(
            args.sampler, args.model, tokenizer=self.tokenizer, vocab=vocab, stop_ids=stop_ids, device=device,
            dtype=dtype, max_length=length, trust=False,
        )  # fmt: skip
        self.window = Window(Path("runs"), args, prompts)  # ten steps stay in memory
        self.window.begin(0)
        self.window.fill(0, self.sampler, self.policy, None, Sums(prompts.kinds))

    def examples(self, step: int) -> list[Example]:
        self.scorer.score(self.window[step])
        return train_dpo.make_examples(self.window[step], step, self.args)

    def batch(self, examples: list[Example]) -> MicroBatch:
        [batch] = micro_batches(examples, self.policy, self.args.micro_batch_tokens)
        return batch  # a step of the toy fits in one


# ---- the scenes


def a_prompt(toy: Toy, pair: Example):
    scene(f"""1  A prompt and its ids
        The chat template puts {pair.row.prompt!r} between special tokens, and the tokenizer makes one id of
        each special token and of each character. Sampler and policy read the same ids, never the text.""")
    tokens = [toy.tokenizer.decode([i]) for i in pair.row.ids]
    table("  ".join(["token", *tokens]), [["id", *pair.row.ids]])


def eight_completions(pair: Example):
    scene(f"""2  Eight completions, their rewards and log-probs
        The sampler drew them at temperature 1; the verifier compared each with the answer, {pair.row.answer}.
        The log-prob of a completion is the sum over its tokens, the end token included, in nats: e to this
        power is its probability.""")
    rows = [[i, c.text, int(c.reward), sum(c.logps)] for i, c in enumerate(pair.completions)]
    rows = [[*row, math.exp(row[-1])] for row in rows]
    table("number  text  reward  log-prob  probability", rows, [c.reward for c in pair.completions])


def the_pair(pair: Example, examples: list[Example]):
    pairs = sum(len(example.pairs) for example in examples)
    scene(f"""3  The pair
        DPO learns from one right and one wrong completion, drawn at random; it does not read the other six.
        Of the {len(examples)} prompts of this step {pairs} have such a pair; the others, whose completions
        are all right or all wrong, teach nothing.""")
    [(chosen, rejected)] = pair.pairs
    rows = [[role, i, pair.completions[i].text] for role, i in (("chosen", chosen), ("rejected", rejected))]
    table("role  number  text", rows, [True, False])


class Look(NamedTuple):
    """The pair as the loss sees it at one moment; slope_BT: d loss / d log π."""

    logps_BT: torch.Tensor
    ref_BT: torch.Tensor
    slope_BT: torch.Tensor
    loss: float
    margin: float


def look(toy: Toy, pair: Example, step: int) -> Look:
    batch = toy.batch([pair])
    logps_BT, entropy_BT = (x_BT.detach().requires_grad_() for x_BT in toy.policy(batch))
    ref_BT = toy.reference(batch, logps_BT, step)
    loss, logged = train_dpo.batch_loss(batch, logps_BT, ref_BT, entropy_BT, 0.0, toy.args)
    loss.backward()
    margin = (logged["chosen"] - logged["rejected"]).item() / toy.args.beta
    both = torch.cat([batch.chosen_index_P, batch.rejected_index_P])
    return Look(logps_BT[both].detach(), ref_BT[both], logps_BT.grad[both], loss.item(), margin)


def each_token(toy: Toy, pair: Example, now: Look):
    beta = toy.args.beta
    scene(f"""4  Each token of the pair
        At a sync the reference takes over the policy's weights, so its log-probs are the same here. The last
        column is how far the loss pushes a token: downhill, so that -β/2 = {-beta / 2:g} lifts each token of
        the chosen completion, and {beta / 2:g} lowers each token of the rejected one. Where both begin with
        the same tokens, the two pushes cancel.""")
    tokens_of(toy, pair, now)


def tokens_of(toy: Toy, pair: Example, now: Look):
    rows = []
    for b, i in enumerate(*pair.pairs):
        for t, token in enumerate(pair.completions[i].ids):
            numbers = (x_BT[b, t].item() for x_BT in (now.logps_BT, now.ref_BT, now.slope_BT))
            rows.append([("chosen", "rejected")[b], toy.tokenizer.decode([token]), *numbers])
    table("role  token  log π  log π_ref  d loss / d log π", rows, [row[0] == "chosen" for row in rows])


def the_loss(now: Look, beta: float):
    scene("""5  The loss, by hand and by the script
        The margin says by how many nats more the policy prefers the chosen completion to the rejected one
        than the reference does. At the first step after a sync it is 0 and the loss log 2, for any pair.""")
    by_hand(now, beta)


def by_hand(now: Look, beta: float):
    (c, r), (ref_c, ref_r) = (x_BT.sum(-1).tolist() for x_BT in (now.logps_BT, now.ref_BT))
    margin = (c - ref_c) - (r - ref_r)
    loss, slope = math.log(1 + math.exp(-beta * margin)), -beta / (1 + math.exp(beta * margin))
    script = train_dpo.dpo_loss(*now.logps_BT.sum(-1), *now.ref_BT.sum(-1), beta)
    print(f"  margin = ({c:.3f} - {ref_c:.3f}) - ({r:.3f} - {ref_r:.3f}) = {margin:.3f}")
    print(f"  loss   = log(1 + e^(-β margin)) = {loss:.4f}; dpo_loss {script:.4f}, batch_loss {now.loss:.4f}")
    print(f"  slope  = -β / (1 + e^(β margin)) = {slope:.4f}; autograd {now.slope_BT[0, 0]:.4f}")


def update(toy: Toy, examples: list[Example], step: int) -> tuple[float, float]:
    """The update of train_dpo.main; returns the loss, and the gradient's norm before it is clipped."""
    batch = toy.batch(examples)
    logps_BT, entropy_BT = toy.policy(batch)
    ref_BT = toy.reference(batch, logps_BT, step)
    loss, _ = train_dpo.batch_loss(batch, logps_BT, ref_BT, entropy_BT, 0.0, toy.args)
    (loss / toy.args.prompts_per_step).backward()
    norm = clip_gradients(toy.policy, toy.args.grad_clip)
    toy.optimizer.step()
    toy.optimizer.zero_grad()
    return loss.item() / toy.args.prompts_per_step, norm


def one_update(toy: Toy, pair: Example, examples: list[Example]):
    args, (loss, norm) = toy.args, update(toy, examples, 0)
    scene(f"""6  One optimizer step, and what it did to all eight
        The loss of the step is {loss:.4f}, the sum over its pairs divided by all {args.prompts_per_step}
        prompts. Its gradient of norm {norm:.2f} is scaled down to {args.grad_clip:g}, and AdamW's first step
        moves each weight by about the learning rate, {args.lr:g}. All completions share these weights: what
        begins like the rejected one falls with it.""")
    batch = toy.batch([Example(pair.row, pair.completions)])
    roles, rows = dict(zip(*pair.pairs, ("chosen", "rejected"), strict=True)), []
    for (_, i), after in zip(batch.origin_B, toy.policy(batch)[0].sum(-1).tolist(), strict=True):
        before = sum(pair.completions[i].logps)
        rows.append([i, pair.completions[i].text, roles.get(i, ""), before, after, after - before])
    table("number  text  role  before  after  change", sorted(rows), [c.reward for c in pair.completions])


def ten_updates(toy: Toy, pair: Example, looks: list[Look]):
    scene("""7  The same pair, ten updates later
        The first of these updates had this pair, the other nine had other prompts, and yet the margin went on
        growing. The larger it is, the weaker the push: the gradient saturates.""")
    beta, last = toy.args.beta, looks[-1]
    rows = [[n, x.margin, beta * x.margin, x.loss, x.slope_BT[0, 0].item()] for n, x in enumerate(looks)]
    table("updates  margin  β margin  loss  slope", rows)
    say("After the tenth:")
    tokens_of(toy, pair, last)
    by_hand(last, beta)
    left, left_of_paper = (2 / (1 + math.exp(b * last.margin)) for b in (beta, 0.1))
    say(f"""So β bounds how far a window moves the policy: a pair's push fades once its margin passes about
        1/β nats. Here {left:.1%} of the first push is left. The paper's β of 0.1, whose 1/β is 10 nats,
        would leave {left_of_paper:.1%}.""")


@torch.no_grad()
def gaps(toy: Toy, step: int) -> list[float]:
    """Means over the step's completions as the policy reads them now, before it trains on them."""
    batch = toy.batch([Example(*group) for group in toy.window[step]])
    gap_BT = toy.policy(batch)[0] - batch.sampler_BT
    gap_N, gap_B = gap_BT[batch.mask_BT], gap_BT.sum(-1)
    outside_N = ((gap_N.exp() - 1).abs() > 0.2).float()
    right_B = torch.tensor([example.completions[i].reward == 1 for example, i in batch.origin_B])
    return [x.mean().item() for x in (gap_N.abs(), outside_N, gap_B[right_B], gap_B[~right_B])]


def completions_age(rows: list[list]):
    scene("""8  Completions age
        The sampler wrote the whole window at step 0, and step k reads its completions when they are k updates
        old. The policy has not trained on them yet, and still it has moved away from the sampler: right ones
        have become likelier than when they were drawn, wrong ones less likely. (A gap is log π less
        log π_sampler in nats, here a mean; that of a token is without its sign.)""")
    table("age  gap of a token  ratios outside 0.8 to 1.2  gap of right ones  gap of wrong ones", rows)


def grpo(toy: Toy, pair: Example):
    scene("""9  The same group, as GRPO sees it
        All eight count: an advantage is the reward less the group's mean, over its standard deviation. On
        policy, with the weights of step 0, each ratio π / π_sampler is 1, and the advantage pushes all tokens
        of a completion alike.""")
    as_grpo_sees_it(pair, toy.reference.model, toy.reference, 0)
    say("""Stale, with the weights of ten updates later: where a ratio is already more than 0.2 off in the
        direction that the advantage wants, the token is clipped, and only the KL's small push is left.""")
    as_grpo_sees_it(pair, toy.policy, toy.reference, 10)


def as_grpo_sees_it(pair: Example, policy, reference, step: int):
    args = train_grpo.get_args(FLAGS)
    learned = train_grpo.advantages([c.reward for c in pair.completions], args.std_norm)
    example = Example(pair.row, pair.completions, advantages=learned)
    [batch] = micro_batches([example], policy, args.micro_batch_tokens)
    logps_BT = policy(batch)[0].detach().requires_grad_()
    loss_BT, _ = train_grpo.policy_loss(
        logps_BT, batch.sampler_BT, batch.advantage_B, stale=step > 0,
        clip_low=args.clip_low, clip_high=args.clip_high, is_cap=args.is_cap,
    )  # fmt: skip
    kl_BT = train_grpo.kl_to_reference(logps_BT, reference(batch, logps_BT, step))
    ((loss_BT + args.beta * kl_BT) * batch.mask_BT).sum().backward()
    ratio_BT, rows = (logps_BT.detach() - batch.sampler_BT).exp(), []
    for b, (_, i) in enumerate(batch.origin_B):
        ratio_T, slope_T, kl_T = (x_BT[b][batch.mask_BT[b]] for x_BT in (ratio_BT, logps_BT.grad, kl_BT))
        tokens = [" ".join(f"{fixed(x):>6}" for x in x_T.tolist()) for x_T in (ratio_T, slope_T)]
        rows.append([i, pair.completions[i].text, learned[i], *tokens, kl_T.sum().item()])
    columns = "number  text  advantage  ratio of each token  d loss / d log π of each token  KL"
    table(columns, sorted(rows), [c.reward for c in pair.completions])


def a_reload(toy: Toy, pair: Example):
    scene(f"""10  The sync, with a reload that forgets a tensor
        The window has had its ten updates, and the sampler takes over the policy's weights. First with a
        fault: {FORGOTTEN} keeps its old values. Nothing crashes, but the self-test scores the beginnings of a
        few completions with the policy, and stops the run:""")
    dtype = toy.sampler.dtype
    old = dict(toy.reference.model.full_weights(dtype))[FORGOTTEN]
    faulty = ((name, old if name == FORGOTTEN else new) for name, new in toy.policy.full_weights(dtype))
    for weights in (faulty, toy.policy.full_weights(dtype)):
        toy.sampler.reload(weights, 10)
        groups = sample(toy.sampler, [pair.row], 1000, toy.args, 10)
        try:
            gap = self_test(toy.sampler, toy.policy, groups)["sampler/logp_gap_mean"]
        except SyncError as error:
            say(f"SyncError: {error}", RED)
    toy.scorer.score(groups)
    right = sum(c.reward for c in groups[0][1]) / 1000
    say(f"""With all tensors the gap is {gap:.5f} nats. Of 1000 completions that the sampler then draws for
        this prompt, {right:.1%} are right. The reference takes over the weights too, and the next window
        begins.""")


def main():
    torch.set_num_threads(1)  # their number decides the order of sums, and so the last digits
    transformers.logging.disable_progress_bar()
    toy = Toy()
    examples = toy.examples(0)
    pair = next(example for example in examples if example.pairs)
    looks, ages = [look(toy, pair, 0)], [[0, *gaps(toy, 0)]]
    a_prompt(toy, pair)
    eight_completions(pair)
    the_pair(pair, examples)
    each_token(toy, pair, looks[0])
    the_loss(looks[0], toy.args.beta)
    one_update(toy, pair, examples)
    for step in range(1, 10):
        looks.append(look(toy, pair, step))
        examples = toy.examples(step)
        ages.append([step, *gaps(toy, step)])
        update(toy, examples, step)
    ten_updates(toy, pair, [*looks, look(toy, pair, 10)])
    completions_age(ages)
    grpo(toy, pair)
    a_reload(toy, pair)
    toy.scorer.close()
    processes.stop()


if __name__ == "__main__":
    processes.launch(main)
