"""results/first_gpu_run.sh on a CPU: its steps, what it does when it is given again, and its report."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, require_vllm
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = ROOT / "results" / "first_gpu_run.sh"


def run(out, *arguments):
    # `make test` runs without an activated environment; the script's `python` has to be this one.
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    environment = os.environ | {"OUT": str(out), "PATH": path}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_a_part_that_does_not_exist(tmp_path):
    done = run(tmp_path / "out", "--smoke", "f")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == "first_gpu_run.sh: error: f: neither --smoke nor a part (a, b, c, d, e)\n"


def test_a_part_is_run_once_reported_and_tried_again_where_it_failed(tmp_path):
    require_vllm()
    done = run(tmp_path, "--smoke", "c")
    assert done.returncode == 0, done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:3]] == [
        "small",
        "reloads-dpo",
        "reloads-grpo",
    ]

    lm, tokenizer = (
        kind.from_pretrained(tmp_path / "small") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert len(tokenizer) == 336 and lm.config.vocab_size == 400  # a padded vocabulary
    assert all(p.abs().min() > 0 for name, p in lm.named_parameters() if name.endswith("bias"))

    lines = [
        json.loads(line) for line in (tmp_path / "reloads-dpo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 3 and all(line["pairs"] > 4 and line["grad_norm"] > 0 for line in lines)
    gaps = [line["sampler/logp_gap_mean"] for line in lines]
    [row] = re.findall(r"\| reloads-dpo \| 3 \| (\S+) \| (\S+) \|", (tmp_path / "gpu.md").read_text())
    assert float(row[0]) == pytest.approx(sum(gaps) / 3, rel=0.1)
    assert float(row[1]) == pytest.approx(max(line["sampler/logp_gap_max"] for line in lines), rel=0.1)

    (tmp_path / "reloads-grpo.done").unlink()
    (tmp_path / "small" / "rows.jsonl").rename(tmp_path / "elsewhere")
    done = run(tmp_path, "--smoke", "c")
    assert done.returncode == 1 and "reloads-dpo" not in done.stdout
    assert "reloads-grpo failed" in done.stdout and re.search(
        r"\| reloads-grpo \| failed: `.*rows.jsonl.*` \|", (tmp_path / "gpu.md").read_text()
    )


def test_a_run_that_died_leaves_a_report(tmp_path):
    """Nothing but its first step, in which it did not get to an update; and what its log says last."""
    for step in ("large-packing", "reloads-dpo"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.1}\n')
        said = ["$ python train_grpo.py", "error: no memory", "destroy_process_group() was not called"]
        (tmp_path / f"{step}.log").write_text("\n".join(said))
    (tmp_path / "large").mkdir()
    shutil.copy(ROOT / "toy" / "model" / "config.json", tmp_path / "large")
    command = [sys.executable, ROOT / "results" / "gpu.py", "report", tmp_path, tmp_path / "gpu.md"]
    subprocess.run(command, check=True, capture_output=True)
    report = (tmp_path / "gpu.md").read_text()
    assert report.count("| failed: `error: no memory` | `python train_grpo.py` |") == 2
    assert re.search(r"\| large-packing \| 0 \| (-|0%) \| 0 \| - \| - \| - \| 0.0 \|", report)
