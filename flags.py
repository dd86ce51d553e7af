"""What flags are made of: types, two sets of defaults, and the checks that both train scripts share."""

import argparse
import datetime
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from processes import fail

LEAST_TEMPERATURE = 0.01  # vLLM's own limit, below which it raises a temperature without an error


class Flags(argparse.Namespace):
    """The flags; `defaults`, which is none of them, has what each is where nobody gives it."""

    __slots__ = ("defaults",)


def parse(argv, about: str, declare: Callable, toy: dict, own: dict | None = None) -> Flags:
    """Parses the flags that `declare(add)` declares; add: a parser's add_argument; about: a docstring.

    Their defaults are for a model that is named; without --model they are those of `toy` (flag -> value, with
    paths from this file's directory on), and --help shows both. own: defaults that go before these. A mistake
    ends the process with one line and exit code 2.
    """
    toy = {name: _path(value) for name, value in toy.items()}
    parser = argparse.ArgumentParser(
        description=about.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    declare(parser.add_argument)
    for action in parser._actions:
        if action.dest in toy:
            shown = toy[action.dest] if action.nargs != "+" else " ".join(toy[action.dest])
            action.help += f" (default: %(default)s; without --model {shown})"
    args = parser.parse_args(argv, Flags())
    parser.set_defaults(**(toy if args.model is None else {}), **(own or {}))
    args = parser.parse_args(argv, Flags())
    args.defaults = {action.dest: parser.get_default(action.dest) for action in parser._actions}
    return args


def check(args: Flags, sequences: int, what: str):
    """The checks that both train scripts share. sequences: how many completions of full length must fit in a
    micro-batch, since they meet in one forward; what: their name.
    """
    if not (args.data or args.rollouts):
        fail(f"--model {args.model}: needs --data, rows to train on (the toy's go with the toy)")
    longest = sequences * (args.max_prompt_tokens + args.max_new_tokens)
    if args.micro_batch_tokens < longest:
        tokens = f"{sequences} x (--max-prompt-tokens + --max-new-tokens)"
        limit = f"--micro-batch-tokens {args.micro_batch_tokens}"
        fail(f"{limit}: {what} can have {longest}, {tokens}; raise it to that or more")
    if args.samples_per_prompt < 2:
        fail(f"--samples-per-prompt {args.samples_per_prompt}: a pair, or a group to compare, needs 2")
    if args.data_weights and len(args.data_weights) != len(args.data or []):
        fail(f"--data-weights: {len(args.data_weights)} weights for {len(args.data or [])} sources")
    check_sampling(args)
    if args.rollouts and args.sync_steps != math.inf:
        fail(f"--rollouts {args.rollouts[0]}: they cannot follow the policy; add --sync-steps inf")
    args.eval_every = args.eval_every if args.eval_data else 0


def check_sampling(args: Flags):
    """The checks that all scripts share."""
    if args.gpu_memory >= 1:
        fail(f"--gpu-memory {args.gpu_memory:g}: a share of the GPU, between 0 and 1")
    if args.temperature < LEAST_TEMPERATURE:
        way = f"vLLM takes {LEAST_TEMPERATURE} for all that is lower"
        fail(f"--temperature {args.temperature:g}: {way}; take that or more (evaluate.py has --greedy)")


def _path(value):
    """A path in toy/, or a list of them, as it is called from the directory that the user is in."""
    if isinstance(value, list):
        return [_path(entry) for entry in value]
    is_path = isinstance(value, str) and value.startswith("toy/")
    return os.path.relpath(Path(__file__).parent / value) if is_path else value


# ---- types for argparse


def number(kind: type, zero=False, inf=False) -> Callable:
    """A number above 0, or from 0 on, or also `inf`; finite otherwise."""
    what = ("a whole number" if kind is int else "a number") + (" from 0 on" if zero else " above 0")

    def parse(text: str):
        if inf and text == "inf":
            return math.inf
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 <= value < math.inf) or (value == 0 and not zero):
            raise ArgumentTypeError(f"{text} is not {what}{', nor inf' if inf else ''}")
        return value

    return parse


count, count_or_0, steps_or_inf = number(int), number(int, zero=True), number(int, inf=True)
positive, positive_or_0 = number(float), number(float, zero=True)
switch = argparse.BooleanOptionalAction


def day(text: str) -> str:
    """A date as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ArgumentTypeError(f"{text} is not a date like 2025-06-26") from error
