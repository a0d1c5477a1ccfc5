"""Registers of a kernel -> arrays [warps, 32] in a register file; also the special registers.

Warps are numbered with the CTA varying fastest: warp w of CTA c is row `w * ctas + c`, so the rows
of warps with the same role (same w) are contiguous for any number of CTAs. With 2 CTAs of 3 warps:
row 0 is warp 0 of CTA 0, row 1 warp 0 of CTA 1, row 2 warp 1 of CTA 0, ...
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from coda.sim.ptx.parse import PtxKernel
from coda.sim.types import Dim3

Array = NDArray[Any]
STORAGE = {1: "bool", 8: "uint8", 16: "uint16", 32: "uint32", 64: "uint64", 128: "complex128"}
VIEWS = {
    1: ("bool",),
    8: ("uint8", "int8"),
    16: ("uint16", "int16", "float16"),
    32: ("uint32", "int32", "float32"),
    64: ("uint64", "int64", "float64"),
    128: ("complex128",),
}
_AXES = "xyz"
SPECIALS: dict[str, str] = {
    **{f"%{n}.{a}": "warps" for n in ("tid", "ctaid", "clusterid", "cluster_ctaid") for a in _AXES},
    **{
        f"%{n}.{a}": "launch"
        for n in ("ntid", "nctaid", "nclusterid", "cluster_nctaid")
        for a in _AXES
    },
    **dict.fromkeys(("%cluster_nctarank", "%nwarpid", "%nsmid", "%gridid"), "launch"),
    **{f"%lanemask_{n}": "warps" for n in ("eq", "lt", "le", "gt", "ge")},
    **dict.fromkeys(("%laneid", "%warpid", "%cluster_ctarank", "%smid"), "warps"),
    **dict.fromkeys(("%dynamic_smem_size", "%total_smem_size"), "launch"),
    **dict.fromkeys(("%clock", "%clock64", "%globaltimer", "%globaltimer_lo"), "call"),
}


class RegisterLayout:
    """Layout of a kernel's registers in the file: name -> (width in bits, slot)."""

    def __init__(self, kernel: PtxKernel) -> None:
        self.slots: dict[str, tuple[int, int]] = {}
        self.counts = dict.fromkeys(STORAGE, 0)
        for name, width in kernel.registers.items():
            self.slots[name] = (width, self.counts[width])
            self.counts[width] += 1

    @staticmethod
    def storage(width: int) -> str:
        """The type that holds a register of `width` bits."""
        return STORAGE[width]


class Files:
    """The registers of all warps: for each numpy type a list of arrays [warps, 32], by slot."""

    bool: list[Array]
    uint16: list[Array]
    uint32: list[Array]
    uint64: list[Array]

    def __init__(self, layout: RegisterLayout, warps: int) -> None:
        self.whole: dict[int, Array] = {}
        for width, count in layout.counts.items():
            file = np.zeros((count, warps, 32), STORAGE[width])
            self.whole[width] = file
            for dtype in VIEWS[width]:
                setattr(self, dtype, list(file.view(dtype)))


class Geometry:
    """Coordinates of the resident CTAs: `first` is the number of the first one in launch order.

    CTAs of a cluster follow each other. Arrays are by warp, in the order of the register file.
    """

    def __init__(self, grid: Dim3, block: Dim3, cluster: Dim3) -> None:
        self.grid, self.block, self.cluster = grid, block, cluster
        self.threads = block[0] * block[1] * block[2]
        self.warps_per_cta = -(-self.threads // 32)
        self.cluster_size = cluster[0] * cluster[1] * cluster[2]
        self.ctas = grid[0] * grid[1] * grid[2]
        self.clusters = tuple(-(-n // c) for n, c in zip(grid, cluster, strict=True))

    def coordinates(self, ctas: Array) -> tuple[Array, Array, Array]:
        """Of CTAs by launch order: (ctaid, cluster id, position in the cluster), each [n, 3]."""
        rank, number = ctas % self.cluster_size, ctas // self.cluster_size
        inside = np.stack(self._split(rank, self.cluster), 1)
        cluster = np.stack(self._split(number, self.clusters), 1)
        return cluster * np.array(self.cluster) + inside, cluster, inside

    @staticmethod
    def _split(n: Array, sizes: Any) -> list[Array]:
        return [n % sizes[0], n // sizes[0] % sizes[1], n // (sizes[0] * sizes[1])]


def special_registers(geometry: Geometry, ctas: Array, smem: int, sms: int) -> dict[str, Any]:
    """The special registers that do not change while the CTAs `ctas` (launch order) run.

    Those that differ between warps are arrays [warps, 32], the others scalars.
    """
    u32 = np.uint32
    ctaid, cluster, inside = geometry.coordinates(ctas)
    n, per = len(ctas), geometry.warps_per_cta
    lane = np.tile(np.arange(32, dtype=u32), (n * per, 1))
    warp = np.repeat(np.arange(per, dtype=u32), n)[:, None]
    thread = warp * u32(32) + lane
    out: dict[str, Any] = {"%laneid": lane, "%warpid": warp + lane * u32(0), "%nwarpid": u32(per)}

    def by_cta(values: Array) -> Array:
        return np.tile(values.astype(u32), per)[:, None] + lane * u32(0)

    sizes = geometry.block
    tid = (thread % sizes[0], thread // sizes[0] % sizes[1], thread // (sizes[0] * sizes[1]))
    for k, axis in enumerate(_AXES):
        out[f"%tid.{axis}"] = tid[k].astype(u32)
        out[f"%ctaid.{axis}"] = by_cta(ctaid[:, k])
        out[f"%clusterid.{axis}"] = by_cta(cluster[:, k])
        out[f"%cluster_ctaid.{axis}"] = by_cta(inside[:, k])
        out[f"%ntid.{axis}"] = u32(sizes[k])
        out[f"%nctaid.{axis}"] = u32(geometry.grid[k])
        out[f"%nclusterid.{axis}"] = u32(geometry.clusters[k])
        out[f"%cluster_nctaid.{axis}"] = u32(geometry.cluster[k])
    out["%cluster_ctarank"] = by_cta(ctas % geometry.cluster_size)
    out["%cluster_nctarank"] = u32(geometry.cluster_size)
    out["%smid"] = by_cta(np.arange(n) % max(sms, 1))
    out["%nsmid"], out["%gridid"] = u32(max(sms, 1)), u32(0)
    out["%dynamic_smem_size"] = out["%total_smem_size"] = u32(smem)
    bit = u32(1) << lane
    out["%lanemask_eq"], out["%lanemask_lt"] = bit, bit - u32(1)
    out["%lanemask_le"] = (bit - u32(1)) | bit
    out["%lanemask_gt"], out["%lanemask_ge"] = ~out["%lanemask_le"], ~out["%lanemask_lt"]
    return out
