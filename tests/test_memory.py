"""results/memory.py against real small models."""

import sys

import pytest
import torch
from conftest import ROOT, forward
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT / "results"))
from memory import MODELS, Shape, activations, memory

TOY_SHAPE = Shape(128, 4, 4, 4, 256, 64)


def test_parameters_and_what_is_kept_for_each(policy):
    optimizer = torch.optim.AdamW(policy.parameters(), foreach=True)
    _, logps_BT, _ = forward(policy, [([5, 6], [[7, 3]])])
    logps_BT.sum().backward()
    optimizer.step()
    size = lambda tensors: sum(t.nbytes for t in tensors)  # noqa: E731
    found = memory(TOY_SHAPE, 1, 1, False)
    parameters = list(policy.parameters())
    assert TOY_SHAPE.parameters == sum(p.numel() for p in parameters)
    assert size(parameters) == found["master weights"]
    assert size(p.grad for p in parameters) == found["gradients"]
    moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
    assert size(moments) == found["Adam's moments"]
    assert memory(TOY_SHAPE, 4, 1, False)["gradients"] * 4 == found["gradients"]


def test_the_size_of_llama_8b():
    assert Shape().parameters == 8_030_261_248


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [Shape(128, 3, 4, 2, 256, 64), Shape(64, 5, 4, 4, 320, 64)])
def test_activations_are_those_that_autograd_saves(shape, checkpointing):
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate, vocab_size=shape.vocab,
        )
    ).to(torch.bfloat16)  # fmt: skip
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > 64 * 8:  # not positions and the like
            saved[storage.data_ptr()] = storage.nbytes(), tensor  # held: its address is not used again
        return tensor

    tokens = 4 * 96
    layers = model.get_decoder().layers if checkpointing else []
    for layer in layers[1:]:  # all but one: while a layer is computed again, it has everything
        layer.training, layer.gradient_checkpointing = True, True
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for i, layer in enumerate(layers):
            layer.training = i > 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_decoder()(input_ids=torch.zeros(4, 96, dtype=torch.int64), use_cache=False)
    found = sum(size for size, _ in saved.values())
    assert found == pytest.approx(activations(shape, tokens, checkpointing), rel=0.05)


@pytest.mark.parametrize(
    ("name", "parameters"),  # as the models' cards give them, in billions
    [("Qwen2.5 0.5B", 0.494), ("Qwen2.5 1.5B", 1.543), ("Qwen2.5 3B", 3.086), ("Llama 3.1 8B", 8.030)],
)
def test_the_models_of_the_table_have_their_sizes(name, parameters):
    assert MODELS[name].parameters / 1e9 == pytest.approx(parameters, rel=2e-3)
