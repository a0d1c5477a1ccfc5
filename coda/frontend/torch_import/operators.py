"""ATen operator -> rule: the tables of the modules that define rules, joined."""

from __future__ import annotations

from typing import Any

from coda.frontend.torch_import import (
    aten,
    aten_activations,
    aten_indices,
    aten_pointwise,
    aten_reductions,
    aten_views,
)
from coda.frontend.torch_import.rules import Rule

_TABLES = (
    aten.TABLE,
    aten_activations.TABLE,
    aten_indices.TABLE,
    aten_pointwise.TABLE,
    aten_reductions.TABLE,
    aten_views.TABLE,
)
RULES: dict[Any, Rule] = {operator: rule for t in _TABLES for operator, rule in t.rules.items()}
VIEWS: frozenset[Any] = frozenset(operator for t in _TABLES for operator in t.views)
