"""The derivative of an attention and the tensors of a call -> its launches and their arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coda.ir.attend import DK, DQ, DV
from coda.ir.dims import inverse
from coda.kernels.attention.bind import by_tokens, captured, result
from coda.kernels.attention.flash_backward import Operands, backward, backward_arguments
from coda.kernels.attention.gradient_kind import Gradient, GradientKernel
from coda.kernels.attention.problem import Backward
from coda.kernels.protocol import LaunchRun


def compiled(
    run: LaunchRun, kernel: GradientKernel
) -> tuple[Backward, dict[str, Callable[..., None]]]:
    """The problem of a call of these sizes, and its compiled kernels, perhaps from the cache."""
    problem = kernel.mainloop.problem(run.program.target, run.sizes)
    return problem, run.loaded((kernel, problem), lambda: backward(problem))


def launch(run: LaunchRun, kernel: GradientKernel) -> None:
    """Allocate the results and the memory of the launches, bind the operands, and launch."""
    one, node = kernel.mainloop, kernel.mainloop.node
    rows = [n.shape[2].size(run.sizes) for n in (node.q, node.k)]
    found = {part: _result(run, one, part, "" if all(rows) else "zero") for part in (DQ, DK, DV)}
    if not all(x.numel() for x in found.values()):
        return
    problem, functions = compiled(run, kernel)
    operands, forward = _operands(run, one, problem, found), one.attention
    arguments = backward_arguments(problem, operands, forward.scores.scale, forward.ends(run.sizes))
    for name, given in arguments.items():
        functions[name](*given)
        run.launched(functions[name], given)


def _operands(
    run: LaunchRun, one: Gradient, problem: Backward, found: dict[str, Tensor]
) -> Operands:
    node, back = one.node, inverse(one.node.order)
    q, k, v = (run.ready(run.value(n), by_tokens) for n in (node.q, node.k, node.v))

    def in_order(x: Tensor) -> Tensor:
        return by_tokens(x.permute(back))

    o, do = (run.ready(run.value(n), in_order) for n in (node.y, node.d))
    dlse = node.given[0]
    lse, dlse = (None if n is None else run.ready(run.value(n), by_rows) for n in (node.lse, dlse))
    own = {
        name: run.new(shape, torch.float32, "zero" if name in (DK, DV) else "")
        for name, shape in one.scratch(problem, run.sizes).items()
    }
    given = captured(run, one.slope, node.given[1])
    return Operands(q, k, v, o, do, lse, dlse, given, found[DQ], found[DK], found[DV], own)


def _result(run: LaunchRun, one: Gradient, part: str, fill: str) -> Tensor:
    """The memory of a gradient, as [batch, tokens, heads, columns]."""
    node = one.node.of(part)
    x = result(run, node, one.buffer(part), fill).permute(inverse(node.own_order))
    return x.permute(0, 2, 1, 3)


def by_rows(x: Tensor) -> Tensor:
    """[B, H, S, 1] as [B, H, S] with contiguous rows."""
    y = x.squeeze(-1)
    return y if y.stride(-1) == 1 else y.contiguous()
