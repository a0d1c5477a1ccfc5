"""What every node of the graph has: operands, shape, element type, source line, one identity.

Nodes are interned: a constructor called with equal arguments returns the same object. The kinds are
in `coda.ir.graph`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from coda.errors import Where
from coda.ir.dims import Dim, Shape, product, show_shape
from coda.ir.types import DType

T = TypeVar("T")


_interned: weakref.WeakValueDictionary[tuple[object, ...], Any] = weakref.WeakValueDictionary()
_origin: ContextVar[tuple[Where | None, ...]] = ContextVar("origin", default=())


class origin:
    """Give nodes that are made inside the source line `where`, in place of the caller's line."""

    __slots__ = ("token", "where")

    def __init__(self, where: Where | None) -> None:
        self.where = where

    def __enter__(self) -> None:
        self.token = _origin.set((self.where,))

    def __exit__(self, *error: object) -> None:
        _origin.reset(self.token)


class _InternedNode(type):
    """Equal constructor calls return the same object while a reference to it exists."""

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        known = None if kwargs else _interned.get(_key(cls, args))
        if known is not None:
            return known
        node: Any = type.__call__(cls, *args, **kwargs)
        return _interned.setdefault(_key_of(node), node)


def _key(kind: type, values: Iterable[object]) -> tuple[object, ...]:
    """A structural key, without a line: by repr -0.0 differs from 0.0, and NaN equals NaN."""
    return (kind, *[repr(v) if isinstance(v, float) else v for v in values])


def _key_of(node: Node) -> tuple[object, ...]:
    return _key(type(node), [getattr(node, name) for name in node.identity])


def is_interned(node: Node) -> bool:
    """Whether the node is the interned object of its structural key."""
    return _interned.get(_key_of(node)) is node


@dataclass(frozen=True, eq=False, repr=False)
class Node(metaclass=_InternedNode):
    """A value: a tensor with symbolic shape.

    Attributes:
        operands: the nodes that it reads, in order.
        shape: one dim for each axis.
        dtype: the element type.
        where: the user's source line that made it first; no part of its identity.
    """

    identity: ClassVar[tuple[str, ...]]
    operands: tuple[Node, ...] = field(init=False)
    shape: Shape = field(init=False)
    dtype: DType = field(init=False)
    where: Where | None = field(init=False)

    def __init_subclass__(cls) -> None:
        cls.identity = tuple(cls.__annotations__)

    def __post_init__(self) -> None:
        given = _origin.get()
        object.__setattr__(self, "where", given[0] if given else Where.caller())
        object.__setattr__(self, "operands", tuple(self._operands()))
        shape, dtype = self.infer()
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype)

    def __repr__(self) -> str:
        """Kind and type only: the whole expression grows exponentially with shared operands."""
        return f"<{type(self).__name__.lower()} {show_shape(self.shape)} {self.dtype}>"

    def infer(self) -> tuple[Shape, DType]:
        """Infer shape and dtype from the operands. Raises ShapeError or DtypeError."""
        raise TypeError(f"{type(self).__name__} is not a kind of node")

    def _operands(self) -> Iterator[Node]:
        for name in self.identity:
            value = getattr(self, name)
            if isinstance(value, Node):
                yield value
            elif isinstance(value, tuple) and value and isinstance(value[0], Node):
                yield from value

    @property
    def parts(self) -> tuple[Node, ...]:
        """All results of the operation of which this is one; one kernel computes those needed."""
        return (self,)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Size in bytes in its dtype, given the sizes of the symbols."""
        return self.dtype.nbytes(product(self.shape).size(sizes))

    def with_operands(self, new: Iterable[Node]) -> Node:
        """The same operation on other operands, given in the order of `operands`."""
        supply = iter(new)
        values: list[Any] = []
        for name in self.identity:
            value: Field = getattr(self, name)
            if isinstance(value, Node):
                value = next(supply)
            elif isinstance(value, tuple) and value and isinstance(value[0], Node):
                value = tuple(next(supply) for _ in value)
            values.append(value)
        return type(self)(*values)


Field = Node | tuple[object, ...] | Dim | DType | str | float  # an argument of a node


def is_operand(value: Field) -> bool:
    """Whether a field is a node or a tuple of nodes, and no attribute."""
    nodes = value if isinstance(value, tuple) else (value,)
    return bool(nodes) and isinstance(nodes[0], Node)
