"""How good the policy is now: held-out prompts, a completion each, with its newest weights."""

import torch.distributed as dist

from metrics import Sums, headline
from sampler import sample
from sampler_check import self_test

SHOWN = 3  # of the completions, on the console
ENDS = (80, 200)  # characters of a prompt and of a completion that are shown, their last ones


class Validation:
    """Scores the policy on `prompts.valid` after every --eval-every steps, and after the last one."""

    def __init__(self, prompts, args, *, sampler, policy, scorer, run):
        self.prompts, self.args = prompts, args
        self.sampler, self.policy, self.scorer, self.run = sampler, policy, scorer, run

    def due(self, steps: int) -> bool:
        """Whether it comes after so many steps."""
        every = self.args.eval_every
        return every > 0 and (steps % every == 0 or steps == self.args.steps)

    def __call__(self, step: int) -> tuple[str, float]:
        """Returns the name of the score (accuracy, or reward where nothing is verifiable) and its mean."""
        sampler, rows = self.sampler, self.prompts.valid[dist.get_rank() :: dist.get_world_size()]
        reloaded = sampler.follow(self.policy, step)
        groups = sample(sampler, rows, 1, self.args, "valid", step)
        if reloaded:
            self_test(sampler, self.policy, groups)
        self.scorer.score(groups)
        sums = Sums(self.prompts.kinds)
        sums.add_groups(step, groups)
        sums.reduce()
        metrics = sums.validation_metrics()
        self.run.record({"step": step, **metrics})
        name, score = headline(metrics)
        self.run.say(f"step {step}: validation {name} {score:.3f} on {metrics['eval/prompts']} prompts")
        for row, [c] in groups[:SHOWN]:
            prompt, text = _end(row.messages[-1]["content"], ENDS[0]), _end(c.text, ENDS[1])
            self.run.say(f"    reward {c.reward}   {prompt!r} -> {text!r}")
        return name, score


def _end(text: str, length: int) -> str:
    return text if len(text) <= length else f"...{text[-length:]}"
