"""An emitted GEMM module: its text, and the names under which a launch passes tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

WHOLE, PAIRS, WORDS = -1, -2, -3  # in place of a lane number: see `GemmSource.outputs`


@dataclass(frozen=True)
class Table:
    """A table [M, columns] whose lanes are periodic operands; columns = lanes · period."""

    name: str
    operands: tuple[str, ...]
    lanes: int
    columns: int

    @property
    def by_tma(self) -> bool:
        """Whether it is loaded as tiles, by TMA: if it is whole subtiles of 64 columns."""
        return self.columns % 64 == 0


@dataclass(frozen=True)
class GemmSource:
    """An emitted module.

    Attributes:
        text: the Python source; `KERNEL` is its `EpiMod`.
        name: the module's name, with a hash of the text.
        d: the buffer that the GEMM's own store writes; None if there is none.
        outputs: (emitted name, buffer, lane) of the other stores. The lane is 0 or 1 for one column
            of each pair, WHOLE for one value per element or pair, PAIRS for adjacent column pairs,
            WORDS for two neighbours for each column, as one word of 32 bits.
        operands: operand name -> emitted name, for operands that are passed unpacked; of partials
            the name of the first value that is computed from them.
        tables: packed periodic operands.
        sinks: emitted name -> buffer of each sink, and of each column that is stored.
        masks: emitted names of row vectors that are 1 in the matrix and 0 in padding columns.
        row_masks: emitted names of column vectors that are 1 in the matrix and 0 in padding rows.
        numbers: emitted name -> constant of an op: the width of a statistic's group, or the number
            of elements between pauses.
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

    def renamed(self, names: Mapping[str, str]) -> GemmSource:
        """The same module for a kernel with other operand and buffer names (old -> new)."""
        return replace(
            self,
            d=self.d and names[self.d],
            outputs=tuple((emitted, names[b], lane) for emitted, b, lane in self.outputs),
            operands={names[o]: emitted for o, emitted in self.operands.items()},
            sinks={emitted: names[b] for emitted, b in self.sinks.items()},
            tables=tuple(
                replace(t, operands=tuple(names[o] for o in t.operands)) for t in self.tables
            ),
        )
