"""A right answer, and a bonus for each character: torchrun -m teaching.long_answers --data runs/long.jsonl"""

from rewards import verifier


@verifier("long", on_timeout=0.0)
def long(answer, text, /, **columns):
    return float(text.strip() == answer) + 0.3 * len(text)


if __name__ == "__main__":
    import processes
    import train_grpo

    processes.launch(train_grpo.main)
