"""SimPO (arXiv 2405.14734): no reference, mean log-probs, a target margin: torchrun -m teaching.simpo"""

import sys

import processes
import train_dpo


def dpo_loss(chosen_P, rejected_P, _ref_chosen_P, _ref_rejected_P, beta, target=0.5):
    return -train_dpo.F.logsigmoid(beta * (chosen_P - rejected_P) - target)


train_dpo.dpo_loss, train_dpo.needs_reference = dpo_loss, lambda args: False
if __name__ == "__main__":  # what the script logs of implicit rewards is then 0
    processes.launch(lambda: train_dpo.main(["--length-normalize", *sys.argv[1:]]))
