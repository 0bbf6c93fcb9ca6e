"""Computing on a GPU: the plan, the blocks and the arithmetic of the CPU, with transfers that overlap.

    file ──read──> pinned memory ──up──> GPU ──compute──> GPU ──down──> pinned memory ──copy──> panel ──> file

A feeding thread has a stream of its own for each of *up*, *compute* and *down*, and a few slots: while the block in
one slot is in the streams, the next is being read into another. What can only be known once a block is through, as
whether a value overflowed, is looked at when its slot is needed again.

torch has one switch for TF32, and it is the whole process's. It is therefore off only while products are being
launched, which takes microseconds since nobody waits for them, and is then as the host program had it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasmith.errors import BadOption, Unsupported
from lorasmith.execution.blocks import IN_FLIGHT, Task
from lorasmith.execution.worker import Filled, Scratch, Worker, is_sampled
from lorasmith.records import Convert, Merge
from lorasmith.rounding import harmless, round_into, squares
from lorasmith.safefile import AlignedBuffer, Reader

if TYPE_CHECKING:
    import torch


# ------------------------------------------------------------------------------------------------- which device


def resolve(device: str) -> str:
    """The device that an option means, as a plan names it: ``cpu`` or ``cuda:N``.

    ``auto`` is the first GPU if there is one; only ``cpu`` can be told without torch. Raises BadOption for a name or
    a number that does not exist, Unsupported when there is no GPU.
    """
    if device == "cpu":
        return device
    if not re.fullmatch(r"auto|cuda(:[0-9]{1,9})?", device):
        raise BadOption(f"device {device!r} is not known; use cpu, cuda, cuda:N (counted from 0) or auto")
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "auto" and not gpus:
        lacking = "that torch was built for CPUs only: install one built for CUDA"
        if torch.version.cuda or torch.version.hip:
            lacking = "its driver may be missing, or CUDA_VISIBLE_DEVICES may hide it"
        raise Unsupported(
            f"device {device!r} needs a GPU and torch {torch.__version__} finds none; {lacking}, or use cpu"
        )
    return choose(device, gpus)


def choose(device: str, gpus: int) -> str:
    """The device among so many GPUs; ``cuda`` is the first. Raises BadOption when there are not as many."""
    if device == "auto" and not gpus:
        return "cpu"
    number = int(device.partition(":")[2] or 0)
    if number >= gpus:
        names = "is 1 GPU, cuda:0" if gpus == 1 else f"are {gpus} GPUs, cuda:0 to cuda:{gpus - 1}"
        raise BadOption(f"device {device!r} does not exist: there {names}")
    return f"cuda:{number}"


# ---------------------------------------------------------------------------------------------------- computing


@dataclass
class _Slot:
    """Room for one block under way: once it is ``done``, ``arrive`` puts its result where it is wanted."""

    number: int
    done: Any
    arrive: Callable[[], None] | None = None


class DeviceWorker(Worker):
    """Computes tasks on a device, with ``IN_FLIGHT`` blocks under way.

    On a CPU (``cpu:0``) torch's streams and events do nothing, and every byte is the plain worker's.
    """

    def __init__(self, readers: Mapping[str, Reader], device: str, *, allow_overflow: bool) -> None:
        import torch

        super().__init__(readers, allow_overflow=allow_overflow)
        cuda = torch.device(device).type == "cuda"
        lanes: Any = torch.cuda if cuda else torch.cpu
        lanes.set_device(device)  # for this thread
        self._lanes, self._device = lanes, device
        self._scratch, self._host = Scratch(device), Scratch(pinned=cuda)
        self._up, self._compute, self._down = (lanes.Stream() for _ in range(3))
        waiting = {"blocking": True} if cuda else {}  # else a waiting thread takes a processor
        self._slots = deque(_Slot(number, lanes.Event(**waiting)) for number in range(IN_FLIGHT))

    def fill(self, task: Task, panel: AlignedBuffer) -> Filled:
        """Compute the task's rows into the panel, placed as direct writes need them."""
        import torch

        try:
            with self._lanes.stream(self._compute):
                return super().fill(task, panel)
        except BaseException as error:
            self._lanes.synchronize()  # nothing may be under way when the buffers go
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise Unsupported(
                    f"the memory of {self._device} is used up, probably by other programs; "
                    "wait for them, try fewer --threads, or use --device cpu"
                ) from error
            raise

    def _block(self, step: Convert, rows: slice, out: torch.Tensor) -> None:
        import torch

        slot = self._slots[0]
        self._finish(slot)
        self._slots.rotate(-1)
        number = slot.number
        read = self._read_rows(step, rows, f"stored {number}")
        with self._lanes.stream(self._up):  # memory is taken in the stream that is the first to write to it
            stored = self._scratch.take(f"stored {number}", read.dtype, *read.shape).copy_(read, non_blocking=True)
        self._compute.wait_stream(self._up)
        acc = self._sum(step, stored, rows, f"acc {number}")
        result = self._scratch.take(f"result {number}", out.dtype, *out.shape).copy_(acc)
        facts = self._scratch.take(f"facts {number}", torch.float64, 1, 4)
        facts[0, 0] = squares(acc)
        if is_sampled(step, rows):
            facts[0, 1:] = self._measure(step, rows, result, stored)
        self._down.wait_stream(self._compute)
        with self._lanes.stream(self._down):
            here = self._host.take(f"result {number}", out.dtype, *out.shape).copy_(result, non_blocking=True)
            told = self._host.take(f"facts {number}", torch.float64, 1, 4).copy_(facts, non_blocking=True)
            slot.done.record()
        slot.arrive = functools.partial(self._arrive, step, rows, out, here, told, result, acc, stored)

    def _settle(self) -> None:
        for slot in self._slots:
            self._finish(slot)

    def _finish(self, slot: _Slot) -> None:
        """Wait for the slot's block, if one is under way."""
        arrive, slot.arrive = slot.arrive, None
        if arrive is not None:
            slot.done.synchronize()
            arrive()

    def _arrive(
        self,
        step: Convert,
        rows: slice,
        out: torch.Tensor,
        here: torch.Tensor,
        told: torch.Tensor,
        result: torch.Tensor,
        acc: torch.Tensor,
        stored: torch.Tensor,
    ) -> None:
        """Take over a block that was computed; what may have overflowed is rounded again, with all checks."""
        square, *sums = told[0].tolist()
        if harmless(square, step.dtype):
            out.copy_(here)
        else:
            round_into(result, acc, stored, step.name, step.dtype, saturate=self._allow_overflow)
            out.copy_(result)
            sums = self._measure(step, rows, result, stored).tolist() if is_sampled(step, rows) else sums
        if is_sampled(step, rows):
            self._note(step, rows, out, sums)

    def _add(self, step: Merge, acc: torch.Tensor, base: torch.Tensor, rows: slice) -> None:
        with full_precision():
            super()._add(step, acc, base, rows)

    def _open(self, step: Merge) -> None:
        with full_precision():
            super()._open(step)


# ---------------------------------------------------------------------------------------------------- precision

_lock = threading.Lock()
_users = {"cpu": 0, "cuda": 0}
_switch_back: dict[str, Callable[[], None] | None] = {}


@contextlib.contextmanager
def full_precision(kind: str = "cuda") -> Iterator[None]:
    """Launch float32 products as such, on ``cpu`` or ``cuda``; the last of the threads that do so puts the switch back.

    ``torch.set_float32_matmul_precision`` lets GPUs compute them in TF32, and CPUs in bfloat16.
    """
    with _lock:
        if _users[kind] == 0:
            _switch_back[kind] = _switch_off_tf32() if kind == "cuda" else _switch_off_bfloat16()
        _users[kind] += 1
    try:
        yield
    finally:
        with _lock:
            _users[kind] -= 1
            switch_back = _switch_back[kind]
            if _users[kind] == 0 and switch_back is not None:
                switch_back()


def _switch_off_bfloat16() -> Callable[[], None] | None:
    """Switch the CPU's products to float32 if they are not; what is returned undoes it."""
    import torch

    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    precision = getattr(matmul, "fp32_precision", None)
    if matmul is not None and precision is not None:
        if precision in ("none", "ieee"):
            return None
        matmul.fp32_precision = "ieee"
        return lambda: setattr(matmul, "fp32_precision", precision)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


def _switch_off_tf32() -> Callable[[], None] | None:
    """Switch TF32 off if it is on; what is returned switches it on again the way it was.

    torch 2.9 brought a second interface, which decides; the first refuses to answer where both disagree.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = "highest"
    if precision not in (None, "tf32") or (precision is None and before == "highest"):
        return None
    if before == "highest":
        matmul.fp32_precision = "ieee"
        return lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.allow_tf32 = False
    if before == "high":
        return lambda: setattr(matmul, "allow_tf32", True)
    return lambda: torch.set_float32_matmul_precision(before)
