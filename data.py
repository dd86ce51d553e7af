"""Where prompts come from: the row format, loading, and an order that is a pure function of (seed, epoch).

A row is one JSON object:
    prompt   string, or a list of chat messages [{"role": ..., "content": ...}] that ends with the user's
    reward   how an answer is scored: one of rewards.REWARDS
    answer   the reference answer, where that reward needs one
    uid      the id that Arena-Hard knows it by, where it is one of its questions
and whatever else its owner keeps.
"""

import functools
import itertools
import json
import random
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Row:
    prompt: str | list  # as the file has it
    ids: list[int]  # the chat template applied, once; what the sampler and the policy both read
    reward: str | None  # None: nothing scores it (only an evaluation accepts that)
    answer: str | None
    uid: str | None = None


class Prompts:
    """Rows of one or several sources in an endless order that depends on the seed alone.

    An epoch is as many rows as all sources have together; source j gives a share proportional to its weight
    (by default its size, so that an epoch is every row once) and goes on through its own shuffled order from
    epoch to epoch.
    """

    def __init__(self, sources: list[list[Row]], weights: list[float] | None, seed: int):
        self.sources, self.seed = sources, seed
        self.epoch_size = sum(len(source) for source in sources)
        weights = weights or [len(source) for source in sources]
        shares = [weight / sum(weights) * self.epoch_size for weight in weights]
        edges = [round(sum(shares[:j])) for j in range(len(shares) + 1)]  # so that rounded shares add up
        self.shares = [right - left for left, right in itertools.pairwise(edges)]
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The (source, row) pairs of one epoch, in order."""
        order = []
        for j, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            for k in range(epoch * share, (epoch + 1) * share):  # the k-th row ever taken from source j
                own_epoch, place = divmod(k, len(source))
                order.append((j, _permutation(len(source), f"{self.seed} {j} {own_epoch}")[place]))
        random.Random(f"{self.seed} mix {epoch}").shuffle(order)
        return order

    def take(self, cursor: int, count: int) -> list[Row]:
        """`count` rows from `cursor` on: the number of rows used so far, over all ranks; no other state."""
        places = [divmod(position, self.epoch_size) for position in range(cursor, cursor + count)]
        pairs = [self._epoch(epoch)[offset] for epoch, offset in places]
        return [self.sources[j][i] for j, i in pairs]


@functools.lru_cache(maxsize=64)
def _permutation(n: int, key: str) -> list[int]:
    order = list(range(n))
    random.Random(key).shuffle(order)
    return order


def load_prompts(
    sources: list[str],
    tokenizer,
    check: Callable[[dict], str | None],
    max_tokens: int,
    progress: bool = False,
) -> tuple[list[list[Row]], int]:
    """Loads, checks and tokenizes; returns (the rows of each source, how many were dropped for being too
    long).

    sources: .jsonl or .parquet files, or datasets on the hub as `name` or `name:split` (default split:
    train).
    check: what is wrong with the reward fields of a raw row, or None (rewards.complaint).
    max_tokens: a longer prompt is dropped, never cut: a cut problem has another answer.
    Raises ArgumentError that names the source and the line or row of the first fault.
    """
    loaded = [_load(source, tokenizer, check, max_tokens, progress) for source in sources]
    return [rows for rows, _ in loaded], sum(dropped for _, dropped in loaded)


def _load(source, tokenizer, check, max_tokens, progress) -> tuple[list[Row], int]:
    raw, where = _read(source)
    texts = []
    for number, row in tqdm(raw, desc=f"checking {source}", disable=not progress, leave=False):
        complaint = _prompt_complaint(row) or check(row)
        if complaint:
            raise ArgumentError(None, f"{source}, {where} {number}: {complaint}")
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            texts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates raise what they like: jinja2's TemplateError, TypeError, ...
            raise ArgumentError(
                None, f"{source}, {where} {number}: the chat template refuses it ({error})"
            ) from error
    if not raw:
        raise ArgumentError(None, f"{source}: no rows in it")
    ids = tokenizer(texts, add_special_tokens=False)[
        "input_ids"
    ]  # the template has written the special tokens already
    rows = [
        Row(row["prompt"], i, row.get("reward"), *(_text(row.get(key)) for key in ("answer", "uid")))
        for (_, row), i in zip(raw, ids, strict=True)
        if len(i) <= max_tokens
    ]
    if not rows:
        shortest = min(len(i) for i in ids)
        raise ArgumentError(
            None, f"{source}: no prompt fits --max-prompt-tokens {max_tokens}; the shortest has {shortest}"
        )
    return rows, len(ids) - len(rows)


def _text(value) -> str | None:
    return None if value is None else str(value)


def load_rollouts(path: Path, completion: type, vocab: int, max_tokens: int) -> list[tuple[Row, list]]:
    """The (row, completions) groups that --save-rollouts wrote; completion: the class to make of them. Their
    version, a step of another run, becomes 0: here they are as old as the training.

    Raises ArgumentError for what is no rollout, has ids of another tokenizer (from `vocab` on), or is longer
    than `max_tokens`, prompt and completion.
    """
    groups = []
    for number, line in read_jsonl(path):
        try:
            row = Row(line["prompt"], line["ids"], line["reward"], line["answer"])
            completions = [completion(**(fields | {"version": 0})) for fields in line["completions"]]
            ids = [[*row.ids, *c.ids] for c in completions]
            longest, largest = max(map(len, ids)), max(map(max, ids))
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(None, f"{path}, line {number}: not a saved rollout ({error})") from error
        if largest >= vocab:
            raise ArgumentError(None, f"{path}, line {number}: id {largest} is not --model's tokenizer's")
        if longest > max_tokens:
            limits = f"--max-prompt-tokens + --max-new-tokens = {max_tokens}"
            raise ArgumentError(None, f"{path}, line {number}: {longest} tokens are more than {limits}")
        groups.append((row, completions))
    if not groups:
        raise ArgumentError(None, f"{path}: no rollouts in it")
    return groups


def _prompt_complaint(row) -> str | None:
    """What is wrong with a raw row's prompt, or None."""
    if not isinstance(row, dict):
        return f"a row is a JSON object, not {json.dumps(row)[:80]}"
    prompt = row.get("prompt")
    if prompt is None:
        return f"no `prompt` (it has: {', '.join(row) or 'nothing'})"
    if isinstance(prompt, str) and prompt.strip():
        return None
    if isinstance(prompt, list) and prompt:
        for message in prompt:
            if not (
                isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message
            ):
                return f"`prompt` holds a message without role and content: {json.dumps(message)[:80]}"
        return None if prompt[-1]["role"] == "user" else "`prompt` must end with a message of the user"
    return f"`prompt` must be a text or a list of messages, not {json.dumps(prompt)[:80]}"


def _read(source: str) -> tuple[list[tuple[int, dict]], str]:
    """([(number, raw row)], what the number counts)."""
    if Path(source).suffix in (".jsonl", ".json"):
        return list(read_jsonl(source)), "line"
    from datasets import load_dataset, logging  # a second to import, and only needed here

    logging.set_verbosity(logging.CRITICAL)  # it would print what the one line below says
    try:
        if Path(source).suffix == ".parquet":
            if not Path(source).is_file():
                raise ArgumentError(None, f"{source}: no such file")
            dataset = load_dataset("parquet", data_files=source, split="train")
        else:
            name, _, split = source.partition(":")
            dataset = load_dataset(name, split=split or "train")
    except ArgumentError:
        raise
    except Exception as error:  # the hub's, pyarrow's and datasets' own, many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise ArgumentError(
            None, f"{source}: neither a .jsonl or .parquet file nor a dataset that loads ({reason})"
        ) from error
    return list(enumerate(dataset)), "row"


def read_jsonl(path: str):
    """Yields (line number from 1, object); raises ArgumentError that names the line that is not JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ArgumentError(None, f"{path}, line {number}: not JSON ({error.msg})") from error
    except OSError as error:
        raise ArgumentError(None, f"{path}: {error.strerror.lower()}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(None, f"{path}: not UTF-8 text") from error
