"""Module patterns of a LoraConfig: regular expressions, out of a file that nobody vouches for.

Python's tries one way to match after the other, and a short expression may have more of them than there are seconds.
So their number is estimated first, from above: with k repetitions a path of n characters can be divided in (n+k over k)
ways; every group multiplies that with its alternatives, every ``?`` with two. A group that is repeated has no bound.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lorasmith.errors import BadFile

MOST_WAYS = 10**9
"""Some seconds' worth at worst; most patterns take far less than estimated. ``layers.*attn.(q|k|v)`` has thousands."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\??|\)[*+{]?|[*+{]\??|\?|\|", re.DOTALL)
"""Escapes and sets, which choose nothing, and what does: groups, repetitions, alternatives."""


@dataclass(frozen=True)
class Pattern:
    """A pattern for the end of a module's path, from one of its dots on (PEFT, ``get_pattern_key``)."""

    where: str
    text: str
    compiled: re.Pattern[str]
    repetitions: int
    choices: float

    def matches(self, module: str) -> bool:
        """Whether it matches; BadFile where finding out may take for ever."""
        if self.choices * math.comb(len(module) + self.repetitions, self.repetitions) > MOST_WAYS:
            raise BadFile(
                f"{self.where}: matching the pattern {self.text!r:.100} may take for ever; "
                "write it without repeated groups, and with fewer repetitions"
            )
        return self.compiled.match(module) is not None


def compile_pattern(where: str, text: str) -> Pattern:
    """Check and compile a pattern from the file ``where``; BadFile where it is none."""
    repetitions, choices = _choices(text)
    try:
        return Pattern(where, text, re.compile(rf"(.*\.)?({text})$"), repetitions + 1, choices)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadFile(f"{where} has the broken pattern {text!r:.100}: {error}") from None


def _choices(text: str) -> tuple[int, float]:
    """The repetitions in a pattern, and in how many ways it can be read apart from them."""
    repetitions, choices = 0, 1.0
    alternatives = [1]
    for token in _TOKEN.findall(text):
        if token == "|":
            alternatives[-1] += 1
        elif token == "?":
            choices *= 2
        elif token.startswith("("):
            alternatives.append(1)
        elif token.startswith(")"):
            choices *= alternatives.pop() if len(alternatives) > 1 else 1
            choices = choices if token == ")" else math.inf
        elif not token.startswith(("\\", "[")):
            repetitions += 1
    return repetitions, choices * math.prod(alternatives)
