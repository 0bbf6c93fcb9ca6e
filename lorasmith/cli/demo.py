"""``lorasmith demo``: the main job on a small model made on the spot."""

from __future__ import annotations

import tempfile

import click

from lorasmith.cli.output import Output, output_options


@click.command(short_help="Merge two adapters into a small model made on the spot, and check the result.")
@output_options
def demo(output: Output) -> None:
    """Make a Llama-shaped model of about 100 MB and two adapters in a temporary folder, merge them, and compare
    every merged weight with the exact one in float64.
    """
    from lorasmith import demonstration, merging

    with tempfile.TemporaryDirectory(prefix="lorasmith-demo-") as folder:
        output.say(f"Making a base model and two adapters in {folder}")
        example = demonstration.make(folder)
        with output.progress() as progress:
            report = merging.merge(example.base, list(example.adapters), example.out, progress=progress)
        output.report(report)
        check = demonstration.check(example)
        output.say(
            f"checked  {check.elements:,} merged elements against float64: all within one rounding, "
            f"{check.misrounded:,} not the nearest {check.dtype}"
        )
