"""The DPO loss and the choice of pairs, against values worked out by hand."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from train_dpo import dpo_loss, pick_pair


def answers(*rewards):
    return [SimpleNamespace(reward=reward, ids=[i]) for i, reward in enumerate(rewards)]


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


def test_a_pair_is_a_right_and_a_wrong_answer_and_depends_on_the_seed_alone():
    group = answers(0, 1, None, 1, 0, 0)
    drawn = [pick_pair(group, random.Random(seed)) for seed in range(200)]
    assert {chosen.ids[0] for chosen, _ in drawn} == {1, 3}
    assert {rejected.ids[0] for _, rejected in drawn} == {0, 4, 5}
    assert pick_pair(group, random.Random(7)) == pick_pair(group, random.Random(7))


@pytest.mark.parametrize("rewards", [(1, 1), (0, 0), (None, 1), (None, None), ()])
def test_no_pair_without_both(rewards):
    assert pick_pair(answers(*rewards), random.Random(0)) is None
