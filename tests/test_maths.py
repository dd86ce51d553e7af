"""The DPO loss and the choice of pairs, against values worked out by hand."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import example

from train_dpo import batch_loss, dpo_loss, make_examples, mean_chosen_length, pick_pairs


def test_loss_is_log_2_where_the_policy_is_the_reference():
    chosen, rejected = torch.tensor([-3.0, -70.0]), torch.tensor([-9.0, -2.0])
    assert dpo_loss(chosen, rejected, chosen, rejected, 0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_loss_by_hand():
    # log-ratios 2 and -1, so a margin of 3; beta 0.5: -log sigmoid(1.5) = log(1 + e^-1.5) = 0.201413
    loss = dpo_loss(*(torch.tensor([x]) for x in (-4.0, -6.0, -6.0, -5.0)), 0.5)
    assert loss.item() == pytest.approx(0.2014132779827524, abs=1e-6)
    # and with the roles changed the margin is -3: log(1 + e^1.5) = 1.701413
    loss = dpo_loss(*(torch.tensor([x]) for x in (-6.0, -4.0, -5.0, -6.0)), 0.5)
    assert loss.item() == pytest.approx(1.7014132779827524, abs=1e-6)


def test_gradient_raises_the_chosen_and_lowers_the_rejected_by_the_same():
    chosen, rejected = torch.tensor([-4.0], requires_grad=True), torch.tensor([-4.0], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([-4.0]), torch.tensor([-4.0]), 0.3).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.15)  # -beta * sigmoid(0)
    assert rejected.grad.item() == pytest.approx(0.15)


def pair(rewards, seed=0, every=False):
    return pick_pairs(rewards, random.Random(seed), every)


def test_a_pair_is_a_right_and_a_wrong_completion_and_depends_on_the_seed_alone():
    group = [0, 1, None, 1, 0, 0]
    drawn = [pair(group, seed) for seed in range(200)]
    assert {chosen for [(chosen, _)] in drawn} == {1, 3} and {rejected for [(_, rejected)] in drawn} == {
        0,
        4,
        5,
    }
    assert pair(group, 7) == pair(group, 7)


def test_with_scalar_rewards_a_pair_is_the_best_and_the_worst():
    assert {pair([0.5, -1.25, None, 3.5, 2.0], seed)[0] for seed in range(50)} == {(3, 1)}
    assert {pair([2.0, 7.0, 7.0], seed)[0] for seed in range(50)} == {(1, 0), (2, 0)}


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("rewards", [(1, 1), (0, 0), (None, 1), (None, None), (), (0.7, None, 0.7)])
def test_no_pair_without_a_difference(rewards, every):
    assert pair(rewards, every=every) == []


def test_all_pairs_are_all_of_a_better_and_a_worse_completion():
    assert pair([1, 0, None, 1, 0], every=True) == [(0, 1), (0, 4), (3, 1), (3, 4)]
    assert pair([0.1, 0.3, 0.2], every=True) == [(1, 0), (1, 2), (2, 0)]


def test_each_prompt_draws_its_pair_with_a_seed_of_its_own(device):
    """Step, seed and the prompt's number in the step decide, and nothing that was drawn before."""
    group = [SimpleNamespace(reward=reward) for reward in (1, 0, 1, 0, 1, None)]
    draw = lambda step, n: [  # noqa: E731
        e.pairs for e in make_examples([(None, group)] * n, step, SimpleNamespace(seed=5, all_pairs=False))
    ]
    whole = draw(3, 40)
    assert draw(3, 10) == whole[:10] and draw(4, 40) != whole
    assert {pair for [pair] in whole} == {(i, j) for i in (0, 2, 4) for j in (1, 3)}


def test_the_mean_length_of_chosen_completions_weighs_each_prompt_alike(device):
    """Chosen lengths 3 and 5 of one prompt, 2 of another; a prompt without a pair does not count."""
    ids = lambda *lengths: [[4] * n for n in lengths]  # noqa: E731
    examples = [
        example([1], ids(3, 9, 5), pairs=[(0, 1), (2, 1)]), example([1], ids(7, 2), pairs=[(1, 0)]),
        example([1], ids(100, 100), pairs=[]),
    ]  # fmt: skip
    assert mean_chosen_length(examples) == pytest.approx(((3 + 5) / 2 + 2) / 2)
    assert mean_chosen_length([]) == 0


BATCH = SimpleNamespace(
    chosen_index_P=torch.tensor([0]), rejected_index_P=torch.tensor([1]), weight_P=torch.tensor([1.0]),
    mask_BT=torch.tensor([[True, True, False, False], [True, True, True, True]]),
)  # fmt: skip


def losses(beta=0.5, nll_weight=0.0, entropy_weight=0.0, length_normalize=False):
    """Log-ratios: chosen 1 + 1 over 2 tokens, rejected -1 over 4; 3 chosen tokens on average."""
    args = SimpleNamespace(
        beta=beta, nll_weight=nll_weight, entropy_weight=entropy_weight, length_normalize=length_normalize
    )
    logps_BT = torch.tensor([[-1.0, -2.0, 0, 0], [-2.0, -1.0, -1.0, -1.0]], requires_grad=True)
    ref_BT = torch.tensor([[-2.0, -3.0, 0, 0], [-1.0, -1.0, -1.0, -1.0]])
    entropy_BT = torch.tensor([[0.5, 1.5, 0, 0], [3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    loss, logged = batch_loss(BATCH, logps_BT, ref_BT, entropy_BT, 3.0, args)
    loss.backward()
    implicit = [logged[name].item() for name in ("chosen", "rejected")]
    return loss.item(), implicit, logps_BT.grad, entropy_BT.grad


def test_without_ablations_it_is_the_dpo_loss():
    loss, implicit, _, entropy_grad = losses()
    assert loss == pytest.approx(math.log(1 + math.exp(-1.5))) and implicit == [1.0, -0.5]  # 0.5 x (2 + 1)
    assert entropy_grad is None or not entropy_grad.any()


def test_length_normalization_takes_means_of_policy_and_reference():
    loss, implicit, grad, _ = losses(length_normalize=True)
    assert loss == pytest.approx(math.log(1 + math.exp(-0.5 * (1 + 0.25)))) and implicit == [0.5, -0.125]
    assert (grad[0, 0] / grad[1, 0]).item() == pytest.approx(-2)  # 1/2 against 1/4 of a token's weight


def test_nll_is_a_mean_over_the_steps_chosen_tokens():
    loss, _, grad, _ = losses(nll_weight=0.6)
    plain, _, plain_grad, _ = losses()
    assert loss - plain == pytest.approx(
        0.6 * 3.0 / 3.0
    )  # -log p of the chosen one is 3, 3 tokens on average
    wanted = [
        [-0.2, -0.2, -0.2, -0.2],
        [0.0, 0.0, 0.0, 0.0],
    ]  # positions outside the mask have no parameters behind
    assert (grad - plain_grad).flatten().tolist() == pytest.approx(sum(wanted, []), abs=1e-6)


def test_entropy_of_the_chosen_completion_is_rewarded():
    loss, _, _, grad = losses(entropy_weight=0.1)
    plain, *_ = losses()
    assert loss - plain == pytest.approx(-0.1 * (0.5 + 1.5) / 2)
    assert grad[0, :2].tolist() == pytest.approx([-0.05, -0.05]) and not grad[1].any()


def test_a_loss_is_a_mean_over_the_pairs_of_a_prompt_and_a_sum_over_prompts():
    """Two pairs of one prompt, one of another: log-ratio margins 0, 2 and 4."""
    args = SimpleNamespace(beta=1.0, nll_weight=0.0, entropy_weight=0.0, length_normalize=False)
    batch = SimpleNamespace(
        chosen_index_P=torch.tensor([0, 1, 3]), rejected_index_P=torch.tensor([2, 2, 4]),
        weight_P=torch.tensor([0.5, 0.5, 1.0]), mask_BT=torch.ones(5, 1, dtype=torch.bool),
    )  # fmt: skip
    logps_BT = torch.tensor([[-3.0], [-1.0], [-3.0], [-1.0], [-5.0]])
    loss, _ = batch_loss(batch, logps_BT, torch.zeros(5, 1), torch.zeros(5, 1), 1.0, args)
    by_hand = [math.log(1 + math.exp(-margin)) for margin in (0, 2, 4)]
    assert loss.item() == pytest.approx(0.5 * by_hand[0] + 0.5 * by_hand[1] + by_hand[2], abs=1e-6)
