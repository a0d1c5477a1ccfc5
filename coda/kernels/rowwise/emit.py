"""A row-wise kernel -> the source of a Python module: a CuTe DSL kernel with a warp for each row.

Statistics come first, independent ones in one sweep over the row, then a sweep that stores. Each
sweep reads the row again (from cache), so that no width spills registers.

In a kernel that sums over rows, a CTA has a block of rows: its warps first compute the statistics,
row by row; then each warp has some columns, with the sums in registers, and writes a partial. A
kernel that only merges such partials has a row in each lane, so that loads coalesce.

    x / rms(x)    sweep 1: Σ x² over the row    sweep 2: store x · rsqrt(mean)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from coda.ir.dims import product, show_shape
from coda.kernels.lines import safe, stored
from coda.kernels.rowwise.folds import TOTAL_WARPS, Folds
from coda.kernels.rowwise.mainloop import Rowwise
from coda.kernels.rowwise.pieces import (
    LANES,
    TALL_ROWS,
    TALL_WARPS,
    WARPS,
    Piece,
    fold_warps,
    teams,
)
from coda.kernels.rowwise.sweeps import INDENT, VectorWork, indented
from coda.lowering.program.access import Line, Partial
from coda.lowering.program.epilogue import StoreExpr, SumRows
from coda.lowering.program.program import Program


@dataclass(frozen=True)
class RowSource:
    """An emitted module.

    Attributes:
        text: the Python source; `launch` is its host function.
        name: the module's name, with a hash of the text.
        parameters: (emitted name, operand or buffer, columns, whether it is written), in order.
            Columns are 0 for partial sums over rows, transposed, with any number of partials, and
            -1 for lines of values of rows, contiguous, of any length.
        types: coda's name of each parameter's dtype; "byte" for one that is stored as uint8.
        partials: the buffers of sums over rows, which have a row for each partial.
        padded: matrices whose rows begin at multiples of 16 bytes, whatever their width.
        axes: (buffer, axes of its rows) of results whose rows are in another order. They are passed
            with an axis for each, inner to outer, and strides of their own.
    """

    text: str
    name: str
    parameters: tuple[tuple[str, str, int, bool], ...]
    types: tuple[str, ...]
    partials: tuple[str, ...]
    padded: tuple[str, ...] = ()
    axes: tuple[tuple[str, int], ...] = ()


def emit_rowwise(program: Program, kernel: Rowwise, *, padded: bool = False) -> RowSource:
    """The module of a row-wise kernel.

    With `padded`, rows of matrices begin at multiples of 16 bytes, whatever their width.
    """
    return _RowwiseEmitter(program, kernel, padded=padded).emit()


class _RowwiseEmitter(Folds):
    def emit(self) -> RowSource:
        if self.epilogue.sinks:
            body = self.block()
        elif self.is_total():
            body = self.total()
        elif self.only_folds():
            body = self.folds()
        else:
            body = ["if row < rows:", *indented([*self.row(), *self.wide(), *self.narrow()])]
        reordered = [f"{safe(s.buffer)}_out" for s in self.epilogue.stores if s.rows]
        self.rows |= {"by_row"} if reordered else set()
        body = [*(f"{name} = by_row({name})" for name in reordered), *body]
        parameters = self.parameters()
        names = [p[0] for p in parameters]
        text = self.module(names, body)
        name = "coda_rows_" + hashlib.sha256(text.encode()).hexdigest()[:24]
        partials = tuple(s.buffer for s in self.epilogue.sinks)
        matrices = [*self.epilogue.tiles, *(s.buffer for s in self.epilogue.stores)]
        padded = tuple(matrices) if self.padded else ()
        axes = tuple((s.buffer, len(s.rows.axes)) for s in self.epilogue.stores if s.rows)
        return RowSource(text, name, parameters, self.types(parameters), partials, padded, axes)

    def parameters(self) -> tuple[tuple[str, str, int, bool], ...]:
        found: list[tuple[str, str, int, bool]] = []
        for o in self.epilogue.operands:
            match o.access:
                case Line():
                    columns = -1
                case Partial(planes=planes):
                    parts = self.program.buffers[o.name].shape[-1].size(self.program.sizes)
                    columns = 0 if o.name in self.tall else parts * planes
                case access:
                    _, columns = access.shape(1, self.points, self.lanes)
            found.append((safe(o.name), o.name, columns, False))
        for store in self.epilogue.stores:
            shape = self.program.buffers[store.buffer].shape
            columns = product(shape[1:]).size(self.program.sizes)
            found.append((safe(store.buffer) + "_out", store.buffer, columns, True))
        for sink in self.epilogue.row_sums:
            columns = sink.span.width if sink.span else self.kernel.mainloop.width
            found.append((safe(sink.buffer) + "_out", sink.buffer, columns, True))
        return tuple(found)

    def types(self, parameters: tuple[tuple[str, str, int, bool], ...]) -> tuple[str, ...]:
        stores = {s.buffer: s.dtype for s in self.epilogue.stores}
        stores = {name: "byte" if t.by_bytes else t.name for name, t in stores.items()}
        stores |= {s.buffer: "f32" for s in self.epilogue.sinks}
        return tuple(
            stores[source] if written else self.kinds[source].dtype.name
            for _, source, _, written in parameters
        )

    # The work of a warp on one row.

    def row(self) -> list[str]:
        """Lines that compute the statistics of one row."""
        every = [e for s in (*self.epilogue.stores, *self.epilogue.sinks) for e in s.lanes]
        body = self.once_loaded([*every, *(s.expr for s in self.epilogue.statistics)])
        for fold in [s for s in self.epilogue.statistics if s.operand]:
            body += self.fold(fold)
        for level in self.levels():
            body += self.sweep(level)
        return body

    def wide(self) -> list[str]:
        """The sweep that stores."""
        out: list[str] = []
        for piece in self.pieces:
            self.enter(piece)
            step = self.stored(piece)
            out += self.loop(piece, step) if step.exprs else []
        return out

    def inside(self, item: StoreExpr | SumRows, piece: Piece) -> bool:
        """Whether a store or a sink covers the columns of a piece."""
        first = self.begin(item.span)
        count = item.span.width // self.lanes if item.span else self.points
        return first <= piece.first < first + count

    def stored(self, piece: Piece, sinks: Sequence[SumRows] = ()) -> VectorWork:
        """The step that computes the stores of a piece, and adds to the sums over rows."""
        items = [s for s in (*self.wide_stores(), *sinks) if self.inside(s, piece)]
        exprs = [[piece.special(e) for e in s.lanes] for s in items]
        step = VectorWork([e for many in exprs for e in many], [])
        step.inner, values = self.assigned(step.exprs, "v")
        for item, many in zip(items, exprs, strict=True):
            mine, values = values[: len(many)], values[len(many) :]
            if isinstance(item, StoreExpr):
                self.keep(item, mine, piece, step)
            else:
                self.add(item, mine, step)
        return step

    def keep(self, store: StoreExpr, values: list[str], piece: Piece, step: VectorWork) -> None:
        """Append registers, assignments and the write of one wide store to a step."""
        name = f"{safe(store.buffer)}_out"
        values = [stored(v, store.dtype, self.math) for v in values]
        self.rows |= {"vector", "store"}
        at = self.shifted("index", piece, self.begin(store.span))
        if self.epilogue.apart(store):
            step.rooms += [f"{name}_{i} = vector({self.vec})" for i in (0, 1)]
            step.inner += [f"{name}_{i}[j] = {v}" for i, v in enumerate(values)]
            for i in (0, 1):
                where = self.apart(at, self.split, i)
                step.after.append(f"store({name}, row, {where}, {name}_{i})")
            return
        step.rooms.append(f"{name}_v = vector({len(values) * self.vec})")
        points = ["j"] if len(values) == 1 else ["2 * j", "2 * j + 1"]
        step.inner += [f"{name}_v[{i}] = {v}" for i, v in zip(points, values, strict=True)]
        step.after.append(f"store({name}, row, {at}, {name}_v)")

    def narrow(self) -> list[str]:
        """Lines that write the values of single columns."""
        computed, written = self.narrow_lines()
        return [*computed, "if lane == 0:", *indented(written)] if written else []

    # The work of a CTA on a block of rows, in kernels that sum over rows.

    def block(self) -> list[str]:
        """Row statistics, rows distributed over warps; then columns with their sums over rows."""
        wide = [e for s in self.wide_stores() for e in s.lanes]
        wide += [e for s in self.epilogue.sinks for e in s.lanes]
        kept = self.stat_names(wide)
        rows = [*self.row(), *self.narrow()]
        rows += [f"{n}_of[row - first] = {n}" for n in kept]
        out = [f"first = block * {TALL_ROWS}"]
        if kept:
            self.rows.add("room")
            out += [f"{n}_of = room({TALL_ROWS})" for n in kept]
        if rows:
            head = [f"for turn in cutlass.range({TALL_ROWS // TALL_WARPS}):"]
            body = [f"row = first + turn * {TALL_WARPS} + warp", "if row < rows:"]
            out += [*head, *indented(body), *indented(rows, 2), "cute.arch.sync_threads()"]
        for piece in self.pieces:
            out += self.columns(piece, kept)
        return out

    def columns(self, piece: Piece, kept: list[str]) -> list[str]:
        """The columns of a piece: a warp has vectors of them, and loops over the rows."""
        sinks = [s for s in self.epilogue.row_sums if self.inside(s, piece)]
        step = self.stored(piece, sinks)
        if not step.exprs:
            return []
        own = self.once_loaded(self.with_groups(step.exprs))
        own += [f"{n} = {n}_of[row - first]" for n in kept]
        return self.through_rows(piece, step, sinks, own)

    def add(self, sink: SumRows, values: list[str], step: VectorWork) -> None:
        """Append the additions of values to a sum over rows."""
        name = f"{safe(sink.buffer)}_out"
        if self.epilogue.apart(sink):
            into = [f"{name}_{i}[j]" for i in (0, 1)]
        elif len(values) == 1:
            into = [f"{name}_v[j]"]
        else:
            into = [f"{name}_v[2 * j]", f"{name}_v[2 * j + 1]"]
        step.inner += [f"{x} = {x} + {v}" for x, v in zip(into, values, strict=True)]

    def rooms(self, sink: SumRows, piece: Piece) -> tuple[list[str], list[str]]:
        """Lines that make the registers of a sum over rows, and lines that write it."""
        name = f"{safe(sink.buffer)}_out"
        self.rows |= {"zeros", "store"}
        at = self.shifted("index", piece, self.begin(sink.span))
        if self.epilogue.apart(sink):
            where = [self.apart(at, self.split, i) for i in (0, 1)]
            made = [f"{name}_{i} = zeros({self.vec})" for i in (0, 1)]
            return made, [f"store({name}, part, {w}, {name}_{i})" for i, w in enumerate(where)]
        made = [f"{name}_v = zeros({len(sink.lanes) * self.vec})"]
        return made, [f"store({name}, part, {at}, {name}_v)"]

    def through_rows(
        self, piece: Piece, step: VectorWork, sinks: Sequence[SumRows], own: list[str]
    ) -> list[str]:
        """Loops over the vectors of a piece, and over the rows of the block for each."""
        rooms = [self.rooms(s, piece) for s in sinks]
        before, after = ([line for r in rooms for line in r[i]] for i in (0, 1))
        sides = teams(self.pieces, self.vec)
        wide = TALL_WARPS // sides
        vectors = piece.count // self.vec
        at = f"(turn * {wide} + warp % {wide}) * LANES + lane"
        ragged = bool(self.needed_groups(step.exprs, piece)) and vectors % LANES
        body = self.step(step, "index", piece, f"at < {vectors}" if ragged else "")
        rows = [
            f"for step in cutlass.range({TALL_ROWS // sides}):",
            f"{INDENT}row = first + step * {sides} + warp // {wide}",
            f"{INDENT}if row < rows:",
            *indented([*own, *body], 2),
        ]
        last = [f"part = block * {sides} + warp // {wide}", *after]
        head = f"for turn in cutlass.range({-(-vectors // (LANES * wide))}):"
        if ragged:
            last = [f"if at < {vectors}:", *indented(last)]
            return [head, *indented([*self.clamped(at, vectors), *before, *rows, *last])]
        inner = [f"index = {at}", f"if index < {vectors}:", *indented([*before, *rows, *last])]
        return [head, *indented(inner)]

    def module(self, names: list[str], body: list[str]) -> str:
        """The whole text."""
        size = f"{self.kernel.mainloop.rows} × {self.kernel.mainloop.width}"
        title = f"{self.kernel.name} of {self.program.graph.name}: rows {size}."
        notes = [f"    {o.name}: {o.access.word} {o.dtype}" for o in self.epilogue.operands]
        for store in self.epilogue.stores:
            shape = show_shape(self.program.buffers[store.buffer].shape)
            notes.append(f"    -> {store.buffer}: {shape} {store.dtype}")
        notes += [f"    -> {s.buffer}: sum over each block of rows" for s in self.epilogue.sinks]
        tensors = ", ".join(f"{n}: cute.Tensor" for n in names)
        lines = [
            '"""' + title,
            "",
            *notes,
            '"""',
            "",
            "import cutlass",
            "import cutlass.cute as cute",
            "from cutlass import Float32",
            f"from coda.kernels.rowwise.math import {', '.join(sorted(self.rows))}",
        ]
        if self.math:
            lines.append(f"from coda.kernels.device_math import {', '.join(sorted(self.math))}")
        warps, each, where = self.block_shape()
        lines += [
            "",
            "",
            "@cute.kernel",
            f"def kernel({tensors}, rows: cutlass.Int32):",
            "    cute.arch.griddepcontrol_wait()",
            "    cute.arch.griddepcontrol_launch_dependents()",
            "    thread, _, _ = cute.arch.thread_idx()",
            "    block, _, _ = cute.arch.block_idx()",
            "    lane = thread % LANES",
            *indented(where),
            *indented(body),
            "",
            "",
            "@cute.jit",
            f"def launch({tensors}, rows: cutlass.Int32, stream):",
            f"    kernel({', '.join(names)}, rows).launch(",
            f"        grid=[cute.ceil_div(rows, {each}), 1, 1],",
            f"        block=[{warps} * LANES, 1, 1],",
            "        stream=stream,",
            "        use_pdl=True,",
            "    )",
        ]
        return "\n".join(lines) + "\n"

    def block_shape(self) -> tuple[int, int, list[str]]:
        """Warps of a CTA, rows of a CTA, and lines that compute a warp's indices."""
        if self.epilogue.sinks:
            return TALL_WARPS, TALL_ROWS, ["warp = thread // LANES"]
        if self.is_total():
            return TOTAL_WARPS, 1, ["warp = thread // LANES", "row = block"]
        if self.only_folds():
            warps = fold_warps(self.kernel.mainloop.rows.size(self.program.sizes))
            return warps, LANES, ["warp = thread // LANES", "row = block * LANES + lane"]
        return WARPS, WARPS, [f"row = block * {WARPS} + thread // LANES"]
