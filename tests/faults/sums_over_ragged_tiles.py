"""A sum over the columns of a product, of something that is not 0 at 0, where a tile is ragged (kernels).

Right: it compiles and agrees with the reference, as with 256 columns. Before, lowering to kernels stopped
with a bare StopIteration (no CodaError, no line of the user's) where the epilogue has no other operand:
`emit_gemm.py`, `inside`, asks the first operand for its type and there is none. On the CPU's
reference the block runs, so that the crash is first met on the GPU. Sums of exp (a softmax's
denominator by hand), counts of what a mask holds, means of a sigmoid, `x + 1` are such sums.
"""

import sys

import torch

import coda
from coda.runtime.simulate import device

T = coda.Tensor


@coda.block
def total(x: T["M D"], w: T["N D"]):
    return coda.sum(coda.exp(0.1 * (x @ w.T)))


@coda.block
def share(x: T["M D"], w: T["N D"]):
    return coda.mean(coda.where(x @ w.T > 0.0, 1.0, 0.0))


@coda.block
def gates(x: T["M D"], w: T["N D"]):
    return coda.mean(coda.sigmoid(x @ w.T))


torch.manual_seed(0)
wrong = 0
for block in (total, share, gates):
    for columns in (256, 50):
        x, w = torch.randn(16, 64).bfloat16(), torch.randn(columns, 64).bfloat16()
        expected = block(x, w, backend="reference").double()
        try:
            with device("sm_90a", checks="raise"):
                found = block(x, w, backend="sim").double()
            off = float((found - expected).norm() / expected.norm())
            what = f"{off:.1e} away from the reference"
            bad = off > 1e-2
        except Exception as e:
            what, bad = f"{type(e).__name__}: {e}", True
        wrong += bad
        print(f"{block.__name__}, {columns} columns: {what}{'  WRONG' if bad else ''}")
sys.exit(bool(wrong))
