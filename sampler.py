"""The model that answers: vLLM in this process, its weights replaced in place, and the test that they were.

One engine per rank, on the rank's own device. Every vLLM call of the project is in this file: `LLM`,
`generate`, `collective_rpc("reload_weights")`, `apply_model`, `reset_prefix_cache`, `sleep`, `wake_up` and
the engine core's `shutdown`, all public in vLLM 0.32. `HFSampler` is the same interface on transformers, for
machines without vLLM and as the oracle of the tests.
"""

import atexit
import gc
import importlib.util
import math
import os
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

# Expected |policy - sampler| of a token's log-prob right after a reload, as (mean, max) in nats. In float32
# only the order of sums differs (mean 3e-7 for the toy, 1.5e-5 for a 135M model); in bfloat16 single tokens
# are off by tenths, which average out.
GAP_LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 2.0)}
# Of the self-test: answers, and the first tokens of each (the pass over the prompt yields only the first one)
TEST_ANSWERS, TEST_TOKENS = 8, 4
CPU_BLOCK = 32  # tokens of keys and values that vLLM keeps together, the least that its CPU kernel takes
SPOTS = 4096  # entries of each tensor that are read back from the engine after a reload
HF_BATCH = (256, 2**17)  # most sequences, and most tokens of keys and values, in one call of transformers


class SyncError(SystemExit):
    """The sampler does not hold the policy's weights; uncaught, one line and exit code 1."""


@dataclass
class Completion:
    ids: list[int]  # as sampled, the end token included; never tokenized again
    logps: list[float]  # of each id, under the distribution it was drawn from
    text: str
    finish: str  # "stop": an end token came; "length": cut at max_new_tokens
    version: int  # the optimizer step whose weights wrote it
    reward: float | None = None  # filled in by the scorer


class VLLMSampler:
    """An in-process vLLM engine.

    model: directory or hub name; vocab: ids from it on are never sampled; stop_ids: those that end a
    completion; dtype: the policy's computing dtype; max_length: tokens of prompt + completion; gpu_memory:
    vLLM's share of the GPU (weights and KV cache); sleep: whether `sleep` frees the GPU; trust: whether code
    that comes with the model may run.
    """

    def __init__(
        self, model: str, tokenizer, vocab: int, stop_ids, device, dtype, max_length: int, gpu_memory: float,
        sleep: bool, trust: bool,
    ):  # fmt: skip
        # vLLM's settings, all read at its import. One process. The model runner that a CPU has, on a GPU too:
        # it draws from torch's generator, which `generate` seeds, and takes the logits processor below. On a
        # CPU 1 GiB of KV cache instead of a share of the memory, and no threads bound to the policy's cores.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if device.type == "cpu":
            # else vLLM compiles a small function even in eager mode, which takes seconds and needs a compiler
            torch.compiler.set_stance("force_eager")
        from transformers import AutoConfig
        from vllm import LLM, SamplingParams

        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        padded = config.get_text_config().vocab_size > vocab

        self.SamplingParams, self.tokenizer = SamplingParams, tokenizer
        self.stop_ids, self.dtype = stop_ids, dtype
        self.version, self.asleep, self.can_sleep = 0, False, sleep and device.type == "cuda"
        gc.collect()
        gc.freeze()  # what is loaded by now stays: the collections that vLLM asks for need not go through it
        self.llm = LLM(
            model,
            dtype=dtype,
            trust_remote_code=trust,
            max_model_len=max_length,
            gpu_memory_utilization=gpu_memory,
            enforce_eager=device.type == "cpu",  # CUDA graphs on a GPU
            # it reads whole blocks of a prompt once for all answers, on a CPU of 128 tokens unless it is told
            block_size=None if device.type == "cuda" else CPU_BLOCK,
            enable_prefix_caching=device.type == "cuda" or max_length > CPU_BLOCK,
            enable_sleep_mode=self.can_sleep,
            use_tqdm_on_load=False,
            skip_tokenizer_init=True,  # ids in, ids out
            generation_config="vllm",  # no sampling defaults of the model's own
            logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature and all
            logits_processors=[_ban_ids_from(vocab)] if padded else None,
            # one engine per rank inside torchrun's processes
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
        )
        atexit.register(self.close)  # whatever ends the process

    @property
    def capacity(self) -> str:
        """How much vLLM can work on at one time: more has to wait, or is computed again."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        sequences = f"{cache.kv_cache_max_concurrency:,.0f} sequences of full length at one time"
        return f"keys and values of {cache.kv_cache_size_tokens:,} tokens, {sequences} on each rank"

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt (token ids), in order; the same call draws the same again, on a CPU
        bit for bit: the cache of prefixes, whose last bits go with the batch they came from, starts empty.
        """
        if not prompts:
            return []
        _check_awake(self)
        self._forget()
        # logprobs=0: of the sampled token only; flat: no object for each token
        params = self.SamplingParams(
            n=n, temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, logprobs=0,
            stop_token_ids=self.stop_ids, detokenize=False, flat_logprobs=True,
        )  # fmt: skip
        torch.manual_seed(seed)  # the engine runs in this process: it draws from torch's own generator
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        completions = [completion for output in outputs for completion in output.outputs]
        texts = self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        made = [
            Completion(list(c.token_ids), c.logprobs.logprobs, text, c.finish_reason, self.version)
            for c, text in zip(completions, texts, strict=True)
        ]
        assert all(c.logprobs.token_ids == m.ids for c, m in zip(completions, made, strict=True))
        return [made[i : i + n] for i in range(0, len(made), n)]

    def reload(self, weights: Iterable[tuple[str, torch.Tensor]], version: int):
        """Replaces all weights in place with (Hugging Face name, tensor) pairs, read one at a time.

        Raises SyncError where the engine's own tensors do not hold them afterwards. Leaves the engine awake.
        """
        self.version = None  # if this fails half-way, the engine holds nobody's weights
        if self.asleep:  # the KV cache can wait until nothing is being gathered any more
            self.llm.wake_up(tags=["weights"])
        spots = {}
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _note_spots(weights, spots)})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self._forget()
        self.llm.apply_model(_pack_tied_head)
        [complaint] = self.llm.apply_model(lambda model: _complaint(model, spots))
        if complaint:
            raise SyncError(f"after the reload at step {version} vLLM does not hold the policy's {complaint}")
        self.version = version

    def _forget(self):
        if not self.llm.reset_prefix_cache():
            raise SyncError(
                "vLLM keeps keys and values of its old weights: it could not reset its prefix cache"
            )

    def sleep(self):
        """Until the next reload nobody asks it: its weights and keys and values are dropped, and the GPU is
        free.
        """
        if self.can_sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True
        self.version = None

    def close(self):
        """Ends the engine; again is no harm. vLLM takes torch's process groups down with it, so this comes
        last.
        """
        if self.llm is None:
            return
        if self.asleep:  # memory that sleeps cannot be freed: CUDA complains of each segment
            self.llm.wake_up()
        self.llm.llm_engine.engine_core.shutdown()  # not left to its last reference: there are cycles
        self.llm = None
        atexit.unregister(self.close)
        gc.collect()


def _check_awake(sampler):
    if sampler.version is None:
        raise SyncError("the sampler sleeps and holds nobody's weights: reload it before it is asked")


def _ban_ids_from(vocab: int):
    """A vLLM logits processor: ids that the tokenizer does not have (a padded output matrix) are never
    sampled.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class BanPaddedIds(LogitsProcessor):
        def __init__(self, vllm_config, device, is_pin_memory):
            pass

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update):
            pass

        def apply(self, logits):
            logits[:, vocab:] = -float("inf")
            return logits

    return BanPaddedIds


def _pack_tied_head(model):
    """On a CPU vLLM multiplies with a packed copy of the output matrix. A reload packs what was sent, which a
    matrix that is tied to the embedding is not.
    """
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def _note_spots(weights, spots: dict):
    """Passes the pairs on; keeps evenly spaced entries of each tensor, to look for them in the engine."""
    for name, tensor in weights:
        spots[name] = (tensor.shape, tensor.flatten()[:: _stride(tensor)].clone())
        yield name, tensor


def _stride(tensor) -> int:
    return max(1, tensor.numel() // SPOTS)


def _complaint(model, spots: dict) -> str | None:
    """Compares the noted entries with vLLM's own tensors; names the tensor that was not sent or differs most,
    or None.

    vLLM joins some matrices by rows (q, k and v; gate and up), unless they are sent joined. Tensors that a
    kernel has repacked cannot be read back (on a CPU, those of all linear layers), and names may differ
    (multimodal models): then the log-probs have to tell.
    """
    joined = getattr(model, "packed_modules_mapping", {})
    missing, worst, worst_gap, known = None, None, 0.0, False
    for whole, param in model.named_parameters():
        module = whole.split(".")[-2] if "." in whole else whole
        row = 0
        for part in [module] if whole in spots else joined.get(module, [module]):
            name = whole.replace(f"{module}.", f"{part}.")
            if name not in spots:
                missing = name
                continue
            known = True
            shape, spot = spots[name]
            held = param.data[row : row + shape[0]]
            row += shape[0]
            if held.shape == shape:
                gap = (held.flatten()[:: _stride(held)].float() - spot.float()).abs().max().item()
                if not gap <= worst_gap:  # NaN counts as a difference
                    worst, worst_gap = name, gap
    if known and missing:
        return f"{missing}: it was not among the tensors that were sent"
    return worst and f"{worst}: entries differ by up to {worst_gap:.2g}"


class HFSampler:
    """The same interface on a transformers model, for wherever the policy runs and vLLM does not.

    Shapes: P prompts, B answers (n to a prompt), V vocabulary; L tokens of the longest prompt, then growing.
    """

    def __init__(self, model: str, tokenizer, vocab: int, stop_ids, device, dtype, trust: bool):
        from transformers import AutoModelForCausalLM

        self.lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust)
        self.lm.to(device).requires_grad_(False)
        self.tokenizer, self.vocab, self.stop_ids = tokenizer, vocab, stop_ids
        self.dtype, self.version = dtype, 0
        self.capacity = f"{HF_BATCH[0]} sequences, or {HF_BATCH[1]:,} tokens, at one time on each rank"

    def generate(self, prompts, n, max_new_tokens, temperature, seed, top_p=1.0) -> list[list[Completion]]:
        _check_awake(self)
        torch.manual_seed(seed)
        sequences, tokens = HF_BATCH
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
        place_PL = (mask_PL.cumsum(-1) - 1).clamp(min=0)
        out = self.lm(ids_PL, attention_mask=mask_PL, position_ids=place_PL, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values  # each prompt is read once, for all its answers
        cache.batch_repeat_interleave(n)
        logits_BV, mask_BL, place_B1 = (
            x.repeat_interleave(n, 0) for x in (out.logits[:, -1], mask_PL, place_PL[:, -1:])
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
            mask_BL, place_B1 = torch.cat([mask_BL, mask_BL[:, -1:]], -1), place_B1 + 1
            out = self.lm(
                id_B1, attention_mask=mask_BL, position_ids=place_B1, past_key_values=cache, use_cache=True
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


def load_sampler(
    kind: str, model: str, tokenizer, vocab: int, stop_ids: list[int], device, dtype, max_length: int,
    gpu_memory: float, sleep: bool, trust=False,
):  # fmt: skip
    """Starts the sampler `kind` ("vllm" or "hf"); the other arguments are those of `VLLMSampler`."""
    if kind == "hf":
        return HFSampler(model, tokenizer, vocab, stop_ids, device, dtype, trust)
    engine = (device, dtype, max_length, gpu_memory, sleep, trust)
    return VLLMSampler(model, tokenizer, vocab, stop_ids, *engine)


def end_tokens(model: str, tokenizer, vocab: int, trust=False) -> list[int]:
    """Ids that end a completion: the tokenizer's, and those of generation_config.json or, without one, of
    config.json, as in transformers' own generate. (Llama 3's <|eot_id|> is named in generation_config.json.)

    Raises ArgumentError where there is none, or one that cannot be sampled.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except (OSError, TypeError, ValueError) as error:
        if (Path(model) / "generation_config.json").exists():
            raise ArgumentError(None, f"--model {model}: generation_config.json is damaged") from error
        plain = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        config = GenerationConfig.from_model_config(plain)
    more = config.eos_token_id
    ids = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    ids = [i for i in ids if i is not None]
    if not ids:
        files = "neither tokenizer nor generation_config.json nor config.json"
        raise ArgumentError(None, f"--model {model}: {files} names an end token")
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab:
            reason = f"its end token {i!r} cannot be sampled, ids go from 0 to {vocab - 1}"
            raise ArgumentError(None, f"--model {model}: {reason}; mend eos_token_id")
    return sorted({*ids})


def require(kind: str):
    """Raises ArgumentError where the sampler `kind` is not installed; costs nothing, so it comes first."""
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        ways = "install requirements.txt (GPU) or requirements-cpu.txt, or pass --sampler hf"
        raise ArgumentError(None, f"--sampler vllm: vLLM is not installed; {ways}")


def self_test(sampler, policy_logps: Callable, groups: list) -> dict[str, float]:
    """Scores the beginnings of the first answers after a reload with the policy that the weights came from.

    policy_logps: list of (prompt ids, completion ids) -> list of log-prob tensors; collective if the policy
    is sharded, and then so is this. groups: (row, completions); the first answer of each prompt comes first.
    Returns sampler/logp_gap_mean and _max of |policy - sampler| over tokens (nats) on this rank, nothing on
    one without answers; raises SyncError, with the worst token, where the gaps are beyond GAP_LIMITS of the
    sampler's dtype.
    """
    pairs = [(row.ids, cs[k]) for k in range(TEST_ANSWERS) for row, cs in groups if k < len(cs)][
        :TEST_ANSWERS
    ]
    ours = policy_logps([(prompt, answer.ids[:TEST_TOKENS]) for prompt, answer in pairs])
    if not pairs:
        return {}
    theirs = torch.tensor([logp for _, answer in pairs for logp in answer.logps[:TEST_TOKENS]])
    gaps = (torch.cat(ours) - theirs).abs().nan_to_num(nan=float("inf"))
    worst = int(gaps.argmax())
    limit_mean, limit_max = GAP_LIMITS[sampler.dtype]
    if gaps.mean() > limit_mean or gaps.max() > limit_max:
        token = [i for _, answer in pairs for i in answer.ids[:TEST_TOKENS]][worst]
        raise SyncError(
            f"the sampler (version {pairs[0][1].version}) does not hold the policy's weights: log-probs of "
            f"its own tokens differ by {gaps.mean():.2g} on average (limit {limit_mean:g}) and "
            f"{gaps.max():.2g} at most (limit {limit_max:g}), "
            f"which is at the token {sampler.tokenizer.decode([token])!r}"
        )
    return {"sampler/logp_gap_mean": gaps.mean().item(), "sampler/logp_gap_max": gaps.max().item()}
