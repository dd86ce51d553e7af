"""Where prompts come from: the row format, loading, and an order that is a pure function of (seed, epoch).

A row is one JSON object:
    prompt   string, or a list of chat messages [{"role": ..., "content": ...}] that ends with the user's
    reward   how a completion is scored: one of rewards.REWARDS
    answer   the reference answer, where that reward needs one: a text or a number
    uid      the id that Arena-Hard knows it by, where it is one of its questions
and whatever else its owner keeps: verifiers see these columns. A rollout is a row and its completions.
"""

import argparse
import datetime
import functools
import glob
import itertools
import json
import math
import random
import sys
import unicodedata
import zlib
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

from tqdm import tqdm

from processes import naming
from rewards import row_fault

FIELDS = ("prompt", "reward", "answer", "uid")  # of a row; its other columns are its owner's
DEPTH = 100  # levels of lists and objects in a row


@dataclass(frozen=True)
class Row:
    prompt: str | list  # as the file has it
    # the chat template applied, once; what the sampler and the policy both read. Not in the fingerprint
    ids: list[int] = field(repr=False)
    reward: str | None  # None: nothing scores it (only an evaluation accepts that)
    answer: str | None
    uid: str | None = None
    where: str = field(default="", compare=False, repr=False)  # source and line, to name it by
    columns: dict = field(default_factory=dict, repr=False)  # the others that the file has

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt


@dataclass
class Completion:
    ids: list[int]  # as sampled, the end token included; never tokenized again
    logps: list[float]  # of each id, under the distribution it was drawn from
    text: str
    finish: str  # "stop": an end token came; "length": cut at max_new_tokens
    version: int  # the optimizer step whose weights wrote it
    reward: float | None = None  # filled in by the scorer; None: unknown


class Prompts:
    """Rows of one or several sources in an endless order that depends on the seed alone.

    An epoch is as many rows as all sources have together; source j gives a share proportional to its weight
    (by default its size, so that an epoch is every row once) and goes on through its own shuffled order from
    epoch to epoch. A share that is no whole number is carried over: a source that is due less than a row an
    epoch gives one every few epochs.

    valid: rows held out. Sources of rollouts hold (row, completions) groups in place of rows.
    """

    def __init__(self, sources: list[list], weights: list[float] | None, seed: int, valid: Iterable = ()):
        self.sources, self.seed, self.valid = sources, seed, list(valid)
        self.dropped = 0  # rows that were too long
        self.fingerprint = fingerprint([*sources, self.valid])
        rows = [entry if isinstance(entry, Row) else entry[0] for entry in itertools.chain(*sources, valid)]
        self.kinds = sorted({row.reward for row in rows})  # of rewards
        self.to_score = [row for row in itertools.chain(*sources, valid) if isinstance(row, Row)]
        self.epoch_size = sum(len(source) for source in sources)
        weights = weights or [len(source) for source in sources]
        self.shares = [weight / sum(weights) * self.epoch_size for weight in weights]
        self.taken = [[0] * len(sources)]  # rows of each source that all epochs before the k-th take
        self.order = functools.lru_cache(maxsize=2)(self.order)

    def _taken(self, epoch: int) -> list[int]:
        """How many rows of each source all epochs before this one take."""
        for k in range(len(self.taken), epoch + 1):
            due = [share * k - taken for share, taken in zip(self.shares, self.taken[-1], strict=True)]
            taken = list(self.taken[-1])
            for _ in range(self.epoch_size):  # each row comes from the source that is most behind its share
                j = due.index(max(due))
                taken[j], due[j] = taken[j] + 1, due[j] - 1
            self.taken.append(taken)
        return self.taken[epoch]

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """The (source, row) indices of one epoch, in order."""
        order, ends = [], self._taken(epoch + 1)
        for j, (source, start, end) in enumerate(zip(self.sources, self._taken(epoch), ends, strict=True)):
            for k in range(start, end):  # the k-th row ever taken from source j
                own_epoch, place = divmod(k, len(source))
                order.append((j, _permutation(len(source), f"{self.seed} {j} {own_epoch}")[place]))
        random.Random(f"{self.seed} mix {epoch}").shuffle(order)
        return order

    def take(self, cursor: int, count: int) -> list[Row]:
        """`count` rows from `cursor` on: the number of rows used so far, over all ranks; no other state."""
        places = [divmod(position, self.epoch_size) for position in range(cursor, cursor + count)]
        return [self.row(*self.order(epoch)[offset]) for epoch, offset in places]

    def row(self, source: int, i: int) -> Row:
        return self.sources[source][i]


def fingerprint(sources: list[list]) -> int:
    """Of all rows in their order, as their owner wrote them, whatever the files are called: a resumed run
    must find the same. Token ids do not count, since a template may write the date.
    """
    crc = 0
    for row in itertools.chain(*sources):
        columns = repr(row.columns) if isinstance(row, Row) and row.columns else ""
        crc = zlib.crc32(f"{row!r}{columns}".encode(), crc)
    return crc


@functools.lru_cache(maxsize=64)
def _permutation(n: int, key: str) -> list[int]:
    order = list(range(n))
    random.Random(key).shuffle(order)
    return order


def load_rows(args: argparse.Namespace, tokenizer, vocab: int, talks: bool) -> Prompts:
    """What --data or --rollouts, --data-weights and --eval-data ask for; raises as the two below do."""

    def load(names):
        most, date = args.max_prompt_tokens, args.date
        return load_prompts(names, tokenizer, vocab, max_tokens=most, date=date, talks=talks)

    if args.rollouts:
        length = args.max_prompt_tokens + args.max_new_tokens
        sources, dropped = [load_rollouts(args.rollouts, tokenizer, vocab, max_tokens=length)], 0
    else:
        sources, dropped = load(args.data)
    valid, _ = load(args.eval_data)
    prompts = Prompts(sources, None if args.rollouts else args.data_weights, args.seed, sum(valid, []))
    prompts.dropped = dropped
    return prompts


def load_prompts(
    sources: list[str], tokenizer, vocab: int, max_tokens: int, date: str, talks=False, scored=True
) -> tuple[list[list[Row]], int]:
    """Loads, checks and tokenizes; returns (the rows of each source, how many were dropped for being too
    long).

    sources: .jsonl or .parquet files, or datasets on the hub as `name[:split[:config]]` (split: train).
    vocab: ids from it on are not the model's. max_tokens: a longer prompt is dropped, never cut: a cut
    problem has another answer. date: the day (YYYY-MM-DD) that a template with a clock writes. talks: whether
    progress and warnings are shown. scored: whether each row must say how its completions are scored.
    Raises ArgumentError that names the source and the line or row of the first fault.
    """
    check = row_fault if scored else (lambda raw: None if raw.get("reward") is None else row_fault(raw))
    loaded = [_load(source, tokenizer, vocab, check, max_tokens, date, talks) for source in sources]
    return [rows for rows, _ in loaded], sum(dropped for _, dropped in loaded)


def _load(source, tokenizer, vocab, check, max_tokens, date, talks) -> tuple[list[Row], int]:
    raw, what = read_source(source)
    rows, texts = [], []
    for number, line in tqdm(raw, desc=f"checking {source}", disable=not talks, leave=False):
        with naming(f"{source}, {what} {number}"):
            rows.append(_row(line, check, f"{source} {what} {number}"))
        with naming(f"{source}, {what} {number}: the chat template refuses it", " ({})"):
            texts.append(render(tokenizer, rows[-1].messages, date))
    if not rows:
        raise ArgumentError(None, f"{source}: no rows in it")
    # the template has written the special tokens already
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [replace(row, ids=row_ids) for row, row_ids in zip(rows, ids, strict=True)]
    _check_ids(rows, texts, tokenizer, vocab, talks)
    short = [row for row in rows if len(row.ids) <= max_tokens]
    if not short:
        shortest = f"the shortest has {min(map(len, ids))}"
        raise ArgumentError(None, f"{source}: no prompt fits --max-prompt-tokens {max_tokens}; {shortest}")
    return short, len(rows) - len(short)


def _row(raw, check: Callable, where: str) -> Row:
    """A raw row as a Row without ids, in which all values are such that JSON can hold. Raises for what is
    none. check: what is wrong with its reward fields.
    """
    if fault := _row_fault(raw):
        raise ValueError(fault)
    if isinstance(raw["prompt"], list):
        prompt = [
            _without_none(message) | {"content": _text_of(message["content"])} for message in raw["prompt"]
        ]
        raw = raw | {"prompt": prompt}
    raw = raw | {key: _text(raw.get(key)) for key in ("answer", "uid")}
    if fault := check(raw):
        raise ValueError(fault)
    if _too_deep(raw):
        raise ValueError(f"nested more than {DEPTH} levels deep")
    # timestamps and bytes become texts, NaN and infinity null; half of a surrogate pair is no text: it raises
    text = json.dumps(raw, default=_plain, ensure_ascii=False).encode()
    raw = json.loads(text, parse_constant=lambda name: None)
    answer, uid = (None if raw[key] is None else str(raw[key]) for key in ("answer", "uid"))
    columns = {key: value for key, value in raw.items() if key not in FIELDS}
    return Row(raw["prompt"], [], raw.get("reward"), answer, uid, where, columns)


def _plain(value) -> str:
    """A value that JSON does not know, as a text that is the same in each process."""
    known = (datetime.date, datetime.time, datetime.timedelta, bytes, Decimal)
    return str(value) if isinstance(value, known) else f"<{type(value).__name__}>"


def _too_deep(value, levels: int = DEPTH) -> bool:
    """Whether lists and dicts are in each other so deep that writing them could end in a RecursionError."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_too_deep(part, levels - 1) for part in parts)


def _text_of(content: str | list) -> str:
    """A message's content; of one in parts, as some datasets have it, the texts joined."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def render(tokenizer, messages: list[dict], date: str) -> str:
    """A prompt as the tokenizer's chat template writes it on the day `date`, up to the completion."""
    clock = datetime.date.fromisoformat(date).strftime  # in place of transformers' own, which is today's
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, strftime_now=clock
    )


def _without_none(value):
    """Without keys that hold None: parquet and the hub give every message the keys of all messages."""
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _check_ids(rows: list[Row], texts: list[str], tokenizer, vocab: int, talks: bool):
    """Compares the ids of rows with the texts that they were made of. Raises ArgumentError for an id that has
    no row in the model's matrix, and where the tokenizer loses most of a prompt; says on stderr how many
    prompts lose some characters.
    """
    lossy = []
    for row, text in zip(rows, texts, strict=True):
        if max(row.ids, default=0) >= vocab:
            sizes = (
                f"the tokenizer goes up to {max(tokenizer.get_vocab().values())}, the matrix has {vocab} rows"
            )
            raise ArgumentError(None, f"{row.where}: id {max(row.ids)} in the prompt: {sizes}")
        back = tokenizer.decode(row.ids)
        lost = (
            Counter(_visible(text).casefold()) - Counter(_visible(back).casefold()) if back != text else None
        )
        if lost and 2 * lost.total() > len(_visible("".join(m["content"] for m in row.messages))):
            reason = f"the tokenizer makes {back[:60]!r} of {text[:60]!r}: is one of its files missing?"
            raise ArgumentError(None, f"{row.where}: {reason}")
        lossy += [(row, Counter(_visible(text)) - Counter(_visible(back)))] if lost else []
    if lossy and talks:
        row, lost = lossy[0]
        example = f"{''.join(sorted(lost))!r} in {row.where}"
        tqdm.write(f"warning: {len(lossy)} prompt(s) lose characters in the tokenizer: {example}", sys.stderr)


def _visible(text: str) -> str:
    """What a tokenizer has to keep: not spaces, nor one of several ways to write a character. (Nor case.)"""
    text = unicodedata.normalize("NFKC", text)
    return "".join(char for char in text if unicodedata.category(char)[0] not in "CZ")


def _text(value):
    """Numbers of JSON and parquet as people write them: 42.0 as 42, 1e-05 as 0.00001; the rest as it is."""
    if isinstance(value, float | Decimal):
        whole = int(value)
        return str(whole) if value == whole else f"{Decimal(str(value)):f}".rstrip("0")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def rollout_line(row: Row, completions: list, **more) -> str:
    """A prompt and what was sampled for it as a line of a .jsonl file, the one form in which rollouts are
    kept; more: further keys, for whoever writes the file.
    """
    return json.dumps({**more, **vars(row), "completions": [vars(c) for c in completions]}) + "\n"


def read_rollout(line: dict, where: str) -> tuple[Row, list[Completion]]:
    """The (row, completions) group of a line. Raises ArgumentError, naming `where`, for what is none."""
    try:
        needed = [line[key] for key in ("prompt", "ids", "reward", "answer")]
        row = Row(*needed, line.get("uid"), line.get("where") or where, line.get("columns") or {})
        completions = [Completion(**fields) for fields in line["completions"]]
        fault = _rollout_fault(row, completions)
    except Exception as error:
        fault = f"no {error}" if isinstance(error, KeyError) else error
    if fault:
        raise ArgumentError(None, f"{where}: not a saved rollout ({fault})")
    return row, completions


def _rollout_fault(row: Row, completions: list) -> str | None:
    """What is wrong with the ids, log-probs, texts and rewards of a group, or None."""
    if not isinstance(row.prompt, str | list) or not isinstance(row.columns, dict):
        return "`prompt` is a text or a list of messages, `columns` an object"
    for ids in (row.ids, *(c.ids for c in completions)):
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            return f"`ids` are token ids, not {json.dumps(ids)[:80]}"
    for c in completions:
        if len(c.logps) != len(c.ids) or not all(type(logp) in (int, float) for logp in c.logps):
            return f"`logps` has a number for each of the {len(c.ids)} ids, not {json.dumps(c.logps)[:80]}"
        if not isinstance(c.text, str) or not isinstance(c.reward, int | float | None):
            found = json.dumps([c.text, c.reward])[:80]
            return f"`text` and `reward` of a completion are a text and a number, not {found}"
    return None if completions else "no completions"


def load_rollouts(
    paths: list[Path], tokenizer, vocab: int, max_tokens: int
) -> list[tuple[Row, list[Completion]]]:
    """The (row, completions) groups that --save-rollouts or evaluate.py wrote. Their version, a step of
    another run, becomes 0: they are as old as the training. Rows without a reward of their own, which only
    an evaluation accepts, are left out.

    paths: files, or directories, of which all .jsonl files that hold rollouts count.
    Raises ArgumentError for what is no rollout, was sampled with another tokenizer, or is longer than
    `max_tokens`, prompt and completion; and for a file that has no rollouts, or no reward.
    """
    groups = []
    for path in itertools.chain(*map(_rollout_files, paths)):
        found = []
        for number, line in read_jsonl(path):
            where = f"{path}, line {number}"
            row, completions = read_rollout(line, where)
            ids = [[*row.ids, *c.ids] for c in completions]
            longest, largest = max(map(len, ids)), max(map(max, ids))
            if largest >= vocab:
                raise ArgumentError(None, f"{where}: id {largest} is not --model's tokenizer's")
            if longest > max_tokens:
                limits = f"--max-prompt-tokens + --max-new-tokens = {max_tokens}"
                raise ArgumentError(None, f"{where}: {longest} tokens are more than {limits}")
            text = tokenizer.decode(completions[0].ids, skip_special_tokens=True)
            if text != completions[0].text:
                texts = f"its ids are {text[:40]!r} there, its text is {completions[0].text[:40]!r}"
                raise ArgumentError(None, f"{where}: sampled with another tokenizer than --model's ({texts})")
            found.append((row, [replace(c, version=0) for c in completions]))
        if not found:
            raise ArgumentError(None, f"{path}: no rollouts in it")
        scored = [(row, completions) for row, completions in found if row.reward is not None]
        if all(c.reward is None for _, completions in scored for c in completions):
            ways = "evaluate again, with a `reward` in the rows or with --reward-model or --judge-url"
            raise ArgumentError(None, f"{path}: no completion in it has a reward: {ways}")
        groups += scored
    return groups


def _rollout_files(path: Path) -> list[Path]:
    """A file as it is; of a directory, the .jsonl files directly in it whose first line is a rollout."""
    if not path.is_dir():
        return [path]
    firsts = [(file, next(read_jsonl(file), (0, None))[1]) for file in sorted(path.glob("*.jsonl"))]
    files = [file for file, line in firsts if isinstance(line, dict) and "completions" in line]
    if not files:
        raise ArgumentError(None, f"{path}: no .jsonl file with rollouts in this directory")
    return files


def _row_fault(row) -> str | None:
    """What is wrong with a raw row, but for what its reward needs, or None."""
    if not isinstance(row, dict):
        return f"a row is a JSON object, not {json.dumps(row, default=str)[:80]}"
    for key in ("answer", "uid"):
        if isinstance(row.get(key), float | Decimal) and not math.isfinite(row[key]):
            return f"`{key}` is {row[key]}, which is no number"
    prompt = row.get("prompt")
    if prompt is None:
        return f"no `prompt` (it has: {', '.join(row) or 'nothing'})"
    if isinstance(prompt, str) and prompt.strip():
        return None
    if isinstance(prompt, list) and prompt:
        for message in prompt:
            if fault := _message_fault(message):
                return f"`prompt` holds a message {fault}: {json.dumps(message, default=str)[:80]}"
        return None if prompt[-1]["role"] == "user" else "`prompt` must end with a message of the user"
    return f"`prompt` must be a text or a list of messages, not {json.dumps(prompt, default=str)[:80]}"


def _message_fault(message) -> str | None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        return "without role and content"
    content = message["content"]
    if content is None:
        return "whose content is null"
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                return f"with a part of type {kind!r}, of which only 'text' can be read"
        return None if content else "whose content has no parts"
    return None if isinstance(content, str) else f"whose content is {type(content).__name__}, not a text"


class _Numbered:
    """The (number, row) pairs of a dataset, read from disk each time: some are too large for a list."""

    def __init__(self, dataset, source: str):
        self.dataset, self.source = dataset, source
        types = {name: getattr(feature, "dtype", "") for name, feature in dataset.features.items()}
        self.short = {name: kind for name, kind in types.items() if kind in ("float16", "float32")}

    def __len__(self):
        return len(self.dataset)

    def __iter__(self):
        import numpy

        rows = iter(self.dataset)
        for number in range(len(self.dataset)):
            with naming(f"{self.source}, row {number}"):
                row = next(rows)
                for name, kind in self.short.items():  # a short 0.1 is 0.1, not what it is nearest
                    row[name] = None if row[name] is None else float(str(numpy.dtype(kind).type(row[name])))
            yield number, row


def read_source(source: str, revision: str | None = None) -> tuple[list | _Numbered, str]:
    """((number, raw row) pairs, what the number counts)."""
    suffix = Path(source).suffix.lower()
    if suffix == ".json" and (rows := _json_array(source)) is not None:
        return list(enumerate(rows)), "row"
    if suffix in (".jsonl", ".json"):
        return list(read_jsonl(source)), "line"
    if suffix == ".parquet" and not Path(source).is_file():
        raise ArgumentError(None, f"{source}: no such file")
    from datasets import load_dataset, logging  # a second to import, and only needed here

    logging.set_verbosity(logging.CRITICAL)  # it would print what the one line below says
    with naming(f"{source}: neither a .jsonl or .parquet file nor a dataset that loads", " ({})"):
        if suffix == ".parquet":
            dataset = load_dataset("parquet", data_files=glob.escape(source), split="train")
        else:
            name, split, config = (*source.split(":"), "", "")[:3]
            dataset = load_dataset(name, config or None, split=split or "train", revision=revision)
    return _Numbered(dataset, source), "row"


def _json_array(path: str) -> list | None:
    """What a file holds that is one JSON array; None where it is anything else, which read_jsonl names.
    Raises ArgumentError for an array with a mistake in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.lstrip().startswith("["):
        return None
    with naming(f"{path}: not one JSON array", " ({})"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno}: {error.msg}") from error


def read_jsonl(path: str):
    """Yields (line number from 1, object); raises ArgumentError that names the line that is not JSON."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # some begin with a mark
            for number, line in enumerate(file, 1):
                if line.strip():
                    with naming(f"{path}, line {number}: not JSON", " ({})"):
                        value = json.loads(line)
                    yield number, value
    except OSError as error:
        raise ArgumentError(None, f"{path}: {error.strerror.lower()}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(None, f"{path}: not UTF-8 text") from error
