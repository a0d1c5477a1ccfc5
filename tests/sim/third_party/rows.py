"""quack's kernels over rows: norms, softmax, cross entropy, top-k, with their gradients."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.sim.third_party.cases import BOTH, Case, Problem, randn

ROWS = 32


def _gradients(function: Any, inputs: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """A function's value and its gradients."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    out = function(*leaves.values())
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), cotangent.to(out.dtype))
    return {"out": out, **{f"d{n}": g for n, g in zip(wanted, found, strict=True)}}


def _problem(
    name: str, reference: Any, inputs: dict[str, Tensor], cotangent: Tensor, tolerance: float
) -> Problem:
    import quack

    function = getattr(quack, name)
    wide = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    expected = _gradients(reference, wide, cotangent.float())
    return Problem(lambda: _gradients(function, inputs, cotangent), expected, tolerance)


def rms_norm(columns: int) -> Problem:
    """x rsqrt(mean x² + ε) w, and its gradients for x and w."""
    inputs = {"x": randn(ROWS, columns), "w": torch.rand(columns) + 0.5}
    reference = partial(_rms_norm, columns)
    return _problem("rmsnorm", reference, inputs, randn(ROWS, columns), 2**-6)


def _rms_norm(columns: int, x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (columns,), w, 1e-6)


def softmax(columns: int) -> Problem:
    """Softmax of rows, and its gradient."""
    inputs = {"x": randn(ROWS, columns)}
    # the gradient is of the rounded output: its own error is that of bfloat16 against the sum
    return _problem("softmax", lambda x: x.softmax(-1), inputs, randn(ROWS, columns), 2**-5)


def cross_entropy(columns: int) -> Problem:
    """Loss of each row, and the gradient of the logits."""
    inputs = {"x": randn(ROWS, columns), "target": torch.randint(0, columns, (ROWS,))}
    reference = partial(F.cross_entropy, reduction="none")
    return _problem_without_mean(reference, inputs)


def _problem_without_mean(reference: Any, inputs: dict[str, Tensor]) -> Problem:
    import quack

    cotangent = torch.rand(ROWS) + 0.5
    wide = {"x": inputs["x"].float(), "target": inputs["target"]}
    expected = _gradients(reference, wide, cotangent)
    function = partial(quack.cross_entropy, reduction="none")
    return Problem(lambda: _gradients(function, inputs, cotangent), expected, 2**-7)


def top_k(columns: int, k: int, normalised: bool) -> Problem:
    """The k largest of each row and where they are, perhaps with a softmax of them."""
    import sys

    import quack.topk  # noqa: F401  (the name `quack.topk` is a function)

    x = torch.stack([torch.randperm(columns) for _ in range(ROWS)]).float() / 16  # no two equal
    values, indices = x.topk(k, -1)
    values = values.softmax(-1) if normalised else values

    def launch() -> dict[str, Tensor]:
        found, where = sys.modules["quack.topk"].topk_fwd(x, k, normalised)
        return {"values": found, "indices": where.long()}

    return Problem(launch, {"values": values, "indices": indices}, 1e-5)


CASES = (
    Case("rms norm", partial(rms_norm, 1024), quick=BOTH),
    Case("rms norm, wide", partial(rms_norm, 8192)),
    Case("rms norm, in a cluster", partial(rms_norm, 32768)),
    Case("softmax", partial(softmax, 1024)),
    Case("softmax, in a cluster", partial(softmax, 32768)),
    Case("cross entropy", partial(cross_entropy, 2048)),
    Case("cross entropy, in a cluster", partial(cross_entropy, 65536)),
    Case("top-k", partial(top_k, 256, 8, False)),
    Case("top-k with softmax", partial(top_k, 128, 4, True)),
)
