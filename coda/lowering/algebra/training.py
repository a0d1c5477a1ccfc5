"""Graph -> Training: a forward graph that saves activations, and a backward graph that reads them.

The graph is first brought to the normal form of the laws. In its derivative, a norm's statistics
are sums over values that the cotangent's kernel computes anyway, and cotangents are scaled before
they are stored, so that weight gradients read activations as they are in memory.

The saved activations are a minimum cut between the block's arguments and the nodes that the
derivative reads; its cost is bytes written and read. Full-row statistics and picked columns are
never recomputed, and contractions only with memory="min". Of two values with equal bytes the later
one is saved, but no result of a special function: a tanh near 1 has no bits left for 1 − tanh².

    y = silu(x wᵀ)      forward: y and saved0 = x wᵀ      backward: x, w, saved0, d_y -> dx, dw
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from coda.errors import CallError, UnsupportedError
from coda.ir.attend import Attend
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
    Permute,
    Pick,
    Reduce,
    Size,
    users,
    walk,
)
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import SCALARS
from coda.ir.types import DType, f32
from coda.lowering.algebra.attends import Takes, attends, differentiable, takes_none
from coda.lowering.algebra.columns_first import columns_first
from coda.lowering.algebra.compared import compared, sources
from coda.lowering.algebra.early_slices import slice_columns_first
from coda.lowering.algebra.laws import EXCHANGES, LAWS
from coda.lowering.algebra.merge_siblings import merge_siblings
from coda.lowering.algebra.min_cut import minimum_cut
from coda.lowering.algebra.policy import MemoryPolicy, Updates
from coda.lowering.algebra.pushdown import push_down
from coda.lowering.algebra.rewrite import Law, rewrite, substituted
from coda.lowering.algebra.roles import (
    base,
    is_pointwise,
    is_view,
    permuted,
    reads_strided,
    token_symbols,
    weight_nodes,
)
from coda.lowering.algebra.stops import without_stops
from coda.lowering.algebra.vjp import vjp

MEMORY = ("min", "balanced", "speed")


@dataclass(frozen=True)
class Training:
    """A block's forward and backward.

    Attributes:
        forward: its outputs are the block's, followed by the saved activations.
        backward: its outputs are gradients; its inputs are arguments of the block, saved
            activations and cotangents, those that it reads.
        saved: names of the saved activations, outputs of `forward` and inputs of `backward`.
        cotangents: for each output of the block, the name of its cotangent; None if the backward
            does not read it.
        requires_grad: names of the arguments whose gradients the backward returns, in order.
            Arguments that no output depends on are missing.
        memory: the memory mode, one of `MEMORY`.
    """

    forward: Graph
    backward: Graph
    saved: tuple[str, ...]
    cotangents: tuple[str | None, ...]
    requires_grad: tuple[str, ...]
    memory: str = "balanced"

    def policy(self, updates: Updates = ()) -> MemoryPolicy:
        """The backward's memory policy: saved activations are donated, `updates` are in place."""
        saved = frozenset(self.saved)
        per_call = saved | {name for name in self.cotangents if name}
        return MemoryPolicy(updates, saved, per_call, self.memory == "min")


def derive(
    graph: Graph,
    sizes: Mapping[str, int],
    wanted: Sequence[str] | None = None,
    given: Iterable[str] | None = None,
    memory: str = "balanced",
    *,
    takes: Takes = takes_none,
) -> Training:
    """Differentiate a block.

    Args:
        graph: the block as the user wrote it.
        sizes: the size of every symbol, by which bytes are estimated.
        wanted: names of the arguments to differentiate; by default all floats but constants.
        given: names of the outputs that have a cotangent; by default all floats.
        memory: "min" saves only arguments, full-row statistics and operands of maxima; "balanced"
            saves values that cost fewer bytes than their recomputation; "speed" also saves values
            that the forward stores anyway and the backward would have to store again.
        takes: whether a kernel computes an attention, or its derivative.

    Raises:
        CallError: for a name in `wanted` that is no differentiable argument.
        UnsupportedError: for another `memory`, or an operation without a derivative.
    """
    check_memory(memory)
    names = set(differentiated(graph, wanted))
    lawful = graph.with_roots(rewrite(graph.roots, LAWS, lambda law, node, place: False))
    normal = columns_first(slice_columns_first(push_down(lawful)), differentiated=True)
    asked = [i for i in graph.inputs if i.name in names]
    normal = attends(normal, sizes, differentiable(normal, takes, asked))
    merged, original = merge_siblings(normal)
    original = _with_planes(merged, original)
    given = {n for n, _ in graph.outputs} if given is None else set(given)
    taken = {i.name for i in graph.inputs} | {s for s in graph.symbols}
    cotangents: dict[Node, Node] = {}
    roles: list[Input | None] = []
    for (name, _), node in zip(graph.outputs, merged.roots, strict=True):
        roles.append(None)
        if name in given and node.dtype.kind == "float":
            roles[-1] = Input(_free(f"d_{name}", taken), node.shape, node.dtype)
            cotangents[node] = _added(cotangents.get(node), roles[-1])
    found = vjp(cotangents, asked, kept=memory != "min")
    gradients = [(f"d{i.name}", found[i]) for i in asked if i in found]
    normal, merged, original, gradients = _unmarked(normal, merged, original, gradients)
    if memory != "min":
        gradients = exchanged(gradients, merged)
    gradients = as_read(gradients, merged)
    roots = [n for _, n in gradients]
    exact = sources(compared(roots)) & set(walk(merged.roots))
    saved = _choose(merged, roots, sizes, memory, original, exact)
    kept = {n: _saved_type(n, exact) for n in saved if not isinstance(n, Input)}
    return _split(graph, normal, gradients, kept, original, roles=roles, taken=taken, memory=memory)


def _with_planes(merged: Graph, original: Mapping[Node, Node]) -> Mapping[Node, Node]:
    """The nodes that the forward can save, with what their kernels compute beside their values."""
    found = dict(original)
    for node in [n for n in found if isinstance(n, Attend)]:
        own = original[node]
        assert isinstance(own, Attend)
        found |= {node.of(p.part): p for p in own.parts if node.of(p.part) not in original}
    for node in walk(merged.roots):
        if isinstance(node, Reduce) and node.value is not None and node.arg in original:
            also = MONOIDS[node.fn].also
            beside = Reduce(also, original[node.arg], node.axis)
            found.setdefault(Reduce(also, node.arg, node.axis), beside)
    return found


def _unmarked(
    normal: Graph, merged: Graph, original: Mapping[Node, Node], gradients: list[tuple[str, Node]]
) -> tuple[Graph, Graph, Mapping[Node, Node], list[tuple[str, Node]]]:
    """All that `derive` made, without the marks at which the derivative stopped."""
    nodes, values = without_stops(original), without_stops(original.values())
    roots = without_stops(n for _, n in gradients)
    return (
        normal.with_roots(without_stops(normal.roots)),
        merged.with_roots(without_stops(merged.roots)),
        dict(zip(nodes, values, strict=True)),
        [(name, root) for (name, _), root in zip(gradients, roots, strict=True)],
    )


def _saved_type(node: Node, exact: Set[Node]) -> DType:
    """The dtype in which a value is saved: row statistics in float32, others in their own."""
    narrow = node.shape[-1:] in ((), (ONE,)) and node.dtype.kind == "float" and node not in exact
    return f32 if narrow and node.dtype.size < f32.size else node.dtype


def exchanged(gradients: list[tuple[str, Node]], forward: Graph) -> list[tuple[str, Node]]:
    """Gradients with sums exchanged (law 2) if the forward has the other contraction.

    A sum over a contraction of the forward is not exchanged. So each exchange removes a sum over a
    contraction that the forward does not have, and the rewriting terminates.
    """
    known = {n for n in walk(forward.roots) if isinstance(n, Contract)}

    def accept(law: Law, node: Node, _: object) -> bool:
        new = law.apply(node)
        factors = node.operands[0].operands if isinstance(node, Reduce) else ()
        if any(n in known for n in factors):
            return False
        plain = ()
        if new is not None:
            plain = rewrite([new], EXCHANGES, lambda law, node, place: False)
        before = set(walk([node]))
        return any(n in known for n in walk(plain) if n not in before)

    roots = rewrite([n for _, n in gradients], EXCHANGES, accept)
    return [(name, root) for (name, _), root in zip(gradients, roots, strict=True)]


def as_read(gradients: list[tuple[str, Node]], forward: Graph) -> list[tuple[str, Node]]:
    """Gradients that read a result of the forward in the order in which the forward stores it.

    A computed value whose only user permutes its rows is stored permuted, if that is returned or
    read in that order. So p v [b, h, i, d], returned as o [b, i, h, d], is read as a view of o, and
    is not saved in both orders.
    """
    above, returned = users(forward.roots), set(forward.roots)
    stands: dict[Node, Node] = {}
    for node, readers in above.items():
        if isinstance(node, Input) or is_view(node) or node in returned or len(readers) != 1:
            continue
        (reader,) = readers
        if not isinstance(reader, Permute) or reader.order[-1] != node.rank - 1:
            continue
        if reader in returned or not _only_in_batches(reader, above):
            stands[node] = Permute(reader, reader.inverse)
            stands[reader] = reader
    for node in walk(n for _, n in gradients):
        if isinstance(node, Permute) and node.arg in stands and node not in stands:
            stands[node] = permuted(stands[node.arg], node.order)
    roots = substituted([n for _, n in gradients], stands)
    return [(name, root) for (name, _), root in zip(gradients, roots, strict=True)]


def _only_in_batches(view: Node, above: Mapping[Node, list[Node]]) -> bool:
    """Whether only batched contractions and attention read a view, which read any strides."""
    return all(reads_strided(u) or (is_view(u) and _only_in_batches(u, above)) for u in above[view])


def differentiated(graph: Graph, wanted: Sequence[str] | None) -> list[str]:
    """The names of the arguments to differentiate, in the graph's order.

    None stands for all floats but constants. Raises CallError for any other name in `wanted`.
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
    """Return `memory` unchanged. Raises UnsupportedError if it is not one of `MEMORY`."""
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
    """The nodes of the forward that the backward reads: arguments and saved activations.

    Args:
        merged: the forward, siblings merged.
        gradients: the backward's outputs, on nodes of `merged`.
        sizes: the size of every symbol.
        memory: one of `MEMORY`.
        known: nodes that the forward can save, as `merge_siblings` gives them.
        exact: nodes that must not be recomputed, since a comparison depends on their bits.
    """
    forward = list(walk([*merged.roots, *known]))
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
    tokens = token_symbols(forward)

    statistics = [n for n in forward if isinstance(n, Reduce | Pick) and n not in chosen]
    kept: set[Node] = exact | {n for n in statistics if _is_whole(n, tokens)}
    if memory != "min":
        kept |= {n for n in forward if isinstance(n, Contract | Attend)}
    stored = set(merged.roots)
    stored |= {base(o) for n in forward if isinstance(n, Attend) for o in n.operands}
    if memory == "speed":
        read = [n.operands if n.batched else (n.lhs,) for n in forward if isinstance(n, Contract)]
        stored |= {_loaded(o, free) for operands in read for o in operands}
    matrices = [n for n in walk(gradients) if isinstance(n, Contract) and n not in inside]
    again = {_loaded(o, free) for n in matrices for o in n.operands if memory == "speed"}
    bent = _bent(forward)

    def cost(node: Node) -> int | None:
        narrow = isinstance(node, Input) or node in kept
        if node not in known or node in chosen or (memory == "min" and not narrow):
            return None
        if isinstance(node, Input) or memory == "min":
            return node.nbytes(sizes)
        written = 0 if node in stored else node.nbytes(sizes)
        return node.nbytes(sizes) + written + 1 + (node in bent)

    prices = {n: 2 * n.nbytes(sizes) for n in again & inside}
    return minimum_cut(list(needed), free, kept, cost, prices)


def _is_whole(node: Reduce | Pick, tokens: Set[str]) -> bool:
    """Whether a statistic is of a full row, or of all rows; those of heads are recomputed."""
    full = all(d == ONE or d.symbols & tokens for d in node.shape)
    if full or isinstance(node, Pick):
        return full
    return bool(node.arg.shape[node.axis].symbols & tokens) or _of_batch(node)


def _of_batch(node: Reduce) -> bool:
    """Whether a reduction is over all columns of an elementwise function of a batch of matrices."""
    shape, stack, seen = node.arg.shape, [node.arg], set[Node]()
    while stack and node.axis == -1:
        one = stack.pop()
        if isinstance(one, Contract) and one.batched:
            return True
        if isinstance(one, Map | Cast) and one not in seen:
            seen.add(one)
            stack += [o for o in one.operands if o.shape == shape]
    return False


def _bent(nodes: Iterable[Node]) -> set[Node]:
    """The results of special functions, and elementwise functions of them: not preferred."""
    found: set[Node] = set()
    for node in nodes:
        if is_pointwise(node) and node.shape[-1:] != (ONE,):
            special = isinstance(node, Map) and SCALARS[node.fn].special
            if special or any(o in found and o.shape == node.shape for o in node.operands):
                found.add(node)
    return found


def _loaded(node: Node, weights: Collection[Node]) -> Node:
    """The node that a contraction reads from memory: without views, casts, and gains."""
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
    *,
    roles: list[Input | None],
    taken: set[str],
    memory: str,
) -> Training:
    """The forward and backward graphs; saved activations are outputs of one, inputs of the other.

    `kept` has the dtype of each saved node, `roles` the cotangent of each output.
    """
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
