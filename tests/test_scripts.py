"""The two scripts differ in some flags, the maths and the update alone: what should be equal is."""

import difflib
import re

from conftest import ROOT

DPO, GRPO = ((ROOT / f"train_{name}.py").read_text().replace(name, "NAME").replace(name.upper(), "NAME")
             for name in ("dpo", "grpo"))  # fmt: skip
OWN_FLAGS = {  # another default, help or meaning, or there in one script only
    "--sync-ref", "--samples-per-prompt", "--lr", "--adam-eps", "--beta", "--seed",
    "--std-norm", "--loss-norm", "--clip-low", "--clip-high", "--is-cap",
    "--all-pairs", "--nll-weight", "--length-normalize", "--entropy-weight", "--grpo-weight",
}  # fmt: skip


def blocks(script):
    """The parts of main() by the first word of their heading: `# 2 data: why` or `# ---- sync: why`."""
    parts = re.split(r"^ +# (?:\d|----) (\w+).*\n", script, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def flags(script):
    return dict(re.findall(r'^    add\("(--[\w-]+)"(.*?)\)\n(?=    [a#])', script, flags=re.M | re.S))


def test_the_same_headings_in_the_same_order():
    steps = ["sync", "sample", "score", "update", "log"]
    assert list(blocks(DPO)) == list(blocks(GRPO))
    assert [name for name in blocks(DPO) if name in steps] == steps


def test_blocks_that_should_be_equal_are():
    for name in ["processes", "data", "sampler", "optimizer", "sync", "sample", "export"]:
        assert blocks(DPO)[name] == blocks(GRPO)[name], name


def test_flags_that_should_be_equal_are_and_stand_in_the_same_order():
    dpo, grpo = (
        [(name, text) for name, text in flags(script).items() if name not in OWN_FLAGS]
        for script in (DPO, GRPO)
    )
    assert len(dpo) > 25 and dpo == grpo


def test_seven_lines_in_ten_are_the_same():
    a, b = DPO.splitlines(), GRPO.splitlines()
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    assert same / max(len(a), len(b)) >= 0.7
