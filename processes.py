"""The ranks of a run, one per GPU, which torchrun starts, or a single one: how they start, agree and end."""

import contextlib
import itertools
import os
import sys
import threading
import time
from argparse import ArgumentError
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = timedelta(minutes=60)  # of a collective: ranks wait for the one that samples longest


def start() -> tuple[int, int, torch.device]:
    """Joins the process group that torchrun describes (or a group of one); returns (rank, world size,
    device).
    """
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        gpus = f"this machine has {torch.cuda.device_count()} GPU(s), one for each rank"
        raise ArgumentError(None, f"rank {local} of this machine: {gpus}; lower torchrun's --nproc-per-node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            card = f"{torch.cuda.get_device_name(device)} has no bfloat16"
            raise ArgumentError(
                None, f"{card}, in which everything runs here: take a newer GPU (A100 or later)"
            )
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except ValueError as error:
            reason = f"{first_line(error)}; start several ranks with torchrun"
            raise ArgumentError(None, f"RANK is {os.environ['RANK']!r}: {reason}") from error
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_rank():
        transformers.logging.disable_progress_bar()
    return dist.get_rank(), dist.get_world_size(), device


def stop():
    if dist.is_initialized():  # vLLM's shutdown has taken it down already
        dist.destroy_process_group()


def device_mesh(device: torch.device, shard_ranks: int | None) -> DeviceMesh:
    """How parameters lie over the ranks: sharded over all, or over each `shard_ranks` neighbours (the GPUs of
    a node, say) and replicated over these groups. Raises ArgumentError where it does not divide the ranks.
    """
    world = dist.get_world_size()
    if not shard_ranks or shard_ranks == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % shard_ranks:
        raise ArgumentError(None, f"--shard-ranks {shard_ranks}: does not divide the {world} rank(s)")
    ranks = torch.arange(world).reshape(-1, shard_ranks)
    # groups of our own, because those of init_device_mesh have torch's time-out
    groups = [
        dist.new_subgroups_by_enumeration(part.tolist(), timeout=TIMEOUT)[0] for part in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward passes run in, the sampler's included; master weights and gradient sums are float32
    everywhere.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---- what ranks tell each other


def over_ranks(*values: float) -> list[float]:
    """The sum of each value over all ranks, in float64; collective."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(items: list, to: int | None = None) -> list:
    """The items of all ranks, in the order from which `[rank::world]` dealt them out, on every rank or on
    rank `to` alone; collective.
    """
    if dist.get_world_size() == 1:
        return list(items)
    parts = [None] * dist.get_world_size()
    if to is None:
        dist.all_gather_object(parts, items)
    else:
        dist.gather_object(items, parts if dist.get_rank() == to else None, dst=to)
    return interleave(parts) if parts[0] is not None else []


def interleave(parts: list[list]) -> list:
    """Puts together what `[rank::world]` dealt out."""
    return [item for deal in itertools.zip_longest(*parts) for item in deal if item is not None]


class Fault(Exception):
    """An error on one rank, told to all."""


def everywhere(work: Callable) -> list:
    """Runs `work` on every rank and returns the results of all; Fault on every rank where one of them fails,
    so that none waits for another that has left. Collective.
    """
    result, reason = None, None
    try:
        result = work()
    except (OSError, ValueError, CheckpointException) as error:
        reason = f"rank {dist.get_rank()}: {error_line(error)}"
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, reason))
    for _, reason in outcomes:
        if reason:
            raise Fault(reason)
    return [result for result, _ in outcomes]


def on_rank_0(work: Callable):
    """Runs `work` on rank 0; its result, or a Fault if it fails, comes to every rank. Collective."""
    return everywhere(lambda: None if dist.get_rank() else work())[0]


# ---- how a process ends


def error_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # it holds the ranks' own errors
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error: BaseException | str) -> str:
    return str(error).strip().split("\n")[0][:200]


@contextlib.contextmanager
def naming(where: str, form: str = ": {}"):
    """Whatever is raised inside, by a library for one, becomes an ArgumentError of one line: `where`, and the
    reason in `form`.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ArgumentError(
            None, where + form.format(kind + first_line(getattr(error, "msg", error)))
        ) from error


def complain(text: str):
    """Writes to stderr, below the progress bar, whose line is open."""
    print(f"\n{text}", file=sys.stderr, flush=True)


def fail(message: str):
    """A user's mistake: one line, exit code 2. Where the first rank of a machine finds it too, torchrun ends
    the others before they repeat it.
    """
    time.sleep(5 * (os.environ.get("LOCAL_RANK", "0") != "0"))
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def launch(main: Callable):
    """Runs main() and turns a user's mistake, wherever it is found, into one line and exit code 2. A rank
    that has lost another one says so in a line and ends at once.
    """
    try:
        main()
    except ArgumentError as error:
        fail(str(error))
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except Fault as error:
        complain(f"stopped: {error}")
        sys.exit(1)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        complain(error.code)
        sys.exit(1)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = f"another rank has left ({first_line(error)})"  # or the network, or the driver, failed here
        complain(f"rank {os.environ.get('RANK', 0)} ends too: {reason}")
        deadline = threading.Timer(10, os._exit, [1])  # closing what is shared with that rank may wait for it
        deadline.daemon = True
        deadline.start()
        sys.exit(1)
