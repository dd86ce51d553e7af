"""Advantages, the GRPO loss, its KL and its denominators, against values worked out by hand."""

import math

import pytest
import torch
from conftest import forward

from policy import clip_gradients
from train_grpo import advantages, kl_to_reference, policy_loss, token_weight

CLIP = (0.2, 0.3, 2.0)  # low, high, cap


def logs(*probabilities):
    return torch.tensor([probabilities]).log().requires_grad_()


def test_advantages_by_hand():
    # mean 1/4, deviations (3/4)^2 + 3 (1/4)^2 = 3/4, over n - 1 = 3: standard deviation 1/2
    assert advantages([1, 0, 0, 0], std_norm=False) == [0.75, -0.25, -0.25, -0.25]
    assert advantages([1, 0, 0, 0], std_norm=True) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages([2.5, -1.5], std_norm=False) == [2.0, -2.0]


def test_a_completion_of_unknown_reward_leaves_its_group():
    assert advantages([1, None, 0, 0, 0], std_norm=False) == [0.75, None, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("rewards", [(1, 1, 1), (0, 0), (0.3, None, 0.3), (None, None), (1, None), ()])
def test_equal_rewards_contribute_nothing(rewards):
    assert advantages(list(rewards), std_norm=True) == [None] * len(rewards)


@pytest.mark.parametrize("stale", [False, True])
def test_at_ratio_1_the_gradient_is_the_plain_policy_gradient(stale):
    logps_BT = torch.tensor([[-0.5, -2.0], [-1.0, -0.1]], requires_grad=True)
    adv_B = torch.tensor([1.5, -0.5])
    loss_BT, clipped_BT = policy_loss(logps_BT, logps_BT.detach(), adv_B, stale, *CLIP)
    loss_BT.sum().backward()
    assert logps_BT.grad.tolist() == [[-1.5, -1.5], [0.5, 0.5]]  # d/dlogp of -A logp
    assert loss_BT.tolist() == [[-1.5, -1.5], [0.5, 0.5]] and not clipped_BT.any()


def test_a_fresh_sample_is_weighed_by_the_ratio_up_to_the_cap_and_never_clipped():
    logps_BT = logs(0.6, 0.2, 0.9)
    loss_BT, clipped_BT = policy_loss(
        logps_BT, logs(0.4, 0.4, 0.1).detach(), torch.tensor([3.0]), False, *CLIP
    )
    loss_BT.sum().backward()
    assert logps_BT.grad[0].tolist() == pytest.approx([-4.5, -1.5, -6.0])  # ratios 1.5, 0.5, 9 -> 2
    assert not clipped_BT.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.25, 2.0, -2.5, -2.5, False),  # inside 0.8 .. 1.3: -ratio A, and its derivative by logp is the same
        (1.50, 2.0, -2.6, 0.0, True),  # already much likelier: worth 1.3 A, no further push
        (0.50, 2.0, -1.0, -1.0, False),  # less likely, though good: pushed up without a limit
        (0.50, -2.0, 1.6, 0.0, True),  # already much less likely: 0.8 A, no further push
        (1.50, -2.0, 3.0, 3.0, False),  # likelier, though bad: pushed down
        (5.00, -2.0, 4.0, 0.0, False),  # the same, at the cap 2
    ],
)
def test_stale_samples_are_clipped_as_in_ppo(ratio, advantage, loss, gradient, clipped):
    logps_BT = logs(0.1 * ratio)
    loss_BT, clipped_BT = policy_loss(logps_BT, logs(0.1).detach(), torch.tensor([advantage]), True, *CLIP)
    loss_BT.sum().backward()
    assert loss_BT.item() == pytest.approx(loss) and logps_BT.grad.item() == pytest.approx(gradient)
    assert clipped_BT.item() == clipped


def test_kl_by_hand():
    # ref / pi = 2: 2 - log 2 - 1; its derivative by logp is -(2 - 1)
    logps_BT = logs(0.25)
    kl_BT = kl_to_reference(logps_BT, logs(0.5).detach())
    kl_BT.sum().backward()
    assert kl_BT.item() == pytest.approx(1 - math.log(2)) and logps_BT.grad.item() == pytest.approx(-1.0)


def test_kl_is_the_mean_over_what_the_policy_samples():
    pi, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    wanted = (pi * (pi / ref).log()).sum().item()
    assert (pi * kl_to_reference(pi.log(), ref.log())).sum().item() == pytest.approx(wanted, rel=1e-5)


def test_far_apart_log_probs_give_no_nan():
    logps_BT = torch.tensor([[-200.0, -1.0]], requires_grad=True)
    other = torch.tensor([[-1.0, -200.0]])
    loss_BT, _ = policy_loss(logps_BT, other, torch.tensor([-1.0]), True, *CLIP)
    (loss_BT + kl_to_reference(logps_BT, other)).sum().backward()
    assert logps_BT.grad.isfinite().all() and loss_BT.isfinite().all()


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        ("sum", (1 + 2 + 3 + 10) / 4),  # tokens summed, a mean over the step's 4 completions
        ("seq", (2 + 10) / 4),  # each completion's mean
        ("token", (1 + 2 + 3 + 10) / 40),  # over the step's 40 tokens
    ],
)
def test_denominators_by_hand(norm, wanted):
    """Two of a step's four completions: token losses 1, 2, 3 and 10."""
    weight_B = token_weight(norm, torch.tensor([3, 1]), 4, 40)
    assert (torch.tensor([6.0, 10.0]) * weight_B).sum().item() == pytest.approx(wanted)


@pytest.mark.parametrize("norm", ["seq", "token", "sum"])
def test_an_empty_completion_adds_0_and_no_nan(norm, policy, device, prompts):
    batch, logps_BT, _ = forward(policy, [(prompts[0], [[]]), (prompts[1], [[5, 6]])])
    mask_BT = batch.mask_BT
    loss_BT, _ = policy_loss(logps_BT, logps_BT.detach(), torch.tensor([1.0, -1.0]), False, *CLIP)
    weight_B = token_weight(norm, mask_BT.sum(-1), 2, 2)
    loss_B = ((loss_BT + kl_to_reference(logps_BT, logps_BT.detach())) * mask_BT).sum(-1) * weight_B
    loss_B.sum().backward()
    assert loss_B[0].item() == 0 and loss_B[1].item() == pytest.approx(
        {"sum": 1, "seq": 0.5, "token": 1}[norm]
    )
    norm = clip_gradients(policy, 1.0)
    assert math.isfinite(norm) and norm > 0
