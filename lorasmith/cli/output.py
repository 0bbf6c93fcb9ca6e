"""The one place that prints: data to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import click

from lorasmith.cli.lines import count, extract_lines, mix_lines, plan_lines, report_lines, size
from lorasmith.errors import IOFailed, one_line

if TYPE_CHECKING:
    from lorasmith.records import MergeReport, Plan, Progress, Pushed, Resources
    from lorasmith.reports import ExtractReport, MixReport

LOG_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


def output_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--json``, ``--quiet`` and ``--no-progress`` to a command, which gets them as an ``Output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
    @click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
    @click.option("--no-progress", is_flag=True, help="Show no progress.")
    @functools.wraps(command)
    def wrapped(as_json: bool, quiet: bool, no_progress: bool, **others: Any) -> None:
        command(output=Output(as_json, quiet, show_progress=not (quiet or no_progress)), **others)

    return wrapped


def error(message: str) -> None:
    """Say what went wrong."""
    _to_stderr(f"Error: {message}", color="red")


@dataclass(frozen=True)
class Output:
    """How a command was asked to speak."""

    as_json: bool = False
    quiet: bool = False
    show_progress: bool = True

    def plan(self, plan: Plan, takes: Resources, out: str) -> None:
        """What a merge would do."""
        if self.as_json:
            from lorasmith.records import plain

            self._data({**plan.to_dict(), "resources": plain(takes)})
        else:
            self._text([*plan_lines(plan, takes, out), "Nothing was written (--dry-run)."])
        self._warn(plan.warnings)

    def intent(self, plan: Plan, takes: Resources, out: str) -> None:
        """One line before a merge begins."""
        if not (self.quiet or self.as_json):
            what = f"Merging {count(plan.tensors_merged + plan.tensors_replaced, 'tensor')}"
            first = f"Downloading {size(takes.download)}, then " if takes.download else ""
            what = first + (what.lower() if first else what)
            text = f"{what}, writing {size(plan.bytes_written)} to {out} ({count(takes.threads, 'thread')})"
            _to_stderr(text)

    def report(self, report: MergeReport) -> None:
        """What a merge did."""
        if self.as_json:
            self._data(report.to_dict())
        else:
            self._text(report_lines(report))
        self._warn(report.warnings)

    def pushed(self, pushed: Pushed) -> None:
        """What a push made."""
        if self.as_json:
            from lorasmith.records import plain

            self._data(plain(pushed))
        else:
            self._text([f"Pushed to {pushed.url}", f"commit   {pushed.commit}"])

    def pulled(self, path: str) -> None:
        """Where a pull put what it has pulled."""
        if self.as_json:
            self._data({"path": path})
        else:
            self._text([path])

    def extracted(self, report: ExtractReport) -> None:
        """What an extraction found, and did."""
        if self.as_json:
            self._data(report.to_dict())
        else:
            self._text(extract_lines(report))
        self._warn(report.warnings)

    def mixed(self, report: MixReport, done: str = "Mixed") -> None:
        """What a mix made, or would make; ``done`` is what was done to its adapters."""
        if self.as_json:
            self._data(report.to_dict())
        else:
            self._text(mix_lines(report, done))
        self._warn(report.warnings)

    def say(self, text: str) -> None:
        """A line for people."""
        if not (self.as_json or self.quiet):
            self._text([text])

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None] | None]:
        """A callback that shows how far a run is: a bar on a terminal, a line every few seconds elsewhere."""
        if not self.show_progress:
            yield None
        elif _can_draw(sys.stderr):
            with contextlib.closing(_Bar()) as bar:
                yield bar
        else:
            yield _Log()

    def _text(self, lines: Iterable[str]) -> None:
        if not self.quiet:
            _to_stdout("\n".join(one_line(line) for line in lines))

    def _data(self, value: object) -> None:
        _to_stdout(json.dumps(value, indent=2))

    def _warn(self, warnings: Sequence[str]) -> None:
        for warning in warnings:
            _to_stderr(f"Warning: {warning}", color="yellow")


def _can_draw(stream: TextIO | None) -> bool:
    """Whether it is a terminal; those that say they have no width (``docker run -t``) show no bar."""
    return stream is not None and stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


def _to_stdout(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as failed:
        raise IOFailed(failed.errno, f"standard output cannot be written: {failed.strerror}") from failed


def _to_stderr(text: str, color: str | None = None) -> None:
    """A line that a run can do without: no result is lost for a full log."""
    with contextlib.suppress(OSError):
        click.secho(one_line(text), err=True, fg=color)


class _Bar:
    """Bytes, rate and time left, redrawn in place."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is not None and self._bar.total != progress.total:  # a download, then the merge
            self.close()
            self._bar = None
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=progress.total, initial=progress.resumed, unit="B", unit_scale=True, leave=False, file=sys.stderr
            )
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Log:
    """A line every few seconds."""

    def __init__(self) -> None:
        self._next = LOG_SECONDS

    def __call__(self, progress: Progress) -> None:
        if progress.seconds < self._next - LOG_SECONDS:  # a download, then the merge
            self._next = LOG_SECONDS
        if progress.seconds < self._next or progress.done == progress.total:
            return
        self._next = progress.seconds + LOG_SECONDS
        left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
        share = progress.done / progress.total
        text = f"{size(progress.done)} of {size(progress.total)} ({share:.0%}), {size(progress.rate)}/s{left}"
        _to_stderr(text)
