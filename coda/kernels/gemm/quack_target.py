"""Emitted GEMM modules -> compiled kernels and launches, through quack's runtime.

quack is imported inside the functions that need it: its import takes seconds and patches the DSL.
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
from coda.kernels.gemm.source import PAIRS, WHOLE, WORDS, GemmSource, Table
from coda.kernels.modules import load_module
from coda.lowering.program.target import Config
from coda.sim.host import kept
from coda.sim.host.kept import checked, recorded


@dataclass(frozen=True)
class Gemm:
    """A GEMM kernel: its emitted source, its tile config and the imported module."""

    source: GemmSource
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
        """quack's `epi_args`: every operand and result by its emitted name.

        Args:
            operands: tensors by operand name; tables and masks by their emitted names.
            stores: matrices by buffer name.
            sinks: partials by buffer name.
            splits: for each store, how far apart its column pairs are in the buffer; 0 if adjacent.
            indices: index vectors by emitted name.
        """
        source = self.source
        found: dict[str, Any] = {n: operands[o] for o, n in source.operands.items()}
        for table in source.tables:
            found[table.name] = operands[table.name]
        for name in (*source.masks, *source.row_masks):
            found[name] = operands[name]
        found |= source.numbers
        for name, buffer, lane in source.outputs:
            whole = stores[buffer]
            if lane == WORDS:
                whole = words(whole)
            elif lane != WHOLE:
                first = 0 if lane == PAIRS else lane * splits[buffer]
                whole = whole.narrow(1, first, whole.shape[1] // 2)
            found[name] = whole
        found |= {name: sinks[buffer] for name, buffer in source.sinks.items()}
        return found | dict(indices)

    def plan(self, a: Tensor, b: Tensor, d: Tensor | None, arguments: Mapping[str, Any]) -> Any:
        """Compile for tensors of these layouts, with any number of rows, or load from the cache."""
        return self._gemm(a, b, d, arguments, launch=False)

    def launch(
        self,
        a: Tensor,
        b: Tensor,
        d: Tensor | None,
        arguments: Mapping[str, Any],
        shared: Mapping[str, Tensor],
    ) -> Any:
        """Launch the kernel; returns the plan, which `run_plan` launches for other tensors.

        `shared` has the flags and the sums of CTAs that share a tile (`Config.split_k`), or
        nothing.
        """
        options = {"split_k_buffers": (*shared.values(),)} if shared else {}
        return self._gemm(a, b, d, arguments, launch=True, **options)

    def _gemm(
        self,
        a: Tensor,
        b: Tensor,
        d: Tensor | None,
        arguments: Mapping[str, Any],
        *,
        launch: bool,
        **options: Any,
    ) -> Any:
        check_alignment({"A": a, "B": b, "D": d, **arguments})
        from coda.kernels.gemm.staged import depths

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
            is_dynamic_persistent=config.dynamic,
            split_k=config.split_k,
            post_init_attrs=depths(config.loads, config.stores),
            _launch=launch,
            **options,
        )


def words(x: Tensor) -> Tensor:
    """A matrix of 16-bit elements, as one of float32 whose bits are two neighbours each."""
    return x.view(torch.float32)


def check_alignment(tensors: Mapping[str, Any]) -> None:
    """Raise CallError if a base address or a row stride is no multiple of 16 bytes (TMA)."""
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
    plan: Any,
    a: Tensor,
    b: Tensor,
    d: Tensor | None,
    arguments: Mapping[str, Any],
    shared: Mapping[str, Tensor] | None = None,
) -> None:
    """Launch a plan for tensors of the layouts for which it was made, as `Gemm.launch`."""
    from quack.gemm_runtime.host import run_gemm_epi_plan

    buffers = (*shared.values(),) if shared else None
    run_gemm_epi_plan(plan, a, b, d, None, arguments, split_k_buffers=buffers)


def pack_table(table: Table, values: Mapping[str, Tensor]) -> Tensor:
    """Interleave periodic operands [M, period] as the lanes of one table [M, lanes · period].

    cos [c0, c1], sin [s0, s1]  ->  [c0, s0, c1, s1]
    """
    parts = [values[name] for name in table.operands]
    if table.lanes == 1:
        return parts[0].contiguous()
    parts = parts if len(parts) == 2 else [*parts, parts[0]]
    return torch.stack(parts, -1).reshape(parts[0].shape[0], -1).contiguous()


def use_cache(directory: Path, enabled: bool) -> None:
    """Cache compiled kernels in `directory`, by quack's cache, for GEMMs and row-wise kernels.

    It has one object file for each key (emitted text, tensor metadata, config, versions and sources
    of the generators). A file is compiled under a file lock and renamed into place; a damaged file
    is compiled again.
    """
    import quack.cache

    quack.cache.CACHE_DIR = str(directory)
    quack.cache.CACHE_ENABLED = enabled
    cover_our_sources()
    _verify_objects(directory)


_kept_in: set[Path] = set()
needed: list[Path] = []  # an object is compiled again if one of these files is damaged


def _verify_objects(directory: Path) -> None:
    """Patch the object loader to reject files of `directory` that have changed on disk."""
    from cutlass.cute import runtime
    from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunctionBase as Compiled

    vars(sys.modules["quack.cache.jit"])["print"] = kept.print_on_stderr
    _kept_in.add(directory)
    found: Any = runtime.load_module
    while found is not None:  # a simulated device may have wrapped it
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
    """Add the sources of coda's epilogue ops, which kernels inline, to quack's cache keys."""
    import quack.cache

    ours = Path(__file__).parents[1]
    if ours not in quack.cache.EXTRA_SOURCE_DIRS:
        quack.cache.EXTRA_SOURCE_DIRS.append(ours)


def sources_digest() -> str:
    """A digest of what compiles a kernel beside its emitted text: quack's sources and coda's ops.

    It is a part of the key of every compiled object.
    """
    from quack.cache import jit

    cover_our_sources()
    return jit._compute_source_fingerprint()


def import_kernel(source: GemmSource, config: Config, directory: Path) -> Gemm:
    """Import an emitted source, written into `directory`, as a kernel."""
    return Gemm(source, config, load_module(source.text, source.name, directory))
