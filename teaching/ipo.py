"""IPO (arXiv 2310.12036, eq. 17): a margin of 1 / (2 beta), no more and no less: torchrun -m teaching.ipo"""

import processes
import train_dpo


def dpo_loss(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta):
    margin_P = (chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)
    return (margin_P - 1 / (2 * beta)) ** 2


train_dpo.dpo_loss = dpo_loss
if __name__ == "__main__":
    processes.launch(train_dpo.main)
