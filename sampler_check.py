"""Whether a sampler holds the policy's weights after a reload, and whether its engine fits on a GPU."""

from dataclasses import replace

import torch

from packing import Example, micro_batches

# Expected |policy - sampler| of a token's log-prob right after a reload, as (mean, max) in nats. In float32
# only the order of sums differs (mean 3e-7 for the toy, 1.5e-5 for a 135M model); in bfloat16 single tokens
# are off by tenths, which average out.
GAP_LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 2.0)}
# Of the self-test: completions, and the first tokens of each (reading the prompt yields only the first one)
TEST_COMPLETIONS, TEST_TOKENS = 8, 4
TEST_BATCH = 2**14  # padded tokens of one forward
EXPERTS = [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]  # how files name an expert's matrices
ENTRIES = 4096  # entries of each tensor that are read back from the engine after a reload


class SyncError(SystemExit):
    """The sampler does not hold the policy's weights; uncaught, one line and exit code 1."""


@torch.no_grad()
def self_test(sampler, policy, groups: list) -> dict[str, float]:
    """Scores the beginnings of the first completions after a reload with the policy that the weights came
    from; collective.

    groups: (row, completions); the first completion of each prompt comes first. Returns
    sampler/logp_gap_mean and _max of |policy - sampler| over tokens (nats) on this rank, nothing on one
    without completions; raises SyncError, with the worst token, where the gaps are beyond GAP_LIMITS of the
    sampler's dtype.
    """
    first = [(row, cs[k]) for k in range(TEST_COMPLETIONS) for row, cs in groups if k < len(cs)]
    examples = [
        Example(row, [replace(c, ids=c.ids[:TEST_TOKENS], logps=c.logps[:TEST_TOKENS])])
        for row, c in first[:TEST_COMPLETIONS]
    ]
    found = {}
    for batch in micro_batches(examples, policy, TEST_BATCH):
        gaps_BT = (policy(batch)[0] - batch.sampler_BT).abs()
        for (example, _), gaps_T, mask_T in zip(batch.origin_B, gaps_BT, batch.mask_BT, strict=False):
            found[id(example)] = gaps_T[mask_T].cpu()
    if not examples:
        return {}
    gaps = torch.cat([found[id(example)] for example in examples]).nan_to_num(nan=float("inf"))
    limit_mean, limit_max = GAP_LIMITS[sampler.dtype]
    if gaps.mean() > limit_mean or gaps.max() > limit_max:
        tokens = [i for example in examples for i in example.completions[0].ids]
        worst = sampler.tokenizer.decode([tokens[int(gaps.argmax())]])
        raise SyncError(
            f"the sampler (version {first[0][1].version}) does not hold the policy's weights: log-probs of "
            f"its own tokens differ by {gaps.mean():.2g} on average (limit {limit_mean:g}) and "
            f"{gaps.max():.2g} at most (limit {limit_max:g}), which is at the token {worst!r}"
        )
    return {"sampler/logp_gap_mean": gaps.mean().item(), "sampler/logp_gap_max": gaps.max().item()}


def note_entries(weights, entries: dict):
    """Passes the pairs on; keeps evenly spaced entries of each tensor, to look for them in the engine."""
    for name, tensor in weights:
        entries[name] = (tensor.shape, tensor.flatten()[:: _stride(tensor)].clone())
        yield name, tensor


def _stride(tensor) -> int:
    return max(1, tensor.numel() // ENTRIES)


def difference(model, entries: dict) -> str | None:
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
        if whole.endswith((".w13_weight", ".w2_weight")):  # the experts of a layer, in a tensor of each kind
            parts = _experts(whole, param.data, entries)
        elif whole in entries:
            parts = [(whole, param.data)]
        else:
            parts = _rows(whole, param.data, module, joined.get(module, [module]), entries)
        for name, held in parts:
            if name not in entries:
                missing = name
                continue
            known = True
            shape, noted = entries[name]
            if held.shape == shape:
                gap = (held.flatten()[:: _stride(held)].float() - noted.float()).abs().max().item()
                if not gap <= worst_gap:  # NaN counts as a difference
                    worst, worst_gap = name, gap
    if known and missing:
        return f"{missing}: it was not among the tensors that were sent"
    return worst and f"{worst}: entries differ by up to {worst_gap:.2g}"


def _rows(whole: str, tensor, module: str, joined: list[str], entries: dict):
    """(name, rows) of each matrix that vLLM has joined into one."""
    row = 0
    for part in joined:
        name = whole.replace(f"{module}.", f"{part}.")
        size = entries[name][0][0] if name in entries else 0
        yield name, tensor[row : row + size]
        row += size


def _experts(whole: str, tensor, entries: dict):
    """(name, matrix) of each expert, as models' files name them. vLLM joins gate and up by rows."""
    stem = whole[: whole.index(".experts.") + len(".experts.")]
    sent = [name for name in entries if name.startswith(stem)]
    found = [names for names in EXPERTS if any(name.endswith(f".{names[0]}.weight") for name in sent)]
    if not found:  # the model's files have its experts joined: the log-probs have to tell
        return
    gate, up, down = found[0]
    for expert, held in enumerate(tensor):
        if whole.endswith(".w2_weight"):
            yield f"{stem}{expert}.{down}.weight", held
        else:
            half = len(held) // 2
            yield f"{stem}{expert}.{gate}.weight", held[:half]
            yield f"{stem}{expert}.{up}.weight", held[half:]


def memory_fault(weights: int, held: int, total: int, share: float) -> str | None:
    """Why an engine does not fit on a GPU, or None: bytes of its weights, of what is held already, of all;
    share: --gpu-memory.
    """
    gib = 2**30
    mine, there = f"its {weights / gib:.1f} GiB of weights", f"this GPU's {total / gib:.1f} GiB"
    if held + weights > total:
        beside = f"beside the {held / gib:.1f} GiB that are held there already, by the policy for one"
        return f"{mine} do not fit into {there} {beside}: take more GPUs, larger ones or a smaller model"
    if weights > share * total:
        return f"{mine} are more than --gpu-memory {share:g} of {there}: raise it"
    if held + share * total > total:
        most = (total - held) / total
        return f"--gpu-memory {share:g} of {there} is more than is free: lower it, at most to {most:.2f}"
    return None


def weight_bytes(config, trust: bool) -> int:
    """Of a whole model in bfloat16."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return 2 * sum(p.numel() for p in model.parameters())
