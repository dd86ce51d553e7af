"""A reward for even digits, which no sum needs: torchrun -m teaching.even --data runs/even.jsonl"""

from rewards import verifier


@verifier("even", on_timeout=0.0)
def even(answer, text, /, **columns):
    return sum(character in "02468" for character in text) / max(1, len(text))


if __name__ == "__main__":
    import processes
    import train_grpo

    processes.launch(train_grpo.main)
