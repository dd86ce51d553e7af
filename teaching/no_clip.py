"""GRPO with nothing that bounds its ratio: torchrun -m teaching.no_clip --sync-steps 100"""

import processes
import train_grpo


def policy_loss(logps_BT, sampler_BT, adv_B, stale, clip_low, clip_high, is_cap):
    ratio_BT = (logps_BT - sampler_BT).exp()
    clipped_BT = ratio_BT < 0  # none is
    return -ratio_BT * adv_B[:, None], clipped_BT


train_grpo.policy_loss = policy_loss
if __name__ == "__main__":
    processes.launch(train_grpo.main)
