"""Rows: their order, their split over ranks, what is dropped; bad rows are in test_bad_input.py."""

import json
from collections import Counter

import pytest
from conftest import ROOT

import data
import rewards

TOY = str(ROOT / "toy" / "train.jsonl")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
    [rows], dropped = data.load_prompts([path], tokenizer, rewards.complaint, 64)
    assert dropped == 0
    assert tokenizer.decode(rows[0].ids) == "<|user|>1+2=<|assistant|>"
    assert rows[0].answer == "3"
    assert tokenizer.decode(rows[1].ids) == "<|user|>hi<|assistant|>yes?<|end|><|user|>1<|assistant|>"
    assert rows[1].prompt == chat


def test_parquet_is_the_same_as_jsonl(tokenizer, tmp_path):
    import pandas

    rows = [{"prompt": f"{i}+1=", "reward": "exact", "answer": str(i + 1)} for i in range(20)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    sources = [write(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")]
    [lines, parquet], _ = data.load_prompts(sources, tokenizer, rewards.complaint, 64)
    assert lines == parquet


def test_long_prompts_are_dropped_and_counted_never_cut(tokenizer, tmp_path):
    rows = [{"prompt": "7" * n, "reward": "exact", "answer": "1"} for n in (1, 5, 8, 9, 30)]
    [kept], dropped = data.load_prompts([write(tmp_path / "a.jsonl", rows)], tokenizer, rewards.complaint, 10)
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


def test_sources_mix_within_an_epoch_by_their_sizes():
    prompts = data.Prompts([numbers(300), numbers(100, 1000)], None, seed=0)
    small = [int(row.answer) >= 1000 for row in prompts.take(0, 400)]
    assert sum(small) == 100 and 30 < sum(small[:200]) < 70
