"""Completions to padded tensors: which examples meet in one forward, and where their tokens lie in it.

An example is a prompt with its group of completions, which share the prompt, so that it is read once. Short
examples fill up the rows of longer ones. A row of a micro-batch with two prompts P and Q, the completions A
and B of P, and C of Q:

    token       P  P  P  P  A  A  A  B  B  Q  Q  Q  C  C  .  .
    sequence    0  0  0  0  0  0  0  0  0  1  1  1  1  1 -1 -1    a prompt and the completions that share it
    completion  0  0  0  0  1  1  1  2  2  0  0  0  1  1  0  0    0 is the prompt
    position    0  1  2  3  4  5  6  4  5  0  1  2  3  4  0  0    in the prompt and its own completion

A token sees the tokens before it that are in its own sequence, and of these only the prompt's and its own
completion's. That needs a mask. A row of one prompt and one completion needs none, since no token sees the
padding behind it. All rows are of that kind where sharing would not pay, where the model has layers that
cannot take the mask, and with --no-packing. (On a GPU a mask rules the flash kernel out; nobody has measured
which way is faster there.)

Shapes: R rows of L tokens; N completion tokens of a micro-batch; B completions of at most T tokens, in the
order of the examples; P pairs.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data import Completion, Row

# What attention to a token under a mask costs, in units of what it costs in a causal kernel that leaves out
# what is masked. A guess.
MASKED = 4


@dataclass
class Example:
    """A prompt, its group of completions, and what an update learns from them.

    pairs: (chosen, rejected), as indices of completions; those in pairs meet in one forward, others are not
    read. advantages: of each completion, None where it is not read. With neither, all are read.
    """

    row: Row
    completions: list[Completion]
    pairs: list[tuple[int, int]] | None = None
    advantages: list[float | None] | None = None

    @property
    def used(self) -> list[int]:
        """The completions that the update reads, each once."""
        if self.pairs is not None:
            return list(dict.fromkeys(itertools.chain(*self.pairs)))
        known = self.advantages or [0.0] * len(self.completions)
        return [i for i, advantage in enumerate(known) if advantage is not None]


@dataclass
class Sequence:
    """A prompt and the completions of its example that share it, which stand side by side in a row."""

    example: Example
    used: list[int]

    @property
    def width(self) -> int:
        lengths = [len(self.example.completions[i].ids) for i in self.used]
        return len(self.example.row.ids) + sum(map(_tokens_read, lengths))


@dataclass
class MicroBatch:
    """One forward and backward: the inputs of the policy, and everything that a loss reads.

    A rank that has no examples left takes part in the others' collectives with a dummy: a token that belongs
    to no completion, so that its mask has nothing in it, and no pairs.
    """

    ids_RL: torch.Tensor
    position_RL: torch.Tensor
    sequence_RL: torch.Tensor | None  # None: a completion a row, no mask is needed
    completion_RL: torch.Tensor | None
    source_N: torch.Tensor  # the token (of all rows, flattened) whose hidden state predicts target_N
    target_N: torch.Tensor
    mask_BT: torch.Tensor  # true where completion b has a token t, the end token included
    sampler_BT: torch.Tensor  # log-probs that the sampler drew the tokens with (for GRPO), 0 outside the mask
    advantage_B: torch.Tensor  # 0 without advantages
    chosen_index_P: torch.Tensor  # b of each pair's chosen completion
    rejected_index_P: torch.Tensor
    weight_P: torch.Tensor  # 1 / pairs of its example
    origin_B: list[tuple[Example, int]]  # of each completion: its example, and its index there
    tokens_used: int  # of each completion, with its prompt


def micro_batches(examples: list[Example], policy, max_tokens: int) -> Iterator[MicroBatch]:
    """Micro-batches of at most `max_tokens` padded tokens. Collective: every rank gets the same number, since
    each forward and backward is a collective.

    policy: what is to read them; its `shares` says whether completions may share a row, and it is told which
    is the last one.

    Longest first: what does not fit in memory fails at once, and neighbours differ little, so that little is
    padding.
    """
    together = []  # lists of sequences that must meet in one forward: those of an example with pairs
    for example in examples:
        sequences = split(example, policy, max_tokens)
        together += [sequences] if example.pairs else [[sequence] for sequence in sequences]
    batches: list[list[Sequence]] = []
    longest = 0  # tokens of the last batch's first sequence
    for sequences in sorted(filter(None, together), key=_longest, reverse=True):
        if not batches or (len(batches[-1]) + len(sequences)) * longest > max_tokens:
            batches.append([])
            longest = _longest(sequences)
        batches[-1] += sequences
    count = torch.tensor(len(batches))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    for number in range(count.item()):
        policy.sum_over_replicas(number == count.item() - 1)
        yield collate(batches[number] if number < len(batches) else [], policy)


def collate(sequences: list[Sequence], policy) -> MicroBatch:
    """The tensors of a micro-batch; of a dummy without sequences."""
    sizes, device = [sequence.width for sequence in sequences] or [1], policy.device
    masked = any(len(sequence.used) > 1 for sequence in sequences)
    multiple = 16 if device.type == "cuda" else 1  # of masked rows: else the kernel copies the mask
    rows, width, starts = _place(sizes, policy.hidden_size, policy.shares, masked, multiple)
    masked = masked or rows < len(sizes)
    ids, positions, sequence_of, completion_of = ([fill] * (rows * width) for fill in (0, 0, -1, 0))
    source, target, origin_B, b_of = [], [], [], {}
    for number, (start, sequence) in enumerate(zip(starts, sequences, strict=False)):
        prompt = sequence.example.row.ids
        end = start + len(prompt)
        ids[start:end], positions[start:end] = prompt, range(len(prompt))
        source_of_first = end - 1
        for k, i in enumerate(sequence.used, 1):
            completion = sequence.example.completions[i]
            size = _tokens_read(len(completion.ids))
            source += [source_of_first, *range(end, end + size)][: len(completion.ids)]
            target += completion.ids
            part = slice(end, end + size)
            ids[part], positions[part] = completion.ids[:size], range(len(prompt), len(prompt) + size)
            completion_of[part] = [k] * size
            end += size
            b_of[id(sequence.example), i] = len(origin_B)
            origin_B.append((sequence.example, i))
        sequence_of[start:end] = [number] * (end - start)
    pairs = [
        (b_of[id(example), chosen], b_of[id(example), rejected], len(example.pairs))
        for example in {id(example): example for example, _ in origin_B}.values()
        for chosen, rejected in example.pairs or []
    ]

    def tensor(values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype, device=device)

    table = tensor([ids, positions, sequence_of, completion_of])
    ids_RL, position_RL, sequence_RL, completion_RL = table.reshape(4, rows, width)
    completions = [example.completions[i] for example, i in origin_B]
    lengths = [len(completion.ids) for completion in completions] or [0]
    mask_BT = torch.arange(max(1, *lengths), device=device) < tensor(lengths)[:, None]
    sampler_N = tensor([logp for completion in completions for logp in completion.logps], torch.float32)
    advantages = [example.advantages[i] if example.advantages else 0.0 for example, i in origin_B] or [0.0]
    chosen_index_P, rejected_index_P, pairs_P = tensor(pairs).reshape(-1, 3).T
    return MicroBatch(
        ids_RL=ids_RL,
        position_RL=position_RL,
        sequence_RL=sequence_RL if masked else None,
        completion_RL=completion_RL if masked else None,
        source_N=tensor(source or [0]),
        target_N=tensor(target or [0]),
        mask_BT=mask_BT,
        sampler_BT=torch.zeros(mask_BT.shape, device=device).masked_scatter(mask_BT, sampler_N),
        advantage_B=tensor(advantages, torch.float32),
        chosen_index_P=chosen_index_P,
        rejected_index_P=rejected_index_P,
        weight_P=1 / pairs_P,
        origin_B=origin_B,
        tokens_used=sum(len(e.row.ids) + len(e.completions[i].ids) for e, i in origin_B),
    )


def split(example: Example, policy, max_tokens: int) -> list[Sequence]:
    """An example's completions, in order, as one sequence or several.

    Completions share a prompt where the work on it that they save is more than what attention costs that the
    mask then throws away: short completions do, long ones to a short prompt do not. (A token's 24 H^2 flops
    in the matrices of a layer are those of 6 H pairs of attention.)
    """
    sequences, width, prompt = [], 0, len(example.row.ids)
    for i in example.used:
        completion = _tokens_read(len(example.completions[i].ids))
        saved = prompt * (prompt + 2 * completion + 6 * policy.hidden_size)
        fits = width + completion <= max_tokens and MASKED * 2 * width * completion < saved
        if sequences and policy.shares and fits:
            sequences[-1].used.append(i)
            width += completion
        else:
            sequences.append(Sequence(example, [i]))
            width = prompt + completion
    return sequences


def _place(
    sizes: list[int], hidden_size: int, shares: bool, masked: bool, multiple: int
) -> tuple[int, int, list[int]]:
    """Where sequences of `sizes` tokens go: (rows, width of a row, where each begins in the flattened rows).

    masked: whether a mask is needed anyway. With one, or where padding costs more than it, short sequences
    fill up the rows of longer ones. Rows wider than the longest sequence leave less padding, but cost each of
    their tokens more attention: of nine widths the cheapest is taken.
    """
    width = max(sizes)
    padding = 1 - sum(sizes) / (width * len(sizes))
    if not shares or not (masked or MASKED * width < padding * 6 * hidden_size):
        return len(sizes), width, [width * i for i in range(len(sizes))]

    def cost(place: tuple) -> float:
        rows, width, _ = place
        return rows * width * (6 * hidden_size + MASKED * width)

    return min((first_fit(sizes, width * k // 8, multiple) for k in range(8, 17)), key=cost)


def first_fit(sizes: list[int], width: int, multiple: int = 1) -> tuple[int, int, list[int]]:
    """Lays sequences into rows of at most `width` tokens, longest first, each where it first fits; returns
    the number of rows, the tokens that all then have (those of the fullest one, up to a multiple), and where
    each sequence begins.
    """
    room, places = [], [(0, 0)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, left in enumerate(room) if left >= sizes[i]), len(room))
        if row == len(room):
            room.append(width)
        places[i] = (row, width - room[row])
        room[row] -= sizes[i]
    width = math.ceil((width - min(room)) / multiple) * multiple
    return len(room), width, [row * width + start for row, start in places]


def _longest(sequences: list[Sequence]) -> int:
    return max(sequence.width for sequence in sequences)


def _tokens_read(length: int) -> int:
    """Tokens of a completion that the model reads: all but the last, after which nothing is predicted."""
    return max(0, length - 1)
