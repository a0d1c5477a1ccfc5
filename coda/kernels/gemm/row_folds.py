"""An epilogue that folds partials of rows -> one whose values of rows are column vectors.

A CTA folds the partials of its rows before its epilogue begins. What depends on nothing else is
computed there too, once a row, and kept in shared memory, as a vector that is loaded:

    f0 = mean t_parts;  y = acc · rsqrt(f0 + eps)
    fold of t_parts: r0 = rsqrt(f0 + eps);  y = acc · r0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count

from coda.ir.monoids import MONOIDS
from coda.ir.types import DType, f32
from coda.kernels.lines import Lines, safe
from coda.lowering.program.access import ColumnVector
from coda.lowering.program.epilogue import (
    Epilogue,
    Expr,
    Literal,
    Load,
    Operand,
    Stat,
    Statistic,
    StoreExpr,
    leaves,
    rewritten,
)

WORDS = 128  # words of a row's partials that a thread loads at most, without a loop


@dataclass(frozen=True)
class PartialFold:
    """The fold of one operand of partials, and the values that are computed from it once a row.

    Attributes:
        statistic: what is folded; its `operand` is the buffer of the partials.
        values: name -> expression of the statistic and of literals; the names are those of column
            vectors of the epilogue that remains.
        stores: (buffer, dtype, name of the value) of each column that is written.
    """

    statistic: Statistic
    values: dict[str, Expr]
    stores: tuple[tuple[str, DType, str], ...]

    @property
    def partials(self) -> str:
        """The buffer of the partials."""
        assert self.statistic.operand is not None
        return self.statistic.operand

    @property
    def first(self) -> str:
        """The name of the first value."""
        return next(iter(self.values))

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the values are functions of: the statistic, and the mean of a variance."""
        name, monoid = self.statistic.name, MONOIDS[self.statistic.monoid]
        mean = (Stat(name, monoid.also),) if monoid.counted else ()
        return tuple(map(self.leaf, (Stat(name), *mean)))

    @property
    def numbers(self) -> dict[str, int | float]:
        """The numbers that the op gets (`ops_folds.RowFold`)."""
        monoid, width = MONOIDS[self.statistic.monoid], self.statistic.width
        scaled = monoid.average_of or monoid.counted
        return {
            "values": len(self.values),
            "planes": len(monoid.planes),
            "scale": 1.0 / width if scaled else 1.0,
            "width": width,
            "count": self.statistic.count,
        }

    @property
    def op(self) -> str:
        """The constructor of the op that folds."""
        numbers = ", ".join(f"{key}={value!r}" for key, value in self.numbers.items())
        return f"RowFold({self.first!r}, rows_of_{self.first}, {numbers})"

    @property
    def store_ops(self) -> list[str]:
        """The constructors of the ops that store columns."""
        numbers = {name: i for i, name in enumerate(self.values)}
        return [
            f"RowStore({safe(buffer)!r}, {self.first!r}, {numbers[value]})"
            for buffer, _, value in self.stores
        ]

    def function(self, body: Lines) -> list[str]:
        """The lines of the function that computes a row's values; `body` is empty before."""
        values = body.assign(self.values.values())
        head = f"def rows_of_{self.first}({', '.join(self.arguments)}):"
        return [head, *(f"    {i}" for i in (*body.lines, f"return ({', '.join(values)},)"))]

    @property
    def bytes_of_row(self) -> int:
        """Bytes of the partials of a row."""
        return _bytes_of_row(self.statistic)

    def leaf(self, expr: Expr) -> str:
        """The name of a statistic in the function of a row's values."""
        assert isinstance(expr, Stat)
        return f"{expr.name}_{expr.plane}" if expr.plane else expr.name


def split_folds(epilogue: Epilogue) -> tuple[Epilogue, tuple[PartialFold, ...]]:
    """The epilogue without its folds, and these: `why_not_folded` has to be ""."""
    found = folded(epilogue)
    if not found:
        return epilogue, ()
    values: dict[str, dict[str, Expr]] = {s.name: {} for s in found}
    names: dict[Expr, str] = {}
    taken = {o.name for o in epilogue.operands} | {s.buffer for s in epilogue.stores}
    free = (name for i in count() if (name := f"r{i}") not in taken)

    def hoisted(expr: Expr) -> Expr | None:
        source = _source(expr, values)
        if source is None:
            return None
        if expr not in names:
            names[expr] = next(free)
            values[source][names[expr]] = expr
        return Load(names[expr])

    columns = [s for s in epilogue.stores if s.is_column]
    for store in columns:
        hoisted(store.lanes[0])
    rest = replace(
        epilogue,
        statistics=tuple(s for s in epilogue.statistics if s not in found),
        stores=tuple(s for s in epilogue.stores if s not in columns),
    ).mapped(rewritten(hoisted))
    sources = {s.operand for s in found}
    operands = [o for o in epilogue.operands if o.name not in sources]
    operands += [Operand(name, f32, ColumnVector()) for some in values.values() for name in some]
    made = tuple(PartialFold(s, values[s.name], _stores(columns, values[s.name])) for s in found)
    return replace(rest, operands=tuple(operands)), made


def folded(epilogue: Epilogue) -> list[Statistic]:
    """The statistics that are folds of partials."""
    return [s for s in epilogue.statistics if s.operand is not None]


def why_not_folded(epilogue: Epilogue) -> str:
    """The reason why a GEMM cannot compute the folds of an epilogue; "" if it can."""
    found = folded(epilogue)
    names = {s.name for s in found}
    for statistic in found:
        monoid = MONOIDS[statistic.monoid]
        if not (monoid.sums or monoid.counted) or not statistic.count:
            return f"a GEMM folds sums and moments of rows, and no {statistic.monoid}"
        if _bytes_of_row(statistic) > f32.nbytes(WORDS):
            return f"a GEMM folds at most {WORDS} numbers of a row"
    if len({s.operand for s in found}) < len(found):
        return "a GEMM folds partials into one statistic"
    for store in epilogue.stores:
        if store.is_column and _source(store.lanes[0], names) is None:
            return "a GEMM stores of each row what it computes from one fold and numbers alone"
    return ""


def _bytes_of_row(statistic: Statistic) -> int:
    parts = -(-statistic.width // statistic.count)
    return f32.nbytes(parts * len(MONOIDS[statistic.monoid].planes))


def _source(expr: Expr, names: Iterable[str]) -> str | None:
    """The only fold from which, with literals, an expression is computed; None if there is none."""
    found = {x for x in leaves([expr]) if not isinstance(x, Literal)}
    sources = {x.name for x in found if isinstance(x, Stat) and x.name in names}
    plain = all(isinstance(x, Stat) and x.name in names for x in found)
    return next(iter(sources)) if plain and len(sources) == 1 else None


def _stores(
    columns: Iterable[StoreExpr], values: dict[str, Expr]
) -> tuple[tuple[str, DType, str], ...]:
    names = {expr: name for name, expr in values.items()}
    return tuple((s.buffer, s.dtype, names[s.lanes[0]]) for s in columns if s.lanes[0] in names)
