"""The judge against scripted replies over real HTTP, and once against a real `vllm serve` on the loopback."""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import TOY, require_vllm

import reward_models
from data import Row
from reward_models import Judge

pytest.importorskip("openai")  # vLLM brings it

CHECK = "1+1="  # the question that a judge is asked before a run starts


def reply_with(content):
    """The body of a reply, of whatever its content is."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def chunks(*parts):
    return reply_with(list(parts))


@contextmanager
def serving(reply, checked="<score>5</score> <score_A>5</score_A> <score_B>5</score_B>"):
    """An OpenAI-compatible server; reply(text, how often it was asked) -> text, (status, body), or a function
    of the request that gives one of them. checked: the reply to the question at the start.
    """
    seen, lock = {}, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            with lock:
                seen.setdefault(text, []).append((body, self.headers))
            answer = checked if CHECK in text else reply(text, len(seen[text]))
            answer = answer(body) if callable(answer) else answer
            status, content = (200, None) if isinstance(answer, str) else answer
            content = reply_with(answer) if content is None else content
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def judge(url, pairwise=False, votes=1, timeout=5.0, concurrency=4):
    return Judge(
        argparse.Namespace(
            judge_url=url, judge_model="m", judge_pairwise=pairwise, judge_votes=votes, judge_timeout=timeout,
            judge_concurrency=concurrency,
        ), talks=True,
    )  # fmt: skip


def group(prompt, *texts):
    return (Row(prompt, [], "judge", None), [SimpleNamespace(text=text) for text in texts])


def test_pointwise_scores_and_what_is_asked():
    with serving(lambda text, _: f"fine. <score>{text.count('!')}</score>") as (url, seen):
        assert judge(url).score([group("Say hi", "hi!!", "hi"), group("Say", "!!!!")]) == [2, 0, 4]
    [(body, _)] = next(calls for text, calls in seen.items() if "hi!!" in text)
    assert body["model"] == "m" and body["temperature"] == 0 and body["seed"] == 0
    text = body["messages"][0]["content"]
    assert "[Instruction]\nSay hi\n" in text and "[Response]\nhi!!\n" in text


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<score>7</score>", 7),
        ("<score> 7.5 </score>\n", 7.5),
        ("at first <score>2</score>, but no: <score>9</score>", 9),
        ("<score>11</score>", None),
        ("<score>-1</score>", None),
        ("<score>seven</score>", None),
        ("I cannot judge that.", None),
        ("", None),
        ((200, "not json"), None),
        ((200, {"choices": []}), None),
        ((200, {"error": "none of that"}), None),
        ((401, {"error": {"message": "wrong key"}}), None),
        ((400, {"error": {"message": "too long"}}), None),
        # without the tag, where only one number can be meant
        ("**8**", 8),
        ("8/10", 8),
        ("I give it **7.5/10**.", 7.5),
        ("<score>**8** / 10</score>", 8),
        ('```json\n{"score": 9, "reason": "3 of 4 points"}\n```', 9),
        ("Score: 6", 6),
        ("It is good. The score is 6/10.", 6),
        ("8/10 for style, 4/10 for the rest", None),
        ("score: 8, or rather score: 9", None),
        ("8/100", None),
        ("on 8/10/2025 it was right", None),
        ("Score: 12", None),
        ("A score of 10 would be perfect.", None),
        ("A score is 10 if perfect. This one deserves a 4.", None),
        ("Score: 8 out of 10", 8),
        ("Score: 8 out of 100", None),
        ("Score: 8%", None),
        ("score: 3-4", None),
        ("score: 8,5", None),
        ("<8", None),
        ("-3", None),
        ("Score: 8/100", None),
        ("Score: 7.5.", 7.5),
        ("Between 7 and 8.", None),
        # thinking
        ("<think>perhaps <score>2</score></think><score>6</score>", 6),
        ("perhaps <score>2</score></think>\n<score>6</score>", 6),
        ("<think>perhaps <score>2</score> or 8/10", None),
        ("<think>2</think>8", 8),
        # content that is no text
        ((200, chunks({"type": "text", "text": "<score>"}, {"type": "text", "text": "7</score>"})), 7),
        ((200, chunks("fine. ", "<score>4</score>")), 4),
        ((200, chunks({"type": "image"})), None),
        ((200, reply_with(None)), None),
    ],
)
def test_what_cannot_be_understood_is_unknown_and_never_0(reply, score):
    with serving(lambda text, _: reply if "odd" in text else "<score>3</score>") as (url, _):
        assert judge(url).score([group("q", "odd", "plain")]) == [score, 3]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score_A": 8, "score_B": "6"}', [8, 6]),
        ("**Score A:** 8/10\n**Score B:** 3/10", [8, 3]),
        ("<score_A>8</score_A> and the other is worse", None),
        ("A: 8, B: 6", None),
    ],
)
def test_a_comparison_without_tags_is_read_where_it_is_clear(reply, score):
    with serving(lambda *_: reply) as (url, _):
        found = judge(url, pairwise=True).score([group("q", "a", "b")])
    # each stands once in place A and once in place B
    assert found == ([None, None] if score is None else [sum(score) / 2] * 2)


@pytest.mark.parametrize(
    ("checked", "said"),
    [
        (
            "I am only a chat model. " + "x" * 200,
            "gives no score that can be read, but 'I am only a chat model. x",
        ),
        ("", "gives no score that can be read, but ''"),
        ("<think>2 is right: <score>10", "gives no score that can be read, but '<think>2 is"),
        ((200, reply_with(None)), "gives no score that can be read, but ''"),
        ((404, {"error": {"message": "no such model"}}), "does not answer (NotFoundError 404)"),
    ],
)
def test_a_judge_without_a_score_is_refused_at_the_start(checked, said):
    with serving(lambda *_: "", checked) as (url, _), pytest.raises(argparse.ArgumentError) as error:
        judge(url)
    assert f"--judge-url {url}: m {said}" in str(error.value) and "x" * 80 not in str(error.value)


@pytest.mark.parametrize(
    "refused", [["max_tokens"], ["temperature", "seed"], ["seed", "temperature", "max_tokens"]]
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_a_setting_is_asked_without_it(refused, status, capsys):
    """One name at a time, as servers do; said once each, and the next questions leave them out at once."""

    def picky(body):
        wrong = [name for name in refused if name in body]
        text = f"Unsupported parameter: '{wrong[0]}' is not supported with this model." if wrong else ""
        return (status, {"error": {"message": text}}) if wrong else "<score>5</score>"

    with serving(lambda *_: picky, picky) as (url, seen):
        asked = judge(url)
        assert asked.score([group("q", "a", "b")]) == [5, 5]
    settings = {"seed", "temperature", "max_tokens"}
    check, *others = seen.values()
    assert len(check) == len(refused) + 1 and [len(calls) for calls in others] == [1, 1]
    assert all(settings & calls[0][0].keys() == settings - {*refused} for calls in others)
    said = capsys.readouterr().err
    assert all(said.count(f"the judge refuses {name}: asked without") == 1 for name in refused)


def test_reasons_of_the_first_failures_are_printed(capsys):
    replies = {"odd": "No marks from me.", "bad": (401, {"error": {"message": "wrong key"}})}
    with serving(lambda text, _: next((r for n, r in replies.items() if n in text), "<score>3</score>")) as (
        url,
        _,
    ):
        asked = judge(url)
        asked.score([group("q", "odd", "plain", "bad")])
        asked.score([group(f"q{i}", "odd") for i in range(9)])
    said = capsys.readouterr().err.strip().split("\n\n")
    assert len(said) == 3
    assert said[0] == "warning: the judge gave no score in its reply '...No marks from me.'"
    assert said[1] == "warning: the judge gave no answer (AuthenticationError 401)"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(status):
    with serving(lambda _, n: (status, {"error": {"message": "later"}}) if n < 3 else "<score>6</score>") as (
        url,
        seen,
    ):
        assert judge(url).score([group("q", "a")]) == [6]
    assert sorted(map(len, seen.values())) == [1, 3]


def test_what_goes_on_failing_is_given_up_after_3_tries():
    with serving(lambda *_: (500, {"error": {"message": "no"}})) as (url, seen):
        asked = judge(url)
        assert asked.score([group("q", "a")]) == [None] and asked.fault == "InternalServerError 500"
        assert sorted(map(len, seen.values())) == [1, 3]


def test_a_judge_that_does_not_answer_is_not_asked_everything():
    """32 questions, 2 at a time: after 4 without a reply the others are left; the next step asks again."""
    down, refused = True, (400, {"error": {"message": "no"}})

    def reply(text, _):
        return refused if down and "1+1" not in text else "<score>3</score>"

    with serving(reply) as (url, seen):
        asked = judge(url, concurrency=2)
        groups = [group(f"q{i}", "a") for i in range(32)]
        assert asked.score(groups) == [None] * 32
        assert 4 <= len(seen) - 1 <= 6
        down = False
        assert asked.score(groups) == [3] * 32


def test_nothing_of_openai_s_account_reaches_another_judge(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "secret-of-openai")
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with serving(lambda *_: "<score>3</score>") as (url, seen):
        judge(url)
    [[(_, headers)]] = seen.values()
    assert "secret-of-openai" not in str(headers)


def test_a_conversation_reaches_the_judge_with_its_roles():
    messages = [{"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "b"), ("user", "c?"))]
    with serving(lambda *_: "<score>3</score>") as (url, seen):
        judge(url).score([group(messages, "d")])
    assert any("user: a?\n\nassistant: b\n\nuser: c?" in text for text in seen)


def test_a_connection_that_hangs_is_given_up():
    with serving(lambda text, _: time.sleep(20) or "" if "slow" in text else "<score>3</score>") as (url, _):
        started = time.perf_counter()
        assert judge(url, timeout=0.3).score([group("q", "slow", "fast")]) == [None, 3]
        assert time.perf_counter() - started < 10


def test_the_reward_of_a_judge_that_dies_is_unknown():
    with serving(lambda *_: "<score>3</score>") as (url, _):
        asked = judge(url, timeout=1)
        assert asked.score([group("q", "a")]) == [3]
    assert asked.score([group("q", "a", "b")]) == [3, None]  # the first is known by now
    assert asked.fault in ("APIConnectionError", "APITimeoutError")


def test_votes_are_averaged_and_ask_with_different_seeds():
    scores = iter([2, 9])
    with serving(lambda *_: f"<score>{next(scores)}</score>") as (url, seen):
        assert judge(url, votes=2, concurrency=1).score([group("q", "a")]) == [5.5]
    calls = next(calls for text, calls in seen.items() if CHECK not in text)
    assert sorted(body["seed"] for body, _ in calls) == [0, 1] and calls[0][0]["temperature"] == 1


def test_pairwise_is_the_mean_over_all_ordered_pairs():
    """Each completion's score is its number of '!', plus 1 for standing first."""

    def reply(text, _):
        a, b = (text.split(f"[Response {x}]\n")[1].split("\n")[0].count("!") for x in "AB")
        return f"<score_A>{a + 1}</score_A> <score_B>{b}</score_B>"

    with serving(reply) as (url, seen):
        assert judge(url, pairwise=True).score([group("q", "a!", "b!!", "c")]) == [1.5, 2.5, 0.5]
    assert len(seen) == 1 + 6


def test_half_a_comparison_does_not_count():
    def reply(text, _):
        first = "[Response A]\na\n" in text
        return "<score_A>4</score_A>" if first else "<score_A>1</score_A><score_B>2</score_B>"

    with serving(reply) as (url, _):
        assert judge(url, pairwise=True).score([group("q", "a", "b")]) == [2, 1]


def test_equal_questions_are_asked_once():
    with serving(lambda *_: "<score>5</score>") as (url, seen):
        asked = judge(url)
        assert asked.score([group("q", "same", "same", "same")]) == [5, 5, 5]
        assert asked.score([group("q", "same")]) == [5]
    assert sorted(map(len, seen.values())) == [1, 1]


def test_no_more_requests_at_a_time_than_allowed():
    running, most, lock = 0, 0, threading.Lock()

    def reply(*_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return "<score>5</score>"

    with serving(reply) as (url, _):
        judge(url, concurrency=3).score([group("q", *map(str, range(12)))])
    assert most == 3


def test_the_key_comes_from_the_environment_and_shows_nowhere(monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret")
    refuse = (401, {"error": {"message": "Incorrect API key provided: sk-secret"}})
    with serving(lambda *_: refuse) as (url, seen):
        asked = judge(url)
        assert asked.score([group("q", "a")]) == [None]
    keys = {headers["Authorization"] for calls in seen.values() for _, headers in calls}
    assert keys == {"Bearer sk-secret"}
    assert asked.fault == "AuthenticationError 401"
    assert "secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("url", "said"),
    [("localhost:8000", "not an address such as"), ("http://127.0.0.1:9/v1", "does not answer")],
)
def test_a_judge_that_is_not_there_is_named_before_the_run(url, said):
    with pytest.raises(argparse.ArgumentError, match=said):
        judge(url, timeout=1)


def test_a_real_server(tmp_path, monkeypatch):
    """`vllm serve` with the toy, its context stretched for the question: this is about the transport. The toy
    replies with digits, whose last one counts here.
    """
    require_vllm()
    for file in TOY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((TOY / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--served-model-name", "m"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
        try:
            while True:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.1)
            with pytest.raises(argparse.ArgumentError, match="gives no score that can be read, but "):
                monkeypatch.setattr(reward_models, "read_score", lambda reply, tag: None)
                judge(f"http://127.0.0.1:{port}/v1", timeout=60)
            monkeypatch.setattr(reward_models, "read_score", lambda reply, tag: float(reply.strip()[-1]))
            asked = judge(f"http://127.0.0.1:{port}/v1", timeout=60)
            reply = asked.ask((reward_models.POINTWISE.format(prompt="q", a="a"), 0))
            assert asked.score([group("q", "a")]) == [float(reply.strip()[-1])] and asked.fault is None
        finally:
            server.terminate()
            server.wait()
