"""GRPO without clip and without the ratio to the sampler, however old the completions are: the loss of the
paper's original code, exp(logp - stop_gradient(logp)) A: python -m results.no_ratio --sync-steps 10
"""

import torch

import processes
import train_grpo


def policy_loss(logps_BT, sampler_BT, adv_B, **clip):
    gain_BT = (logps_BT - logps_BT.detach()).exp() * adv_B[:, None]
    return -gain_BT, torch.zeros_like(logps_BT, dtype=torch.bool)


train_grpo.policy_loss = policy_loss
if __name__ == "__main__":
    processes.launch(train_grpo.main)
