"""PTX text -> declarations, and instructions with resolved names and their lines.

Scopes of inline assembly (registers and labels between braces) are resolved here: a name declared
in an inner scope becomes `name#k`, so that later stages see one flat function.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from coda.sim.types import Unsupported

WIDTH = {
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 64),
    "b128": 128,
    "pred": 1,
}


@dataclass
class Instruction:
    """One PTX instruction. `operands` keep their PTX spelling, with names resolved."""

    op: str
    operands: list[str]
    predicate: str | None
    negated: bool
    line: int
    text: str
    source: str | None = None


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter at `offset` bytes of the parameter block."""

    name: str
    nbytes: int
    offset: int


@dataclass(frozen=True)
class PtxVariable:
    """A variable of state space shared, global or const; nbytes None: the dynamic shared memory."""

    space: str
    align: int
    nbytes: int | None
    data: bytes = b""


@dataclass
class PtxKernel:
    """A parsed entry function: registers by name with their width in bits, labels by position."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    variables: dict[str, PtxVariable] = field(default_factory=dict)
    vectors: dict[str, list[str]] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameter block."""
        return max((p.offset + p.nbytes for p in self.parameters), default=0)


class _Scope:
    def __init__(self, parent: _Scope | None, number: int) -> None:
        self.parent, self.number = parent, number
        self.names: dict[str, str] = {}

    def declare(self, name: str) -> str:
        unique = name if self.parent is None else f"{name}#{self.number}"
        self.names[name] = unique
        return unique

    def find(self, name: str) -> str | None:
        if name in self.names:
            return self.names[name]
        return self.parent.find(name) if self.parent else None


_STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[A-Za-z_$%][\w$]*)\s*:(?!:)"
    r"|(?P<text>[^;{}\s](?:[^;{}]|\{[^{}]*\})*);|(?P<empty>;))"
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", re.S)
_NAME = re.compile(r"[%$A-Za-z_][\w$%]*")
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\((.*?)\)", re.S)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)(?:\[(\d+)\])?$"
)
_VARIABLE = re.compile(
    r"(?:\.visible\s+|\.extern\s+|\.weak\s+)*\.(shared|global|const)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*(.*))?$",
    re.S,
)
_REG = re.compile(r"\.reg\s+(?:\.(v2|v4)\s+)?\.(\w+)\s+(.*)$", re.S)


def split_operands(text: str) -> list[str]:
    """Split at the commas that no bracket encloses."""
    out, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        out.append(current.strip())
    return out


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n") or " "


def _line_info(text: str) -> tuple[str, dict[int, str]]:
    """Remove `.file` and `.loc` directives; also the source position that starts at each line."""
    files: dict[str, str] = {
        m[1]: m[2] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)
    }
    positions: dict[int, str] = {}
    lines = text.split("\n")
    for k, line in enumerate(lines):
        stripped = line.lstrip()
        if stripped.startswith(".loc"):
            parts = stripped.split()
            positions[k + 1] = f"{files.get(parts[1], '?')}:{parts[2]}"
            lines[k] = ""
        elif stripped.startswith(".file"):
            lines[k] = ""
    return "\n".join(lines), positions


def _variable(text: str) -> tuple[str, PtxVariable] | None:
    match = _VARIABLE.match(text)
    if match is None:
        return None
    space, align, kind, name, count, value = match.groups()
    size = WIDTH[kind] // 8
    data = b""
    if value is not None:
        numbers = [int(x, 0) for x in value.strip().strip("{}").split(",") if x.strip()]
        data = b"".join((x & ((1 << 8 * size) - 1)).to_bytes(size, "little") for x in numbers)
    nbytes = None if count == "" else size * int(count or 1)
    return name, PtxVariable(space, int(align or size), nbytes, data)


def _parameters(text: str) -> list[Parameter]:
    out: list[Parameter] = []
    offset = 0
    for piece in split_operands(text):
        match = _PARAM.match(piece)
        if match is None:
            raise Unsupported(f"kernel parameter {piece!r}")
        size = WIDTH[match[2]] // 8
        nbytes, align = size * int(match[4] or 1), int(match[1] or size)
        offset = (offset + align - 1) // align * align
        out.append(Parameter(match[3], nbytes, offset))
        offset += nbytes
    return out


class _Body:
    """The walk over a function's body."""

    def __init__(self, kernel: PtxKernel, positions: dict[int, str]) -> None:
        self.kernel, self.positions = kernel, sorted(positions.items())
        self.scope = _Scope(None, 0)
        self.scopes = 0
        self.pending: list[tuple[Instruction, _Scope, str]] = []

    def walk(self, text: str, start: int) -> None:
        at, depth = start, 0
        line, counted = text.count("\n", 0, start) + 1, start
        while True:
            match = _STATEMENT.match(text, at)
            if match is None:
                break
            at = match.end()
            if match["open"]:
                depth += 1
                if depth > 1:
                    self.scopes += 1
                    self.scope = _Scope(self.scope, self.scopes)
            elif match["close"]:
                depth -= 1
                if depth == 0:
                    break
                assert self.scope.parent is not None
                self.scope = self.scope.parent
            elif match["label"]:
                name = self.scope.declare(match["label"])
                self.kernel.labels[name] = len(self.pending)
            elif match["text"]:
                line += text.count("\n", counted, match.start("text"))
                counted = match.start("text")
                self.statement(match["text"].strip(), line)

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.register(text)
        elif text.startswith("."):
            variable = _variable(text)
            if variable is not None:
                self.kernel.variables[self.scope.declare(variable[0])] = variable[1]
            elif not text.startswith(".pragma"):
                raise Unsupported(f"PTX line {line}: directive {text!r}")
        else:
            match = _INSTRUCTION.match(text)
            if match is None:
                raise Unsupported(f"PTX line {line}: {text!r}")
            instruction = Instruction(
                match[3], [], match[2], bool(match[1]), line, " ".join(text.split())
            )
            self.pending.append((instruction, self.scope, match[4]))

    def register(self, text: str) -> None:
        match = _REG.match(text)
        if match is None:
            raise Unsupported(f"register declaration {text!r}")
        width = WIDTH[match[2]]
        for name in match[3].split(","):
            name = name.strip()
            many = re.match(r"(.+?)<(\d+)>$", name)
            if many:
                for k in range(int(many[2])):
                    self.kernel.registers[self.scope.declare(f"{many[1]}{k}")] = width
                continue
            unique = self.scope.declare(name)
            if match[1]:
                parts = [f"{unique}.{x}" for x in "xyzw"[: int(match[1][1])]]
                self.kernel.vectors[unique] = parts
                self.kernel.registers.update(dict.fromkeys(parts, width))
            else:
                self.kernel.registers[unique] = width

    def resolve(self) -> None:
        """Resolve every name of every instruction; a label may be declared after its use."""
        at = 0
        source: str | None = None
        for instruction, scope, operands in self.pending:
            while at < len(self.positions) and self.positions[at][0] <= instruction.line:
                source = self.positions[at][1]
                at += 1
            instruction.source = source

            def rename(match: re.Match[str], scope: _Scope = scope) -> str:
                return scope.find(match[0]) or match[0]

            instruction.operands = [
                "{" + ",".join(self.kernel.vectors[x]) + "}" if x in self.kernel.vectors else x
                for x in (_NAME.sub(rename, y) for y in split_operands(operands))
            ]
            if instruction.predicate:
                instruction.predicate = scope.find(instruction.predicate)
            self.kernel.instructions.append(instruction)


@lru_cache(maxsize=256)
def parse(text: str, entry: str | None = None) -> PtxKernel:
    """Parse the entry function `entry` (the first one when None).

    Raises Unsupported, with the line, for a directive that is not known.
    """
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", _blank, text, flags=re.S))
    text, positions = _line_info(text)
    match = next((m for m in _ENTRY.finditer(text) if entry in (None, m[1])), None)
    if match is None:
        raise Unsupported(f"the PTX has no entry function {entry!r}")
    kernel = PtxKernel(match[1], _parameters(match[2]))
    for statement in re.finditer(
        r"^\s*((?:\.\w+\s+)*\.(?:shared|global|const)\s[^;]*);", text, re.M
    ):
        if _depth(text, statement.start()) == 0:
            variable = _variable(statement[1].strip())
            if variable is not None:
                kernel.variables[variable[0]] = variable[1]
    body = _Body(kernel, positions)
    body.walk(text, text.index("{", match.end()))
    body.resolve()
    return kernel


def _depth(text: str, at: int) -> int:
    return text.count("{", 0, at) - text.count("}", 0, at)
