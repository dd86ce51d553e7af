"""The trained model as everybody else reads it: an ordinary Hugging Face directory with a model card."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path

import torch.distributed as dist
import transformers
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils import cached_file

from processes import first_line, naming


def rehearse_export(policy, tokenizer, model: str):
    """Writes on rank 0, to no lasting place, all that `export` will write but the weights. Raises
    ArgumentError, naming `model`, for one that transformers loads and would not save again.
    """
    if dist.get_rank() == 0:
        transformers.logging.disable_progress_bar()  # of shards that are not written
        with tempfile.TemporaryDirectory() as directory, naming(f"--model {model}: cannot be saved", " ({})"):
            _write(policy, tokenizer, Path(directory), {})
        transformers.logging.enable_progress_bar()


def export(policy, tokenizer, directory: Path):
    """Writes the policy's weights in the dtype of the original; collective, rank 0 writes.

    The tensors are gathered one at a time into rank 0's host memory; the directory appears under its name
    only when it is complete.
    """
    writes = dist.get_rank() == 0
    state = {}
    for name, tensor in policy.full_weights(policy.lm.config.dtype):
        if writes:
            state[name] = tensor.cpu()
    if writes:
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write(policy, tokenizer, partial, state)
        except (OSError, SafetensorError) as error:
            raise SystemExit(f"stopped: {directory} cannot be written ({first_line(error)})") from error
        if directory.exists():  # of a run that goes on with more steps
            shutil.rmtree(directory)
        partial.rename(directory)
    dist.barrier()


def _write(policy, tokenizer, directory: Path, state: dict):
    """The original's generation_config.json is copied as it is: some cannot be saved by what loaded them."""
    lm = policy.lm
    dtype = lm.config.dtype
    name = "generation_config.json"
    original = cached_file(lm.name_or_path, name, _raise_exceptions_for_missing_entries=False)
    if original:
        lm.generation_config = GenerationConfig()
    lm.save_pretrained(directory, state_dict=state)
    if original:
        shutil.copy(original, directory / name)
    lm.config.dtype = dtype  # save_pretrained has noted the master weights' float32
    lm.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def model_card(facts: dict, results: dict[str, float]) -> str:
    """A README.md for the exported model, in the hub's form; the licence is the owner's to choose.

    facts: what args.json holds; results: name -> number, at the end of the run.
    """
    args, [script, *flags] = facts["args"], facts["command"]
    script, model, s = Path(script).name, args["model"], args["sync_steps"]
    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=None if Path(model).exists() else model,
        tags=["reinforcement-learning", Path(script).stem.removeprefix("train_")],
    )
    synced = "kept its first weights" if s == "inf" else f"took over the policy's weights every {s} step(s)"
    data = ", ".join(map(str, args["rollouts"] or args["data"]))
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in results.items())
    settings = json.dumps({"flags": args, "versions": facts["versions"]}, default=str)
    return f"""---
{about}
---

# {Path(model).name} after {args["steps"]} steps of {script}

Base model: {model}. Data: {data}. The sampler {synced}. Licence: yet to be chosen, as those of the base model
and of the data allow.

```
{shlex.join([script, *flags])}
```

| at the end | |
|---|---|
{table}

All settings, with {facts["ranks"]} rank(s), at commit {facts["commit"]}: `{settings}`
"""
