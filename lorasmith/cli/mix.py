"""``lorasmith mix``: adapters into one adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lorasmith.cli.merge import rule_options
from lorasmith.cli.output import Output, output_options
from lorasmith.cli.parameters import Place
from lorasmith.cli.push import push_options


class Number(click.ParamType):  # type: ignore[type-arg]
    """A whole number, perhaps in thousands or more: ``50M``."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().upper()
        factor = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}.get(text[-1:], 1)
        try:
            return round(float(text if factor == 1 else text[:-1]) * factor)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a number; write it like 50M or 1000000", param, ctx)


def cut_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how much of a delta is kept."""
    for option in (
        click.option("--params", type=Number(), metavar="N", help="Parameters of the whole adapter, like 50M."),
        click.option("--max-error", type=float, help="The largest relative error in the Frobenius norm."),
        click.option("--energy", type=float, help="The share of Σσ² that is kept in every module."),
        click.option("--rank", type=click.IntRange(min=1), help="The largest rank of a module."),
    ):
        command = option(command)
    return command


def written_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how an adapter is written."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Compute and report everything, write nothing."),
        click.option("--overwrite", is_flag=True, help="Replace the adapter at OUT, once the new one is complete."),
        click.option("--threads", type=click.IntRange(min=1), help="That compute.  [default: by processors]"),
        click.option(
            "--dtype",
            type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
            default="keep",
            show_default=True,
            help="The factors'; keep is float32 unless nothing is lost by less.",
        ),
    ):
        command = option(command)
    return command


@click.command(short_help="Make one adapter of several.")
@click.argument("adapters", type=Place(), metavar="ADAPTER[:WEIGHT]...", nargs=-1, required=True)
@click.option(
    "-o", "--out", type=Place(), metavar="OUT", help="Where it goes.  [default: mixed.safetensors, if not pushed]"
)
@click.option("--push", metavar="REPO", help="A repository on the Hub that it goes to as well, or alone without -o.")
@cut_options
@click.option("--balance", is_flag=True, help="Keep as much of every adapter, not most of the loudest.")
@rule_options
@click.option(
    "--prefer", type=Place(), metavar="ADAPTER", help="Whose layers trained whole, and whose tokenizer, are taken."
)
@click.option("--base", type=Place(), metavar="BASE", help="The model, for adapters whose effect depends on it (DoRA).")
@written_options
@push_options
@output_options
def mix(adapters: tuple[str, ...], out: str | None, push: str | None, output: Output, **options: Any) -> None:
    """Make one adapter of several, the weighted sum of what they do, and write it to OUT.

    ADAPTER is a PEFT folder or file; WEIGHT is a number, by default 1. OUT becomes a PEFT folder, or one file if it
    ends in .safetensors, .st or .sft:

    \b
        lorasmith mix style/:0.7 facts/:0.3 -o both/
        lorasmith mix style/ facts/ --rank 16
        lorasmith mix style/ facts/ --method ties --density 0.3 --weights 'self_attn=0.5'

    The sum is exact, with the ranks of all put together, unless --rank, --energy, --max-error or --params says how much
    of it is kept. lorasmith merge takes the result, or the same adapters at once.
    """
    from lorasmith import mixing

    place = "mixed.safetensors" if out is None and push is None else out
    with output.progress() as progress:
        report = mixing.mix(list(adapters), place, push=push, progress=progress, **options)
    output.mixed(report)
