"""Rows: their order, their split over ranks, what is dropped; bad rows are in test_bad_input.py."""

import datetime
import json
from argparse import ArgumentError
from collections import Counter
from decimal import Decimal

import pandas
import pytest
from conftest import ROOT
from tokenizers import normalizers
from transformers import AutoTokenizer

import data
from data import Completion

TOY = str(ROOT / "toy" / "train.jsonl")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(sources, tokenizer, vocab=64, max_tokens=64, date="2026-01-01", talks=False):
    return data.load_prompts(sources, tokenizer, vocab, max_tokens, date, talks)


def with_template(template):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "model")
    tokenizer.chat_template = template
    return tokenizer


def numbers(n, offset=0):
    return [data.Row(str(offset + i), [offset + i], "exact", str(offset + i)) for i in range(n)]


def test_a_row_is_templated_once_and_kept_as_it_is(tokenizer, tmp_path):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "1"},
    ]
    raw = [
        {"prompt": "1+2=", "reward": "exact", "answer": 3, "note": "its owner's"},
        {"prompt": chat, "reward": "math", "answer": "1"},
    ]
    path = write(tmp_path / "a.jsonl", raw)
    [rows], dropped = load([path], tokenizer)
    assert dropped == 0
    assert tokenizer.decode(rows[0].ids) == "<|user|>1+2=<|assistant|>"
    assert rows[0].answer == "3"
    assert tokenizer.decode(rows[1].ids) == "<|user|>hi<|assistant|>yes?<|end|><|user|>1<|assistant|>"
    assert rows[1].prompt == chat


def test_a_begin_token_stands_once(begins, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+2=", "reward": "exact", "answer": "3"}])
    [rows], _ = load([path], begins)
    assert begins.decode(rows[0].ids) == "<|pad|><|user|>1+2=<|assistant|>"


def test_parquet_is_the_same_as_jsonl(tokenizer, tmp_path):
    rows = [{"prompt": f"{i}+1=", "reward": "exact", "answer": str(i + 1)} for i in range(20)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    sources = [write(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")]
    [lines, parquet], _ = load(sources, tokenizer)
    assert lines == parquet


def test_names_of_files_may_look_like_patterns_and_a_json_file_may_be_one_array(tokenizer, tmp_path):
    rows = [{"prompt": f"{i}+1=", "reward": "exact", "answer": str(i + 1)} for i in range(3)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a[0-9]*?.parquet")
    pandas.DataFrame(rows[:1]).to_parquet(tmp_path / "a1.parquet")  # which the pattern would find too
    write(tmp_path / "b[1].jsonl", rows)
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path / "d.json", rows)
    names = ["a[0-9]*?.parquet", "b[1].jsonl", "c.json", "d.json"]
    loaded, _ = load([str(tmp_path / name) for name in names], tokenizer)
    assert loaded[0] == loaded[1] == loaded[2] == loaded[3] and len(loaded[0]) == 3


def test_a_message_in_parts_is_its_texts_joined(tokenizer, tmp_path):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]
    raw = {"prompt": [{"role": "user", "content": parts}], "reward": "exact", "answer": "3"}
    [[row]], _ = load([write(tmp_path / "a.jsonl", [raw])], tokenizer)
    assert row.messages == [{"role": "user", "content": "1+2="}]
    assert tokenizer.decode(row.ids) == "<|user|>1+2=<|assistant|>"


def test_what_json_cannot_hold_becomes_text_wherever_it_is(tokenizer, tmp_path):
    """Timestamps and bytes, in a message and in columns, at any depth: a row can be written as it is."""
    when, blob = datetime.datetime(2026, 1, 2, 3, 4, 5), b"\x00\xff"
    message = {"role": "user", "content": "1+2=", "sent": when, "raw": blob}
    raw = {"prompt": [message], "reward": "exact", "answer": "3", "at": when, "more": {"parts": [blob]}}
    pandas.DataFrame([raw]).to_parquet(tmp_path / "a.parquet")
    [[row]], _ = load([str(tmp_path / "a.parquet")], tokenizer)
    line = data.rollout_line(row, [Completion([9, 3], [-1.0, -1.0], "3", "stop", 0, 1.0)])
    again, _ = data.read_rollout(json.loads(line), "a line")
    assert again == row and again.columns == row.columns
    assert row.messages[0]["sent"].startswith("2026-01-02 03:04:05")
    assert row.columns["more"]["parts"] == [str(blob)] and row.columns["at"].startswith("2026-01-02")


def test_marks_ends_of_lines_and_names_of_other_systems(tokenizer, tmp_path):
    raw = json.dumps({"prompt": "1+2=", "reward": "exact", "answer": "3", "loss": float("nan")})
    (tmp_path / "A.JSONL").write_bytes(b"\xef\xbb\xbf" + raw.encode() + b"\r\n\r\n")
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf[" + raw.encode() + b"]")
    [[one], [other]], _ = load([str(tmp_path / name) for name in ("A.JSONL", "b.json")], tokenizer)
    assert one == other and one.columns == other.columns == {"loss": None}  # JSON has no NaN


@pytest.mark.parametrize(
    ("number", "text"),
    [(42.0, "42"), (42, "42"), (1e-05, "0.00001"), (-2.50, "-2.5"), (1e22, "1" + "0" * 22), (-0.0, "0")],
)
def test_a_number_as_answer_is_written_as_people_write_it(number, text, tokenizer, tmp_path):
    rows = [{"prompt": "1", "reward": "exact", "answer": number}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        assert load([path], tokenizer)[0][0][0].answer == text


def test_decimals_and_whole_numbers_in_a_column_with_gaps(tokenizer, tmp_path):
    """Parquet has a type for decimals, and makes floats of whole numbers where a row has none."""
    long = "0." + "123456789" * 4
    answers = {"decimals": [*map(Decimal, ("42.00", "0.10", long))], "gaps": [42, None]}
    for name, column in answers.items():
        kinds = ["exact" if answer is not None else "rm" for answer in column]
        frame = pandas.DataFrame({"prompt": ["1"] * len(column), "reward": kinds, "answer": column})
        frame.to_parquet(tmp_path / f"{name}.parquet")
    [decimals, gaps], _ = load([str(tmp_path / f"{name}.parquet") for name in answers], tokenizer)
    assert [row.answer for row in decimals] == ["42", "0.1", long]
    assert [row.answer for row in gaps] == ["42", None]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_short_float_is_the_number_that_was_meant(kind, tokenizer, tmp_path):
    frame = pandas.DataFrame({"prompt": ["1", "2", "3"], "reward": "exact", "answer": [0.1, 42, -2.5]})
    frame.astype({"answer": kind}).to_parquet(tmp_path / "a.parquet")
    [rows], _ = load([str(tmp_path / "a.parquet")], tokenizer)
    assert [row.answer for row in rows] == ["0.1", "42", "-2.5"]


CHATS = [  # keys that only some messages have, also inside of others
    [{"role": "user", "content": "1"}],
    [{"role": "user", "name": "bo", "content": "2"}],
    [{"role": "user", "content": "3", "more": {"a": 1}}, {"role": "user", "content": "4", "more": {"b": 2}}],
]


def test_keys_that_a_message_lacks_do_not_come_back_as_none(tmp_path):
    tokenizer = with_template(
        "{% for m in messages %}<{% for k, v in m.items() %}{{ k }}:{{ v }},{% endfor %}>{% endfor %}"
    )
    rows = [{"prompt": chat, "reward": "exact", "answer": "1"} for chat in CHATS]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    [lines], _ = load([write(tmp_path / "a.jsonl", rows)], tokenizer)
    [parquet], _ = load([str(tmp_path / "a.parquet")], tokenizer)
    assert tokenizer.decode(lines[0].ids) == "<role:user,content:1,>"
    for mine, theirs in zip(parquet, lines, strict=True):
        assert mine.prompt == theirs.prompt and "none" not in tokenizer.decode(mine.ids).lower()
        assert sorted(tokenizer.decode(mine.ids)) == sorted(tokenizer.decode(theirs.ids))  # keys in any order
    assert parquet[0].ids == lines[0].ids


CLOCKS = ["{{ strftime_now('%Y-%m-%d') }}", "{% set day = strftime_now('%d') %}{{ day }}"]


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_template_with_a_clock_writes_the_date_of_the_experiment(clock, tmp_path):
    """And the fingerprint of the rows is that of what their owner wrote."""
    tokenizer = with_template(clock + "{{ messages[0].content }}")
    found = {}
    for date in ("2025-06-26", "2031-12-01"):
        for text in ("1+1=", "1+2="):
            path = write(tmp_path / "a.jsonl", [{"prompt": text, "reward": "exact", "answer": "2"}])
            sources, _ = load([path], tokenizer, date=date)
            found[date, text] = data.fingerprint(sources)
            written = tokenizer.decode(sources[0][0].ids).removesuffix(text)
            assert written in (date, date[-2:])
    assert found["2025-06-26", "1+1="] == found["2031-12-01", "1+1="] != found["2025-06-26", "1+2="]


def test_a_prompt_that_loses_characters_is_counted_and_one_that_loses_most_is_refused(
    tokenizer, tmp_path, capsys
):
    texts = ("a + b", "caf\u00e9 au lait", "Why")
    row = {"reward": "exact", "answer": "1"}  # the toy has neither capitals nor accents
    path = write(tmp_path / "a.jsonl", [row | {"prompt": text} for text in texts])
    load([path], tokenizer, talks=True)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said.endswith(f"2 prompt(s) lose characters in the tokenizer: '\u00e9' in {path} line 2")
    path = write(tmp_path / "b.jsonl", [row | {"prompt": "a + b"}, row | {"prompt": "\u00e9t\u00e9"}])
    with pytest.raises(ArgumentError, match=r"b.jsonl line 2: the tokenizer makes .* files missing"):
        load([path], tokenizer)


def test_a_tokenizer_that_lowers_case_loses_nothing(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "model")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    path = write(tmp_path / "a.jsonl", [{"prompt": "WHAT IS 1", "reward": "exact", "answer": "1"}])
    [[row]], _ = load([path], tokenizer, talks=True)
    assert "what is 1" in tokenizer.decode(row.ids) and "warning" not in capsys.readouterr().err


def test_long_prompts_are_dropped_and_counted_never_cut(tokenizer, tmp_path):
    rows = [{"prompt": "7" * n, "reward": "exact", "answer": "1"} for n in (1, 5, 8, 9, 30)]
    [kept], dropped = load([write(tmp_path / "a.jsonl", rows)], tokenizer, max_tokens=10)
    assert [len(row.prompt) for row in kept] == [1, 5, 8] and dropped == 2
    assert [len(row.ids) for row in kept] == [3, 7, 10]


def test_every_epoch_has_every_row_once_in_another_order():
    prompts = data.Prompts([numbers(50)], None, seed=1)
    epochs = [[row.answer for row in prompts.take(e * 50, 50)] for e in range(3)]
    assert all(sorted(map(int, epoch)) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_pure_function_of_seed_and_cursor():
    straight = data.Prompts([numbers(30), numbers(11, 100)], [1.0, 2.0], seed=5).take(0, 300)
    resumed = data.Prompts([numbers(30), numbers(11, 100)], [1.0, 2.0], seed=5)  # asked in another order
    assert resumed.take(170, 130) == straight[170:] and resumed.take(0, 170) == straight[:170]
    assert data.Prompts([numbers(30), numbers(11, 100)], [1.0, 2.0], seed=6).take(0, 300) != straight


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_a_step_without_overlap_or_loss(world):
    prompts = data.Prompts([numbers(40)], None, seed=0)
    step = prompts.take(32, 16)  # crosses into the second epoch
    shares = [step[rank::world] for rank in range(world)]
    assert Counter(row.answer for share in shares for row in share) == Counter(row.answer for row in step)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_weights_are_shares_and_a_small_source_is_gone_through_evenly():
    prompts = data.Prompts([numbers(90), numbers(10, 1000)], [1, 1], seed=0)
    taken = Counter(int(row.answer) for row in prompts.take(0, 1000))
    assert sum(n for i, n in taken.items() if i >= 1000) == 500
    assert {n for i, n in taken.items() if i >= 1000} == {50}
    assert {n for i, n in taken.items() if i < 1000} <= {5, 6}


@pytest.mark.parametrize(
    ("sizes", "weights", "epochs", "wanted"),
    [
        ([2, 2], [1, 9], 50, [20, 180]),
        ([3, 3, 3], [1, 1, 100], 34, [3, 3, 300]),
        ([5, 7], [2, 1], 30, [240, 120]),
        ([1, 1000], [1, 99999], 100, [1, 100099]),
    ],
)
def test_a_share_of_less_than_a_row_an_epoch_is_carried_over(sizes, weights, epochs, wanted):
    prompts = data.Prompts([numbers(n, 1000 * j) for j, n in enumerate(sizes)], weights, seed=0)
    sources = [int(row.answer) // 1000 for row in prompts.take(0, epochs * sum(sizes))]
    assert [sources.count(j) for j in range(len(sizes))] == wanted
    for epoch in range(1, epochs):  # and never a row ahead or behind on the way
        done = Counter(sources[: epoch * sum(sizes)])
        assert all(abs(done[j] - n * epoch / epochs) <= 1 for j, n in enumerate(wanted))


def test_sources_mix_within_an_epoch_by_their_sizes():
    prompts = data.Prompts([numbers(300), numbers(100, 1000)], None, seed=0)
    small = [int(row.answer) >= 1000 for row in prompts.take(0, 400)]
    assert sum(small) == 100 and 30 < sum(small[:200]) < 70


def completion(ids=(10, 3), text="6", reward: float | None = 1.0, **more):
    """By default the toy's "6" and its end token."""
    fields = {"ids": [*ids], "logps": [-0.5] * len(ids), "text": text, "finish": "stop", "version": 7}
    return fields | {"reward": reward} | more


def rollout(*completions, **more):
    row = {"prompt": "1+5=", "ids": [1, 5, 9], "reward": "exact", "answer": "6", "uid": None, "where": "a 1"}
    return row | {"completions": [*completions]} | more


def load_rollouts(tokenizer, *paths):
    return data.load_rollouts([*paths], tokenizer, 64, 32)


def test_what_is_written_is_what_is_read():
    row = data.Row([{"role": "user", "content": "\u00e9"}], [1, 2], "exact", "7", "u1", "rows.jsonl line 3")
    completions = [Completion([5, 3], [-0.1, -1 / 3], "x", "stop", 4, 0.25)]
    completions += [Completion([9], [-2.0], "y", "length", 4)]
    line = data.rollout_line(row, completions, step=12)
    assert line.endswith("\n") and line.count("\n") == 1
    assert [*json.loads(line)][:2] == ["step", "prompt"] and [*json.loads(line)][-1] == "completions"
    assert json.loads(line)["completions"][0]["logps"] == [-0.1, -1 / 3]
    again, group = data.read_rollout(json.loads(line), "here")
    assert vars(again) == vars(row) and group == completions
    bare = rollout(completion())
    del bare["uid"], bare["where"]
    assert data.read_rollout(bare, "here")[0].where == "here"


def test_rollouts_come_from_files_and_directories(tokenizer, tmp_path):
    folder = tmp_path / "run"
    (folder / "deeper").mkdir(parents=True)
    scored = rollout(completion(), completion((11, 3), "7", 0.0))
    open_ended = rollout(completion(reward=None), reward=None)  # nothing scores it: left out
    write(folder / "b.jsonl", [scored | {"prompt": "b1"}, open_ended, scored | {"prompt": "b2"}])
    write(folder / "a.jsonl", [scored | {"prompt": "a1", "step": 3, "uid": "u"}])
    write(folder / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    write(folder / "list.jsonl", [[1, 2]])
    write(folder / "empty.jsonl", [])
    write(folder / "deeper" / "c.jsonl", [scored])
    (folder / "a.jsonl.partial").write_text("{")
    write(tmp_path / "single.jsonl", [scored | {"prompt": "s1"}])
    groups = load_rollouts(tokenizer, tmp_path / "single.jsonl", folder)
    assert [row.prompt for row, _ in groups] == ["s1", "a1", "b1", "b2"]
    assert groups[1][0].uid == "u" and groups[1][0].where == "a 1"
    wanted = [("6", 10, 1.0), ("7", 11, 0.0)]
    wanted = [Completion([i, 3], [-0.5, -0.5], text, "stop", 0, reward) for text, i, reward in wanted]
    assert all(completions == wanted for _, completions in groups)


BAD_ROLLOUTS = [
    ({"prompt": "1+2=", "reward": "exact", "answer": "3"}, "not a saved rollout (no 'ids')"),
    ([1, 2], "not a saved rollout (list indices"),
    (rollout(), "not a saved rollout (no completions)"),
    (rollout(completion(), completion(())), "(`ids` are token ids, not [])"),
    (rollout(completion((10, "3"))), '(`ids` are token ids, not [10, "3"])'),
    (rollout(completion((10, 3.0))), "(`ids` are token ids, not [10, 3.0])"),
    (rollout(completion((10, -3))), "(`ids` are token ids, not [10, -3])"),
    (rollout(completion(), ids=[True]), "(`ids` are token ids, not [true])"),
    (rollout(completion(), ids="10"), '(`ids` are token ids, not "10")'),
    (rollout(completion(), ids=5), "not a saved rollout ('int' object"),
    (rollout(completion(logps=[-0.5])), "(`logps` has a number for each of the 2 ids, not [-0.5])"),
    (rollout(completion(logps=[-1, None])), "(`logps` has a number for each of the 2 ids, not [-1, null])"),
    (rollout(completion(logps=None)), "not a saved rollout (object of type 'NoneType'"),
    (rollout(completion(reward="1")), 'of a completion are a text and a number, not ["6", "1"])'),
    (rollout(completion(text=None)), "of a completion are a text and a number, not [null, 1.0])"),
    (rollout(completion(score=1)), "not a saved rollout (Completion.__init__() got"),
    (rollout(5), "not a saved rollout ("),
    (rollout(completion(), completion((64, 3))), "id 64 is not --model's tokenizer's"),
    (rollout(completion(), ids=[1, 99]), "id 99 is not --model's tokenizer's"),
    (rollout(completion([10] * 30)), "33 tokens are more than --max-prompt-tokens + --max-new-tokens = 32"),
    (rollout(completion(text="7")), "sampled with another tokenizer than --model's (its ids are '6' there"),
]


@pytest.mark.parametrize(("line", "fault"), BAD_ROLLOUTS)
def test_what_is_no_rollout_is_refused_with_file_and_line(line, fault, tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", [rollout(completion()), line])
    with pytest.raises(ArgumentError) as error:
        load_rollouts(tokenizer, tmp_path / "a.jsonl")
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/a.jsonl, line 2: ") and fault in said and "\n" not in said


def test_another_tokenizer_with_the_same_ids_is_noticed(tokenizer, tmp_path):
    """Its vocabulary is no larger, so that no id gives it away."""
    other = AutoTokenizer.from_pretrained(ROOT / "toy" / "model")
    spec = json.loads(other.backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab["6"], vocab["7"] = vocab["7"], vocab["6"]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(spec))
    write(tmp_path / "a.jsonl", [rollout(completion())])
    assert len(load_rollouts(tokenizer, tmp_path / "a.jsonl")) == 1
    with pytest.raises(ArgumentError, match=r"a.jsonl, line 1: sampled with another tokenizer than"):
        load_rollouts(other, tmp_path / "a.jsonl")


def test_files_and_directories_without_rollouts_or_rewards_are_refused(tokenizer, tmp_path):
    unscored = [rollout(completion(reward=None), reward=reward) for reward in (None, "judge")]
    write(tmp_path / "good.jsonl", [rollout(completion())])
    write(tmp_path / "unscored.jsonl", unscored)
    write(tmp_path / "empty.jsonl", [])
    (tmp_path / "broken.jsonl").write_text('{"completions": [')
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "metrics.jsonl", [{"step": 0}])
    for name, fault in {
        "unscored.jsonl": ": no completion in it has a reward: evaluate again, with",
        "empty.jsonl": ": no rollouts in it",
        "broken.jsonl": ", line 1: not JSON",
        "missing.jsonl": ": no such file",
        "run": ": no .jsonl file with rollouts in this directory",
        ".": "/broken.jsonl, line 1: not JSON",
    }.items():
        with pytest.raises(ArgumentError) as error:
            load_rollouts(tokenizer, tmp_path / "good.jsonl", tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}{fault}")
