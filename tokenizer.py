"""Text and ids: the tokenizer of a model, the ids that may be sampled and those that end a completion."""

from argparse import ArgumentError
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from processes import first_line


def load_tokenizer(model: str, length: int, trust=False) -> tuple:
    """Returns (tokenizer, vocab, end tokens) of a directory or hub name. Ids below vocab are the tokenizer's
    and have a row in the model's matrices, so they may be sampled. trust: whether code that comes with it may
    run.

    Raises ArgumentError if there is none, it has no chat template or end token, the model's context is under
    `length`, or its matrices have too few rows or far too many. Added tokens may lie beyond them (one of
    gemma 3's does): prompts that have such a token are refused later.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        context = getattr(config, "max_position_embeddings", length)
    except Exception as error:  # the tokenizers' own library raises what it likes
        if "trust_remote_code" in str(error):
            way = "it brings code of its own, which runs only with --trust-remote-code"
            raise ArgumentError(None, f"--model {model}: {way}") from error
        reason = f"no model with a tokenizer there ({first_line(error)})"
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
    vocab = min(max(ids, default=0) + 1, rows)
    return tokenizer, vocab, end_tokens(model, tokenizer, vocab, trust)


def end_tokens(model: str, tokenizer, vocab: int, trust=False) -> list[int]:
    """Ids that end a completion: the tokenizer's, and those of generation_config.json or, without one, of
    config.json, as in transformers' own generate. (Llama 3's <|eot_id|> is named in generation_config.json.)

    Raises ArgumentError where there is none, or one that cannot be sampled.
    """
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
