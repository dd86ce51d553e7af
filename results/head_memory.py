"""Peak memory of log-probs, forward and backward: in chunks (policy.py) against the whole log_softmax.

    python results/head_memory.py            # 8 sequences of 512 tokens, 49,152 ids, hidden 576, 2 layers

Each way runs in a process of its own; the figure is the peak above what stood before the forward (weights and
gradients), of the process on a CPU and of the allocator on a GPU.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import processes
from data import Completion, Row
from loading import load_policy
from packing import Example, Sequence, collate


def measure(way: str, model: str, sequences: int, tokens: int, vocab: int, answer) -> None:
    _, _, device = processes.start()
    if way == "chunked":
        policy = load_policy(model, device, vocab, 1.0)
    else:
        lm = AutoModelForCausalLM.from_pretrained(model).to(device)
    ids_BL = torch.randint(0, 1000, (sequences, tokens), device=device)

    def step(ids_BL):
        if way == "chunked":
            rows = [
                Example(
                    Row("", ids[:1], None, None), [Completion(ids[1:], [0.0] * len(ids[1:]), "", "stop", 0)]
                )
                for ids in ids_BL.tolist()
            ]
            logps_BT, _ = policy(collate([Sequence(row, [0]) for row in rows], policy))
        else:
            logits_BTV = lm(input_ids=ids_BL).logits[:, :-1].float()
            logps_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BL[:, 1:, None]).squeeze(-1)
        logps_BT.sum().backward()

    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    step(ids_BL[:1, :8])  # gradients exist from here on
    before = torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else peak()
    step(ids_BL)
    answer.put(peak() - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--vocab", type=int, default=49152)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as model:
        shape = {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 2,
            "num_attention_heads": 9,
        }
        LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab, **shape)).save_pretrained(model)
        peaks = {}
        for way in ("chunked", "whole"):
            answer = context.Queue()
            sizes = (args.sequences, args.tokens, args.vocab)
            process = context.Process(target=measure, args=(way, model, *sizes, answer))
            process.start()
            peaks[way] = answer.get(timeout=300)
            process.join()
            print(f"{way:8} {peaks[way]:7.0f} MiB")
    print(f"ratio    {peaks['chunked'] / peaks['whole']:7.2f}")


if __name__ == "__main__":
    main()
