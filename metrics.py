"""What a step and a validation are summed up by: sums over completions and ranks, then metrics."""

import math
import time
import zlib
from collections import defaultdict

import torch
import torch.distributed as dist

from processes import over_ranks
from rewards import OPEN_ENDED

GROUP_SUMS = "groups equal std scored reward completions length cut age".split()


class Sums:
    """What one step, or one validation, adds up, and the seconds of its parts.

    kinds: of rewards that any rank's rows have; each has sums of its own. Every rank adds the same names, and
    `reduce` makes the sums those of all ranks; it comes once, last.
    """

    def __init__(self, kinds: list[str]):
        self.kinds = kinds
        self.sums: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.notes: dict[str, float] = {}  # metrics of this rank alone
        self.began = self.mark = time.perf_counter()

    def add(self, **values):
        """values: numbers, or tensors of one element, for which nothing waits before `reduce`."""
        for name, value in values.items():
            self.sums[name] += value.detach().double() if isinstance(value, torch.Tensor) else value

    def __getitem__(self, name: str) -> float:
        return self.sums[name]

    def lap(self, part: str):
        """The time since the last lap, or the beginning, belongs to this part of the step."""
        now = time.perf_counter()
        self.seconds[part] += now - self.mark
        self.mark = now

    def reduce(self):
        """Adds up over ranks; collective. Raises RuntimeError where ranks have added up different things."""
        names = sorted(self.sums)
        checksum = zlib.crc32(" ".join(names).encode())
        if over_ranks(checksum) != [checksum * dist.get_world_size()]:
            raise RuntimeError(f"every rank must add the same names to its sums; this one has {names}")
        self.sums.update(zip(names, over_ranks(*(float(self.sums[name]) for name in names)), strict=True))

    def add_groups(self, step: int, groups: list):
        """(row, completions) groups with their rewards; `step` is now, from which their age counts."""
        for name in GROUP_SUMS:  # also of a rank without groups, or without a kind
            self.add(**{name: 0}, **{f"{name}/{kind}": 0 for kind in self.kinds})
        for row, completions in groups:
            scored = [c.reward for c in completions if c.reward is not None]
            mean = sum(scored) / max(1, len(scored))
            sums = {
                "groups": 1,
                "equal": len(set(scored)) < 2,
                "std": math.sqrt(sum((r - mean) ** 2 for r in scored) / max(1, len(scored))),
                "scored": len(scored),
                "reward": sum(scored),
                "completions": len(completions),
                "length": sum(len(c.ids) for c in completions),
                "cut": sum(c.finish == "length" for c in completions),
                "age": sum(step - c.version for c in completions),
            }
            self.add(**sums, **{f"{name}/{row.reward}": value for name, value in sums.items()})

    def metrics(self, pool: int) -> dict[str, float]:
        """The metrics that both algorithms log, after `reduce`; GUIDE.md explains each. pool: bytes of the
        sampler's memory, which torch goes on counting while it sleeps.
        """
        scored, completions, groups = (max(1, self[name]) for name in ("scored", "completions", "groups"))
        seconds = {f"time/{part}": seconds for part, seconds in self.seconds.items()}
        metrics = self.notes | seconds | {
            "time/step": self.mark - self.began,
            "reward": self["reward"] / scored,
            "reward_std": self["std"] / groups,
            "frac_reward_zero_std": self["equal"] / groups,
            "rewards/failed": round(self["completions"] - self["scored"]),
            "completions/length": self["length"] / completions,
            "completions/clipped_ratio": self["cut"] / completions,
            "sync/age": self["age"] / completions,
            "entropy": self["entropy"] / max(1, self["tokens"]),
        }  # fmt: skip
        for kind in self.kinds:
            if self[f"scored/{kind}"]:
                metrics[f"reward/{kind}"] = self[f"reward/{kind}"] / self[f"scored/{kind}"]
        if self["sampled"]:  # steps whose completions were sampled before have nothing to sample
            metrics["tokens_per_second/sample"] = self["sampled"] / self.seconds["sample"]
        if self["tokens_used"]:
            metrics["tokens_per_second/update"] = self["tokens_used"] / self.seconds["update"]
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            metrics["memory/held_gib"] = (total - free) / 2**30
            metrics["memory/peak_gib"] = (torch.cuda.max_memory_allocated() - pool) / 2**30
            torch.cuda.reset_peak_memory_stats()
        return metrics

    def validation_metrics(self) -> dict[str, float]:
        """After `reduce`: eval/accuracy over rows with a verifier, eval/reward over the others; the reward
        also over the mean length of these completions, by which the paper selects chat checkpoints (section
        3.1).
        """
        metrics = {}
        kinds = {kind for kind in self.kinds if self[f"scored/{kind}"]}
        for metric, part in (
            ("eval/accuracy", kinds - OPEN_ENDED.keys()),
            ("eval/reward", kinds & OPEN_ENDED.keys()),
        ):
            if part:
                total = sum(self[f"reward/{kind}"] for kind in part)
                metrics[metric] = total / sum(self[f"scored/{kind}"] for kind in part)
        if "eval/reward" in metrics:
            tokens = sum(self[f"length/{kind}"] for kind in kinds & OPEN_ENDED.keys())
            completions = sum(self[f"completions/{kind}"] for kind in kinds & OPEN_ENDED.keys())
            metrics["eval/reward_per_token"] = metrics["eval/reward"] / max(1.0, tokens / completions)
        length = self["length"] / max(1, self["completions"])
        return metrics | {"eval/length": length, "eval/prompts": round(self["scored"])}


def headline(metrics: dict[str, float]) -> tuple[str, float]:
    """What a validation is summed up by: accuracy where anything is verifiable, else the mean reward."""
    name = "reward" if "eval/reward" in metrics and "eval/accuracy" not in metrics else "accuracy"
    return name, metrics.get(f"eval/{name}", math.nan)
