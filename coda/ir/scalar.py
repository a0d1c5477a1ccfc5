"""What a row of the table of scalar functions is, and a derivative in terms of other rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from coda.ir.types import DType


class Term(ABC):
    """A value in a derivative, with Python's operators: a cotangent, a result, an argument."""

    @abstractmethod
    def apply(self, fn: str, *args: Term | float) -> Term:
        """The function `fn` of this table, of `args`; one of them is this term."""

    def to(self, fn: str, *others: Term | float) -> Term:
        """The function `fn` of this term and `others`."""
        return self.apply(fn, self, *others)

    def __neg__(self) -> Term:
        return self.apply("neg", self)

    def __add__(self, other: Term | float) -> Term:
        return self.apply("add", self, other)

    def __radd__(self, other: float) -> Term:
        return self.apply("add", other, self)

    def __sub__(self, other: Term | float) -> Term:
        return self.apply("sub", self, other)

    def __rsub__(self, other: float) -> Term:
        return self.apply("sub", other, self)

    def __mul__(self, other: Term | float) -> Term:
        return self.apply("mul", self, other)

    def __rmul__(self, other: float) -> Term:
        return self.apply("mul", other, self)

    def __truediv__(self, other: Term | float) -> Term:
        return self.apply("div", self, other)


Cotangents = tuple[Term | None, ...]
# By arity: (d, y, *arguments) -> the cotangent of each argument.
Derivative = (
    Callable[[Term, Term, Term], Cotangents]
    | Callable[[Term, Term, Term, Term], Cotangents]
    | Callable[[Term, Term, Term, Term, Term], Cotangents]
)


@dataclass(frozen=True)
class Scalar:
    """A function of scalars.

    Attributes:
        name: its name in the text form.
        arity: number of arguments.
        evaluate: the reference, on torch tensors of any float dtype.
        flops: cost of one application, in units of one fused multiply-add.
        special: instructions of the special-function unit (MUFU) among them.
        result: "float" keeps the promoted type of the arguments, "bool" is a predicate, "pair" is
            both arguments, for a fold of pairs.
        of_ints: whether it takes whole numbers, and gives them or a predicate.
        of_floats: whether it takes floats.
        quotient: whether it is a quotient, rounded down: of a number and one ≥ 1, it is not larger.
        signs: if it is a sum of its arguments, the sign of each: (1, -1) for `a - b`.
        powers: if it is a product of powers of its arguments, the power of each: (1, -1) for
            `a / b`, (-0.5,) for `rsqrt`.
        device: its code in a kernel: an operator, or a function of kernels/device_math.py; "" for
            the function of the same name.
        commutes: whether the two arguments may be exchanged.
        selects: whether the result is always one of the arguments: it is not rounded, and literal
            arguments are rounded to the type of the others.
        exact: whether the result is computed without rounding, such as a negation or a predicate.
        rounds_to: the dtype to which it rounds; None for every other function.
        written: whether it is a rounding by a cast that the user wrote.
        chooses: whether the first argument selects one of the others as the result.
        stops: whether it is an identity with the derivative 0, which lowering removes.
        derivative: (d, y, *arguments) -> the cotangent of each argument, from the cotangent d of
            the result y; None for an argument without a derivative.
    """

    name: str
    arity: int
    evaluate: Callable[..., Tensor]
    flops: int = 1
    special: int = 0
    result: str = "float"
    of_ints: bool = False
    of_floats: bool = True
    quotient: bool = False
    signs: tuple[int, ...] = ()
    powers: tuple[float, ...] = ()
    device: str = ""
    commutes: bool = False
    selects: bool = False
    exact: bool = False
    rounds_to: DType | None = None
    written: bool = False
    chooses: bool = False
    stops: bool = False
    derivative: Derivative | None = None

    @property
    def is_negation(self) -> bool:
        """Whether it is the negation."""
        return self.signs == (-1,)

    @property
    def is_product(self) -> bool:
        """Whether it is the product of two or more arguments."""
        return len(self.powers) > 1 and set(self.powers) == {1}

    @property
    def diverges_at_zero(self) -> bool:
        """Whether it is infinite at 0 and nonzero everywhere: a negative power."""
        return bool(self.powers) and max(self.powers) < 0

    def is_linear_in(self, chosen: Sequence[bool]) -> bool:
        """Whether it is jointly linear in the `chosen` arguments, with the others held constant."""
        if self.signs:
            return all(chosen)
        powers = [p for p, one in zip(self.powers, chosen, strict=False) if one]
        return powers == [1]

    @property
    def unrounded(self) -> bool:
        """Whether the result is not rounded, and so is bitwise the same in every kernel."""
        return self.exact or self.selects
