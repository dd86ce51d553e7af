"""Log-probs against Hugging Face's own logits, the reference, full weights, export."""

import copy
import math
from argparse import ArgumentError

import pytest
import torch
from conftest import TOY, example, forward, logps_of
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from export import export
from loading import load_policy, load_reference
from packing import Sequence, collate
from policy import Policy, Reference, TokenLogps, clip_gradients, local
from tokenizer import load_tokenizer

SEQUENCES = [
    ([1, 5, 41, 8, 2], [9, 8, 3]),
    ([1, 5, 2], [11, 12, 13, 14, 15, 16, 3]),
    ([1, 7, 8, 9, 10, 41, 9, 9, 2], [4]),
    ([1, 2], [3]),
]


def logps_by_transformers(directory, sequences, vocab, temperature=1.0, left=0):
    """Each sequence by itself, `left` padding tokens before it; full log_softmax."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    out = []
    for prompt, completion in sequences:
        ids = torch.tensor([[0] * left + prompt + completion])
        seen = torch.tensor([[0] * left + [1] * (ids.shape[1] - left)])
        position = torch.tensor([[0] * left + list(range(ids.shape[1] - left))])
        logits = model(input_ids=ids, attention_mask=seen, position_ids=position).logits[0, :, :vocab]
        logps = (logits.double() / temperature).log_softmax(-1)[left + len(prompt) - 1 : -1]
        out.append(logps.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1))
    return out


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_equal_log_softmax_of_transformers(device, tokenizer, left, temperature, monkeypatch):
    monkeypatch.setattr("policy.CHUNK_LOGITS", {"cpu": 64 * 5, "cuda": 64 * 5})  # several chunks of 5 tokens
    policy = load_policy(str(TOY), device, len(tokenizer), temperature)
    sequences = copy.deepcopy(SEQUENCES)
    got = logps_of(policy, sequences, 64)
    assert sequences == SEQUENCES
    for mine, theirs in zip(got, logps_by_transformers(TOY, SEQUENCES, 64, temperature, left), strict=True):
        assert mine.tolist() == pytest.approx(theirs.tolist(), rel=1e-6, abs=1e-5)


def test_ids_beyond_the_tokenizer_have_no_probability(device, tokenizer, padded_model):
    policy = load_policy(padded_model, device, len(tokenizer), 1.0)
    wanted = logps_by_transformers(padded_model, SEQUENCES, len(tokenizer))
    wrong = logps_by_transformers(padded_model, SEQUENCES, len(tokenizer) + 16)
    for mine, theirs, other in zip(logps_of(policy, SEQUENCES, 64), wanted, wrong, strict=True):
        assert mine.tolist() == pytest.approx(theirs.tolist(), rel=1e-6, abs=1e-5)
        assert (mine - other).abs().max() > 0.01


def alone(sequences):
    """A row for each (prompt, completion)."""
    return [(prompt, [completion]) for prompt, completion in sequences]


def test_inputs_are_unchanged_and_the_mask_is_the_completion_with_its_end(policy):
    sequences = [Sequence(example(prompt, [completion]), [0]) for prompt, completion in SEQUENCES]
    batch = collate(sequences, policy)
    before = copy.deepcopy(batch)
    logps_BT, entropy_BT = policy(batch)
    for name, tensor in vars(before).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(getattr(batch, name), tensor)
    mask_BT = batch.mask_BT
    assert mask_BT.sum(-1).tolist() == [len(completion) for _, completion in SEQUENCES]
    assert batch.target_N.tolist() == sum(
        (completion for _, completion in SEQUENCES), []
    )  # with its end token, 3
    assert (logps_BT[~mask_BT] == 0).all() and (entropy_BT[~mask_BT] == 0).all()
    assert (logps_BT[mask_BT] < 0).all()


SHARED = [
    ([1, 5, 41, 8, 2], [[9, 8, 3], [7], [], [9, 8, 3], [11, 12, 3]]),
    ([1, 2], [[3]]),
    ([1, 6, 2], [[4, 5], [6, 3]]),
    ([1, 7, 9, 2, 6, 8], [[4, 5, 6, 3]]),
]
FAMILIES = {  # transformers' model_type -> what it needs
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 16}, "olmo2": {},
    "phi3": {"pad_token_id": 0}, "smollm3": {"pad_token_id": 0, "no_rope_layers": [1, 0]}, "gpt_neox": {},
    "glm4": {"head_dim": 16, "pad_token_id": 0}, "cohere": {"logit_scale": 0.25, "pad_token_id": 0},
    "granite": {"logits_scaling": 8.0}, "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip
OTHERS = {
    "gemma2": {}, "gemma3_text": {}, "mistral": {"sliding_window": 8}, "jamba": {}, "qwen3_next": {},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
}  # fmt: skip


def tiny(family, more, directory):
    """A random model of two layers, whose biases and norms are random too."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 64, "eos_token_id": 3, "bos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | more))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(directory)
    return str(directory)


def weighted(logps, entropy, b):
    """Of completion b: a sum in which each token's log-prob and entropy weighs something else."""
    return ((logps + 0.1 * entropy) * torch.arange(8 * b + 1, 8 * b + 1 + len(logps))).sum()


def plain_logps_entropies_gradient(directory, sequences, vocab, temperature):
    """The model's own logits, one sequence at a time, and autograd through all of them."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    logps, entropies, total = [], [], 0.0
    for b, (prompt, completion) in enumerate(sequences):
        ids = prompt + completion
        logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : len(ids) - 1]
        all_logps = (logits[:, :vocab] / temperature).log_softmax(-1)
        logps.append(all_logps.gather(-1, torch.tensor(completion, dtype=torch.int64)[:, None])[:, 0])
        entropies.append(-(all_logps.exp() * all_logps).sum(-1))
        total = total + weighted(logps[-1], entropies[-1], b)
    total.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logps).detach(), torch.cat(entropies).detach(), gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_entropies_and_gradient_are_the_plain_models(family, device, tmp_path):
    """Completions that share the row of their prompt, and a row for each; a vocabulary padded by 4 ids."""
    directory = tiny(family, FAMILIES[family], tmp_path)
    apart = [(prompt, [completion]) for prompt, completions in SHARED for completion in completions]
    plain = [(prompt, completion) for prompt, [completion] in apart]
    logps, entropies, gradient = plain_logps_entropies_gradient(directory, plain, 60, 0.8)
    policy = load_policy(directory, device, 60, 0.8)
    assert policy.shares == (family not in ("gemma2", "gemma3_text"))  # which have layers of a sliding window
    for groups, rows in ((SHARED, 2), (apart, 9)) if policy.shares else ((apart, 9),):
        batch, logps_BT, entropy_BT = forward(policy, groups)
        assert batch.ids_RL.shape[0] == rows
        mask_BT = batch.mask_BT
        assert torch.allclose(logps_BT[mask_BT], logps, atol=1e-5)
        assert torch.allclose(entropy_BT[mask_BT], entropies, atol=1e-5)
        sum(weighted(logps_BT[b][m], entropy_BT[b][m], b) for b, m in enumerate(mask_BT)).backward()
        mine = {name: local(p.grad) for name, p in policy.lm.named_parameters()}
        for name, wanted in gradient.items():
            assert (mine[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6, name
        policy.zero_grad()
        policy.shares = False


OWN_WAYS = [
    ("falcon_h1", {"lm_head_multiplier": 0.3, "head_dim": 16}),
    ("hyperclovax", {"logits_scaling": 8.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "more"), OWN_WAYS)
def test_a_family_that_makes_its_logits_in_another_way_is_refused(family, more, dtype, device, tmp_path):
    """Falcon H1 has a factor of another name; HyperCLOVA X multiplies by what granite divides by."""
    directory = tiny(family, more, tmp_path)
    AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    with pytest.raises(ArgumentError, match=r"differ from \w+ForCausalLM's own by \d[.\d]* nats on average"):
        load_policy(directory, device, 60, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_bfloat16_is_no_reason_to_refuse(family, device, tmp_path):
    directory = tiny(family, FAMILIES[family], tmp_path)
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    load_policy(directory, device, 60, 1.0)


@pytest.mark.parametrize("family", OTHERS)
def test_models_whose_layers_see_less_or_remember_more_do_not_share(family, device, tmp_path):
    config = AutoConfig.for_model(family, **OTHERS[family])
    config._attn_implementation = "sdpa"
    lm = torch.nn.Module()
    lm.config = config
    policy = Policy(lm, 64, 1.0)
    assert not policy.shares


def test_entropy_is_that_of_the_next_token(policy):
    batch, _, entropy_BT = forward(policy, alone(SEQUENCES[:1]))
    prompt, completion = SEQUENCES[0]
    model = AutoModelForCausalLM.from_pretrained(TOY)
    probs = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].softmax(-1)
    wanted = -(probs * probs.log()).sum(-1)
    assert entropy_BT[batch.mask_BT].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_gradients_of_logps_and_entropies_equal_autograd_through_whole_logits(monkeypatch):
    monkeypatch.setattr("policy.CHUNK_LOGITS", {"cpu": 50 * 3, "cuda": 50 * 3})
    torch.manual_seed(0)
    hidden, head, target = torch.randn(10, 8), torch.randn(60, 8), torch.randint(0, 50, (10,))
    weight_logp, weight_entropy = torch.randn(2, 10)
    grads = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if chunked:
            logps, entropy = TokenLogps.apply(h, w, target, 50, 0.7)
        else:
            all_logps = ((h @ w[:50].T) / 0.7).log_softmax(-1)
            logps, entropy = (
                all_logps.gather(-1, target[:, None])[:, 0],
                -(all_logps.exp() * all_logps).sum(-1),
            )
        (weight_logp * logps + weight_entropy * entropy).sum().backward()
        grads.append((h.grad, w.grad))
    for mine, plain in zip(*grads, strict=True):
        assert torch.allclose(mine, plain, rtol=1e-5, atol=1e-5)
    assert (grads[0][1][50:] == 0).all()


def gradient(policy, batches):
    for batch in batches:
        _, logps_BT, _ = forward(policy, alone(batch))
        (logps_BT.sum(-1) * torch.arange(1, len(logps_BT) + 1)).sum().backward()
    return torch.cat([local(p.grad).flatten() for p in policy.parameters()])


def test_gradient_equals_that_of_transformers_and_survives_recomputation(device, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TOY)
    for weight, (prompt, completion) in enumerate(SEQUENCES, 1):
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        (weight * logps.gather(-1, torch.tensor(completion)[:, None]).sum()).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    for recompute in (False, True):
        policy = load_policy(str(TOY), device, len(tokenizer), 1.0, activation_checkpointing=recompute)
        got = gradient(policy, [SEQUENCES])
        assert (got - wanted).norm() / wanted.norm() < 1e-5
    layers = policy.lm.model.layers
    assert all(layer.gradient_checkpointing and layer.training for layer in layers)


def test_an_empty_batch_takes_part_and_changes_nothing(policy):
    wanted = gradient(policy, [SEQUENCES])
    policy.zero_grad()
    assert torch.equal(gradient(policy, [SEQUENCES, []]), wanted)


def scale(policy, factor):
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(factor)


def test_a_reference_is_the_policy_until_its_first_update_and_follows_where_it_should(
    policy, device, tokenizer
):
    """The log-probs are the toy's, or the policy's when it was last followed; never with a gradient."""
    batch, toys, _ = forward(policy, alone(SEQUENCES))
    for follows in (True, False):
        reference = load_reference(
            str(TOY), needed=True, follows=follows, device=device, vocab=len(tokenizer), temperature=1.0
        )
        logps_BT, _ = policy(batch)
        assert (
            torch.equal(reference(batch, logps_BT, 0), logps_BT)
            and not reference(batch, logps_BT, 0).requires_grad
        )
        scale(policy, 1.5)
        moved, _ = policy(batch)
        assert (moved - toys).abs().max() > 0.1
        assert torch.allclose(reference(batch, moved, 7), toys, atol=1e-6)
        reference.follow(policy, 8)
        scale(policy, 2)
        wanted = moved if follows else toys
        assert torch.allclose(reference(batch, toys, 9), wanted, atol=1e-6)
        assert not reference(batch, logps_BT, 9).requires_grad
        assert torch.equal(reference(batch, logps_BT, 8), logps_BT) == follows  # the step of the sync
        scale(policy, 1 / 3)


def test_no_reference_is_the_policy_itself_at_every_step(policy):
    batch, logps_BT, _ = forward(policy, alone(SEQUENCES))
    none = Reference(None, follows=True)
    none.follow(policy, 3)
    for step in (0, 3, 4):
        assert torch.equal(none(batch, logps_BT, step), logps_BT)
        assert not none(batch, logps_BT, step).requires_grad


def test_full_weights_have_the_names_and_values_of_the_checkpoint(policy):
    wanted = dict(AutoModelForCausalLM.from_pretrained(TOY).named_parameters())
    got = dict(policy.full_weights(torch.bfloat16))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name].to(torch.bfloat16)) for name in wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_an_ordinary_directory(device, tokenizer, tmp_path, tied):
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, tie_word_embeddings=tied, dtype=torch.bfloat16)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    policy = load_policy(str(tmp_path / "in"), device, 64, 1.0)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    export(policy, tokenizer, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    old = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype="auto").named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, (old[name].float() + 1).to(torch.bfloat16))
    assert load_tokenizer(str(tmp_path / "out"), 64)[0].chat_template == tokenizer.chat_template
    assert not (tmp_path / "out.partial").exists()


def test_a_reference_in_bfloat16_keeps_its_rotary_frequencies(policy, device, tokenizer, monkeypatch):
    monkeypatch.setattr("loading.compute_dtype", lambda device: torch.bfloat16)  # as on a GPU
    reference = load_policy(str(TOY), device, len(tokenizer), 1.0, trainable=False)
    assert all(p.dtype == torch.bfloat16 for p in reference.parameters())
    mine, theirs = (p.lm.model.rotary_emb.inv_freq for p in (reference, policy))
    assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


def test_clip_returns_the_norm_before(policy):
    grads = gradient(policy, [SEQUENCES])
    norm = grads.double().norm().item()
    assert clip_gradients(policy, norm / 4) == pytest.approx(norm, rel=1e-5)
    after = torch.cat([local(p.grad).flatten() for p in policy.parameters()]).double().norm().item()
    assert after == pytest.approx(norm / 4, rel=1e-4)
    policy.zero_grad()
    assert clip_gradients(policy, 1.0) == 0 and math.isfinite(norm)


def test_replicas_read_the_model_once_and_add_up_gradients_once(script):
    script("tests/replicas.py", ranks=4)
