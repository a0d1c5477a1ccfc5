"""Operators of a graph -> names of their modules, by which users leave them to torch.

A module has the name that `named_modules()` gives it. A region has the names of the modules of its
first and last contractions, in the order of the graph: `layers.0.self_attn.o_proj..1.mlp.up_proj`
begins with the first, and ends in `layers.1.mlp.up_proj`, without what both have in common.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch.fx import Graph as FxGraph
from torch.fx import Node as FxNode

from coda.errors import CallError, Reason
from coda.integrations.regions import is_product

BY_NAME = Reason("left to torch by name (`leave`)", "`leave` without the name")
_ROOT = re.compile(r"^L(\['[^']*'\]|\[\d+\])+\.?")  # Dynamo's name of the model itself
_HELD = re.compile(r"\._modules\['([^']*)'\]")


def patterns_of(given: object, option: str) -> tuple[str, ...]:
    """Patterns of names, from a list of them. Raises CallError for anything else."""
    named = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not all(isinstance(p, str) and p for p in named):
        raise CallError(
            f"`{option}` is a list of names, or of patterns of names",
            found=repr(given),
            help=f"{option}=['layers.0.*']",
        )
    return tuple(map(str, named))


def leave_option(options: Mapping[str, object]) -> tuple[str, ...]:
    """The option `leave` of backend coda. Raises CallError, also for other options."""
    unknown = options.keys() - {"leave"}
    if unknown:
        raise CallError(
            "backend coda has one option, `leave`",
            found=", ".join(sorted(unknown)),
            help='torch.compile(model, backend="coda", options={"leave": ["layers.0.*"]})',
        )
    return patterns_of(options.get("leave", ()), "leave")


def module_of(node: FxNode) -> str:
    """The name of the innermost module that an operator belongs to; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return _HELD.sub(r".\1", _ROOT.sub("", path))


def region_name(nodes: Sequence[FxNode], given: Counter[str]) -> str:
    """The name of a region, in graph order; `given` counts equal names, to tell them apart."""
    ends = [module_of(n) or n.name for n in nodes if is_product(n)]
    first, last = (ends or [nodes[0].name])[0].split("."), (ends or [nodes[0].name])[-1].split(".")
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    name = ".".join(first) + (f"..{'.'.join(last[same:])}" if last[same:] else "")
    given[name] += 1
    return name if given[name] == 1 else f"{name}#{given[name]}"


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatchcase(name, p) for p in patterns)


def left_by_name(graph: FxGraph, patterns: Sequence[str]) -> dict[FxNode, str]:
    """The operators of modules that the patterns name, and of the modules inside -> why torch runs
    them.
    """
    found: dict[FxNode, str] = {}
    for node in graph.nodes if patterns else ():
        parts = module_of(node).split(".") if node.op == "call_function" else []
        if any(is_named(".".join(parts[:i]), patterns) for i in range(1, len(parts) + 1)):
            found[node] = BY_NAME
    return found
