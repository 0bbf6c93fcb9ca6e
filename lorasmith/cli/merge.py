"""``lorasmith merge``: adapters into a model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import click

from lorasmith.cli.output import Output, output_options
from lorasmith.combining import METHODS, SIGNS, SPACES

LAYOUTS = ["peft", "peft-0.19.0", "peft-0.18", "unsloth"]

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


def rule_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how several adapters are combined."""
    for option in (
        click.option(
            "--space", type=click.Choice(SPACES), help="Where a method that is no sum is applied.  [default: core]"
        ),
        click.option("--sign", type=click.Choice(SIGNS), help="How ties elects a sign.  [default: total]"),
        click.option("--seed", type=int, help="For what dare draws.  [default: 0]"),
        click.option("--density", type=float, help="The share of elements that are kept.  [default: 0.5]"),
        click.option("--method", type=click.Choice(METHODS), default="linear", show_default=True, help="The rule."),
        click.option("--weights", multiple=True, metavar="REGEX=FACTOR", help="For modules so named; repeatable."),
    ):
        command = option(command)
    return command


@click.command(short_help="Merge adapters into a model.")
@click.argument("base", type=Place(), metavar="BASE")
@click.argument("adapters", type=Place(), metavar="ADAPTER[:WEIGHT]...", nargs=-1, required=True)
@click.option("-o", "--out", type=Place(), metavar="OUT", required=True, help="Where the merged model goes.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="The result's floating-point tensors.",
)
@click.option("--device", metavar="cpu|cuda[:N]|auto", default="cpu", show_default=True, help="What computes.")
@click.option("--threads", type=click.IntRange(min=1), help="That compute or feed a GPU.  [default: by processors]")
@click.option("--memory", type=Size(), default="128MiB", show_default=True, help="Buffers, beside Python and torch.")
@click.option("--max-shard-size", type=Size(), help="Cut the result into shards of at most this size, like 5GB.")
@click.option("--tokenizer", type=click.Choice(["base", "adapter"]), help="Whose.  [default: the adapter's if any]")
@click.option("--allow-unmatched", is_flag=True, help="Leave out adapter tensors that fit nothing in the base.")
@click.option("--allow-overflow", is_flag=True, help="Clip values too large for the output dtype.")
@click.option("--architecture", metavar="NAME", help="The result's class, if an adapter brings layers of another one.")
@click.option("--base-is-residual", is_flag=True, help="The base is the one that PiSSA, OLoRA and the like have left.")
@rule_options
@click.option("--rename", metavar="REGEX=REPLACEMENT", multiple=True, help="Change the adapter's names.  [repeatable]")
@click.option("--expert-layout", type=click.Choice(LAYOUTS), help="How an adapter stores factors of stacked experts.")
@click.option("--overwrite", is_flag=True, help="Replace the model at OUT, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@output_options
def merge(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    threads: int | None,
    memory: int,
    dry_run: bool,
    output: Output,
    **options: Any,
) -> None:
    """Merge one or more LoRA adapters into the model BASE and write the result to OUT.

    BASE is a model folder or a .safetensors file; OUT becomes the same kind of thing. ADAPTER is a PEFT folder or
    file; WEIGHT is a number, by default 1:

    \b
        lorasmith merge base/ adapter/ -o merged/
        lorasmith merge base/ style/:0.7 facts/:0.3 -o merged/

    Nothing appears at OUT before all of it is on the disk. A run that was killed goes on when it is given again.
    """
    from lorasmith import merging

    if dry_run:
        plan = merging.plan(base, list(adapters), out, **options)
        output.plan(plan, merging.resources(plan, out, memory=memory, threads=threads), out)
        return
    with output.progress() as progress:
        report = merging.merge(
            base,
            list(adapters),
            out,
            threads=threads,
            memory=memory,
            planned=lambda plan, takes: output.intent(plan, takes, out),
            progress=progress,
            **options,
        )
    output.report(report)
