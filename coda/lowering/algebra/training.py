"""A block -> its training: a forward graph that saves, and a backward graph that reads.

The block is first brought to the normal form of the laws. Its derivative then is one in which a
norm's statistics are sums over values that are at hand where the cotangent is made, and cotangents
are scaled before they are stored, so that weight gradients read activations as they are.

What is saved is a minimum cut between the block's arguments and what the derivative reads, by
bytes written and read. Statistics of rows, a number each, are not computed again, and contractions
only where memory is all that counts. Of two values that take the same bytes the later one is saved,
but none behind a special function: a tanh near 1 has no bits left for 1 − tanh².
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from coda.errors import CallError, UnsupportedError
from coda.ir.dims import ONE
from coda.ir.graph import (
    Cast,
    Const,
    Contract,
    Graph,
    Input,
    Iota,
    Map,
    Node,
    Reduce,
    Size,
    walk,
)
from coda.ir.scalars import SCALARS
from coda.ir.types import DType, f32
from coda.lowering.algebra.columns_first import columns_first
from coda.lowering.algebra.compared import compared, sources
from coda.lowering.algebra.laws import EXCHANGES, LAWS
from coda.lowering.algebra.merge_siblings import merge_siblings
from coda.lowering.algebra.min_cut import minimum_cut
from coda.lowering.algebra.policy import Terms, Updates
from coda.lowering.algebra.pushdown import push_down
from coda.lowering.algebra.rewrite import Law, rewrite, substituted
from coda.lowering.algebra.roles import is_pointwise, is_view, row_symbols, weight_nodes
from coda.lowering.algebra.vjp import vjp

MEMORY = ("min", "balanced", "speed")


@dataclass(frozen=True)
class Training:
    """A block's forward and backward.

    Attributes:
        forward: the block's outputs, then what is saved.
        backward: gradients, of arguments of the block, saved values and cotangents.
        saved: the outputs of `forward` that are saved, by name.
        cotangents: names of the backward's cotangents, one for each output of the block; None
            where the backward does not read it.
        wanted: names of the arguments whose gradients the backward gives, in order. An argument
            that no output depends on is missing.
        memory: how it was asked to trade memory for traffic.
    """

    forward: Graph
    backward: Graph
    saved: tuple[str, ...]
    cotangents: tuple[str | None, ...]
    wanted: tuple[str, ...]
    memory: str = "balanced"

    def terms(self, updates: Updates = ()) -> Terms:
        """What the backward may do with memory, where outputs are written over arguments."""
        saved = frozenset(self.saved)
        passing = saved | {name for name in self.cotangents if name}
        return Terms(updates, saved, passing, self.memory == "min")


def derive(
    graph: Graph,
    sizes: Mapping[str, int],
    wanted: Sequence[str] | None = None,
    given: Iterable[str] | None = None,
    memory: str = "balanced",
) -> Training:
    """The training of a block.

    Args:
        graph: the block as it was written.
        sizes: of every symbol: what bytes are reckoned with.
        wanted: names of the arguments to differentiate; by default all floats but constants.
        given: names of the outputs that have a cotangent; by default all floats.
        memory: "min" saves arguments, statistics of rows and what maxima are taken of alone,
            "balanced" what takes fewer bytes than computing it again, "speed" also what the forward
            stores anyway and the backward would have to store again.
    """
    check_memory(memory)
    names = set(differentiated(graph, wanted))
    lawful = graph.with_roots(rewrite(graph.roots, LAWS, lambda *_: False))
    normal = columns_first(push_down(lawful))
    merged, original = merge_siblings(normal)
    given = {n for n, _ in graph.outputs} if given is None else set(given)
    taken = {i.name for i in graph.inputs} | {s for s in graph.symbols}
    cotangents: dict[Node, Node] = {}
    roles: list[Input | None] = []
    for (name, _), node in zip(graph.outputs, merged.roots, strict=True):
        roles.append(None)
        if name in given and node.dtype.kind == "float":
            roles[-1] = Input(_free(f"d_{name}", taken), node.shape, node.dtype)
            cotangents[node] = _added(cotangents.get(node), roles[-1])
    asked = [i for i in graph.inputs if i.name in names]
    found = vjp(cotangents, asked, kept=memory != "min")
    gradients = [(f"d{i.name}", found[i]) for i in asked if i in found]
    if memory != "min":
        gradients = exchanged(gradients, merged)
    roots = [n for _, n in gradients]
    exact = sources(compared(roots)) & set(walk(merged.roots))
    saved = _choose(merged, roots, sizes, memory, original, exact)
    kept = {n: _saved_type(n, exact) for n in saved if not isinstance(n, Input)}
    return _split(graph, normal, gradients, kept, original, roles, taken, memory)


def _saved_type(node: Node, exact: Set[Node]) -> DType:
    """The type in which a value is saved: row statistics in float32."""
    narrow = node.shape[-1:] in ((), (ONE,)) and node.dtype.kind == "float" and node not in exact
    return f32 if narrow and node.dtype.size < f32.size else node.dtype


def exchanged(gradients: list[tuple[str, Node]], forward: Graph) -> list[tuple[str, Node]]:
    """Gradients in which sums are exchanged (law 2) where the forward has the other contraction.

    One whose contraction the forward has stays, so that with each exchange there is one fewer over
    a contraction that it has not: this ends.
    """
    known = {n for n in walk(forward.roots) if isinstance(n, Contract)}

    def accept(law: Law, node: Node, _: object) -> bool:
        new = law.apply(node)
        factors = node.operands[0].operands if isinstance(node, Reduce) else ()
        if any(n in known for n in factors):
            return False
        plain = rewrite([new], EXCHANGES, lambda *_: False) if new is not None else ()
        before = set(walk([node]))
        return any(n in known for n in walk(plain) if n not in before)

    roots = rewrite([n for _, n in gradients], EXCHANGES, accept)
    return [(name, root) for (name, _), root in zip(gradients, roots, strict=True)]


def differentiated(graph: Graph, wanted: Sequence[str] | None) -> list[str]:
    """The wanted arguments in their order; None stands for all floats that are no constants.

    Raises CallError for others.
    """
    floats = [
        i.name for i in graph.inputs if i.dtype.kind == "float" and i.name not in graph.constants
    ]
    others = sorted(set(wanted or ()) - set(floats))
    if others:
        constant = others[0] in graph.constants
        what = "is declared constant" if constant else "is no argument that has a gradient"
        raise CallError(
            f"`{others[0]}` {what}",
            found=", ".join(wanted or ()),
            help=", ".join(floats),
        )
    return [n for n in floats if wanted is None or n in wanted]


def check_memory(memory: str) -> str:
    """The knob as it was given. Raises UnsupportedError for a value that it does not take."""
    if memory not in MEMORY:
        raise UnsupportedError(
            "memory is traded for traffic in three ways",
            found=repr(memory),
            help=" or ".join(f'"{m}"' for m in MEMORY),
        )
    return memory


def _added(a: Node | None, b: Node) -> Node:
    return b if a is None else Map("add", (a, b))


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _choose(
    merged: Graph,
    gradients: list[Node],
    sizes: Mapping[str, int],
    memory: str,
    known: Mapping[Node, Node],
    exact: set[Node],
) -> list[Node]:
    """The nodes of the forward that the backward reads; what is `exact` is not computed again."""
    forward = list(walk(merged.roots))
    inside = set(forward)
    chosen = compared(gradients)
    free = weight_nodes(forward) | {n for n in forward if isinstance(n, Const | Size | Iota)}
    free -= exact
    needed: dict[Node, None] = {}
    for node in walk(gradients):
        if node not in inside:
            needed |= dict.fromkeys(o for o in node.operands if o in inside and o not in free)
        elif node in gradients:
            needed[node] = None
    tokens = row_symbols(forward)

    def of_rows(node: Reduce) -> bool:
        """Whether a statistic is that of whole rows: those of a row's parts are cheap."""
        return all(d == ONE or d.symbols & tokens for d in node.shape)

    statistics = [n for n in forward if isinstance(n, Reduce)]
    kept: set[Node] = {n for n in statistics if n not in chosen and of_rows(n)}
    kept |= exact
    if memory != "min":
        kept |= {n for n in forward if isinstance(n, Contract)}
    lies = set(merged.roots)
    if memory == "speed":
        read = [n.operands if n.batched else (n.lhs,) for n in forward if isinstance(n, Contract)]
        lies |= {_loaded(o, free) for operands in read for o in operands}
    matrices = [n for n in walk(gradients) if isinstance(n, Contract) and n not in inside]
    again = {_loaded(o, free) for n in matrices for o in n.operands} if memory == "speed" else set()
    bent = _bent(forward)

    def cost(node: Node) -> int | None:
        narrow = isinstance(node, Input) or node in kept
        if node not in known or node in chosen or (memory == "min" and not narrow):
            return None
        if isinstance(node, Input) or memory == "min":
            return node.nbytes(sizes)
        written = 0 if node in lies else node.nbytes(sizes)
        return node.nbytes(sizes) + written + 1 + (node in bent)

    prices = {n: 2 * n.nbytes(sizes) for n in again & inside}
    return minimum_cut(list(needed), free, kept, cost, prices)


def _bent(nodes: Iterable[Node]) -> set[Node]:
    """What special functions are taken of on the way from a contraction, element by element."""
    found: set[Node] = set()
    for node in nodes:
        if is_pointwise(node) and node.shape[-1:] != (ONE,):
            special = isinstance(node, Map) and SCALARS[node.fn].special
            if special or any(o in found and o.shape == node.shape for o in node.operands):
                found.add(node)
    return found


def _loaded(node: Node, weights: Collection[Node]) -> Node:
    """What a contraction's operand is in memory: under views, and gains that leave the sum."""
    while True:
        gains = [o for o in node.operands if o in weights]
        if isinstance(node, Map) and SCALARS[node.fn].is_product and len(gains) == 1:
            (node,) = (o for o in node.operands if o not in weights)
        elif is_view(node) or isinstance(node, Cast):
            node = node.operands[0]
        else:
            return node


def _split(
    graph: Graph,
    normal: Graph,
    gradients: list[tuple[str, Node]],
    kept: Mapping[Node, DType],
    original: Mapping[Node, Node],
    roles: list[Input | None],
    taken: set[str],
    memory: str,
) -> Training:
    """The two graphs, with saved values as outputs of one and inputs of the other."""
    outputs: list[tuple[str, Node]] = []
    stands: dict[Node, Node] = {}
    inputs: list[Input] = []
    for node, wide in kept.items():
        name = _free(f"saved{len(outputs)}", taken)
        value = original[node]
        outputs.append((name, value if wide == node.dtype else Cast(value, wide)))
        inputs.append(Input(name, node.shape, wide))
        stands[node] = inputs[-1] if wide == node.dtype else Cast(inputs[-1], node.dtype)
    roots = substituted([n for _, n in gradients], stands)
    every = [*graph.inputs, *inputs, *(r for r in roles if r is not None)]
    reached = {n for n in walk(roots) if isinstance(n, Input)}
    backward = Graph(
        f"{graph.name}_backward",
        tuple(i for i in every if i in reached),
        tuple((name, root) for (name, _), root in zip(gradients, roots, strict=True)),
    )
    used = {i.name for i in inputs if i in reached}
    forward = Graph(
        graph.name,
        graph.inputs,
        (*normal.outputs, *((n, v) for n, v in outputs if n in used)),
    )
    return Training(
        forward,
        backward,
        tuple(n for n, _ in outputs if n in used),
        tuple(r.name if r is not None and r in reached else None for r in roles),
        tuple(name[1:] for name, _ in gradients),
        memory,
    )
