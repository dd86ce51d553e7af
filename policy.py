"""The model being trained: process start, FSDP2 sharding, log-probs in chunks, full weights one by one,
export.

A segment is a prompt and the answers that share it: often one, several where that saves work.

Shapes: R rows of L tokens (segments side by side, padding on the right); B answers of at most T tokens, in
the order of the segments; N tokens of all answers; H hidden size; V vocabulary.
"""

import itertools
import os
import shutil
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TIMEOUT = timedelta(minutes=60)  # of a collective: ranks wait for the one that generates longest
MASKED = (
    4  # cost of a pair of tokens under a mask, in those of a causal kernel that leaves pairs out; a guess
)
# Most nats between our log-probs and the plain model's, on average, beside the rounding of its largest logit:
# the order of sums makes 1e-6, rounding a capped logit of 30 to bfloat16 0.04.
FAMILY_GAP = 1e-3
CHUNK_LOGITS = 2**25  # logits that exist at one time: 128 MiB in float32, 261 tokens of Llama 3's vocabulary


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
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except ValueError as error:
            reason = f"{_first_line(error)}; start several ranks with torchrun"
            raise ArgumentError(None, f"RANK is {os.environ['RANK']!r}: {reason}") from error
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_rank():
        transformers.logging.disable_progress_bar()
    return dist.get_rank(), dist.get_world_size(), device


def device_mesh(device: torch.device, shard_ranks: int | None) -> DeviceMesh:
    """How parameters lie over the ranks: sharded over all, or over each `shard_ranks` neighbours (the GPUs of
    a node, say) and replicated over these groups. Raises ArgumentError where it does not divide the ranks.
    """
    world = dist.get_world_size()
    if not shard_ranks or shard_ranks == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % shard_ranks:
        raise ArgumentError(None, f"--shard-ranks {shard_ranks}: does not divide the {world} rank(s)")
    shape = (world // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def stop():
    if dist.is_initialized():  # vLLM's shutdown has taken it down already
        dist.destroy_process_group()


def gather(items: list, to: int | None = None) -> list:
    """The items of all ranks, in the order from which `[rank::world]` dealt them out, on every rank or on
    rank `to` alone.
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
    so that none waits for another that has left.
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


def error_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # it holds the ranks' own errors
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or _first_line(error)


def sum_over_ranks(sums: Counter) -> Counter:
    total = Counter()
    for part in gather([sums]):
        total.update(part)
    return total


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward passes run in, the sampler's included; master weights and gradient sums are float32
    everywhere.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_tokenizer(model: str, length: int, trust=False) -> tuple:
    """The tokenizer of a directory or hub name, and vocab: ids below it are the tokenizer's and have a row in
    the model's matrices, so they may be sampled. trust: whether code that comes with it may run.

    Raises ArgumentError if there is none, it has no chat template, the model's context is under `length`, or
    its matrices have too few rows or far too many. Added tokens may lie beyond them (one of gemma 3's does):
    prompts that have such a token are refused later.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        context = getattr(config, "max_position_embeddings", length)
    except Exception as error:  # the tokenizers' own library raises what it likes
        if "trust_remote_code" in str(error):
            way = "it brings code of its own, which runs only with --trust-remote-code"
            raise ArgumentError(None, f"--model {model}: {way}") from error
        reason = f"no model with a tokenizer there ({_first_line(error)})"
        raise ArgumentError(None, f"--model {model}: {reason}") from error
    if not tokenizer.chat_template:
        raise ArgumentError(
            None, f"--model {model}: its tokenizer has no chat template; use an instruct model"
        )
    if context < length:
        flags = f"--max-prompt-tokens + --max-new-tokens = {length}"
        raise ArgumentError(None, f"--model {model}: its context of {context} tokens is less than {flags}")
    ids, added = tokenizer.get_vocab().values(), set(tokenizer.get_added_vocab().values())
    rows = config.get_text_config().vocab_size
    if max(set(ids) - added, default=0) >= rows:
        reason = f"its tokenizer has ids up to {max(ids)}, its matrix {rows} rows: they are not of one model"
        raise ArgumentError(None, f"--model {model}: {reason}")
    if 4 * len(ids) < rows:  # of a tokenizer whose files are partly missing, transformers keeps a handful
        reason = f"its tokenizer has {len(ids)} tokens, its matrix {rows} rows: is a file missing?"
        raise ArgumentError(None, f"--model {model}: {reason}")
    return tokenizer, min(max(ids, default=0) + 1, rows)


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
        size = max(1, CHUNK_LOGITS // len(head_VH))
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
        self.config = lm.config.get_text_config()
        # After the output matrix cohere multiplies the logits, granite divides them, gemma 2 caps them. A
        # factor is one more temperature. `_check_family` refuses families that do something else.
        get = lambda name: getattr(self.config, name, None)  # noqa: E731
        factor, cap = (get("logit_scale") or 1) / (get("logits_scaling") or 1), get("final_logit_softcapping")
        self.temperature, self.cap = temperature / factor, cap and cap / factor
        # whether a row can hold several answers: every layer has full attention and takes any mask
        kinds = getattr(self.config, "layer_types", None) or [getattr(self.config, "sliding_window", None)]
        self.shares = self.config._attn_implementation == "sdpa" and set(kinds) <= {"full_attention", None}

    def forward(self, ids_RL, place_RL, segment_RL, answer_RL, source_N, target_N, mask_BT):
        """Log-prob of every answer token under softmax(logits / temperature) over the ids below `vocab`.

        The arguments are those that `collate` returns. Returns float32 logps_BT and entropy_BT (nats), 0
        outside the mask, and the bool mask_BT, true where answer b has a token t, the end token included.
        """
        more = {}  # where a row holds one answer, causality is enough: no token sees the padding after it
        if segment_RL is not None:  # an answer sees its prompt and itself
            causal_LL = torch.ones(2 * ids_RL.shape[1:], dtype=torch.bool, device=ids_RL.device).tril()
            same_RLL = segment_RL[:, :, None] == segment_RL[:, None, :]
            own_RLL = (answer_RL[:, None, :] == 0) | (answer_RL[:, :, None] == answer_RL[:, None, :])
            more = {"position_ids": place_RL, "attention_mask": (causal_LL & same_RLL & own_RLL)[:, None]}
        hidden_RLH = self.lm.get_decoder()(input_ids=ids_RL, use_cache=False, **more).last_hidden_state
        hidden_NH = hidden_RLH.flatten(0, 1).index_select(0, source_N)
        head_VH = self.lm.get_output_embeddings().weight
        head = (self.vocab, self.temperature, self.cap)
        logps_N, entropy_N = TokenLogps.apply(hidden_NH, head_VH, target_N, *head)
        zeros_BT = torch.zeros(mask_BT.shape, device=ids_RL.device)
        logps_BT, entropy_BT = (zeros_BT.masked_scatter(mask_BT, x_N) for x_N in (logps_N, entropy_N))
        return logps_BT, entropy_BT, mask_BT

    def split(self, prompt: int, answers: list[int], max_tokens: int) -> list[list[int]]:
        """Which answers to one prompt make a segment, in order: the indices of each.

        prompt, answers: tokens of each. Answers share a prompt where the work on it that they save is more
        than what attention costs that the mask then throws away: for short answers, not for long ones to a
        short prompt. (A token's 24 H^2 flops in the matrices of a layer are those of 6 H pairs of attention.)
        """
        segments, width = [], 0
        for i, answer in enumerate(tokens_read(length) for length in answers):
            saved = prompt * (prompt + 2 * answer + 6 * self.config.hidden_size)
            fits = width + answer <= max_tokens and MASKED * 2 * width * answer < saved
            if segments and self.shares and fits:
                segments[-1].append(i)
                width += answer
            else:
                segments.append([i])
                width = prompt + answer
        return segments

    def collate(self, segments: list[tuple[list[int], list[list[int]]]]) -> tuple:
        """Segments (prompt ids, ids of each answer) to the inputs of `forward`.

        Short ones fill up the rows of longer ones, where a mask is needed anyway or padding costs more than
        it. Returns ids_RL; place_RL, each token's position in prompt + own answer; segment_RL, the segment of
        a token (-1: padding), and answer_RL, its answer (0: the prompt), or None for both where no mask is
        needed; source_N, the token (of all rows, flattened) whose hidden state predicts target_N; mask_BT,
        true where an answer has a token.

        No segments: one of a prompt and an answer of a token each, so that the rank takes part in the
        collectives of the pass; the caller gives it no weight.
        """
        segments = segments or [([0], [[0]])]
        sizes = [segment_width(*segment) for segment in segments]
        width, masked = max(sizes), any(len(answers) > 1 for _, answers in segments)
        padding = 1 - sum(sizes) / (width * len(sizes))
        starts, rows = [width * i for i in range(len(sizes))], len(sizes)
        if self.shares and (masked or MASKED * width < padding * 6 * self.config.hidden_size):
            # wider rows than the longest segment leave less padding, but each of their tokens more attention
            ways = [first_fit(sizes, max(sizes) * k // 8) for k in range(8, 17)]
            cost = lambda width, _, rows: rows * width * (6 * self.config.hidden_size + MASKED * width)  # noqa: E731
            width, starts, rows = min(ways, key=lambda way: cost(*way))
        ids, places, segment, answer_of = ([fill] * (rows * width) for fill in (0, 0, -1, 0))
        source, target = [], []
        for i, (start, (prompt, answers)) in enumerate(zip(starts, segments, strict=True)):
            end = start + len(prompt)
            ids[start:end], places[start:end] = prompt, range(len(prompt))
            source_of_first = end - 1
            for k, answer in enumerate(answers, 1):
                size = tokens_read(len(answer))
                source += [source_of_first, *range(end, end + size)][: len(answer)]
                target += answer
                part = slice(end, end + size)
                ids[part], places[part] = answer[:size], range(len(prompt), len(prompt) + size)
                answer_of[part] = [k] * size
                end += size
            segment[start:end] = [i] * (end - start)
        table = torch.tensor([ids, places, segment, answer_of], device=self.device)
        ids_RL, place_RL, segment_RL, answer_RL = table.reshape(4, rows, width)
        if not masked and rows == len(segments):
            segment_RL = answer_RL = None
        source_N, target_N = torch.tensor([source, target], dtype=torch.int64, device=self.device)
        length_B = torch.tensor([len(a) for _, answers in segments for a in answers], device=self.device)
        mask_BT = torch.arange(length_B.max(), device=self.device) < length_B[:, None]
        return ids_RL, place_RL, segment_RL, answer_RL, source_N, target_N, mask_BT

    @torch.no_grad()
    def logps(self, sequences: list[tuple[list[int], list[int]]], max_tokens=2**14) -> list[torch.Tensor]:
        """Log-probs of each (prompt ids, completion ids): float32 [len(completion)], on the CPU, no gradient.

        Collective: every rank calls it together, with as many sequences as it has (none is fine).
        """
        out = [torch.zeros(0)] * len(sequences)
        segments = [(prompt, [completion]) for prompt, completion in sequences]
        widths = [segment_width(*segment) for segment in segments]
        for batch in micro_batches(widths, [1] * len(widths), max_tokens):
            logps_BT, _, mask_BT = self(*self.collate([segments[i] for i in batch]))
            for row, i in enumerate(batch):
                out[i] = logps_BT[row][mask_BT[row]].cpu()
        return out

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def follow(self, policy: "Policy"):
        """Takes over the weights of a policy of the same model on the same ranks, in its own dtype: the
        reference follows the sampler in this way.
        """
        for mine, theirs in zip(self.lm.parameters(), policy.lm.parameters(), strict=True):
            local(mine).copy_(local(theirs))

    def full_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) of each parameter, one at a time: no rank holds two full copies.

        Collective, within the ranks that shard it: each must exhaust it. The cast comes before the gathering,
        to halve what is sent. Tied matrices come once, by their first name. A tensor may be the parameter
        itself: read it before the next update.
        """
        for name, p in self.lm.named_parameters():
            part = local(p.detach()).to(dtype)
            if isinstance(p, DTensor):
                like = {"shape": p.shape, "stride": p.stride()}
                part = DTensor.from_local(part, p.device_mesh, p.placements, **like).full_tensor()
            yield name, part

    def export(self, directory: Path, tokenizer):
        """Writes an ordinary Hugging Face directory in the dtype of the original; collective, rank 0 writes.

        The tensors are gathered one at a time into rank 0's host memory; the directory appears under its name
        only when it is complete.
        """
        dtype = self.lm.config.dtype
        keep = dist.get_rank() == 0
        state = {}
        for name, tensor in self.full_weights(dtype):
            if keep:
                state[name] = tensor.cpu()
        if keep:
            partial = directory.with_name(directory.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                self.lm.save_pretrained(partial, state_dict=state)
                self.lm.config.dtype = dtype  # it has noted the master weights' float32
                self.lm.config.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            except (OSError, SafetensorError) as error:
                raise SystemExit(f"stopped: {directory} cannot be written ({_first_line(error)})") from error
            if directory.exists():  # of a run that goes on with more steps
                shutil.rmtree(directory)
            partial.rename(directory)
        dist.barrier()


def load_policy(
    model: str,
    device: torch.device,
    vocab: int,
    temperature: float,
    trainable=True,
    activation_checkpointing=False,
    trust=False,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """Loads a model and shards it over the ranks; a reference is loaded the same way, trainable=False.

    vocab: ids below it may be sampled (`load_tokenizer`).
    trust: whether code that comes with the model may run. mesh: `device_mesh`'s, or None: over all ranks.
    Trainable: float32 master weights, computing in bfloat16 on a GPU. Not trainable: weights in the computing
    dtype. Raises ArgumentError for a model that cannot be loaded whole, whose layers cannot be found, or that
    makes its logits in a way of its own.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would report is refused below, in one line
    load = {"dtype": "auto", "trust_remote_code": trust, "ignore_mismatched_sizes": True}
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **load)
    except (OSError, ValueError, UnpicklingError, SafetensorError) as error:
        raise ArgumentError(None, f"--model {model}: cannot be loaded ({_first_line(error)})") from error
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
    layers = getattr(lm.get_decoder(), "layers", None)
    if layers is None:
        raise ArgumentError(None, f"--model {model}: {type(lm).__name__} has no decoder.layers to shard")
    lm.requires_grad_(trainable).eval()  # eval: the sampler has no dropout, so the policy has none
    if trainable:  # the reference is the same model
        _check_family(Policy(lm, vocab, 1.0), model)
    if activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer.training = True  # this flag alone turns recomputation on; its children stay in eval mode
    dtype = torch.float32 if trainable else compute_dtype(device)
    policy = Policy(lm, vocab, temperature)
    mesh = mesh or device_mesh(device, None)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    if device.type == "cpu" and dist.get_world_size() == 1:  # nothing to shard, nothing to cast in a forward:
        return _cast_parameters(policy, dtype)  # FSDP would only cost the toy a seventh of its step
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    units = list(layers) if embedding.weight is head.weight else [embedding, *layers]
    for unit in units:  # so that only one is whole on the device at a time; the head is the root's
        fully_shard(_cast_parameters(unit, dtype), mesh=mesh, mp_policy=precision)
    # the root too gives its full weights back after a forward: outside of one, parameters are always shards
    _cast_parameters(policy, dtype)
    return fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


@torch.no_grad()
def _check_family(policy: Policy, model: str):
    """Compares log-probs of a few tokens with those of the plain model's own logits, before it is sharded.

    Raises ArgumentError, with the gap, for a model whose forward does something that `Policy` leaves out.
    """
    ids = torch.linspace(0, policy.vocab - 1, 10).long().tolist()[1:-1]  # few: this runs on the CPU
    prompt, answers = ids[:2], [ids[2:5], ids[5:]]
    name, gaps, largest = type(policy.lm).__name__, [], 0.0
    try:
        shared = [(prompt, answers)] if policy.shares else [(prompt, [answer]) for answer in answers]
        for answer, logp_T in zip(answers, policy(*policy.collate(shared))[0], strict=True):
            logits_LV = policy.lm(torch.tensor([prompt + answer]), use_cache=False).logits[0]
            largest = max(largest, logits_LV.abs().max().item())
            plain_TV = logits_LV[len(prompt) - 1 : -1, : policy.vocab].float().log_softmax(-1)
            plain_T = plain_TV.gather(-1, torch.tensor(answer)[:, None])[:, 0]
            gaps.append((plain_T - logp_T[: len(answer)]).abs())
    except Exception as error:  # a family's own code raises what it likes
        reason = f"({type(error).__name__}: {_first_line(error)})"
        raise ArgumentError(None, f"--model {model}: {name} cannot be run here {reason}") from error
    gap = torch.cat(gaps).mean().item()
    if not gap <= FAMILY_GAP + largest * torch.finfo(policy.lm.dtype).eps / 2:
        differ = f"log-probs computed here differ from {name}'s own by {gap:.2g} nats on average"
        raise ArgumentError(None, f"--model {model}: {differ}; this kind of model is not supported")


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter, gradient or moment: all of it on one CPU rank, without shards."""
    return p.to_local() if isinstance(p, DTensor) else p


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters only, unlike Module.to: rotary frequencies are a buffer, and in bfloat16 they turn positions
    of long answers by radians. What is sharded already has its dtype.
    """
    for p in module.parameters():
        if not isinstance(p, DTensor):
            p.data = p.data.to(dtype)
    return module


def clip_gradients(policy: Policy, max_norm: float) -> float:
    """Scales all gradients to a global norm of at most `max_norm`; returns the norm before, or 0."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def tokens_read(length: int) -> int:
    """Tokens of an answer that the model reads: all but the last, after which nothing is predicted."""
    return max(0, length - 1)


def segment_width(prompt: list[int], answers: list[list[int]]) -> int:
    return len(prompt) + sum(tokens_read(len(answer)) for answer in answers)


def micro_batches(widths: list[int], rows: list[int], max_tokens: int) -> list[list[int]]:
    """Packs units into micro-batches of at most `max_tokens` padded tokens; returns the indices of each.

    A unit is rows[i] sequences that must meet in one forward (2 for a DPO pair), the longest of them
    widths[i] tokens. Longest first: what does not fit in memory fails at once, and neighbours differ little,
    so little is padding. Collective: every rank gets the same number, since each forward and backward is a
    collective; ranks that run out get empty ones, for which `Policy.collate` makes a dummy.
    """
    batches: list[list[int]] = []
    filled = 0  # sequences of the last batch
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        if not batches or (filled + rows[i]) * widths[batches[-1][0]] > max_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += rows[i]
    count = torch.tensor(len(batches))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return batches + [[] for _ in range(count.item() - len(batches))]


def first_fit(sizes: list[int], width: int) -> tuple[int, list[int], int]:
    """Lays segments into rows of at most `width` tokens, longest first, each where it first fits; returns the
    tokens of the fullest row, which all rows then have, where each segment begins (in the rows, flattened),
    and the number of rows.
    """
    room, places = [], [(0, 0)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, left in enumerate(room) if left >= sizes[i]), len(room))
        if row == len(room):
            room.append(width)
        places[i] = (row, width - room[row])
        room[row] -= sizes[i]
    width -= min(room)
    return width, [row * width + place for row, place in places], len(room)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
