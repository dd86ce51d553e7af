"""Kills a run again and again, and counts what was lost: `python tests/kills.py --kills 30`.

One run is killed (SIGKILL, all its processes at once) at random moments from its start on, and each time goes
on with --resume auto. In the end it must be what it would have been. After every kill: is each line of its
files whole, was a damaged checkpoint found, how many steps are to be done again?
"""

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


def get_args():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--script", default="train_dpo.py")
    add("--kills", type=int, default=30)
    add("--ranks", type=int, default=1)
    add("--sampler", default="hf")
    add("--sync-steps", default="10")
    add("--save-every", type=int, default=2)
    add("--steps", type=int, default=120)
    add("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


def command(args, out: Path) -> list[str]:
    python = [sys.executable]
    if args.ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    flags = f"{ROOT / args.script} --steps {args.steps} --sync-steps {args.sync_steps}"
    flags += f" --out {out} --save-every {args.save_every} --sampler {args.sampler} --log-samples -1"
    flags += f" --eval-every 40 --prompts-per-step 8 --samples-per-prompt 4 --save-rollouts {out}.jsonl"
    return [*python, *flags.split(), "--resume", "auto"]


def torn(path: Path) -> int:
    """Lines that are not whole."""
    if not path.exists():
        return 0
    *whole, rest = path.read_bytes().split(b"\n")
    try:
        [json.loads(line) for line in whole]
    except ValueError:
        return 1
    return len(rest) > 0


def step_lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return sum(b'"loss"' in line for line in path.read_bytes().split(b"\n")) if path.exists() else 0


def main():
    args = get_args()
    moments = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp())
    began = time.monotonic()
    subprocess.run(command(args, folder / "straight"), check=True, capture_output=True)
    whole = time.monotonic() - began

    out, count, redone, resumed = folder / "killed", Counter(), [], []
    while count["kills"] < args.kills:
        console = folder / "console"
        console.unlink(missing_ok=True)
        with open(console, "ab") as log:
            process = subprocess.Popen(command(args, out), stdout=log, stderr=log, start_new_session=True)
        before, began = step_lines(out), time.monotonic()
        # a third may hit the start, a third comes while a window is sampled, where the run begins with that
        kind = moments.choice(["start", "sampling", "steps"])
        if kind == "start":
            time.sleep(moments.uniform(0, 10))
        else:
            signs = [b"reward="] + [b"sampling, up to"] * (kind == "sampling")  # a bar that has moved
            while process.poll() is None and not any(sign in console.read_bytes() for sign in signs):
                time.sleep(0.01)
            resumed.append(time.monotonic() - began)
            time.sleep(moments.uniform(0, 0.4 if kind == "sampling" else 1.5))
        if process.poll() is not None:
            break
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
        process.wait()
        count["kills"] += 1
        time.sleep(0.2)
        said = console.read_text(errors="replace")
        went_on = re.search(r"going on from \S*step-(\d+)", said)
        if went_on:
            count["resumed"] += 1
            redone.append(before - int(went_on[1]))
        if "Traceback" in said:
            count["traceback"] += 1
            print(said[said.index("Traceback") :][-3000:], file=sys.stderr)
        count["damaged"] += "damaged" in said or "bytes of" in said
        count["while saving"] += any(out.glob("checkpoints/*.partial"))
        last = re.split(r"[\r\n]", said.strip())[-1]
        count["while sampling"] += "sampling, up to" in last or any(out.glob("windows/*/*.partial"))
        count["torn lines"] += sum(
            map(torn, (out / "metrics.jsonl", out / "samples.jsonl", Path(f"{out}.jsonl")))
        )
        count["before the first checkpoint"] += not any(out.glob("checkpoints/step-*[0-9]"))
        print(f"kill {count['kills']}: at step {step_lines(out)}", file=sys.stderr, flush=True)
    subprocess.run(command(args, out), check=True, capture_output=True)

    def metrics(run: Path) -> list[dict]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in m.items() if not k.startswith(("time/", "tokens_per"))} for m in lines]

    same = {"metrics": metrics(folder / "straight") == metrics(out)}
    for name in ("straight/samples.jsonl", "straight/model/model.safetensors", "straight.jsonl"):
        same[name.split("/")[-1]] = (folder / name).read_bytes() == (
            folder / name.replace("straight", "killed")
        ).read_bytes()
    print(f"{' '.join(sys.argv)}: straight run {whole:.0f} s")
    for name, number in count.items():
        print(f"{name:30} {number}")
    print(f"{'steps done again':30} at most {max(redone)}, median {statistics.median(redone)}")
    print(f"{'seconds until a step after start':30} median {statistics.median(resumed):.1f}")
    print(f"{'as if never killed':30} {same}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
