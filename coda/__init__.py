"""coda: a Transformer block written as mathematics -> fused Hopper and Blackwell kernels."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from coda.block import Block, block, parse
from coda.frontend import masks
from coda.frontend.attention import attention, sigmoid_attention
from coda.frontend.instead import instead_of
from coda.frontend.library import (
    bias,
    cross_entropy,
    dropout,
    geglu,
    gelu,
    l2_norm,
    layer_norm,
    linear,
    log_sigmoid,
    log_softmax,
    nll_loss,
    reglu,
    relu,
    residual,
    rms_norm,
    rope,
    silu,
    softcap,
    softmax,
    softplus,
    swiglu,
)
from coda.frontend.ops import (
    abs,
    arange,
    argmax,
    argmin,
    atan2,
    cast,
    ceil,
    clamp,
    concat,
    cos,
    cumsum,
    einsum,
    erf,
    erfc,
    exp,
    exp2,
    expm1,
    floor,
    iota,
    log,
    log1p,
    logsumexp,
    max,
    maximum,
    mean,
    min,
    minimum,
    permute,
    pick,
    prod,
    reshape,
    round,
    rsqrt,
    sigmoid,
    sign,
    sin,
    split,
    sqrt,
    square,
    stack,
    std,
    stop_gradient,
    sum,
    take,
    tanh,
    trunc,
    uniform,
    var,
    where,
)
from coda.frontend.tensor import Constant, Tensor
from coda.ir.types import bf16, bool_, e4m3, e5m2, f16, f32, f64, i32, i64
from coda.runtime.accumulate import accumulate_gradients
from coda.runtime.share import share_weights
from coda.version import __version__

if TYPE_CHECKING:
    from coda import nn
    from coda.integrations.patch import patch, unpatch
    from coda.integrations.report import last_report

# Torch's compiler takes seconds to import: names that need it are imported on first access.
_LATE = {
    "last_report": "coda.integrations.report",
    "nn": "coda.nn",
    "patch": "coda.integrations.patch",
    "unpatch": "coda.integrations.patch",
}


def __getattr__(name: str) -> Any:
    """Import a name of `_LATE` on first access. Raises AttributeError for unknown names."""
    if name not in _LATE:
        text = f"module 'coda' has no attribute {name!r}"
        text += "" if name.startswith("_") else f"; write {instead_of(name)}"
        raise AttributeError(text, name=name, obj=sys.modules[__name__])
    module = import_module(_LATE[name])
    return module if name == "nn" else getattr(module, name)


__all__ = [
    "Block",
    "Constant",
    "Tensor",
    "__version__",
    "abs",
    "accumulate_gradients",
    "arange",
    "argmax",
    "argmin",
    "atan2",
    "attention",
    "bf16",
    "bias",
    "block",
    "bool_",
    "cast",
    "ceil",
    "clamp",
    "concat",
    "cos",
    "cross_entropy",
    "cumsum",
    "dropout",
    "e4m3",
    "e5m2",
    "einsum",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "f16",
    "f32",
    "f64",
    "floor",
    "geglu",
    "gelu",
    "i32",
    "i64",
    "iota",
    "l2_norm",
    "last_report",
    "layer_norm",
    "linear",
    "log",
    "log1p",
    "log_sigmoid",
    "log_softmax",
    "logsumexp",
    "masks",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "nll_loss",
    "nn",
    "parse",
    "patch",
    "permute",
    "pick",
    "prod",
    "reglu",
    "relu",
    "reshape",
    "residual",
    "rms_norm",
    "rope",
    "round",
    "rsqrt",
    "share_weights",
    "sigmoid",
    "sigmoid_attention",
    "sign",
    "silu",
    "sin",
    "softcap",
    "softmax",
    "softplus",
    "split",
    "sqrt",
    "square",
    "stack",
    "std",
    "stop_gradient",
    "sum",
    "swiglu",
    "take",
    "tanh",
    "trunc",
    "uniform",
    "unpatch",
    "var",
    "where",
]
