"""The model that is trained: FSDP2 shards, log-probs in chunks, the reference, whole weights one by one.

Shapes: R rows of L tokens; B completions of at most T tokens; N tokens of all completions (packing.py);
H hidden size; V vocabulary.
"""

from argparse import ArgumentError
from collections.abc import Iterator
from pickle import UnpicklingError

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from data import Completion, Row
from packing import Example, MicroBatch, Sequence, collate
from processes import compute_dtype, device_mesh, first_line, gather

# Most nats between our log-probs and the plain model's, on average, beside the rounding of its largest logit:
# the order of sums makes 1e-6, rounding a capped logit of 30 to bfloat16 0.04.
FAMILY_GAP = 1e-3
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


def load_policy(
    model: str,
    device: torch.device,
    vocab: int,
    temperature: float,
    trainable=True,
    activation_checkpointing=False,
    trust=False,
    mesh: DeviceMesh | None = None,
    packing=True,
) -> Policy:
    """Loads a model and shards it over the ranks.

    vocab: ids below it may be sampled (`load_tokenizer`). temperature: of sampling, and so of all log-probs.
    trust: whether code that comes with the model may run. mesh: `device_mesh`'s, or None: over all ranks.
    packing: whether completions may share a row, where the model can take the mask.
    Trainable: float32 master weights, computing in bfloat16 on a GPU. Not trainable: weights in the computing
    dtype. Raises ArgumentError for a model that cannot be loaded whole, whose layers cannot be found, or that
    makes its logits in a way of its own.
    """
    lm = _load_on_rank_0(model, vocab, trust, check=trainable)  # the reference is the same model
    lm.requires_grad_(trainable).eval()  # eval: the sampler has no dropout, so the policy has none
    layers = lm.get_decoder().layers
    if activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer.training = True  # this flag alone turns recomputation on; its children stay in eval mode
    dtype = torch.float32 if trainable else compute_dtype(device)
    policy = Policy(lm, vocab, temperature)
    policy.shares = policy.shares and packing
    if device.type == "cpu" and dist.get_world_size() == 1:  # nothing to shard, nothing to cast in a forward:
        return _fill(policy, dtype, device)  # FSDP would only cost the toy a seventh of its step
    mesh = mesh or device_mesh(device, None)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    for module in layers if embedding.weight is head.weight else [embedding, *layers]:
        # so that only one is whole on the device at a time; the head is the root's
        fully_shard(_fill(module, dtype, device), mesh=mesh, mp_policy=precision)
    # the root too gives its full weights back after a forward: outside of one, parameters are always shards
    return fully_shard(
        _fill(policy, dtype, device), mesh=mesh, mp_policy=precision, reshard_after_forward=True
    )


def _load_on_rank_0(model: str, vocab: int, trust: bool, check: bool) -> nn.Module:
    """The whole model on rank 0, in host memory, and its shapes alone on the others, so that a machine holds
    it once; collective. Raises ArgumentError on all ranks.
    """
    lm = fault = None
    if dist.get_rank() == 0:
        try:
            lm = _load_whole(model, vocab, trust, check)
        except ArgumentError as error:
            fault = str(error)
    fault, dtype = gather([(fault, lm and lm.config.dtype)])[0]
    if fault:
        raise ArgumentError(None, fault)
    if lm is None:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        lm.config.dtype = dtype
    return lm


def _load_whole(model: str, vocab: int, trust: bool, check: bool) -> nn.Module:
    """Raises ArgumentError as `load_policy` explains. check: whether to compare it with the plain model."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would report is refused below, in one line
    load = {"dtype": "auto", "trust_remote_code": trust, "ignore_mismatched_sizes": True}
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        if getattr(config, "quantization_config", None):
            raise ValueError("quantized weights cannot be trained here: take the model without quantization")
        lm, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **load)
    except (OSError, ValueError, UnpicklingError, SafetensorError) as error:
        raise ArgumentError(None, f"--model {model}: cannot be loaded ({first_line(error)})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    absent = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if absent:  # transformers would go on with random ones
        reason = f"its files have no {absent[0]} of the shape that config.json gives"
        raise ArgumentError(None, f"--model {model}: {reason}")
    if getattr(lm.get_output_embeddings(), "weight", None) is None:
        raise ArgumentError(None, f"--model {model}: {type(lm).__name__} has no output matrix")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ArgumentError(None, f"--model {model}: its output layer has a bias, which is not supported")
    if getattr(lm.get_decoder(), "layers", None) is None:
        raise ArgumentError(None, f"--model {model}: {type(lm).__name__} has no decoder.layers to shard")
    if check:
        _check_family(Policy(lm.eval(), vocab, 1.0), model)
    return lm


def _fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Gives all ranks what rank 0 has of a module and of its children that are not sharded yet: parameters in
    `dtype`, buffers as they are; collective. (Unlike Module.to: rotary frequencies are a buffer, and in
    bfloat16 they turn positions of long completions by radians.)
    """
    for part in _unsharded(module):
        owned = [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]
        tensors = [x for x in owned if isinstance(x, torch.Tensor)]
        kinds = gather([[dtype if isinstance(x, nn.Parameter) else x.dtype for x in tensors]])[0]
        for tensor, kind in zip(tensors, kinds, strict=True):
            if tensor.is_meta:
                whole = torch.empty(tensor.shape, dtype=kind, device=device)
                if isinstance(tensor, nn.Parameter):
                    whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
                torch.utils.swap_tensors(tensor, whole)  # so that a tied matrix stays tied
            tensor.data = tensor.data.to(device, kind)
            dist.broadcast(tensor.data, 0)
    return module


def _unsharded(module: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(module, FSDPModule):
        yield module
        for child in module.children():
            yield from _unsharded(child)


def load_reference(model: str, *, needed: bool, follows: bool, **how) -> Reference:
    """needed: whether it ever runs; how: the arguments of `load_policy`."""
    return Reference(load_policy(model, trainable=False, **how) if needed else None, follows)


@torch.no_grad()
def _check_family(policy: Policy, model: str):
    """Compares log-probs of a few tokens with those of the plain model's own logits, before it is sharded.

    Raises ArgumentError, with the gap, for a model whose forward does something that `Policy` leaves out.
    """
    ids = torch.linspace(0, policy.vocab - 1, 10).long().tolist()[1:-1]  # few: this runs on the CPU
    prompt, completions = ids[:2], [ids[2:5], ids[5:]]
    group = [Completion(c, [0.0] * len(c), "", "stop", 0) for c in completions]
    example = Example(Row("", prompt, None, None), group)
    name, gaps, largest = type(policy.lm).__name__, [], 0.0
    try:
        sequences = [Sequence(example, read) for read in ([[0, 1]] if policy.shares else [[0], [1]])]
        batch = collate(sequences, policy)
        for completion, logp_T in zip(completions, policy(batch)[0], strict=True):
            logits_LV = policy.lm(torch.tensor([prompt + completion]), use_cache=False).logits[0]
            largest = max(largest, logits_LV.abs().max().item())
            plain_TV = logits_LV[len(prompt) - 1 : -1, : policy.vocab].float().log_softmax(-1)
            plain_T = plain_TV.gather(-1, torch.tensor(completion)[:, None])[:, 0]
            gaps.append((plain_T - logp_T[: len(completion)]).abs())
    except Exception as error:  # a family's own code raises what it likes
        reason = f"({type(error).__name__}: {first_line(error)})"
        raise ArgumentError(None, f"--model {model}: {name} cannot be run here {reason}") from error
    gap = torch.cat(gaps).mean().item()
    if not gap <= FAMILY_GAP + largest * torch.finfo(policy.lm.dtype).eps / 2:
        differ = f"log-probs computed here differ from {name}'s own by {gap:.2g} nats on average"
        raise ArgumentError(None, f"--model {model}: {differ}; this kind of model is not supported")


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter, gradient or moment: all of it on one CPU rank, without shards."""
    return p.to_local() if isinstance(p, DTensor) else p


def clip_gradients(policy: Policy, max_norm: float) -> float:
    """Scales all gradients to a global norm of at most `max_norm`; returns the norm before, or 0."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
