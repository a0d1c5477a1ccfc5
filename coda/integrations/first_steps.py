"""`coda.patch(model, check=N)`: a layer's first N steps by torch and by coda, held to float64.

In these steps the model gets torch's own result, so that nothing wrong is returned and a cache of
keys and values is written once. Coda runs on copies of the arguments. In training the gradients of
arguments and parameters are compared as well, for the cotangents of that backward. A layer whose
steps are all within the bound is run by coda from then on; another one stays torch's, with a
warning that names the tensor.

The bound is that of `coda check` with other factors of torch's error: 2 over a whole tensor, as for
the example of `coda.patch`, and 4 at its worst element. (`coda check` compares single kernels, from
values that they read. A layer is a chain of them, and rounds at other places than torch does.)

Steps that record gradients and steps that do not are counted apart: each runs other kernels.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils import _pytree as pytree

from coda.check import Deviation, deviation, within
from coda.errors import CallError

Given = tuple[tuple[Any, ...], dict[str, Any]]
SLACK = (2.0, 4.0)  # factors of torch's error: over a whole tensor, and at its worst element
RANDOM = "it draws random numbers, so that two runs of a step differ (dropout?)"


@dataclass(frozen=True)
class StepValue:
    """One tensor of one step: its error against float64, by coda and by torch.

    Attributes:
        step: the number of the step, from 1.
        tensor: `output 0`, or the gradient of a parameter by its name, or of an `argument 0`.
        coda, torch: the errors.
        good: whether coda's is within the bound.
    """

    step: int
    tensor: str
    coda: Deviation
    torch: Deviation
    good: bool


@dataclass
class LayerSteps:
    """What was compared of one layer so far; coda runs it once `wanted` steps were good.

    Attributes:
        name: of the layer.
        wanted: N.
        forwards, backwards: how many were compared.
        values: all tensors compared.
        why: why torch runs the layer for good, or "".
    """

    name: str
    wanted: int
    forwards: int = 0
    backwards: int = 0
    values: list[StepValue] = field(default_factory=list)
    why: str = ""

    @property
    def wrong(self) -> StepValue | None:
        """The first tensor that exceeds its bound."""
        return next((v for v in self.values if not v.good), None)

    def add(self, step: int, tensor: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        """Compare one tensor."""
        mine, other = deviation(ours, exact), deviation(plain, exact)
        unit = torch.finfo(ours.dtype).eps / 2
        good = within(mine, other, tuple(exact.shape), unit, SLACK)
        self.values.append(StepValue(step, tensor, mine, other, good))

    def numbers(self, *, gradients: bool) -> list[str]:
        """The largest error of outputs or gradients, by coda and by torch."""
        found = [v for v in self.values if v.tensor.startswith("gradient") == gradients]
        if not found:
            return ["", ""]
        worst = max(found, key=lambda v: (not v.good, v.coda.norm))
        return [f"{worst.coda.norm:.1e}", f"{worst.torch.norm:.1e}"]


class FirstSteps:
    """The call of a patched layer whose first steps are compared.

    Args:
        name: of the layer.
        call: its compiled call, as (layer, arguments).
        count: how many steps of each kind are compared.
    """

    def __init__(self, name: str, call: Callable[..., Any], count: int) -> None:
        self.call, self.report = call, LayerSteps(name, count)
        self._begun = {True: 0, False: 0}
        self._open: weakref.WeakSet[_OpenStep] = weakref.WeakSet()

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorded = torch.is_grad_enabled()
        if self.report.why:
            return layer._call_impl(*args, **kwargs)
        if self._begun[recorded] < self.report.wanted:
            self._begun[recorded] += 1
            return self._compared(layer, (args, kwargs))
        if self._open:  # the backward of a step is still to come
            return layer._call_impl(*args, **kwargs)
        return self.call(layer, *args, **kwargs)

    def _compared(self, layer: nn.Module, given: Given) -> Any:
        """Torch's result of a step; coda's is compared with it."""
        step = sum(self._begun.values())
        try:
            copied = _snapshot(given)
        except Exception as e:
            self._leave(f"its arguments cannot be copied ({type(e).__name__})")
            return by_torch(layer, given)
        before = _random_state(layer)
        found = by_torch(layer, given)
        if not _equal(before, _random_state(layer)):
            self._leave(RANDOM)
            return found
        plain = floats(found)
        try:
            with _aside(layer):
                ours = floats(self._by_coda(layer, _snapshot(copied)))
                with torch.no_grad():
                    exact = floats(exactly(by_torch, layer, copied))
            for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
                self.report.add(step, f"output {i}", a.detach(), b.detach(), c.detach())
        except Exception as e:
            self._leave(_failure(e))
            return found
        self.report.forwards += 1
        self._judge(step)
        if torch.is_grad_enabled() and any(t.requires_grad for t in plain):
            after = _OpenStep(self, layer, copied, step, [t.requires_grad for t in plain])
            self._open.add(after)
            register_multi_grad_hook([t for t in plain if t.requires_grad], after)
        return found

    def compare_gradients(self, step: _OpenStep, cotangents: Sequence[Tensor | None]) -> None:
        """Compare the gradients of a step, by three runs on copies of its arguments."""
        layer, given = step.layer, step.given
        if not _equal(step.versions, _versions(layer)):
            self._leave("its parameters changed between forward and backward")
            return

        def gradients(run: Callable[[nn.Module, Given], Any]) -> Callable[..., dict[str, Tensor]]:
            return partial(_gradients, run, step.asked, cotangents)

        try:
            with _aside(layer), torch.enable_grad():
                with step.context():
                    ours = gradients(self._by_coda)(layer, _snapshot(given))
                    plain = gradients(by_torch)(layer, _snapshot(given))
                exact = exactly(gradients(by_torch), layer, given)
            for name, value in exact.items():
                self.report.add(step.step, name, ours[name], plain[name], value)
        except Exception as e:
            self._leave(_failure(e))
            return
        self.report.backwards += 1
        self._judge(step.step)

    def _by_coda(self, layer: nn.Module, given: Given) -> Any:
        return self.call(layer, *given[0], **given[1])

    def _judge(self, step: int) -> None:
        one = self.report.wrong
        if one is not None:
            self._leave(
                f"step {step}: {one.tensor} is {one.coda.norm:.1e} away from float64, torch's "
                f"{one.torch.norm:.1e} (worst element {one.coda.worst:.1e} and "
                f"{one.torch.worst:.1e}, at {list(one.coda.at)})"
            )

    def _leave(self, why: str) -> None:
        """Leave the layer to torch, and say so."""
        if not self.report.why:
            self.report.why = why
            warnings.warn(
                f"coda.patch(check={self.report.wanted}): torch runs {self.report.name}, as in all "
                f"of its steps so far: {why}",
                RuntimeWarning,
                stacklevel=2,
            )


class _OpenStep:
    """A step whose backward is still to come: torch calls it with the cotangents of its outputs."""

    def __init__(
        self, owner: FirstSteps, layer: nn.Module, given: Given, step: int, asked: list[bool]
    ) -> None:
        self.owner, self.layer, self.given, self.step, self.asked = owner, layer, given, step, asked
        self.versions = _versions(layer)
        kind = _device_type(layer)
        cast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.context = lambda: torch.autocast(kind, cast[1], enabled=cast[0])

    def __call__(self, cotangents: Sequence[Tensor | None]) -> None:
        self.owner.compare_gradients(self, cotangents)
        self.owner._open.discard(self)


@contextmanager
def _aside(layer: nn.Module) -> Any:
    """Run copies of a step: torch's random numbers and hooks of saved tensors see nothing of it."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d.index or 0 for d in _gpus(layer)]))
        stack.enter_context(saved_tensors_hooks(lambda t: t, lambda t: t))
        yield


def _snapshot(given: Given) -> Given:
    """The same arguments in other memory: tensors as leaves of autograd, all else copied."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        return value.detach().clone().requires_grad_(value.requires_grad)

    return pytree.tree_map(copied, given)


def _widened(layer: nn.Module, given: Given, dtype: torch.dtype) -> tuple[nn.Module, Given]:
    """A copy of the layer, and its arguments, in a wider type."""

    def cast(t: Tensor) -> Tensor:
        wide = t.detach().to(dtype) if t.is_floating_point() else t
        return wide.requires_grad_(t.requires_grad)

    return copy.deepcopy(layer).to(dtype), pytree.tree_map_only(Tensor, cast, given)


def exactly(
    run: Callable[[nn.Module, Given], Any],
    layer: nn.Module,
    given: Given,
    copied: Callable[[Given], Given] = _snapshot,
) -> Any:
    """The result of `run` in float64, or in float32 if an operator of the layer has no float64.

    Args:
        run: (layer, arguments) -> outputs, or gradients by name.
        layer, given: are not changed.
        copied: the copy of the arguments for one run.
    """
    with torch.autocast(_device_type(layer), enabled=False):
        try:
            return run(*_widened(layer, copied(given), torch.float64))
        except RuntimeError:
            return run(*_widened(layer, copied(given), torch.float32))


def by_torch(layer: nn.Module, given: Given) -> Any:
    """The outputs of a layer, whose call may be replaced, by torch."""
    return layer._call_impl(*given[0], **given[1])


def _gradients(
    run: Callable[[nn.Module, Given], Any],
    asked: Sequence[bool],
    cotangents: Sequence[Tensor | None],
    layer: nn.Module,
    given: Given,
) -> dict[str, Tensor]:
    """The gradients of a layer's parameters and arguments, by name; zeros where there is none.

    `asked` says which outputs have a cotangent, or None where the backward reached none.
    """
    leaves = {
        f"gradient of argument {i}": t
        for i, t in enumerate(pytree.tree_leaves(given))
        if isinstance(t, Tensor) and t.requires_grad
    }
    leaves |= {f"gradient of {n}": p for n, p in layer.named_parameters() if p.requires_grad}
    outputs = floats(run(layer, given))
    reached = [t for t, wanted in zip(outputs, asked, strict=True) if wanted]
    pairs = [(t, d.to(t.dtype)) for t, d in zip(reached, cotangents, strict=True) if d is not None]
    found = torch.autograd.grad(
        [t for t, _ in pairs], list(leaves.values()), [d for _, d in pairs], allow_unused=True
    )
    named = zip(leaves, leaves.values(), found, strict=True)
    return {name: torch.zeros_like(x) if g is None else g for name, x, g in named}


def floats(value: Any) -> list[Tensor]:
    """The tensors of floats in a value, in order."""
    leaves = pytree.tree_leaves(value)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _versions(layer: nn.Module) -> list[int]:
    return [p._version for p in layer.parameters()]


def _random_state(layer: nn.Module) -> list[Any]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _gpus(layer))]


def _device_type(layer: nn.Module) -> str:
    return next((p.device.type for p in layer.parameters()), "cpu")


def _gpus(layer: nn.Module) -> set[torch.device]:
    return {p.device for p in layer.parameters() if p.device.type == "cuda"}


def _equal(one: Iterable[Any], other: Iterable[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _failure(e: Exception) -> str:
    return f"a comparison fails: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def steps_table(steps: Sequence[LayerSteps]) -> Table:
    """A table of what was compared of each layer so far."""
    title = "first steps, compared with float64 (the largest errors)"
    table = Table(title=title, title_justify="left")
    columns = ("forwards", "backwards", "output", "torch's", "gradient", "torch's", "runs")
    for column in ("layer", *columns):
        table.add_column(column, overflow="fold")
    for one in steps:
        done = one.forwards >= one.wanted
        runs = f"torch: {one.why}" if one.why else "coda" if done else "torch, until all are seen"
        errors = one.numbers(gradients=False) + one.numbers(gradients=True)
        table.add_row(one.name, str(one.forwards), str(one.backwards), *errors, runs)
    return table


def check_count(check: object) -> int:
    """The number of steps to compare. Raises CallError if it is none."""
    if not isinstance(check, int) or isinstance(check, bool) or check < 0:
        raise CallError("`check` is a number of steps", found=repr(check), help="check=3")
    return check
