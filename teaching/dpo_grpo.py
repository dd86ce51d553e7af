"""GroupDPO with a GRPO loss beside it (paper, B.2): torchrun -m teaching.dpo_grpo --grpo-weight 0.01"""

import sys

import torch

import flags
import processes
import train_dpo
from train_grpo import advantages, kl_to_reference

KL_WEIGHT = 0.001
plain_flags, plain_examples, plain_loss = train_dpo.add_flags, train_dpo.make_examples, train_dpo.batch_loss


def add_flags(add):
    plain_flags(add)
    add("--grpo-weight", type=flags.positive, default=0.01, help="of the GRPO loss; paper: 0.01, 0.001")


def make_examples(groups, step, args):
    examples = plain_examples(groups, step, args)
    for example in examples:
        example.advantages = advantages([c.reward for c in example.completions], std_norm=True)
    return examples


def batch_loss(batch, logps_BT, ref_BT, entropy_BT, chosen_length, args):
    loss, logged = plain_loss(batch, logps_BT, ref_BT, entropy_BT, chosen_length, args)
    gain_BT = (logps_BT - logps_BT.detach()).exp() * batch.advantage_B[:, None]
    grpo_B = ((KL_WEIGHT * kl_to_reference(logps_BT, ref_BT) - gain_BT) * batch.mask_BT).sum(-1)
    share_B = torch.tensor([1 / len(example.used) for example, _ in batch.origin_B], device=grpo_B.device)
    return loss + args.grpo_weight * (grpo_B * share_B).sum(), logged


train_dpo.add_flags, train_dpo.make_examples, train_dpo.batch_loss = add_flags, make_examples, batch_loss
if __name__ == "__main__":
    processes.launch(lambda: train_dpo.main(["--all-pairs", *sys.argv[1:]]))
