"""The kinds of kernel: each has its facets (admission, cost, reference, code) in one folder.

`KINDS` is the only list of them. A node that is fused into no kernel opens one of the first kind
that admits it; the last kind, torch, admits every node. quack and the DSL are imported only when a
kernel is emitted or launched.
"""

from coda.kernels.attention.gradient_kind import GRADIENT
from coda.kernels.attention.kind import ATTENTION
from coda.kernels.gemm.kind import GEMM
from coda.kernels.rowwise.kind import ROWWISE
from coda.kernels.torch_op.kind import TORCH

KINDS = (GEMM, ATTENTION, GRADIENT, ROWWISE, TORCH)
