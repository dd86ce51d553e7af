"""Runs scripts in processes that are forked from this one: it has imported all they need, which takes longer
than a run of the toy. Reads jobs from stdin, a line of JSON each, and answers with their exit codes.

A forked process is as separate as any other, but for the seed of Python's hashes, which all of them share:
that no run depends on it is checked where tests start python and torchrun themselves.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy


def fork(job: dict, environment: dict) -> int:
    """Starts `python script flags`, or `python -m module flags`, and returns the number of the process."""
    name, is_file = job["script"], job["script"].endswith(".py")
    with open(os.devnull) as stdin, open(job["stdout"], "a") as stdout, open(job["stderr"], "a") as stderr:
        if sys.platform != "linux":  # a framework of macOS may not outlive a fork
            command = [sys.executable, *([name] if is_file else ["-m", name]), *job["flags"]]
            pipes = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
            return subprocess.Popen(command, cwd=job["cwd"], env=environment, **pipes).pid
        if child := os.fork():
            return child
        for descriptor, file in enumerate((stdin, stdout, stderr)):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(job["cwd"])
    signal.alarm(job["seconds"])
    numpy.random.seed()  # Python's own generator has a new seed by now, torch's is the same in every process
    sys.argv[1:] = job["flags"]
    if is_file:
        sys.argv[0], sys.path[0] = name, str(Path(name).parent)
        runpy.run_path(name, run_name="__main__")
    else:
        sys.path[0] = job["cwd"]
        runpy.run_module(name, run_name="__main__", alter_sys=True)  # which sets sys.argv[0]
    sys.exit()


def run(job: dict) -> int:
    """The exit code, or that of the first rank that fails. ranks 0: one process, which knows of no ranks."""
    with socket.socket() as held:  # its port is rank 0's to listen on, and nobody else's
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        running, first = set(), 0
        for rank in range(job["ranks"]):  # with what torchrun sets
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
            running.add(fork(job, job["environment"] | address | ranks))
        if not job["ranks"]:
            running.add(fork(job, job["environment"]))
        while running:
            child, status = os.wait()
            running.remove(child)
            first = first or os.waitstatus_to_exitcode(status)
            for other in running if first else ():
                os.kill(other, signal.SIGKILL)
        return first


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)
    for module in ("train_dpo", "train_grpo", "evaluate", "sampler_hf"):
        importlib.import_module(module)
    importlib.import_module("transformers.models.llama.modeling_llama")
    gc.freeze()  # else each process would look through all that is imported once more when it ends
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)
