"""Every error lorasmith raises on purpose.

    LorasmithError
    ├── MissingFile      (FileNotFoundError)  a path that is not there
    ├── BadFile          (ValueError)         a file that is not what it should be: truncated, malformed, hostile
    ├── BadOption        (ValueError)         an argument that makes no sense
    ├── AdapterMismatch  (ValueError)         an adapter that does not fit this base
    ├── Unsupported      (NotImplementedError) understood, but not something lorasmith can merge
    ├── NotFinite        (ArithmeticError)    a NaN, an infinity or an overflow
    ├── BudgetTooSmall   (ValueError)         --memory below the smallest that works
    ├── OutputExists     (FileExistsError)    the output is there already, or is an input
    ├── OutputBusy       (BlockingIOError)    another run is writing the same output
    ├── InputChanged     (RuntimeError)       a base or an adapter that changed while it was being merged
    ├── HubRefused       (PermissionError)    the Hub wants a login, an accepted licence or other rights
    ├── HubFailed        (ConnectionError)    the Hub cannot be reached, or failed under way
    ├── BranchMoved      (RuntimeError)       others pushed to a repository meanwhile
    ├── NoSpace          (OSError)            the disk cannot hold the result
    └── IOFailed         (OSError)            a read or write failed under way

A message says what is wrong (with the tensor's or file's name), the likely cause, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class LorasmithError(Exception):
    """Root of everything lorasmith raises on purpose.

    ``may_pass`` says that what went wrong lies outside: what is finished is kept, and the same run goes on from there.
    """

    may_pass = False

    def __str__(self) -> str:
        """The message alone, on one line: without the errno that some of the children carry as well."""
        return one_line(str(self.args[-1])) if self.args else ""


class MissingFile(LorasmithError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class BadFile(LorasmithError, ValueError):
    """A file is truncated, malformed or hostile."""


class BadOption(LorasmithError, ValueError):
    """An argument's value makes no sense."""


class AdapterMismatch(LorasmithError, ValueError):
    """An adapter does not fit the base it was given."""


class Unsupported(LorasmithError, NotImplementedError):
    """Something lorasmith recognises and cannot merge."""


class NotFinite(LorasmithError, ArithmeticError):
    """A NaN, an infinity or an overflow in an adapter or in a result."""


class BudgetTooSmall(LorasmithError, ValueError):
    """The memory budget is below the smallest that works."""


class OutputExists(LorasmithError, FileExistsError):
    """The output exists already, or is one of the inputs."""


class OutputBusy(LorasmithError, BlockingIOError):
    """Another run holds the output."""


class InputChanged(LorasmithError, RuntimeError):
    """A base or an adapter changed while it was being merged."""


class HubRefused(LorasmithError, PermissionError):
    """The Hub wants a login, an accepted licence, or rights that the token has not."""

    may_pass = True


class HubFailed(LorasmithError, ConnectionError):
    """The Hub cannot be reached, or a transfer failed."""

    may_pass = True


class BranchMoved(LorasmithError, RuntimeError):
    """The branch that was pushed to has other commits than when the run began."""

    may_pass = True


class NoSpace(LorasmithError, OSError):
    """The disk cannot hold the result."""

    may_pass = True


class IOFailed(LorasmithError, OSError):
    """Reading or writing failed while the plan was being carried out."""

    may_pass = True


LONGEST = 4000
"""Characters of a message; names come from files and may be of any length."""


def one_line(text: str) -> str:
    """Text that may be printed whatever names are in it: no line breaks, no terminal codes, no halves of characters."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} […] {text[-LONGEST // 2 :]}"
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Join names for a message, the first few in full: ``a, b, c (and 41 more)``."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} (and {len(names) - most} more)"
