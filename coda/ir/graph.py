"""The graph: nineteen kinds of node over tensors with symbolic shapes. Read this file first.

A node is immutable and interned (hash-consed): structurally equal nodes are the same object, so
that equality is `is`. Elementwise operands broadcast from the right, as in torch; size 1 means that
a value does not depend on that axis. Reductions keep the reduced axis with size 1.

    x / rms(x):                   %s = mul %x, %x            [M, D] bf16
                                  %m = mean %s axis -1       [M, 1] bf16
                                  %r = rsqrt %m              [M, 1] bf16
                                  %y = mul %x, %r            [M, D] bf16
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from coda.errors import DtypeError, ShapeError
from coda.ir.attend import Attend, AttendGradient
from coda.ir.dims import ONE, Dim, Shape, broadcast, inverse, product, show_shape
from coda.ir.monoids import MONOIDS
from coda.ir.node import Node, origin
from coda.ir.scalars import PAIR, SCALARS
from coda.ir.types import DType, bool_, promote


@dataclass(frozen=True, eq=False, repr=False)
class Input(Node):
    """`%x = input [M, D] bf16`: an argument of the block."""

    name: str
    declared: Shape
    element: DType

    def infer(self) -> tuple[Shape, DType]:
        return self.declared, self.element


@dataclass(frozen=True, eq=False, repr=False)
class Const(Node):
    """`%c = const 1e-05 f32`: a number, of shape []."""

    value: float
    element: DType

    def infer(self) -> tuple[Shape, DType]:
        object.__setattr__(self, "value", float(self.value))
        return (), self.element


@dataclass(frozen=True, eq=False, repr=False)
class Size(Node):
    """`%n = size D f32`: the size of a dim as a number, of shape []."""

    dim: Dim
    element: DType

    def infer(self) -> tuple[Shape, DType]:
        return (), self.element


@dataclass(frozen=True, eq=False, repr=False)
class Map(Node):
    """`%y = mul %x, %r`: a scalar function of `coda.ir.scalars`, elementwise."""

    fn: str
    args: tuple[Node, ...]

    def infer(self) -> tuple[Shape, DType]:
        row = SCALARS[self.fn]
        if len(self.args) != row.arity:
            raise ShapeError(f"`{self.fn}` takes {row.arity} operands", found=str(len(self.args)))
        shape: Shape = ()
        for arg in self.args:
            joined = broadcast(shape, arg.shape)
            if joined is None:
                raise ShapeError(
                    f"`{self.fn}` takes operands that broadcast",
                    found=" and ".join(show_shape(a.shape) for a in self.args),
                    help="axes align at the right; each pair must be equal, or one of them 1",
                )
            shape = joined
        if row.result == "bool":
            return shape, bool_
        values = self.args[1:] if self.fn == "where" else self.args
        return shape, promote(*(a.dtype for a in values))


@dataclass(frozen=True, eq=False, repr=False)
class Reduce(Node):
    """`%s = sum %x axis -1`: a reduction of `coda.ir.monoids` over one axis, kept with size 1."""

    fn: str
    arg: Node
    axis: int
    value: Node | None = None  # of a monoid of pairs, beside the scores `arg`; they broadcast

    def infer(self) -> tuple[Shape, DType]:
        if self.fn not in MONOIDS or MONOIDS[self.fn].of_pairs != (self.value is not None):
            raise ShapeError(f"there is no reduction `{self.fn}`", help=", ".join(MONOIDS))
        whole = self.arg if self.value is None else Map(PAIR, self.operands)
        if not -whole.rank <= self.axis < 0:
            raise ShapeError(
                f"`{self.fn}` reduces an axis that is not there",
                found=f"axis {self.axis} of {show_shape(whole.shape)}",
            )
        shape = list(whole.shape)
        shape[self.axis] = ONE
        return tuple(shape), whole.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Scan(Node):
    """`%s = scan sum %x axis -1`: an inclusive scan of a monoid of `coda.ir.monoids` along an axis.

    Element i is the reduction of elements 0 to i; with `reverse`, of elements i to the last.
    """

    fn: str
    arg: Node
    axis: int
    reverse: bool

    def infer(self) -> tuple[Shape, DType]:
        known = [name for name, row in MONOIDS.items() if row.scan is not None]
        if self.fn not in known:
            raise ShapeError(f"there is no scan of `{self.fn}`", help=", ".join(known))
        if not -self.arg.rank <= self.axis < 0:
            raise ShapeError(
                f"a scan of `{self.fn}` along an axis that is not there",
                found=f"axis {self.axis} of {show_shape(self.arg.shape)}",
            )
        if self.arg.dtype.kind == "bool":
            raise DtypeError("a scan takes numbers", found="bool")
        return self.arg.shape, self.arg.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Contract(Node):
    """`%y = contract %x, %w bf16`: a GEMM, [..., K] with a matrix [N, K] -> [..., N].

    If the right operand has more than two axes, the contraction is batched: [*b, M, K] with
    [*b, N, K] -> [*b, M, N]. The batch axes b broadcast from the right, as those of elementwise
    operands.
    """

    lhs: Node
    rhs: Node
    result: DType

    @property
    def batched(self) -> bool:
        """Whether the contraction is batched: the right operand has more than two axes."""
        return self.rhs.rank > 2

    def infer(self) -> tuple[Shape, DType]:
        x, w = self.lhs.shape, self.rhs.shape
        batch = broadcast(x[:-2], w[:-2]) if self.batched else x[:-1]
        least = 2 if self.batched else 1
        if batch is None or len(w) < 2 or len(x) < least or x[-1] != w[-1]:
            taken = "[*b, M, K] and [*b, N, K]" if self.batched else "[..., K] and [N, K]"
            aligned = "batch axes align at the right; each pair must be equal, or one of them 1"
            raise ShapeError(
                f"a contraction takes {taken}",
                found=f"{show_shape(x)} and {show_shape(w)}",
                help=aligned if batch is None else "",
            )
        if self.lhs.dtype.kind != "float" or self.rhs.dtype.kind != "float":
            raise DtypeError(
                "a contraction takes floats", found=f"{self.lhs.dtype} and {self.rhs.dtype}"
            )
        return (*batch, *(x[-2:-1] if self.batched else ()), w[-2]), self.result


@dataclass(frozen=True, eq=False, repr=False)
class Cast(Node):
    """`%y = cast %x f32`: the same values rounded to another element type."""

    arg: Node
    to: DType

    def infer(self) -> tuple[Shape, DType]:
        return self.arg.shape, self.to


@dataclass(frozen=True, eq=False, repr=False)
class Reshape(Node):
    """`%y = reshape %x [M, H, d]`: the same elements in row-major order under other axes."""

    arg: Node
    to: Shape

    def infer(self) -> tuple[Shape, DType]:
        if product(self.to) != product(self.arg.shape):
            raise ShapeError(
                "a reshape keeps the number of elements",
                found=f"{show_shape(self.arg.shape)} to {show_shape(self.to)}",
            )
        return self.to, self.arg.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Permute(Node):
    """`%y = permute %x (1, 0)`: axes permuted; axis i of the result is axis order[i]."""

    arg: Node
    order: tuple[int, ...]

    def infer(self) -> tuple[Shape, DType]:
        if sorted(self.order) != list(range(self.arg.rank)):
            raise ShapeError(
                "a permutation names each axis once",
                found=f"{self.order} of {show_shape(self.arg.shape)}",
            )
        return tuple(self.arg.shape[i] for i in self.order), self.arg.dtype

    @property
    def inverse(self) -> tuple[int, ...]:
        """The order of the permutation that undoes this one."""
        return inverse(self.order)


@dataclass(frozen=True, eq=False, repr=False)
class Slice(Node):
    """`%y = slice %x axis -1 from 0 size d step 1`: every step-th element of an axis."""

    arg: Node
    axis: int
    start: Dim
    size: Dim
    step: int

    def infer(self) -> tuple[Shape, DType]:
        if not -self.arg.rank <= self.axis < 0:
            raise ShapeError(
                "a slice of an axis that is not there",
                found=f"axis {self.axis} of {show_shape(self.arg.shape)}",
            )
        shape = list(self.arg.shape)
        left = shape[self.axis] - self.start - (self.size - 1) * self.step
        if self.step < 1 or any(
            d.constant is not None and d.constant < low
            for d, low in ((self.start, 0), (self.size, 1), (left, 1))
        ):
            raise ShapeError(
                "a slice reaches outside its axis",
                found=f"{self.size} from {self.start} step {self.step} of {shape[self.axis]}",
            )
        shape[self.axis] = self.size
        return tuple(shape), self.arg.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Concat(Node):
    """`%y = concat %a, %b axis -1`: operands concatenated along an axis."""

    args: tuple[Node, ...]
    axis: int

    def infer(self) -> tuple[Shape, DType]:
        first = self.args[0].shape
        if not -len(first) <= self.axis < 0:
            raise ShapeError("a concat along an axis that is not there", found=show_shape(first))
        total = Dim.of(0)
        for arg in self.args:
            rest = list(arg.shape)
            if len(rest) == len(first):
                total = total + rest[self.axis]
                rest[self.axis] = first[self.axis]
            if tuple(rest) != first:
                raise ShapeError(
                    "a concat takes operands that agree on all other axes",
                    found=" and ".join(show_shape(a.shape) for a in self.args),
                )
        shape = list(first)
        shape[self.axis] = total
        return tuple(shape), promote(*(a.dtype for a in self.args))


@dataclass(frozen=True, eq=False, repr=False)
class Expand(Node):
    """`%y = expand %x [M, D]`: axes of size 1, and missing leading axes, broadcast."""

    arg: Node
    to: Shape

    def infer(self) -> tuple[Shape, DType]:
        if broadcast(self.arg.shape, self.to) != self.to:
            raise ShapeError(
                "an expansion repeats axes of size 1",
                found=f"{show_shape(self.arg.shape)} to {show_shape(self.to)}",
            )
        return self.to, self.arg.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Iota(Node):
    """`%i = iota V i32`: 0, 1, ... V - 1, of shape [V]."""

    count: Dim
    element: DType

    def infer(self) -> tuple[Shape, DType]:
        return (self.count,), self.element


@dataclass(frozen=True, eq=False, repr=False)
class Gather(Node):
    """`%y = gather %table, %i, %j`: table[i, j], [V, W, ...] -> [*i, ...]; indices broadcast."""

    table: Node
    indices: tuple[Node, ...]

    def infer(self) -> tuple[Shape, DType]:
        lead = _indexed("rows are taken", self.indices, self.table.rank)
        return (*lead, *self.table.shape[len(self.indices) :]), self.table.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Pick(Node):
    """`%y = pick %x, %index`: x[..., index[...]] -> [..., 1]; NaN (ints: 0) if out of range."""

    arg: Node
    index: Node

    def infer(self) -> tuple[Shape, DType]:
        if self.index.dtype.kind != "int":
            raise DtypeError("columns are picked at an integer index", found=str(self.index.dtype))
        if self.index.shape != self.arg.shape[:-1]:
            raise ShapeError(
                "one column is picked for each row",
                found=f"{show_shape(self.arg.shape)} at {show_shape(self.index.shape)}",
            )
        return (*self.arg.shape[:-1], ONE), self.arg.dtype


@dataclass(frozen=True, eq=False, repr=False)
class Put(Node):
    """`%y = put %x, %i, %j rows V, W`: x [*i, ...] scatter-added into zeros [V, W, ...]."""

    arg: Node
    indices: tuple[Node, ...]
    rows: Shape

    def infer(self) -> tuple[Shape, DType]:
        lead = _indexed("rows are put", self.indices, len(self.rows))
        if self.arg.shape[: len(lead)] != lead or len(self.indices) != len(self.rows):
            found = f"{show_shape(self.arg.shape)} at {show_shape(lead)}"
            raise ShapeError("one index is given for each row that is put", found=found)
        return (*self.rows, *self.arg.shape[len(lead) :]), self.arg.dtype


def _indexed(what: str, indices: tuple[Node, ...], axes: int) -> Shape:
    """The shape of all indices broadcast. Raises DtypeError and ShapeError."""
    shown = " and ".join(f"{show_shape(i.shape)} {i.dtype}" for i in indices)
    if any(i.dtype.kind != "int" for i in indices) or not axes:
        raise DtypeError(f"{what} at an integer index", found=shown)
    shape: Shape | None = ()
    for index in indices:
        shape = None if shape is None else broadcast(shape, index.shape)
    if shape is None or not 0 < len(indices) <= axes:
        raise ShapeError(f"{what} at indices that broadcast, one for each axis", found=shown)
    return shape


Op = (
    Input | Const | Size | Map | Reduce | Scan | Contract | Cast | Reshape | Permute | Slice
    | Concat | Expand | Iota | Gather | Pick | Put | Attend | AttendGradient
)  # fmt: skip
KINDS: dict[str, type[Node]] = {kind.__name__.lower(): kind for kind in Op.__args__}


@dataclass(frozen=True)
class Graph:
    """A block.

    Attributes:
        name: the block's name.
        inputs: its arguments, in order.
        outputs: (name, node) of each output, in order.
        constants: the names of inputs that are declared constant, which have no gradient.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, Node], ...]
    constants: frozenset[str] = frozenset()

    @property
    def roots(self) -> tuple[Node, ...]:
        """The output nodes."""
        return tuple(node for _, node in self.outputs)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The names of all symbols of its dims, sorted."""
        nodes = [*self.inputs, *walk(self.roots)]
        dims = {d for n in nodes for d in n.shape} | {n.dim for n in nodes if isinstance(n, Size)}
        return tuple(sorted({s for d in dims for s in d.symbols}))

    def with_roots(self, roots: Iterable[Node]) -> Graph:
        """The same block with `roots` as its output nodes, in order."""
        names = [name for name, _ in self.outputs]
        outputs = tuple(zip(names, roots, strict=True))
        return Graph(self.name, self.inputs, outputs, self.constants)

    def __str__(self) -> str:
        from coda.ir.text import show

        return show(self)


def walk(roots: Iterable[Node], until: type | tuple[type, ...] = ()) -> Iterator[Node]:
    """Each node once in topological order; operands of nodes of the kinds `until` are skipped."""
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not isinstance(node, until):
                for operand in reversed(node.operands):
                    if operand not in seen:
                        stack.append((operand, False))


def transform(roots: Iterable[Node], change: Callable[[Node], Node]) -> tuple[Node, ...]:
    """Rebuild the graph bottom-up; `change` maps each rebuilt node to its replacement."""
    roots = tuple(roots)
    new: dict[Node, Node] = {}
    for node in walk(roots):
        operands = tuple(new[o] for o in node.operands)
        same = all(a is b for a, b in zip(operands, node.operands, strict=True))
        with origin(node.where):
            new[node] = change(node if same else node.with_operands(operands))
    return tuple(new[r] for r in roots)


def users(roots: Iterable[Node]) -> dict[Node, list[Node]]:
    """For each node, the nodes that read it."""
    found: dict[Node, list[Node]] = {}
    for node in walk(roots):
        found.setdefault(node, [])
        for operand in dict.fromkeys(node.operands):
            found[operand].append(node)
    return found
