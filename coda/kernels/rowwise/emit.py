"""A row-wise kernel -> the source of a Python module: a CuTe DSL kernel with threads for each row.

Statistics come first, independent ones in one sweep over the row, then a sweep that stores and
takes the statistics that only single columns read. `plan.py` chooses the threads of a row, and
whether the row stays in registers between its sweeps or is read again.

In a kernel that sums over rows, a CTA has a block of rows. It walks through them, with the sums of
a thread's columns in registers, and writes a partial of each. Where these do not fit, its warps
first compute the statistics of all rows; then each warp has some columns of them. A kernel that
only merges such partials has a row in each lane, so that loads coalesce.

    x / rms(x)    sweep 1: Σ x² over the row    sweep 2: store x · rsqrt(mean)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from coda.ir.dims import ONE, product, show_shape
from coda.ir.graph import Reshape, Slice
from coda.kernels.lines import safe, stored
from coda.kernels.rowwise.folds import TOTAL_WARPS, Folds
from coda.kernels.rowwise.mainloop import Rowwise
from coda.kernels.rowwise.other_rows import SEQUENCE
from coda.kernels.rowwise.pieces import LANES, Piece, fold_warps
from coda.kernels.rowwise.plan import TALL_ROWS, TALL_WARPS, covers, sums_whole
from coda.kernels.rowwise.source import CUT, RowSource
from coda.kernels.rowwise.sweeps import INDENT, VectorWork, indented
from coda.lowering.program.access import ColumnVector, Line, Partial
from coda.lowering.program.epilogue import Expr, Statistic, StoreExpr, SumRows
from coda.lowering.program.program import Program


def emit_rowwise(program: Program, kernel: Rowwise, *, padded: bool = False) -> RowSource:
    """The module of a row-wise kernel.

    With `padded`, rows of matrices begin at multiples of 16 bytes, whatever their width.
    """
    return _RowwiseEmitter(program, kernel, padded=padded).emit()


class _RowwiseEmitter(Folds):
    def emit(self) -> RowSource:
        if sums_whole(self.epilogue):
            body = self.sequences()
        elif self.plan.summed:
            body = self.walk()
        elif self.epilogue.sinks:
            body = self.block()
        elif self.is_total():
            body = self.total()
        elif self.only_folds():
            body = self.folds()
        else:
            row = [*self.row(), *self.wide(), *self.narrow()]
            guarded = ["if row < rows:", *indented(row)] if self.plan.rows > 1 else row
            body = [*self.shared_states(), *guarded]
        reordered = [f"{safe(s.buffer)}_out" for s in self.epilogue.stores if s.rows]
        shared = self.kernel.body.in_place
        reordered += [safe(name) for name in shared]
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
        axes += tuple((name, len(spread.lead)) for name, spread in shared.items())
        types, sizes = self.types(parameters), tuple(self.sizes)
        return RowSource(text, name, parameters, types, partials, padded, axes, sizes)

    def parameters(self) -> tuple[tuple[str, str, int, bool], ...]:
        found: list[tuple[str, str, int, bool]] = []
        for o in self.epilogue.operands:
            match o.access:
                case Line():
                    columns = -1
                case Partial(planes=planes):
                    parts = self.program.buffers[o.name].shape[-1].size(self.program.sizes)
                    columns = 0 if o.name in self.tall else parts * planes
                case ColumnVector() if self.is_cut(o.name):
                    columns = CUT
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

    def is_cut(self, name: str) -> bool:
        """Whether an operand is one column of a matrix in memory with several."""
        node = self.kernel.body.nodes.get(name)
        while node is not None and node not in self.program.places:
            if isinstance(node, Slice):
                return True
            node = node.operands[0] if isinstance(node, Reshape) else None
        place = self.program.places[node] if node is not None else None
        return place is not None and self.program.buffers[place.buffer].shape[-1] != ONE

    def types(self, parameters: tuple[tuple[str, str, int, bool], ...]) -> tuple[str, ...]:
        stores = {s.buffer: s.dtype for s in self.epilogue.stores}
        stores = {name: "byte" if t.by_bytes else t.name for name, t in stores.items()}
        stores |= {s.buffer: "f32" for s in self.epilogue.sinks}
        return tuple(
            stores[source] if written else self.kinds[source].dtype.name
            for _, source, _, written in parameters
        )

    # The work on one row.

    def row(self) -> list[str]:
        """Lines that compute the statistics of one row, but those of the sweep that stores."""
        body = self.once_loaded(self.epilogue.exprs)
        body += self.hold()
        for fold in [s for s in self.epilogue.statistics if s.operand]:
            body += self.fold(fold)
        for level in self.early():
            body += self.sweep(level)
        return body

    def wide(self) -> list[str]:
        """The sweep that stores, and takes the last statistics."""
        late = self.late()
        out = [self.start(s) for s in self.own(late)]
        for piece in self.pieces:
            self.enter(piece)
            if self.stored(piece, late, 1).exprs:
                out += self.loop(piece, lambda count, p=piece: self.stored(p, late, count))
        return [*out, *(self.ends(late) if late else [])]

    def inside(self, item: StoreExpr | SumRows, piece: Piece) -> bool:
        """Whether a store or a sink covers the columns of a piece."""
        return covers(self.epilogue, item.span, piece)

    def stored(self, piece: Piece, late: Sequence[Statistic], count: int) -> VectorWork:
        """The work that computes the stores of a piece, its sums over rows, and statistics."""
        items = [s for s in (*self.wide_stores(), *self.epilogue.row_sums) if self.inside(s, piece)]
        chosen = self.chosen(late, piece)
        exprs = [[piece.special(e) for e in s.lanes] for s in items]
        reduced = self.reduced_in(chosen, piece)
        work = VectorWork([*(e for many in exprs for e in many), *reduced], [])
        work.inner, values = self.assigned(work.exprs, "v")
        for item, many in zip(items, exprs, strict=True):
            mine, values = values[: len(many)], values[len(many) :]
            if isinstance(item, StoreExpr):
                self.keep(item, mine, piece, work)
            else:
                self.add(item, mine, piece, work)
        self.take(chosen, values, work, count)
        return work

    def keep(self, store: StoreExpr, values: list[str], piece: Piece, work: VectorWork) -> None:
        """Append registers, assignments and the write of one wide store to the work."""
        name, tag = f"{safe(store.buffer)}_out", self.tag
        values = [stored(v, store.dtype, self.math) for v in values]
        self.rows |= {"vector", "store"}
        at = self.shifted(f"index{tag}", piece, self.begin(store.span))
        if self.epilogue.apart(store):
            work.rooms += [f"{name}_{i}{tag} = vector({self.vec})" for i in "ab"]
            pairs = zip("ab", values, strict=True)
            work.inner += [self.assign(f"{name}_{i}{tag}", v) for i, v in pairs]
            for lane, i in enumerate("ab"):
                where = self.apart(at, self.split, lane)
                work.after.append(f"store({name}, row, {where}, {name}_{i}{tag})")
            return
        work.rooms.append(f"{name}_v{tag} = vector({len(values) * self.vec})")
        wide = [self.assign(f"{name}_v{tag}", v, i, len(values)) for i, v in enumerate(values)]
        work.inner += wide
        work.after.append(f"store({name}, row, {at}, {name}_v{tag})")

    def narrow(self) -> list[str]:
        """Lines that write the values of single columns."""
        computed, written = self.narrow_lines()
        return [*computed, "if place == 0:", *indented(written)] if written else []

    # The work of a CTA that walks through a block of rows, with sums over them in registers.

    def walk(self) -> list[str]:
        """Each row in turn; the sums of a thread's columns are written at the end."""
        made, written = [list[str](), list[str]()]
        for i, piece in enumerate(self.pieces):
            self.enter(piece)
            threads, vectors = self.plan.threads, piece.count // self.vec
            full, ragged = divmod(vectors, threads)
            for sink in [s for s in self.epilogue.row_sums if self.inside(s, piece)]:
                name, size = f"{safe(sink.buffer)}_out", self.vec
                self.rows |= {"zero_vectors", "store"}
                at = self.shifted("index", piece, self.begin(sink.span))
                split = self.epilogue.apart(sink)
                size *= 1 if split else len(sink.lanes)
                for lane, suffix in enumerate("ab" if split else "v"):
                    found = f"{name}_{suffix}_of{i}"
                    where = self.apart(at, self.split, lane) if split else at
                    made.append(f"{found} = zero_vectors({size}, {full + (ragged > 0)})")
                    one = [f"index = k * {threads} + place"]
                    one.append(f"store({name}, part, {where}, {found}[k])")
                    head = f"for k in cutlass.range_constexpr({full}):"
                    written += [head, *indented(one)] if full else []
                    if ragged:
                        written += [f"index = {full} * {threads} + place"]
                        written += [f"if index < {vectors}:"]
                        written += [f"{INDENT}store({name}, part, {where}, {found}[{full}])"]
        sides = self.plan.rows
        row = [*self.row(), *self.wide(), *self.narrow()]
        slot = [f"slot = step % 2 * {sides} + side"] if self.plan.warps > 1 else []
        return [
            *self.sequence_lines(),
            *self.shared_states(),
            *made,
            f"for step in cutlass.range({TALL_ROWS // sides}):",
            f"{INDENT}row = {self.first} + step * {sides} + side",
            f"{INDENT}if row < {self.end}:",
            *indented([*slot, *row], 2),
            self.part("side"),
            *written,
        ]

    # The work of a CTA on a block of rows, in kernels that sum over rows.

    def block(self) -> list[str]:
        """Row statistics, rows distributed over warps; then columns with their sums over rows."""
        wide = [e for s in self.wide_stores() for e in s.lanes]
        wide += [e for s in self.epilogue.sinks for e in s.lanes]
        kept = self.stat_names(wide)
        rows = [*self.row(), *self.narrow()]
        rows += [f"{n}_of[row - first] = {n}" for n in kept]
        out = [f"first = {self.first}"]
        if kept:
            self.rows.add("room")
            out += [f"{n}_of = room({TALL_ROWS})" for n in kept]
        if rows:
            head = [f"for turn in cutlass.range({TALL_ROWS // TALL_WARPS}):"]
            body = [f"row = first + turn * {TALL_WARPS} + warp", f"if row < {self.end}:"]
            out += [*head, *indented(body), *indented(rows, 2), "cute.arch.sync_threads()"]
        for piece in self.pieces:
            out += self.columns(piece, kept)
        return [*self.sequence_lines(), *out]

    def columns(self, piece: Piece, kept: list[str]) -> list[str]:
        """The columns of a piece: a warp has vectors of them, and loops over the rows."""
        self.enter(piece)
        exprs = self.stored(piece, (), 1).exprs
        if not exprs:
            return []
        sinks = [s for s in self.epilogue.row_sums if self.inside(s, piece)]
        own = self.once_loaded(self.with_groups(exprs))
        own += [f"{n} = {n}_of[row - first]" for n in kept]
        return self.through_rows(piece, exprs, sinks, own)

    def add(self, sink: SumRows, values: list[str], piece: Piece, work: VectorWork) -> None:
        """Append the additions of values to a sum over rows."""
        name = f"{safe(sink.buffer)}_out"
        into = [(f"{name}_v", i, len(values)) for i in range(len(values))]
        if self.epilogue.apart(sink):
            into = [(f"{name}_{i}", 0, 1) for i in "ab"]
        of = f"_of{self.pieces.index(piece)}[{self.slot}]" if self.plan.summed else ""
        for (x, lane, lanes), value in zip(into, values, strict=True):
            work.inner.append(self.added(f"{x}{of}", value, lane, lanes))

    def sums(self, sink: SumRows, piece: Piece) -> tuple[list[str], list[str]]:
        """Lines that make the registers of a sum over rows, and lines that write it."""
        name = f"{safe(sink.buffer)}_out"
        self.rows |= {"zeros", "store"}
        at = self.shifted("index", piece, self.begin(sink.span))
        if self.epilogue.apart(sink):
            where = [self.apart(at, self.split, lane) for lane in (0, 1)]
            made = [f"{name}_{i} = zeros({self.vec})" for i in "ab"]
            pairs = zip(where, "ab", strict=True)
            return made, [f"store({name}, part, {w}, {name}_{i})" for w, i in pairs]
        made = [f"{name}_v = zeros({len(sink.lanes) * self.vec})"]
        return made, [f"store({name}, part, {at}, {name}_v)"]

    def through_rows(
        self, piece: Piece, exprs: Sequence[Expr], sinks: Sequence[SumRows], own: list[str]
    ) -> list[str]:
        """Loops over the vectors of a piece, and over the rows of the block for each."""
        found = [self.sums(s, piece) for s in sinks]
        before, after = ([line for r in found for line in r[i]] for i in (0, 1))
        sides = self.plan.rows
        wide = TALL_WARPS // sides
        vectors = piece.count // self.vec
        at = f"(turn * {wide} + warp % {wide}) * LANES + lane"
        ragged = bool(self.needed_groups(exprs, piece)) and vectors % LANES
        self.next()
        inside = f"at < {vectors}" if ragged else ""
        body = self.batch(piece, lambda count: self.stored(piece, (), count), "index", 1, inside)
        self.tag = ""
        rows = [
            f"for step in cutlass.range({TALL_ROWS // sides}):",
            f"{INDENT}row = first + step * {sides} + warp // {wide}",
            f"{INDENT}if row < {self.end}:",
            *indented([*own, *body], 2),
        ]
        last = [self.part(f"warp // {wide}"), *after]
        head = f"for turn in cutlass.range({-(-vectors // (LANES * wide))}):"
        if ragged:
            last = [f"if at < {vectors}:", *indented(last)]
            clamped = [f"at = {at}", f"index = {self.clamped('at', vectors)}"]
            return [head, *indented([*clamped, *before, *rows, *last])]
        inner = [f"index = {at}", f"if index < {vectors}:", *indented([*before, *rows, *last])]
        return [head, *indented(inner)]

    # The work of a CTA on some columns of a whole sequence, with nothing but sums over its rows.

    def sequences(self) -> list[str]:
        """Each warp has a row in turn, each lane a vector of it; the first warp adds the sums."""
        (piece,) = self.pieces
        self.enter(piece)
        sinks, vectors = self.epilogue.row_sums, piece.count // self.vec
        exprs = self.stored(piece, (), 1).exprs
        found = [self.sums(s, piece) for s in sinks]
        made, written = ([line for r in found for line in r[i]] for i in (0, 1))
        self.next()
        row = [*self.once_loaded(exprs)]
        row += self.batch(piece, lambda count: self.stored(piece, (), count), "index", 1)
        self.tag = ""
        self.rows.add("room")
        names = [f"{safe(s.buffer)}_out_v" for s in sinks]
        slot = f"[({{}} * {self.vec} + j) * LANES + lane]"
        each, turn = f"for j in cutlass.range_constexpr({self.vec}):", slot.format("other")
        shared = [f"{n}_of{slot.format('warp')} = {n}[j]" for n in names]
        merged = [f"{n}[j] = {n}[j] + {n}_of{turn}" for n in names]
        others = [f"for other in cutlass.range_constexpr(1, {TALL_WARPS}):"]
        others += indented([each, *indented(merged)])
        return [
            *self.sequence_lines(),
            f"at = block % {self.chunks} * LANES + lane",
            f"index = {self.clamped('at', vectors)}",
            *(f"{n}_of = room({TALL_WARPS * LANES * self.vec})" for n in names),
            *made,
            f"for step in cutlass.range(cute.ceil_div({self.end} - {self.first}, {TALL_WARPS})):",
            f"{INDENT}row = {self.first} + step * {TALL_WARPS} + warp",
            f"{INDENT}if row < {self.end}:",
            *indented(row, 2),
            each,
            *indented(shared),
            "cute.arch.sync_threads()",
            f"if (warp == 0) & (at < {vectors}):",
            *indented([*others, f"part = {SEQUENCE}", *written]),
        ]

    def module(self, names: list[str], body: list[str]) -> str:
        """The whole text."""
        size = f"{self.kernel.mainloop.rows} × {self.kernel.mainloop.width}"
        title = f"{self.kernel.name} of {self.program.graph.name}: rows {size}."
        notes = [f"    {o.name}: {o.access.word} {o.dtype}" for o in self.epilogue.operands]
        for store in self.epilogue.stores:
            shape = show_shape(self.program.buffers[store.buffer].shape)
            notes.append(f"    -> {store.buffer}: {shape} {store.dtype}")
        notes += [f"    -> {s.buffer}: sum over each block of rows" for s in self.epilogue.sinks]
        counts = ["rows", *self.sizes.values()]
        declared = [f"{n}: cute.Tensor" for n in names]
        declared = ", ".join(declared + [f"{n}: cutlass.Int32" for n in counts])
        passed = ", ".join([*names, *counts])
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
            f"def kernel({declared}):",
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
            f"def launch({declared}, stream):",
            f"    kernel({passed}).launch(",
            f"        grid=[{self.blocks_of(each)}, 1, 1],",
            f"        block=[{warps} * LANES, 1, 1],",
            "        stream=stream,",
            "        use_pdl=True,",
            "    )",
        ]
        return "\n".join(lines) + "\n"

    def block_shape(self) -> tuple[int, int, list[str]]:
        """Warps of a CTA, rows of a CTA, and lines that compute a thread's indices."""
        warp = "warp = thread // LANES"
        if self.is_total():
            return TOTAL_WARPS, 1, [warp, "row = block"]
        if not self.epilogue.sinks and self.only_folds():
            warps = fold_warps(self.kernel.mainloop.rows.size(self.program.sizes))
            return warps, LANES, [warp, "row = block * LANES + lane"]
        threads, rows = self.plan.threads, self.plan.rows
        if sums_whole(self.epilogue):
            return TALL_WARPS, 1, [warp]
        if self.epilogue.sinks and not self.plan.summed:
            return TALL_WARPS, TALL_ROWS, [warp, "place = lane"]
        if self.plan.warps == 1:
            shape = ["place = lane"]
            side = "thread // LANES"
        else:
            shape = [f"place = thread % {threads}", "warp = place // LANES"]
            side = f"thread // {threads}"
        shape.append(f"side = {side}" if self.plan.summed else self.first_row(side))
        return self.plan.warps * rows, self.plan.block, shape

    def first_row(self, side: str) -> str:
        """The line that computes the row of a thread, the only one that it has."""
        rows = self.plan.rows
        return f"row = block * {rows} + {side}" if rows > 1 else "row = block"
