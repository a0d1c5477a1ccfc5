"""An emitted GEMM module: its text, and what the one who launches it passes under which name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

WHOLE, PAIRS = -1, -2  # how a store is passed that is not one lane of pairs


@dataclass(frozen=True)
class Table:
    """Periodic operands side by side: lanes of one table [M, columns], columns = lanes · period."""

    name: str
    operands: tuple[str, ...]
    lanes: int
    columns: int


@dataclass(frozen=True)
class Source:
    """An emitted module.

    Attributes:
        text: the Python source; `KERNEL` is its `EpiMod`.
        name: a module name that belongs to this text alone.
        d: the buffer that the GEMM's own store writes, or None.
        outputs: (emitted name, buffer, lane) of the other stores; WHOLE for one value at a point,
            PAIRS for both lanes as neighbours.
        operands: emitted names of operands that are passed as they are.
        tables: packed periodic operands.
        sinks: emitted names of the sinks' buffers.
        masks: emitted names of row operands that are 1 inside the matrix and 0 outside.
        row_masks: emitted names of column operands that are 1 inside the matrix and 0 outside.
        numbers: emitted names of operators that take a number: the width of a group's statistic,
            or how often a kernel pauses.
    """

    text: str
    name: str
    d: str | None
    outputs: tuple[tuple[str, str, int], ...]
    operands: dict[str, str]
    tables: tuple[Table, ...]
    sinks: dict[str, str]
    masks: tuple[str, ...]
    row_masks: tuple[str, ...]
    numbers: dict[str, int]

    def renamed(self, names: Mapping[str, str]) -> Source:
        """The same module for a kernel whose operands and buffers have other names."""
        return replace(
            self,
            d=self.d and names[self.d],
            outputs=tuple((emitted, names[b], lane) for emitted, b, lane in self.outputs),
            operands={names[o]: emitted for o, emitted in self.operands.items()},
            tables=tuple(
                replace(t, operands=tuple(names[o] for o in t.operands)) for t in self.tables
            ),
        )
