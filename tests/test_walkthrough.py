"""What teaching/walkthrough.py prints, against its committed text, plain models, formulas and a real run."""

import json
import math
import re
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOY
from transformers import AutoModelForCausalLM

from teaching import walkthrough

COMMAND = [sys.executable, ROOT / "teaching" / "walkthrough.py"]
COMMITTED = (ROOT / "teaching" / "walkthrough.txt").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BETA, KL_WEIGHT, END = 3.0, 0.001, 3  # the toy's; END: the id of the end token
ROUNDED = 6e-4  # nats: a number of three decimals, and the float32 behind it


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        COMMAND, cwd=folder, capture_output=True, encoding="utf-8", timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(folder.iterdir()) == []  # it leaves nothing behind
    return done.stdout


@pytest.fixture(scope="module")
def tables(text):
    """Scene -> the rows of its tables, split into cells."""
    scenes = re.split(r"\n(?=\d+  )", text)[1:]
    assert [scene.split("  ")[0] for scene in scenes] == [str(n) for n in range(1, 11)]
    return [[]] + [[line.split() for line in scene.splitlines() if line[:2] == "  "] for scene in scenes]


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """The metrics of the script's first ten steps, and the model that they end with."""
    out = tmp_path_factory.mktemp("run") / "dpo"
    flags = [*walkthrough.FLAGS, "--steps", "10", "--eval-every", "0", "--save-every", "0", "--out", out]
    command = [sys.executable, ROOT / "train_dpo.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, AutoModelForCausalLM.from_pretrained(out / "model")


@pytest.fixture(scope="module")
def seed_model():
    return AutoModelForCausalLM.from_pretrained(TOY)


@pytest.fixture(scope="module")
def group(tables, tokenizer):
    """The ids of the prompt, and those of each completion."""
    prompt = [int(i) for i in tables[1][1][1:]]
    return prompt, [[*tokenizer.convert_tokens_to_ids(list(row[1])), END] for row in tables[2][1:]]


@torch.no_grad()
def logps_of(model, prompt, completion):
    """Of each token, from the logits of transformers' own forward."""
    logits_TV = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()


def floats(cells):
    return [float(cell) for cell in cells]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL torch draws other numbers")
def test_the_text_is_the_committed_one(text):
    """Words and whole numbers are the same; others may differ in the last digit, or by a thousandth."""
    assert NUMBER.sub("#", text).split() == NUMBER.sub("#", COMMITTED).split()
    for found, wanted in zip(NUMBER.findall(text), NUMBER.findall(COMMITTED), strict=True):
        digits = len(wanted.partition(".")[2])
        allowed = 10**-digits * 1.01 if digits else 0
        assert float(found) == pytest.approx(float(wanted), rel=1e-3 if digits else 0, abs=allowed)
    assert max(map(len, COMMITTED.splitlines())) <= 100 and "\033" not in text


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colour_only_where_it_is_wanted(terminal, variables, coloured, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    walkthrough.table("text  reward", [["108", 1], ["96", -0.0001]], right=[1.0, 0.0])
    shown = capsys.readouterr().out
    assert re.sub(r"\033\[\d+m", "", shown) == "  text  reward\n   108       1\n    96   0.000\n"
    assert re.findall(r"\033\[(\d+)m +\d", shown) == (["32", "31"] if coloured else [])
    assert ("\033" in shown) == coloured


def test_prompt_rewards_and_log_probs(text, tables, group, tokenizer, seed_model):
    """Against the chat template, the sum that is asked for, and the plain model before training."""
    prompt, completions = group
    question = re.search(r"puts '([\d+]+=)' between", text)[1]
    message = [{"role": "user", "content": question}]
    template = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode(template, add_special_tokens=False) == prompt
    answer = str(sum(map(int, question[:-1].split("+"))))
    for (_, written, reward, logp, probability), ids in zip(tables[2][1:], completions, strict=True):
        assert (reward == "1") == (written == answer)
        plain = sum(logps_of(seed_model, prompt, ids))
        assert float(logp) == pytest.approx(plain, abs=ROUNDED)
        assert float(probability) == pytest.approx(math.exp(plain), abs=ROUNDED)
    assert 0 < sum(row[2] == "1" for row in tables[2][1:]) < 8


def test_each_token_before_and_after(tables, group, seed_model, real_run):
    """log π and log π_ref of the pair's tokens, by the plain models before and after ten real steps."""
    prompt, completions = group
    _, (_, chosen, right), (_, rejected, wrong) = tables[3]
    assert [tables[2][1 + int(i)][1:3] for i in (chosen, rejected)] == [[right, "1"], [wrong, "0"]]
    pair = [completions[int(chosen)], completions[int(rejected)]]
    roles = ["chosen"] * len(pair[0]) + ["rejected"] * len(pair[1])
    for policy, rows in ((seed_model, tables[4][1:]), (real_run[1], tables[7][13:-3])):
        assert [row[0] for row in rows] == roles
        for column, model in ((2, policy), (3, seed_model)):
            plain = sum((logps_of(model, prompt, ids) for ids in pair), [])
            assert floats(row[column] for row in rows) == pytest.approx(plain, rel=1e-3, abs=2 * ROUNDED)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_loss_and_slope_by_formula(tables):
    """-log sigmoid(β m), and its derivative by log π of the chosen completion, -β sigmoid(-β m)."""
    updates = [floats(row) for row in tables[7][1:12]]
    assert [row[0] for row in updates] == list(range(11)) and updates[0][1] == 0 and updates[10][1] > 1 / BETA
    for _, margin, scaled, loss, slope in updates:
        assert scaled == pytest.approx(BETA * margin, abs=2e-3)
        assert loss == pytest.approx(-math.log(sigmoid(BETA * margin)), rel=5e-3, abs=ROUNDED)
        assert slope == pytest.approx(-BETA * sigmoid(-BETA * margin), rel=5e-3, abs=ROUNDED)
    sign = {"chosen": 1, "rejected": -1}
    for rows, margin in ((tables[4][1:], 0.0), (tables[7][13:-3], updates[10][1])):
        of_tokens = sum(sign[row[0]] * (float(row[2]) - float(row[3])) for row in rows)
        assert of_tokens == pytest.approx(margin, abs=2 * len(rows) * ROUNDED)
        wanted = [-sign[row[0]] * BETA * sigmoid(-BETA * margin) for row in rows]
        assert floats(row[4] for row in rows) == pytest.approx(wanted, rel=5e-3, abs=ROUNDED)
    for rows in (tables[5], tables[7][-3:]):
        by_hand, losses, slopes = (floats(NUMBER.findall(" ".join(row).split("= ", 1)[1])) for row in rows)
        *sums, margin = by_hand
        assert margin == pytest.approx(sums[0] - sums[1] - (sums[2] - sums[3]), abs=4 * ROUNDED)
        assert losses[1:] == pytest.approx([-math.log(sigmoid(BETA * margin))] * 3, rel=5e-3, abs=1e-4)
        assert slopes[1:] == pytest.approx([-BETA * sigmoid(-BETA * margin)] * 2, rel=5e-3, abs=1e-4)


def test_it_is_the_run_of_the_script(text, real_run):
    first, line = real_run[0][0], " ".join(text.split())
    said = r"step is ([\d.]+), .* all (\d+) prompts\. .* norm ([\d.]+) is"
    loss, prompts, norm = re.search(said, line).groups()
    assert float(loss) == pytest.approx(first["loss"], rel=1e-3)
    assert float(norm) == pytest.approx(first["grad_norm"], rel=1e-3)
    assert f"Of the {prompts} prompts of this step {first['pairs']} have" in line
    assert first["loss"] == pytest.approx(math.log(2) * first["pairs"] / int(prompts), rel=1e-4)


def test_grpo_by_hand(tables, group, seed_model, real_run):
    """Advantages from the rewards; ratios, clipped pushes and KL from the plain models' log-probs."""
    prompt, completions = group
    rewards = [float(row[2]) for row in tables[2][1:]]
    advantages = [(r - statistics.mean(rewards)) / statistics.stdev(rewards) for r in rewards]
    clips = []
    for policy, stale, rows in ((seed_model, False, tables[9][1:9]), (real_run[1], True, tables[9][10:])):
        assert [int(row[0]) for row in rows] == list(range(8))
        for row, ids, advantage in zip(rows, completions, advantages, strict=True):
            now, then = (logps_of(model, prompt, ids) for model in (policy, seed_model))
            ratios, pushes = [math.exp(p - q) for p, q in zip(now, then, strict=True)], []
            for ratio in ratios:
                clips.append(stale and (ratio > 1.2 if advantage > 0 else ratio < 0.8))
                pushes.append(KL_WEIGHT * (1 - 1 / ratio) - (0 if clips[-1] else advantage * ratio))
            kl = sum(1 / ratio - 1 + math.log(ratio) for ratio in ratios)
            wanted = [advantage, *ratios, *pushes, kl]
            assert floats(row[2:]) == pytest.approx(wanted, rel=2e-3, abs=2 * ROUNDED)
    assert any(clips) and not all(clips[len(clips) // 2 :])


def test_a_reloaded_sampler_draws_what_its_policy_says(text, tables, group, real_run):
    prompt, completions = group
    share = float(re.search(r"([\d.]+)% are right", text)[1]) / 100
    right = next(ids for ids, row in zip(completions, tables[2][1:], strict=True) if row[2] == "1")
    p = math.exp(sum(logps_of(real_run[1], prompt, right)))
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 1000))
