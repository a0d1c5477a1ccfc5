"""An opcode -> its modifiers by name, or None: a strict grammar for each instruction.

A rule is a line such as "ld ?acquire|relaxed ?gpu|sys =global|shared ?v2|v4 =b32|f32": the
mnemonic, then places in order, each with its alternatives; "?" marks those that may be left out.
A place may be named: "order?acquire|relaxed"; else it has the number of its position.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Modifier:
    """One place of a rule."""

    name: str
    optional: bool
    choices: frozenset[str]


class Rule:
    """One rule of the grammar."""

    def __init__(self, text: str) -> None:
        first, *places = text.split()
        self.head = first.split(".")
        self.places: list[Modifier] = []
        for k, place in enumerate(places):
            match = re.match(r"^(\w*)([?=])(.*)$", place)
            assert match is not None, place
            choices = frozenset(match[3].split("|"))
            self.places.append(Modifier(match[1] or str(k), match[2] == "?", choices))

    def match(self, op: str) -> dict[str, str] | None:
        """The modifiers of `op` by the names of their places ("" if left out), or None."""
        parts = op.split(".")
        if parts[: len(self.head)] != self.head:
            return None
        at = len(self.head)
        out: dict[str, str] = {}
        for place in self.places:
            if at < len(parts) and parts[at] in place.choices:
                out[place.name] = parts[at]
                at += 1
            elif place.optional:
                out[place.name] = ""
            else:
                return None
        return out if at == len(parts) else None
