"""The sweeps over a row -> lines of source that load, compute and store the vectors of each piece.

The threads of a row take its vectors in turn, some (`RowPlan.depth`) at once: these are loaded
before the first is used, so that several loads are in flight. A row that is held is loaded before
its first sweep. Here of 16-bit columns, by 64 threads, two vectors at once:

    x_r1 = vectors(x, 8, 2)
    for k in cutlass.range_constexpr(2):
        index1 = (turn * 2 + k) * 64 + place
        fill(x_r1[k], x, row, index1)
    for k in cutlass.range_constexpr(2):
        x_v1 = wide(x_r1[k])
        for j in cutlass.range_constexpr(8):
            a0 = square(x_v1[j])
            s0_s = s0_s + a0

Names end in the number of their batch of vectors: a name that is assigned before and inside a loop
would be a value that the loop carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from coda.ir.dims import Dim
from coda.ir.monoids import MONOIDS
from coda.kernels.lines import safe
from coda.kernels.rowwise.leaves import Leaves
from coda.kernels.rowwise.mainloop import Rowwise
from coda.kernels.rowwise.passes import in_passes
from coda.kernels.rowwise.pieces import (
    COLUMN,
    Piece,
    leaves_of_kind,
    loads_of,
    pieces_of,
    reads_columns,
    swaps_of,
)
from coda.kernels.rowwise.plan import (
    by_row,
    chunks_of,
    every_expr,
    plan_of,
    reads,
    vector_lengths,
)
from coda.lowering.program.access import (
    Alternating,
    ColumnVector,
    Grouped,
    Line,
    OneElement,
    Partial,
    Periodic,
    RowVector,
    Shifted,
    Span,
    Tile,
)
from coda.lowering.program.epilogue import (
    Epilogue,
    Expr,
    Operand,
    Stat,
    Statistic,
    positions,
)
from coda.lowering.program.program import Program

INDENT = "    "


def indented(lines: Iterable[str], depth: int = 1) -> list[str]:
    """Lines indented by `depth` levels."""
    return [INDENT * depth + line for line in lines]


@dataclass
class VectorWork:
    """The work on the vectors of a batch.

    Attributes:
        exprs: the expressions whose loads it needs.
        inner: lines for each element `j` of a vector.
        rooms: lines that make registers for the results of a vector.
        after: lines after the last element of a vector.
        before: lines before the first vector.
        last: lines after the last vector.
    """

    exprs: list[Expr]
    inner: list[str]
    rooms: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VectorLoad:
    """One vector of an operand for a vector of the kernel: of a split pair, there are two.

    Attributes:
        name: the operand.
        suffix: how the variable of its values ends.
        row: the text of the row in memory.
        at: the text of the vector's index in memory.
        size: its elements.
        inside: the variable that says whether the row is there, else values are 0; "" if it is.
    """

    name: str
    suffix: str
    row: str
    at: str
    size: int
    inside: str = ""


class Sweeps(Leaves):
    """The source of sweeps over one row of a kernel.

    Attributes:
        mixes: whether elements of a vector read other elements of one, so that no two are packed.
    """

    def __init__(self, program: Program, kernel: Rowwise, *, padded: bool = False) -> None:
        self.program, self.kernel, self.padded = program, kernel, padded
        self.epilogue: Epilogue = kernel.body.epilogue
        self.kinds: dict[str, Operand] = {o.name: o for o in self.epilogue.operands}
        self.lanes, self.split = self.epilogue.lanes, self.epilogue.split
        self.points = kernel.mainloop.width // self.lanes
        self.pieces: tuple[Piece, ...] = pieces_of(
            kernel.body, kernel.mainloop.width, padded=padded
        )
        self.lengths = vector_lengths(self.epilogue, self.pieces, padded=padded)
        self.plan = plan_of(kernel.body, self.pieces, padded=padded)
        if self.plan.passes:
            self.epilogue = in_passes(self.epilogue, kernel.mainloop.width)
        self.vec = self.lengths[0]
        tables = [o.access for o in self.kinds.values() if isinstance(o.access, Periodic)]
        self.mixes = bool(swaps_of(self.epilogue)) or any(a.each > 1 for a in tables)
        self.chunks = chunks_of(self.pieces[0], self.vec) if self.pieces else 0
        self.groups = {s.name: s for s in self.epilogue.statistics if s.group}
        folds = [s for s in self.epilogue.statistics if s.operand]
        self.tall: set[str | None] = {s.operand for s in folds if not s.count}
        self.lines = self.epilogue.lines
        self.tests = self.epilogue.tests
        self.sizes: dict[Dim, str] = {}
        self.math: set[str] = set()
        self.rows: set[str] = {"LANES"}
        self.batches = 0
        self.tag = self.slot = ""
        self.each = 1

    def reads(self, exprs: Iterable[Expr | None]) -> set[str]:
        """The statistics that expressions read, directly or through statistics of groups."""
        return reads(self.epilogue, [e for e in exprs if e is not None])

    def once_loaded(self, exprs: Iterable[Expr | None]) -> list[str]:
        """Lines that load the column vectors and scalars that expressions read."""
        names = loads_of([e for e in exprs if e is not None])
        lines = self.rows_lines()
        for o in self.epilogue.operands:
            name = safe(o.name)
            if isinstance(o.access, ColumnVector | OneElement) and o.name in names:
                row = "row" if o.access.varies_with_row else "0"
                lines.append(f"{name}_0 = {name}[{row}, 0].to(Float32)")
            elif isinstance(o.access, Shifted) and isinstance(o.access.of, ColumnVector):
                row, inside = self.other_row(o.access)
                value = f"{name}[{row}, 0].to(Float32)"
                lines.append(f"{name}_0 = cutlass.select_({inside}, {value}, Float32(0.0))")
        for at in (p for p in positions(self.epilogue) if p.axis == "row"):
            number = f"row // {at.inner}" if at.inner > 1 else "row"
            number += f" % {at.count}" if at.count else ""
            lines.append(f"{self.row_number(at)} = Float32({number})")
        return lines

    def with_groups(self, exprs: Iterable[Expr | None]) -> list[Expr | None]:
        """Expressions, and the expressions of the group statistics that they read."""
        exprs = list(exprs)
        return [*exprs, *(g.expr for n, g in self.groups.items() if n in self.reads(exprs))]

    # Vectors.

    def enter(self, piece: Piece) -> None:
        """Set the vector length for a piece; in `padded` rows the tail has shorter vectors."""
        self.vec = self.lengths[self.pieces.index(piece)]
        pairs = self.program.target.packed_arithmetic and not self.plan.crowded
        self.each = 2 if pairs and self.vec % 2 == 0 and not self.mixes else 1

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

    def moved_index(self, index: str, swaps: tuple[int, ...]) -> str:
        """The vector index with blocks of vectors swapped."""
        for block in (d // self.vec for d in swaps if d >= self.vec):
            if block & (block - 1) == 0:
                index = f"({index} ^ {block})"
            else:
                index = f"({index} + {block} - {index} // {block} % 2 * {2 * block})"
        return index

    def begin(self, span: Span | None) -> int:
        """The first column (or column pair) of a tensor with a span."""
        return span.first // self.lanes if span else 0

    def vectors_of(self, exprs: Sequence[Expr], index: str, piece: Piece) -> list[VectorLoad]:
        """The vectors that expressions load at a vector of a piece."""
        found: list[VectorLoad] = []
        for name in sorted(loads_of(list(exprs))):
            vec, at = self.vec, self.shifted(index, piece)
            match self.kinds[name].access:
                case ColumnVector() | OneElement():  # loaded once for the row
                    continue
                case RowVector():
                    found.append(VectorLoad(name, "_v", "0", at, self.lanes * vec))
                case Tile() as access:
                    found += self.of_tile(name, index, piece, access)
                case Shifted(of=Tile() as of) as access:
                    row, inside = self.other_row(access)
                    parts = self.of_tile(name, index, piece, of)
                    found += [replace(p, row=row, inside=inside) for p in parts]
                case Shifted():  # loaded once for the row
                    continue
                case Periodic(period=period, each=each, swaps=swaps):
                    at = self.moved_index(at, swaps)
                    at = f"{at} // {each // vec}" if each > vec else at
                    size = max(1, vec // each)
                    found.append(VectorLoad(name, "_v", "row", f"{at} % {period // size}", size))
                case Grouped(size=size):
                    found.append(VectorLoad(name, "_v", "row", f"{at} // {size // vec}", 1))
                case Alternating() | Line() | Partial():
                    raise AssertionError(name)
                case _ as never:
                    assert_never(never)
        return found

    def of_tile(self, name: str, index: str, piece: Piece, access: Tile) -> list[VectorLoad]:
        """The vectors of a matrix at a vector of a piece."""
        at = self.moved_index(self.shifted(index, piece, self.begin(access.span)), access.swaps)
        if not self.split:
            return [VectorLoad(name, "_v", "row", at, self.lanes * self.vec)]
        where = [self.apart(at, self.split, lane) for lane in (0, 1)]
        pairs = zip("ab", where, strict=True)
        return [VectorLoad(name, f"_{lane}", "row", w, self.vec) for lane, w in pairs]

    def held(self, part: VectorLoad) -> bool:
        """Whether the vectors of an operand are in registers before the first sweep."""
        return self.plan.held and by_row(self.kinds[part.name])

    def holder(self, part: VectorLoad, piece: Piece) -> str:
        """The variable of the vectors that are held."""
        return f"{safe(part.name)}_h{self.pieces.index(piece)}{part.suffix}"

    def needed_groups(self, exprs: Sequence[Expr], piece: Piece) -> list[tuple[Statistic, Expr]]:
        """The group statistics that expressions read in a piece, in order of dependence."""
        names = self.reads(exprs)
        chosen = [s for n, s in self.groups.items() if n in names and s.expr is not None]
        return [(s, piece.special(s.expr)) for s in chosen if s.expr is not None]

    def group_lines(self, groups: Sequence[tuple[Statistic, Expr]]) -> list[str]:
        """Lines that compute group statistics over the lanes that share each group."""
        out: list[str] = []
        for stat, expr in groups:
            name, warp = stat.name, MONOIDS[stat.monoid].warp
            each, self.each = self.each, 1
            lines, (value,) = self.assigned([expr], f"{name}_x")
            self.each = each
            self.rows |= {*warp.start, warp.merge, "over_lanes"}
            share = f" * {1.0 / stat.group!r}" if MONOIDS[stat.monoid].average_of else ""
            lanes = stat.group // self.lanes // self.vec
            out += [
                f"{name}_s = zero()",
                f"for j in cutlass.range_constexpr({self.vec}):",
                *indented([*lines, f"{name}_s = {name}_s + {value}"]),
                f"{name} = over_lanes({name}_s, {warp.merge}, {lanes}){share}",
            ]
        return out

    # Batches of vectors.

    def batch(
        self, piece: Piece, make: Callable[[int], VectorWork], at: str, count: int, inside: str = ""
    ) -> list[str]:
        """The work on `count` vectors of a thread.

        Args:
            piece: where they are.
            make: number of vectors -> the work on them, whose names end in `self.tag`.
            at: the text of the index of vector `k`.
            count: how many there are.
            inside: the condition under which a vector, clamped to the last one, is there.
        """
        tag = self.tag
        work = make(count)
        groups = self.needed_groups(work.exprs, piece)
        exprs = [*work.exprs, *(e for _, e in groups)]
        parts = self.vectors_of(exprs, f"index{tag}", piece)
        many = f"for k in cutlass.range_constexpr({count}):"
        index, k = f"index{tag} = {at}", "k" if count > 1 else "0"

        def each(lines: list[str]) -> list[str]:
            return [many, *indented([index, *lines])] if count > 1 else lines

        loads, values = [], []
        out = [index] if count == 1 else []
        for p in parts:
            x, held = safe(p.name), self.holder(p, piece) if self.held(p) else ""
            if not held:
                out.append(f"{x}_r{p.suffix}{tag} = vectors({x}, {p.size}, {count})")
                loads.append(f"fill({x}_r{p.suffix}{tag}[{k}], {x}, {p.row}, {p.at})")
            source = f"{held}[{self.slot}]" if held else f"{x}_r{p.suffix}{tag}[{k}]"
            values.append(f"{x}{p.suffix}{tag} = {self.as_floats(p, source)}")
        self.rows |= {"vectors", "fill"} if loads else set()
        if reads_columns(exprs):
            self.rows.add("numbers")
            of = f"numbers({self.shifted(f'index{tag}', piece)}, {self.vec})"
            values.append(f"{COLUMN}_v{tag} = {of}")
        rest = [*work.rooms, f"for j in cutlass.range_constexpr({self.vec // self.each}):"]
        rest += [*indented(work.inner), *work.after]
        out += each(loads) if loads else []
        if inside and groups:
            kept = [f"if {inside}:", *indented([*work.before, *rest, *work.last])]
            return [*out, *values, *self.group_lines(groups), *kept]
        out += [*work.before, *each([*values, *self.group_lines(groups), *rest]), *work.last]
        return [index, f"if {inside}:", *indented(out[1:])] if inside else out

    def as_floats(self, part: VectorLoad, source: str) -> str:
        """The text of a vector in registers as float32; 0 where it is not there."""
        name = "wide_if" if part.inside else "wide"
        self.rows.add(name)
        return f"{name}({part.inside}, {source})" if part.inside else f"wide({source})"

    def next(self) -> str:
        """Begin a batch; its tag."""
        self.batches += 1
        self.tag = str(self.batches)
        return self.tag

    def loop(self, piece: Piece, make: Callable[[int], VectorWork]) -> list[str]:
        """A sweep over a piece: the threads of a row take its vectors in turn."""
        self.enter(piece)
        threads, depth = self.plan.threads, self.plan.depth
        vectors = piece.count // self.vec
        full, ragged = divmod(vectors, threads)
        turns, left = divmod(full, depth)
        out: list[str] = []
        first = "0"
        if turns:
            unrolled = self.plan.held or self.plan.summed  # each vector has registers of its own
            first, head = f"turn * {depth}", "range_constexpr" if unrolled else "range"
            self.next()
            lines = self.several(piece, make, "0" if turns == 1 else first, depth)
            loop = [f"for turn in cutlass.{head}({turns}):", *indented(lines)]
            out += loop if turns > 1 else lines
        if left:
            self.next()
            out += self.several(piece, make, str(turns * depth), left)
        if ragged:
            out += self.partial(piece, make, full)
        self.tag = ""
        return out

    def several(
        self, piece: Piece, make: Callable[[int], VectorWork], first: str, count: int
    ) -> list[str]:
        """A batch of vectors, from the `first` of each thread on."""
        slots = [x for x in (first if first != "0" else "", "k" if count > 1 else "") if x]
        self.slot = " + ".join(slots) or "0"
        at = f"({self.slot})" if " " in self.slot else self.slot
        return self.batch(piece, make, f"{at} * {self.plan.threads} + place", count)

    def partial(self, piece: Piece, make: Callable[[int], VectorWork], full: int) -> list[str]:
        """The last vectors of a piece, which only some threads have."""
        tag, vectors = self.next(), piece.count // self.vec
        self.slot = str(full)
        at = f"{full} * {self.plan.threads} + place"
        if not self.needed_groups(make(1).exprs, piece):
            return self.batch(piece, make, at, 1, f"index{tag} < {vectors}")
        last = self.clamped(f"at{tag}", vectors)
        lines = self.batch(piece, make, last, 1, f"at{tag} < {vectors}")
        return [f"at{tag} = {at}", *lines]

    def clamped(self, at: str, vectors: int) -> str:
        """The text of a vector index that is clamped to the last vector."""
        return f"cutlass.select_({at} < {vectors}, {at}, cutlass.Int32({vectors - 1}))"

    def hold(self) -> list[str]:
        """Lines that load a row into registers, if it is held."""
        out: list[str] = []
        for piece in self.pieces if self.plan.held else ():
            self.enter(piece)
            exprs = [piece.special(e) for e in every_expr(self.epilogue)]
            parts = [p for p in self.vectors_of(exprs, "index", piece) if self.held(p)]
            if not parts:
                continue
            threads, vectors = self.plan.threads, piece.count // self.vec
            full, ragged = divmod(vectors, threads)
            self.rows |= {"vectors", "fill"}
            names = [(self.holder(p, piece), p, safe(p.name)) for p in parts]
            out += [f"{n} = vectors({x}, {p.size}, {full + (ragged > 0)})" for n, p, x in names]
            lines = [f"index = k * {threads} + place"]
            lines += [f"fill({n}[k], {x}, row, {p.at})" for n, p, x in names]
            out += [f"for k in cutlass.range_constexpr({full}):", *indented(lines)] if full else []
            last = [f"fill({n}[{full}], {x}, row, {p.at})" for n, p, x in names]
            if ragged and self.needed_groups(exprs, piece):
                out += [f"at = {full} * {threads} + place"]
                out += [f"index = {self.clamped('at', vectors)}", *last]
            elif ragged:
                out += [f"index = {full} * {threads} + place", f"if index < {vectors}:"]
                out += indented(last)
        return out

    def stat_names(self, exprs: Iterable[Expr | None]) -> list[str]:
        """The variables of the row statistics that expressions read."""
        found: dict[str, None] = {}
        for expr in self.with_groups(exprs):
            for stat in leaves_of_kind(expr, Stat):
                if stat.name not in self.groups:
                    found[self.leaf(stat)] = None
        return list(found)
