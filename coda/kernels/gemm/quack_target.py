"""Emitted GEMM modules -> compiled kernels and launches: the one module that touches quack.

quack is imported here alone, and here late: importing it takes seconds and patches the DSL.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from coda.errors import CallError
from coda.kernels.gemm.source import PAIRS, WHOLE, Source, Table
from coda.kernels.modules import load_module
from coda.lowering.program.target import Config
from coda.sim.host import kept
from coda.sim.host.kept import checked, recorded


@dataclass(frozen=True)
class Gemm:
    """One GEMM kernel: its emitted module and its tiles."""

    source: Source
    config: Config
    module: ModuleType

    def arguments(
        self,
        operands: Mapping[str, Tensor],
        stores: Mapping[str, Tensor],
        sinks: Mapping[str, Tensor],
        splits: Mapping[str, int],
        indices: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """quack's `epi_args`: every operand and result by its emitted name."""
        source = self.source
        found: dict[str, Any] = {n: operands[o] for o, n in source.operands.items()}
        for table in source.tables:
            found[table.name] = operands[table.name]
        for name in (*source.masks, *source.row_masks):
            found[name] = operands[name]
        found |= source.numbers
        for name, buffer, lane in source.outputs:
            whole = stores[buffer]
            if lane != WHOLE:
                first = 0 if lane == PAIRS else lane * splits[buffer]
                whole = whole.narrow(1, first, whole.shape[1] // 2)
            found[name] = whole
        found |= {name: sinks[buffer] for name, buffer in source.sinks.items()}
        return found | dict(indices)

    def plan(self, a: Tensor, b: Tensor, d: Tensor | None, arguments: Mapping[str, Any]) -> Any:
        """Compile for tensors like these (any number of rows), or find it compiled."""
        return self._gemm(a, b, d, arguments, launch=False)

    def launch(self, a: Tensor, b: Tensor, d: Tensor | None, arguments: Mapping[str, Any]) -> Any:
        """Run the kernel; the plan, which `run_plan` runs again for tensors like these."""
        return self._gemm(a, b, d, arguments, launch=True)

    def _gemm(
        self, a: Tensor, b: Tensor, d: Tensor | None, arguments: Mapping[str, Any], launch: bool
    ) -> Any:
        check_alignment({"A": a, "B": b, "D": d, **arguments})
        config = self.config
        return self.module.KERNEL.gemm(
            a,
            b,
            d,
            epi_args=dict(arguments),
            tile_M=config.tile_m,
            tile_N=config.tile_n,
            cluster_M=config.cluster[0],
            cluster_N=config.cluster[1],
            pingpong=config.pingpong,
            _launch=launch,
        )


def check_alignment(tensors: Mapping[str, Any]) -> None:
    """Raise CallError for a tensor that TMA cannot address: 16-byte bases and row strides."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue
        if x.numel() and x.data_ptr() % 16:
            raise CallError(
                f"`{name}` does not begin at a multiple of 16 bytes",
                found=f"offset {x.data_ptr() % 16}",
                help="pass a copy: x.clone()",
            )
        stride = max(x.stride()) * x.element_size() if x.ndim == 2 else 0
        if x.ndim == 2 and x.shape[0] > 1 and x.element_size() < 4 and stride % 16:
            raise CallError(
                f"rows of `{name}` are {stride} bytes apart; the kernel needs a multiple of 16",
                found=f"shape {tuple(x.shape)} of {x.dtype}",
                help="pad the last axis to a multiple of 8",
            )


def run_plan(
    plan: Any, a: Tensor, b: Tensor, d: Tensor | None, arguments: Mapping[str, Any]
) -> None:
    """Launch a plan."""
    from quack.gemm_runtime.host import run_gemm_epi_plan

    run_gemm_epi_plan(plan, a, b, d, None, arguments)


def pack_table(table: Table, values: Mapping[str, Tensor]) -> Tensor:
    """Periodic operands side by side, [M, lanes · period] with lanes neighbouring."""
    parts = [values[name] for name in table.operands]
    if table.lanes == 1:
        return parts[0].contiguous()
    parts = parts if len(parts) == 2 else [*parts, parts[0]]
    return torch.stack(parts, -1).reshape(parts[0].shape[0], -1).contiguous()


def use_cache(directory: Path, enabled: bool) -> None:
    """Keep compiled kernels in `directory`.

    quack's own store does it for GEMMs and row kernels alike: one object file for each key (the
    emitted text, tensor metadata, config, versions and sources of the generators), compiled under
    a file lock, renamed into place, and compiled again where it is not what was written.
    """
    import quack.cache

    quack.cache.CACHE_DIR = str(directory)
    quack.cache.CACHE_ENABLED = enabled
    cover_our_sources()
    _verify_objects(directory)


_kept_in: set[Path] = set()
needed: list[Path] = []  # files without which an object is compiled again


def _verify_objects(directory: Path) -> None:
    """Let libraries load no object of `directory` that is not what was written."""
    from cutlass.cute import runtime
    from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunctionBase as Compiled

    vars(sys.modules["quack.cache.jit"])["print"] = kept.print_on_stderr
    _kept_in.add(directory)
    found: Any = runtime.load_module
    while found is not None:  # a simulated device may have put its own around it
        if getattr(found, "ours", None) is _is_kept:
            return
        found = getattr(found, "__wrapped__", None)
    load = checked(runtime.load_module, _is_kept, lambda _: all(map(kept.intact, needed)))
    vars(load)["ours"] = _is_kept
    runtime.load_module = load
    Compiled.export_to_c = recorded(Compiled.export_to_c, _is_kept)


def _is_kept(path: Path) -> bool:
    return any(path.is_relative_to(d) for d in _kept_in)


def cover_our_sources() -> None:
    """Let the keys of quack's store depend on coda's epilogue operators, which kernels inline."""
    import quack.cache

    ours = Path(__file__).parents[1]
    if ours not in quack.cache.EXTRA_SOURCE_DIRS:
        quack.cache.EXTRA_SOURCE_DIRS.append(ours)


def import_kernel(source: Source, config: Config, directory: Path) -> Gemm:
    """The kernel of an emitted source."""
    return Gemm(source, config, load_module(source.text, source.name, directory))
