"""Bytes that need no arithmetic: from a file of the base to a file of the result."""

from __future__ import annotations

from lorasmith.safefile import PAGE, AlignedBuffer, Reader, Writer, share_range


def copy(reader: Reader, start: int, writer: Writer, offset: int, nbytes: int, panel: AlignedBuffer) -> None:
    """Copy ``nbytes`` from position ``start`` of one file to ``offset`` of another, through a panel that holds them.

    Where the file system can share blocks between files and the positions agree, whole pages cost nothing.
    """
    head = -offset % PAGE
    shared = (nbytes - head) // PAGE * PAGE
    if start != offset or shared <= 0 or not share_range(reader.fd, writer.fd, offset + head, shared):
        _move(reader, start, writer, offset, nbytes, panel)
        return
    tail = head + shared
    _move(reader, start, writer, offset, head, panel)
    _move(reader, start + tail, writer, offset + tail, nbytes - tail, panel)


def _move(reader: Reader, start: int, writer: Writer, offset: int, nbytes: int, panel: AlignedBuffer) -> None:
    place = offset % PAGE
    reader.into(panel.view[place : place + nbytes], start)
    writer.write(panel, place, nbytes, offset)
