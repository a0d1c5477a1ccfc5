"""A GEMM's weights -> its operand B [N, K]: an alias of the arguments, or a copy and the reason.

B may be several weights stacked along rows, and its rows may be paired: the rows of a column pair,
which are `split` rows apart in the weight, are adjacent in B. This order is the layout of rows
(2, split, N / (2 · split)) with strides (split, 1, 2 · split), which the mainloop's TMA boxes read
from the weight without a copy. With split = 2:

    weight rows    0 1 2 3 | 4 5 6 7
    B rows         0 2 1 3 | 4 6 5 7
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coda.ir.graph import Input, Node, Slice, walk
from coda.kernels.gemm.mainloop import Gemm, gemms, tiles
from coda.lowering.algebra.roles import as_stored, base, is_transposed, is_view, stacked
from coda.lowering.program.body import paired_columns
from coda.lowering.program.cost import label
from coda.lowering.program.program import Program


@dataclass(frozen=True)
class WeightRead:
    """How a GEMM reads its weights.

    Attributes:
        kernel: the kernel's name.
        weights: the names of the weights.
        together: the arguments that are stacked along rows, in order; they are read without a copy
            if they are adjacent in one allocation.
        nbytes: the bytes of B.
        why: the reason why B is always a copy; "" if it can be an alias.
    """

    kernel: str
    weights: tuple[str, ...]
    together: tuple[Input, ...]
    nbytes: int
    why: str


def weight_reads(program: Program) -> tuple[WeightRead, ...]:
    """How each GEMM of a program whose B is a weight reads it."""
    matrices = [k for k in gemms(program) if not k.mainloop.batch]
    kernels = [k for k in matrices if program.is_weight(k.mainloop.contracts[0].rhs)]
    return tuple(_read(program, k) for k in kernels)


def siblings(program: Program) -> tuple[tuple[Input, ...], ...]:
    """Groups of arguments that are read without a copy if stacked along rows in one allocation."""
    every = [r.together for r in weight_reads(program) if len(r.together) > 1 and not r.why]
    return tuple(dict.fromkeys(every))


def halves(program: Program, kernel: Gemm) -> int:
    """The `split` of paired rows that the mainloop reads by layout; 0 for plain or copied rows."""
    split = kernel.body.epilogue.split
    return 0 if _scattered(program, kernel) else split


def _scattered(program: Program, kernel: Gemm) -> str:
    """The reason why paired rows must be copied into the kernel's order; "" if not."""
    split, pairs = kernel.body.epilogue.split, tiles(kernel).tile_n // 2
    if not split:
        return ""
    if any(is_transposed(c.rhs) for c in kernel.mainloop.contracts):
        return "its rows are read in pairs, and it is stored transposed"
    n = kernel.mainloop.problem(program.sizes)[1]
    if n > 2 * split and split % pairs and pairs % split:
        return f"the rows of a pair are {split} apart, which tiles of {pairs} pairs do not divide"
    return ""


def _read(program: Program, kernel: Gemm) -> WeightRead:
    roots = [c.rhs for c in kernel.mainloop.contracts]
    plain = [as_stored(r) for r in roots]
    names = tuple(dict.fromkeys(n for r in plain for n in _names(r, program)))
    parts = [stacked(p) for p in plain]
    together = tuple(i for p in parts for i in p) if all(parts) else ()
    _, n, k = kernel.mainloop.problem(program.sizes)
    nbytes = n * k * roots[0].dtype.size
    why = _why(program, kernel, roots, together)
    return WeightRead(kernel.name, names, together, nbytes, why)


def _why(program: Program, kernel: Gemm, roots: Sequence[Node], together: Sequence[Input]) -> str:
    """The reason why B is a copy; "" if it can be an alias."""
    under = [as_stored(r) for r in roots]
    made = [u for u in under if u in program.prepared.values() and not stacked(u)]
    if made:
        arguments = [n.name for n in walk(made) if isinstance(n, Input)]
        return f"it is computed of {', '.join(arguments)}"
    if len(roots) > 1 and any(map(is_transposed, roots)):
        return "siblings that are stored transposed are contiguous along columns"
    if not together and not all(_is_rows(u) for u in under):
        return "its rows are stored in another order"
    columns = under[0].shape[-1].size(program.sizes)
    if columns * under[0].dtype.size % 16:
        return "its rows are padded to multiples of 16 bytes"
    return _scattered(program, kernel)


def _is_rows(node: Node) -> bool:
    """Whether a node is an argument or a slice of consecutive rows of one."""
    rows = isinstance(node, Slice) and node.rank == 2 and node.axis == -2 and node.step == 1
    return isinstance(node.operands[0], Input) if rows else isinstance(node, Input)


def _names(node: Node, program: Program) -> list[str]:
    found = stacked(node)
    if found:
        return [i.name for i in found]
    under = base(node) if is_view(node) else node
    return [under.name] if isinstance(under, Input) else [label(under, program)]


def one_below_another(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrix [Σ rows, K] whose consecutive row slices are `parts`, as an alias; else None.

    The parts must have one storage, dtype, width and strides, each beginning where the previous one
    ends.
    """
    if len(parts) == 1:
        return parts[0]
    if not parts or any(p.ndim != 2 for p in parts):
        return None
    first = parts[0]
    after, step = first.storage_offset(), first.stride()
    memory = first.untyped_storage().data_ptr()
    for part in parts:
        like = (part.dtype, part.shape[1], part.stride()) == (first.dtype, first.shape[1], step)
        here = part.untyped_storage().data_ptr() == memory and part.storage_offset() == after
        if not (like and here and part.numel()):
            return None
        after += part.shape[0] * step[0]
    rows = sum(p.shape[0] for p in parts)
    return first.detach().as_strided((rows, first.shape[1]), step)


def weight_matrix(kernel: Gemm, values: Mapping[Node, Tensor]) -> Tensor:
    """B [N, K], the siblings stacked along rows: an alias if they are adjacent, else a copy."""
    parts = [values[c.rhs] for c in kernel.mainloop.contracts]
    whole = one_below_another(parts)
    return torch.cat(parts) if whole is None else whole


def paired_rows(kernel: Gemm, whole: Tensor) -> Tensor:
    """B [N, K] with the rows of each column pair adjacent: a copy, unless rows are plain."""
    split = kernel.body.epilogue.split
    if not split:
        return whole
    order = paired_columns(whole.shape[0], split).reshape(-1)
    return whole[torch.from_numpy(order).to(whole.device)]
