"""What arguments of the command line are made of: sizes and paths."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import Any

import click

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: ``5GB``, ``128MiB``, ``1000000``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
        if match is None or match[2] not in UNITS:
            self.fail(f"{value!r} is not a size; write it like 5GB or 128MiB", param, ctx)
        return int(Decimal(match[1]) * UNITS[match[2]])


class Place(click.ParamType):  # type: ignore[type-arg]
    """A path; ``~`` is the home folder also where the shell leaves it, as in ``--out=~/merged``."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("the path is empty; is a variable of the script not set?", param, ctx)
        first, _, _ = str(value).partition(os.sep)
        return str(value) if os.path.lexists(first) else os.path.expanduser(value)
