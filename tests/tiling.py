"""What must hold of any plan, whatever it was made from."""

from __future__ import annotations

import os

import lorasmith
from lorasmith.records import Convert, Copy


def require_tiled(plan: lorasmith.Plan) -> None:
    """The steps of every output file cover its bytes exactly once, and what they read lies in the files they name."""
    for output in plan.outputs:
        position = 0
        for step in sorted(output.steps, key=lambda step: (step.offset, step.nbytes)):
            assert step.offset == position, (output.name, step)
            position += step.nbytes
            if isinstance(step, Copy):
                require_inside(step.source, step.start, step.nbytes)
            elif isinstance(step, Convert):
                require_inside(step.entry.file, step.entry.start, step.entry.nbytes)
        assert position == output.size, output.name
    names = [output.name for output in plan.outputs] + [file.name for file in plan.side_files]
    assert len(set(names)) == len(names)
    assert plan.bytes_written == sum(file.size for file in (*plan.outputs, *plan.side_files))


def require_inside(file: str, start: int, nbytes: int) -> None:
    assert 0 <= start <= start + nbytes <= os.path.getsize(file), file
