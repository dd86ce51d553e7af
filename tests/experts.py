"""A mixture of experts in vLLM: python tests/experts.py Qwen3MoeConfig (test_sampler.py runs it).

transformers joins a layer's experts into one tensor; a model's files, and so vLLM, name each, in one of two
ways.
"""

import re
import sys
import tempfile

import pytest
import torch
import transformers
from conftest import TOY, engine
from transformers import AutoModelForCausalLM, AutoTokenizer

import processes
from loading import load_policy
from sampler import load_sampler
from sampler_check import SyncError


def lying(noted: dict, sent: dict):
    """Pairs whose tensors are overwritten by others after they were noted, as a wrong loader would."""
    for name, tensor in noted.items():
        box = tensor.clone()
        yield name, box
        box.copy_(sent[name])


def main(family: str, directory: str):
    device, tokenizer = processes.start()[2], AutoTokenizer.from_pretrained(TOY)
    mixtral = {"num_local_experts": 4}
    more = mixtral if family == "MixtralConfig" else {"num_experts": 4, "moe_intermediate_size": 64}
    config = getattr(transformers, family)(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts_per_tok=2, eos_token_id=3, sliding_window=None,
        max_position_embeddings=128, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    policy = load_policy(directory, device, len(tokenizer), 1.0)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    sampler = load_sampler("vllm", directory, **engine(tokenizer, device, max_length=64))
    prompt = tokenizer("<|user|>1+2=<|assistant|>", add_special_tokens=False)["input_ids"]

    for version in (1, 2):  # what vLLM has packed at one reload must not stay at the next
        with torch.no_grad():
            for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
                change = 1 + 0.5 * torch.randn(p.shape)
                p.mul_(change)
                q.mul_(change)
        sampler.reload(policy.full_weights(torch.float32, as_in_files=True), version)
        [[completion]] = sampler.generate([prompt], 1, 24, 1.0, 0)
        logits_LV = plain(torch.tensor([prompt + completion.ids])).logits[0]
        logps_TV = logits_LV[len(prompt) - 1 : -1].log_softmax(-1)
        wanted_T = logps_TV.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.logps == pytest.approx(wanted_T.tolist(), abs=1e-4)

    sent = {n: t.clone() for n, t in policy.full_weights(torch.float32, as_in_files=True)}
    one, other = (n for n in sent if re.search(r"layers\.1\..*experts\.[23]\.(up_proj|w3)", n))
    with pytest.raises(SyncError, match=f"{re.escape(other)}: it was not among the tensors"):
        sampler.reload([(n, t) for n, t in sent.items() if n != other], 3)
    with pytest.raises(SyncError, match=f"({re.escape(one)}|{re.escape(other)}): entries differ"):
        sampler.reload(lying(sent, sent | {one: sent[other], other: sent[one]}), 3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(sys.argv[1], directory)
