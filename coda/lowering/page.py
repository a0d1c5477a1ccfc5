"""What `explain` knows -> one page of HTML, which needs no network and no script.

The page has the kernels of a block as boxes with their operations, bytes and times, what was not
fused and why, and the stages of the lowering. A training step has two such parts, a model one for
each distinct block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from coda.kernels.gemm.weights import weight_reads
from coda.lowering.explain import Explanation
from coda.lowering.explain_stages import pass_facts, record_stages
from coda.lowering.explain_training import TrainingExplanation
from coda.lowering.page_flow import NO_TIMES, Measured, flow_html, micro, size
from coda.lowering.page_style import STYLE
from coda.lowering.program.cost import hbm_bytes, launch_count, prepare_bytes
from coda.lowering.program.memory import temporary_bytes
from coda.lowering.program.text import lines


def page(title: str, about: str, body: Iterable[str]) -> str:
    """A whole page: its title, a line below it, and sections in HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · coda</title><style>{STYLE}</style></head><body><main>"
        f'<header class="top"><h1>{escape(title)}</h1><p class="about">{escape(about)}</p></header>'
        f"{''.join(body)}</main></body></html>\n"
    )


def section(title: str, *content: str, note: str = "") -> str:
    """A section with a heading, and a sentence below it."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section class=part-of-page><h2>{escape(title)}</h2>{said}{''.join(content)}</section>"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()
) -> str:
    """A table of texts; `numbers` are the columns that are aligned to the right."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in right else ''}>{escape(x)}</{tag}>"
            for i, x in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def block_page(explained: Explanation, measured: Measured = NO_TIMES) -> str:
    """The page of a block. `measured` has seconds of kernels that were timed."""
    program = explained.program
    return page(program.graph.name, about(explained), side_html("", explained, measured))


def training_page(found: TrainingExplanation, measured: Measured = NO_TIMES) -> str:
    """The page of a training step: forward, what is kept, and backward."""
    return page(
        f"{found.graph.name}, training", about(found.forward), training_html(found, measured)
    )


def about(explained: Explanation) -> str:
    """The GPU and the sizes, in a line."""
    program = explained.program
    sizes = ", ".join(f"{k} = {v}" for k, v in program.sizes.items())
    return f"{program.target.name} ({program.arch}) · {sizes}"


def side_html(name: str, explained: Explanation, measured: Measured = NO_TIMES) -> list[str]:
    """The sections of one Program; `name` is "forward" or "backward" in training, else ""."""
    which = f"{name}: " if name else ""
    timed = "measured where they were timed, else modelled" if measured else "modelled"
    note = f"From top to bottom in the order of launches. Times are {timed}."
    return [
        section(f"{which}in short".capitalize(), summary([explained])),
        section(
            f"{which}kernels".capitalize(), LANES, flow_html(explained, measured), LEGEND, note=note
        ),
        section(f"{which}what was not fused, and why".capitalize(), _unfused(explained)),
        section(f"{which}weights and memory".capitalize(), _memory(explained)),
        section(f"{which}where each operation went".capitalize(), _operations(explained)),
        section(f"{which}stages of the lowering".capitalize(), _stages(explained)),
    ]


def training_html(found: TrainingExplanation, measured: Measured = NO_TIMES) -> list[str]:
    """The sections of a training step."""
    forward, backward = (
        {k.removeprefix(side): s for k, s in measured.items() if k.startswith(side)}
        for side in ("forward ", "backward ")
    )
    kept = [
        (one.name, "an argument" if one.argument else "stored for the backward", size(one.nbytes))
        for one in found.saved
    ]
    totals = found.saved_bytes
    note = (
        f"Without weights: {size(totals['coda'])}. Op by op torch keeps {size(totals['eager'])}, "
        f"and full checkpointing {size(totals['checkpointed'])}."
    )
    return [
        section("The step in short", summary([found.forward, found.backward])),
        *side_html("forward", found.forward, forward)[1:],
        section(
            "Kept from forward to backward",
            table(("tensor", "what", "bytes"), kept, [2]),
            note=note,
        ),
        *side_html("backward", found.backward, backward)[1:],
    ]


LANES = (
    '<p class="note wide">A line on the left is a tensor in memory, from the kernel that writes it '
    "to those that read it, as thick as it has bytes.</p>"
)
LEGEND = (
    '<p class="legend"><span class="part mainloop"></span>tensor cores or instructions '
    '<span class="part feed"></span>waiting for operands '
    '<span class="part epilogue"></span>epilogue '
    '<span class="part memory"></span>memory '
    '<span class="part launch"></span>launch '
    '<span class="part cublas"></span>cuBLAS and a kernel for the rest</p>'
)


def summary(sides: Sequence[Explanation], times: Sequence[int] = ()) -> str:
    """Launches, bytes and times beside those of the baselines, as bars.

    `times` says how often each side runs; by default once.
    """
    pairs = list(zip(sides, times or [1] * len(sides), strict=True))
    moved = [
        ("coda", sum(hbm_bytes(e.program) * n for e, n in pairs)),
        ("GEMMs apart, the rest fused", sum(e.pointwise.hbm_bytes * n for e, n in pairs)),
        ("op by op", sum(e.eager.hbm_bytes * n for e, n in pairs)),
    ]
    launched = [
        ("coda", sum(launch_count(e.program) * n for e, n in pairs)),
        ("GEMMs apart, the rest fused", sum(e.pointwise.launches * n for e, n in pairs)),
        ("op by op", sum(e.eager.launches * n for e, n in pairs)),
    ]
    spent = [("coda", sum(e.seconds * n for e, n in pairs))]
    if all(e.baseline is not None for e in sides):
        spent.append(("cuBLAS, the rest fused", sum((e.baseline or 0) * n for e, n in pairs)))
    return (
        '<div class="bars">'
        + _bars("Time, modelled", [(n, s, micro(s)) for n, s in spent])
        + _bars("Memory traffic", [(n, b, size(b)) for n, b in moved])
        + _bars("Launches", [(n, k, f"{k:,}") for n, k in launched])
        + "</div>"
    )


def _bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    most = max((v for _, v, _ in rows), default=1) or 1
    shown = "".join(
        f'<li><span class="name">{escape(n)}</span><span class="value">{escape(text)}</span>'
        f'<span class="bar"><span class="{"own" if n == "coda" else "other"}" '
        f'style="width:{100 * v / most:.2f}%"></span></span></li>'
        for n, v, text in rows
    )
    return f"<figure><figcaption>{escape(title)}</figcaption><ul>{shown}</ul></figure>"


def _unfused(explained: Explanation) -> str:
    found = explained.json()
    rows = [
        (one["kernel"], one["why"], size(one["bytes"]), f"{one['modelled_us']:,.1f} µs")
        for one in found["passes"]
    ]
    said = [(one["op"], one["why"]) for one in found["unfused"]]
    slow = [(one["kernel"], one["why"], f"+{one['us']:,.1f} µs") for one in found["slower"]]
    shown = table(
        ("row-wise kernel", "why it is a kernel of its own", "bytes", "time"), rows, [2, 3]
    )
    parts = [
        shown if rows else "",
        table(("operation", "why it was not fused"), said) if said else "",
    ]
    if slow:
        columns = (
            "kernel slower than cuBLAS and a kernel beside",
            "where its time goes",
            "slower by",
        )
        parts.append(table(columns, slow, [2]))
    return "".join(parts) + ("" if said else "<p>No operation was refused a place.</p>")


def _memory(explained: Explanation) -> str:
    program = explained.program
    rows = [
        (
            one.kernel,
            ", ".join(one.weights),
            size(one.nbytes),
            f"a copy: {one.why}" if one.why else "in place",
        )
        for one in weight_reads(program)
    ]
    facts = f"Temporaries take {size(temporary_bytes(program))} at most."
    if program.prepared:
        names = ", ".join(program.prepared)
        facts += f" Made of weights once for each version of them: {names}"
        facts += f" ({size(prepare_bytes(program))})."
    return f"<p>{escape(facts)}</p>" + table(("kernel", "weights", "bytes", "read"), rows, [2])


def _operations(explained: Explanation) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for one in explained.placed:
        rows.setdefault((lines(one.where) or "made by coda", one.went), []).append(one.op)
    shown = [(place, " ".join(ops), went) for (place, went), ops in rows.items()]
    return f"<details><summary>{len(explained.placed)} operations</summary>" + (
        table(("source", "operations", "went to"), shown) + "</details>"
    )


def _stages(explained: Explanation) -> str:
    program = explained.program
    record = record_stages(
        [(program.graph, program.policy)],
        program.sizes,
        program.target,
        frozen=program.frozen,
        check=0,
        show=(),
    )[program.graph.name]
    facts = pass_facts(record)
    rows = [
        (one["stage"], one["does"], one["before"], one["after"], one["did"])
        for one in facts["stages"]
    ]
    note = (
        f"Lowered {facts['lowerings']} times, for choices; number {facts['kept']} is the cheapest."
    )
    return (
        f"<details><summary>{len(rows)} stages</summary><p>{note}</p>"
        + table(("stage", "what it is for", "before", "after", "what it did"), rows)
        + "</details>"
    )
