"""Rewards of what nothing can verify: a scalar reward model, and a language model as judge.

An unknown reward is None: a conversation that is too long, a judge that cannot be reached or understood.
"""

import argparse
import datetime
import hashlib
import itertools
import os
import re
import statistics
from concurrent.futures import ThreadPoolExecutor

from processes import complain, first_line, naming

REPLIES = 20_000  # of a judge that are kept
TOLD = 3  # failed judgements of a run whose reasons are printed


class RewardModel:
    """A scalar reward model with its own tokenizer and chat template.

    name: directory or hub name of any sequence classifier with one label (Skywork-Reward-V2 and its like: the
    head reads the last token), or of a model in Athene-RM-8B's layout (`v_head` reads the CLS token that is
    put behind the conversation); date: the day that a template with a clock writes; offload: park it in host
    memory between uses; max_tokens: of a conversation, that of a longer one is unknown; batch_tokens: most
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
            raise fail(f"cannot be loaded ({first_line(error)})") from error
        if info["missing_keys"]:  # transformers would go on with a random head
            raise fail(f"no reward model, it lacks {sorted(info['missing_keys'])[0]}")
        if not self.tokenizer.chat_template:
            raise fail("its tokenizer has no chat template")
        if self.athene and self.tokenizer.cls_token_id is None:
            raise fail("its tokenizer has no CLS token, which Athene's value head reads")
        self.clock = datetime.date.fromisoformat(date).strftime
        self.rows = model.get_input_embeddings().num_embeddings
        with naming(f"--reward-model {name}: its chat template refuses a question and an answer", " ({})"):
            probe = self.encode([{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}])
        back = self.tokenizer.decode(probe)
        if "1+1=" not in back.replace(" ", ""):
            reason = f"its tokenizer does not keep its text ('1+1=' comes back as {back[:40]!r})"
            raise fail(f"{reason}: is a file missing?")
        self.home = "cpu" if offload else device
        self.model = model.to(self.home).eval().requires_grad_(False)
        self.device, self.max_tokens, self.batch_tokens = device, max_tokens, batch_tokens

    def check(self, rows: list):
        """Raises ArgumentError for the first row whose conversation the model's template refuses, such as one
        with a system message.
        """
        for row in rows:
            with naming(f"{row.where}: the reward model's chat template refuses it", " ({})"):
                self.render([*row.messages, {"role": "assistant", "content": "A completion."}])

    def render(self, conversation: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, strftime_now=self.clock)

    def encode(self, conversation: list[dict]) -> list[int]:
        """Token ids of messages, the last of which is the completion; the template writes special tokens."""
        ids = self.tokenizer(self.render(conversation), add_special_tokens=False)["input_ids"]
        return ids + [self.tokenizer.cls_token_id] if self.athene else ids

    def readable(self, conversation: list[dict]) -> list[int] | None:
        """Its ids; None where they are too many or beyond the matrix, or where the template refuses it."""
        try:
            ids = self.encode(conversation)
        except Exception:  # a template that refuses this completion, whatever it raises: unknown
            return None
        return ids if len(ids) <= self.max_tokens and max(ids, default=0) < self.rows else None

    def __call__(self, conversations: list[list[dict]]) -> list[float | None]:
        """The reward of each conversation; None where it cannot be read."""
        import torch

        ids = [self.readable(conversation) for conversation in conversations]
        short = [i for i in range(len(ids)) if ids[i]]
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


NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
OUT_OF_10 = r"\s*/\s*10(?![0-9/]|\.[0-9])"
# what makes of a number one of a range, of another scale, or another number
OTHER_SCALE = r"[.,]?[0-9]|e[-+0-9]|\s*(?:/|%|-\s*[0-9]|(?:out|of|to|or|points?)\b)"


def read_score(reply: str, tag: str) -> float | None:
    """The score from 0 to 10 in a judge's reply, or None where there is none, or more than one.

    The last <tag>number</tag> counts. A reply without one counts where it says a single number in another
    way: {"tag": 8}, tag: 8, or, for the tag `score`, 8/10 or nothing but the number. Stars and `/10` do not
    matter; what a model has thought before `</think>`, or thinks without an end, does not count.
    """
    reply = reply.rpartition("</think>")[2].partition("<think>")[0].replace("*", "").replace("`", "")
    name = tag.replace("_", "[_ ]")
    ways = [
        rf"<{tag}>\s*{NUMBER}(?:{OUT_OF_10})?\s*</{tag}>",
        rf'\b{name}\b"?\s*[:=]\s*"?{NUMBER}(?:{OUT_OF_10}|\s+out of 10\b|(?!{OTHER_SCALE}))',
    ]
    if tag == "score":
        ways += [rf"(?<![0-9/.]){NUMBER}{OUT_OF_10}", rf"""\A[\s"'.]*{NUMBER}[\s"'.!]*\Z"""]
    for way in ways:
        found = [float(number) for number in re.findall(way, reply, re.IGNORECASE)]
        if found:
            clear = way is ways[0] or len(set(found)) == 1
            return found[-1] if clear and 0 <= found[-1] <= 10 else None
    return None


class Judge:
    """A language model behind an OpenAI-compatible address that scores completions from 0 to 10.

    Pointwise: the mean of --judge-votes scores. Pairwise: the mean of a completion's scores over all ordered
    pairs of its group, as in the original code; one that stands alone, as in a validation, is judged
    pointwise. What cannot be reached after 3 tries, or not be understood, does not count; where nothing
    counts, the reward is unknown. Replies are kept by content, so that equal questions are asked once. After
    2 x --judge-concurrency questions in a row without a reply the rest of a step's are not asked: each of
    them would wait for three time-outs.
    """

    def __init__(self, args, talks: bool):
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
        self.talks, self.told = talks, 0  # whether failures are said, and how many have been
        # what not every server takes; one that is refused by name is left out from then on
        self.probing = True
        self.settings = {"seed": 0, "temperature": 0.0 if self.votes == 1 else 1.0, "max_tokens": 2048}
        probe = (PAIRWISE if self.pairwise else POINTWISE).format(prompt="1+1=", a="2", b="3")
        reply = self.ask((probe, 0))
        self.probing = (
            False  # later a setting is named for other reasons, such as a question that is too long
        )
        reason = None
        if reply is None:
            reason = f"{args.judge_model} does not answer ({self.fault})"
        elif read_score(reply, "score_A" if self.pairwise else "score") is None:
            reason = f"{args.judge_model} gives no score that can be read, but {reply[:80]!r}"
        if reason:
            raise argparse.ArgumentError(None, f"--judge-url {args.judge_url}: {reason}")

    def ask(self, question: tuple[str, int]) -> str | None:
        """The reply to (text, number of the vote), or None."""
        text, vote = question
        key = (hashlib.sha256(text.encode()).digest(), vote)
        if key in self.replies:
            return self.replies[key]
        if self.misses >= self.patience:
            return None
        try:
            reply = self._request(text, vote)
        except Exception as error:  # the network's, the server's, a reply in no known form
            self.fault = f"{type(error).__name__} {getattr(error, 'status_code', '')}".strip()
            self.misses += 1
            return None
        if len(self.replies) >= REPLIES:
            self.replies.clear()
        self.replies[key] = reply
        self.misses = 0
        return reply

    def _request(self, text: str, vote: int) -> str:
        """The text of a reply. Goes on without a setting that the server refuses by name; says so once."""
        while True:
            settings = dict(self.settings)
            if "seed" in settings:
                settings["seed"] = vote
            try:
                reply = self.client.chat.completions.create(
                    model=self.name, messages=[{"role": "user", "content": text}], **settings
                )
                break
            except Exception as error:
                refused = self.probing and getattr(error, "status_code", 0) in (400, 422)
                named = [name for name in settings if refused and name in str(error)]
                if not named:
                    raise
                left_out = [name for name in named if self.settings.pop(name, None) is not None]
                if left_out and self.talks:
                    complain(f"warning: the judge refuses {', '.join(left_out)}: asked without from now on")
        content = reply.choices[0].message.content or ""
        if isinstance(content, str):
            return content
        parts = (part if isinstance(part, str) else part.get("text") for part in content)
        return "".join(part or "" for part in parts)

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
                reply = replies[text, vote]
                found = [(i, read_score(reply or "", tag)) for i, tag in tags]
                if all(score is not None for _, score in found):  # half a comparison says nothing
                    for i, score in found:
                        scores[i].append(score)
                elif self.talks and self.told < TOLD:
                    self.told += 1
                    end = reply and f"...{reply[-80:]}"
                    reason = (
                        f"no answer ({self.fault})" if reply is None else f"no score in its reply {end!r}"
                    )
                    complain(f"warning: the judge gave {reason}")
        return [statistics.fmean(s) if s else None for s in scores]
