"""What an answer is worth: one row at a time, in worker processes that are killed at a deadline.

`math` hands model output to a computer algebra system: an answer like 9^9^9^9 never returns, or takes all
memory. So every reward runs in a child process of its own (this file, run as a script: it imports neither
torch nor vLLM). What
overruns the deadline or the memory limit, or breaks its worker, is scored None: such a sample leaves its
group and is counted, it is never scored 0.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

MEMORY = 2 * 2**30  # bytes of address space of a worker
BATCH = 32  # answers sent to a worker at a time


def exact(answer: str, text: str) -> float:
    """1 if the completion is the answer, spaces around it aside."""
    return float(text.strip() == answer.strip())


def gsm8k(answer: str, text: str) -> float:
    """1 if the last `#### number` of the completion is the answer's number (GSM8K's own format)."""
    return float(_last_number(text) == (_last_number(answer) or _plain(answer)))


def _last_number(text: str) -> str | None:
    found = re.findall(r"####\s*\$?(-?[0-9][0-9.,]*)", text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    """1,000.00 and 1000 are one number."""
    number = number.strip().replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


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
    golds = parse(answer if answer.startswith("$") else f"${answer}$", gold_config, parsing_timeout=None)
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


REWARDS = {
    "exact": exact,
    "gsm8k": gsm8k,
    "math": math_verify,
}  # (reference answer, completion text) -> reward


def complaint(row: dict) -> str | None:
    """What is wrong with the reward fields of a raw row, or None."""
    if "reward" not in row:
        return f"no `reward` (one of {', '.join(REWARDS)})"
    if not isinstance(row["reward"], str) or row["reward"] not in REWARDS:
        return f"unknown reward {row['reward']!r} (known: {', '.join(REWARDS)})"
    answer = row.get("answer")
    if answer is None or isinstance(answer, (bool, list, dict)) or not str(answer).strip():
        return f"reward `{row['reward']}` needs an `answer`, a text or a number"
    return None


class Scorer:
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

    def score(self, groups: list):
        """Fills in `reward` of every completion of (row, completions) groups."""
        todo = [(row, c) for row, completions in groups for c in completions]
        results = self([(row.reward, row.answer, c.text) for row, c in todo])
        for (_, completion), reward in zip(todo, results, strict=True):
            completion.reward = reward

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
    """A scalar reward model: any sequence classifier of the hub with one label, e.g. Skywork-Reward-V2.

    Its own tokenizer and chat template write the conversation down; its one logit is the reward. name:
    directory or hub name; max_tokens: of a conversation, a longer one gets no verdict; batch_tokens: most
    padded tokens of one forward. Raises ArgumentError for what is not such a model.
    """

    def __init__(self, name: str, device, dtype, max_tokens: int = 4096, batch_tokens: int = 2**14):
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            if config.num_labels != 1 or not self.tokenizer.chat_template:
                fault = (
                    f"it has {config.num_labels} labels, not one"
                    if config.num_labels != 1
                    else "no chat template"
                )
                raise argparse.ArgumentError(None, f"--reward-model {name}: {fault}")
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise argparse.ArgumentError(
                None, f"--reward-model {name}: cannot be loaded ({reason})"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.max_tokens, self.batch_tokens = device, max_tokens, batch_tokens

    def __call__(self, conversations: list[list[dict]]) -> list[float | None]:
        """The reward of each list of messages, the last of which is the answer; None over `max_tokens`."""
        import torch

        if not conversations:
            return []
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written them
        short = [i for i in range(len(ids)) if len(ids[i]) <= self.max_tokens]
        batches: list[list[int]] = []
        for i in sorted(short, key=lambda i: -len(ids[i])):
            if not batches or (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) > self.batch_tokens:
                batches.append([])
            batches[-1].append(i)
        rewards: list[float | None] = [None] * len(ids)
        for batch in batches:
            # the head reads the last token that is not padding: here an id that no text of the batch has
            used = {token for i in batch for token in ids[i]}
            pad = next(token for token in itertools.count() if token not in used)
            self.model.config.get_text_config().pad_token_id = pad
            width = len(ids[batch[0]])
            ids_BL = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in batch]).to(self.device)
            logits_B1 = self.model(input_ids=ids_BL, attention_mask=(ids_BL != pad).long()).logits
            for i, reward in zip(batch, logits_B1[:, 0].tolist(), strict=True):
                rewards[i] = reward if math.isfinite(reward) else None
        return rewards

    def score(self, groups: list):
        """Fills in `reward` of every completion of (row, completions) groups."""
        todo = [(row, c) for row, completions in groups for c in completions]
        conversations = []
        for row, c in todo:
            messages = (
                [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
            )
            conversations.append([*messages, {"role": "assistant", "content": c.text}])
        for (_, c), reward in zip(todo, self(conversations), strict=True):
            c.reward = reward


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
                reward = REWARDS[name](answer, text)
            except (
                Exception
            ):  # MemoryError, RecursionError, ValueError, ...: no verdict, which is not a wrong answer
                reward = None
            out.write(json.dumps(reward if reward is not None and math.isfinite(reward) else None) + "\n")
        signal.alarm(0)


if __name__ == "__main__":
    work()
