"""Short PTX kernels run on numpy arrays: no compiler, no torch."""

import ctypes
from types import MappingProxyType

import numpy as np
import pytest

from coda.sim.machine import run
from coda.sim.types import Allocations, Launch, LaunchResult, Options, Touched

SCHEDULES = [
    {"schedule": "eager"},
    {"schedule": "late"},
    {"schedule": "random", "seed": 1},
    {"schedule": "random", "seed": 2},
]
schedules = pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o}")

MBARRIER = """
    mov.u32 %r2, smem;
    setp.eq.b32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared.b64 [%r2], 32;
    bar.sync 0;
    mov.b32 %r10, 0;
    mov.b32 %r0, 0;
    shr.u32 %r3, %r1, 5;
    setp.ne.b32 %p2, %r3, 0;
    $ROUND:
    @%p2 bra $WAIT;
    {produce}
    mbarrier.arrive.shared.b64 _, [%r2];
    bra $NEXT;
    $WAIT:
    and.b32 %r11, %r10, 1;
    $TRY:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r2], %r11;
    @!%p3 bra $TRY;
    ld.shared.b32 %r12, [%r2+16];
    add.s32 %r0, %r0, %r12;
    $NEXT:
    bar.sync 1, 64;
    add.s32 %r10, %r10, 1;
    setp.lt.u32 %p4, %r10, 5;
    @%p4 bra $ROUND;
"""
HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"


def kernel(body: str, parameters: int = 1, shared: int = 0, declare: str = "") -> str:
    """A kernel `k` with pointers p0, p1, ... in %rd0, %rd1, ... and registers of each kind."""
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(parameters))
    smem = f".shared .align 1024 .b8 smem[{shared}];" if shared else ""
    registers = ".reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %rd<32>;"
    return f"{HEAD}.visible .entry k({names}) {{\n{registers}\n{smem}{declare}\n{loads}\n{body}\n}}"


def launch(
    text: str,
    *arrays: np.ndarray,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: int = 32,
    cluster: tuple[int, int, int] = (1, 1, 1),
    smem: int = 0,
    before: Touched = MappingProxyType({}),
    **options,
) -> LaunchResult:
    """Run kernel `k` on arrays, which it may change, beside launches that may still run."""
    pointers = [ctypes.c_uint64(a.ctypes.data) for a in arrays]
    args = (ctypes.c_void_p * len(arrays))(*[ctypes.addressof(p) for p in pointers])
    allocations = Allocations()
    for i, a in enumerate(arrays):
        allocations.add(a.ctypes.data, a.nbytes, f"array {i}")
    shape = grid, (block, 1, 1), cluster, smem
    one = Launch("k", text, b"", *shape, ctypes.addressof(args), before=before)
    return run(one, allocations, Options(**options))


def lanes(body: str, threads: int = 32, **options) -> np.ndarray:
    """The value of %r0 in each thread after `body`; %r1 is the thread's number."""
    out = np.zeros(threads, np.uint32)
    text = kernel(
        "mov.u32 %r1, %tid.x;\n"
        + body
        + "\nmul.wide.u32 %rd8, %r1, 4; add.s64 %rd8, %rd8, %rd0; st.global.b32 [%rd8], %r0; ret;",
        shared=4096,
    )
    launch(text, out, block=threads, **options)
    return out
