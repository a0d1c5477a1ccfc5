"""One table: what blocks do not say, by torch's and numpy's names -> what works instead.

Error messages quote it, and docs/language.md shows it as "What the language does not say".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
import torch

BETWEEN = "between two blocks, of the result of the first: torch.{name}"
_ROWS: tuple[tuple[str, str], ...] = (
    # Arithmetic.
    (
        "add sub subtract mul multiply div divide true_divide neg negative positive",
        "x + y, x - y, x * y, x / y, -x",
    ),
    ("pow power float_power cbrt", "x ** 2, x ** (1 / 3)"),
    ("reciprocal", "1 / x"),
    (
        "remainder fmod mod divmod floor_divide",
        "i // n and i % n of ints; x - y * coda.floor(x / y) of floats, rounded once",
    ),
    ("addcmul addcdiv lerp rsub", "x + 0.5 * a * b, a + t * (b - a)"),
    ("hypot", "coda.sqrt(x * x + y * y)"),
    ("absolute fabs", "coda.abs(x)"),
    ("sgn", "coda.sign(x)"),
    ("rint around round_", "coda.round(x)"),
    ("fix", "coda.trunc(x)"),
    ("frac modf", "x - coda.trunc(x)"),
    ("deg2rad radians rad2deg degrees", "x * (math.pi / 180)"),
    # Functions.
    ("log2 log10", "coda.log(x) * (1 / math.log(2))"),
    ("tan", "coda.sin(x) / coda.cos(x)"),
    ("atan arctan arctan2", "coda.atan2(x, 1.0)"),
    ("asin arcsin acos arccos", "coda.atan2(x, coda.sqrt((1 - x) * (1 + x)))"),
    ("sinh cosh", "0.5 * (coda.exp(x) - coda.exp(-x)), 0.5 * (coda.exp(x) + coda.exp(-x))"),
    (
        "asinh arcsinh acosh arccosh",
        "coda.log(x + coda.sqrt(x * x + 1)), coda.log(x + coda.sqrt(x * x - 1))",
    ),
    ("atanh arctanh", "0.5 * (coda.log1p(x) - coda.log1p(-x))"),
    ("sinc", "coda.where(x == 0, 1.0, coda.sin(math.pi * x) / (math.pi * x))"),
    ("logit", "coda.log(x) - coda.log1p(-x)"),
    ("logaddexp", "coda.logsumexp(coda.stack([a, b]))"),
    ("xlogy entr", "coda.where(x == 0, 0.0, x * coda.log(y))"),
    ("expit", "coda.sigmoid(x)"),
    ("elu celu selu", "coda.where(x > 0, x, coda.expm1(coda.minimum(x, 0.0)))"),
    ("leaky_relu prelu rrelu", "coda.where(x > 0, x, 0.01 * x)"),
    (
        "relu6 hardtanh hardsigmoid hardswish",
        "coda.clamp(x, 0.0, 6.0), x * coda.clamp(x / 6 + 0.5, 0.0, 1.0)",
    ),
    ("hardshrink softshrink threshold", "coda.where(coda.abs(x) > 0.5, x, 0.0)"),
    (
        "mish tanhshrink softsign",
        "x * coda.tanh(coda.softplus(x)), x - coda.tanh(x), x / (1 + coda.abs(x))",
    ),
    ("logsigmoid", "coda.log_sigmoid(x)"),
    ("softmin", "coda.softmax(-x)"),
    ("glu", "a * coda.sigmoid(b), with a, b = coda.split(x, 2)"),
    # Choices and conditions.
    (
        "clip clamp_min clamp_max clamp_ fmax fmin",
        "coda.clamp(x, low, high), coda.maximum(x, y), coda.minimum(x, y)",
    ),
    (
        "eq ne lt le gt ge equal not_equal less less_equal greater greater_equal",
        "x == y, x < y, x >= y",
    ),
    (
        "logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor "
        "bitwise_not invert",
        "(x > 0) & (x < 1), a | b, a ^ b, ~a",
    ),
    (
        "isnan isinf isfinite isposinf isneginf signbit",
        "x != x, coda.abs(x) == math.inf, coda.abs(x) < math.inf, x < 0",
    ),
    ("isclose allclose", "coda.abs(x - y) <= 1e-3"),
    ("nan_to_num", "coda.where(x == x, x, 0.0)"),
    (
        "copysign heaviside",
        "coda.where(y < 0, -coda.abs(x), coda.abs(x)), coda.where(x < 0, 0.0, 1.0)",
    ),
    ("masked_fill putmask", "coda.where(mask, value, x)"),
    (
        "masked_select nonzero argwhere compress extract",
        "coda.where(mask, x, 0.0): sizes do not depend on values",
    ),
    ("any all count_nonzero", "coda.sum(coda.where(x > 0, 1.0, 0.0)) > 0"),
    # Reductions.
    ("amax amin nanmax nanmin aminmax ptp", "x.max(axis=-1), x.min(axis=-1)"),
    ("nansum nanmean", "coda.sum(coda.where(x == x, x, 0.0))"),
    ("average", "coda.sum(x * w) / coda.sum(w)"),
    ("var_mean std_mean", "coda.var(x), coda.mean(x)"),
    ("norm vector_norm dist cdist", "coda.sqrt(coda.sum(x * x))"),
    ("normalize", "coda.l2_norm(x)"),
    ("cosine_similarity", "coda.sum(coda.l2_norm(x) * coda.l2_norm(y))"),
    (
        "batch_norm group_norm instance_norm",
        'coda.layer_norm(x.reshape("M (G d) -> M G d")), reshaped back',
    ),
    ("diff", "x[..., 1:] - x[..., :-1]"),
    # Products.
    ("matmul mm bmm mv addmm baddbmm linalg_matmul", "x @ w.T, x @ w.mT"),
    (
        "dot vdot inner outer tensordot kron trace",
        'coda.sum(x * y), coda.einsum("m k, n k -> m n", x, w)',
    ),
    ("scaled_dot_product_attention", "coda.attention(q, k, v, mask=coda.masks.causal)"),
    # Losses.
    ("mse_loss l1_loss smooth_l1_loss huber_loss", "coda.mean(coda.square(x - y), axis=None)"),
    ("kl_div", "coda.sum(p * (coda.log(p) - log_q))"),
    ("binary_cross_entropy binary_cross_entropy_with_logits", "coda.softplus(x) - x * y"),
    # Shapes.
    (
        "view view_as reshape_as flatten unflatten ravel squeeze unsafe_view",
        'x.reshape("M (H d) -> M H d")',
    ),
    ("unsqueeze expand_dims atleast_2d", "x[:, None]"),
    ("transpose swapaxes swapdims t movedim moveaxis adjoint H", "x.T, x.mT or x.permute(1, 0, 2)"),
    ("size dim ndimension numel", "x.shape[0], x.ndim"),
    (
        "expand expand_as broadcast_to broadcast_tensors repeat tile repeat_interleave meshgrid",
        "operands broadcast: x[:, None] + y",
    ),
    ("cat concatenate hstack vstack dstack column_stack append", "coda.concat([a, b])"),
    (
        "chunk unbind tensor_split hsplit vsplit array_split narrow select",
        "coda.split(x, 2), x[:, 2:5]",
    ),
    ("roll", "coda.concat([x[..., -1:], x[..., :-1]])"),
    ("pad", "coda.concat([x, y]), with y an argument"),
    # Positions and indices.
    ("linspace", "coda.arange(0, 9) * 0.125, of coda.f32"),
    (
        "tril triu diag diagonal eye",
        "coda.where(i[:, None] >= j, x, 0.0), with i, j = coda.iota(m), coda.iota(n)",
    ),
    ("one_hot", "index[:, None] == coda.iota(count)"),
    ("gather take_along_dim take_along_axis", "coda.pick(x, index)"),
    ("index_select embedding choose", "coda.take(table, index)"),
    (
        "zeros zeros_like ones ones_like full full_like empty empty_like fill",
        "a number broadcasts: x + 1.0, coda.where(c, x, 0.0)",
    ),
    # Types, gradients, random numbers.
    ("float half bfloat16 double int long bool to type type_as astype", "x.cast(coda.f32)"),
    ("clone contiguous copy", "x itself: no value of a block is written"),
    ("detach detach_ no_grad", "coda.stop_gradient(x)"),
    (
        "requires_grad_ backward grad retain_grad register_hook",
        "on the arguments and results of a call",
    ),
    ("item tolist numpy cpu cuda", "on the result of a call"),
    ("rand rand_like bernoulli random", "coda.uniform(x.shape, seed)"),
    (
        "randn randn_like normal",
        "coda.sqrt(-2.0 * coda.log(1.0 - u)) * coda.cos(2 * math.pi * v), with u and v of "
        "coda.uniform(x.shape, seed)",
    ),
    # What stays torch's.
    (
        "sort argsort topk kthvalue median nanmedian quantile nanquantile percentile mode unique "
        "bincount histc searchsorted bucketize multinomial",
        BETWEEN,
    ),
    ("cumprod cummax cummin logcumsumexp", BETWEEN),
    (
        "scatter scatter_add scatter_reduce index_add index_copy index_put index_fill put flip "
        "fliplr flipud rot90",
        BETWEEN,
    ),
    (
        "conv1d conv2d conv3d max_pool1d max_pool2d avg_pool1d avg_pool2d interpolate unfold fold "
        "fft stft",
        BETWEEN,
    ),
    (
        "inverse inv det slogdet cholesky qr svd eig eigh solve pinv lu matrix_power matrix_exp",
        BETWEEN,
    ),
    ("erfinv lgamma gammaln digamma polygamma i0 special", BETWEEN),
)
INSTEAD = {name: text.format(name=name) for names, text in _ROWS for name in names.split()}
# The functions of `coda` on values, for "x.exp()" -> "coda.exp(x)"; a test compares.
FUNCTIONS = frozenset(
    [
        "abs",
        "arange",
        "argmax",
        "argmin",
        "atan2",
        "attention",
        "bias",
        "cast",
        "ceil",
        "clamp",
        "concat",
        "cos",
        "cross_entropy",
        "cumsum",
        "dropout",
        "einsum",
        "erf",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "geglu",
        "gelu",
        "iota",
        "l2_norm",
        "layer_norm",
        "linear",
        "log",
        "log1p",
        "log_sigmoid",
        "log_softmax",
        "logsumexp",
        "max",
        "maximum",
        "mean",
        "min",
        "minimum",
        "nll_loss",
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
        "var",
        "where",
    ]
)

_ARGUMENTS = {  # of those that take more than x
    "arange": "x.shape[0]",
    "atan2": "y, x",
    "attention": "q, k, v",
    "cast": "x, coda.f32",
    "clamp": "x, low, high",
    "concat": "[a, b]",
    "cross_entropy": "logits, target",
    "dropout": "x, p, seed",
    "einsum": '"m k, n k -> m n", x, w',
    "iota": "x.shape[0]",
    "linear": "x, w, b",
    "maximum": "a, b",
    "minimum": "a, b",
    "nll_loss": "log_probabilities, target",
    "permute": "x, 1, 0",
    "pick": "x, index",
    "reshape": "x, -1",
    "split": "x, 2",
    "stack": "[a, b]",
    "take": "table, index",
    "uniform": "x.shape, seed",
    "where": "condition, a, b",
}


def instead_of(name: str, known: Iterable[str] = ()) -> str:
    """What works in place of a function or a method that values of a block do not have.

    Args:
        name: as torch, numpy or the user calls it; an underscore at its end is torch's "in place".
        known: names that were possible at its place, for a misspelling.
    """
    for one in (name, name.removesuffix("_")):
        if one in INSTEAD:
            return INSTEAD[one]
        if one in FUNCTIONS:
            return f"coda.{one}({_ARGUMENTS.get(one, 'x')})"
    near = difflib.get_close_matches(name, known, 1, 0.7)
    if near:
        return f"x.{near[0]}"
    near = difflib.get_close_matches(name, FUNCTIONS, 1, 0.7)
    if near and not is_theirs(name):
        return f"coda.{near[0]}({_ARGUMENTS.get(near[0], 'x')})"
    if is_theirs(name):
        return BETWEEN.format(name=name)
    return "coda's functions, as `dir(coda)` lists them, and Python's operators"


def is_theirs(name: str) -> bool:
    """Whether torch or numpy has a function or a method of this name."""
    return any(hasattr(m, name) for m in (torch, torch.Tensor, torch.nn.functional, np))


def table() -> str:
    """The table of docs/language.md, in Markdown: one row for names with one answer."""
    rows: dict[str, list[str]] = {}
    for names, text in _ROWS:
        plain = "on the result of the block, between two blocks" if text is BETWEEN else text
        rows.setdefault(plain, []).extend(names.split())
    lines = [f"| `{' '.join(names)}` | {_shown(text)} |" for text, names in rows.items()]
    return "| torch, numpy | in a block |\n|---|---|\n" + "\n".join(lines) + "\n"


def _shown(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if "coda." in text or "x" in text.split() else text
