"""What a GPU holds while a Llama or Qwen2.5 is trained, in GiB.

    python results/memory.py            # by what it is for
    python results/memory.py --cards    # which models fit on which GPUs

Derived from the code, not measured on a GPU; tests/test_memory.py compares it with real small models. A
parameter takes 4 bytes (float32 master weight) + 4 (gradient) + 8 (Adam's moments) + 2 (reference, bfloat16),
sharded over --shard-ranks; the sampler's copy is whole on every GPU.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
GIB = 2**30


@dataclass
class Shape:
    """Of a Llama; the default is 3.1 8B."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    vocab: int = 128256
    tied: bool = False

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer(self) -> int:
        """Parameters of a layer: q and o, k and v, gate, up and down, two norms."""
        return self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.intermediate + 2)

    @property
    def matrix(self) -> int:
        """Parameters of the embedding, and of the output matrix."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.hidden + self.matrix * (1 if self.tied else 2)


def activations(shape: Shape, tokens: int, checkpointing: bool) -> int:
    """Bytes that the layers keep for the backward pass of `tokens` tokens, in bfloat16.

    A norm keeps its input in float32 and the normalized one; the three projections after it share their
    input. Attention keeps queries, keys, values and its output (and a float32 a head), which the next
    projection reads; the gated unit keeps gate, activated gate, up, and their product. With recomputation
    each layer keeps its input, and one at a time has the rest.
    """
    h, kv, i = shape.hidden, shape.kv, shape.intermediate
    norm = 4 * h + 2 * h + 4
    attention = 2 * h + 2 * (h + 2 * kv + h) + 4 * shape.heads
    layer = 2 * norm + attention + 2 * h + 4 * 2 * i
    last = norm  # after the layers
    kept = shape.layers * 2 * h + layer if checkpointing else shape.layers * layer
    return tokens * (kept + last)


def memory(
    shape: Shape, shard_ranks: int, tokens: int, checkpointing: bool, row: int = 6144
) -> dict[str, float]:
    """Bytes on each GPU by what they are for; tokens: of a micro-batch, padding included; row: of its rows,
    which have at most twice the tokens of the longest sequence.
    """
    from policy import CHUNK_LOGITS

    share = shape.parameters / shard_ranks
    root = shape.matrix + shape.hidden  # what the root's own forward gathers, for all of its time
    return {
        "master weights": 4 * share,
        "gradients": 4 * share,
        "Adam's moments": 8 * share,
        "reference": 2 * share,
        # a layer's or the embedding's weights and the next one's, which FSDP prefetches, beside the root's
        "gathered weights": 2 * (root + (shape.layer + max(shape.layer, 0 if shape.tied else shape.matrix))),
        # the output matrix's: summed in float32, cast to bfloat16, copied in float32 to be reduced
        "whole gradients": (4 + 2 + 4) * root,
        "attention mask": 2 * tokens * row,  # tokens of a row by tokens of a row, in bfloat16
        "activations": activations(shape, tokens, checkpointing),
        # of a chunk: logits in bfloat16 and float32, probabilities, gradient in float32 and bfloat16
        "logits": (2 + 4 + 4 + 4 + 2) * CHUNK_LOGITS["cuda"],
    }


# what does not go with a parameter that is trained
NOT_FOR_PARAMETERS = ("gathered weights", "whole gradients", "attention mask", "activations", "logits")


def shape_of(config) -> Shape | None:
    """Of a model with a config like Llama's; None for others."""
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    )
    sizes = [getattr(config, name, None) for name in names.split()]
    return Shape(*sizes, tied=config.tie_word_embeddings) if all(sizes) else None


MODELS = {
    "Qwen2.5 0.5B": Shape(896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5 1.5B": Shape(1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5 3B": Shape(2048, 36, 16, 2, 11008, 151936, True),
    "Llama 3.1 8B": Shape(),
}
CARDS = (24, 48, 80)  # GB, of which a driver leaves about 0.93 GiB each
CACHE, REST = 3 * GIB, 2 * GIB  # keys and values to sample with at all; CUDA's context, graphs, fragments


def needs(shape: Shape, ranks: int) -> tuple[float, float]:
    """Bytes on each GPU while training, in the smallest micro-batches that DPO's default lengths allow, and
    while sampling.
    """
    parts = memory(shape, ranks, 6144, checkpointing=True)
    stays = sum(parts[name] for name in ("master weights", "Adam's moments", "reference"))
    return sum(parts.values()) + REST, stays + 2 * shape.parameters + CACHE + REST


def print_cards():
    print("| model | GPUs | GiB, training | GiB, sampling | fits on GPUs of |\n|---|---|---|---|---|")
    for name, shape in MODELS.items():
        for ranks in (1, 8):
            need = needs(shape, ranks)
            fits = [str(card) for card in CARDS if max(need) <= 0.93 * card * GIB]
            cards = f"{', '.join(fits)} GB" if fits else "none of these"
            print(f"| {name} | {ranks} | {need[0] / GIB:.0f} | {need[1] / GIB:.0f} | {cards} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=lambda text: Shape(*map(int, text.split(","))), default=Shape(),
        help="hidden,layers,heads,kv heads,intermediate,vocabulary")  # fmt: skip
    add("--shard-ranks", type=int, nargs="+", default=[8, 16])
    add("--micro-batch-tokens", type=int, default=16384)
    add("--cards", action="store_true", help="which models fit on which GPUs, instead")
    args = parser.parse_args()
    if args.cards:
        return print_cards()
    ways = [(k, checkpointing) for checkpointing in (True, False) for k in args.shard_ranks]
    columns = [memory(args.shape, k, args.micro_batch_tokens, on) for k, on in ways]
    heads = [f"`--shard-ranks {k}{'' if on else ' --no-activation-checkpointing'}`" for k, on in ways]
    print(f"| GiB on each GPU | {' | '.join(heads)} |\n|---|{'---|' * len(ways)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name] / GIB:.1f}' for column in columns)} |")
    print(f"| all, while training | {' | '.join(f'{sum(c.values()) / GIB:.1f}' for c in columns)} |")
    sampler = [f"{2 * args.shape.parameters / GIB:.1f}"] * len(ways)
    print(f"| the sampler's weights, while sampling | {' | '.join(sampler)} |")


if __name__ == "__main__":
    main()
