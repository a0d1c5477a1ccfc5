"""A model without its weights -> its blocks, their costs, and the operators left to torch.

This is `coda explain MODEL`. The model is built on torch's meta device, so it needs no memory for
weights, and is traced as `torch.compile` traces it. Equal layers are one block, lowered once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from coda.border import described, foreign
from coda.errors import CodaError
from coda.integrations.dynamo import look
from coda.integrations.patch import call_quietly
from coda.integrations.report import CompileReport, RegionReport, forget_report, last_report
from coda.runtime import settings
from coda.runtime.progress import progress

HELP = "package.module:function, or a directory or file of a transformers configuration"


@dataclass(frozen=True)
class ModelExplanation:
    """The blocks of a model and the operators left to torch: `print` it, or take its `.json()`.

    Attributes:
        name: as in the request.
        report: the graphs, their blocks, and the operators left to torch.
        breaks: why torch's compiler broke the model into several graphs, and how often.
    """

    name: str
    report: CompileReport
    breaks: Mapping[str, int]

    @property
    def kinds(self) -> list[tuple[RegionReport, int]]:
        """Each distinct block, and the number of its calls."""
        found: dict[Any, tuple[RegionReport, int]] = {}
        for region in (r for g in self.report.graphs for r in g.regions):
            key = region.graph, tuple(region.sizes.items()), region.backward is None
            first, times = found.get(key, (region, 0))
            found[key] = first, times + 1
        return list(found.values())

    def json(self) -> dict[str, Any]:
        """As plain data."""
        left = [one.json() for one in self.report.rest]
        blocks = [{"times": times, **region.json()} for region, times in self.kinds]
        whole = [g.whole for g in self.report.graphs if g.whole]
        return {
            "model": self.name,
            "graph_breaks": sum(self.breaks.values()),
            "breaks": dict(self.breaks),
            "fused": self.report.fused,
            "blocks": blocks,
            "left": left,
            "whole": whole,
        }

    def html(self) -> str:
        """The report as a page of HTML that needs no network; `coda explain --html FILE` writes it.

        Equal layers are folded: each distinct block is shown once, with the number of its calls.
        """
        from coda.integrations.model_page import model_page

        return model_page(self)

    def print(self, console: Console) -> None:
        """Print the tables.

        Columns compare launches and megabytes of coda with two baselines: torch op by op, and
        separate GEMMs with all operators between them fused.
        """
        table = Table(title="blocks", title_justify="left")
        for column in ("times", "ops", *("launches", "by op", "fused"), *("MB", "by op", "fused")):
            table.add_column(column, justify="right")
        for region, times in self.kinds:
            table.add_row(str(times), str(len(region.ops)), *region.numbers())
        _, left, *_ = self.report.tables()
        breaks = sum(self.breaks.values())
        fused, rest = self.report.fused, sum(self.report.left.values())
        console.print(f"{self.name}: {fused} ops in blocks, {rest} left to torch", end="")
        console.print(f", {breaks} graph breaks")
        for why, times in self.breaks.items():
            console.print(f"  {times} × {why.splitlines()[0]}")
        console.print(table, left)


def explain_model(
    target: str,
    batch: int = 1,
    length: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = False,
    arch: str = "",
) -> ModelExplanation:
    """Trace and lower a model on the meta device.

    Args:
        target: a transformers configuration (a directory with `config.json`, or such a file), or
            `package.module:function`, which returns a module, or a module and its arguments.
        batch, length: size of the input [batch, length], for a model with known arguments.
        dtype: of the weights.
        training: also lower the backward.
        arch: as in `Block.lower`; by default `CODA_ARCH`.

    Raises:
        CodaError: if there is no such model, or no example of its arguments.
    """
    with _report_of_its_own(arch):
        model, given = _from_config(target) if _is_config(target) else _from_function(target)
        with foreign(f"{target} takes no such arguments", HELP):
            model = model.to(dtype).train(training)
            arguments = _arguments(model, batch, length) if given is None else given
            arguments = pytree.tree_map_only(Tensor, lambda t: _on_meta(t, dtype), arguments)
        call = torch.compile(model, backend=look)
        reading = progress("reading the model")
        with torch.set_grad_enabled(training), foreign(f"{target} does not run", HELP), reading:
            call_quietly(call, model, arguments)
        return ModelExplanation(target, last_report(), dict(counters["graph_break"]))


@contextmanager
def _report_of_its_own(arch: str) -> Iterator[None]:
    """Start an empty report, and estimate costs for `arch` without a GPU."""
    torch._dynamo.reset()
    forget_report()
    counters.clear()
    with settings.BACKEND.as_given("reference"), settings.ARCH.as_given(arch):
        yield


def _is_config(target: str) -> bool:
    return Path(target).is_dir() or Path(target).suffix == ".json"


def _from_config(target: str) -> tuple[nn.Module, None]:
    """A model on the meta device by its configuration; nothing is downloaded."""
    try:
        import transformers
    except ImportError as e:
        raise CodaError(
            "a configuration needs transformers", found=str(e), help="pip install transformers"
        ) from e
    with foreign(f"the configuration {target} cannot be read", HELP):
        config = transformers.AutoConfig.from_pretrained(
            target, local_files_only=True, trust_remote_code=False
        )
    why: Exception | None = None
    with torch.device("meta"):
        for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
            try:
                return kind.from_config(config), None
            except Exception as e:  # a wrong field raises wherever it is first used
                why = why or e
    raise CodaError(
        "transformers makes no model of this configuration",
        found=f"{target}: {described(why)}" if why else target,
        help=HELP,
    ) from why


def _from_function(target: str) -> tuple[nn.Module, Any]:
    """Call `package.module:function`: (module, its arguments or None)."""
    place, _, name = target.partition(":")
    sys.path.insert(0, "")
    try:
        with foreign(f"there is no such model: {target}", HELP):
            function = getattr(importlib.import_module(place), name)
    finally:
        sys.path.remove("")
    if not isinstance(function, nn.Module) and not callable(function):
        raise CodaError(f"{target} gives no module", found=type(function).__name__, help=HELP)
    with torch.device("meta"), foreign(f"{target} gives no module", HELP):
        found = function if isinstance(function, nn.Module) else function()
    model, given = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise CodaError(f"{target} gives no module", found=type(model).__name__, help=HELP)
    return model.to("meta"), given


def _arguments(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    """Arguments for a transformers model by its main input, else its `dummy_inputs`."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "")
    if config is not None and main == "input_ids":
        most = getattr(config, "max_position_embeddings", None) or length
        return {main: torch.zeros(batch, min(length, most), dtype=torch.int64)}
    if config is not None and main == "pixel_values" and hasattr(config, "image_size"):
        side = config.image_size
        high, wide = side if isinstance(side, list | tuple) else (side, side)
        return {main: torch.zeros(batch, getattr(config, "num_channels", 3), high, wide)}
    example = getattr(model, "dummy_inputs", None)
    if example is None:
        raise CodaError(
            "a model is explained on an example of its arguments",
            found=type(model).__name__,
            help="let the function return (module, arguments)",
        )
    return dict(example)


def _on_meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("meta", dtype if tensor.is_floating_point() else tensor.dtype)
