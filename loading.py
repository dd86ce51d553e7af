"""How a model gets onto the ranks: rank 0 reads it, each rank keeps its shards (FSDP2); what cannot be
trained here is refused.
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
from transformers import AutoConfig, AutoModelForCausalLM

from data import Completion, Row
from packing import Example, Sequence, collate
from policy import Policy, Reference
from processes import compute_dtype, device_mesh, first_line, gather

# Most nats between our log-probs and the plain model's, on average, beside the rounding of its largest logit:
# the order of sums makes 1e-6, rounding a capped logit of 30 to bfloat16 0.04.
FAMILY_GAP = 1e-3


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
    tied = lm and lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    fault, dtype, tied = gather([(fault, lm and lm.config.dtype, tied)])[0]
    if fault:
        raise ArgumentError(None, fault)
    if lm is None:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        # a model may say that its matrices are tied and have two: then they are not
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
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
