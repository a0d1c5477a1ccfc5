"""Learnable scalars (DyT's alpha, xIELU's two, a temperature): memory that lowering takes.

The gradient of a parameter of one element is a sum over rows and columns. `lower_training` lays its
operand out as one row of M·F columns, in int64 arrays of that length: at the sizes of an 8B layer
(M=8192, F=14336) each is 0.9 GB, there are several at once, and minutes go by in comparing them. A
SigLIP loss with a learnable scale and bias (N=8192) was killed at 10.7 GB of resident memory.

Right: lowering needs memory for columns, not for elements: well under 1 GB beyond what importing
coda takes, and a sum over everything is partials of a pass (or of a GEMM) and a fold.
"""

import resource
import sys
from pathlib import Path

import coda

SIZES = {"M": 8192, "D": 4096, "F": 14336}


@coda.block
def dyt(
    x: coda.Tensor["M D"],
    alpha: coda.Tensor["1"],
    gain: coda.Tensor["D"],
    shift: coda.Tensor["D"],
    w: coda.Tensor["F D"],
):
    return (coda.tanh(alpha * x) * gain + shift) @ w.T


@coda.block
def xielu(
    x: coda.Tensor["M D"], a: coda.Tensor["1"], w1: coda.Tensor["F D"], w2: coda.Tensor["D F"]
):
    h = x @ w1.T
    below = coda.exp(coda.minimum(h, 0.0)) - 1 - h
    return coda.where(h > 0, a * h * h, a * below) @ w2.T


xielu.lower_training("sm_90a", {"M": 64, "D": 64, "F": 64})  # everything is imported
with Path("/proc/self/status").open() as status:
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + 1_000_000_000,) * 2)

wrong = 0
for block in (dyt, xielu):
    dims = {k: v for k, v in SIZES.items() if k in block.graph.symbols}
    try:
        _, backward = block.lower_training("sm_90a", dims)
        print(f"{block.__name__}: {len(backward.kernels)} launches backward")
    except MemoryError as error:
        wrong += 1
        print(f"{block.__name__}: {error}  WRONG")
sys.exit(wrong > 0)
