"""``lorasmith pull``: a model or an adapter from the Hub."""

from __future__ import annotations

import click

from lorasmith.cli.output import Output, output_options
from lorasmith.cli.parameters import Place
from lorasmith.cli.push import token_option


@click.command(short_help="Download a model or an adapter from the Hub.")
@click.argument("repo", metavar="REPO")
@click.option("-o", "--out", type=Place(), metavar="DIR", help="Where it goes.  [default: the shared cache]")
@token_option
@output_options
def pull(repo: str, out: str | None, token: str | None, output: Output) -> None:
    """Download the model or adapter REPO (org/name, org/name@revision, or an address): its weights of the one kind
    that will be used, its config and its tokenizer.

    \b
        lorasmith pull org/base -o base/
    """
    from lorasmith import pulling

    output.pulled(pulling.pull(repo, out, token=token))
