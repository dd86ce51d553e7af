"""A reward that reads a column of its row: torchrun -m teaching.short_answers --data ROWS.jsonl"""

from rewards import verifier


@verifier("short", on_timeout=0.0)
def short(answer, text, /, limit, **columns):
    return float(text.strip() == answer and len(text) <= limit)


if __name__ == "__main__":  # the process in which `short` runs imports this file, and needs no torch
    import processes
    import train_grpo

    processes.launch(train_grpo.main)
