"""`coda.patch`: a model -> the same model with compiled calls in its repeated layers; undoable.

Layers are found by structure: an outermost `ModuleList` of modules of one class that have matrices.
A compiled call is set on each instance (torch's `_compiled_call_impl`): class, forward, parameters,
hooks and names do not change. First, one layer of each kind runs on the arguments that the model
passes to it, and its outputs are compared with float64.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coda.errors import CallError, UnsupportedError
from coda.integrations.dynamo import backend
from coda.integrations.first_steps import (
    SLACK,
    FirstSteps,
    LayerSteps,
    by_torch,
    check_count,
    exactly,
    floats,
    steps_table,
)
from coda.integrations.hooks import know_hooks, knows_hooks
from coda.integrations.names import is_named, patterns_of
from coda.integrations.opaque_state import holding
from coda.integrations.report import LeftToTorch, last_report, left_table, merged
from coda.integrations.weights import share_alike
from coda.runtime.in_torch import DISABLED, disabled
from coda.runtime.progress import progress

_calls: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()

FOREIGN = "its call is already replaced by other code"


@dataclass(frozen=True)
class Patched:
    """One layer: its name, whether coda runs it, why not, and measurements if it was checked.

    `fused` and `left` count torch's operators in blocks and outside; `copied` are bytes of weights
    that its kernels read from copies (`coda.last_report()` has reasons); the errors are relative to
    float64 (to float32 where an operator of the layer has no float64), in the Frobenius norm.
    `rest` are the operators outside, at the sizes of the example.
    """

    name: str
    replaced: bool
    why: str = ""
    fused: int = 0
    left: int = 0
    error: float = 0.0
    torch_error: float = 0.0
    copied: int = 0
    rest: tuple[LeftToTorch, ...] = ()

    def of(self, name: str) -> Patched:
        """The same of another layer of this kind, which was not checked."""
        return Patched(name, self.replaced, self.why, rest=self.rest)


@dataclass
class PatchReport:
    """Result of `patch`: `print` it; `undo()` restores the model.

    Attributes:
        layers: what became of each layer.
        modules: the layers that were replaced.
        steps: with `check`, what was compared of each of them so far.
    """

    layers: list[Patched] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    steps: list[LayerSteps] = field(default_factory=list)

    @property
    def replaced(self) -> int:
        """Number of layers that coda runs."""
        return sum(one.replaced for one in self.layers)

    @property
    def rest(self) -> list[LeftToTorch]:
        """What is left to torch in all layers that coda runs, and what it would take; the most
        bytes first.
        """
        return merged(row for one in self.layers if one.replaced for row in one.rest)

    def replace(self, name: str, module: nn.Module, call: Callable[..., Any], check: int) -> None:
        """Replace the call of a layer, whose first `check` steps are compared."""
        if check:
            first = FirstSteps(name, call, check)
            self.steps.append(first.report)
            _calls.add(call := first)
        module._compiled_call_impl = functools.partial(call, module)
        self.modules.append(module)

    def or_raise(self) -> PatchReport:
        """The report. Raises UnsupportedError if no layer was replaced."""
        if not self.replaced:
            raise UnsupportedError("no layer was replaced", found="\n" + str(self))
        return self

    def undo(self) -> None:
        """Remove the compiled calls."""
        for module in self.modules:
            module._compiled_call_impl = None
        self.modules.clear()

    def __str__(self) -> str:
        table = Table(title=f"{self.replaced} of {len(self.layers)} layers", title_justify="left")
        columns = ("ops in blocks", "left", "error", "torch's", "bytes copied")
        for column in ("layer", "coda", *columns, "why not"):
            table.add_column(column, overflow="fold")
        for one in self.layers:
            numbers = [str(one.fused), str(one.left), f"{one.error:.1e}", f"{one.torch_error:.1e}"]
            numbers.append(str(one.copied))
            shown = numbers if one.error or one.fused else [""] * len(numbers)
            table.add_row(one.name, "yes" if one.replaced else "no", *shown, one.why)
        console = Console(width=110, force_terminal=False, no_color=True)
        with console.capture() as captured:
            rest = [left_table(self.rest)] if self.rest else []
            console.print(table, *rest, *([steps_table(self.steps)] if self.steps else []))
        return captured.get()


def patch(
    model: nn.Module,
    example: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    only: Iterable[str] = ("*",),
    skip: Iterable[str] = (),
    leave: Iterable[str] = (),
    check: int = 0,
    dynamic: bool | None = None,
) -> PatchReport:
    """Replace the calls of a model's repeated layers by compiled ones, in place.

    With `CODA_DISABLE=1` nothing is replaced, and the report says so.

    Args:
        model: its layers are changed in place; nothing else in the process changes.
        example: arguments of the model's forward, by name or in order, on which the layers are
            checked; by default the model's own `dummy_inputs`, as transformers has them.
        only, skip: `fnmatch` patterns of layers' names, such as `model.layers.*`.
        leave: `fnmatch` patterns of names inside the layers that are left to torch: of modules,
            such as `mlp.*`, or of regions, as `coda.last_report()` has them.
        check: how many steps of each layer, forward and backward, are compared with torch's. In
            these steps the model gets torch's result. A layer whose error is more than twice
            torch's (`first_steps.py`) stays torch's, with a RuntimeWarning; the report's `steps`
            have all comparisons.
        dynamic: as in `torch.compile`.

    Raises:
        CallError: without an example; if `model` is no module; for patterns that are no list of
            names, or that match no layer; if `check` is no number of steps.
        UnsupportedError: if no layer was replaced; the message has the report's table.
    """
    if not isinstance(model, nn.Module):
        raise CallError("coda.patch takes a torch.nn.Module", found=type(model).__name__)
    check, inside = check_count(check), patterns_of(leave, "leave")
    layers = _chosen(model, patterns_of(only, "only"), patterns_of(skip, "skip"))
    _refuse_unmatched("leave", inside, [n for m in layers.values() for n, _ in m.named_modules()])
    if disabled():
        return PatchReport([Patched(name, False, DISABLED) for name in layers])
    fresh = {n: m for n, m in layers.items() if not _foreign(m)}
    know_hooks(*fresh.values())
    kinds = {n: _kind(m) for n, m in fresh.items()}
    first = {kind: n for n, kind in reversed(kinds.items())}
    seen = _inputs(model, example, {n: fresh[n] for n in first.values()}) if fresh else {}
    options: Any = {"dynamic": dynamic, "recompile_limit": 8 * max(len(layers), 1)}
    calls = _compiled_calls(options | ({"options": {"leave": inside}} if inside else {}))
    call = {n: calls[knows_hooks(m)] for n, m in fresh.items()}
    checked = {k: _check(n, fresh[n], call[n], seen.get(n)) for k, n in first.items()}
    report = PatchReport()
    for name, module in layers.items():
        result = checked[kinds[name]] if name in fresh else Patched(name, False, FOREIGN)
        report.layers.append(result if result.name == name else result.of(name))
        if result.replaced:
            report.replace(name, module, call[name], check)
    for kind, name in first.items():
        if checked[kind].replaced:
            share_alike(fresh[name], [m for n, m in fresh.items() if kinds[n] == kind])
    return report.or_raise()


def unpatch(model: nn.Module) -> None:
    """Undo `patch`, for all layers of a model."""
    for module in model.modules():
        if _is_ours(module._compiled_call_impl):
            module._compiled_call_impl = None


def _is_ours(call: Any) -> bool:
    return isinstance(call, functools.partial) and call.func in _calls


def _foreign(module: nn.Module) -> bool:
    """Whether a layer's call or forward is already replaced, by coda or by other code."""
    return module._compiled_call_impl is not None or "forward" in vars(module)


def _fresh_call() -> Callable[..., Any]:
    """A layer's call with its own code object: torch caches compiled code by code object."""

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), globals(), "call")


def _compiled_calls(options: dict[str, Any]) -> list[Callable[..., Any]]:
    """Two compiled calls of a layer, for layers without and with hooks."""
    calls = [holding(torch.compile(_fresh_call(), backend=backend, **options)) for _ in range(2)]
    _calls.update(calls)
    return calls


def _chosen(model: nn.Module, only: tuple[str, ...], skip: tuple[str, ...]) -> dict[str, nn.Module]:
    """The repeated layers that the patterns select, by name.

    Raises CallError for a pattern that matches none, UnsupportedError if none is there or left.
    """
    layers = dict(_repeated(model))
    if not layers:
        raise UnsupportedError(
            "no repeated layers were found to patch",
            found=type(model).__name__,
            help='torch.compile(model, backend="coda") takes any model',
        )
    _refuse_unmatched("only", only, layers)
    _refuse_unmatched("skip", skip, layers)
    chosen = {n: m for n, m in layers.items() if is_named(n, only) and not is_named(n, skip)}
    if not chosen:
        raise UnsupportedError("`only` and `skip` leave no layer to patch", found=", ".join(layers))
    return chosen


def _refuse_unmatched(option: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    """Raise CallError for a pattern that matches no name, unless it is of a region (`a..b`)."""
    known = list(dict.fromkeys(n for n in names if n))
    wrong = [p for p in patterns if ".." not in p and not any(is_named(n, [p]) for n in known)]
    if wrong:
        shown = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
        raise CallError(f"`{option}` has a name that nothing has", found=repr(wrong[0]), help=shown)


def _repeated(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of the repeated layers."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(o) for o in outer):
            continue
        matrices = [[p for p in one.parameters() if p.ndim == 2] for one in module]
        if len({type(one) for one in module}) != 1 or not all(len(m) > 1 for m in matrices):
            continue
        outer.append(name + ".")
        yield from ((f"{name}.{number}", one) for number, one in module.named_children())


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Key of a layer: one check stands for all layers with an equal key."""
    tensors = [(n, tuple(p.shape), p.dtype) for n, p in module.named_parameters()]
    classes = [(n, type(m).__name__) for n, m in module.named_modules()]
    return type(module), tuple(tensors), tuple(classes), knows_hooks(module)


def _inputs(
    model: nn.Module,
    example: Mapping[str, Any] | Sequence[Any] | None,
    layers: Mapping[str, nn.Module],
) -> dict[str, tuple[Any, Any]]:
    """(args, kwargs) that the model passes to each of these layers on the example."""
    if example is None:
        example = getattr(model, "dummy_inputs", None)
    if example is None:
        raise CallError(
            "a model is patched on an example of its arguments",
            found=type(model).__name__,
            help="coda.patch(model, example={'input_ids': …})",
        )
    found: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, *given: found.setdefault(name, _copied(given)) and None

    hooks = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in layers.items()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = pytree.tree_map_only(Tensor, lambda t: t.to(device), example)
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            call_quietly(model, model, given)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def call_quietly(
    call: Callable[..., Any], model: nn.Module, given: Mapping[str, Any] | Sequence[Any]
) -> Any:
    """Call a model, or its compiled form, without a KV cache."""
    if not isinstance(given, Mapping):
        return call(*given)
    takes = inspect.signature(model.forward).parameters
    quiet = {"use_cache": False} if "use_cache" in takes and "use_cache" not in given else {}
    return call(**given, **quiet)


def _check(
    name: str, layer: nn.Module, call: Callable[..., Any], inputs: tuple[Any, Any] | None
) -> Patched:
    """Run one layer by torch and by coda, and compare both with float64."""
    if inputs is None:
        return Patched(name, False, "the example does not reach it")
    modes = {m: m.training for m in layer.modules()}
    before = len(last_report().graphs)
    try:
        layer.eval()
        with torch.no_grad(), progress(f"checking {name}"):
            plain = floats(by_torch(layer, _copied(inputs)))
            args, kwargs = _copied(inputs)
            ours = floats(call(layer, *args, **kwargs))
            exact = floats(exactly(by_torch, layer, inputs, _copied))
    except Exception as e:
        return Patched(name, False, f"{type(e).__name__}: {str(e).splitlines()[0]}")
    finally:
        for module, mode in modes.items():
            module.training = mode
    graphs = last_report().graphs[before:]
    fused, rest = sum(g.fused for g in graphs), merged(row for g in graphs for row in g.rest)
    left = sum(row.times for row in rest)
    error, others = _distance(ours, exact), _distance(plain, exact)
    why = ""
    if not fused:
        why = next((g.whole for g in graphs if g.whole), "nothing in it is cheaper in a block")
    elif not error <= SLACK[0] * others + 1e-6:
        why = f"it is {error:.1e} away from the exact value, torch {others:.1e}"
    copied = sum(r.copied for g in graphs for r in g.regions)
    return Patched(name, not why, why, fused, left, error, others, copied, tuple(rest))


def _copied(inputs: Any) -> Any:
    """A deep copy of arguments, so that a call may write to them (a KV cache)."""
    try:
        return copy.deepcopy(inputs)
    except (TypeError, RuntimeError):  # something that cannot be copied
        return inputs


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of an output, in the Frobenius norm."""
    pairs = zip(found, exact, strict=True)
    norms = [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]
    return max(norms, default=0.0)
