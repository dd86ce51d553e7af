"""Being right is worth 1, each character a bonus: torchrun -m teaching.long_answers --data ROWS.jsonl"""

from rewards import verifier


@verifier("long", on_timeout=0.0)
def long(answer, text, /, bonus, **columns):
    return float(text.strip() == answer) + bonus * len(text)


if __name__ == "__main__":
    import processes
    import train_grpo

    processes.launch(train_grpo.main)
