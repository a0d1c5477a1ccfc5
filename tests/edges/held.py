"""Functions of torch, taken through the importer, held against torch: values and gradients."""

from dataclasses import dataclass

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from coda.block import Block
from coda.errors import CodaError
from coda.frontend.torch_import.importer import import_nodes, value_of, why_not
from coda.integrations.dynamo import _sizes
from coda.integrations.regions import is_parameter
from coda.ir.evaluate import evaluate
from coda.ir.graph import Graph, Input
from coda.lowering.algebra.vjp import vjp

_blocks: dict[Graph, Block] = {}
_joint: dict[Graph, tuple[dict, dict]] = {}


class NotTaken(Exception):
    """coda leaves a function to torch; the message says why."""


@dataclass
class Taken:
    """A function as the importer takes it.

    Attributes:
        graph: of all its operators.
        arguments: for each argument of the graph the number of the function's tensor.
        outputs: for each result the number of the graph's output and the order of its axes.
        sizes: of the graph's symbols.
        operators: what it calls.
    """

    graph: Graph
    arguments: list[int]
    outputs: list[tuple[int, tuple[int, ...]]]
    sizes: dict[str, int]
    operators: set


def trace(fn, tensors):
    """A function of tensors as a graph of torch's operators. Raises NotTaken."""
    traced = make_fx(lambda *ts: fn(*ts), tracing_mode="fake", pre_dispatch=True)
    try:
        gm = traced(*(t.detach() for t in tensors))
    except Exception as e:  # sizes that depend on values, sparse tensors: torch's own tracer
        raise NotTaken(f"torch does not trace it: {e}") from e
    gm.graph.eliminate_dead_code()
    return gm


def take(fn, tensors):
    """A function of tensors as a graph. Raises NotTaken."""
    gm = trace(fn, tensors)
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    for node in calls:
        if why := why_not(node):
            raise NotTaken(f"{node.target}: {why}")
    (output,) = gm.graph.find_nodes(op="output")
    results = output.args[0]
    results = list(results) if isinstance(results, tuple | list) else [results]
    if not calls or not all(n in calls and isinstance(value_of(n), torch.Tensor) for n in results):
        raise NotTaken("a result that nothing computes")
    try:
        found = import_nodes(calls, results, is_parameter)
        sizes = _sizes(found)
    except CodaError as e:
        raise NotTaken(e.message) from e
    places = list(gm.graph.find_nodes(op="placeholder"))
    if not all(n in places for n in found.inputs):
        raise NotTaken("a tensor that is no argument")
    return Taken(
        found.graph,
        [places.index(n) for n in found.inputs],
        [found.outputs[n] for n in results],
        sizes,
        {n.target for n in calls},
    )


@dataclass
class Found:
    """What a function gives: its results, and what each float argument gets of cotangents."""

    values: list
    gradients: list


def cotangent(value):
    """What a result's cotangent is: numbers that every type holds."""
    numbers = 1 + torch.arange(value.numel()) % 8 / 8
    return numbers.reshape(value.shape).to(value.dtype)


def differentiated(values, leaves):
    """Values, and the gradients of the leaves that require one."""
    roots = [v for v in values if v.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    gradients = [None] * len(wanted)
    if roots and wanted:
        given = [cotangent(v) for v in roots]
        gradients = torch.autograd.grad(roots, wanted, given, allow_unused=True)
    return Found([v.detach() for v in values], list(gradients))


def of_torch(fn, tensors):
    """What torch computes."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    values = fn(*leaves)
    values = list(values) if isinstance(values, tuple | list) else [values]
    return differentiated(values, leaves)


def wide(tensors):
    """The same in float64."""
    return [t.double() if t.is_floating_point() else t for t in tensors]


def of_coda(taken, tensors, compute=torch.float32):
    """What the graph means, and its derivative, where all is computed in one type."""
    graph = taken.graph
    if graph not in _joint:
        given = {n: Input(f"d_{i}", n.shape, n.dtype) for i, n in enumerate(graph.roots)}
        given = {n: d for n, d in given.items() if n.dtype.kind == "float"}
        _joint[graph] = given, vjp(given, [i for i in graph.inputs if i.dtype.kind == "float"])
    given, found = _joint[graph]
    known = {n: tensors[i] for n, i in zip(graph.inputs, taken.arguments, strict=True)}
    values = evaluate(graph.roots, known, taken.sizes, compute)
    ordered = [values[i].permute(o) for i, o in taken.outputs]
    for (i, order), value in zip(taken.outputs, ordered, strict=True):
        node = graph.roots[i]
        if node in given:
            back = [order.index(a) for a in range(len(order))]
            d = cotangent(value.to(node.dtype.torch)).permute(back)
            known[given[node]] = known[given[node]] + d if given[node] in known else d
    gradients = evaluate(found.values(), known, taken.sizes, compute)
    by_argument = dict(zip(found, gradients, strict=True))
    numbers = {a: n for n, a in zip(graph.inputs, taken.arguments, strict=True)}
    floats = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    mine = [by_argument.get(numbers[i]) if i in numbers else None for i in floats]
    types = [graph.roots[i].dtype.torch for i, _ in taken.outputs]
    return Found(
        [v.to(t) for v, t in zip(ordered, types, strict=True)],
        [None if g is None else g.to(tensors[i].dtype) for g, i in zip(mine, floats, strict=True)],
    )


def of_block(taken, tensors):
    """What the graph gives as a block on backend reference, kernel by kernel."""
    block = _blocks.setdefault(taken.graph, Block(None, taken.graph))
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    given = [leaves[i] for i in taken.arguments]
    symbols = {s: taken.sizes[s] for s in taken.graph.symbols}
    found = block(*given, backend="reference", dims=symbols)
    found = list(found.values()) if isinstance(found, dict) else found
    found = [found] if isinstance(found, torch.Tensor) else found
    values = [found[i].permute(o) for i, o in taken.outputs]
    return differentiated(values, leaves)


def wrong(ours, theirs, exact, factor, alike, also=0.0):
    """Where a result is neither torch's nor as close to the exact one; None where it is nowhere.

    An element is right if it is torch's to a few epsilons: four of float32, one of 16 bits (both
    round what they know better), 32 of float64 (for which there is nothing better). Or if it is no
    further from float64 than `factor` times torch at this element or, as a share, at its worst one:
    which of two roundings is the lucky one differs from element to element. What is infinite or NaN
    in torch has to be so here, or to be what float64 says. Where only one of both overflows, ours
    has to be as close to float64 as a share; infinity is then the least number that rounds to it.

    Args:
        ours, theirs: of one type; None is a gradient of zeros.
        exact: torch's own in float64; torch's again where only equality will do.
        factor: how many times torch's error.
        alike: whether all numbers are of one size, so that the worst error may be taken as it is,
            not as a share: what is left of a sum that cancels is known as well as its terms are.
        also: an error of torch's at another place, which counts as its errors here do.
    """
    if theirs is None and ours is None:
        return None
    like = theirs if theirs is not None else ours
    a, b, e = (torch.zeros_like(like) if t is None else t for t in (ours, theirs, exact))
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {list(a.shape)} for {b.dtype} {list(b.shape)}"
    good = a == b
    if b.is_floating_point() and b.numel():
        info = torch.finfo(b.dtype)
        rounded = e.to(b.dtype).double()
        a, b, e = a.double(), b.double(), e.double()
        finite = a.isfinite() & b.isfinite()
        off = (b - e).abs()
        share = off / e.abs().clamp(min=info.smallest_normal)
        known = share[finite & share.isfinite()]
        worst = known.max() if len(known) else torch.zeros(())
        noise = torch.where(finite, e.abs(), 0.0).nan_to_num(posinf=0.0).max() * 2.0**-47
        few = {2: 1, 4: 4, 8: 32}[like.dtype.itemsize]
        near = (a - b).abs() <= few * (info.eps * b.abs() + info.smallest_normal) + noise
        least = off[finite].max() if alike and finite.any() else off.new_zeros(())
        least = least.clamp(min=also)
        as_close = (a - e).abs() <= factor * torch.maximum(off, e.abs() * worst).maximum(least)
        most = info.max * (1 + info.eps / 4)  # what rounds to infinity
        near_over = (a.clamp(-most, most) - e).abs() <= factor * e.abs() * worst
        as_close_over = near_over & (a.isfinite() ^ b.isfinite()) & ~a.isnan() & e.isfinite()
        nowhere = a.isnan() & (b.isnan() | e.isnan())
        good |= nowhere | (a == rounded) | ((near | as_close) & finite) | as_close_over
    if good.all():
        return None
    first = tuple(int(i) for i in (~good).nonzero()[0])
    shown = ", ".join(f"{float(t[first]):.9g}" for t in (a, b, e))
    return f"{int((~good).sum())} of {good.numel()}, first at {first}: ours, torch's, exact {shown}"


def differences(ours, theirs, exact, factor=8, alike=False, also=None):
    """All that is wrong, named: values and gradients by their number.

    Args:
        ours, theirs, exact, factor, alike: as in `wrong`, of all results.
        also: by a result's name, an error of torch's at another place.
    """
    found = []
    for name, *triple in named(ours, theirs, exact):
        why = wrong(*triple, factor, alike, (also or {}).get(name, 0.0))
        found += [f"{name}: {why}"] if why else []
    return found


def named(*found):
    """("values[0]", the first value of each), ... and the same of gradients."""
    for kind in ("values", "gradients"):
        for i, each in enumerate(zip(*(getattr(f, kind) for f in found), strict=True)):
            yield f"{kind}[{i}]", *each


def errors_nearby(fn, tensors):
    """By a result's name, the worst error of torch where all numbers are an eighth off.

    A result of one element has no other whose rounding is less lucky.
    """
    worst = {}
    for scale in (7 / 8, 9 / 8):
        near = [t * scale if t.is_floating_point() else t for t in tensors]
        for name, a, e in named(of_torch(fn, near), of_torch(fn, wide(near))):
            if a is not None and e is not None and a.numel():
                off = (a.double() - e.double()).abs().nan_to_num().max()
                worst[name] = max(float(off), worst.get(name, 0.0))
    return worst
