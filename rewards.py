"""What an answer is worth: verifiers, a reward model, a judge; the row's `reward` says which.

A verifier like `math` hands model output to a computer algebra system: an answer like 9^9^9^9 never returns,
or takes all memory. So verifiers run in child processes of their own (this file, run as a script: it imports
neither torch nor vLLM), which are killed at a deadline. What has no verdict, because it overran the deadline
or the memory limit, broke its worker, or a judge could not be reached or understood, is scored None: such a
sample leaves its group and is counted, it is never scored 0.
"""

import argparse
import datetime
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import statistics
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

MEMORY = 2 * 2**30  # bytes of address space of a worker
REPLIES = 20_000  # of a judge that are kept
BATCH = 32  # answers sent to a worker at a time


def exact(answer: str, text: str) -> float:
    """1 if the completion is the answer, spaces around it aside."""
    return float(text.strip() == answer.strip())


def gsm8k(answer: str, text: str) -> float:
    """1 if the reference answer's number, and nothing else, stands behind the last `####` of the completion,
    up to the end of the line (GSM8K's own format).
    """
    wanted, found = gsm8k_number(answer), gsm8k_number(text)
    return float("####" in text and found is not None and found == wanted)


def gsm8k_number(text: str) -> Fraction | None:
    """The number behind the last `####`, or that a text without one is; None where it is none."""
    _, marker, last = text.rpartition("####")
    return number(last.strip().partition("\n")[0] if marker else text)


CURRENCY = "[$\u00a3-\u00a5\u20a0-\u20cf]"
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+|\d{1,3}(?:_\d{3})+|\d+)"
NUMBER = re.compile(
    rf"([+-]?) ?(?:\\?{CURRENCY} ?)?([+-]?)"
    rf"(?:((?:{DIGITS}(?:\.\d+)?|\.\d+)(?:e[+-]?\d{{1,3}})?|{DIGITS}/\d+)|(\d*)([\u00bc-\u00be\u2150-\u215e]))"
    rf"(?: ?\\?{CURRENCY})?",
    re.IGNORECASE,
)
WRAPPED = re.compile(r"\\boxed\{(.*)\}|\\\[(.*)\\\]|\\\((.*)\\\)|([$*_`]+)(.*)\4")


def number(text: str) -> Fraction | None:
    r"""The number that a text is, decorations aside; None where it is anything else.

    `**$1,000.50**`, `\boxed{-3}`, `.25`, `1/2`, `½` and `1e3` are; `18 dollars` and `50%` are not, nor are
    more than 100 characters.
    """
    if len(text) > 100:
        return None
    text = re.sub(r"[\u2212\u2013\u2014\uff0d]", "-", text)  # typographic minus signs
    text = re.sub(r"\\[,;: ]|\s", " ", text.replace("\\!", "").replace("{,}", ",")).strip().removesuffix(".")
    while wrapped := WRAPPED.fullmatch(text):
        text = next(filter(None, reversed(wrapped.groups())), "").strip().removesuffix(".")
    found = NUMBER.fullmatch(text)
    if not found or (found[1] and found[2]):
        return None
    try:
        value = Fraction(re.sub("[,' _]", "", found[3] or found[4] or "0"))
    except ZeroDivisionError:
        return None
    value += Fraction(unicodedata.numeric(found[5])).limit_denominator(10) if found[5] else 0
    return -value if "-" in (found[1], found[2]) else value


def math_verify(answer: str, text: str) -> float:
    """Math-Verify with the paper's settings (original code, `_rewards.py`): 1 or 0, no bonus for form or
    length.

    Its own time limits are off, because there a time-out counts as a wrong answer: the worker's deadline
    stands in. An answer that sympy cannot handle is wrong, as in the original code; one that runs out of
    memory or stack has no verdict. Raises ValueError where the reference answer cannot be parsed: that says
    nothing about the completion.
    """
    from math_verify import parse, verify

    gold_config, text_config = _math_configs()
    answer = answer.strip()
    if not re.fullmatch(r"\$.+\$", answer, re.DOTALL):  # not LaTeX yet: a $ in front is a currency's
        answer = f"${re.sub(rf'^{CURRENCY} *', '', answer)}$"
    golds = parse(answer, gold_config, parsing_timeout=None)
    if not golds:
        raise ValueError(f"reference answer {answer!r} cannot be parsed")
    try:
        found = parse(text, text_config, parsing_timeout=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return 0.0
    for gold, candidate in itertools.product(golds, found):
        try:
            if verify(gold, candidate, float_rounding=6, timeout_seconds=None, raise_on_error=True):
                return 1.0
        except (MemoryError, RecursionError):
            raise
        except Exception:  # one comparison that sympy cannot make; another may still match
            continue
    return 0.0


@functools.cache
def _math_configs():
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    gold = LatexExtractionConfig(normalization_config=normalization)
    return (gold,), (LatexExtractionConfig(boxed_match_priority=0),)


VERIFIERS = {"exact": exact, "gsm8k": gsm8k, "math": math_verify}  # (reference answer, text) -> reward
REWARDS = [*VERIFIERS, "rm", "judge"]


def complaint(row: dict) -> str | None:
    """What is wrong with the reward fields of a raw row, or None."""
    if "reward" not in row:
        return f"no `reward` (one of {', '.join(REWARDS)})"
    if not isinstance(row["reward"], str) or row["reward"] not in REWARDS:
        return f"unknown reward {row['reward']!r} (known: {', '.join(REWARDS)})"
    reward, answer = row["reward"], row.get("answer")
    if reward in VERIFIERS:
        known = isinstance(answer, str | int | float | Decimal) and not isinstance(answer, bool)
        if not known or not str(answer).strip():
            return f"reward `{reward}` needs an `answer`, a text or a number"
        if reward == "gsm8k" and gsm8k_number(str(answer)) is None:
            return f"reward `gsm8k` needs a number as `answer`, not {answer!r}"
    return None


def add_flags(add: Callable, count: Callable, size: Callable):
    """Declares this file's flags; add: a parser's add_argument; count, size: types of numbers above 0."""
    # fmt: off
    add("--reward-timeout", type=size, default=5.0, help="seconds until a verifier leaves an answer unscored")
    add("--reward-model", help="of rows with reward rm: directory or hub name; paper: Nexusflow/Athene-RM-8B")
    add("--reward-offload", action="store_true", help="the reward model waits in host memory between steps")
    add("--judge-url", help="of rows with reward judge: OpenAI-compatible, as http://127.0.0.1:8000/v1")
    add("--judge-model", help="its name there; the key comes from the environment: JUDGE_API_KEY")
    add("--judge-pairwise", action="store_true", help="compare all ordered pairs of a group's answers")
    add("--judge-votes", type=count, default=1, help="judgements of each answer or pair, averaged")
    add("--judge-timeout", type=size, default=60.0, help="seconds of one request; 3 are tried")
    add("--judge-concurrency", type=count, default=16, help="requests at one time, of each rank")
    # fmt: on


class Scorer:
    """Gives every completion its reward, by the `reward` of its row.

    rows: those whose completions will be scored; args: the values of `add_flags`, and `date`; talks: whether
    this rank shows progress and warnings. Raises ArgumentError for flags that these rows miss, a reward model
    that is none, a judge that does not answer, a reference answer that Math-Verify cannot use.
    """

    def __init__(self, rows: list, args, device, dtype, talks: bool):
        kinds = {row.reward for row in rows} - {None}
        if "rm" in kinds and not args.reward_model:
            raise argparse.ArgumentError(None, "rows with reward rm need --reward-model NAME")
        if args.reward_model and "rm" not in kinds:
            raise argparse.ArgumentError(None, f"--reward-model {args.reward_model}: no row has reward rm")
        if "judge" in kinds and not (args.judge_url and args.judge_model):
            raise argparse.ArgumentError(None, "rows with reward judge need --judge-url and --judge-model")
        if args.judge_url and "judge" not in kinds:
            raise argparse.ArgumentError(None, f"--judge-url {args.judge_url}: no row has reward judge")
        verifiers = kinds & VERIFIERS.keys()
        self.judge = Judge(args) if "judge" in kinds else None
        self.model = None
        if "rm" in kinds:
            self.model = RewardModel(args.reward_model, device, dtype, args.date, args.reward_offload)
        self.verifiers = Verifiers(verifiers, args.reward_timeout) if verifiers else None
        if "math" in kinds:
            check_references(rows, self.verifiers, talks)

    def score(self, groups: list):
        """Fills in `reward` of every completion of (row, completions) groups; None: no verdict."""
        for scorer, kinds in ((self.verifiers, VERIFIERS), (self.model, ["rm"]), (self.judge, ["judge"])):
            part = [group for group in groups if group[0].reward in kinds]
            rewards = scorer.score(part) if part else []
            for completion, reward in zip((c for _, cs in part for c in cs), rewards, strict=True):
                completion.reward = reward if reward is not None and math.isfinite(reward) else None

    def close(self):
        if self.verifiers:
            self.verifiers.close()


def check_references(rows: list, verifiers: "Verifiers", talks: bool):
    """Has Math-Verify score, for each reference answer of `math`, the completion that must be right: the
    answer itself, or the number that it plainly is.

    Raises ArgumentError for a row where that gets no verdict, since then no completion gets one. Says on
    stderr how many answers are read as something else, with an example.
    """
    from tqdm import tqdm

    asked: dict[str, dict] = {}  # the rows of each answer that is not so plain that it cannot be misread
    for row in rows:
        if row.reward == "math" and not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", row.answer):
            asked.setdefault(row.answer, {})[row.where] = row  # once, if it is there to validate too
    answers, misread = list(asked), []
    quiet, starts = not (talks and answers), range(0, len(answers), 64)
    for start in tqdm(starts, desc="checking reference answers", disable=quiet, leave=False):
        batch = answers[start : start + 64]
        verdicts = verifiers([("math", answer, rf"$\boxed{{{_as_latex(answer)}}}$") for answer in batch])
        for answer, verdict in zip(batch, verdicts, strict=True):
            if verdict is None:
                verifiers.close()
                reason = f"Math-Verify cannot parse or compare the reference answer {answer!r}"
                where = next(iter(asked[answer]))
                raise argparse.ArgumentError(None, f"{where}: {reason}; correct or drop it")
            misread += [] if verdict else asked[answer].values()
    if misread and talks:
        row = misread[0]
        example = f"{_as_latex(row.answer)} counts as wrong where {row.answer!r} is the answer ({row.where})"
        tqdm.write(f"warning: Math-Verify misreads {len(misread)} reference answer(s): {example}", sys.stderr)


UNIT = re.compile(
    r"\s*[\u00b0\u00ba\u02da]\s*[CF]?$|[\u2103\u2109\u2032\u2033]$|( (?!\w*illion)[A-Za-z]{3,})+$"
)


def _as_latex(answer: str) -> str:
    """The number that a reference answer plainly is, without its unit, in its simplest form; else the answer,
    without what stands around it.
    """
    text = answer.strip().lstrip("= ").rstrip(".,; ")
    while wrapped := WRAPPED.fullmatch(text):
        text = next(filter(None, reversed(wrapped.groups())), "").strip().rstrip(".,; ")
    mixed = re.fullmatch(r"(-?)(\d+) (\d+/[1-9]\d*|[\u00bc-\u00be])", text)
    value = number(mixed[2]) + number(mixed[3]) if mixed else number(UNIT.sub("", text))
    if value is None:
        return text
    value = -value if mixed and mixed[1] else value
    top, bottom = abs(value.numerator), value.denominator
    return "-" * (value < 0) + (str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}")


class Verifiers:
    """Scores answers in `workers` child processes, with a deadline of `timeout` seconds each.

    kinds: the names of the rewards that will be asked for, so that a worker imports only what they need.
    """

    def __init__(self, kinds: set[str], timeout: float, workers: int = 2):
        self.kinds, self.timeout = kinds, timeout
        self.threads = ThreadPoolExecutor(workers)  # a thread holds one worker's end of the pipe
        self.idle: queue.Queue[subprocess.Popen | None] = queue.Queue()
        for _ in range(workers):
            self.idle.put(self._spawn())

    def __call__(self, jobs: list[tuple[str, str, str]]) -> list[float | None]:
        """The reward of each (reward name, reference answer, text), or None where it could not be had."""
        batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
        return [reward for batch in self.threads.map(self._score, batches) for reward in batch]

    def score(self, groups: list) -> list[float | None]:
        """The reward of every completion of (row, completions) groups."""
        return self([(row.reward, row.answer, c.text) for row, completions in groups for c in completions])

    def _score(self, jobs) -> list[float | None]:
        """Sends the jobs in one line, reads a line a reward; kills a worker that is late and goes on."""
        rewards: list[float | None] = []
        worker = self.idle.get()
        try:
            while len(rewards) < len(jobs):
                if worker is None:
                    worker = self._spawn()
                if not worker.ready:  # imports take a while and are not the answer's fault
                    worker.ready = self._line(worker, timeout=120) == "ready"
                    if not worker.ready:
                        raise RuntimeError("a reward worker did not start: see `python rewards.py 5 math`")
                try:
                    worker.stdin.write(json.dumps(jobs[len(rewards) :]).encode() + b"\n")
                except BrokenPipeError:  # it died while idle, which is no answer's fault
                    worker = None
                    continue
                while len(rewards) < len(jobs):
                    line = self._line(worker, self.timeout)
                    if line is None:  # late or dead: the answer in hand is the culprit
                        worker.kill()
                        worker.wait()
                        worker = None
                        rewards.append(None)
                        break
                    rewards.append(json.loads(line))
        finally:
            self.idle.put(worker)
        return rewards

    @staticmethod
    def _line(worker, timeout: float) -> str | None:
        """The worker's next line, or None if it is late or gone. A line is short, so it arrives whole."""
        ready = select.poll()  # select() ends at descriptor 1024
        ready.register(worker.stdout, select.POLLIN)
        if ready.poll(1000 * timeout):
            return worker.stdout.readline().decode().strip() or None
        return None

    def _spawn(self) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        patience = math.ceil(self.timeout) + 1
        command = [sys.executable, os.path.abspath(__file__), str(patience), *sorted(self.kinds)]
        # bufsize 0: poll must not overlook lines that Python has already read ahead
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        worker.ready = False
        return worker

    def close(self):
        self.threads.shutdown()
        while not self.idle.empty():
            if worker := self.idle.get():
                worker.kill()
                worker.wait()


class RewardModel:
    """A scalar reward model with its own tokenizer and chat template.

    name: directory or hub name of any sequence classifier with one label (Skywork-Reward-V2 and its like: the
    head reads the last token), or of a model in Athene-RM-8B's layout (`v_head` reads the CLS token that is
    put behind the conversation); date: the day that a template with a clock writes; offload: park it in host
    memory between uses; max_tokens: of a conversation, a longer one gets no verdict; batch_tokens: most
    padded tokens of one forward. Raises ArgumentError for what is not such a model.
    """

    def __init__(
        self, name: str, device, dtype, date: str, offload=False, max_tokens=4096, batch_tokens=2**14
    ):
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        fail = lambda reason: argparse.ArgumentError(None, f"--reward-model {name}: {reason}")  # noqa: E731
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.athene = any(a.startswith(("Athene", "CustomAuto")) for a in config.architectures or [])
            if not self.athene and config.num_labels != 1:
                raise fail(f"it has {config.num_labels} labels, a reward model has one")
            kind = _athene_class() if self.athene else AutoModelForSequenceClassification
            load = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
            model, info = kind.from_pretrained(name, **load)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise fail(f"cannot be loaded ({reason})") from error
        if info["missing_keys"]:  # transformers would go on with a random head
            raise fail(f"no reward model, it lacks {sorted(info['missing_keys'])[0]}")
        if not self.tokenizer.chat_template:
            raise fail("its tokenizer has no chat template")
        if self.athene and self.tokenizer.cls_token_id is None:
            raise fail("its tokenizer has no CLS token, which Athene's value head reads")
        self.clock = datetime.date.fromisoformat(date).strftime
        self.rows = model.get_input_embeddings().num_embeddings
        probe = self.encode([{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}])
        back = self.tokenizer.decode(probe)
        if "1+1=" not in back.replace(" ", ""):
            reason = f"its tokenizer does not keep its text ('1+1=' comes back as {back[:40]!r})"
            raise fail(f"{reason}: is a file missing?")
        self.home = "cpu" if offload else device
        self.model = model.to(self.home).eval().requires_grad_(False)
        self.device, self.max_tokens, self.batch_tokens = device, max_tokens, batch_tokens

    def encode(self, conversation: list[dict]) -> list[int]:
        """Token ids of messages, the last of which is the answer; the template writes the special tokens."""
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, strftime_now=self.clock)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids + [self.tokenizer.cls_token_id] if self.athene else ids

    def __call__(self, conversations: list[list[dict]]) -> list[float | None]:
        """The reward of each conversation; None over `max_tokens`, or with ids beyond its matrix."""
        import torch

        ids = [self.encode(conversation) for conversation in conversations]
        short = [i for i in range(len(ids)) if len(ids[i]) <= self.max_tokens and max(ids[i]) < self.rows]
        batches: list[list[int]] = []
        for i in sorted(short, key=lambda i: -len(ids[i])):
            if not batches or (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) > self.batch_tokens:
                batches.append([])
            batches[-1].append(i)
        rewards: list[float | None] = [None] * len(ids)
        self.model.to(self.device)
        for batch in batches:
            # the head reads the last token that is not padding: here an id that no text of the batch has
            used = {token for i in batch for token in ids[i]}
            pad = next(token for token in itertools.count() if token not in used)
            self.model.config.get_text_config().pad_token_id = pad
            width = len(ids[batch[0]])
            ids_BL = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in batch]).to(self.device)
            logits_B1 = self.model(input_ids=ids_BL, attention_mask=(ids_BL != pad).long()).logits
            for i, reward in zip(batch, logits_B1[:, 0].tolist(), strict=True):
                rewards[i] = reward
        self.model.to(self.home)
        return rewards

    def score(self, groups: list) -> list[float | None]:
        """The reward of every completion of (row, completions) groups."""
        return self(
            [
                [*row.messages, {"role": "assistant", "content": c.text}]
                for row, completions in groups for c in completions
            ]
        )  # fmt: skip


def _athene_class():
    from torch import nn
    from transformers import LlamaModel, LlamaPreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    class Athene(LlamaPreTrainedModel):
        """Athene-RM-8B's layout: a Llama without output matrix, and a value head on the last token, CLS."""

        def __init__(self, config):
            super().__init__(config)
            self.model, self.v_head = LlamaModel(config), nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

        def forward(self, input_ids, attention_mask):
            hidden_BLH = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            last_B = attention_mask.sum(-1) - 1
            hidden_BH = hidden_BLH[range(len(last_B)), last_B]
            return SequenceClassifierOutputWithPast(logits=self.v_head(hidden_BH))

    return Athene


POINTWISE = """You will see an instruction and a response to it. Judge how good the response is: is it \
correct, does it help, does it do what was asked, no more and no less? Explain briefly. Then end with a line:
<score>N</score>
where N is from 0 (worthless) to 10 (could not be better).

[Instruction]
{prompt}

[Response]
{a}

[End]"""

PAIRWISE = """You will see an instruction and two responses to it. Judge how good each of them is: is it \
correct, does it help, does it do what was asked, no more and no less? Neither the order nor the length \
should matter. Explain briefly. Then end with two lines:
<score_A>N</score_A>
<score_B>M</score_B>
where N and M are from 0 (worthless) to 10 (could not be better).

[Instruction]
{prompt}

[Response A]
{a}

[Response B]
{b}

[End]"""


def read_score(reply: str, tag: str) -> float | None:
    """The last <tag>number</tag> of a judge's reply, or None where there is none from 0 to 10."""
    found = re.findall(rf"<{tag}>\s*(-?[0-9]+(?:\.[0-9]+)?)\s*</{tag}>", reply)
    return float(found[-1]) if found and 0 <= float(found[-1]) <= 10 else None


class Judge:
    """A language model behind an OpenAI-compatible address that scores answers from 0 to 10.

    Pointwise: the mean of --judge-votes scores. Pairwise: the mean of an answer's scores over all ordered
    pairs of its group, as in the original code; an answer that stands alone, as in a validation, is judged
    pointwise. What cannot be reached after 3 tries, or not be understood, does not count; an answer of which
    nothing counts has no verdict. Replies are kept by content, so that equal questions are asked once. After
    2 x --judge-concurrency questions in a row without a reply the rest of a step's are not asked: each of
    them would wait for three time-outs.
    """

    def __init__(self, args):
        try:
            import openai
        except ImportError as error:
            raise argparse.ArgumentError(None, "--judge-url: needs `pip install openai`") from error
        key = os.environ.get("JUDGE_API_KEY") or "none"
        if not re.match(r"https?://\w", args.judge_url):
            example = "an address such as http://127.0.0.1:8000/v1"
            raise argparse.ArgumentError(None, f"--judge-url {args.judge_url}: not {example}")
        try:
            self.client = openai.OpenAI(
                base_url=args.judge_url, api_key=key, timeout=args.judge_timeout, max_retries=2
            )
        except Exception as error:  # httpx has its own
            raise argparse.ArgumentError(None, f"--judge-url {args.judge_url}: {error}") from error
        self.client.organization = self.client.project = None  # of OpenAI's account, from its environment
        self.name, self.pairwise, self.votes = args.judge_model, args.judge_pairwise, args.judge_votes
        self.threads = ThreadPoolExecutor(args.judge_concurrency)
        self.replies: dict[tuple[bytes, int], str] = {}
        self.misses = 0  # questions in a row without a reply
        self.patience = 2 * args.judge_concurrency  # so many of them, and a step's other ones are not asked
        self.fault = None  # the kind of the last failure, without its text: that may quote the key
        if self.ask((POINTWISE.format(prompt="1+1=", a="2"), 0)) is None:
            reason = f"{args.judge_model} does not answer ({self.fault})"
            raise argparse.ArgumentError(None, f"--judge-url {args.judge_url}: {reason}")

    def ask(self, question: tuple[str, int]) -> str | None:
        """The reply to (text, number of the vote), or None."""
        text, vote = question
        key = (hashlib.sha256(text.encode()).digest(), vote)
        if key not in self.replies:
            if self.misses >= self.patience:
                return None
            try:
                reply = self.client.chat.completions.create(
                    model=self.name, messages=[{"role": "user", "content": text}], seed=vote,
                    temperature=0.0 if self.votes == 1 else 1.0, max_tokens=2048,
                )  # fmt: skip
                if len(self.replies) >= REPLIES:
                    self.replies.clear()
                self.replies[key] = reply.choices[0].message.content or ""
                self.misses = 0
                return self.replies[key]
            except Exception as error:  # the network's, the server's, a reply in no known form
                self.fault = f"{type(error).__name__} {getattr(error, 'status_code', '')}".strip()
                self.misses += 1
                return None
        return self.replies[key]

    def score(self, groups: list) -> list[float | None]:
        """The reward of every completion of (row, completions) groups."""
        self.misses = 0
        questions = []  # (text, [(which completion, tag of its score)])
        start = 0
        for row, completions in groups:
            messages = row.messages
            role = (lambda m: f"{m['role']}: ") if len(messages) > 1 else (lambda m: "")
            prompt = "\n\n".join(role(m) + m["content"] for m in messages)
            texts = [c.text for c in completions]
            if self.pairwise and len(texts) > 1:
                for i, j in itertools.permutations(range(len(texts)), 2):
                    question = PAIRWISE.format(prompt=prompt, a=texts[i], b=texts[j])
                    questions.append((question, [(start + i, "score_A"), (start + j, "score_B")]))
            else:
                for i, text in enumerate(texts):
                    questions.append((POINTWISE.format(prompt=prompt, a=text), [(start + i, "score")]))
            start += len(texts)
        wanted = dict.fromkeys((text, vote) for text, _ in questions for vote in range(self.votes))
        replies = dict(zip(wanted, self.threads.map(self.ask, wanted), strict=True))
        scores: list[list[float]] = [[] for _ in range(start)]
        for text, tags in questions:
            for vote in range(self.votes):
                found = [(i, read_score(replies[text, vote] or "", tag)) for i, tag in tags]
                if all(score is not None for _, score in found):  # half a comparison says nothing
                    for i, score in found:
                        scores[i].append(score)
        return [statistics.fmean(s) if s else None for s in scores]


def work():
    """The worker: a line of jobs in, a line out for each, until the pipe closes.

    Arguments: seconds after which an answer ends it, should nobody be left to kill it; kinds of rewards.
    """
    import resource
    import signal

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the trainer, which closes the pipe in the end
    logging.disable(logging.WARNING)  # Math-Verify warns about each answer that it cannot read
    patience, *kinds = sys.argv[1:]
    if "math" in kinds:
        math_verify("1", "$1$")  # imports and caches what the first answer would otherwise pay for
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reward
    out.write("ready\n")
    for line in sys.stdin:
        for name, answer, text in json.loads(line):
            signal.alarm(int(patience))
            try:
                reward = VERIFIERS[name](answer, text)
            except (
                Exception
            ):  # MemoryError, RecursionError, ValueError, ...: no verdict, which is not a wrong answer
                reward = None
            out.write(json.dumps(reward if reward is not None and math.isfinite(reward) else None) + "\n")
        signal.alarm(0)


if __name__ == "__main__":
    work()
