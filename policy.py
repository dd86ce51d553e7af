"""The model that is trained: FSDP2 shards, log-probs in chunks, the reference, whole weights one by one.

Shapes: R rows of L tokens; B completions of at most T tokens; N tokens of all completions (packing.py);
H hidden size; V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from packing import MicroBatch
from processes import compute_dtype

# logits that exist at one time: 261 tokens of Llama 3's vocabulary, on a GPU 1,046, since each chunk of the
# backward pass reads and writes the whole gradient of the output matrix
CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**27}


class TokenLogps(torch.autograd.Function):
    """Log-prob and entropy of each token, without the logits of all of them at once.

    Forward and backward go through the tokens in chunks; the backward pass computes a chunk's logits again:
        d logp / d logits = onehot - p,    d entropy / d logits = -p (log p + entropy),    both / temperature
    cap: None, or the bound c of a model whose logits are c tanh(logits / c): gemma 2's.
    """

    @staticmethod
    def forward(ctx, hidden_NH, head_VH, target_N, vocab: int, temperature: float, cap: float | None = None):
        logp_N, entropy_N = (torch.empty(len(target_N), device=target_N.device) for _ in range(2))
        for n in TokenLogps.chunks(target_N, head_VH[:vocab]):
            logp_nV = TokenLogps.logits(hidden_NH[n], head_VH[:vocab], temperature, cap)
            logp_nV.sub_(logp_nV.logsumexp(-1, keepdim=True))
            logp_N[n] = logp_nV.gather(-1, target_N[n, None]).squeeze(-1)
            entropy_N[n] = -logp_nV.exp().mul_(logp_nV).sum(-1)
        ctx.save_for_backward(hidden_NH, head_VH, target_N, entropy_N)
        ctx.vocab, ctx.temperature, ctx.cap = vocab, temperature, cap
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_N, grad_entropy_N):
        hidden_NH, head_VH, target_N, entropy_N = ctx.saved_tensors
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_head_VH = torch.zeros_like(head_VH, dtype=torch.float32)  # in bfloat16 a sum of chunks drifts
        for n in TokenLogps.chunks(target_N, head_VH[: ctx.vocab]):
            logp_nV = TokenLogps.logits(hidden_NH[n], head_VH[: ctx.vocab], ctx.temperature, ctx.cap)
            slope_nV = ctx.cap and 1 - (logp_nV * (ctx.temperature / ctx.cap)).square_()  # of tanh
            logp_nV.sub_(logp_nV.logsumexp(-1, keepdim=True))
            p_nV, grad_logp_n1 = logp_nV.exp(), grad_logp_N[n, None]
            grad_nV = logp_nV.add_(entropy_N[n, None]).mul_(-grad_entropy_N[n, None])  # in place: it is large
            grad_nV.sub_(grad_logp_n1).mul_(p_nV).scatter_add_(-1, target_N[n, None], grad_logp_n1)
            if ctx.cap:
                grad_nV.mul_(slope_nV)
            grad_nV = grad_nV.div_(ctx.temperature).to(head_VH.dtype)
            grad_hidden_NH[n] = grad_nV @ head_VH[: ctx.vocab]
            grad_head_VH[: ctx.vocab] += grad_nV.T @ hidden_NH[n]
        return grad_hidden_NH, grad_head_VH.to(head_VH.dtype), None, None, None, None

    @staticmethod
    def chunks(target_N, head_VH) -> list[slice]:
        size = max(1, CHUNK_LOGITS[head_VH.device.type] // len(head_VH))
        return [slice(start, start + size) for start in range(0, len(target_N), size)]

    @staticmethod
    def logits(hidden_nH, head_VH, temperature: float, cap: float | None):
        logits_nV = torch.nn.functional.linear(hidden_nH, head_VH).float()
        if cap:
            logits_nV.div_(cap).tanh_().mul_(cap)
        return logits_nV.div_(temperature)


class Policy(nn.Module):
    """A causal language model whose forward returns log-probs instead of logits.

    The projection onto the vocabulary runs inside this module's forward on purpose: FSDP2 gathers a module's
    parameters only while its forward runs, and the output matrix belongs to the root.
    """

    def __init__(self, lm: nn.Module, vocab: int, temperature: float):
        super().__init__()
        self.lm, self.vocab = lm, vocab
        config = lm.config.get_text_config()
        self.hidden_size = config.hidden_size
        # After the output matrix cohere multiplies the logits, granite divides them, gemma 2 caps them. A
        # factor is one more temperature. `_check_family` refuses families that do something else.
        factor = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None)
        self.temperature, self.cap = temperature / factor, cap and cap / factor
        # whether a row can hold several completions: every layer has full attention and takes any mask
        layers = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None)]
        self.shares = config._attn_implementation == "sdpa" and set(layers) <= {"full_attention", None}

    def sum_over_replicas(self, now: bool):
        """Whether the next backward pass adds up gradients over the replicas of --shard-ranks: the last of a
        step has to.
        """
        if isinstance(self, FSDPModule):
            self.set_requires_all_reduce(now)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of every completion token under softmax(logits / temperature) over the ids below `vocab`,
        and the entropy of that distribution: float32 logps_BT and entropy_BT (nats), 0 outside the mask.
        """
        more = {}
        if batch.sequence_RL is not None:
            more = {"position_ids": batch.position_RL, "attention_mask": self._attention_mask(batch)}
        decoder, head_VH = self.lm.get_decoder(), self.lm.get_output_embeddings().weight
        hidden_RLH = decoder(input_ids=batch.ids_RL, use_cache=False, **more).last_hidden_state
        hidden_NH = hidden_RLH.flatten(0, 1).index_select(0, batch.source_N)
        both_N = TokenLogps.apply(hidden_NH, head_VH, batch.target_N, self.vocab, self.temperature, self.cap)
        zeros_BT = torch.zeros(batch.mask_BT.shape, device=self.device)
        logps_BT, entropy_BT = (zeros_BT.masked_scatter(batch.mask_BT, x_N) for x_N in both_N)
        return logps_BT, entropy_BT

    def _attention_mask(self, batch: MicroBatch) -> torch.Tensor:
        """0 where a token sees another, else -inf, in the computing dtype: every layer would make that of a
        mask of booleans, and keep it. A completion sees its prompt and itself.
        """
        length, completion_RL = batch.ids_RL.shape[1], batch.completion_RL
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        same_RLL = batch.sequence_RL[:, :, None] == batch.sequence_RL[:, None, :]
        own_RLL = (completion_RL[:, None, :] == 0) | (completion_RL[:, :, None] == completion_RL[:, None, :])
        zeros_RLL = torch.zeros(same_RLL.shape, dtype=compute_dtype(self.device), device=self.device)
        return zeros_RLL.masked_fill_(~(causal_LL & same_RLL & own_RLL), -torch.inf)[:, None]

    @torch.no_grad()
    def follow(self, policy: "Policy"):
        """Takes over the weights of a policy of the same model on the same ranks, in its own dtype."""
        for mine, theirs in zip(self.lm.parameters(), policy.lm.parameters(), strict=True):
            local(mine).copy_(local(theirs))

    def full_weights(
        self, dtype: torch.dtype, as_in_files: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) of each parameter, one at a time: no rank holds two full copies.

        as_in_files: transformers joins the experts of a layer into one tensor; give them one by one, as the
        model's files have them. Collective, within the ranks that shard it: each must exhaust it. The cast
        comes before the gathering, to halve what is sent. Tied matrices come once, by their first name. A
        tensor may be the parameter itself: read it before the next update.
        """
        as_in_files = as_in_files and any(".experts." in name for name, _ in self.lm.named_parameters())
        for name, p in self.lm.named_parameters():
            part = local(p.detach()).to(dtype)
            if isinstance(p, DTensor):
                like = {"shape": p.shape, "stride": p.stride()}
                part = DTensor.from_local(part, p.device_mesh, p.placements, **like).full_tensor()
            if as_in_files:
                yield from revert_weight_conversion(self.lm, {name: part}).items()
            else:
                yield name, part


class Reference:
    """The model that the policy is held to. `step` is the one whose weights it has.

    model: its weights. None: it never runs, because it is the policy itself at every step (online, where it
    follows), or because the loss has none (a KL of weight 0, SimPO). follows: whether each sync brings it the
    policy's weights. Both begin as the same model; for another one as the reference set `step` to None.
    """

    def __init__(self, model: Policy | None, follows: bool):
        self.model, self.follows, self.step = model, follows, 0

    def __call__(self, batch: MicroBatch, logps_BT: torch.Tensor, step: int) -> torch.Tensor:
        """Log-probs without gradient; logps_BT: the policy's, which they are until its first update after the
        reference took over its weights.
        """
        if self.model is None or step == self.step:
            return logps_BT.detach()
        with torch.no_grad():
            return self.model(batch)[0]

    def follow(self, policy: Policy, step: int):
        """Takes over the policy's weights at a sync, if it follows."""
        if self.follows:
            self.step = step
            if self.model:
                self.model.follow(policy)


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter, gradient or moment: all of it on one CPU rank, without shards."""
    return p.to_local() if isinstance(p, DTensor) else p


def clip_gradients(policy: Policy, max_norm: float) -> float:
    """Scales all gradients to a global norm of at most `max_norm`; returns the norm before, or 0."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
