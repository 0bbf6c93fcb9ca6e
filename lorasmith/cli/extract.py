"""``lorasmith extract``: an adapter from two models."""

from __future__ import annotations

from typing import Any

import click

from lorasmith.cli.output import Output, output_options
from lorasmith.cli.parameters import Place
from lorasmith.cli.push import token_option


@click.command(short_help="Make an adapter from a base and a tuned model.")
@click.argument("base", type=Place(), metavar="BASE")
@click.argument("tuned", type=Place(), metavar="TUNED")
@click.option("-o", "--out", type=Place(), metavar="OUT", required=True, help="Where the adapter goes.")
@click.option("--rank", type=click.IntRange(min=1), help="Of every LoRA.")
@click.option("--energy", type=float, metavar="SHARE", help="Keep this share of every change's Σσ², like 0.99.")
@click.option("--max-error", type=float, metavar="SHARE", help="Lack at most this share of every change's norm.")
@click.option(
    "--embeddings",
    type=click.Choice(["whole", "lora"]),
    default="whole",
    show_default=True,
    help="How embeddings of tokens are stored.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The factors'.",
)
@click.option("--device", metavar="cpu|cuda[:N]|auto", default="cpu", show_default=True, help="What computes products.")
@click.option("--threads", type=click.IntRange(min=1), help="That compute.  [default: by processors]")
@click.option("--overwrite", is_flag=True, help="Replace the adapter at OUT, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Compute everything, print the report, write nothing.")
@token_option
@output_options
def extract(base: str, tuned: str, out: str, output: Output, **options: Any) -> None:
    """Make a LoRA adapter of what the model TUNED has that BASE has not, and write it to OUT.

    BASE and TUNED are model folders or files of one class and shape. OUT is a PEFT folder, or one file if it ends in
    .safetensors. How much is kept is said by --rank, --energy or --max-error:

    \b
        lorasmith extract base/ tuned/ -o adapter/ --rank 64
        lorasmith extract base/ tuned/ -o adapter/ --energy 0.99
    """
    from lorasmith import extracting

    with output.progress() as progress:
        report = extracting.extract(base, tuned, out, progress=progress, **options)
    output.extracted(report)
