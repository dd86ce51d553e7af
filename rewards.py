"""What a completion is worth: verifiers, a reward model, a judge; the row's `reward` says which.

A verifier like `math` hands model output to a computer algebra system: a completion like 9^9^9^9 never
returns, or takes all memory. So verifiers run in child processes (this file, run as a script: it imports
neither torch nor vLLM), which are killed at a deadline. Where the reward is unknown, because the check
overran the deadline or the memory limit or broke its worker, or because a judge could not be reached or
understood, it is None: such a completion leaves its group and is counted, it is never scored 0.

A verifier of your own is a function in a file of its own, registered under a name that rows then use:

    @verifier("short")
    def short(answer, text, /, limit, **columns):  # rows of this reward have a column `limit`
        return float(text.strip() == answer and len(text) <= limit)
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MEMORY = 2 * 2**30  # bytes of address space of a worker
BATCH = 32  # completions sent to a worker at a time


@dataclass(frozen=True)
class Verifier:
    function: Callable  # (answer, text, /, **columns of the row) -> reward
    on_timeout: float | None
    needs_answer: bool


VERIFIERS: dict[str, Verifier] = {}
OPEN_ENDED = {"rm": "reward model", "judge": "judge"}  # rewards that do not say right or wrong


def verifier(name: str, *, on_timeout: float | None = None, needs_answer: bool = False) -> Callable:
    """Registers a function as the reward `name`. It gets a row's reference answer, the text of a completion
    and, by name, the prompt and the row's other columns; a row without one that it names is refused when it
    is read. It runs in a worker, which imports the file that it stands in.

    on_timeout: the reward where the check is late or takes its worker down; None: unknown, as where the
    function raises. needs_answer: whether rows must have an `answer`.
    """

    def register(function: Callable) -> Callable:
        VERIFIERS[name] = Verifier(function, on_timeout, needs_answer)
        return function

    return register


@verifier("exact", needs_answer=True)
def exact(answer: str, text: str, /, **columns) -> float:
    """1 if the completion is the answer, spaces around it aside."""
    return float(text.strip() == answer.strip())


@verifier("gsm8k", needs_answer=True)
def gsm8k(answer: str, text: str, /, **columns) -> float:
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


@verifier("math", needs_answer=True)
def math_verify(answer: str, text: str, /, **columns) -> float:
    """Math-Verify with the paper's settings (original code, `_rewards.py`): 1 or 0, no bonus for form or
    length.

    Its own time limits are off, because there a time-out counts as wrong: the worker's deadline stands in. A
    completion that sympy cannot handle is wrong, as in the original code; the reward of one that runs out of
    memory or stack is unknown. Raises ValueError where the reference answer cannot be parsed: that says
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
            same = verify(gold, candidate, float_rounding=6, timeout_seconds=None, raise_on_error=True)
            if same and same_size(gold, candidate):
                return 1.0
        except (MemoryError, RecursionError):
            raise
        except Exception:  # one comparison that sympy cannot make; another may still match
            continue
    return 0.0


def same_size(gold, candidate) -> bool:
    """False where two expressions that Math-Verify takes for equal are different tiny numbers, or hold such:
    it looks at 6 decimals of a number and at 15 of a difference, which makes 2^-99 and -2^-98 the same.
    """
    golds, candidates = (sorted(numbers_in(x)) for x in (gold, candidate))
    if len(golds) != len(candidates):
        return True
    for (a, ai), (b, bi) in zip(golds, candidates, strict=True):
        size = max(abs(part) for part in (a, ai, b, bi))
        if size < 1e-4 and max(abs(a - b), abs(ai - bi)) > 1e-5 * size:
            return False
    return True


def numbers_in(expression) -> list[tuple]:
    """The value of a sympy expression, with fixed values for its unknowns, as (real, imaginary) numbers of
    sympy, which are never too small; of the members of a set, a tuple, an interval or a matrix, and of what
    an equation says of an unknown; none of what has no value.
    """
    import sympy

    if isinstance(expression, sympy.Set | sympy.Tuple | sympy.core.relational.Relational):
        parts = [part for part in expression.args if not isinstance(part, sympy.Symbol)]
        return [value for part in parts for value in numbers_in(part)]
    if isinstance(expression, sympy.MatrixBase):
        return [value for part in expression.flat() for value in numbers_in(part)]
    unknowns = sorted(getattr(expression, "free_symbols", ()), key=str)
    try:
        value = expression.doit().evalf(15, subs={x: 0.7 + 0.3 * k for k, x in enumerate(unknowns)})
        # a precision of 1 is sympy's sign that all digits have cancelled
        parts = (0 if getattr(x, "_prec", 15) == 1 else x for x in value.as_real_imag())
        real, imaginary = (sympy.Float(part) for part in parts)
        return [(real, imaginary)]
    except (AttributeError, TypeError, ValueError, OverflowError):  # a text, infinity, true or false
        return []


@functools.cache
def _math_configs():
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    gold = LatexExtractionConfig(normalization_config=normalization)
    return (gold,), (LatexExtractionConfig(boxed_match_priority=0),)


def row_fault(row: dict) -> str | None:
    """What is wrong with the reward fields of a raw row, or None."""
    known = ", ".join([*VERIFIERS, *OPEN_ENDED])
    if "reward" not in row:
        return f"no `reward` (one of {known})"
    reward, answer = row["reward"], row.get("answer")
    if not isinstance(reward, str) or (reward not in VERIFIERS and reward not in OPEN_ENDED):
        return f"unknown reward {reward!r} (known: {known})"
    if reward in OPEN_ENDED:
        return None
    is_answer = isinstance(answer, str | int | float | Decimal) and not isinstance(answer, bool)
    if VERIFIERS[reward].needs_answer and not (is_answer and str(answer).strip()):
        return f"reward `{reward}` needs an `answer`, a text or a number"
    if reward == "gsm8k" and gsm8k_number(str(answer)) is None:
        return f"reward `gsm8k` needs a number as `answer`, not {answer!r}"
    for name, parameter in inspect.signature(VERIFIERS[reward].function).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in row:
            return f"reward `{reward}` needs a column `{name}` (it has: {', '.join(row)})"
    return None


def add_reward_flags(add: Callable):
    """Declares this file's flags; add: a parser's add_argument."""
    from flags import count, positive  # here, because a worker that starts has no use for it

    # fmt: off
    add("--reward-timeout", type=positive, default=5.0, help="seconds that a verifier has for a completion")
    add("--reward-workers", type=count, default=2, help="processes of each rank in which verifiers run")
    add("--reward-model", help="of rows with reward rm: directory or hub name; paper: Nexusflow/Athene-RM-8B")
    add("--reward-offload", action="store_true", help="the reward model waits in host memory between steps")
    add("--judge-url", help="of rows with reward judge: OpenAI-compatible, as http://127.0.0.1:8000/v1")
    add("--judge-model", help="its name there; the key comes from the environment: JUDGE_API_KEY")
    add("--judge-pairwise", action="store_true", help="compare all ordered pairs of a group's completions")
    add("--judge-votes", type=count, default=1, help="judgements of each completion or pair, averaged")
    add("--judge-timeout", type=positive, default=60.0, help="seconds of one request; 3 are tried")
    add("--judge-concurrency", type=count, default=16, help="requests at one time, of each rank")
    # fmt: on


class Scorer:
    """Gives every completion its reward, by the `reward` of its row.

    rows: those whose completions will be scored; args: the values of `add_reward_flags`, and `date`; talks:
    whether this rank shows progress and warnings. Raises ArgumentError for flags that these rows miss, a
    reward model that is none, a judge that does not answer, a reference answer that Math-Verify cannot use.
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
        from reward_models import Judge, RewardModel  # not in a worker

        verifiers = kinds & VERIFIERS.keys()
        self.judge = Judge(args, talks) if "judge" in kinds else None
        self.model = None
        if "rm" in kinds:
            self.model = RewardModel(args.reward_model, device, dtype, args.date, args.reward_offload)
            self.model.check([row for row in rows if row.reward == "rm"])
        self.verifiers = None
        if verifiers:
            self.verifiers = Verifiers(verifiers, args.reward_timeout, args.reward_workers)
        if "math" in kinds:
            check_references(rows, self.verifiers, talks)

    def score(self, groups: list):
        """Fills in `reward` of every completion of (row, completions) groups; None: unknown."""
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

    Raises ArgumentError for a row where that reward is unknown, since it then is for every completion. Says
    on stderr how many answers are read as something else, with an example.
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
        found = verifiers([("math", answer, rf"$\boxed{{{_as_latex(answer)}}}$", {}) for answer in batch])
        for answer, reward in zip(batch, found, strict=True):
            if reward is None:
                verifiers.close()
                reason = f"Math-Verify cannot parse or compare the reference answer {answer!r}"
                where = next(iter(asked[answer]))
                raise argparse.ArgumentError(None, f"{where}: {reason}; correct or drop it")
            misread += [] if reward else asked[answer].values()
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
    """Scores completions in `workers` child processes, with a deadline of `timeout` seconds each.

    kinds: the names of the rewards that will be asked for, so that a worker imports only what they need.
    """

    def __init__(self, kinds: set[str], timeout: float, workers: int = 2):
        self.kinds, self.timeout = kinds, timeout
        self.threads = ThreadPoolExecutor(workers)  # a thread holds one worker's end of the pipe
        self.idle: queue.Queue[subprocess.Popen | None] = queue.Queue()
        for _ in range(workers):
            self.idle.put(self._spawn())

    def __call__(self, jobs: list[tuple[str, str, str, dict]]) -> list[float | None]:
        """The reward of each (reward name, reference answer, text, the row's other columns), or None where it
        is unknown.
        """
        batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
        return [reward for batch in self.threads.map(self._score, batches) for reward in batch]

    def score(self, groups: list) -> list[float | None]:
        """The reward of every completion of (row, completions) groups."""
        return self(
            [
                (row.reward, row.answer, c.text, {"prompt": row.prompt, **row.columns})
                for row, completions in groups for c in completions
            ]
        )  # fmt: skip

    def _score(self, jobs) -> list[float | None]:
        """Sends the jobs in one line, reads a line a reward; kills a worker that is late and goes on."""
        rewards: list[float | None] = []
        worker = self.idle.get()
        try:
            while len(rewards) < len(jobs):
                if worker is None:
                    worker = self._spawn()
                if not worker.ready:  # imports take a while and are not the completion's fault
                    worker.ready = self._line(worker, timeout=120) == "ready"
                    if not worker.ready:
                        raise RuntimeError("a reward worker did not start: see `python rewards.py 5 math`")
                try:
                    worker.stdin.write(json.dumps(jobs[len(rewards) :]).encode() + b"\n")
                except BrokenPipeError:  # it died while idle, which is no completion's fault
                    _kill(worker)
                    worker = None
                    continue
                while len(rewards) < len(jobs):
                    line = self._line(worker, self.timeout)
                    if line is None:  # late or dead: the completion in hand is the culprit
                        _kill(worker)
                        worker = None
                        rewards.append(VERIFIERS[jobs[len(rewards)][0]].on_timeout)
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
        patience = math.ceil(self.timeout) + 1
        functions = [VERIFIERS[kind].function for kind in self.kinds]
        files = {os.path.abspath(inspect.getfile(f)) for f in functions if f.__module__ != __name__}
        command = [sys.executable, __file__, str(patience), ",".join(sorted(self.kinds)), *sorted(files)]
        # bufsize 0: poll must not overlook lines that Python has already read ahead
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, process_group=0,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        worker.ready = False
        return worker

    def close(self):
        self.threads.shutdown()
        while not self.idle.empty():
            if worker := self.idle.get():
                _kill(worker)


def _kill(worker: subprocess.Popen):
    """With all processes that it has started: a verifier may run code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def work():
    """The worker: a line of jobs in, a line out for each, until the pipe closes.

    Arguments: seconds after which a check ends it, should nobody be left to kill it; names of the rewards;
    files that register some of them.
    """
    import importlib.util
    import resource

    logging.disable(logging.WARNING)  # Math-Verify warns about each completion that it cannot read
    patience, kinds, *files = sys.argv[1:]
    for number, file in enumerate(files):
        spec = importlib.util.spec_from_file_location(f"verifiers_{number}", file)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    if "math" in kinds.split(","):
        math_verify("1", "$1$")  # imports and caches what the first completion would otherwise pay for
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reward
    out.write("ready\n")
    for line in sys.stdin:
        for name, answer, text, columns in json.loads(line):
            signal.alarm(int(patience))
            try:
                reward = VERIFIERS[name].function(answer, text, **columns)
            except Exception:  # MemoryError, RecursionError, ValueError, ...: unknown, which is not wrong
                reward = None
            known = reward is not None and math.isfinite(reward)
            out.write(json.dumps(float(reward) if known else None) + "\n")
        signal.alarm(0)


if __name__ == "__main__":
    sys.modules["rewards"] = sys.modules["__main__"]  # where the files find `verifier`
    work()
