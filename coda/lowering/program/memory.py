"""Kernels in order -> when the memory of a buffer is over, and what is written over another.

A kernel that reads a matrix for the last time, each element at the point at which it writes one of
its own, writes over it: no memory is made for the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import replace
from typing import Any

from coda.ir.dims import product
from coda.ir.graph import Input, Node, Reshape
from coda.lowering.program.access import Tile
from coda.lowering.program.epilogue import Operand, StoreExpr
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program


def held_in(program: Program, node: Node) -> set[str]:
    """The buffers and arguments in which a value, or what it is a view of, lies."""
    found: set[str] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        place = program.places.get(one)
        if place is not None:
            found.add(place.buffer)
        elif isinstance(one, Input):
            found.add(one.name)
        else:
            stack.extend(one.operands)
    return found


def reads(program: Program, kernel: Kernel[Any]) -> list[str]:
    """The buffers and arguments that a kernel reads; one that is read twice is there twice."""
    found = [n for node in kernel.reads() for n in held_in(program, node)]
    return [*found, *kernel.partials()]


def last_uses(program: Program) -> dict[str, int]:
    """For each buffer that no caller is handed, the last kernel that touches it."""
    found: dict[str, int] = {}
    for i, kernel in enumerate(program.kernels):
        found |= dict.fromkeys((*reads(program, kernel), *kernel.writes()), i)
    returned = {n for _, node in program.outputs for n in held_in(program, node)}
    for whole, parts in program.joined.items():
        together = {whole, *parts}
        found |= dict.fromkeys(together, max(found.get(n, 0) for n in together))
        returned |= together if together & returned else set()
    kept = returned | {i.name for i in program.graph.inputs}
    return {n: i for n, i in found.items() if n not in kept}


def plan_memory(program: Program) -> Program:
    """Decide when each buffer is over, and which are written over what their kernel reads last."""
    over = last_uses(program)
    count = range(len(program.kernels))
    freed = tuple(tuple(n for n, last in over.items() if last == i) for i in count)
    for i, kernel in enumerate(program.kernels):
        spare = program.terms.spare & set(reads(program, kernel))
        over |= dict.fromkeys(spare, i)
    overwrites: dict[str, str] = {}
    for i, kernel in enumerate(program.kernels):
        overwrites |= _overwrites(program, kernel, {n for n, last in over.items() if last == i})
    return replace(program, freed=freed, overwrites=overwrites)


def _overwrites(program: Program, kernel: Kernel[Any], ending: Set[str]) -> dict[str, str]:
    """For each store of a kernel a matrix that it reads at the same points, and no more."""
    found: dict[str, str] = {}
    parts = {p for whole, some in program.joined.items() for p in (whole, *some)}
    outputs = [n for o, n in program.outputs if o in program.terms.updated]
    updated = {name for node in outputs for name in held_in(program, node)}
    times = Counter(reads(program, kernel))
    free = {n for n in ending if times[n] == 1 and n not in parts}
    for store in kernel.body.epilogue.stores:
        if store.buffer in parts or store.buffer in updated:
            continue
        for operand in kernel.body.epilogue.operands:
            name = _matrix(program, kernel, operand, store)
            if name in free:
                found[store.buffer] = name
                free.discard(name)
                break
    return found


def _matrix(
    program: Program,
    kernel: Kernel[Any],
    operand: Operand,
    store: StoreExpr,
) -> str:
    """What an operand reads, where it lies in memory as a store of the same type would; else ""."""
    node = kernel.body.nodes.get(operand.name)
    if node is None or operand.name in kernel.body.spread:
        return ""
    lanes = kernel.body.epilogue.lanes
    same = isinstance(operand.access, Tile) and operand.access.span == store.span
    if not same or (operand.dtype, lanes) != (store.dtype, len(store.lanes)) or store.narrow:
        return ""
    while isinstance(node, Reshape):
        node = node.arg
    if not isinstance(node, Input) and node not in program.places:
        return ""
    (name,) = held_in(program, node)
    old, new = program.buffers[name], program.buffers[store.buffer]
    elements = {product(s).size(program.sizes) for s in (old.shape, new.shape, node.shape)}
    handed_out = old.kind == "input" and new.kind == "output"
    return "" if len(elements) > 1 or handed_out else name


def temporary_bytes(program: Program) -> int:
    """The most memory that a call has at once for what it does not return.

    What is written over an argument that is given up takes none.
    """
    over = last_uses(program)
    live: set[str] = set()
    most = 0
    for kernel, ending in zip(program.kernels, program.freed, strict=True):
        made = {n for n in kernel.writes() if n in over}
        live |= {n for n in made if n not in program.overwrites}
        most = max(most, sum(program.buffers[n].nbytes(program.sizes) for n in live))
        heirs = {old: new for new, old in program.overwrites.items()}
        for name in ending:
            if name in live and name in heirs and heirs[name] in over:
                live.add(heirs[name])
            live.discard(name)
    return most


def soonest_freed(program: Program) -> tuple[Kernel[Any], ...]:
    """The kernels in an order in which what is over is over soon.

    Of the kernels whose operands are known, the one comes next that frees the most bytes, or else
    the first.
    """
    uses = [set(reads(program, k)) for k in program.kernels]
    makes = [set(k.writes()) for k in program.kernels]
    wholes = {p: w for w, some in program.joined.items() for p in some}
    temporary = last_uses(program)
    left: Counter[str] = Counter(n for names in uses for n in names)
    unmade = {n: sum(n in made for made in makes) for made in makes for n in made}
    unmade |= {w: len(some) for w, some in program.joined.items()}

    def growth(i: int) -> int:
        held = [n for n in makes[i] if n in temporary]
        over = [n for n in uses[i] if n in temporary and left[n] == 1]
        size = lambda n: program.buffers[n].nbytes(program.sizes)  # noqa: E731
        return sum(map(size, held)) - sum(map(size, over))

    waiting = list(range(len(program.kernels)))
    order: list[Kernel[Any]] = []
    while waiting:
        ready = [i for i in waiting if not any(unmade.get(n) for n in uses[i])]
        grown = {i: growth(i) for i in ready}
        frees = [i for i in ready if grown[i] <= 0]
        chosen = min(frees, key=lambda i: (grown[i], i)) if frees else ready[0]
        waiting.remove(chosen)
        order.append(program.kernels[chosen])
        left.subtract(uses[chosen])
        for name in makes[chosen]:
            unmade[name] -= 1
            if name in wholes:
                unmade[wholes[name]] -= 1
    return tuple(order)
