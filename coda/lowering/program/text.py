"""Program -> text: one paragraph per kernel, with its epilogue in single-assignment form.

An epilogue that adds a bias:

    gemm0 = ...
      load b row bf16
      %0 = add acc, b
      store y [M, N] bf16 = %0
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, assert_never

from coda.errors import Where
from coda.ir.dims import show_shape
from coda.ir.graph import Node, Size
from coda.lowering.program.access import (
    Alternating,
    ColumnVector,
    Grouped,
    Line,
    OneElement,
    Partial,
    Periodic,
    RowVector,
    Shifted,
    Tile,
)
from coda.lowering.program.body import Body
from coda.lowering.program.cost import describe, label
from coda.lowering.program.epilogue import (
    Acc,
    Between,
    Call,
    Expr,
    Literal,
    Load,
    Operand,
    PickColumn,
    Position,
    Stat,
    SumRows,
    calls,
)
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.lowering.program.target import Config


def show_program(program: Program) -> str:
    """The whole Program; `str(program)` is the same."""
    sizes = " ".join(f"{k}={v}" for k, v in program.sizes.items())
    lines = [f"program {program.graph.name} {program.arch} {sizes}"]
    for name, node in program.prepared.items():
        what = " ".join([describe(node), *(label(o, program) for o in node.operands)])
        lines.append(f"  {name} = prepared {show_shape(node.shape)} {node.dtype}: {what}")
    for kernel in program.kernels:
        lines += ["", *show_kernel(program, kernel)]
    returned = [f"{name}={label(node, program)}" for name, node in program.outputs]
    return "\n".join([*lines, "", "  return " + ", ".join(returned)]) + "\n"


def show_kernel(program: Program, kernel: Kernel[Any]) -> list[str]:
    """The lines of one kernel: head, loads, statistics, expressions, stores and sinks."""
    head = kernel.kind.explain(program, kernel).head
    return [f"  {kernel.name} = {head}", *_body(program, kernel)]


def program_source(program: Program) -> str:
    """The generated CuTe DSL modules of all kernels, concatenated; equal modules once."""
    return "\n\n".join(dict.fromkeys(kernel_source(program, k) for k in program.kernels))


def kernel_source(program: Program, kernel: Kernel[Any]) -> str:
    """The module emitted for a kernel; for a kernel that torch computes, the reason."""
    kind = kernel.kind
    if kind.code is None:
        return f'"""{kernel.name}: {kind.name}, since {kind.explain(program, kernel).why}."""\n'
    return kind.code.emit(program, kernel)[0].text


def at(node: Node) -> str:
    """A node's operation and its line in the user's file."""
    where = lines(node.where)
    return f"{describe(node)} ({where})" if where else describe(node)


def lines(where: Where | None) -> str:
    """The line in the block, and in brackets the line in the function that it calls there."""
    if where is None or not where.calls:
        return _line(where)
    file, line = where.calls[-1]
    inner = f":{where.line}" if where.file == file else _line(where)
    return f"{Path(file).name}:{line} ({inner})"


def _line(where: Where | None) -> str:
    return f"{Path(where.file).name}:{where.line}" if where else ""


def show_config(config: Config) -> str:
    """`128×256 cluster 2×1`, with `depths 2+1` (loads, stores) if not the library's."""
    text = f"{config.tile_m}×{config.tile_n} cluster {config.cluster[0]}×{config.cluster[1]}"
    text += " ping-pong" if config.pingpong else ""
    text += " dynamic" if config.dynamic else ""
    text += f" split-K {config.split_k}" if config.split_k > 1 else ""
    given = config.loads or config.stores
    return text + (f" depths {config.loads}+{config.stores}" if given else "")


def _body(program: Program, kernel: Kernel[Any]) -> list[str]:
    body = kernel.body
    epilogue = body.epilogue
    names: dict[Expr, str] = {}
    lines = [f"    load {_operand(o, body, program)}" for o in epilogue.operands]
    for stat in epilogue.statistics:
        if stat.expr is not None:
            lines += _assignments([stat.expr], names)
        what = stat.operand or _name(stat.expr, names)
        over = (
            f"groups of {stat.group}"
            if stat.group
            else (f"{stat.width} columns" if stat.width else "all rows")
        )
        lines.append(f"    {stat.name} = {stat.monoid} {what} over {over}")
    lines += _assignments(epilogue.results, names)
    for store in epilogue.stores:
        buffer = program.buffers[store.buffer]
        values = ", ".join(_name(e, names) for e in store.lanes)
        split = epilogue.apart(store)
        apart = f" {split} apart" if split else ""
        shape = show_shape(buffer.shape)
        old = program.overwrites.get(store.buffer)
        over = f" over {old}" if old else ""
        rows = f" rows {store.rows.order}" if store.rows else ""
        lines.append(
            f"    store {store.buffer} {shape} {store.dtype} = {values}{apart}{rows}{over}"
        )
    for sink in epilogue.sinks:
        values = ", ".join(_name(e, names) for e in sink.lanes)
        at = f" at {sink.index}" if isinstance(sink, PickColumn) else ""
        within = sink.within if isinstance(sink, SumRows) else None
        each = f" of each {within} rows" if within is not None else ""
        each += ", whole" if isinstance(sink, SumRows) and sink.whole else ""
        lines.append(f"    sink {sink.buffer} = {sink.monoid} {values}{at}{each}")
    return lines


def _operand(operand: Operand, body: Body, program: Program) -> str:
    text = f"{operand.name} {operand.access.word} {operand.dtype}"
    packed = [p for p in body.packed if p.name == operand.name]
    if packed:
        used = sorted({int(i) for i in packed[0].source if i >= 0})
        sources = [label(body.sources[i], program) for i in used]
        text += " of " + (", ".join(sources) if sources else "segment numbers")
    node = body.nodes.get(operand.name)
    if isinstance(node, Size):
        text += f" = {node.dim}"
    match operand.access:
        case Periodic(period=period, each=each, swaps=swaps):
            shared = f", {each} columns each" if each > 1 else ""
            return f"{text} repeating every {period}{shared}{_moved(swaps)}"
        case Tile(swaps=swaps):
            return text + _moved(swaps)
        case Grouped(size=size):
            return f"{text} for groups of {size}"
        case Shifted(steps=steps):
            return f"{text} by {', '.join(map(str, steps))}"
        case RowVector() | ColumnVector() | Alternating() | OneElement():
            return text
        case Line() | Partial():
            return text
        case _ as never:
            assert_never(never)


def _moved(swaps: tuple[int, ...]) -> str:
    return f" with columns {', '.join(map(str, swaps))} apart swapped" if swaps else ""


def _assignments(exprs: Iterable[Expr], names: dict[Expr, str]) -> list[str]:
    lines: list[str] = []
    for call in calls(exprs):
        if call not in names:
            args = ", ".join(_name(a, names) for a in call.args)
            names[call] = f"%{len(names)}"
            lines.append(f"    {names[call]} = {call.fn} {args}")
    return lines


def _name(expr: Expr | None, names: dict[Expr, str]) -> str:
    match expr:
        case Acc(lane=lane):
            return f"acc.{lane}" if lane else "acc"
        case Load(operand=name, lane=lane):
            return f"{name}.{lane}" if lane else name
        case Stat(name=name, plane=plane):
            return f"{name}.{plane}" if plane else name
        case Position() | Between():
            return str(expr)
        case Literal(value=value):
            return f"{value:g}"
        case Call():
            return names[expr]
        case _:
            return "?"
