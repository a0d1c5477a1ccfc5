"""What a rule for an ATen operator is, and the table that a module of rules has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coda.ir.dims import Shape
from coda.ir.types import DType


@dataclass(frozen=True)
class Result:
    """Shape and dtype of an operator's (first) result, as inferred by torch."""

    shape: Shape
    dtype: DType


Rule = Callable[..., Any]


@dataclass(frozen=True)
class OperatorRules:
    """The rules of one module.

    Attributes:
        rules: operator -> rule.
        views: the operators that return an alias in torch.
    """

    rules: dict[Any, Rule] = field(default_factory=dict[Any, Rule])
    views: set[Any] = field(default_factory=set[Any])

    def enter(self, *operators: Any, view: bool = False) -> Callable[[Rule], Rule]:
        """Decorate a rule for some operators; `view`: they return aliases in torch."""

        def entered(fn: Rule) -> Rule:
            self.rules.update(dict.fromkeys(operators, fn))
            self.views.update(operators if view else ())
            return fn

        return entered
