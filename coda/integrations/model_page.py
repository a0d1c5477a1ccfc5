"""A model's report -> one page of HTML: each distinct block once, and what is left to torch."""

from __future__ import annotations

from html import escape

from coda.integrations.model_report import ModelExplanation
from coda.integrations.report import RegionReport
from coda.lowering.page import about, page, section, side_html, size, summary, table
from coda.lowering.page_flow import micro
from coda.lowering.program.cost import hbm_bytes

Kind = tuple[RegionReport, int]


def model_page(found: ModelExplanation) -> str:
    """The page of a model."""
    kinds, report = found.kinds, found.report
    rest = sum(report.left.values())
    breaks = sum(found.breaks.values())
    said = f"{report.fused} operators in blocks, {rest} left to torch, {breaks} graph breaks"
    if kinds:
        said += f" · {about(kinds[0][0].forward)}"
    most = max(kinds, key=_seconds, default=None)
    body = [_breaks(found), _in_short(kinds), _blocks(kinds)]
    body += [_left(found), *(_block(i, kind, most) for i, kind in enumerate(kinds, 1))]
    return page(found.name.rstrip("/").rsplit("/", 1)[-1], said, filter(None, body))


def _breaks(found: ModelExplanation) -> str:
    if not found.breaks:
        return ""
    rows = [(why.splitlines()[0], str(n)) for why, n in found.breaks.items()]
    return section("Graph breaks", table(("why", "times"), rows, [1]))


def _in_short(kinds: list[Kind]) -> str:
    """The totals of all blocks, with each as often as it is called."""
    sides = [(e, n) for r, n in kinds for e in r.sides]
    if not sides:
        return section("In short", "<p>No block is cheaper than torch.</p>")
    note = "All blocks of a step, each as often as it is called; without what is left to torch."
    return section("In short", summary([e for e, _ in sides], [n for _, n in sides]), note=note)


def _blocks(kinds: list[Kind]) -> str:
    """A table of the blocks, in the order of the model: equal layers are one row."""
    rows: list[tuple[str, ...]] = []
    for number, (region, times) in enumerate(kinds, 1):
        moved = sum(hbm_bytes(e.program) for e in region.sides)
        kernels = " + ".join(str(len(e.program.kernels)) for e in region.sides)
        rows.append(
            (
                str(number),
                region.name,
                f"× {times}",
                kernels,
                size(moved * times),
                micro(_seconds((region, times))),
            )
        )
    columns = ("", "from the first to the last contraction", "calls", "kernels", "bytes", "time")
    note = (
        "Equal layers are one block, named after its first call. Kernels are those of the forward, "
        "and of the backward behind a plus. Bytes and modelled times are of all its calls."
    )
    return section("Blocks", table(columns, rows, [0, 2, 3, 4, 5]), note=note)


def _left(found: ModelExplanation) -> str:
    """What is left to torch, the most bytes first."""
    rows = [
        (one.op, str(one.times), size(one.nbytes), one.why, one.takes) for one in found.report.rest
    ]
    rows += [("a graph", "1", "", g.whole, "") for g in found.report.graphs if g.whole]
    columns = ("operator", "times", "bytes", "why", "what it would take")
    note = "Torch runs these operators around the blocks. The most bytes come first."
    shown = table(columns, rows, [1, 2]) if rows else "<p>Nothing.</p>"
    return section("Left to torch, and what it would take", shown, note=note)


def _seconds(kind: Kind) -> float:
    """The modelled time of all calls of a block."""
    region, times = kind
    return sum(e.seconds for e in region.sides) * times


def _block(number: int, kind: Kind, most: Kind | None) -> str:
    """One distinct block; all are closed but that which takes the most time."""
    region, times = kind
    names = ("forward", "backward") if region.backward else ("",)
    pairs = zip(names, region.sides, strict=True)
    inside = "".join(part for name, side in pairs for part in side_html(name, side))
    opened = " open" if kind is most else ""
    title = f"Block {number} · {escape(region.name)} · {times} call" + "s" * (times > 1)
    return f'<details class="fold"{opened}><summary>{title}</summary>{inside}</details>'
