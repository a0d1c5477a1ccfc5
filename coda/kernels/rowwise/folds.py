"""Statistics of a row-wise kernel that merge partials of earlier kernels -> lines of source.

The partials of a row [M, parts] are merged by the lanes of its warp: lane l takes partials l,
l + 32, ..., then the warp reduces. A kernel that only merges partial sums over rows, [columns,
parts] stored transposed, has a row in each lane, so that loads coalesce. A kernel that only reduces
to a single row has one CTA, all of whose warps share the partials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coda.ir.dims import ONE
from coda.ir.monoids import MONOIDS
from coda.kernels.lines import safe, stored
from coda.kernels.rowwise.pieces import COLUMN, LANES, fold_warps, reads_columns
from coda.kernels.rowwise.plan import has_planes
from coda.kernels.rowwise.statistics import Statistics
from coda.kernels.rowwise.sweeps import INDENT, indented
from coda.lowering.program.access import ColumnVector, Line, OneElement, Partial
from coda.lowering.program.epilogue import Expr, Statistic, StoreExpr

TOTAL_WARPS = LANES  # warps of a CTA that reduces to one row; a lane of the first merges each
Fold = tuple[list[str], list[str], list[str]]  # start, step and end


class Folds(Statistics):
    """The source of statistics that are merged from an operand."""

    def fold(self, stat: Statistic) -> list[str]:
        """A statistic of an operand: lanes merge its parts at a stride of 32, then the warp."""
        source = safe(stat.operand or "")
        if not stat.count:
            count, steps = f"{source}.shape[1]", f"cute.ceil_div({source}.shape[1], 32)"
            start, inner, end = self.of_parts(stat)
        else:
            parts = self.parts(stat)
            count, steps = str(parts), str(-(-parts // 32))
            start, inner, end = self.of_tiles(stat)
        loop = [
            f"for step in cutlass.range({steps}):",
            f"{INDENT}part = step * LANES + lane",
            f"{INDENT}if part < {count}:",
        ]
        return [*start, *loop, *indented(inner, 2), *end]

    def parts(self, stat: Statistic) -> int:
        """The number of partials of a statistic: one for each tile of columns."""
        return self.program.buffers[stat.operand or ""].shape[-1].size(self.program.sizes)

    def of_tiles(self, stat: Statistic) -> Fold:
        """A merge of partials of column tiles, the last of which may be narrower."""
        source, monoid = safe(stat.operand or ""), MONOIDS[stat.monoid]
        two = f"{source}[row, 2 * part]", f"{source}[row, 2 * part + 1]"
        if monoid.of_pairs:
            return self.accumulate(stat, *two)
        if not monoid.counted:
            return self.accumulate(stat, f"{source}[row, part]")
        parts = self.parts(stat)
        last = stat.width - stat.count * (parts - 1)
        count = f"cutlass.select_(part < {parts - 1}, Float32({stat.count}.0), Float32({last}.0))"
        return self.moments(stat, f"({', '.join((count, *two))})")

    def of_parts(self, stat: Statistic) -> Fold:
        """A merge of any number of partials, or a reduction of values of rows."""
        value = f"{safe(stat.operand or '')}[row, part]"
        value += ".to(Float32)" if stat.operand in self.lines else ""
        if not MONOIDS[stat.monoid].counted:
            return self.accumulate(stat, value)
        self.rows.add("zero")
        return self.moments(stat, f"(Float32(1.0), {value}, zero())")

    def accumulate(self, stat: Statistic, *values: str) -> Fold:
        """A fold of values, or of pairs of two, by the lanes of a warp."""
        planes = has_planes(stat)
        value = ", ".join(f"({v},)" for v in values) if planes else values[0]
        end = self.finish(stat, self.over_lanes(stat))
        return [self.start(stat)], [self.step(stat, value)], end

    def moments(self, stat: Statistic, state: str) -> Fold:
        """A merge of (count, mean, Σ(x − mean)²), whose last plane becomes the variance."""
        inner = [f"{stat.name}_s = {self.merge(stat)}({stat.name}_s, {state})"]
        return [self.start(stat)], inner, self.finish(stat, self.over_lanes(stat))

    def wide_stores(self) -> list[StoreExpr]:
        """The stores with more than one column."""
        return [s for s in self.epilogue.stores if not self.once(s)]

    def once(self, store: StoreExpr) -> bool:
        """Whether a store has one column."""
        return isinstance(store.access, ColumnVector) or self.kernel.mainloop.width == 1

    def narrow_lines(self) -> tuple[list[str], list[str]]:
        """Lines that compute the values of single columns, and lines that write them."""
        stores = [s for s in self.epilogue.stores if self.once(s)]
        exprs = [e for s in stores for e in s.lanes]
        self.each = 1
        lines, values = self.assigned(exprs, "w")
        loads = self.one_column(exprs) if self.kernel.mainloop.width == 1 else []
        written: list[str] = []
        places = [(store, i) for store in stores for i in range(len(store.lanes))]
        for (store, i), value in zip(places, values, strict=True):
            target = f"{safe(store.buffer)}_out"
            shown = stored(value.replace("[j]", "[0]"), store.dtype, self.math)
            written.append(f"{target}[row, {i}] = Float32({shown}).to({target}.element_type)")
        return [*loads, *(line.replace("[j]", "[0]") for line in lines)], written

    def one_column(self, exprs: Sequence[Expr]) -> list[str]:
        """Lines that load the only column of a row."""
        out: list[str] = []
        for p in self.vectors_of(exprs, "0", self.pieces[0]):
            self.rows.add("load")
            x = safe(p.name)
            loaded = f"load({x}, {p.row}, {p.at}, {p.size})"
            out.append(f"{x}{p.suffix} = {self.as_floats(p, loaded) if p.inside else loaded}")
        if reads_columns(list(exprs)):
            self.rows.add("numbers")
            out.append(f"{COLUMN}_v = numbers(0, 1)")
        return out

    # CTAs that only merge partials over rows.

    def only_folds(self) -> bool:
        """Whether a row needs merged partials over rows and values of single columns only."""
        read = (Line, Partial, ColumnVector, OneElement)
        few = all(isinstance(o.access, read) for o in self.epilogue.operands)
        of = self.epilogue.statistics
        folded = all(s.operand in self.tall and MONOIDS[s.monoid].sums for s in of)
        plain = folded and not self.wide_stores() and few
        return bool(self.tall) and plain and (not self.lines or self.kernel.mainloop.rows == ONE)

    def folds(self) -> list[str]:
        """A lane has a row, whose parts the warps share; the first warp adds their sums."""
        self.rows |= {"room", "zero"}
        warps = fold_warps(self.kernel.mainloop.rows.size(self.program.sizes))
        folded = [(s.name, safe(s.operand or "")) for s in self.epilogue.statistics]
        out = [f"{name}_of = room({warps} * LANES)" for name, _ in folded]
        for name, source in folded:
            inner = [
                f"for step in cutlass.range({name}_each, unroll=8):",
                f"    {name}_s = {name}_s + {source}[row, step * {warps} + warp]",
                f"if {name}_last < {source}.shape[1]:",
                f"    {name}_s = {name}_s + {source}[row, {name}_last]",
            ]
            out += [
                f"{name}_each = {source}.shape[1] // {warps}",
                f"{name}_last = {name}_each * {warps} + warp",
                f"{name}_s = zero()",
                "if row < rows:",
                *indented(inner),
            ]
            out.append(f"{name}_of[warp * LANES + lane] = {name}_s")
        names = [name for name, _ in folded]
        totals = [f"{name} = {name}_of[lane]" for name in names]
        totals.append(f"for other in cutlass.range_constexpr(1, {warps}):")
        totals += [f"    {name} = {name} + {name}_of[other * LANES + lane]" for name in names]
        computed, written = self.narrow_lines()
        own = self.once_loaded([e for s in self.epilogue.stores for e in s.lanes])
        rest = indented([*totals, *own, *computed, *written])
        return [*out, "cute.arch.sync_threads()", "if warp == 0 and row < rows:", *rest]

    def is_total(self) -> bool:
        """Whether a kernel only reduces values of rows, each to one number."""
        return bool(self.lines) and self.only_folds()

    def total(self) -> list[str]:
        """Threads take values in turn; the first warp merges the results of the warps."""
        self.rows.add("room")
        out, merged = list[str](), list[str]()
        for stat in self.epilogue.statistics:
            name, source = stat.name, safe(stat.operand or "")
            monoid = MONOIDS[stat.monoid]
            part = replace(stat, monoid=monoid.average_of or stat.monoid)
            start, inner, end = self.of_parts(part)
            threads = f"{TOTAL_WARPS} * LANES"
            loop = [
                f"for step in cutlass.range(cute.ceil_div({source}.shape[1], {threads})):",
                f"{INDENT}part = step * {threads} + thread",
                f"{INDENT}if part < {source}.shape[1]:",
            ]
            planes = [name]
            start2, inner2, end2 = self.accumulate(stat, f"{name}_of[lane]")
            if monoid.counted:
                planes = [f"{name}_{plane}" for plane in ("n", *monoid.planes)]
                state = ", ".join(f"{p}_of[lane]" for p in planes)
                start2, inner2, end2 = self.moments(stat, f"({state})")
            out += [f"{p}_of = room({TOTAL_WARPS})" for p in planes]
            out += [*start, *loop, *indented(inner, 2), *end, "if lane == 0:"]
            out += [f"{INDENT}{p}_of[warp] = {p}" for p in planes]
            merged += [*start2, *inner2, *end2]
        computed, written = self.narrow_lines()
        own = self.once_loaded([e for s in self.epilogue.stores for e in s.lanes])
        last = [*merged, *own, *computed, "if lane == 0:", *indented(written)]
        return [*out, "cute.arch.sync_threads()", "if warp == 0:", *indented(last)]
