"""Where completions lie in a forward, which examples meet in one, and that it changes no number."""

import math
import random

import pytest
import torch
from conftest import example, forward

from packing import MASKED, Sequence, collate, first_fit, micro_batches, split


def shared(policy, prompt, completions, max_tokens=4096):
    """Which completions of these lengths share the prompt."""
    one = example([5] * prompt, [[6] * length for length in completions])
    return [sequence.used for sequence in split(one, policy, max_tokens)]


def test_the_picture_of_the_docstring(policy):
    """Prompts P and Q and their completions: what each table of a row holds, by hand."""
    groups = [([11, 12, 13, 14], [[21, 22, 23, 24], [31, 32, 33]]), ([41, 42, 43], [[51, 52, 3]])]
    batch, _, _ = forward(policy, groups)
    # all but the last token of a completion is read
    assert batch.ids_RL.tolist() == [[11, 12, 13, 14, 21, 22, 23, 31, 32, 41, 42, 43, 51, 52]]
    assert batch.sequence_RL.tolist() == [[0] * 9 + [1] * 5]
    assert batch.completion_RL.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 0, 0, 0, 1, 1]]
    assert batch.position_RL.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4]]
    # the token before each one predicts it: the prompt's last token the first of every completion
    assert batch.source_N.tolist() == [3, 4, 5, 6, 3, 7, 8, 11, 12, 13]
    assert batch.target_N.tolist() == [21, 22, 23, 24, 31, 32, 33, 51, 52, 3]
    assert batch.mask_BT.tolist() == [[True] * 4, [True] * 3 + [False], [True] * 3 + [False]]
    assert batch.tokens_used == 8 + 7 + 6


def test_what_shares_a_prompt(policy):
    """Short completions of a longer prompt do, up to the limit and to where attention would cost more."""
    assert shared(policy, 8, [4] * 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert shared(policy, 8, [5, 6, 4, 5], 17) == [[0, 1], [2, 3]]  # 8 + 4 + 5 tokens are read: no last ones
    assert shared(policy, 8, [500, 3]) == [[0], [1]]
    assert shared(policy, 100, [200, 2]) == [[0, 1]]
    assert shared(policy, 8, []) == []
    policy.shares = False
    assert shared(policy, 8, [4] * 3) == [[0], [1], [2]]


def test_first_fit_by_hand():
    assert first_fit([3, 9, 4, 2, 5], 9) == (3, 9, [18, 0, 9 + 5, 18 + 3, 9])
    assert first_fit([3, 9, 4, 2, 5], 13) == (2, 13, [13 + 5, 0, 9, 13 + 8, 13])


def sequences(groups):
    return [Sequence(example(*group), list(range(len(group[1])))) for group in groups]


def test_short_sequences_fill_the_rows_of_long_ones(policy):
    """At most a tenth is padding, even with a heavy tail; a mask costs long rows more than it saves."""
    rng = random.Random(0)
    heavy = [([5] * 8, [[6] * min(64, int(rng.paretovariate(1.1))) for _ in range(4)]) for _ in range(64)]
    real = sum(sequence.width for sequence in sequences(heavy))
    assert real == sum(8 + sum(len(ids) - 1 for ids in completions) for _, completions in heavy)
    ids_RL = collate(sequences(heavy), policy).ids_RL
    assert ids_RL.count_nonzero() == real > 0.9 * ids_RL.numel()
    padded = real = 0
    for _ in range(20):  # log-normal, as in results/benchmark.py
        groups = [
            ([5] * 8, [[6] * min(8, 1 + int(rng.lognormvariate(math.log(2), 1))) for _ in range(8)])
            for _ in range(32)
        ]
        padded += collate(sequences(groups), policy).ids_RL.numel()
        real += sum(sequence.width for sequence in sequences(groups))
    assert real > 0.9 * padded
    long = sequences([([5] * 8, [[6] * 400]), ([5] * 8, [[6] * 200]), ([5] * 8, [[6] * 180])])
    batch = collate(long, policy)
    assert batch.ids_RL.shape == (3, 407) and batch.sequence_RL is None
    # one of the two ways is cheaper by the costs that are written down: rows x width x (6 H + M width)
    assert 3 * 407 * 6 * policy.hidden_size < 2 * 407 * (6 * policy.hidden_size + MASKED * 407)


def test_indices_of_pairs_are_those_of_the_group_and_each_prompt_weighs_the_same(policy):
    examples = [
        example([5, 6], [[7, 3], [8, 3], [9, 9, 9, 3], [12, 3]], pairs=[(2, 0), (2, 1)]),
        example([5, 6, 7], [[1, 3], [2, 3], [4, 3]], pairs=[]),
        example([5], [[10, 3], [11, 3]], pairs=[(1, 0)]),
    ]
    [batch] = micro_batches(examples, policy, 4096)
    texts = [entry.completions[i].ids for entry, i in batch.origin_B]
    assert sorted(texts) == [[7, 3], [8, 3], [9, 9, 9, 3], [10, 3], [11, 3]]  # not those of no pair
    pairs = [(texts[c], texts[r]) for c, r in zip(batch.chosen_index_P, batch.rejected_index_P, strict=True)]
    assert pairs == [([9, 9, 9, 3], [7, 3]), ([9, 9, 9, 3], [8, 3]), ([11, 3], [10, 3])]
    assert batch.weight_P.tolist() == [0.5, 0.5, 1]


def test_advantages_and_the_samplers_log_probs_stand_beside_their_completion(policy):
    one = example([5, 6], [[7, 3], [8, 3], [9, 9, 3]], advantages=[1.5, None, -0.5])
    one.completions[2].logps = [-0.25, -0.5, -0.75]
    [batch] = micro_batches([one], policy, 4096)
    found = {entry.completions[i].ids[0]: b for b, (entry, i) in enumerate(batch.origin_B)}
    assert found.keys() == {7, 9}  # what has no advantage is not read
    assert batch.advantage_B[found[7]] == 1.5 and batch.advantage_B[found[9]] == -0.5
    assert batch.sampler_BT[found[9]].tolist() == [-0.25, -0.5, -0.75]
    assert batch.sampler_BT[found[7]].tolist() == [-1, -1, 0]


def test_micro_batches_hold_every_completion_once_within_the_limit(policy):
    policy.shares = False
    widths = [3, 60, 7, 7, 30, 1, 59, 2]
    examples = [example([5], [[6] * width, [7] * width], pairs=[(0, 1)]) for width in widths]
    batches = list(micro_batches(examples, policy, 120))
    assert sorted(id(entry) for batch in batches for entry, _ in batch.origin_B) == sorted(
        2 * [id(one) for one in examples]
    )
    for batch in batches:
        assert batch.ids_RL.numel() <= 120
        whole = {id(entry) for entry, _ in batch.origin_B}
        assert len(batch.origin_B) == 2 * len(whole)  # both of a pair
    assert [len(c.ids) for entry, _ in batches[0].origin_B for c in entry.completions[:1]] == [60, 60]
    assert list(micro_batches([], policy, 120)) == []


def test_completions_without_pairs_may_go_apart(policy):
    policy.shares = False
    one = example([5], [[6] * 60, [7] * 60], advantages=[1.0, -1.0])
    assert [len(batch.origin_B) for batch in micro_batches([one], policy, 60)] == [1, 1]


@pytest.mark.parametrize(
    "weigh", [lambda batch, logps_BT: logps_BT.sum(), lambda batch, logps_BT: logps_BT.mean()]
)
def test_a_dummy_has_a_gradient_of_zeros(policy, weigh):
    batch = collate([], policy)
    logps_BT, entropy_BT = policy(batch)
    assert not batch.mask_BT.any() and batch.origin_B == [] and batch.tokens_used == 0
    assert len(batch.chosen_index_P) == len(batch.rejected_index_P) == len(batch.weight_P) == 0
    assert not logps_BT.any() and not entropy_BT.any() and not batch.advantage_B.any()
    weigh(batch, logps_BT).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_plain_rows_give_the_same_log_probs_and_gradient(policy):
    rng = random.Random(1)
    groups = [
        (
            [rng.randrange(4, 60) for _ in range(6)],
            [[rng.randrange(4, 60) for _ in range(n)] for n in (1, 5, 3)],
        )
        for _ in range(5)
    ]
    examples = [example(*group, advantages=[1.0, -0.5, 0.25]) for group in groups]
    found = []
    for shares in (True, False):
        policy.shares = shares
        policy.zero_grad()
        logps, masked = {}, False
        for batch in micro_batches(examples, policy, 64):
            logps_BT, _ = policy(batch)
            (logps_BT.sum(-1) * batch.advantage_B).sum().backward()
            masked |= batch.sequence_RL is not None
            for b, (entry, i) in enumerate(batch.origin_B):
                logps[id(entry), i] = logps_BT[b][batch.mask_BT[b]].detach()
        assert masked == shares
        found.append((logps, torch.cat([p.grad.flatten() for p in policy.parameters()])))
    (packed, packed_grad), (plain, plain_grad) = found
    assert packed.keys() == plain.keys() and len(plain) == 15
    assert all(torch.allclose(packed[key], plain[key], atol=1e-5) for key in plain)
    assert (packed_grad - plain_grad).norm() < 1e-5 * plain_grad.norm()
