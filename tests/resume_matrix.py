"""Runs that are cut off and go on, against runs that are not: `torchrun tests/resume_matrix.py DIRECTORY`.

All in one process for each rank, since starting one takes longer than a run. Prints a line for each pair.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import processes
import train_dpo
import train_grpo
import window

SUMS = Path(__file__).parent.parent / "toy" / "valid.jsonl"
STEPS = 7
CUTS = {"1": [3], "4": [2, 4, 5], "inf": [2, 5]}  # 4: inside a window, at its edge, inside the next
FLAGS = {
    train_dpo: ["--beta", "1"],
    train_grpo: ["--beta", "0.01", "--sync-ref"],
}


def argv(directory: Path, s: str) -> list[str]:
    flags = f"--steps {STEPS} --sync-steps {s} --prompts-per-step 5 --samples-per-prompt 4"
    flags += f" --eval-every 3 --save-every 1 --keep {STEPS} --log-samples -1 --sampler hf --warmup-steps 3"
    flags += f" --eval-data {directory}/valid.jsonl --data {SUMS}"
    return flags.split()


def main(directory: Path):
    rank, _, _ = processes.start()
    window.CHUNK = 3  # so that 4 steps and more are windows of several chunks, on disk
    processes.stop = lambda: None  # the ranks stay together from run to run
    for script, own in FLAGS.items():
        for s, cuts in CUTS.items():
            straight = directory / f"{script.__name__}-{s}"
            script.main([*argv(directory, s), *own, "--out", str(straight)])
            for cut in cuts:
                again = directory / f"{script.__name__}-{s}-{cut}"
                if rank == 0:  # as if the process had died some steps after it saved
                    shutil.copytree(straight, again, ignore=shutil.ignore_patterns("model"))
                    for later in range(cut + 1, STEPS + 1):
                        shutil.rmtree(again / "checkpoints" / f"step-{later:06d}")
                    with open(again / "metrics.jsonl", "a") as metrics:
                        metrics.write('{"step": 9, "lo')
                torch.distributed.barrier()
                script.main([*argv(directory, s), *own, "--out", str(again), "--resume", "auto"])


if __name__ == "__main__":
    processes.launch(lambda: main(Path(sys.argv[1])))
