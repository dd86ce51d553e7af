"""GroupDPO with a GRPO loss beside it (paper, appendix B.2): torchrun -m teaching.dpo_grpo --grpo-weight 0.01

The three functions of train_dpo.py that change stand here, each around the one it replaces.
"""

import sys

import torch

import flags
import processes
import train_dpo
from train_grpo import advantages, kl_to_reference


def add_flags(add, declare=train_dpo.add_flags):
    declare(add)
    add("--grpo-weight", type=flags.positive, default=0.01, help="of the GRPO loss; paper: 0.01, 0.001")


def make_examples(groups, step, args, make=train_dpo.make_examples):
    examples = make(groups, step, args)
    for example in examples:
        example.advantages = advantages([c.reward for c in example.completions], std_norm=True)
    return examples


def batch_loss(batch, logps_BT, ref_BT, *more, dpo=train_dpo.batch_loss):
    loss, implicit_B = dpo(batch, logps_BT, ref_BT, *more)
    gain_BT = (logps_BT - logps_BT.detach()).exp() * batch.advantage_B[:, None]
    grpo_B = ((0.001 * kl_to_reference(logps_BT, ref_BT) - gain_BT) * batch.mask_BT).sum(-1)
    share_B = torch.tensor([1 / len(example.read) for example, _ in batch.origin_B], device=grpo_B.device)
    args = more[-1]
    return loss + args.grpo_weight * (grpo_B * share_B).sum(), implicit_B


train_dpo.add_flags, train_dpo.make_examples, train_dpo.batch_loss = add_flags, make_examples, batch_loss
if __name__ == "__main__":
    processes.launch(lambda: train_dpo.main(["--all-pairs", *sys.argv[1:]]))
