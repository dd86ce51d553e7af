"""RLOO (arXiv 2402.14740), each completion against the others of its group: torchrun -m teaching.rloo"""

import processes
import train_grpo


def advantages(rewards, std_norm):
    known = [reward for reward in rewards if reward is not None]
    others = lambda reward: (sum(known) - reward) / (len(known) - 1)  # noqa: E731
    return [None if r is None or len(set(known)) < 2 else r - others(r) for r in rewards]


train_grpo.advantages = advantages
if __name__ == "__main__":
    processes.launch(train_grpo.main)
