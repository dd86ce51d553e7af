"""Four ranks, two replicas of two shards, which test_policy.py starts.

Rank 0 alone reads a model, also one with tied matrices and buffers; each rank then computes what the plain
model does. Gradients are added up over replicas once a step.
"""

import json
import tempfile
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import TOY, example, forward
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

import loading
import processes
from loading import load_policy
from packing import micro_batches
from policy import local

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
GROUP = ([5, 6, 7], [[8, 9, 3], [9, 9, 9, 3]])


def check_forward(model: str, device, mesh):
    policy = load_policy(model, device, 64, 1.0, mesh=mesh)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    _, logps_BT, _ = forward(policy, [GROUP])
    for completion, logps_T in zip(GROUP[1], logps_BT.tolist(), strict=True):
        logits_TV = plain(torch.tensor([GROUP[0] + completion])).logits[0, len(GROUP[0]) - 1 : -1]
        wanted = logits_TV.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        assert logps_T[: len(completion)] == pytest.approx(wanted.tolist(), abs=1e-5)


def gradients(policy, every_time: bool) -> tuple[torch.Tensor, int]:
    """This rank's shards of the gradient of several micro-batches, and the all-reduces that they took."""
    calls, real = [], dist.all_reduce
    _fsdp_collectives.dist.all_reduce = lambda *args, **more: calls.append(1) or real(*args, **more)
    examples = [example([5, 6, 7 + i], GROUP[1]) for i in range(8)]
    policy.zero_grad()
    for batch in micro_batches(examples, policy, 16):
        if every_time:
            policy.set_requires_all_reduce(True)
        logps_BT, _ = policy(batch)
        logps_BT.sum().backward()
    _fsdp_collectives.dist.all_reduce = real
    return torch.cat([local(p.grad).flatten() for p in policy.parameters()]), len(calls)


def main(directory: str):
    rank, _, device = processes.start()
    mesh = processes.device_mesh(device, 2)
    for group in mesh.get_all_groups():
        assert group.size() == 2 and group._get_backend(device).options._timeout == timedelta(hours=1)
    directory = processes.gather([directory])[0]
    for kind in (Gemma2Config, Qwen2Config):
        config = kind(**SHAPE, tie_word_embeddings=True, **({"head_dim": 16} if kind is Gemma2Config else {}))
        if rank == 0:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        with mock.patch("loading._load_whole", wraps=loading._load_whole) as read:
            check_forward(directory, device, mesh)
        assert read.call_count == (rank == 0)
    if rank == 0:  # a config that says tied, beside files with two matrices, which then are not
        config = Qwen2Config(**SHAPE, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        said = json.loads((Path(directory) / "config.json").read_text()) | {"tie_word_embeddings": True}
        (Path(directory) / "config.json").write_text(json.dumps(said))
    dist.barrier()
    check_forward(directory, device, mesh)
    policy = load_policy(str(TOY), device, 64, 1.0, mesh=mesh)
    once, calls = gradients(policy, every_time=False)
    always, more = gradients(policy, every_time=True)
    assert torch.equal(once, always) and once.abs().max() > 0
    assert more > 3 * calls > 0
    processes.stop()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(directory)
