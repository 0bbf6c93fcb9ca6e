"""``lorasmith resize``: an adapter with other ranks."""

from __future__ import annotations

from typing import Any

import click

from lorasmith.cli.mix import cut_options, written_options
from lorasmith.cli.output import Output, output_options
from lorasmith.cli.parameters import Place
from lorasmith.cli.push import token_option


@click.command(short_help="Give an adapter other ranks.")
@click.argument("adapter", type=Place(), metavar="ADAPTER")
@click.option("-o", "--out", type=Place(), metavar="OUT", required=True, help="Where the new adapter goes.")
@cut_options
@click.option("--sv-ratio", "--sv_ratio", type=float, help="Keep singular values above the largest over this.")
@click.option("--sv-fro", "--sv_fro", type=float, help="The share of the Frobenius norm that is kept.")
@click.option("--sv-cumulative", "--sv_cumulative", type=float, help="The share of the sum of singular values.")
@written_options
@token_option
@output_options
def resize(adapter: str, out: str, output: Output, **options: Any) -> None:
    """Give ADAPTER other ranks, with the least error there is, and write it to OUT.

    \b
        lorasmith resize adapter/ -o smaller/ --rank 8
        lorasmith resize adapter.safetensors -o smaller.safetensors --energy 0.99
        lorasmith resize adapter/ -o smaller/ --sv-ratio 10 --rank 32

    The --sv criteria are sd-scripts' (resize_lora.py); --rank limits them.
    """
    from lorasmith import mixing

    with output.progress() as progress:
        report = mixing.resize(adapter, out, progress=progress, **options)
    output.mixed(report, "Resized")
