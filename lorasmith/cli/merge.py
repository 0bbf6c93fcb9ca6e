"""``lorasmith merge``: adapters into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lorasmith.cli.output import Output, output_options
from lorasmith.cli.parameters import Place, Size
from lorasmith.cli.push import push_options
from lorasmith.combining import METHODS, SIGNS, SPACES

LAYOUTS = ["peft", "peft-0.19.0", "peft-0.18", "unsloth"]

PUSHING = ("push", "revision", "private", "create_pr", "commit_message", "card", "stream", "token")
"""Options that say where things come from and go to, and nothing of what they are."""


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
@click.option("-o", "--out", type=Place(), metavar="OUT", help="Where the merged model goes.")
@click.option("--push", metavar="REPO", help="A repository on the Hub that it goes to as well, or alone without -o.")
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
@click.option("--stream", is_flag=True, help="Download the base shard by shard, and keep none of it.")
@push_options
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@output_options
def merge(
    base: str,
    adapters: tuple[str, ...],
    out: str | None,
    threads: int | None,
    memory: int,
    dry_run: bool,
    output: Output,
    **options: Any,
) -> None:
    """Merge one or more LoRA adapters into the model BASE and write the result to OUT, to a repository, or to both.

    BASE is a model folder or a .safetensors file; OUT becomes the same kind of thing. ADAPTER is a PEFT folder or
    file; WEIGHT is a number, by default 1. Both may be on the Hub: org/name, org/name@revision, or an address.

    \b
        lorasmith merge base/ adapter/ -o merged/
        lorasmith merge base/ style/:0.7 facts/:0.3 -o merged/
        lorasmith merge org/base me/lora@v2:0.8 --push me/merged --private

    Nothing appears at OUT before all of it is on the disk. A run that was killed goes on when it is given again.
    """
    from lorasmith import merging

    place = out if out is not None else f"hf://{options['push']}"
    if dry_run:
        where = {name: options.pop(name) for name in PUSHING}
        token = where["token"]
        plan = merging.plan(base, list(adapters), out, token=token, **options)
        takes = merging.resources(plan, out, memory=memory, threads=threads, **where)
        output.plan(plan, takes, place)
        return
    with output.progress() as progress:
        report = merging.merge(
            base,
            list(adapters),
            out,
            threads=threads,
            memory=memory,
            planned=lambda plan, takes: output.intent(plan, takes, place),
            progress=progress,
            **options,
        )
    output.report(report)
