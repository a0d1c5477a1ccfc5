"""An attention kernel and the tensors of a call -> arguments of the kernel, and the launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from coda.ir.attend import LSE, VALUE
from coda.ir.dims import inverse
from coda.ir.graph import Node
from coda.kernels.attention.flash_target import forward, forward_arguments
from coda.kernels.attention.mainloop import AttentionKernel
from coda.kernels.attention.problem import Forward
from coda.kernels.attention.scores import ScoreFunction
from coda.kernels.protocol import LaunchRun
from coda.kernels.tensors import in_bytes

ALIGNED = 16  # bytes


def compiled(run: LaunchRun, kernel: AttentionKernel) -> tuple[Forward, Callable[..., None]]:
    """The problem of a call of these sizes, and its compiled kernel, perhaps from the cache."""
    problem = kernel.mainloop.problem(run.program.target, run.sizes)
    return problem, run.loaded((kernel, problem), lambda: forward(problem))


def launch(run: LaunchRun, kernel: AttentionKernel) -> None:
    """Allocate the results, bind the operands, and launch."""
    one, node = kernel.mainloop, kernel.mainloop.node
    value = result(run, node, one.buffer(VALUE))
    lse = None
    if one.buffer(LSE) is not None:
        lse = result(run, node.of(LSE), one.buffer(LSE)).squeeze(-1)
    if not value.numel():
        return
    operands = tuple(run.ready(run.value(o), by_tokens) for o in (node.q, node.k, node.v))
    o = value.permute(inverse(node.order)).permute(0, 2, 1, 3)
    problem, function = compiled(run, kernel)
    tensors, given = (*operands, o, lse), captured(run, one.function, node.captured)
    arguments = forward_arguments(problem, tensors, one.scores.scale, one.ends(run.sizes), given)
    function(*arguments)
    run.launched(function, arguments)


def captured(
    run: LaunchRun, function: ScoreFunction | None, nodes: Iterable[Node]
) -> tuple[Any, ...]:
    """The arguments of the function of scores: tensors, then sizes; () if there is none."""
    if function is None:
        return ()
    tensors = (run.ready(run.value(x), in_elements) for x in nodes)
    return (*tensors, *(d.size(run.sizes) for d in function.numbers))


def in_elements(x: Tensor) -> Tensor:
    """A captured tensor as kernels read it: of at least one axis, conditions as bytes."""
    return in_bytes(x if x.ndim else x.reshape(1))


def result(run: LaunchRun, node: Node, buffer: str | None, fill: str = "") -> Tensor:
    """The memory of a result, in the node's shape; of no buffer if nothing reads it."""
    shape = [d.size(run.sizes) for d in node.shape]
    rows, dtype = prod(shape[:-1]), node.dtype.torch
    if buffer is None:
        return run.new((*shape,), dtype)
    found = run.buffers[buffer] = run.room(buffer, rows, shape[-1], dtype, fill)
    return found.reshape(shape)


def by_tokens(x: Tensor) -> Tensor:
    """[B, H, S, d] as [B, S, H, d], without a copy if a kernel can read it in place."""
    y = x.permute(0, 2, 1, 3)
    steps = [y.stride(a) * y.element_size() for a in range(3)]
    apart = all(s > 0 and s % ALIGNED == 0 for s in steps)
    if y.stride(3) == 1 and apart and y.data_ptr() % ALIGNED == 0:
        return y
    return y.clone(memory_format=torch.contiguous_format)
