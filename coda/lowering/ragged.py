"""What is 0 outside the matrix: tiles at its edges are computed whole, and sums take them whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coda.ir.scalars import SCALARS
from coda.lowering.epilogue import Acc, Call, Expr, Literal, Load, Operand


def vanishes(
    expr: Expr, kinds: dict[str, Operand], zero: tuple[str, ...] = ("row", "tile", "periodic")
) -> bool:
    """Whether an expression is surely 0 in columns outside the matrix (or in rows outside).

    There the accumulator and everything that varies along the columns is 0, but vectors along the
    rows are not. `zero` tells the kinds of operands that are 0.
    """
    return _Outside(kinds, zero).vanishes(expr)


@dataclass
class _Outside:
    """What is known of expressions where operands are 0; each is looked at once."""

    kinds: dict[str, Operand]
    zero: tuple[str, ...]
    known: dict[tuple[str, Expr], bool] = field(default_factory=dict)

    def once(self, question: Callable[[Expr], bool], expr: Expr) -> bool:
        """The answer, found when it is asked for the first time."""
        key = question.__name__, expr
        if key not in self.known:
            self.known[key] = question(expr)
        return self.known[key]

    def vanishes(self, expr: Expr) -> bool:
        """Whether an expression is surely 0."""
        return self.once(self._vanishes, expr)

    def _vanishes(self, expr: Expr) -> bool:
        match expr:
            case Acc():
                return True
            case Load(operand=name):
                return self.kinds[name].kind in self.zero
            case Literal(value=value):
                return value == 0.0
            case Call(fn=fn, args=args):
                found = [self.vanishes(a) for a in args]
                if fn == "mul":
                    return any(found) and not any(self.diverges(a) for a in args)
                if fn == "where":
                    return all(found[1:])
                return SCALARS[fn].zero and all(found)
        return False

    def diverges(self, expr: Expr) -> bool:
        """Whether an expression may be infinite: 0 times it is not 0 then."""
        return self.once(self._diverges, expr)

    def _diverges(self, expr: Expr) -> bool:
        if not isinstance(expr, Call):
            return False
        reciprocal = expr.fn in ("recip", "rsqrt", "log", "pow", "div")
        if reciprocal and self.vanishes(expr.args[-1]):
            return True
        first = expr.fn == "pow" and self.vanishes(expr.args[0])
        return first or any(self.diverges(a) for a in expr.args)
