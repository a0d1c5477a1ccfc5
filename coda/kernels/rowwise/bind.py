"""A row-wise kernel and the tensors of a call -> arguments of the kernel, and the launch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from coda.ir.dims import product
from coda.kernels.protocol import LaunchRun, Tensors
from coda.kernels.rowwise.emit import emit_rowwise
from coda.kernels.rowwise.launch import Module
from coda.kernels.rowwise.mainloop import Rowwise
from coda.kernels.rowwise.pieces import has_padded_rows, is_ragged
from coda.kernels.tensors import by_axes, expanded, in_bytes, is_padded, written
from coda.lowering.program.access import OneElement, Partial, RowVector
from coda.lowering.program.program import Program


def load(program: Program, kernel: Rowwise, directory: Path, *, padded: bool) -> Module:
    """The emitted module of a row-wise kernel, for `padded` rows or contiguous ones."""
    source = emit_rowwise(program, kernel, padded=padded)
    operands, once = kernel.body.epilogue.operands, (RowVector, OneElement)  # the same in every row
    shared = {o.name for o in operands if isinstance(o.access, once)}
    shared = tuple(name in shared for _, name, _, _ in source.parameters)
    return Module(source, shared, program.arch, directory)


class RowwiseBinding:
    """One launch of a row-wise kernel."""

    def __init__(self, run: LaunchRun, kernel: Rowwise) -> None:
        self.run, self.kernel, self.body = run, kernel, kernel.body
        self.rows, self.width = kernel.mainloop.points(run.sizes)

    def launch(self) -> None:
        """Allocate the results, bind the operands, and launch."""
        run, rows = self.run, self.rows
        if rows and not self.width:  # no columns: torch defines the results
            self.kernel.kind.reference(run, self.kernel)
            return
        tensors = dict(run.packed(self.kernel.name, self.body))
        for operand in self.body.epilogue.operands:
            if isinstance(operand.access, Partial):
                tensors[operand.name] = run.raw[operand.name]
            elif operand.name in self.body.in_place:
                tensors[operand.name] = self.shared(operand.name)
            elif operand.name in self.body.nodes:
                tensors[operand.name] = in_bytes(run.operand(self.body, operand.name))
        padded = self.padded_rows(tensors)
        for store in self.body.epilogue.stores:
            width = product(run.program.buffers[store.buffer].shape[1:]).size(run.sizes)
            fill = "padded" if padded and width > 1 else ""
            found = run.room(store.buffer, rows, width, store.dtype.torch, fill)
            run.buffers[store.buffer], found = found, written(found)
            if store.rows and rows:
                found = by_axes(found, store.rows, run.sizes)
                found = found.permute(*reversed(range(found.ndim - 1)), found.ndim - 1)
            tensors[store.buffer] = found
        for sink in self.body.epilogue.row_sums:
            parts = self.kernel.kind.partials(run.program, self.kernel, run.sizes).of_rows
            width = sink.span.width if sink.span else self.width
            if sink.whole:
                fill = "" if rows else "zero"
                found = run.room(sink.buffer, parts * width, 1, torch.float32, fill)
                run.buffers[sink.buffer], tensors[sink.buffer] = found, found.view(parts, width)
                continue
            found = run.new((parts, width), torch.float32, "" if rows else "zero")
            tensors[sink.buffer] = found
            run.raw[sink.buffer] = run.summands(sink.buffer, found)
        if rows:
            self.start(self.module(padded=padded), tensors)

    def shared(self, name: str) -> Tensor:
        """An operand that is equal in some rows, [*axes of the rows, inner to outer, columns]."""
        run, spread = self.run, self.body.in_place[name]
        lead = tuple(d.size(run.sizes) for d in spread.lead)
        change = partial(expanded, lead=lead, columns=spread.columns)
        return run.ready(in_bytes(run.value(self.body.nodes[name])), change)

    def module(self, *, padded: bool) -> Module:
        """The module for `padded` or contiguous rows, cached."""
        program, directory = self.run.program, self.run.directory
        found = lambda: load(program, self.kernel, directory, padded=padded)  # noqa: E731
        return self.run.loaded((self.kernel, padded), found)

    def start(self, module: Module, tensors: dict[str, Tensor]) -> None:
        """Launch the kernel, and record it."""
        arguments = module.arguments(self.rows, tensors, self.run.ready, self.run.sizes)
        compiled = module.compile()
        compiled(*arguments)
        self.run.launched(compiled, arguments)

    def padded_rows(self, tensors: Tensors) -> bool:
        """Whether a ragged kernel can read and write its rows by vectors."""
        if not is_ragged(self.body, self.width):
            return False
        tiles = [tensors[name] for name in self.body.epilogue.tiles]
        return all(is_padded(x.reshape(self.rows, self.width)) for x in tiles)


class RowwiseCompilation(RowwiseBinding):
    """A row-wise kernel that is compiled and not launched."""

    def start(self, module: Module, tensors: dict[str, Tensor]) -> None:
        module.compile()

    def padded_rows(self, tensors: Tensors) -> bool:
        return has_padded_rows(self.run.program, self.kernel)
