"""Program -> report: kernels, bytes, modelled times, baselines, and the kernels of each op."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coda.errors import Where
from coda.ir.graph import Node, walk
from coda.kernels.gemm.weights import WeightRead, weight_reads
from coda.lowering.fold_in import why_apart
from coda.lowering.program.baseline import baseline_seconds, kernel_baseline
from coda.lowering.program.cost import (
    Baseline,
    describe,
    eager,
    hbm_bytes,
    kernel_time,
    launch_count,
    pointwise_fused,
    prepare_bytes,
    prepare_time,
    scalar_flops,
    tensor_flops,
    traffic,
)
from coda.lowering.program.groups import is_free
from coda.lowering.program.kernel import Kernel
from coda.lowering.program.memory import temporary_bytes
from coda.lowering.program.program import Program
from coda.lowering.program.text import at, lines, show_config
from coda.lowering.program.time import Time


@dataclass(frozen=True)
class Placed:
    """An op of the source, its line, and the kernels that compute it, or why none does."""

    op: str
    where: Where | None
    went: str


class Explanation:
    """The result of `explain`: `str()` is a readable report, `.json()` the same as plain data."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.eager: Baseline = eager(program.graph, program.sizes)
        self.pointwise: Baseline = pointwise_fused(program.graph, program.sizes)
        self.placed: list[Placed] = list(place_ops(program))

    @cached_property
    def times(self) -> list[Time]:
        """The modelled time of each kernel."""
        return [kernel_time(self.program, k) for k in self.program.kernels]

    @property
    def seconds(self) -> float:
        """The modelled time of all kernels."""
        return sum(t.seconds for t in self.times)

    @cached_property
    def baseline(self) -> float | None:
        """Seconds of GEMMs by cuBLAS with the rest fused; None on a GPU without figures."""
        return baseline_seconds(self.program.graph, self.program)

    def json(self) -> dict[str, Any]:
        """The report as plain data; sizes in bytes, times in µs."""
        program = self.program
        return {
            "arch": program.arch,
            "modelled_us": self.seconds * 1e6,
            "cublas_us": None if self.baseline is None else self.baseline * 1e6,
            "slower": [{"kernel": k, "us": us, "why": why} for k, us, why in self._slower()],
            "dims": dict(program.sizes),
            "kernels": [self._kernel(k, t) for k, t in self._timed()],
            "launches": launch_count(program),
            "hbm_bytes": hbm_bytes(program),
            "prepared_bytes": prepare_bytes(program),
            "prepared_us": prepare_time(program).seconds * 1e6,
            "weights": [self._weight(r) for r in weight_reads(program)],
            "eager": vars(self.eager),
            "pointwise_fused": vars(self.pointwise),
            "laws": [{"law": s.law.name, "at": str(s.before.where)} for s in program.steps],
            "ops": [{"op": p.op, "at": str(p.where), "went": p.went} for p in self.placed],
            "passes": [
                {"kernel": k.name, "why": why, "bytes": moved, "modelled_us": time * 1e6}
                for k, why, moved, time in self._passes()
            ],
            "temporary_bytes": temporary_bytes(program),
            "parts": [{"op": at(c.node), "columns": list(c.columns)} for c in program.cuts],
            "unfused": [{"op": at(u.node), "why": u.why} for u in self._unfused()],
        }

    def _passes(self) -> Iterable[tuple[Kernel[Any], str, int, float]]:
        """(kernel, reason that it is separate, bytes, seconds) of each row-wise kernel."""
        for kernel, time in self._timed():
            if kernel.kind.whole_rows:
                moved = traffic(self.program, kernel)
                own = kernel.kind.explain(self.program, kernel).why
                why = "; ".join(filter(None, (own, why_apart(self.program, kernel))))
                yield kernel, why, moved.read_bytes + moved.write_bytes, time.seconds

    def _timed(self) -> Iterable[tuple[Kernel[Any], Time]]:
        return zip(self.program.kernels, self.times, strict=True)

    def _slower(self) -> Iterable[tuple[str, float, str]]:
        """(kernel, µs, reason) of those slower than cuBLAS and one more kernel for their rest."""
        for kernel, time in self._timed():
            other = kernel_baseline(self.program, kernel)
            if other is not None and time.seconds > other:
                yield kernel.name, (time.seconds - other) * 1e6, time.said

    def _weight(self, read: WeightRead) -> dict[str, Any]:
        """How a GEMM reads its weights."""
        return {
            "kernel": read.kernel,
            "weights": list(read.weights),
            "bytes": read.nbytes,
            "copied": bool(read.why),
            "why": read.why,
            "together": [i.name for i in read.together] if len(read.together) > 1 else [],
        }

    def _unfused(self) -> list[Any]:
        return list({(at(u.node), u.why): u for u in self.program.unfused}.values())

    def _kernel(self, kernel: Kernel[Any], time: Time) -> dict[str, Any]:
        program = self.program
        moved = traffic(program, kernel)
        found: dict[str, Any] = {
            "name": kernel.name,
            "kind": kernel.kind.name,
            "flops": tensor_flops(program, kernel) + scalar_flops(program, kernel),
            "read_bytes": moved.read_bytes,
            "write_bytes": moved.write_bytes,
            "reads": [{"tensor": t, "bytes": n} for t, n in moved.reads],
            "writes": [{"tensor": t, "bytes": n} for t, n in moved.writes],
            "modelled_us": time.seconds * 1e6,
            "parts_us": {part: seconds * 1e6 for part, seconds in time.parts.items()},
            "bound": time.bound,
            "fused": list(dict.fromkeys(at(n) for n in kernel.nodes if not is_free(n))),
        }
        if kernel.config is not None:
            found["config"] = show_config(kernel.config)
            account = kernel.kind.explain(program, kernel)
            found |= {"pipeline": account.pipeline, "choice": account.choice}
        if kernel.kind.fuses:
            epilogue = kernel.body.epilogue
            found["operands"] = [f"{o.name} {o.access.word} {o.dtype}" for o in epilogue.operands]
            found["stores"] = [f"{s.buffer} {s.dtype}" for s in epilogue.stores]
            found["sinks"] = [f"{s.buffer} {s.monoid}" for s in epilogue.sinks]
        return found

    def html(self, measured: Mapping[str, float] | None = None) -> str:
        """The report as a page of HTML that needs no network; `coda explain --html FILE` writes it.

        Args:
            measured: seconds of kernels that were timed, by name; the others are modelled, and the
                page says which is which.
        """
        from coda.lowering.page import block_page

        return block_page(self, measured or {})

    def __str__(self) -> str:
        out = io.StringIO()
        self.print(Console(file=out, width=140, color_system=None))
        return out.getvalue()

    def print(self, console: Console) -> None:
        """Write the report to a console."""
        program = self.program
        sizes = " ".join(f"{k}={v}" for k, v in program.sizes.items())
        where = f"{program.arch} (times modelled for {program.target.name})"
        console.print(f"{program.graph.name} on {where}, {sizes}")
        console.print(self.kernels())
        console.print(self._totals())
        self.print_slower(console)
        self.print_weights(console)
        kept = temporary_bytes(program) / 1e6
        console.print(f"memory for what is not returned: {kept:.1f} MB at most")
        console.print(self._ops())
        self.print_passes(console)
        unfused = self._unfused()
        for one in unfused:
            console.print(f"not fused: {at(one.node)}: {one.why}")
        if not unfused:
            console.print("nothing was left unfused")

    def print_slower(self, console: Console) -> None:
        """Print the modelled time beside the baseline's, and the kernels that are slower."""
        if self.baseline is not None:
            own, other = self.seconds * 1e6, self.baseline * 1e6
            console.print(
                f"modelled: {own:.1f} µs; GEMMs by cuBLAS and the rest fused: {other:.1f} µs"
            )
        for name, us, why in self._slower():
            console.print(f"{name} is {us:.1f} µs slower than cuBLAS and a kernel beside: {why}")

    def print_weights(self, console: Console) -> None:
        """Print what is made of weights, and those that a GEMM reads from a copy, or in place."""
        names = ", ".join(self.program.prepared)
        if names:
            moved, us = prepare_bytes(self.program) / 1e6, prepare_time(self.program).seconds * 1e6
            console.print(
                f"made of weights once for each version of them: {names} "
                f"({moved:.1f} MB, {us:.1f} µs)"
            )
        for read in weight_reads(self.program):
            what = f"{read.kernel} reads {', '.join(read.weights)} ({read.nbytes / 1e6:.1f} MB)"
            if read.why:
                console.print(f"{what} from a copy: {read.why}")
            elif len(read.together) > 1:
                console.print(f"{what} in place if they share a buffer (coda.share_weights)")

    def print_passes(self, console: Console) -> None:
        """Print the chunked values, and cost and reason of each row-wise kernel."""
        for cut in self.program.cuts:
            console.print(f"{at(cut.node)} is made in {cut}")
        for kernel, why, moved, time in self._passes():
            console.print(f"{kernel.name} costs {moved / 1e6:.1f} MB, {time * 1e6:.1f} µs: {why}")

    def _ops(self) -> Table:
        """The kernels of each op; ops of one line with the same kernels share a row."""
        ops = Table(title="where each op went", title_justify="left")
        for column in ("op", "source", "went to"):
            ops.add_column(column, overflow="fold")
        rows: dict[tuple[str, str], list[str]] = {}
        for one in self.placed:
            rows.setdefault((lines(one.where), one.went), []).append(one.op)
        for (source, went), names in rows.items():
            ops.add_row(" ".join(names), source, went)
        return ops

    def kernels(self, title: str = "kernels") -> Table:
        """The table of kernels: cost, loads and writes of each."""
        table = Table(title=title, title_justify="left")
        for column in ("kernel", "what", "GFLOP", "MB in", "MB out", "µs", "bound by"):
            right = column in ("GFLOP", "MB in", "MB out", "µs")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for kernel, time in self._timed():
            table.add_row(*self._row(kernel, time))
        return table

    def _row(self, kernel: Kernel[Any], time: Time) -> list[str]:
        program = self.program
        moved = traffic(program, kernel)
        flops = tensor_flops(program, kernel) + scalar_flops(program, kernel)
        account = kernel.kind.explain(program, kernel)
        what = account.what + (f"\nstages {account.pipeline}" if account.pipeline else "")
        what += f"\n{account.choice}" if account.choice else ""
        loads: Iterable[str] = [t for t, _ in moved.reads]
        if kernel.kind.fuses:
            loads = [f"{o.name} ({o.access.word})" for o in kernel.body.epilogue.operands]
        numbers = [flops / 1e9, moved.read_bytes / 1e6, moved.write_bytes / 1e6]
        numbers.append(time.seconds * 1e6)
        shown = [f"{n:.1f}" for n in numbers]
        what += f"\nloads {', '.join(loads) or 'nothing else'}"
        what += f"\nwrites {', '.join(t for t, _ in moved.writes)}"
        return [escape(c) for c in (kernel.name, what, *shown, time.bound)]

    def _totals(self) -> Table:
        table = Table(title="totals", title_justify="left")
        for column in ("program", "launches", "HBM MB", "of coda's"):
            table.add_column(column, justify="left" if column == "program" else "right")
        own = hbm_bytes(self.program)
        rows = (
            ("coda", launch_count(self.program), own),
            ("pointwise and norms fused, GEMMs apart", *_pair(self.pointwise)),
            ("op by op", *_pair(self.eager)),
        )
        for name, count, moved in rows:
            ratio = f"{moved / own:.2f}×" if own else ""
            table.add_row(name, str(count), f"{moved / 1e6:.1f}", ratio)
        return table


def _pair(baseline: Baseline) -> tuple[int, int]:
    return baseline.launches, baseline.hbm_bytes


def place_ops(program: Program) -> Iterable[Placed]:
    """For each op of the source, the kernels that compute it, or the law that removed it."""
    direct: dict[Node, list[str]] = {}
    by_place: dict[Where, list[str]] = {}
    for kernel in program.kernels:
        for node in kernel.nodes:
            direct.setdefault(node, []).append(kernel.name)
            if node.where is not None:
                by_place.setdefault(node.where, []).append(kernel.name)
    prepared = {n for root in program.prepared.values() for n in walk([root])}
    laws: dict[Node, list[str]] = {}
    for step in program.steps:
        laws.setdefault(step.before, []).append(step.law.name)
    for node in walk(program.graph.roots):
        if is_free(node):
            continue
        through = f" by {laws[node][0]}" if node in laws else ""
        if node in direct:
            went = ", ".join(dict.fromkeys(direct[node]))
        elif node in prepared:
            went = "made of weights once for each version of them"
        elif node.where in by_place:
            went = ", ".join(dict.fromkeys(by_place[node.where])) + through
        else:
            went = "rewritten" + (through or " away")
        yield Placed(describe(node), node.where, went)
