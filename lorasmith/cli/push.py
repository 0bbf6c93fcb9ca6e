"""``lorasmith push``: a model or an adapter to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lorasmith.cli.output import Output, output_options
from lorasmith.cli.parameters import Place


def token_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--token`` to a command."""
    return click.option("--token", metavar="TOKEN", help="For the Hub.  [default: HF_TOKEN, or the login]")(command)


def push_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what a push takes to a command: branch, visibility, pull request, message, card, token."""
    for option in reversed(
        (
            click.option("--revision", metavar="BRANCH", help="The branch to push to.  [default: main]"),
            click.option("--private", is_flag=True, help="Make the repository private, if it is made."),
            click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch."),
            click.option("--commit-message", metavar="TEXT", help="Of the commit that is pushed."),
            click.option("--card", type=Place(), metavar="FILE", help="The model card.  [default: one is written]"),
        )
    ):
        command = option(command)
    return token_option(command)


@click.command(short_help="Push a model or an adapter to the Hub.")
@click.argument("path", type=Place(), metavar="PATH")
@click.argument("repo", metavar="REPO")
@push_options
@output_options
def push(path: str, repo: str, output: Output, **options: Any) -> None:
    """Push the model or adapter at PATH, a folder or a file, to the repository REPO, which is made if need be.

    \b
        lorasmith push merged/ me/merged --private

    Nothing is visible there before all of it is. A push that broke off goes on when it is given again.
    """
    from lorasmith import pushing

    output.pushed(pushing.push(path, repo, **options))
