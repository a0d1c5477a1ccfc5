"""Program -> Program with liveness: buffers dead after each kernel, and stores that run in place.

A kernel stores in place of an operand if this is the operand's last use and both are accessed at
the same index. The store then needs no memory of its own.

    rows1: load a tile; store y tile = f(a)     a dead after rows1:  overwrites = {"y": "a"}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import replace
from typing import Any

from coda.ir.dims import product
from coda.ir.graph import Input, Node
from coda.ir.views import under_reshapes
from coda.lowering.program.access import Alternating, Tile
from coda.lowering.program.epilogue import Operand, StoreExpr
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program


def held_in(program: Program, node: Node) -> set[str]:
    """The buffers and arguments that hold a value, or the value that it is a view of."""
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
    """The buffers and arguments that a kernel reads, once for each read."""
    found = [n for node in kernel.reads() for n in held_in(program, node)]
    return [*found, *kernel.partials()]


def last_uses(program: Program) -> dict[str, int]:
    """Temporary buffer -> index of the last kernel that reads or writes it.

    Outputs and arguments are not in it. A joined buffer and its parts are live together.
    """
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
    """Fill in `freed` (buffers dead after each kernel) and `overwrites` (stores in place).

    A donated argument may be overwritten in its last read; it is not in `freed`.
    """
    over = last_uses(program)
    count = range(len(program.kernels))
    freed = tuple(tuple(n for n, last in over.items() if last == i) for i in count)
    for i, kernel in enumerate(program.kernels):
        donated = program.policy.donated & set(reads(program, kernel))
        over |= dict.fromkeys(donated, i)
    overwrites: dict[str, str] = {}
    for i, kernel in enumerate(program.kernels):
        overwrites |= _overwrites(program, kernel, {n for n, last in over.items() if last == i})
    return replace(program, freed=freed, overwrites=overwrites)


def _overwrites(program: Program, kernel: Kernel[Any], ending: Set[str]) -> dict[str, str]:
    """Buffer of a store -> dying operand of the same kernel, read once and at the same index.

    Args:
        program: the Program.
        kernel: one of its kernels.
        ending: names of buffers and donated arguments whose last use is this kernel.
    """
    found: dict[str, str] = {}
    parts = {p for whole, some in program.joined.items() for p in (whole, *some)}
    outputs = [n for o, n in program.outputs if o in program.policy.updated]
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
    """The buffer that an operand reads, if a store can alias it; otherwise "".

    Both need the same dtype, access and number of elements.
    """
    node = kernel.body.nodes.get(operand.name)
    if node is None or operand.name in kernel.body.spread:
        return ""
    twice = isinstance(operand.access, Alternating)
    lanes = 2 if twice else kernel.body.epilogue.lanes
    own = isinstance(operand.access, Tile | Alternating)
    same = own and operand.access == store.access and not store.rows
    if not same or (operand.dtype, lanes) != (store.dtype, len(store.lanes)):
        return ""
    node = under_reshapes(node)
    if not isinstance(node, Input) and node not in program.places:
        return ""
    (name,) = held_in(program, node)
    old, new = program.buffers[name], program.buffers[store.buffer]
    elements = {product(s).size(program.sizes) for s in (old.shape, new.shape, node.shape)}
    handed_out = old.kind == "input" and new.kind == "output"
    return "" if len(elements) > 1 or handed_out else name


def temporary_bytes(program: Program) -> int:
    """Peak bytes of temporary buffers in a call.

    Outputs do not count, nor do buffers that reuse the storage of a donated argument. A kernel's
    own memory (`Kind.scratch`) is live in its launch alone.
    """
    over = last_uses(program)
    live: set[str] = set()
    most = 0
    for kernel, ending in zip(program.kernels, program.freed, strict=True):
        made = {n for n in kernel.writes() if n in over}
        live |= {n for n in made if n not in program.overwrites}
        held = sum(program.buffers[n].nbytes(program.sizes) for n in live)
        most = max(most, held + kernel.kind.scratch(program, kernel).held)
        heirs = {old: new for new, old in program.overwrites.items()}
        for name in ending:
            if name in live and name in heirs and heirs[name] in over:
                live.add(heirs[name])
            live.discard(name)
    return most


def soonest_freed(program: Program) -> tuple[Kernel[Any], ...]:
    """The kernels in a topological order that frees temporary buffers early.

    Greedy: of the ready kernels, the next one is that which frees the most bytes, if any does not
    increase the live bytes; otherwise the first in the present order.
    """
    uses = [set(reads(program, k)) for k in program.kernels]
    makes = [set(k.writes()) for k in program.kernels]
    wholes = {p: w for w, some in program.joined.items() for p in some}
    temporary = last_uses(program)
    left: Counter[str] = Counter(n for names in uses for n in names)
    unmade = {n: sum(n in made for made in makes) for made in makes for n in made}
    unmade |= {w: len(some) for w, some in program.joined.items()}

    def size(name: str) -> int:
        return program.buffers[name].nbytes(program.sizes)

    def growth(i: int) -> int:
        held = [n for n in makes[i] if n in temporary]
        over = [n for n in uses[i] if n in temporary and left[n] == 1]
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
