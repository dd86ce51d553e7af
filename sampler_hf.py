"""A sampler on transformers, for wherever the policy runs and vLLM does not, and as the oracle of the tests.

Shapes: P prompts, B completions (n to a prompt), V vocabulary; L tokens of the longest prompt, then growing.
"""

import math

import torch
from transformers import AutoModelForCausalLM

from data import Completion
from sampler import Sampler
from sampler_check import SyncError

BATCH = (256, 2**17)  # most sequences, and most tokens of keys and values, in one call of transformers


class HFSampler(Sampler):
    """The interface of `VLLMSampler`, and its arguments; the engine's others mean nothing here."""

    def __init__(
        self, model: str, *, tokenizer, vocab, stop_ids, device, dtype, max_length: int, trust: bool, **_
    ):  # fmt: skip
        self.lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust)
        self.lm.to(device).requires_grad_(False)
        self.tokenizer, self.vocab, self.stop_ids = tokenizer, vocab, stop_ids
        self.dtype, self.version = dtype, 0
        self.sequences = min(BATCH[0], BATCH[1] / max_length)
        self.capacity = f"{BATCH[0]} sequences, or {BATCH[1]:,} tokens, at one time on each rank"

    def generate(self, prompts, n, max_new_tokens, temperature, seed, top_p=1.0) -> list[list[Completion]]:
        self.check_awake()
        torch.manual_seed(seed)
        sequences, tokens = BATCH
        longest = max(map(len, prompts), default=0) + max_new_tokens
        groups, size = [], max(1, min(sequences, tokens // longest) // n)
        for start in range(0, len(prompts), size):
            groups += self._generate(prompts[start : start + size], n, max_new_tokens, temperature, top_p)
        return groups

    @torch.no_grad()
    def _generate(self, prompts, n, max_new_tokens, temperature, top_p):
        width, device = max(map(len, prompts)), self.lm.device
        ids_PL = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask_PL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        position_PL = (mask_PL.cumsum(-1) - 1).clamp(min=0)
        out = self.lm(
            ids_PL, attention_mask=mask_PL, position_ids=position_PL, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values  # each prompt is read once, for all its completions
        cache.batch_repeat_interleave(n)
        logits_BV, mask_BL, position_B1 = (
            x.repeat_interleave(n, 0) for x in (out.logits[:, -1], mask_PL, position_PL[:, -1:])
        )
        stop = torch.tensor(self.stop_ids, device=device)
        ids, logps, going_B = [], [], torch.ones(len(mask_BL), dtype=torch.bool, device=device)
        while True:
            logp_BV = _log_softmax(logits_BV[:, : self.vocab], temperature, top_p)
            id_B1 = logp_BV.exp().multinomial(1) if temperature else logp_BV.argmax(-1, keepdim=True)
            ids.append(id_B1)
            logps.append(logp_BV.gather(-1, id_B1))
            going_B &= ~torch.isin(id_B1[:, 0], stop)
            if len(ids) == max_new_tokens or not going_B.any():
                break
            mask_BL, position_B1 = torch.cat([mask_BL, mask_BL[:, -1:]], -1), position_B1 + 1
            out = self.lm(
                id_B1, attention_mask=mask_BL, position_ids=position_B1, past_key_values=cache, use_cache=True
            )
            logits_BV = out.logits[:, -1]
        made = []
        for sampled, logp in zip(torch.cat(ids, -1).tolist(), torch.cat(logps, -1).tolist(), strict=True):
            end = next((t for t, i in enumerate(sampled) if i in self.stop_ids), None)
            length = len(sampled) if end is None else end + 1
            text = self.tokenizer.decode(sampled[:length], skip_special_tokens=True)
            finish = "length" if end is None else "stop"
            made.append(Completion(sampled[:length], logp[:length], text, finish, self.version))
        return [made[i : i + n] for i in range(0, len(made), n)]

    def reload(self, weights, version):
        mine = dict(self.lm.named_parameters())
        self.version = None
        for name, tensor in weights:
            if name not in mine or mine[name].shape != tensor.shape:
                raise SyncError(
                    f"at step {version} the sampler has no tensor {name} of shape {tuple(tensor.shape)}"
                )
            mine.pop(name).data.copy_(tensor)
        if mine:
            raise SyncError(f"the reload at step {version} left out {', '.join(list(mine)[:3])}")
        self.version = version

    def sleep(self):
        self.version = None

    def close(self):
        pass


def _log_softmax(logits_BV, temperature: float, top_p: float):
    """Of the distribution that is sampled from: the likeliest ids that together have `top_p`, renormalized.
    Temperature 0 is greedy, with the model's own log-probs.
    """
    logp_BV = (logits_BV.float() / (temperature or 1)).log_softmax(-1)
    if top_p == 1:
        return logp_BV
    sorted_BV, order_BV = logp_BV.sort(descending=True)
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()  # of the ids that are likelier
    out_BV = (before_BV >= top_p).scatter(-1, order_BV, before_BV >= top_p)
    return logp_BV.masked_fill(out_BV, -math.inf).log_softmax(-1)
