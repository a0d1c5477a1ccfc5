"""What emits an instruction, and the table that a module of emitters has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from coda.sim.ptx.codegen import Emit
from coda.sim.ptx.grammar import Rule

Fields = Mapping[str, str]


class Pattern(Protocol):
    """Tells the opcodes that a function emits."""

    def match(self, op: str) -> Fields | None:
        """The modifiers of `op` by the names of their places, or None."""
        ...


class EmitterRules:
    """The rules of one module: first part of an opcode -> (pattern, function) in order."""

    def __init__(self) -> None:
        self.entries: dict[str, list[tuple[Pattern, Emit]]] = {}

    def enter(self, head: str, pattern: Pattern, emit: Emit) -> None:
        """Let a function emit the opcodes that begin with `head` and match a pattern."""
        self.entries.setdefault(head, []).append((pattern, emit))

    def rule(self, *texts: str) -> Callable[[Emit], Emit]:
        """Decorate a function that emits the opcodes of rules in the text form of `grammar`."""

        def entered(emit: Emit) -> Emit:
            for text in texts:
                one = Rule(text)
                self.enter(one.head[0], one, emit)
            return emit

        return entered
