"""The command line: one file per command, and the one table from errors to exit codes.

Exit 0 done, 1 failed, 2 wrong usage, 130 interrupted. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from lorasmith import __version__
from lorasmith.cli.demo import demo
from lorasmith.cli.extract import extract
from lorasmith.cli.merge import merge
from lorasmith.cli.mix import mix
from lorasmith.cli.output import error
from lorasmith.cli.pull import pull
from lorasmith.cli.push import push
from lorasmith.cli.resize import resize
from lorasmith.errors import BadOption, LorasmithError

DEBUG = "LORASMITH_DEBUG"
"""Environment variable that turns messages into tracebacks."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lorasmith")
def commands() -> None:
    """Make LoRA adapters part of a model: streamed, exact to one rounding, all or nothing."""


commands.add_command(merge)
commands.add_command(push)
commands.add_command(pull)
commands.add_command(mix)
commands.add_command(resize)
commands.add_command(extract)
commands.add_command(demo)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    if os.environ.get(DEBUG):
        commands.main(args, prog_name="lorasmith")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be in no encoding at all
            stream.reconfigure(errors="backslashreplace")
    code = _run(args) if _is_somewhere() else 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # closed or full: what could be told was told
            if stream is not None:
                stream.flush()
    os._exit(code)  # taking torch apart would cost 0.2 s, and the system frees everything anyway


def _is_somewhere() -> bool:
    """Whether the current folder exists; without one, libraries fail in their own ways."""
    try:
        os.getcwd()
    except OSError:
        error("the current folder is gone; change to one that exists")
        return False
    return True


def _run(args: Sequence[str] | None) -> int:
    try:
        return commands.main(args, prog_name="lorasmith", standalone_mode=False) or 0
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except (KeyboardInterrupt, click.Abort):
        error("interrupted; the output is whole or not there, and the same command makes it")
        return 130
    except BrokenPipeError:  # whoever read our output has gone
        return 1
    except LorasmithError as failed:
        error(str(failed))
        return 2 if isinstance(failed, BadOption) else 1
    except MemoryError:
        error("the memory of this machine is used up; try a smaller --memory or fewer --threads")
        return 1
    except ImportError as broken:
        error(f"a library cannot be loaded: {broken}; install it again, or lift what limits memory here (ulimit -v)")
        return 1
    except Exception as unforeseen:
        error(f"unforeseen {type(unforeseen).__name__}: {unforeseen} (a defect; {DEBUG}=1 shows where)")
        return 1
