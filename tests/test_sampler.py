"""The real vLLM: what it samples, that it takes the policy's weights, and that a failed reload is caught."""

import contextlib
import json
import math
import re
import shutil
from argparse import ArgumentError

import pytest
import torch
from conftest import ROOT, SUMS, TOY, engine, logps_of, require_vllm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TopPLogitsWarper

from data import Row
from loading import load_policy
from packing import micro_batches
from policy import local
from sampler import load_sampler, require_sampler
from sampler_check import SyncError, difference, memory_fault, note_entries, self_test, weight_bytes
from sampler_hf import _log_softmax
from tokenizer import load_tokenizer

F32 = torch.float32


@pytest.fixture(scope="session")
def hf(device, tokenizer, padded_model):
    return load_sampler("hf", padded_model, **engine(tokenizer, device))


@pytest.fixture(params=["vllm", "hf"])
def sampler(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def fresh(device, tokenizer, padded_model):
    """A policy with the weights that the samplers start with."""
    return load_policy(padded_model, device, len(tokenizer), 1.0)


def weights(policy):
    """A copy of all of them, as a sampler takes them."""
    return [(name, tensor.clone()) for name, tensor in policy.full_weights(F32)]


@pytest.fixture
def moved(fresh, sampler):
    """The same policy after one small optimizer step; afterwards the sampler gets its old weights back."""
    before = weights(fresh)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in fresh.parameters():  # what AdamW's first step does: lr per entry
            local(p).add_(2e-4 * torch.randn(p.shape, generator=generator).sign())
    yield fresh
    sampler.reload(before, 0)


def test_completions_are_what_was_sampled(sampler, prompts, tokenizer):
    groups = sampler.generate(prompts, 3, 3, 1.0, seed=1)
    assert [len(group) for group in groups] == [3] * len(prompts)
    completions = [c for group in groups for c in group]
    assert {c.finish for c in completions} == {"stop", "length"}
    for c in completions:
        assert 1 <= len(c.ids) <= 3 and len(c.logps) == len(c.ids)
        assert (c.ids[-1] == tokenizer.eos_token_id) == (c.finish == "stop")  # the end token is part of it
        assert tokenizer.eos_token_id not in c.ids[:-1]
        assert c.finish == "stop" or len(c.ids) == 3
        assert c.text == tokenizer.decode(c.ids, skip_special_tokens=True) and "<|" not in c.text
        assert c.version == 0 and c.reward is None


def test_ids_that_the_tokenizer_lacks_are_never_sampled(sampler, prompts, tokenizer, device, padded_model):
    sampled = [i for group in sampler.generate(prompts, 64, 4, 1.0, seed=2) for c in group for i in c.ids]
    assert max(sampled) < len(tokenizer)
    unbanned = load_policy(padded_model, device, len(tokenizer) + 16, 1.0)
    allowed = load_policy(padded_model, device, len(tokenizer), 1.0)
    [all_ids], [own_ids] = (logps_of(p, [(prompts[0], [9])]) for p in (unbanned, allowed))
    assert own_ids - all_ids > 0.1  # the padding would have been sampled, were it not banned


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logps_are_those_of_the_distribution_sampled_from(
    sampler, prompts, device, tokenizer, padded_model, temperature
):
    policy = load_policy(padded_model, device, len(tokenizer), temperature)
    groups = sampler.generate(prompts, 4, 6, temperature, seed=3)
    sequences = [(prompt, c.ids) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    theirs = [c.logps for group in groups for c in group]
    for mine, other in zip(logps_of(policy, sequences, 512), theirs, strict=True):
        assert other == pytest.approx(mine.tolist(), abs=1e-4)


def test_the_loop_of_hf_samples_as_generate_does(hf, prompts, tokenizer):
    """Greedy, prompts of several lengths together; every end token is where `generate` puts it."""
    assert len({*map(len, prompts)}) > 1
    groups = hf.generate(prompts, 2, 6, 0.0, seed=0)
    for prompt, group in zip(prompts, groups, strict=True):
        banned = [*range(len(tokenizer), len(tokenizer) + 16)]
        more = {"eos_token_id": hf.stop_ids, "pad_token_id": 0, "suppress_tokens": banned}
        [out] = hf.lm.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, **more)
        assert [c.ids for c in group] == [out[len(prompt) :].tolist()] * 2


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_top_p_keeps_what_transformers_keeps(top_p):
    logits = 3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    wanted = TopPLogitsWarper(top_p)(None, logits / 0.6).log_softmax(-1)
    assert torch.allclose(_log_softmax(logits, 0.6, top_p), wanted, atol=1e-5)


def test_frequencies_follow_the_logps(sampler, prompts):
    """2,000 first tokens of one prompt: each id's share within 4 standard errors of its probability."""
    [group] = sampler.generate(prompts[:1], 2000, 1, 1.0, seed=4)
    probability = {c.ids[0]: math.exp(c.logps[0]) for c in group}
    for token, p in probability.items():
        share = sum(c.ids[0] == token for c in group) / 2000
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 2000) + 1e-3


def test_a_seed_draws_the_same_again_and_another_something_else(sampler, prompts):
    draw = lambda seed: [c.ids for group in sampler.generate(prompts, 8, 6, 1.0, seed) for c in group]  # noqa: E731
    first = draw(5)
    assert draw(6) != first == draw(5)
    assert len({tuple(ids) for ids in first[:8]}) > 1  # nor are the samples of one prompt copies


def groups_of(sampler, prompts, n=1):
    rows = [Row("", prompt, None, None) for prompt in prompts]
    return list(zip(rows, sampler.generate(prompts, n, 6, 1.0, 0), strict=True))


def gaps_of(sampler, policy, prompts):
    return self_test(sampler, policy, groups_of(sampler, prompts))


def test_after_a_reload_the_sampler_is_the_policy_and_before_it_is_not(sampler, moved, prompts):
    with pytest.raises(SyncError):
        gaps_of(sampler, moved, prompts)
    sampler.reload(moved.full_weights(F32), 7)
    gaps = gaps_of(sampler, moved, prompts)
    assert gaps["sampler/logp_gap_max"] < 1e-3
    assert sampler.version == 7 and sampler.generate(prompts[:1], 1, 2, 1.0, 0)[0][0].version == 7


def test_a_sampler_that_sleeps_is_asked_only_after_a_reload(sampler, fresh, prompts):
    before = sampler.generate(prompts, 1, 6, 1.0, 0)
    sampler.sleep()
    sampler.sleep()
    with pytest.raises(SyncError, match="sleeps"):
        sampler.generate(prompts, 1, 6, 1.0, 0)
    sampler.reload(fresh.full_weights(F32), 0)
    assert sampler.generate(prompts, 1, 6, 1.0, 0) == before


def test_how_much_fits_is_said_in_tokens_and_sequences(vllm):
    """vLLM's own blocks of 32 tokens against 192, the longest sequence of this engine, and its scheduler."""
    blocks = vllm.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    tokens, sequences = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:tokens|sequences)", vllm.capacity)
    )
    assert 0.9 * blocks * 32 <= tokens <= blocks * 32
    scheduled = vllm.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    assert sequences == pytest.approx(min(scheduled, tokens / 192), abs=1)


@pytest.mark.parametrize("kept", [False, True])
def test_keys_and_values_of_old_weights_are_forgotten(vllm, fresh, monkeypatch, kept):
    """A prompt longer than a block of the prefix cache, asked before and after the weights change. A cache
    that only pretends to be reset is caught."""
    before, long = weights(fresh), [[5 + i % 30 for i in range(150)]]
    if kept:
        monkeypatch.setattr(vllm.llm, "reset_prefix_cache", lambda: True)
    gaps_of(vllm, fresh, long)
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(1.1)
    vllm.reload(fresh.full_weights(F32), 1)
    with pytest.raises(SyncError) if kept else contextlib.nullcontext():
        gaps_of(vllm, fresh, long)
    monkeypatch.undo()
    vllm.reload(before, 0)


def test_completions_that_share_blocks_of_their_prompt_have_the_policys_logps(vllm, fresh, prompts):
    """A prompt of more than a block is read once for all its completions, which all see all of it."""
    long = [[5 + i % 30 for i in range(150)], [6 + i % 7 for i in range(97)], *prompts]
    groups = vllm.generate(long, 4, 6, 1.0, seed=0)
    sequences = [(prompt, c.ids) for prompt, group in zip(long, groups, strict=True) for c in group]
    theirs = [c.logps for group in groups for c in group]
    for mine, other in zip(logps_of(fresh, sequences), theirs, strict=True):
        assert other == pytest.approx(mine.tolist(), abs=1e-4)


def test_the_self_test_takes_more_completions_of_few_prompts(vllm, fresh, prompts, monkeypatch):
    """One prompt with eight completions is as many tokens as eight prompts with one."""
    seen = []

    def note(examples, *more):
        seen.append([(tuple(one.row.ids), one.completions) for one in examples])
        return micro_batches(examples, *more)

    monkeypatch.setattr("sampler_check.micro_batches", note)
    for count, n in ((1, 8), (3, 4), (8, 1)):
        self_test(vllm, fresh, groups_of(vllm, prompts[:count], n))
        assert len(seen[-1]) == 8 and {prompt for prompt, _ in seen[-1]} == {*map(tuple, prompts[:count])}
        assert all(len(completions) == 1 for _, completions in seen[-1])


def test_the_gaps_are_those_of_the_first_tokens(hf, fresh, prompts):
    """Mean and largest |policy - sampler| over the first four tokens of each, by the plain log-probs."""
    groups = groups_of(hf, prompts)
    for k, (_, [c]) in enumerate(groups):
        c.logps = [logp + (1e-5 * (k + 1) if t == 1 else 0) for t, logp in enumerate(c.logps)]
    found = self_test(hf, fresh, groups)
    ours = logps_of(fresh, [(row.ids, c.ids) for row, [c] in groups])
    gaps = [abs(a - b) for mine, (_, [c]) in zip(ours, groups, strict=True)
            for a, b in list(zip(mine.tolist(), c.logps, strict=True))[:4]]  # fmt: skip
    assert found["sampler/logp_gap_mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-2)
    assert found["sampler/logp_gap_max"] == pytest.approx(max(gaps), rel=1e-2) and max(gaps) > 5e-5


def test_a_cache_that_vllm_does_not_reset_stops_the_run(vllm, prompts, monkeypatch):
    monkeypatch.setattr(vllm.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(SyncError, match="could not reset its prefix cache"):
        vllm.generate(prompts, 1, 2, 1.0, 0)


NAMES = ["model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"]


def nothing(weights, sampler):
    list(weights)
    sampler.version = 1


def skip(name):
    return lambda weights, sampler: sampler.reload(((n, t) for n, t in weights if n != name), 1)


def swap(a, b):
    def reload(weights, sampler):
        weights = dict(weights)
        weights[a], weights[b] = weights[b], weights[a]
        sampler.reload(iter(weights.items()), 1)

    return reload


def stale(name):
    """The name is sent, but with the tensor from before the step: only the log-probs can tell. No name: all
    are the previous version's."""

    def reload(weights, sampler):
        old = load_policy(stale.model, torch.device("cpu"), 64, 1.0)
        old = dict(old.full_weights(F32))
        sampler.reload(((n, old[n] if name in ("", n) else t) for n, t in weights), 1)

    return reload


def transpose(name):
    return lambda weights, sampler: sampler.reload(
        ((n, t.T.contiguous() if n == name else t) for n, t in weights), 1
    )


def rounded(weights, sampler):
    """Sent in the wrong dtype: what arrives has lost its last 16 bits."""
    sampler.reload(((n, t.bfloat16().float()) for n, t in weights), 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (nothing, "token"),
        (skip(NAMES[0]), NAMES[0]),
        (skip("model.layers.2.self_attn.q_proj.weight"), "model.layers.2.self_attn.q_proj.weight"),
        (skip("model.norm.weight"), "model.norm.weight"),
        (swap(*NAMES), "token"),
        (swap(*(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")), "token"),
        (stale(NAMES[0]), "token"),
        (stale(""), "token"),
        (transpose("model.layers.1.self_attn.o_proj.weight"), "token"),
        (rounded, "token"),
    ],
)
def test_a_reload_that_fails_is_caught_at_once(sampler, moved, prompts, padded_model, fault, said):
    stale.model = padded_model
    with pytest.raises(SyncError, match=said):
        fault(moved.full_weights(F32), sampler)
        gaps_of(sampler, moved, prompts)


ENGINES = []  # vLLM takes torch's process group down when an engine goes, so they stay


@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_a_tied_matrix_that_is_forgotten_is_caught(kind, device, tokenizer, tmp_path, prompts):
    """One matrix is embedding and output layer, and is sent once."""
    if kind == "vllm":
        require_vllm()
    config = AutoConfig.from_pretrained(TOY, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), device, len(tokenizer), 1.0)
    tied = load_sampler(kind, str(tmp_path), **engine(tokenizer, device, max_length=64))
    ENGINES.append(tied)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.01)
    tied.reload(policy.full_weights(F32), 1)
    gaps_of(tied, policy, prompts)
    with torch.no_grad():
        policy.lm.get_input_embeddings().weight.mul_(1.05)
    name = "model.embed_tokens.weight"
    assert name in dict(policy.full_weights(F32)) and "lm_head.weight" not in dict(policy.full_weights(F32))
    with pytest.raises(SyncError, match=name):
        skip(name)(policy.full_weights(F32), tied)
        gaps_of(tied, policy, prompts)


@pytest.mark.parametrize("family", ["Qwen3MoeConfig", "MixtralConfig"])
def test_experts_are_reloaded_and_the_proof_covers_each(script, family):
    """In a process of its own: after an engine without experts vLLM starts none that has some."""
    require_vllm()
    script("tests/experts.py", family)


class Tensors(torch.nn.Module):
    """A model as vLLM holds it on a GPU, where tensors can be read back: q, k and v joined by rows."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.qkv_proj, self.norm = torch.nn.Linear(6, 24, bias=False), torch.nn.LayerNorm(6, bias=False)


def test_on_a_gpu_the_very_tensors_are_compared():
    model, entries = Tensors(), {}
    q, k, v = model.qkv_proj.weight.data.clone().split([12, 6, 6])
    sent = {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "norm.weight": model.norm.weight.data.clone(),
    }
    list(note_entries(sent.items(), entries))
    assert difference(model, entries) is None
    model.qkv_proj.weight.data[14, 3] += 1e-3  # a row of k
    assert "k_proj.weight: entries differ by up to 0.001" in difference(model, entries)
    model.qkv_proj.weight.data[14, 3] -= 1e-3
    model.qkv_proj.weight.data[12:18], model.qkv_proj.weight.data[18:24] = v, k
    assert "entries differ" in difference(model, entries)
    del entries["v_proj.weight"]
    assert "v_proj.weight: it was not among" in difference(model, entries)
    for entry in (0.0, 0.5):  # a family, such as phi3 or glm4, that joins them itself
        entries.clear()
        qkv = model.qkv_proj.weight.data.clone()
        qkv[20, 1] += entry
        sent = {"qkv_proj.weight": qkv, "norm.weight": model.norm.weight.data}
        list(note_entries(sent.items(), entries))
        said = difference(model, entries)
        assert said == (f"qkv_proj.weight: entries differ by up to {entry:.2g}" if entry else None)


def test_where_vllm_is_missing_both_ways_out_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"requirements.*--sampler hf"):
        require_sampler("vllm")
    require_sampler("hf")


def copy_of_the_toy(directory, **files):
    """files: a JSON file's name without its end -> what to change in it; None: it is left out."""
    shutil.copytree(TOY, directory, dirs_exist_ok=True)
    for name, change in files.items():
        path = directory / f"{name}.json"
        content = json.loads(path.read_text())
        path.unlink()
        if change is not None:
            path.write_text(json.dumps(content | change))
    return str(directory)


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, 5, [3, 5]),
        (None, [7, 5], [3, 5, 7]),
        (None, None, [3]),
        ({"eos_token_id": 9}, 5, [3, 9]),
        ({"eos_token_id": [9, 3]}, [5], [3, 9]),
    ],
)
def test_end_tokens_are_those_of_transformers_generate(generation, config, wanted, tmp_path):
    """config.json counts where there is no generation_config.json; the tokenizer's (3) always does."""
    model = copy_of_the_toy(tmp_path, generation_config=generation, config={"eos_token_id": config})
    _, _, stop_ids = load_tokenizer(model, 64)
    assert stop_ids == wanted
    used = AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id
    assert {*wanted} == {3, *(used if isinstance(used, list) else [used])} - {None}


def test_completions_stop_at_an_end_token_of_config_json(device, tmp_path, prompts):
    """A model whose completions all begin with a digit, of which config.json names ten as end tokens."""
    digits = list(range(4, 14))
    model = copy_of_the_toy(tmp_path, generation_config=None, config={"eos_token_id": digits})
    tokenizer, _, stop_ids = load_tokenizer(model, 64)
    hf = load_sampler("hf", model, **engine(tokenizer, device, stop_ids=stop_ids))
    completions = [c for group in hf.generate(prompts, 4, 6, 1.0, seed=0) for c in group]
    assert {len(c.ids) for c in completions} == {1} and {c.finish for c in completions} == {"stop"}


@pytest.fixture
def sparse(tmp_path):
    """A token with the id 70 where the others end at 63; it is the tokenizer's end token."""
    tokens = json.loads((TOY / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["<|far|>"] = 70
    added = tokens["added_tokens"] + [tokens["added_tokens"][-1] | {"id": 70, "content": "<|far|>"}]
    change = {"model": tokens["model"], "added_tokens": added}
    model = copy_of_the_toy(tmp_path, tokenizer=change, tokenizer_config={"eos_token": "<|far|>"})
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.resize_token_embeddings(80, mean_resizing=False)
    with torch.no_grad():
        lm.lm_head.weight[64:] = lm.lm_head.weight[4:14].mean(0) * 3
    lm.save_pretrained(model)
    return model


@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_a_token_beyond_the_number_of_tokens_can_be_sampled_and_ends_a_completion(
    kind, sparse, device, prompts
):
    if kind == "vllm":
        require_vllm()
    tokenizer, vocab, stop_ids = load_tokenizer(sparse, 64)
    assert (len(tokenizer), vocab) == (65, 71)
    assert stop_ids == [3, 70]  # generation_config.json's and the tokenizer's
    far = load_sampler(
        kind, sparse, **engine(tokenizer, device, vocab=vocab, stop_ids=stop_ids, max_length=64)
    )
    ENGINES.append(far)
    completions = [c for group in far.generate(prompts, 64, 6, 1.0, seed=0) for c in group]
    ends = [c.ids[-1] for c in completions if c.finish == "stop"]
    assert ends.count(70) > 20 and max(i for c in completions for i in c.ids) == 70
    policy = load_policy(sparse, device, vocab, 1.0)
    assert gaps_of(far, policy, prompts)["sampler/logp_gap_max"] < 1e-3


def test_the_toy_samples_about_one_completion_in_four_right(device, tokenizer):
    from make import probability_right

    model = load_sampler("hf", str(TOY), **engine(tokenizer, device)).lm
    right = probability_right(model, tokenizer, [(a, b) for a in range(0, 100, 7) for b in range(0, 100, 9)])
    assert 0.15 < right < 0.33


@pytest.mark.parametrize("end", ["done", "signal", "SyncError", "another rank has left"])
def test_whatever_ends_a_run_shuts_the_engine_down_once(script, end, tmp_path):
    """By its core's own method, and before its process ends."""
    require_vllm()
    program = tmp_path / "program.py"
    ways = {
        "done": "pass",
        "signal": "signal.raise_signal(signal.SIGTERM)",
        "SyncError": "raise sampler.SyncError('stale')",
        "another rank has left": "raise torch.distributed.DistError('connection closed')",
    }
    program.write_text(
        f"import signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, processes, sampler, rewards, train_dpo\n"
        "from vllm.v1.engine.core import EngineCore\n"
        "real, shut = rewards.Scorer.score, EngineCore.shutdown\n"
        "def score(self, groups):\n    real(self, groups)\n"
        f"    {ways[end]}\n"
        "def shutdown(self):\n    print('shut down', flush=True)\n    shut(self)\n"
        "rewards.Scorer.score, EngineCore.shutdown = score, shutdown\nprocesses.launch(train_dpo.main)\n"
    )
    flags = ["--steps", "2", "--eval-every", "0", "--prompts-per-step", "4", "--data", SUMS]
    flags += ["--out", tmp_path / "run"]
    codes = {"done": 0, "signal": 75, "SyncError": 1, "another rank has left": 1}
    done = script(program, *flags, code=codes[end])
    assert done.stdout.count("shut down") == 1 and "Traceback" not in done.stderr
    assert (f"{end} (connection closed)" in done.stderr) == ("rank" in end)


GIB = 2**30


@pytest.mark.parametrize(
    ("weights", "held", "total", "share", "said"),
    [
        (15 * GIB, 13 * GIB, 80 * GIB, 0.6, None),  # 8B on one of eight 80 GB GPUs
        (141 * GIB, 40 * GIB, 80 * GIB, 0.6, "its 141.0 GiB of weights do not fit into this GPU's 80.0 GiB"),
        (15 * GIB, 13 * GIB, 24 * GIB, 0.4, "do not fit into this GPU's 24.0 GiB beside the 13.0 GiB that"),
        (15 * GIB, 4 * GIB, 40 * GIB, 0.3, "are more than --gpu-memory 0.3 of this GPU's 40.0 GiB: raise it"),
        (15 * GIB, 28 * GIB, 80 * GIB, 0.7, "--gpu-memory 0.7 of this GPU's 80.0 GiB is more than is free"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_fit_on_the_gpu_is_named(weights, held, total, share, said):
    found = memory_fault(weights, held, total, share)
    assert found is None if said is None else said in found


def test_weights_are_counted_without_making_them():
    config = AutoConfig.from_pretrained(TOY)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(TOY).parameters())
    assert weight_bytes(config, trust=False) == 2 * parameters
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 80, 8192, 28672
    assert weight_bytes(config, trust=False) > 100e9


def test_an_engine_that_does_not_start_is_one_line(device, tokenizer, tmp_path):
    """Here because of its context, and of heads that the CPU's kernel does not know; on a GPU mostly for lack
    of memory.
    """
    require_vllm()
    narrow = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=64,
                         intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(narrow).save_pretrained(tmp_path)
    for model, length, reason in ((TOY, 4096, ""), (tmp_path, 32, "RuntimeError: .*head_dim=16")):
        said = rf"^--model \S+: vLLM does not start \({reason}"
        with pytest.raises(ArgumentError, match=said) as error:
            load_sampler("vllm", str(model), **engine(tokenizer, device, max_length=length))
        assert "\n" not in str(error.value)
