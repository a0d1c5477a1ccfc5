"""The sweeps of a warp over a row -> lines of source that load, reduce and store each piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from coda.ir.monoids import MONOIDS
from coda.kernels.lines import Lines, safe
from coda.kernels.rowwise.mainloop import Rowwise
from coda.kernels.rowwise.pieces import (
    LANES,
    Piece,
    leaves_of_kind,
    loads_of,
    pieces_of,
    stats_of,
    vector_length,
)
from coda.lowering.program.access import (
    ColumnVector,
    Grouped,
    Line,
    OneElement,
    Partial,
    Periodic,
    RowVector,
    Span,
    Tile,
)
from coda.lowering.program.epilogue import (
    Epilogue,
    Expr,
    Literal,
    Load,
    Operand,
    Stat,
    Statistic,
)
from coda.lowering.program.program import Program

INDENT = "    "


def indented(lines: Iterable[str], depth: int = 1) -> list[str]:
    """Lines indented by `depth` levels."""
    return [INDENT * depth + line for line in lines]


@dataclass
class VectorWork:
    """The work on one vector of columns (or column pairs).

    Attributes:
        exprs: the expressions whose loads it needs.
        inner: lines for each element `j` of the vector.
        rooms: lines that make registers for its results.
        after: lines after the last element.
    """

    exprs: list[Expr]
    inner: list[str]
    rooms: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


class Sweeps:
    """The source of sweeps over one row of a kernel."""

    def __init__(self, program: Program, kernel: Rowwise, *, padded: bool = False) -> None:
        self.program, self.kernel, self.padded = program, kernel, padded
        self.epilogue: Epilogue = kernel.body.epilogue
        self.kinds: dict[str, Operand] = {o.name: o for o in self.epilogue.operands}
        self.lanes, self.split = self.epilogue.lanes, self.epilogue.split
        self.points = kernel.mainloop.width // self.lanes
        self.pieces: tuple[Piece, ...] = pieces_of(
            kernel.body, kernel.mainloop.width, padded=padded
        )
        self.vec = vector_length(self.epilogue, self.pieces)
        self.enter(self.pieces[0])
        self.groups = {s.name: s for s in self.epilogue.statistics if s.group}
        folds = [s for s in self.epilogue.statistics if s.operand]
        self.tall: set[str | None] = {s.operand for s in folds if not s.count}
        self.lines = self.epilogue.lines
        self.math: set[str] = set()
        self.rows: set[str] = {"LANES"}

    # Leaves.

    def leaf(self, expr: Expr) -> str:
        match expr:
            case Load(operand=name, lane=lane):
                return self.load(self.kinds[name], lane)
            case Stat(name=name, plane=plane):
                return f"{name}_{plane}" if plane else name
        raise AssertionError(expr)

    def load(self, operand: Operand, lane: int) -> str:
        name = safe(operand.name)
        match operand.access:
            case ColumnVector() | OneElement():
                return f"{name}_0"
            case Grouped():
                return f"{name}_v[0]"
            case Periodic():
                return f"{name}_v[j]"
            case Tile() if self.split:
                return f"{name}_{lane}[j]"
            case RowVector() | Tile():
                return f"{name}_v[2 * j + {lane}]" if self.lanes == 2 else f"{name}_v[j]"
            case Line() | Partial():
                raise AssertionError(operand)
            case _ as never:
                assert_never(never)

    def assigned(self, exprs: Sequence[Expr], prefix: str) -> tuple[list[str], list[str]]:
        """Lines that compute expressions, and the texts of their values."""
        lines = Lines(self.leaf, prefix=prefix)
        values = lines.assign(exprs)
        self.math |= lines.imported
        return lines.lines, values

    def reads(self, exprs: Iterable[Expr | None]) -> set[str]:
        """The statistics that expressions read, directly or through statistics of groups."""
        found: set[str] = set()
        stack = [s for e in exprs for s in stats_of(e)]
        while stack:
            name = stack.pop()
            if name not in found:
                found.add(name)
                if name in self.groups:
                    stack += stats_of(self.groups[name].expr)
        return found

    def once_loaded(self, exprs: Iterable[Expr | None]) -> list[str]:
        """Lines that load the column vectors and scalars that expressions read."""
        names = loads_of([e for e in exprs if e is not None])
        lines = []
        for o in self.epilogue.operands:
            if isinstance(o.access, ColumnVector | OneElement) and o.name in names:
                row = "row" if o.access.varies_with_row else "0"
                lines.append(f"{safe(o.name)}_0 = {safe(o.name)}[{row}, 0].to(Float32)")
        return lines

    def with_groups(self, exprs: Iterable[Expr | None]) -> list[Expr | None]:
        """Expressions, and the expressions of the group statistics that they read."""
        exprs = list(exprs)
        return [*exprs, *(g.expr for n, g in self.groups.items() if n in self.reads(exprs))]

    # Vectors.

    def enter(self, piece: Piece) -> None:
        """Set the vector length for a piece; in `padded` rows the tail has shorter vectors."""
        if self.padded:
            self.vec = vector_length(self.epilogue, [piece])

    def shifted(self, index: str, piece: Piece, first: int = 0) -> str:
        """The vector index in a tensor whose columns begin at `first`."""
        shift = (piece.first - first) // self.vec
        return f"({index} + {shift})" if shift else index

    def apart(self, index: str, split: int, lane: int) -> str:
        """The vector index of one lane, if lanes are `split` columns apart."""
        block = split // self.vec
        if block == 1:
            return f"{index} * 2 + {lane}"
        return f"{index} // {block} * {2 * block} + {index} % {block} + {lane * block}"

    def begin(self, span: Span | None) -> int:
        """The first column (or column pair) of a tensor with a span."""
        return span.first // self.lanes if span else 0

    def loads(self, exprs: Sequence[Expr], index: str, piece: Piece) -> list[str]:
        """Lines that load the vectors that expressions read."""
        lines = []
        for name in sorted(loads_of(list(exprs))):
            x, vec, at = safe(name), self.vec, self.shifted(index, piece)
            match self.kinds[name].access:
                case ColumnVector() | OneElement():  # loaded once for the row
                    continue
                case RowVector():
                    lines.append(f"{x}_v = load({x}, 0, {at}, {self.lanes * vec})")
                case Tile(span=span) if self.split:
                    at = self.shifted(index, piece, self.begin(span))
                    for lane in (0, 1):
                        where = self.apart(at, self.split, lane)
                        lines.append(f"{x}_{lane} = load({x}, row, {where}, {vec})")
                case Tile(span=span):
                    at = self.shifted(index, piece, self.begin(span))
                    lines.append(f"{x}_v = load({x}, row, {at}, {self.lanes * vec})")
                case Periodic(period=period):
                    lines.append(f"{x}_v = load({x}, row, {at} % {period // vec}, {vec})")
                case Grouped(size=size):
                    lines.append(f"{x}_v = load({x}, row, {at} // {size // vec}, 1)")
                case Line() | Partial():
                    raise AssertionError(name)
                case _ as never:
                    assert_never(never)
            self.rows.add("load")
        return lines

    def needed_groups(self, exprs: Sequence[Expr], piece: Piece) -> list[tuple[Statistic, Expr]]:
        """The group statistics that expressions read in a piece, in order of dependence."""
        names = self.reads(exprs)
        chosen = [s for n, s in self.groups.items() if n in names and s.expr is not None]
        return [(s, piece.special(s.expr)) for s in chosen if s.expr is not None]

    def group_lines(self, groups: Sequence[tuple[Statistic, Expr]]) -> list[str]:
        """Lines that compute group statistics over the lanes that share each group."""
        out: list[str] = []
        for stat, expr in groups:
            name = stat.name
            lines, (value,) = self.assigned([expr], f"{name}_x")
            self.rows |= {"zero", "lanes_sum"}
            share = f" * {1.0 / stat.group!r}" if MONOIDS[stat.monoid].average_of else ""
            lanes = stat.group // self.lanes // self.vec
            out += [
                f"{name}_s = zero()",
                f"for j in cutlass.range_constexpr({self.vec}):",
                *indented([*lines, f"{name}_s = {name}_s + {value}"]),
                f"{name} = lanes_sum({name}_s, {lanes}){share}",
            ]
        return out

    def step(self, step: VectorWork, index: str, piece: Piece, inside: str) -> list[str]:
        """The body of a loop over vectors; lanes do not diverge before reductions over lanes."""
        groups = self.needed_groups(step.exprs, piece)
        exprs = [*step.exprs, *(e for _, e in groups)]
        loaded = [*self.loads(exprs, index, piece), *self.group_lines(groups)]
        rest = [*step.rooms, f"for j in cutlass.range_constexpr({self.vec}):"]
        rest += [*indented(step.inner), *step.after]
        return [*loaded, *([f"if {inside}:", *indented(rest)] if inside else rest)]

    def loop(self, piece: Piece, step: VectorWork) -> list[str]:
        """A sweep over a piece: lanes take vectors in turn, and loop over their elements."""
        vectors = piece.count // self.vec
        head = f"for step in cutlass.range({-(-vectors // LANES)}):"
        if self.needed_groups(step.exprs, piece) and vectors % LANES:
            lines = self.clamped("step * LANES + lane", vectors)
            return [head, *indented([*lines, *self.step(step, "index", piece, f"at < {vectors}")])]
        lines = ["index = step * LANES + lane", f"if index < {vectors}:"]
        return [head, *indented(lines), *indented(self.step(step, "index", piece, ""), 2)]

    def clamped(self, at: str, vectors: int) -> list[str]:
        """Lines that compute a lane's vector index, clamped to the last vector."""
        last = f"cutlass.Int32({vectors - 1})"
        return [f"at = {at}", f"index = cutlass.select_(at < {vectors}, at, {last})"]

    # Statistics of the row.

    def levels(self) -> list[list[Statistic]]:
        """Statistics of the row in levels; those of one level are independent of each other."""
        own = [s for s in self.epilogue.statistics if s.expr is not None and not s.group]
        known = {s.name for s in self.epilogue.statistics if s.operand} | self.groups.keys()
        left, found = own, list[list[Statistic]]()
        while left:
            now = [s for s in left if self.reads([s.expr]) <= known]
            found.append(now)
            known |= {s.name for s in now}
            left = [s for s in left if s not in now]
        return found

    def length(self, stat: Statistic) -> str:
        """The text of the number of row values that a statistic reduces."""
        return f"Float32({safe(stat.operand or '')}.shape[1])"

    def accumulate(self, stat: Statistic, value: str) -> tuple[list[str], list[str], list[str]]:
        """Start, step and end lines of a reduction over the lanes' values."""
        name, monoid = stat.name, MONOIDS[stat.monoid]
        warp = monoid.warp
        self.rows |= {*warp.start, warp.merge}
        start = ", ".join(f"{s}()" for s in warp.start)
        if len(warp.start) > 1:
            start = f"({start})"
            self.rows.add(warp.step)
        elif warp.step.isidentifier():
            self.math.add(warp.step)
        step = f"{warp.step}({name}_s, {value})"
        if not warp.step.isidentifier():
            step = f"{name}_s {warp.step} {value}"
        end = f"{warp.merge}({name}_s)"
        if monoid.average_of:
            end += f" * {1.0 / stat.width!r}" if stat.width else f" / {self.length(stat)}"
        return [f"{name}_s = {start}"], [f"{name}_s = {step}"], [f"{name} = {end}"]

    def sweep(self, level: list[Statistic]) -> list[str]:
        """One sweep over the row for the statistics of a level, and a second one for variances."""
        pivots = {(s.expr, MONOIDS[s.monoid].also): s.name for s in level}
        starts: list[str] = []
        ends: list[str] = []
        steps: dict[str, str] = {}
        for stat in level:
            if (stat.expr, stat.monoid) in pivots:
                ends.append(f"{stat.name} = {pivots[stat.expr, stat.monoid]}_mean")
                continue
            if MONOIDS[stat.monoid].counted:
                self.rows |= {"zero", "warp_sum"}
                starts += [*self.pivot(stat), f"{stat.name}_s = zero()"]
                steps[stat.name] = f"{stat.name}_s = {stat.name}_s + (@ - {stat.name}_k)"
                mean = f"{stat.name}_k + warp_sum({stat.name}_s) * {1.0 / stat.width!r}"
                ends.append(f"{stat.name}_mean = {mean}")
                continue
            start, step, end = self.accumulate(stat, "@")
            starts, ends = starts + start, ends + end
            steps[stat.name] = step[0]
        ends.sort(key=lambda line: line.endswith("_mean"))
        out = [*starts, *self.reduced(level, steps, "a"), *ends]
        return out + self.deviations([s for s in level if MONOIDS[s.monoid].counted])

    def reduced(self, level: list[Statistic], steps: dict[str, str], prefix: str) -> list[str]:
        """Loops over the pieces, each with a step for every statistic that is not 0 there."""
        out: list[str] = []
        for piece in self.pieces:
            self.enter(piece)
            chosen: list[tuple[Statistic, Expr]] = []
            for stat in level:
                if stat.name in steps and stat.expr is not None:
                    expr = piece.special(stat.expr)
                    if not (MONOIDS[stat.monoid].sums and expr == Literal(0.0)):
                        chosen.append((stat, expr))
            if not chosen:
                continue
            exprs = [e for _, e in chosen]
            lines, values = self.assigned(exprs, prefix)
            for (stat, _), value in zip(chosen, values, strict=True):
                lines.append(steps[stat.name].replace("@", value))
            out += self.loop(piece, VectorWork(exprs, lines))
        return out

    def pivot(self, stat: Statistic) -> list[str]:
        """Lines that load the row's first value, the offset of sums (`device_math.pivot`)."""
        assert stat.expr is not None
        self.enter(self.pieces[0])
        expr = self.pieces[0].special(stat.expr)
        lines, (value,) = self.assigned([expr], f"{stat.name}_p")
        self.math.add("pivot")
        chosen = f"{stat.name}_k = pivot({value}, {stat.width})"
        out = [*self.loads([expr], "0", self.pieces[0]), *lines, chosen]
        for name in loads_of([expr]):
            for suffix in ("_v", "_0[", "_1["):
                new = suffix.replace("_", f"_{stat.name}", 1)
                out = [line.replace(safe(name) + suffix, safe(name) + new) for line in out]
        return [line.replace("[j]", "[0]").replace("2 * j", "0") for line in out]

    def deviations(self, variances: list[Statistic]) -> list[str]:
        """The sweep that computes Σ(x − mean)² for variances."""
        if not variances:
            return []
        steps: dict[str, str] = {}
        starts: list[str] = []
        ends: list[str] = []
        for stat in variances:
            name = stat.name
            starts.append(f"{name}_q = zero()")
            steps[name] = f"{name}_q = {name}_q + (@ - {name}_mean) * (@ - {name}_mean)"
            ends.append(f"{name} = warp_sum({name}_q) * {1.0 / stat.width!r}")
        return [*starts, *self.reduced(variances, steps, "b"), *ends]

    def stat_names(self, exprs: Iterable[Expr | None]) -> list[str]:
        """The variables of the row statistics that expressions read."""
        found: dict[str, None] = {}
        for expr in self.with_groups(exprs):
            for stat in leaves_of_kind(expr, Stat):
                if stat.name not in self.groups:
                    found[self.leaf(stat)] = None
        return list(found)
