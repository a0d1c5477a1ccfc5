"""Drop-in `nn.Module`s over blocks, with the conventions of `torch.nn`.

Weights are [out_features, in_features] as in `nn.Linear`, inputs [..., in_features]. Parameters are
initialised as in torch's modules; `reset_parameters()` repeats that, for models built on the meta
device after `to_empty`. They train with the blocks' derived backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from coda.block import Block, block
from coda.errors import CodaError
from coda.frontend import library
from coda.frontend.shapes import parse_shape
from coda.frontend.tensor import Spec
from coda.ir.types import i64
from coda.runtime.share import share

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": library.silu,
    "gelu": library.gelu,
    "gelu_tanh": lambda x: library.gelu(x, "tanh"),
    "relu": library.relu,
}


def _declared(fn: Callable[..., Any], *specs: Any) -> Block:
    """A block of a function whose arguments get the declarations `specs`."""
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    fn.__annotations__ = dict(zip(names, specs, strict=True))
    return block(fn)


def _norm_linear(eps: float, bias: bool) -> Block:
    def rms_norm_linear(x: Any, w_norm: Any, w: Any, b: Any) -> Any:
        return library.linear(library.rms_norm(x, w_norm, eps), w, b)

    def without_bias(x: Any, w_norm: Any, w: Any) -> Any:
        return library.linear(library.rms_norm(x, w_norm, eps), w)

    shapes = [Spec(parse_shape(s), None) for s in ("M D", "D", "N D", "N")]
    return _declared(rms_norm_linear, *shapes) if bias else _declared(without_bias, *shapes[:3])


def _gated_mlp(activation: str) -> Block:
    act = ACTIVATIONS[activation]

    def gated_mlp(x: Any, w_gate: Any, w_up: Any, w_down: Any) -> Any:
        return (act(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T

    shapes = [Spec(parse_shape(s), None) for s in ("M D", "F D", "F D", "N F")]
    return _declared(gated_mlp, *shapes)


def _linear_cross_entropy(ignore_index: int, reduction: str, smoothing: float) -> Block:
    def linear_cross_entropy(x: Any, w: Any, target: Any) -> Any:
        logits = x @ w.T
        return library.cross_entropy(logits, target, ignore_index, reduction, smoothing)

    shapes = [Spec(parse_shape(s), None) for s in ("M D", "V D")]
    return _declared(linear_cross_entropy, *shapes, Spec(parse_shape("M"), i64))


_blocks: WeakValueDictionary[tuple[Any, ...], Block] = WeakValueDictionary()


class _OverBlock(nn.Module):
    """A module that calls one block, which modules with equal options share.

    The modules hold the block, and it is freed with the last of them. A pickle has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[tuple[Any, ...], Block] = {}

    def _block(self, make: Callable[..., Block], *options: Any) -> Block:
        """The block that `make` returns for these options."""
        key = (make, *options)
        found = self._held.get(key)
        if found is None:
            found = _blocks.get(key)
            if found is None:
                found = _blocks[key] = make(*options)
            self._held = {key: found}
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}


def _empty(*shape: int, **where: Any) -> nn.Parameter:
    """An uninitialised parameter, for `reset_parameters`."""
    return nn.Parameter(torch.empty(*shape, **where))


def _reset_linear(weight: Tensor, bias: Tensor | None = None) -> None:
    """Initialise a weight [out_features, in_features] and a bias as `nn.Linear` does."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0.0
        nn.init.uniform_(bias, -bound, bound)


class RMSNormLinear(_OverBlock):
    """linear(rms_norm(x)): `nn.RMSNorm` and `nn.Linear` in one, the norm in the GEMM's epilogue.

    Parameters are `norm_weight` [in_features], `weight` [out_features, in_features] and `bias`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.eps = eps
        self._block(_norm_linear, eps, bias)
        self.norm_weight = _empty(in_features, **where)
        self.weight = _empty(out_features, in_features, **where)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = _empty(out_features, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters as `nn.RMSNorm` and `nn.Linear` do, in place."""
        nn.init.ones_(self.norm_weight)
        _reset_linear(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        more = () if self.bias is None else (self.bias,)
        run = self._block(_norm_linear, self.eps, self.bias is not None)
        y = run(x.reshape(-1, x.shape[-1]), self.norm_weight, self.weight, *more)
        return y.reshape(*x.shape[:-1], -1)


class GatedMLP(_OverBlock):
    """w_down(act(w_gate x) · w_up x), after Shazeer (2020), without biases.

    One GEMM reads gate and up: they are slices of one buffer (`coda.share_weights`).
    Parameters are `gate_weight`, `up_weight` [hidden_features, in_features] and `down_weight`
    [out_features, hidden_features]; `activation` is "silu", "gelu", "gelu_tanh" or "relu".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "silu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise CodaError(
                "there is no such activation",
                found=repr(activation),
                help=" or ".join(ACTIVATIONS),
            )
        where = {"device": device, "dtype": dtype}
        self.activation = activation
        self._block(_gated_mlp, activation)
        self.gate_weight = _empty(hidden_features, in_features, **where)
        self.up_weight = _empty(hidden_features, in_features, **where)
        self.down_weight = _empty(out_features or in_features, hidden_features, **where)
        self.reset_parameters()
        share((self.gate_weight, self.up_weight))

    def reset_parameters(self) -> None:
        """Initialise the parameters as `nn.Linear` does, in place."""
        for weight in (self.gate_weight, self.up_weight, self.down_weight):
            _reset_linear(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedMLP:
        super()._apply(fn, recurse)
        share((self.gate_weight, self.up_weight))  # `.to()` has separated them
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        run = self._block(_gated_mlp, self.activation)
        flat = x.reshape(-1, x.shape[-1])
        y = run(flat, self.gate_weight, self.up_weight, self.down_weight)
        return y.reshape(*x.shape[:-1], -1)


class LinearCrossEntropy(_OverBlock):
    """cross_entropy(x @ weightᵀ, target): vocabulary projection and loss in one.

    `weight` is [num_classes, in_features]; share it with an embedding by assigning the parameter.
    With `memory="min"` (see `coda.block`) no logits are stored. Other arguments are those of
    `nn.CrossEntropyLoss`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        memory: str = "balanced",
    ) -> None:
        super().__init__()
        self.options = ignore_index, reduction, label_smoothing
        self.memory = memory
        self._block(_linear_cross_entropy, *self.options)
        self.weight = _empty(num_classes, in_features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight as `nn.Linear` does, in place."""
        _reset_linear(self.weight)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """x [..., in_features], target int64 [...] -> the loss, reduced as in torch."""
        run = self._block(_linear_cross_entropy, *self.options)
        rows, classes = x.reshape(-1, x.shape[-1]), target.reshape(-1)
        loss = run(rows, self.weight, classes, memory=self.memory)
        return loss.reshape(target.shape) if self.options[1] == "none" else loss
