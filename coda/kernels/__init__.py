"""The kinds of kernel: what each takes, costs and computes, and how it is emitted and launched.

`KINDS` is the only list of them. A node that nothing fuses goes to the first that opens it, so
that the last takes what no other does. What a kind needs of quack and the DSL, it imports late.
"""

from coda.kernels.gemm.kind import GEMM
from coda.kernels.rowwise.kind import ROWWISE
from coda.kernels.torch_op.kind import TORCH

KINDS = (GEMM, ROWWISE, TORCH)
