"""A Program -> its kernels as boxes from top to bottom, and the tensors between them as lanes.

A lane is a tensor in memory: it leaves the box that writes it and ends at the last that reads it,
as in a drawing of branches. A box says the same in words: what it reads from whom, what it writes
for whom, and the bytes of each. Rows and lanes are cells of a CSS grid, so that boxes may have any
height, and no script runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import Any

from coda.ir.graph import walk
from coda.lowering.algebra.roles import weight_nodes
from coda.lowering.explain import Explanation
from coda.lowering.program.baseline import kernel_baseline
from coda.lowering.program.cost import describe, label, memory_bytes, traffic
from coda.lowering.program.groups import is_free
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.program import Program
from coda.lowering.program.text import lines, show_config

Measured = Mapping[str, float]  # kernel -> seconds
NO_TIMES: Measured = MappingProxyType({})
FIRST, STEP = 12, 8  # pixels from a box's edge to its first lane, and to each further one


@dataclass(frozen=True)
class Lane:
    """A tensor between boxes: its name and bytes, the row that writes it, those that read it."""

    tensor: str
    nbytes: int
    start: int
    ends: tuple[int, ...]


class Flow:
    """Rows 0 (arguments), 1 … n (kernels) and n + 1 (results) of a Program, and its lanes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.moved = [traffic(program, k) for k in program.kernels]
        self.writers: dict[str, int] = {}
        for row, moved in enumerate(self.moved, 1):
            self.writers |= {name: row for name, _ in moved.writes}
        weights = weight_nodes(list(walk(program.graph.roots)), program.policy.per_call)
        self.given = {
            i.name: memory_bytes(i, program) for i in program.graph.inputs if i not in weights
        }
        self.results: dict[str, list[str]] = {}
        for name, node in program.outputs:
            self.results.setdefault(label(node, program), []).append(name)
        self.readers: dict[str, dict[int, None]] = {}
        for row, moved in enumerate(self.moved, 1):
            for name, _ in moved.reads:
                for part in self.parts(name):
                    self.readers.setdefault(part, {})[row] = None
        for name in self.results:
            for part in self.parts(name):
                self.readers.setdefault(part, {})[len(self.moved) + 1] = None

    def parts(self, name: str) -> list[str]:
        """The buffers that a tensor is stored in: several if kernels write parts of it."""
        return [p for n in self.program.joined.get(name, ()) for p in self.parts(n)] or [name]

    def row(self, number: int) -> str:
        """The name of a row: its kernel's, or who gives and takes."""
        if number == 0:
            return "argument"
        return self.program.kernels[number - 1].name if number <= len(self.moved) else "result"

    def source(self, name: str) -> str:
        """Where a kernel's operand comes from, in words."""
        rows = [self.writers[p] for p in self.parts(name) if p in self.writers]
        if rows:
            return "from " + ", ".join(dict.fromkeys(map(self.row, rows)))
        if name in self.given or name in self.program.prepared:
            return "argument" if name in self.given else "made of weights once"
        return "weight" if name in {i.name for i in self.program.graph.inputs} else ""

    def lanes(self) -> list[Lane]:
        """All tensors between two boxes, the short ones first."""
        found: list[Lane] = []
        sizes = {n: b for moved in self.moved for n, b in moved.writes} | self.given
        for name, nbytes in sizes.items():
            start = self.writers.get(name, 0)
            ends = tuple(sorted(r for r in self.readers.get(name, ()) if r > start))
            if ends:
                found.append(Lane(name, nbytes, start, ends))
        return sorted(found, key=lambda lane: (lane.ends[-1] - lane.start, lane.start))

    def placed(self) -> list[tuple[Lane, int]]:
        """Each lane with its column, from 0 beside the boxes: no two overlap in one."""
        taken: list[list[Lane]] = []
        found: list[tuple[Lane, int]] = []
        for lane in self.lanes():
            free = (
                i
                for i, others in enumerate(taken)
                if all(lane.start >= o.ends[-1] or o.start >= lane.ends[-1] for o in others)
            )
            column = next(free, len(taken))
            if column == len(taken):
                taken.append([])
            taken[column].append(lane)
            found.append((lane, column))
        return found


def size(nbytes: float) -> str:
    """Bytes in words: 67.1 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"


def micro(seconds: float) -> str:
    """Seconds in words: 2,480.0 µs, or 83.4 ms from 10 ms on."""
    return f"{seconds * 1e6:,.1f} µs" if seconds < 10e-3 else f"{seconds * 1e3:,.1f} ms"


def flow_html(explained: Explanation, measured: Measured = NO_TIMES) -> str:
    """The boxes and lanes of a Program. `measured` has seconds of kernels that were timed."""
    flow = Flow(explained.program)
    placed = flow.placed()
    count = 1 + max((column for _, column in placed), default=-1)
    longest = max(
        [t.seconds for t in explained.times]
        + [kernel_baseline(explained.program, k) or 0.0 for k in explained.program.kernels],
        default=1.0,
    )
    most = max((lane.nbytes for lane, _ in placed), default=1) or 1
    last = len(flow.moved) + 2
    lanes = [sum(lane.start == 0 for lane, _ in placed)]
    lanes += [sum(lane.ends[-1] == last - 1 for lane, _ in placed)]
    boxes = [_ends("arguments", flow.given.items(), (1, count), lanes[0])]
    for row, kernel in enumerate(explained.program.kernels, 1):
        seconds = measured.get(kernel.name)
        card = _card(explained, flow, row, longest, seconds)
        kind = "rowwise" if kernel.kind.whole_rows else "gemm" if kernel.kind.tiled else "torch"
        boxes.append(_cell(card, row + 1, count, f"kernel {kind}"))
    sizes = {n: b for moved in flow.moved for n, b in moved.writes} | flow.given
    out = [
        (_named(n, names), sum(sizes.get(p, 0) for p in flow.parts(n)))
        for n, names in flow.results.items()
    ]
    boxes.append(_ends("results", out, (last, count), lanes[1]))
    offsets: Counter[tuple[int, str]] = Counter()
    drawn = "".join(
        _lane(flow, lane, (count - column, count + 1), most, offsets) for lane, column in placed
    )
    return f'<div class="flow" style="--lanes:{count}">{"".join(boxes)}{drawn}</div>'


def _named(buffer: str, outputs: Sequence[str]) -> str:
    """The results that a buffer holds, and its name if it has another."""
    return buffer if list(outputs) == [buffer] else f"{', '.join(outputs)} in {buffer}"


def _cell(content: str, row: int, lanes: int, kind: str, high: int = 0) -> str:
    style = f' style="min-height:{high}px"' if high else ""
    return (
        f'<div class="cell" style="grid-row:{row};grid-column:{lanes + 1}">'
        f'<section class="box {kind}"{style}>{content}</section></div>'
    )


def _ends(title: str, tensors: Iterable[tuple[str, int]], place: tuple[int, int], ends: int) -> str:
    """The box of the arguments or of the results, as high as its lanes need.

    `place` is its row, and the number of lanes beside it; `ends` of them begin or end here.
    """
    shown = "".join(f"<li><b>{escape(n)}</b> <i>{size(b)}</i></li>" for n, b in tensors)
    return _cell(
        f'<h4>{title}</h4><ul class="ports row">{shown}</ul>',
        *place,
        "ends",
        FIRST + STEP * (ends + 1),
    )


def _lane(
    flow: Flow, lane: Lane, columns: tuple[int, int], most: int, offsets: Counter[tuple[int, str]]
) -> str:
    """The pieces of a lane: out of its writer, past rows, into its readers.

    `columns` are its own and that of the boxes.
    """
    width = 1 + round(3 * lane.nbytes / most)
    names = ", ".join(flow.row(r) for r in lane.ends)
    title = escape(f"{lane.tensor}, {size(lane.nbytes)}: {flow.row(lane.start)} to {names}")
    colour = f"--w:{width}px" + (";--c:var(--given)" if lane.start == 0 else "")

    def piece(kind: str, rows: str, high: int = 0) -> str:
        across = f"{columns[0]}" if kind == "past" else f"{columns[0]} / {columns[1]}"
        style = f"grid-row:{rows};grid-column:{across};{colour}"
        style += f";--h:{high}px" if high else ""
        return f'<div class="lane {kind}" style="{style}" title="{title}"></div>'

    def next_offset(row: int, side: str) -> int:
        offsets[row, side] += 1
        return FIRST + STEP * offsets[row, side]

    last = lane.ends[-1]
    found = [piece("out", f"{lane.start + 1}", next_offset(lane.start, "out"))]
    if last - lane.start > 1:
        found.append(piece("past", f"{lane.start + 2} / {last + 1}"))
    for row in lane.ends:
        kind = "in last" if row == last else "in"
        found.append(piece(kind, f"{row + 1}", next_offset(row, "in")))
    return "".join(found)


def _card(
    explained: Explanation, flow: Flow, row: int, longest: float, measured: float | None
) -> str:
    """A kernel: what it is, its time, its operations, what it reads and writes."""
    program, kernel = explained.program, explained.program.kernels[row - 1]
    account, moved = kernel.kind.explain(program, kernel), flow.moved[row - 1]
    reads = [(n, b, flow.source(n)) for n, b in _summed(moved.reads)]
    writes = [(n, b, _readers(flow, n)) for n, b in _summed(moved.writes)]
    config = [show_config(kernel.config)] if kernel.config is not None else []
    more = [f"stages {account.pipeline}"] if account.pipeline else []
    more += [account.choice] if account.choice else []
    why = f'<p class="why">A kernel of its own: {escape(account.why)}</p>' if account.why else ""
    what = account.what.split("\n")[0].split(", ")[0]
    return (
        f'<header><h4>{escape(kernel.name)}</h4><code class="what">{escape(what)}</code></header>'
        f"{_time(explained, row, longest, measured)}{why}{_operations(kernel)}"
        f'<div class="io">{_ports("reads", reads)}{_ports("writes", writes)}</div>'
        f'<p class="fine">{escape("; ".join([*config, *more]))}</p>'
    )


def _summed(tensors: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    found: Counter[str] = Counter()
    for name, nbytes in tensors:
        found[name] += nbytes
    return found.most_common()


def _readers(flow: Flow, name: str) -> str:
    rows = [r for r in flow.readers.get(name, ()) if r > flow.writers.get(name, 0)]
    return ("for " + ", ".join(map(flow.row, rows))) if rows else ""


def _ports(title: str, tensors: Sequence[tuple[str, int, str]]) -> str:
    shown = "".join(
        f"<li><b>{escape(n)}</b> <i>{size(b)}</i> <span>{escape(whom)}</span></li>"
        for n, b, whom in tensors
    )
    total = size(sum(b for _, b, _ in tensors))
    return f"<div><h5>{title} {total}</h5><ul class=ports>{shown}</ul></div>"


def _operations(kernel: Kernel[Any]) -> str:
    """The operations of a kernel, by the user's line."""
    places: dict[str, Counter[str]] = {}
    for node in kernel.nodes:
        if not is_free(node):
            places.setdefault(lines(node.where) or "made by coda", Counter())[describe(node)] += 1
    shown = [
        f"<li><code>{escape(place)}</code> "
        + " ".join(escape(op) + (f" ×{n}" if n > 1 else "") for op, n in ops.items())
        + "</li>"
        for place, ops in places.items()
    ]
    few, rest = shown[:6], shown[6:]
    more = f"<details><summary>{len(rest)} more lines</summary><ul class=ops>{''.join(rest)}</ul>"
    return f"<ul class=ops>{''.join(few)}</ul>" + (f"{more}</details>" if rest else "")


def _time(explained: Explanation, row: int, longest: float, measured: float | None) -> str:
    """The bar of a kernel's time, part by part, and that of its baseline."""
    time, kernel = explained.times[row - 1], explained.program.kernels[row - 1]
    parts = "".join(
        f'<span class="part {name}" style="width:{100 * s / longest:.2f}%" '
        f'title="{name} {micro(s)}"></span>'
        for name, s in time.parts.items()
    )
    said = f"<b>{micro(time.seconds)}</b> modelled, bound by {escape(time.bound)}"
    if measured is not None:
        said = f"<b>{micro(measured)}</b> measured ({micro(time.seconds)} modelled)"
    other = kernel_baseline(explained.program, kernel)
    bar = f'<div class="bar">{parts}</div>'
    if other is not None:
        width = f"width:{100 * other / longest:.2f}%"
        bar += f'<div class="bar"><span class="part cublas" style="{width}"></span></div>'
        said += f" · cuBLAS and a kernel beside it: {micro(other)}"
    return f'<div class="time"><p>{said}</p>{bar}</div>'
