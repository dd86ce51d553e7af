"""The model that samples: vLLM in this process, its weights replaced in place (sampler_check.py tests that).

One engine per rank, on the rank's own device. Every vLLM call of the project is in this file: `LLM`,
`generate`, `collective_rpc("reload_weights")`, `apply_model`, `reset_prefix_cache`, `sleep`, `wake_up` and
the engine core's `shutdown`, all public in vLLM 0.32. sampler_hf.py is the same interface on transformers.
"""

import atexit
import contextlib
import gc
import importlib.util
import logging
import os
import random
from argparse import ArgumentError, Namespace
from collections.abc import Iterable

import torch
import torch.distributed as dist

from data import Completion
from processes import naming
from sampler_check import SyncError, difference, memory_fault, note_entries, weight_bytes

CPU_BLOCK = 32  # tokens of keys and values that vLLM keeps together, the least that its CPU kernel takes


class Sampler:
    """What every sampler has: `version`, the step whose weights it holds, or None; `dtype`; and `generate`,
    `reload`, `sleep`, `close`, as `VLLMSampler` explains them.
    """

    as_in_files = False  # whether `reload` reads experts as a model's files have them
    pool = 0  # bytes of a GPU that torch counts as the sampler's, asleep or not

    def follow(self, policy, step: int) -> bool:
        """Takes over the policy's weights of this step, unless a validation has brought them already; returns
        whether it did. Collective.
        """
        if self.version == step:
            return False
        self.reload(policy.full_weights(self.dtype, self.as_in_files), step)
        return True

    def check_awake(self):
        if self.version is None:
            raise SyncError("the sampler sleeps and holds nobody's weights: reload it before it is asked")


class VLLMSampler(Sampler):
    """An in-process vLLM engine.

    model: directory or hub name; vocab: ids from it on are never sampled; stop_ids: those that end a
    completion; dtype: the policy's computing dtype; max_length: tokens of prompt + completion; gpu_memory:
    vLLM's share of the GPU (weights and KV cache); sleep: whether `sleep` frees the GPU; trust: whether code
    that comes with the model may run.
    """

    as_in_files = True

    def __init__(
        self, model: str, *, tokenizer, vocab: int, stop_ids: list[int], device, dtype, max_length: int,
        gpu_memory: float, sleep: bool, trust: bool,
    ):  # fmt: skip
        # vLLM's settings, all read at its import. One process. The model runner that a CPU has, on a GPU too:
        # it draws from torch's generator, which `generate` seeds, and takes the logits processor below. On a
        # CPU 1 GiB of KV cache instead of a share of the memory, and no threads bound to the policy's cores.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        # on a GPU its log says what it does as it starts; later it would write at every sleep and wake-up
        quiet = device.type == "cuda" and "VLLM_LOGGING_LEVEL" not in os.environ
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if device.type == "cuda" else "ERROR")
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
        before = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            # quantized weights, which an evaluation may sample with, are smaller than their shapes say
            weights = 0 if getattr(config, "quantization_config", None) else weight_bytes(config, trust)
            if fault := memory_fault(weights, total - free, total, gpu_memory):
                raise ArgumentError(None, f"--model {model}: {fault}")
            before = torch.cuda.memory_allocated()
        # too little memory, an architecture or a kernel that it lacks
        with naming(f"--model {model}: vLLM does not start", " ({}); --sampler hf may do"):
            self.llm = LLM(
                model,
                dtype=dtype,
                trust_remote_code=trust,
                max_model_len=max_length,
                gpu_memory_utilization=gpu_memory,
                enforce_eager=device.type == "cpu",  # CUDA graphs on a GPU
                # whole blocks of a prompt are read once for all completions; a CPU has 128 otherwise
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
            # a kernel that the model's shape lacks is only missed when the engine is first asked
            params = SamplingParams(max_tokens=1, detokenize=False)
            self.llm.generate([{"prompt_token_ids": [0]}], params, use_tqdm=False)
        if quiet:
            logging.getLogger("vllm").setLevel("WARNING")
        self.pool = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
        atexit.register(self.close)  # whatever ends the process

    @property
    def sequences(self) -> float:
        """How many of full length vLLM can work on at one time: more have to wait, or are computed again."""
        config = self.llm.llm_engine.vllm_config
        return min(config.cache_config.kv_cache_max_concurrency, config.scheduler_config.max_num_seqs)

    @property
    def capacity(self) -> str:
        tokens = self.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        sequences = f"{self.sequences:,.0f} sequences of full length at one time"
        return f"keys and values of {tokens:,} tokens, {sequences} on each rank"

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
        self.check_awake()
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
            torch.cuda.empty_cache()  # what the update has left there is of no use to the engine
            self.llm.wake_up(tags=["weights"])
        entries = {}
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": note_entries(weights, entries)})
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self._forget()
        [fault] = self.llm.apply_model(lambda model: difference(model, entries))
        self.llm.apply_model(_pack_for_cpu)
        if fault:
            raise SyncError(f"after the reload at step {version} vLLM does not hold the policy's {fault}")
        self.version = version

    def _forget(self):
        if not self.llm.reset_prefix_cache():
            raise SyncError(
                "vLLM keeps keys and values of its old weights: it could not reset its prefix cache"
            )

    def sleep(self):
        """Nobody asks it until the next reload. On a GPU it drops its weights, keys and values."""
        if self.can_sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True
        self.version = None

    def close(self):
        """Ends the engine; again is no harm. vLLM takes torch's process groups down with it, and so no
        collective may follow.
        """
        if self.llm is None:
            return
        if self.asleep:  # memory that sleeps cannot be freed: CUDA complains of each segment
            with contextlib.suppress(RuntimeError):  # no room: what ended the process may hold it
                self.llm.wake_up()
        self.llm.llm_engine.engine_core.shutdown()  # not left to its last reference: there are cycles
        self.llm = None
        atexit.unregister(self.close)
        gc.collect()


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


def _pack_for_cpu(model):
    """On a CPU vLLM multiplies with packed copies of matrices. A reload packs what was sent, but neither an
    output matrix that is tied to the embedding, which is not sent, nor experts, which it packs once.
    """
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel and layer.w13_weight.device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(layer)


def load_sampler(kind: str, model: str, **engine):
    """Starts the sampler `kind`, "vllm" or "hf"; engine: the arguments of `VLLMSampler`."""
    if kind == "vllm":
        return VLLMSampler(model, **engine)
    from sampler_hf import HFSampler

    return HFSampler(model, **engine)


def require_sampler(kind: str):
    """Raises ArgumentError where the sampler `kind` is not installed; costs nothing, so it comes first."""
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        ways = "install requirements.txt (GPU) or requirements-cpu.txt, or pass --sampler hf"
        raise ArgumentError(None, f"--sampler vllm: vLLM is not installed; {ways}")


def sample(sampler, rows: list, n: int, args: Namespace, *key) -> list[tuple]:
    """(row, n completions) for each row; key, rank and --seed make the seed: no two calls draw alike."""
    seed = random.Random(f"{args.seed} {key} {dist.get_rank()}").getrandbits(63)
    groups = sampler.generate([row.ids for row in rows], n, args.max_new_tokens, args.temperature, seed)
    return list(zip(rows, groups, strict=True))
