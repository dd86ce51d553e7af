"""How far the policy has moved from the model that it began as: python -m results.kl dpo --sync-steps 10
(dpo or grpo, then the script's flags; one process). Each validation logs eval/kl beside what it logs anyway.

eval/kl is KL(policy || start) in nats an answer: the mean of log policy - log start over the validation's
answers, which the policy has just written.
"""

import copy
import sys

import torch

import processes
import train_dpo
import train_grpo
import validate
from packing import Example, micro_batches


class Validation(validate.Validation):
    """A validation that comes between its scorer and itself, to see the answers."""

    def __init__(self, prompts, args, *, scorer, policy, **rest):
        super().__init__(prompts, args, scorer=self, policy=policy, **rest)
        self.real, self.start = scorer, copy.deepcopy(policy)

    @torch.no_grad()
    def score(self, groups: list):
        self.real.score(groups)
        total, examples = 0.0, [Example(row, completions) for row, completions in groups]
        for batch in micro_batches(examples, self.start, self.args.micro_batch_tokens):
            gaps_BT = batch.sampler_BT - self.start(batch)[0]
            total += gaps_BT[batch.mask_BT].sum().item()
        self.run.record({"step": self.sampler.version, "eval/kl": total / len(groups)})


train_dpo.Validation = train_grpo.Validation = Validation
if __name__ == "__main__":
    script = {"dpo": train_dpo, "grpo": train_grpo}.get(sys.argv[1] if len(sys.argv) > 1 else None)
    if not script:
        sys.exit(__doc__)
    processes.launch(lambda: script.main(sys.argv[2:]))
