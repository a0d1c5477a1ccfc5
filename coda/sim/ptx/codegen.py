"""A block of PTX -> one Python function on arrays of lanes.

The function takes the machine, the index `g` of the warps in the register file (a slice or an
array) and the mask `m` of active lanes (bool [warps, 32], None: all), and runs the block for all of
them. Each value is assigned once (`v12`), in the dtype in which it was computed; views of other
dtypes are made on use. Only registers that are live after the block are written back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from coda.sim.alu.table import DTYPE, lookup
from coda.sim.ptx.parse import Instruction, PtxKernel
from coda.sim.ptx.program import BasicBlock, PtxProgram, uses_and_writes
from coda.sim.types import Unsupported
from coda.sim.units.lanes import both, spread
from coda.sim.units.registers import SPECIALS, RegisterLayout

INLINE = {
    **{np.add: "+", np.subtract: "-", np.multiply: "*", np.bitwise_and: "&", np.bitwise_or: "|"},
    **{np.bitwise_xor: "^", np.less: "<", np.less_equal: "<=", np.greater: ">"},
    **{np.greater_equal: ">=", np.equal: "==", np.not_equal: "!="},
}
NAMES = {kind: np.dtype(dtype).name for kind, dtype in DTYPE.items()}
NAMES["b128"] = "complex128"
FLOAT_BITS = {"f": 32, "F": 32, "d": 64, "D": 64}
_ADDRESS = re.compile(r"^\[\s*([^\]+]+?)\s*(?:\+\s*(-?\w+)\s*)?\]$")
Emit = Callable[["Emitter", Instruction, Mapping[str, str]], None]


def dtype_name(kind: str) -> str:
    """The name of the numpy type that holds a PTX type."""
    return NAMES[kind]


def immediate(text: str, kind: str) -> Any:
    """A PTX literal as a numpy scalar of the type `kind`."""
    if kind == "pred":
        return np.bool_(int(text, 0) != 0)
    dtype = np.dtype(DTYPE[kind])
    if re.match(r"^0[fFdD][0-9a-fA-F]+$", text):
        bits, width = int(text[2:], 16), FLOAT_BITS[text[1]]
        if width == 64 and dtype.itemsize == 4:
            return np.float32(np.array(bits, np.uint64).view(np.float64))
        return np.array(bits, f"u{width // 8}").view(dtype)[()]
    if dtype.kind == "f" and "." in text:
        return dtype.type(float(text))
    value = int(text.rstrip("U"), 0)
    raw = np.array(value & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}")
    return raw.view(dtype)[()]


def put(target: Any, g: Any, m: Any, value: Any) -> None:
    """Write the active lanes of a register."""
    target[g] = np.where(m, value, target[g])


class Emitter:
    """Writes the source of one block's function."""

    def __init__(
        self,
        program: PtxProgram,
        layout: RegisterLayout,
        number: int,
        block: BasicBlock | None = None,
    ) -> None:
        self.program, self.layout, self.number = program, layout, number
        self.kernel: PtxKernel = program.kernel
        self.block: BasicBlock = block or program.blocks[number]
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"np": np, "both": both, "put": put, "spread": spread}
        self.now: dict[str, dict[str, str]] = {}
        self.origin: dict[str, str] = {}
        self.direct: set[str] = set()
        self.counter = 0
        self.carry = "np.bool_(False)"
        self.end = f"M.go(g, m, {number + 1})"

    # names and constants

    def line(self, text: str) -> None:
        """Add a line of source."""
        self.lines.append(text)

    def new(self, expression: str) -> str:
        """A new name for the value of an expression."""
        self.counter += 1
        self.lines.append(f"v{self.counter} = {expression}")
        return f"v{self.counter}"

    def constant(self, value: Any) -> str:
        """A name bound to an object that has no literal."""
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def function(self, run: Any) -> str:
        """A name for a function."""
        for name, value in self.names.items():
            if value is run:
                return name
        return self.constant(run)

    def site(self, ins: Instruction) -> str:
        """The name of the instruction itself, which calls pass on for errors and observers."""
        return self.constant(ins)

    # operands

    def register(self, name: str, dtype: str) -> str:
        """The value of a register as `dtype`."""
        width, slot = self.layout.slots[name]
        versions = self.now.get(name)
        wanted = np.dtype(dtype)
        bits = 1 if dtype == "bool" else 8 * wanted.itemsize
        if versions is None:
            stored = dtype if bits == width else self.layout.storage(width)
            var = self.new(f"M.files.{stored}[{slot}][g]")
            versions = self.now[name] = {stored: var}
            self.origin[var] = name
        if dtype in versions:
            return versions[dtype]
        have, var = next(iter(versions.items()))
        if bits == width:
            out = self.new(f"{var}.view(np.{dtype})")
            if var in self.origin:
                self.origin[out] = self.origin[var]
            versions[dtype] = out
            return out
        if bits > width or dtype == "bool" or have == "bool":
            raise Unsupported(f"register {name} of {width} bits used as {dtype}")
        unsigned = self.register(name, self.layout.storage(width))
        return self.new(f"{unsigned}.astype(np.uint{bits}).view(np.{dtype})")

    def value(self, operand: str, kind: str) -> str:
        """The expression of an operand as the PTX type `kind`."""
        if operand.startswith("!"):
            return self.new(f"~{self.value(operand[1:].strip(), kind)}")
        if operand in self.layout.slots:
            return self.register(operand, dtype_name(kind))
        if operand.startswith("%"):
            return self.special(operand, kind)
        name = re.match(r"^([A-Za-z_$][\w$#]*)\s*(?:\+\s*(\d+))?$", operand)
        if name is not None:
            return self.symbol(name[1], int(name[2] or 0), kind)
        try:
            return self.constant(immediate(operand, kind))
        except ValueError:
            raise Unsupported(f"operand {operand!r}") from None

    def special(self, name: str, kind: str) -> str:
        """A special register."""
        if name not in SPECIALS:
            raise Unsupported(f"special register {name}")
        index = "" if SPECIALS[name] == "launch" else "[g]"
        if SPECIALS[name] == "call":
            index = "()"
        var = self.new(f"M.special[{name!r}]{index}")
        dtype = dtype_name(kind)
        wide = "uint64" if name in ("%clock64", "%globaltimer") else "uint32"
        return var if dtype == wide else self.new(f"{var}.astype(np.{dtype})")

    def symbol(self, name: str, offset: int, kind: str) -> str:
        """The address of a variable or of a parameter."""
        dtype = dtype_name(kind)
        for parameter in self.kernel.parameters:
            if parameter.name == name:
                return self.new(f"np.{dtype}(M.parameters + {parameter.offset + offset})")
        variable = self.kernel.variables.get(name)
        if variable is None:
            raise Unsupported(f"operand {name!r}")
        if variable.space == "shared":
            return self.new(f"(M.window[g] + M.variables[{name!r}] + {offset}).astype(np.{dtype})")
        return self.new(f"np.{dtype}(M.variables[{name!r}] + {offset})")

    def address(self, operand: str, kind: str = "") -> tuple[str, int]:
        """An address operand as an expression and a constant number of bytes."""
        match = _ADDRESS.match(operand)
        if match is None:
            raise Unsupported(f"address {operand!r}")
        base, offset = match[1].strip(), int(match[2] or "0", 0)
        if base in self.layout.slots:
            width = self.layout.slots[base][0]
            return self.register(base, self.layout.storage(width)), offset
        if re.match(r"^[A-Za-z_$]", base):
            return self.symbol(base, 0, kind or "u64"), offset
        return self.constant(np.uint64(int(base, 0))), offset

    def vector(self, operand: str) -> list[str]:
        """The elements of {a, b, ...}, or the operand alone."""
        if operand.startswith("{"):
            return [x.strip() for x in operand[1:-1].split(",")]
        return [operand]

    def mask(self, ins: Instruction) -> str:
        """The lanes for which an instruction acts."""
        if ins.predicate is None:
            return "m"
        return self.new(f"both(m, {self.guard(ins)}, M.shape)")

    def guard(self, ins: Instruction) -> str:
        """The predicate of an instruction as a value."""
        assert ins.predicate is not None
        return self.value(("!" if ins.negated else "") + ins.predicate, "pred")

    def put(self, dest: str, expression: str, kind: str, ins: Instruction) -> None:
        """Assign a value of the PTX type `kind` to a register, under the predicate of `ins`."""
        if dest == "_":
            return
        if dest not in self.layout.slots:
            raise Unsupported(f"destination {dest!r}")
        width = self.layout.slots[dest][0]
        dtype = dtype_name(kind)
        bits = 1 if dtype == "bool" else 8 * np.dtype(dtype).itemsize
        if bits > width or (dtype == "bool") != (width == 1):
            raise Unsupported(f"a result of type {kind} for register {dest} of {width} bits")
        if bits < width:
            dtype = f"{'int' if dtype.startswith('int') else 'uint'}{width}"
            if dtype_name(kind).startswith("float"):
                expression = f"({expression}).view(np.uint{bits})"
            expression = f"({expression}).astype(np.{dtype})"
        if ins.predicate is not None:
            old = self.register(dest, dtype)
            expression = f"np.where({self.guard(ins)}, {expression}, {old})"
        var = expression if re.match(r"^v\d+$", expression) else self.new(expression)
        self.now[dest] = {dtype: var}

    def alias(self, dest: str, source: str) -> None:
        """Make a register an alias of another one's value."""
        self.now[dest] = self.now[source]

    # the whole function

    def write_back(self) -> None:
        """Store the live-out registers; first copy views of registers that change here.

        What follows the stores, as a branch on the predicate of a moved register, reads copies too.
        """
        live = sorted((self.block.writes & self.block.live_out) - self.direct)
        stores: list[tuple[str, str, str]] = []
        for name in live:
            dtype, var = next(iter(self.now[name].items()))
            slot = self.layout.slots[name][1]
            source = self.origin.get(var)
            if source == name:
                continue
            if source in live:
                var = self.new(f"{var}.copy()")
            stores.append((f"M.files.{dtype}[{slot}]", var, name))
        if not stores:
            return
        changed = {name for _, _, name in stores}
        for var, name in list(self.origin.items()):
            if name in changed and re.search(rf"\b{var}\b", self.end):
                self.end = re.sub(rf"\b{var}\b", self.new(f"{var}.copy()"), self.end)
        self.line("if m is None:")
        for target, var, _ in stores:
            self.line(f"    {target}[g] = {var}")
        self.line("else:")
        for target, var, _ in stores:
            self.line(f"    put({target}, g, m, {var})")

    def source(self) -> str:
        """The source of the block's function."""
        from coda.sim.ptx.emit import emit

        for ins in self.block.instructions:
            try:
                emit(self, ins)
            except Unsupported as e:
                message = f"PTX line {ins.line}: {ins.text}: {e}"
                raise Unsupported(message) from None
        self.write_back()
        body = "".join(f"    {x}\n" for x in self.lines)
        return f"def block(M, g, m):\n{body}    {self.end}\n"

    def compile(self) -> Callable[..., None]:
        """The block's function."""
        source = self.source()
        exec(compile(source, f"<PTX block {self.number}>", "exec"), self.names)
        run = self.names["block"]
        run.source = source
        return run

    def moves(self, instructions: list[Instruction]) -> Callable[..., None] | None:
        """A function that executes the given moves only; None for no moves."""
        if not instructions:
            return None
        writes = {x for ins in instructions for x in uses_and_writes(ins, self.kernel)[1]}
        block = BasicBlock(0, 0, instructions, writes=writes, live_out=writes)
        emitter = Emitter(self.program, self.layout, self.number, block)
        emitter.end = "pass"
        return emitter.compile()


def arithmetic(e: Emitter, ins: Instruction) -> bool:
    """Emit an instruction of the table of arithmetic; False where the table has none."""
    results = [x.strip() for x in ins.operands[0].split("|")] if ins.operands else []
    operands = [x for text in ins.operands[1:] for x in e.vector(text)]
    row = lookup(ins.op, len(operands), pair=len(results) == 2)
    if row is None:
        return False
    kinds = list(row.sources)
    carry = kinds.count("cc")
    sources = [e.value(x, kind) for x, kind in zip(operands, kinds, strict=False)]
    if carry:
        sources.append(e.carry)
    symbol = INLINE.get(row.run) if isinstance(row.run, np.ufunc) else None
    if symbol is not None and len(sources) == 2:
        out = f"{sources[0]} {symbol} {sources[1]}"
    else:
        out = f"{e.function(row.run)}({', '.join(sources)})"
    made = row.result.split("|")
    if len(made) == 1:
        e.put(results[0], out, made[0], ins)
        return True
    out = e.new(out)
    for k, kind in enumerate(made):
        if kind == "cc":
            e.carry = e.new(f"{out}[{k}]")
        else:
            e.put(results[k], e.new(f"{out}[{k}]"), kind, ins)
    return True
