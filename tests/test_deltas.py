"""What every Delta promises, whatever it is: one suite, run against a table of all of them."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from generate import Tensors
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

import lorasmith.deltas
from lorasmith.deltas import Delta
from lorasmith.deltas.addition import Addition
from lorasmith.deltas.axis import Axis, span
from lorasmith.deltas.dora import Dora
from lorasmith.deltas.experts import Stacked
from lorasmith.deltas.low_rank import Factor, LowRank, Product, stack
from lorasmith.deltas.patchwork import Patch, Patchwork
from lorasmith.deltas.replacement import Replacement
from lorasmith.deltas.token_rows import TokenRows
from lorasmith.safefile import TensorEntry, read_header

ROWS, COLUMNS, RANK = 36, 48, 6

Entries = dict[str, TensorEntry]


def lora(a: TensorEntry, b: TensorEntry, scale: float) -> LowRank:
    """``scale · B · A`` with A of shape (rank, in) and B of shape (out, rank)."""
    return LowRank((Product(Factor(b), Factor(a), scale),))


@dataclass(frozen=True)
class Case:
    """A delta of a (36, 48) weight, made of stored tensors, and what it must be of these and of W0, in float64.

    One that does not turn is stored as the base stores the weight, whichever way that is.
    """

    tensors: tuple[str, ...]
    build: Callable[[Entries], Delta]
    dense: Callable[[Tensors, torch.Tensor], torch.Tensor]
    turns: bool = True


STORED: dict[str, tuple[int, ...]] = {
    "a": (RANK, COLUMNS), "b": (ROWS, RANK), "a2": (3, COLUMNS), "b2": (ROWS, 3), "a.t": (COLUMNS, RANK),
    "b.t": (RANK, ROWS), "kernel a": (RANK, 12, 2, 2), "kernel b": (ROWS, RANK, 1, 1), "blocks a": (RANK, COLUMNS // 3),
    "blocks b": (ROWS, RANK // 3), "wide a": (RANK, COLUMNS * 3), "rows": (ROWS,), "columns": (COLUMNS,),
    "kernel rows": (1, ROWS, 1, 1), "new": (ROWS, COLUMNS), "added": (ROWS, COLUMNS),
    "some rows": (3, COLUMNS), "a1.t": (COLUMNS, 1), "b1.t": (1, ROWS), "stack a": (4 * RANK, COLUMNS),
    "stack b": (ROWS // 4, 4 * RANK), "stack a.t": (4 * RANK, ROWS // 4), "stack b.t": (COLUMNS, 4 * RANK),
    "high b": (2 * ROWS, RANK), "wide b": (ROWS, 2 * RANK), "tall a": (3 * RANK, COLUMNS), "half rows": (ROWS // 2,),
    "half b": (ROWS // 2, RANK), "half new": (ROWS // 2, COLUMNS), "high new": (2 * ROWS, COLUMNS),
    "half columns": (COLUMNS // 2,), "half a.t": (COLUMNS // 2, RANK), "double rows": (2 * ROWS,),
}  # fmt: skip
"""Shapes of the stored tensors."""


def _blocks(stored: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*stored.chunk(3))


def _scaled(adapted: torch.Tensor, magnitude: torch.Tensor, dim: int) -> torch.Tensor:
    return adapted * magnitude.reshape([-1, 1] if dim == 1 else [1, -1]) / adapted.norm(dim=dim, keepdim=True)


def _diagonal(wide: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.chunk(3, dim=1)[number] for number, part in enumerate(wide.chunk(3))])


def _rows(new: torch.Tensor, w0: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    adapted = w0.clone()
    adapted[tokens] = new
    return adapted - w0


EVEN_ROWS, EVEN_COLUMNS = span(0, ROWS // 2, 2), span(0, COLUMNS // 2, 2)
HEADS = Axis(0, ((4, 9), (3, 1), (3, 3)))
"""What was at (i, j, k) of (4, 3, 3) rows is at (i, k, j): four heads, the halves of each taken in turn."""

HEADS_ROWS = torch.arange(ROWS).view(4, 3, 3).transpose(1, 2).flatten()


def _stack(a: torch.Tensor, b: torch.Tensor, *, by_expert: bool = False) -> torch.Tensor:
    """Σ over the rank for each of four experts, (experts, out, in)."""
    shape = (len(b), 4, RANK) if by_expert else (len(b), RANK, 4)
    factors = b.reshape(shape) if by_expert else b.reshape(shape).transpose(1, 2)
    return torch.einsum("oer,eri->eoi", factors, a.reshape(4, RANK, -1))


def _put(delta: torch.Tensor, rows: slice, columns: slice = slice(None)) -> torch.Tensor:
    whole = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    whole[rows, columns] = delta
    return whole


CASES: dict[str, Case] = {
    "LoRA": Case(("a", "b"), lambda of: lora(of["a"], of["b"], 0.7), lambda t, _: 0.7 * t["b"] @ t["a"]),
    "LoRA on a weight stored the other way": Case(
        ("a.t", "b.t"), lambda of: lora(of["b.t"], of["a.t"], 0.7).transposed(),
        lambda t, _: 0.7 * (t["a.t"] @ t["b.t"]).T
    ),
    "LoRA on a convolution": Case(
        ("kernel a", "kernel b"), lambda of: lora(of["kernel a"], of["kernel b"], -2.0),
        lambda t, _: -2.0 * t["kernel b"].flatten(1) @ t["kernel a"].flatten(1),
    ),
    "LoRA on a grouped convolution": Case(
        ("wide a", "blocks b"),
        lambda of: LowRank((Product(Factor(of["blocks b"], spread=3), Factor(of["wide a"], diagonal=3), 1.5),)),
        lambda t, _: 1.5 * _blocks(t["blocks b"]) @ _diagonal(t["wide a"]),
    ),
    "BD-LoRA with blocks in A": Case(
        ("blocks a", "b"), lambda of: LowRank((Product(Factor(of["b"]), Factor(of["blocks a"], spread=3), 0.5),)),
        lambda t, _: 0.5 * t["b"] @ _blocks(t["blocks a"]),
    ),
    "BD-LoRA with blocks in B": Case(
        ("a", "blocks b"), lambda of: LowRank((Product(Factor(of["blocks b"], spread=3), Factor(of["a"]), 0.5),)),
        lambda t, _: 0.5 * _blocks(t["blocks b"]) @ t["a"],
    ),
    "a stack": Case(
        ("a", "b", "a2", "b2"),
        lambda of: stack([(lora(of["a"], of["b"], 0.7), 2.0), (lora(of["a2"], of["b2"], 1.0), -0.5)]),
        lambda t, _: 1.4 * t["b"] @ t["a"] - 0.5 * t["b2"] @ t["a2"],
    ),
    "DoRA": Case(
        ("a", "b", "rows"), lambda of: Dora(lora(of["a"], of["b"], 0.3), of["rows"]),
        lambda t, w0: _scaled(w0 + 0.3 * t["b"] @ t["a"], t["rows"], 1) - w0,
    ),
    "DoRA on a weight stored the other way": Case(
        ("a.t", "b.t", "columns"), lambda of: Dora(lora(of["b.t"], of["a.t"], 0.3), of["columns"]).transposed(),
        lambda t, w0: _scaled(w0 + 0.3 * (t["a.t"] @ t["b.t"]).T, t["columns"], 0) - w0,
    ),
    "DoRA of rank one on a weight stored the other way": Case(
        ("a1.t", "b1.t", "columns"), lambda of: Dora(lora(of["b1.t"], of["a1.t"], 0.3), of["columns"]).transposed(),
        lambda t, w0: _scaled(w0 + 0.3 * (t["a1.t"] @ t["b1.t"]).T, t["columns"], 0) - w0,
    ),
    "DoRA on a convolution": Case(
        ("kernel a", "kernel b", "kernel rows"),
        lambda of: Dora(lora(of["kernel a"], of["kernel b"], 0.3), of["kernel rows"]),
        lambda t, w0: _scaled(
            w0 + 0.3 * t["kernel b"].flatten(1) @ t["kernel a"].flatten(1), t["kernel rows"].flatten(), 1
        ) - w0,
    ),
    "replacement": Case(("new",), lambda of: Replacement(of["new"]), lambda t, w0: t["new"] - w0, turns=False),
    "token rows": Case(
        ("some rows",), lambda of: TokenRows(of["some rows"], (30, 0, 17), (ROWS, COLUMNS)),
        lambda t, w0: _rows(t["some rows"], w0, [30, 0, 17]), turns=False,
    ),
    "LoRA on some rows of a larger weight": Case(
        ("a", "high b"), lambda of: lora(of["a"], of["high b"], 0.7).part(rows=span(ROWS // 2, ROWS)),
        lambda t, _: 0.7 * t["high b"][ROWS // 2 : ROWS // 2 + ROWS] @ t["a"],
    ),
    "LoRA on every second row of a larger weight": Case(
        ("a", "high b"), lambda of: lora(of["a"], of["high b"], 0.7).part(rows=span(1, ROWS, 2)),
        lambda t, _: 0.7 * t["high b"][1::2] @ t["a"],
    ),
    "LoRA on permuted rows": Case(
        ("a", "b"), lambda of: lora(of["a"], of["b"], 0.7).part(rows=HEADS),
        lambda t, _: 0.7 * t["b"][HEADS_ROWS] @ t["a"],
    ),
    "LoRA on a third of the columns": Case(
        ("wide a", "b"), lambda of: lora(of["wide a"], of["b"], 1.0).part(columns=span(COLUMNS, COLUMNS)),
        lambda t, _: t["b"] @ t["wide a"][:, COLUMNS : 2 * COLUMNS],
    ),
    "LoRA of some of the ranks": Case(
        ("tall a", "wide b"),
        lambda of: LowRank((Product(
            Factor(of["wide b"], columns=span(1, RANK, 2)), Factor(of["tall a"], rows=span(RANK, RANK)), 0.5
        ),)),
        lambda t, _: 0.5 * t["wide b"][:, 1::2] @ t["tall a"][RANK : 2 * RANK],
    ),
    "BD-LoRA on permuted rows": Case(
        ("a", "blocks b"),
        lambda of: LowRank((Product(Factor(of["blocks b"], spread=3), Factor(of["a"]), 0.5),)).part(rows=HEADS),
        lambda t, _: 0.5 * _blocks(t["blocks b"])[HEADS_ROWS] @ t["a"],
    ),
    "DoRA on permuted rows": Case(
        ("a", "b", "rows"), lambda of: Dora(lora(of["a"], of["b"], 0.3), of["rows"]).part(rows=HEADS),
        lambda t, w0: _scaled(w0 + 0.3 * t["b"][HEADS_ROWS] @ t["a"], t["rows"][HEADS_ROWS], 1) - w0,
    ),
    "DoRA on some rows of a larger weight": Case(
        ("a", "high b", "double rows"),
        lambda of: Dora(lora(of["a"], of["high b"], 0.3), of["double rows"]).part(rows=span(5, ROWS)),
        lambda t, w0: _scaled(w0 + 0.3 * t["high b"][5 : 5 + ROWS] @ t["a"], t["double rows"][5 : 5 + ROWS], 1) - w0,
    ),
    "a replacement of some rows of a larger weight": Case(
        ("high new",), lambda of: Replacement(of["high new"]).part(rows=span(0, ROWS, 2)),
        lambda t, w0: t["high new"][::2] - w0, turns=False,
    ),
    "addition of permuted rows": Case(
        ("added",), lambda of: Addition(Factor(of["added"]), -3.0).part(rows=HEADS),
        lambda t, _: -3.0 * t["added"][HEADS_ROWS],
    ),
    "stacked experts": Case(
        ("stack a", "stack b"), lambda of: Stacked(of["stack a"], of["stack b"], 4, 0.5),
        lambda t, _: 0.5 * _stack(t["stack a"], t["stack b"]).flatten(0, 1), turns=False,
    ),
    "stacked experts, each with its columns together": Case(
        ("stack a", "stack b"), lambda of: Stacked(of["stack a"], of["stack b"], 4, 0.5, by_expert=True),
        lambda t, _: 0.5 * _stack(t["stack a"], t["stack b"], by_expert=True).flatten(0, 1), turns=False,
    ),
    "stacked experts stored the other way": Case(
        ("stack a.t", "stack b.t"), lambda of: Stacked(of["stack a.t"], of["stack b.t"], 4, 0.5, turned=True),
        lambda t, _: 0.5 * _stack(t["stack a.t"], t["stack b.t"]).transpose(1, 2).flatten(0, 1), turns=False,
    ),
    "patches on two halves": Case(
        ("a", "half b", "half new"),
        lambda of: Patchwork((
            Patch(lora(of["a"], of["half b"], 0.7), span(0, ROWS // 2), span(0, COLUMNS)),
            Patch(Replacement(of["half new"]), span(ROWS // 2, ROWS // 2), span(0, COLUMNS)),
        ), (ROWS, COLUMNS)),
        lambda t, w0: _put(0.7 * t["half b"] @ t["a"], slice(0, ROWS // 2))
        + _put(t["half new"] - w0[ROWS // 2 :], slice(ROWS // 2, None)),
    ),
    "a patch on every second row": Case(
        ("a", "half b", "half rows"),
        lambda of: Patchwork((
            Patch(Dora(lora(of["a"], of["half b"], 0.7), of["half rows"]), EVEN_ROWS, span(0, COLUMNS)),
        ), (ROWS, COLUMNS)),
        lambda t, w0: _put(
            _scaled(w0[::2] + 0.7 * t["half b"] @ t["a"], t["half rows"], 1) - w0[::2], slice(0, None, 2)
        ),
    ),
    "a patch on every second column": Case(
        ("half a.t", "b.t", "half columns"),
        lambda of: Patchwork((
            Patch(Dora(lora(of["b.t"], of["half a.t"], 0.7), of["half columns"]).transposed(),
                  span(0, ROWS), EVEN_COLUMNS),
        ), (ROWS, COLUMNS)),
        lambda t, w0: _put(
            _scaled(w0[:, ::2] + 0.7 * (t["half a.t"] @ t["b.t"]).T, t["half columns"], 0) - w0[:, ::2],
            slice(None), slice(0, None, 2),
        ),
    ),
    "addition": Case(("added",), lambda of: Addition(Factor(of["added"]), -3.0), lambda t, _: -3.0 * t["added"]),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A delta at hand, with its stored tensors and W0 in float64, and what it must be."""

    delta: Delta
    w0: torch.Tensor
    dense: torch.Tensor
    entries: tuple[TensorEntry, ...]
    turns: bool

    def add(self, acc: torch.Tensor, heights: list[int], factor: float) -> torch.Tensor:
        """Add the delta to ``acc`` in blocks of such heights, opened once."""
        w0 = self.w0.to(acc.dtype)

        def blocks(start: int = 0, stop: int = ROWS) -> Iterator[tuple[slice, torch.Tensor]]:
            for rows in _cut([16] * 3):
                if rows.start < stop and rows.stop > start:
                    yield rows, w0[rows].clone()

        opened = self.delta.open(acc.dtype, blocks)
        for rows in _cut(heights):
            base = w0[rows].clone()
            opened.add_to(acc[rows], base if self.delta.needs_base else None, rows, factor)
            assert torch.equal(base, w0[rows])
        return acc


def _cut(heights: list[int]) -> Iterator[slice]:
    start = 0
    for height in heights:
        if start < ROWS:
            yield slice(start, min(ROWS, start + height))
        start += height


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=["F32", "BF16", "F64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What the delta's tensors are stored as."""
    stored: torch.dtype = request.param
    return stored


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, tmp_path: Path, dtype: torch.dtype) -> Made:
    case = CASES[request.param]
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in STORED.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    header = read_header(str(tmp_path / "adapter.safetensors"))
    entries = {entry.name: entry for entry in header.entries}
    w0 = torch.randn(ROWS, COLUMNS, generator=generator).double()
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    used = tuple(entries[name] for name in case.tensors)
    return Made(case.build(entries), w0, case.dense(wide, w0), used, case.turns)


def test_the_table_has_every_delta_of_the_package() -> None:
    kinds = set()
    for module in pkgutil.iter_modules(lorasmith.deltas.__path__, "lorasmith.deltas."):
        for one in vars(importlib.import_module(module.name)).values():
            if isinstance(one, type) and hasattr(one, "low_rank") and not getattr(one, "_is_protocol", False):
                kinds.add(one)
    assert kinds == {type(case.build(_any_entries())) for case in CASES.values()}


def _any_entries() -> Entries:
    return {name: TensorEntry(name, "F32", shape, "", 0, 0) for name, shape in STORED.items()}


def test_a_block_of_rows_is_what_the_formula_says(made: Made) -> None:
    start = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for wide, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        acc = made.add(start.to(wide, copy=True), [16, 16, 4], -0.8)
        off = (acc.double() - start + 0.8 * made.dense).norm() / made.dense.norm()
        assert off < tolerance


def test_every_split_into_blocks_gives_the_same_values(made: Made) -> None:
    whole = made.add(torch.zeros(ROWS, COLUMNS, dtype=torch.float64), [ROWS], 1.0)
    for heights in ([1] * ROWS, [5] * 8, [7, 1, 28], [12, 12, 12], [35, 1]):
        assert all(height % made.delta.alignment == 0 for height in heights[:-1])
        split = made.add(torch.zeros(ROWS, COLUMNS, dtype=torch.float64), heights, 1.0)
        assert torch.allclose(split, whole, rtol=1e-12, atol=1e-13)


def test_what_is_added_is_proportional_to_the_factor(made: Made) -> None:
    one = made.add(torch.zeros(ROWS, COLUMNS, dtype=torch.float64), [16] * 3, 1.0)
    assert one.norm() > 0
    for factor in (0.25, -3.0, 1e-3):
        some = made.add(torch.zeros(ROWS, COLUMNS, dtype=torch.float64), [16] * 3, factor)
        assert torch.allclose(some, factor * one, rtol=1e-12, atol=1e-13)


def test_a_delta_is_a_fact_that_survives_pickling(made: Made) -> None:
    again = pickle.loads(pickle.dumps(made.delta))
    assert again == made.delta
    assert hash(again) == hash(made.delta)
    copied = replace(made, delta=again)
    zeros = torch.zeros(ROWS, COLUMNS)
    assert torch.equal(copied.add(zeros.clone(), [ROWS], 1.0), made.add(zeros, [ROWS], 1.0))


def test_the_entries_are_the_adapter_s_tensors_each_once(made: Made) -> None:
    assert sorted(made.delta.entries, key=lambda entry: entry.name) == sorted(
        made.entries, key=lambda entry: entry.name
    )


def test_the_shape_is_the_weight_s(made: Made) -> None:
    assert made.delta.shape == (ROWS, COLUMNS)


def test_turned_twice_it_is_itself(made: Made) -> None:
    assert made.delta.transposed().transposed() == made.delta


def test_turned_it_is_the_same_change_of_the_turned_weight(made: Made) -> None:
    turned = made.delta.transposed()
    if not made.turns:
        assert turned == made.delta
        return
    assert turned.shape == (COLUMNS, ROWS)
    w0 = made.w0.T.contiguous()
    opened = turned.open(torch.float64, lambda *_: iter([(slice(0, 20), w0[:20]), (slice(20, COLUMNS), w0[20:])]))
    acc = torch.zeros(COLUMNS, ROWS, dtype=torch.float64)
    for rows in (slice(0, 31), slice(31, COLUMNS)):
        opened.add_to(acc[rows], w0[rows] if turned.needs_base else None, rows, 1.0)
    assert torch.allclose(acc, made.dense.T, rtol=1e-11, atol=1e-12)


def test_its_factors_are_the_whole_delta(made: Made) -> None:
    factors = made.delta.low_rank()
    if factors is None:
        assert made.delta.needs_base or made.delta.rank == 0 or isinstance(made.delta, (Patchwork, Stacked))
        return
    assert factors.rank == made.delta.rank < min(ROWS, COLUMNS)
    again = replace(made, delta=factors.scaled(2.0), dense=2.0 * made.dense)
    acc = again.add(torch.zeros(ROWS, COLUMNS, dtype=torch.float64), [ROWS], 1.0)
    assert (acc - again.dense).norm() < 1e-13 * again.dense.norm()


@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "turned"])
@pytest.mark.parametrize("height", [1, 16, ROWS])
def test_opening_it_and_adding_blocks_takes_no_more_memory_than_it_says(made: Made, height: int, turned: bool) -> None:
    delta = made.delta.transposed() if turned else made.delta
    base = (made.w0.T if turned and made.turns else made.w0).float().contiguous()
    acc = torch.zeros_like(base)
    cut = [slice(first, min(first + height, len(base))) for first in range(0, len(base), height)]

    def blocks(*_: int) -> Iterator[tuple[slice, torch.Tensor]]:
        return ((rows, base[rows]) for rows in cut)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        opened = delta.open(torch.float32, blocks)
        for rows in cut:
            opened.add_to(acc[rows], base[rows] if delta.needs_base else None, rows, 0.5)
    assert 0 < _peak(profiler) <= delta.memory(height)


def _peak(profiler: profile) -> int:
    """The most bytes that tensors took at once."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


ROWWISE = (
    "LoRA",
    "DoRA",
    "replacement",
    "addition",
    "token rows",
    "LoRA on a convolution",
    "a stack",
    "stacked experts",
)


@pytest.mark.parametrize(
    "rows", [span(4, 20), span(1, 12, 3), HEADS, span(0, ROWS)], ids=["few", "third", "heads", "all"]
)
@pytest.mark.parametrize("made", [kind for kind in CASES if kind in ROWWISE], indirect=True)
def test_a_part_of_its_rows_is_the_same_change_of_these(made: Made, rows: Axis) -> None:
    if isinstance(made.delta, Stacked) and not rows.is_whole(ROWS):
        with pytest.raises(NotImplementedError):
            made.delta.part(rows=rows)
        return
    part = made.delta.part(rows=rows)
    which = torch.from_numpy(rows.positions(slice(0, len(rows))))
    w0 = made.w0[which]
    opened = part.open(torch.float64, lambda *_: iter([(slice(0, len(w0)), w0)]))
    acc = torch.zeros_like(w0)
    for first in range(0, len(w0), 5):
        cut = slice(first, min(len(w0), first + 5))
        opened.add_to(acc[cut], w0[cut] if part.needs_base else None, cut, 1.0)
    assert part.shape == w0.shape
    assert torch.allclose(acc, made.dense[which], rtol=1e-11, atol=1e-12)


AXES = [
    span(3, 7),
    span(2, 5, 3),
    Axis(1, ((4, 6), (2, 1))),
    Axis(0, ((2, 20), (3, 4), (4, 1))),
    HEADS,
    span(5, 1),
    span(0, 0),
]


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_an_axis_is_the_positions_it_counts(axis: Axis) -> None:
    wanted = [axis.start]
    for count, step in axis.digits:
        wanted = [one + digit * step for one in wanted for digit in range(count)]
    assert len(axis) == len(wanted)
    assert [axis[place] for place in range(len(axis))] == wanted == list(axis.part(slice(0, len(axis))))
    assert axis.plain is None or list(axis.plain) == wanted
    assert axis.rises == (wanted == sorted(set(wanted)))
    if axis.rises:
        for start in range(0, 50, 7):
            found = axis.within(start, start + 11)
            assert wanted[found] == [one for one in wanted if start <= one < start + 11]


@pytest.mark.parametrize("outer", AXES[:3], ids=str)
@pytest.mark.parametrize("inner", [span(1, 3), span(0, 2, 2), Axis(0, ((2, 1), (2, 2)))], ids=str)
def test_an_axis_of_an_axis_picks_out_of_its_positions(outer: Axis, inner: Axis) -> None:
    positions = list(outer.part(slice(0, len(outer))))
    if outer.plain is None:
        with pytest.raises(NotImplementedError):
            outer.of(inner)
        return
    picked = outer.of(inner)
    assert list(picked.part(slice(0, len(picked)))) == [positions[place] for place in inner.part(slice(0, len(inner)))]
