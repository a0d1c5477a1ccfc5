"""Results of launches -> tables of text, and plain data for JSON."""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coda.sim.host.launch import MAX_SMEM
from coda.sim.types import Finding, Launch, LaunchResult

_SIZED, _REGISTER_COUNT = 0x04, 0x2F  # of a row of .nv.info
_REGISTERS, _THREADS, _BLOCKS, _SMEM = 65536, 2048, 32, 233472  # of one multiprocessor


@dataclass(frozen=True)
class Occupancy:
    """Resources of a kernel; `blocks` fit on one multiprocessor, limited by resource `limit`."""

    registers: int
    smem: int
    blocks: int
    limit: str

    def text(self) -> str:
        """As text."""
        many = "block" if self.blocks == 1 else "blocks"
        return f"{self.blocks} {many} ({self.limit})\n{self.registers} registers"


def occupancy(launch: Launch) -> Occupancy | None:
    """Occupancy of a launch, from its cubin; None if the cubin does not contain the kernel."""
    found = _usage(launch.cubin, launch.kernel)
    if found is None:
        return None
    registers, static = found
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    warps = -(-threads // 32)
    smem = launch.smem + static
    limits = {
        "registers": _REGISTERS // (-(-registers // 8) * 8 * 32 * warps) if registers else _BLOCKS,
        "shared memory": _SMEM // (-(-(smem + 1024) // 128) * 128),
        "threads": _THREADS // (32 * warps),
        "blocks": _BLOCKS,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(registers, min(smem, MAX_SMEM), limits[limit], limit)


def _usage(cubin: bytes, kernel: str) -> tuple[int, int] | None:
    """(registers per thread, bytes of static shared memory) of a kernel in a cubin."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + k * entry) for k in range(count)]
    strings = headers[names][4]
    found: dict[str, tuple[int, int]] = {}
    for header in headers:
        start = strings + header[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        found[name] = header[4], header[5]
    if f".text.{kernel}" not in found:
        return None
    symbols = found[".symtab"][0], found[".strtab"][0]
    registers = _registers(cubin, *found[".nv.info"], *symbols, kernel)
    return registers, found.get(f".nv.shared.{kernel}", (0, 0))[1]


def _registers(cubin: bytes, start: int, size: int, symbols: int, names: int, kernel: str) -> int:
    """The register count of a kernel in the section .nv.info: (format, attribute, value) rows."""
    at = start
    while at < start + size:
        form, attribute, length = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form != _SIZED:
            continue
        if attribute == _REGISTER_COUNT:
            symbol, count = struct.unpack_from("<II", cubin, at)
            (name,) = struct.unpack_from("<I", cubin, symbols + 24 * symbol)
            if cubin[names + name : cubin.index(b"\0", names + name)].decode() == kernel:
                return count
        at += length
    return 0


@dataclass
class Launched:
    """One launch: its shape, what the machine counted, and how it ended."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem: int
    schedule: str
    result: LaunchResult
    occupancy: Occupancy | None = None
    error: str | None = None

    def shape(self) -> str:
        """Grid, block, cluster and shared memory."""
        grid, block, cluster = (
            "x".join(map(str, d)) for d in (self.grid, self.block, self.cluster)
        )
        clusters = f"clusters of {cluster}\n" if cluster != "1x1x1" else ""
        return f"{grid} blocks of {block}\n{clusters}{self.smem:,} B shared"


@dataclass
class Report:
    """Results of a simulated device: one entry per launch, in order."""

    arch: str
    launches: list[Launched] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """All findings of the checks, in order of the launches."""
        return [f for launch in self.launches for f in launch.result.findings]

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {"arch": self.arch, "launches": [_plain(launch) for launch in self.launches]}

    def tables(self) -> list[Table]:
        """Tables of launches, instructions, traffic per tensor, and findings."""
        return [self._launches(), *self._instructions(), *self._traffic(), *self._findings()]

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=120)
        for table in self.tables():
            console.print(table)
        return buffer.getvalue().rstrip() + "\n"

    def _launches(self) -> Table:
        table = Table(title=f"launches on a simulated {self.arch}", title_justify="left")
        for name in ("#", "kernel", "shape", "fits on one SM"):
            table.add_column(name)
        for name in ("bytes loaded\nstored", "tensor FLOP\nbank conflicts", "warp-inst.\nseconds"):
            table.add_column(name, justify="right", no_wrap=True)
        for k, launch in enumerate(self.launches):
            result = launch.result
            traffic = result.per_allocation.values()
            error = f"\n[red]{escape(launch.error)}[/]" if launch.error else ""
            table.add_row(
                str(k),
                f"{escape(short_name(launch.kernel))}\n{launch.schedule}{error}",
                launch.shape(),
                launch.occupancy.text() if launch.occupancy else "",
                f"{sum(t.loaded for t in traffic):,}\n{sum(t.stored for t in traffic):,}",
                f"{result.flops:,}\n{result.bank_conflicts:,}",
                f"{result.warp_instructions:,}\n{result.seconds:.2f}",
            )
        return table

    def _instructions(self) -> list[Table]:
        """Instructions by class, and executions per synchronisation site: 0 means not tested."""
        table = Table(title="warp instructions", title_justify="left")
        for name in ("#", "by class", "synchronising sites\nthat ran"):
            table.add_column(name)
        for k, launch in enumerate(self.launches):
            result = launch.result
            text = ", ".join(f"{name} {n:,}" for name, n in result.instructions.most_common() if n)
            ran = sum(n > 0 for n in result.sync_sites.values())
            table.add_row(str(k), escape(text), f"{ran} of {len(result.sync_sites)}")
        return [table] if self.launches else []

    def _traffic(self) -> list[Table]:
        rows = [
            (k, kind, name, t)
            for k, launch in enumerate(self.launches)
            for kind, found in (
                ("tensor", launch.result.per_allocation),
                ("unit", launch.result.per_unit),
            )
            for name, t in found.items()
        ]
        if not rows:
            return []
        table = Table(title="bytes of global memory", title_justify="left")
        for name in ("#", "of", "name"):
            table.add_column(name)
        for name in ("loaded", "unique", "stored", "unique"):
            table.add_column(name, justify="right")
        for k, kind, name, t in rows:
            numbers = (t.loaded, t.unique_loaded, t.stored, t.unique_stored)
            table.add_row(str(k), kind, escape(name), *(f"{n:,}" for n in numbers))
        return [table]

    def _findings(self) -> list[Table]:
        found = self.findings
        if not found:
            return [Table(title="no findings", title_justify="left")]
        kinds = Counter(f.kind for f in found)
        title = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        table = Table(title=f"findings: {title}", title_justify="left", show_lines=True)
        for name in ("kind", "what", "where"):
            table.add_column(name)
        for f in found:
            where = f"CTA {f.cta}, warp {f.warp}\nPTX line {f.ptx_line}: {escape(f.short_text())}"
            source = f"\n{f.source}" if f.source else ""
            table.add_row(f.kind, escape(f.message), f"{short_name(f.kernel)}\n{where}{source}")
        return [table]


def _plain(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries, sequences as lists."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def short_name(kernel: str) -> str:
    """The informative part of a mangled kernel name."""
    name = kernel.removeprefix("kernel_cutlass_")
    return name if len(name) <= 48 else name[:45] + "..."
