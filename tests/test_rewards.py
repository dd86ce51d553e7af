"""Rewards, and what happens to completions that hang, explode or break their worker."""

import argparse
import datetime
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal

import pytest
from conftest import ROOT
from verdicts import NARROW, RIGHT, WRONG

import data
import rewards
from rewards import VERIFIERS

HANGS = r"$\boxed{9^{9^{9^{9}}}}$"


@pytest.mark.parametrize(
    ("name", "answer", "text", "reward"),
    [
        ("exact", "46", "46", 1),
        ("exact", "46", " 46\n", 1),
        ("exact", "46", "046", 0),
        ("exact", "46", "46 or 47", 0),
        ("exact", "46", "", 0),
        ("gsm8k", "18", "9 a day, so\n#### 18", 1),
        ("gsm8k", "She makes 9*2.\n#### 18", "#### 18", 1),  # the dataset's own answer column
        ("gsm8k", "-5", "#### -5", 1),
        ("gsm8k", "-5", "#### 5", 0),
        ("gsm8k", "1,000", "#### $1000.00", 1),
        ("gsm8k", "18", "#### 17 no, #### 18", 1),
        ("gsm8k", "18", "The answer is 18", 0),
        ("gsm8k", "18", "#### 18.", 1),
        ("gsm8k", "0.5", "#### 0.50", 1),
        ("gsm8k", "-3.5", "#### -3.50", 1),
        ("gsm8k", "5", "#### \u20ac5", 1),
        ("gsm8k", "-5", "#### -$5.00", 1),
        ("gsm8k", "5", "#### 5 \u00a3", 1),
        ("gsm8k", "12", "#### **12**", 1),
        ("gsm8k", "12", "#### **$12**.", 1),
        ("gsm8k", "12", r"#### \boxed{12}", 1),
        ("gsm8k", "12", r"#### $\boxed{12}$", 1),
        ("gsm8k", "12000", r"#### \(12{,}000\)", 1),
        ("gsm8k", "-5", "#### \u22125", 1),
        ("gsm8k", "5", "#### +5", 1),
        ("gsm8k", "0.25", "#### .25", 1),
        ("gsm8k", "0.5", "#### 1/2", 1),
        ("gsm8k", "1000", "#### 1e3", 1),
        ("gsm8k", "1000000", "#### 1 000 000\nThat is all.", 1),
        ("gsm8k", "+1,000.0", "####1000", 1),
        ("gsm8k", "10", "#### 10/3", 0),
        ("gsm8k", "1", "#### 1e3", 0),
        ("gsm8k", "5", "#### 5^2", 0),
        ("gsm8k", "7", "#### 7:45", 0),
        ("gsm8k", "2", "#### 2 or 3", 0),
        ("gsm8k", "1", "#### 1,5", 0),
        ("gsm8k", "18", "#### 18 dollars", 0),
        ("gsm8k", "50", "#### 50%", 0),
        ("gsm8k", "0", "#### /3", 0),
        ("gsm8k", "3", "#### 3/0", 0),
        ("gsm8k", "18", "####", 0),
        ("gsm8k", "18", "#### " + "$" * 99_999, 0),
        ("gsm8k", "1", "#### 1" + "0" * 99_999, 0),
        ("math", "$5", r"$\boxed{5}$", 1),
        ("math", "$5", r"$\boxed{\$5}$", 1),
        ("math", "\u20ac18.90", r"$\boxed{18.9}$", 1),
        ("math", "42\n", r"$\boxed{42}$", 1),
        ("math", "42", r"The final answer is $\boxed{42}$. I hope it is correct.", 1),
        ("math", "42", r"$\boxed{43}$", 0),
        ("math", "42", "The final answer is 42", 0),  # not LaTeX: the paper's settings extract LaTeX only
        ("math", "42", r"first $\boxed{41}$, then $\boxed{42}$", 1),
        ("math", r"\frac{1}{2}", r"$\boxed{0.5}$", 1),
        ("math", r"\frac{1}{2}", r"$\boxed{\dfrac{2}{4}}$", 1),
        ("math", "$x^2+1$", r"$\boxed{1+x^2}$", 1),
        ("math", r"\{1,2,3\}", r"$\boxed{\{3,2,1\}}$", 1),
        ("math", r"(-\infty, 2]", r"$\boxed{(-\infty,2]}$", 1),
        ("math", r"(-\infty, 2]", r"$\boxed{(-\infty,2)}$", 0),
        ("math", r"2\sqrt{3}", r"$\boxed{\sqrt{12}}$", 1),
        ("math", r"\begin{pmatrix}1\\2\end{pmatrix}", r"$\boxed{\begin{pmatrix}1\\2\end{pmatrix}}$", 1),
        ("math", "10", r"$\boxed{10\text{ cm}}$", 1),
        ("math", "42", "", 0),
        ("math", "42", "x" * 10_000, 0),
    ],
)
def test_rewards(name, answer, text, reward):
    assert VERIFIERS[name].function(answer, text) == reward


def test_math_rewards():
    assert len(RIGHT) + len(WRONG) >= 60
    wrong = [pair for pair in RIGHT if VERIFIERS["math"].function(*pair) != 1]
    wrong += [pair for pair in WRONG + NARROW if VERIFIERS["math"].function(*pair) != 0]
    assert wrong == []


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        (r"4\left(x+1\right)", r"$\boxed{4x+4}$", 1),  # basic_latex
        (r"12\text{ dollars}", r"$\boxed{12}$", 1),  # units
        (r"\sqrt 8", r"$\boxed{2\sqrt{2}}$", 1),  # malformed_operators
        (r"3 \boxed{7}", r"$\boxed{7}$", 0),  # boxed: a reference answer is taken whole
        ("a=b=2", r"$\boxed{b=2}$", 0),  # equations: nor is one cut behind its first =
        ("7", r"$\boxed{7}$. The final answer is $3$.", 1),  # boxed_match_priority
        (r"\pi", r"$\boxed{3.14159}$", 0),  # float_rounding
    ],
)
def test_each_setting_of_math_verify_decides_about_an_answer(answer, text, reward):
    """With the other value of the setting, the other reward. (For `nits` no such answer is known.)"""
    assert VERIFIERS["math"].function(answer, text) == reward


@pytest.mark.parametrize(
    ("reward", "answer", "said"),
    [
        ("gsm8k", "three", "needs a number as `answer`, not 'three'"),
        ("gsm8k", "50%", "needs a number as `answer`, not '50%'"),
        ("gsm8k", "18 dollars", "needs a number"),
        ("gsm8k", "#### 2 or 3", "needs a number"),
        ("gsm8k", "She has 2*9.\n#### 18", None),
        ("gsm8k", 18.0, None),
        ("gsm8k", Decimal("-3.50"), None),
        ("exact", "three", None),
        ("exact", True, "needs an `answer`, a text or a number"),
        ("exact", b"3", "needs an `answer`, a text or a number"),
        ("exact", datetime.date(2025, 6, 26), "needs an `answer`, a text or a number"),
    ],
)
def test_answers_that_no_completion_can_match_are_found_when_rows_are_read(reward, answer, said):
    found = rewards.row_fault({"prompt": "1", "reward": reward, "answer": answer})
    assert found is None if said is None else said in found


def references(*answers):
    return [data.Row("1", [], "math", answer, where=f"f line {i}") for i, answer in enumerate(answers, 1)]


@pytest.mark.parametrize("answer", [r"\text{}", "$", "  "])
def test_a_reference_answer_that_math_verify_cannot_parse_is_refused_with_its_line(scorer, answer):
    with pytest.raises(argparse.ArgumentError, match="f line 3: Math-Verify cannot parse"):
        rewards.check_references(references("1", r"\frac{1}{2}", answer), scorer, talks=False)


MISREAD = [
    "1 000", "90\u00b0", "\u00bd", "42.", r"\[42\]", r"1\,000", "1e-05", "**42**", "2\u00bd", "18 dollars",
    "3 1/2", r"\[\frac{1}{2}\]", r"2 \pi.", "45\u00b0C", "90\u00ba", "\uff0d5", "=42", "42,", "1_000",
    r"\[x+1\]",
]  # fmt: skip
READ = [
    "42", "-3.5", "007", "1,000", "+5", "\u22125", ".5", "-3/4", r"\(42\)", "$42$", "$42", "\u20ac42", "2 cm",
    r"\frac{1}{2}", "x=3", "(1,2)", r"\text{Evelyn}", r"90^\circ", r"50\%", "1,2", "3+4i", r"10,\!080",
    "2 x", "p - q", r"\boxed{42}", "$x^2+1$", "(C)", "2516_8", r"5.4 \text{ cents}",
]  # fmt: skip


def test_numbers_that_math_verify_takes_for_something_else_are_counted_in_one_line(scorer, capsys):
    rewards.check_references(references(*READ, *MISREAD, MISREAD[0]), scorer, talks=True)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"misreads {len(MISREAD) + 1} reference answer(s)" in said
    assert said.endswith(f"1000 counts as wrong where '1 000' is the answer (f line {len(READ) + 1})")
    for answer in MISREAD:  # each of them
        rewards.check_references(references(answer), scorer, talks=True)
        assert "misreads 1 reference answer(s)" in capsys.readouterr().err, answer
    rewards.check_references(references(*READ), scorer, talks=True)
    assert "warning" not in capsys.readouterr().err


@pytest.fixture
def scorer():
    scorer = rewards.Verifiers({"math"}, timeout=1.5, workers=2)
    yield scorer
    scorer.close()


def test_a_hanging_completion_is_killed_and_its_neighbours_are_scored(scorer):
    scorer([("math", "1", "$1$", {})] * 2)  # workers are up
    jobs = [("math", str(i), rf"$\boxed{{{i if i % 2 else 0}}}$", {}) for i in range(1, 41)]
    jobs[3] = jobs[20] = ("math", "4", HANGS, {})
    started = time.perf_counter()
    results = scorer(jobs)
    assert time.perf_counter() - started < 15  # two deadlines and two starts of a worker, not for ever
    assert results == [None if i in (3, 20) else float((i + 1) % 2) for i in range(40)]
    assert scorer([("exact", "1", "1", {})]) == [1.0]  # and the pool is whole again


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Registers the verifiers of a file of one's own, for one test."""
    monkeypatch.setattr(rewards, "VERIFIERS", dict(rewards.VERIFIERS))

    def load(content):
        file = tmp_path / "own_rewards.py"
        file.write_text(f"import math, os, subprocess, sys, time\nfrom rewards import verifier\n\n{content}")
        spec = importlib.util.spec_from_file_location("own_rewards", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


BOMBS = """
bomb = verifier("bomb")(lambda answer, text: float(len(bytearray(int(4e9)))))
crash = verifier("crash")(lambda answer, text: os._exit(3))
wrong = verifier("raise")(lambda answer, text: 1 / 0)
nan = verifier("nan")(lambda answer, text: math.nan)
noise = verifier("noise")(lambda answer, text: print("1.0") or 0.5)
"""


def test_the_reward_of_a_memory_bomb_a_crash_an_exception_and_nan_is_unknown(own):
    own(BOMBS)
    kinds = ["exact", "bomb", "exact", "crash", "exact", "raise", "nan", "noise", "exact"]
    scorer = rewards.Verifiers({*kinds}, timeout=5, workers=1)
    assert scorer([(kind, "1", "1", {}) for kind in kinds]) == [1, None, 1, None, 1, None, None, 0.5, 1]
    scorer.close()


CODE = """
@verifier("code", on_timeout=0.0)
def code(answer, text, /, tests, **columns):
    done = subprocess.run([sys.executable, "-c", f"{text}\\n{tests}"], capture_output=True)
    return float(done.returncode == 0)

@verifier("patient")
def patient(answer, text, /, tests, **columns):
    return code(answer, text, tests)
"""


def test_a_reward_that_runs_code_sees_columns_and_says_that_late_is_wrong(own, tmp_path):
    """The completion that does not end is killed with the process that runs it."""
    own(CODE)
    mark = tmp_path / "still running"
    hangs = f"import time\ntime.sleep(4)\nopen({str(mark)!r}, 'w')\n"
    texts = ["def f(x): return 2 * x", "def f(x): return x", hangs, "import os; os.kill(os.getppid(), 9)"]
    texts.append("def f(x): return x + x")
    scorer = rewards.Verifiers({"code", "patient"}, timeout=1.5, workers=1)
    columns = {"tests": "assert f(3) == 6", "text": "a column of this name is in nobody's way"}
    assert scorer([("code", None, text, columns) for text in texts]) == [1, 0, 0, 0, 1]
    assert scorer([("patient", None, hangs, columns)]) == [None]  # unknown, where it does not say so
    scorer.close()
    time.sleep(4)
    assert not mark.exists()


def test_a_row_lacks_a_column_that_its_verifier_names(own):
    own(CODE)
    row = {"prompt": "double it", "reward": "code"}
    assert rewards.row_fault(row | {"tests": "assert True"}) is None  # and no answer is needed
    said = "reward `code` needs a column `tests` (it has: prompt, reward, level)"
    assert rewards.row_fault(row | {"level": 3}) == said


def test_a_worker_that_died_while_idle_costs_nobody_a_reward(scorer):
    scorer([("exact", "1", "1", {})] * 100)
    for worker in list(scorer.idle.queue):
        worker.kill()
        worker.wait()
    assert scorer([("exact", "1", "1", {})] * 100) == [1.0] * 100


def test_the_reward_of_an_unparsable_reference_answer_is_unknown(scorer):
    assert scorer([("math", r"\text{}", r"$\boxed{42}$", {})]) == [None]


HOSTILE = [
    r"\boxed{__import__('os').system('false')}", "\\boxed{12*3}; `eval(12*3)`; 12*3", r"\boxed{x_{print(1)}}",
    r"\boxed{1\mathrm{.__class__}}", r"\boxed{\operatorname{eval}(7)}", r"$f(x) = exec(7)$", r"\boxed{0x1F}",
    r"\boxed{\text{open('/etc/passwd')}}", "The final answer is 12*3.", r"$\sum_{i=1}^{3} exit(i)$", "$2**3$",
    r"\boxed{3.5 \times 10^{2}}",
]  # fmt: skip
LISTENS = """
import json, sys
import rewards
from sympy.parsing import parse_expr
rewards.math_verify("1", "$1$")  # what importing evaluates comes before the hook
found = []
sys.addaudithook(lambda event, args: event == "compile" and args[0] and found.append(str(args[0])))
for text in json.loads(sys.argv[1]):
    rewards.math_verify("36", text)
print(json.dumps(found))
parse_expr("print(1)", evaluate=False)  # this is how it would be seen
print(json.dumps(found[-3:]))
"""


def test_what_a_model_writes_is_never_evaluated():
    """sympy evaluates `Integer (36 )` to make a number: of a completion, only its numerals may get there."""
    command = [sys.executable, "-c", LISTENS, json.dumps(HOSTILE)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    answers, printed, seen = map(json.loads, done.stdout.splitlines())
    words = re.compile(r"__|system|print|eval|exec|open|exit|\) *\*")
    assert any("Integer (36 )" in source for source in answers)
    assert [source for source in answers if words.search(source)] == []
    assert printed == 1 and "b'print (Integer (1 ))'" in seen


def test_a_worker_whose_trainer_is_gone_ends_with_its_completion():
    job = json.dumps([("math", "4", HANGS, {})]) + "\n"
    done = subprocess.run(
        [sys.executable, rewards.__file__, "1", "math"], input=job, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGALRM
