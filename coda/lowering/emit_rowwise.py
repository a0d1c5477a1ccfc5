"""A pass over rows -> a Python module: a CuTe DSL kernel in which a warp takes a row.

Statistics come first, those that do not need each other in one sweep of the row, then one sweep
that stores. A row is read again for each sweep (from the cache), so that no width spills registers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import gcd

from coda.ir.dims import product, show_shape
from coda.lowering.emit_epilogue import Lines
from coda.lowering.emit_gemm import safe
from coda.lowering.epilogue import Call, Expr, Load, Operand, Stat, Statistic, StoreExpr
from coda.lowering.program import Program, RowwiseKernel

WARPS = 4  # rows of a CTA
INDENT = "    "


@dataclass(frozen=True)
class RowSource:
    """An emitted module.

    Attributes:
        text: the Python source; `launch` is its host function.
        name: a module name that belongs to this text alone.
        parameters: (emitted name, operand or buffer, columns, whether it is written), in order.
            Sums over the rows of a GEMM have as many parts as the GEMM has tiles: 0 columns.
        types: the element type of each parameter, as coda names it.
    """

    text: str
    name: str
    parameters: tuple[tuple[str, str, int, bool], ...]
    types: tuple[str, ...]


def emit_rowwise(program: Program, kernel: RowwiseKernel) -> RowSource:
    """The module of a pass over rows."""
    return _Emitter(program, kernel).emit()


class _Emitter:
    def __init__(self, program: Program, kernel: RowwiseKernel) -> None:
        self.program, self.kernel = program, kernel
        self.epilogue = kernel.assembled.epilogue
        self.kinds: dict[str, Operand] = {o.name: o for o in self.epilogue.operands}
        self.lanes = 2 if self.epilogue.pair else 1
        self.points = kernel.width // self.lanes
        self.vec = self.vector_length()
        folds = [s for s in self.epilogue.statistics if s.operand]
        self.tall: set[str | None] = {s.operand for s in folds if not s.count}
        self.math: set[str] = set()
        self.rows: set[str] = {"LANES"}

    def vector_length(self) -> int:
        """Points that a lane takes at once: a power of two that every pattern divides by."""
        lengths = [self.points, 8]
        lengths += [o.period for o in self.epilogue.operands if o.period]
        lengths += [o.split for o in self.epilogue.operands if o.split]
        lengths += [s.split for s in self.epilogue.stores if s.split]
        common = gcd(*lengths)
        return common & -common

    # Leaves.

    def leaf(self, expr: Expr) -> str:
        match expr:
            case Load(operand=name, lane=lane):
                return self.load(self.kinds[name], lane)
            case Stat(name=name, plane=plane):
                return f"{name}_{plane}" if plane else name
        raise AssertionError(expr)

    def load(self, operand: Operand, lane: int) -> str:
        name = safe(operand.name)
        if operand.kind in ("col", "scalar"):
            return f"{name}_0"
        if operand.split:
            return f"{name}_{lane}[j]"
        if operand.lanes == 2:
            return f"{name}_v[2 * j + {lane}]"
        return f"{name}_v[j]"

    # The kernel.

    def emit(self) -> RowSource:
        body: list[str] = self.constants()
        for fold in [s for s in self.epilogue.statistics if s.operand]:
            body += self.fold(fold)
        for level in self.levels():
            body += self.sweep(level)
        body += self.final()
        parameters = self.parameters()
        names = [p[0] for p in parameters]
        text = self.module(names, body)
        name = "coda_rows_" + hashlib.sha256(text.encode()).hexdigest()[:24]
        return RowSource(text, name, parameters, self.types(parameters))

    def parameters(self) -> tuple[tuple[str, str, int, bool], ...]:
        found: list[tuple[str, str, int, bool]] = []
        for o in self.epilogue.operands:
            columns = {
                "row": self.kernel.width,
                "col": 1,
                "scalar": 1,
                "tile": self.kernel.width if o.lanes == self.lanes else self.points,
                "periodic": o.period,
            }.get(o.kind)
            if columns is None and o.name in self.tall:
                columns = 0
            elif columns is None:
                parts = self.program.buffers[o.name].shape[-1].size(self.program.sizes)
                columns = parts * o.lanes
            found.append((safe(o.name), o.name, columns, False))
        for store in self.epilogue.stores:
            shape = self.program.buffers[store.buffer].shape
            columns = product(shape[1:]).size(self.program.sizes)
            found.append((safe(store.buffer) + "_out", store.buffer, columns, True))
        return tuple(found)

    def types(self, parameters: tuple[tuple[str, str, int, bool], ...]) -> tuple[str, ...]:
        stores = {s.buffer: s.dtype.name for s in self.epilogue.stores}
        return tuple(
            stores[source] if written else self.kinds[source].dtype.name
            for _, source, _, written in parameters
        )

    def constants(self) -> list[str]:
        """Values that a row has once."""
        lines = []
        for o in self.epilogue.operands:
            name = safe(o.name)
            if o.kind in ("col", "scalar"):
                row = "row" if o.kind == "col" else "0"
                lines.append(f"{name}_0 = {name}[{row}, 0].to(Float32)")
        return lines

    def levels(self) -> list[list[Statistic]]:
        """Statistics of the row, those of one list independent of each other."""
        left = [s for s in self.epilogue.statistics if s.expr is not None]
        known = {s.name for s in self.epilogue.statistics if s.operand}
        found: list[list[Statistic]] = []
        while left:
            now = [s for s in left if stats_of(s.expr) <= known]
            found.append(now)
            known |= {s.name for s in now}
            left = [s for s in left if s not in now]
        return found

    def fold(self, stat: Statistic) -> list[str]:
        """A statistic from partials of tiles: lanes take parts in turn, then the warp merges."""
        assert stat.operand is not None
        name, source = stat.name, safe(stat.operand)
        if not stat.count:
            start, inner, end = self.accumulate(stat, f"{source}[row, part]")
            head = [
                f"for step in cutlass.range(cute.ceil_div({source}.shape[1], 32)):",
                f"{INDENT}part = step * LANES + lane",
                f"{INDENT}if part < {source}.shape[1]:",
            ]
            return [*start, *head, *(INDENT * 2 + i for i in inner), *end]
        parts = self.program.buffers[stat.operand].shape[-1].size(self.program.sizes)
        last = stat.width - stat.count * (parts - 1)
        loop = [
            f"for step in cutlass.range({-(-parts // 32)}):",
            f"{INDENT}part = step * LANES + lane",
            f"{INDENT}if part < {parts}:",
        ]
        value = f"{source}[row, part]"
        if stat.monoid == "variance":
            count = (
                f"cutlass.select_(part < {parts - 1}, Float32({stat.count}.0), Float32({last}.0))"
            )
            two = f"{source}[row, 2 * part], {source}[row, 2 * part + 1]"
            self.rows |= {"moments_merge", "warp_moments", "zero"}
            inner = [f"{name}_s = moments_merge({name}_s, ({count}, {two}))"]
            start = [f"{name}_s = (zero(), zero(), zero())"]
            end = [
                f"{name}_n, {name}_mean, {name}_m2 = warp_moments({name}_s)",
                f"{name} = {name}_m2 * {1.0 / stat.width!r}",
            ]
        else:
            start, inner, end = self.accumulate(stat, value)
        return [*start, *loop, *(INDENT * 2 + i for i in inner), *end]

    def accumulate(self, stat: Statistic, value: str) -> tuple[list[str], list[str], list[str]]:
        """Start, step and end of a fold over the lanes' values."""
        name = stat.name
        if stat.monoid in ("sum", "mean"):
            self.rows |= {"zero", "warp_sum"}
            end = f"warp_sum({name}_s)"
            if stat.monoid == "mean":
                end = f"{end} * {1.0 / stat.width!r}"
            return [f"{name}_s = zero()"], [f"{name}_s = {name}_s + {value}"], [f"{name} = {end}"]
        if stat.monoid in ("max", "min"):
            start = "lowest" if stat.monoid == "max" else "highest"
            self.rows |= {start, f"warp_{stat.monoid}"}
            fn = "maximum" if stat.monoid == "max" else "minimum"
            self.math.add(fn)
            step = f"{name}_s = {fn}({name}_s, {value})"
            return [f"{name}_s = {start}()"], [step], [f"{name} = warp_{stat.monoid}({name}_s)"]
        self.rows |= {"lse_step", "warp_lse", "lowest", "zero"}
        return (
            [f"{name}_s = (lowest(), zero())"],
            [f"{name}_s = lse_step({name}_s, {value})"],
            [f"{name} = warp_lse({name}_s)"],
        )

    def sweep(self, level: list[Statistic]) -> list[str]:
        """One sweep of the row for some statistics, and a second one for their variances."""
        lines = Lines(self.leaf, prefix="a")
        values = lines.assign([s.expr for s in level if s.expr is not None])
        starts: list[str] = []
        steps: list[str] = []
        ends: list[str] = []
        pivots = {s.expr: s.name for s in level if s.monoid == "variance"}
        for stat, value in zip(level, values, strict=True):
            if stat.monoid == "mean" and stat.expr in pivots:
                ends.append(f"{stat.name} = {pivots[stat.expr]}_mean")
                continue
            if stat.monoid == "variance":
                self.rows |= {"zero", "warp_sum"}
                starts += self.pivot(stat)
                starts.append(f"{stat.name}_s = zero()")
                steps.append(f"{stat.name}_s = {stat.name}_s + ({value} - {stat.name}_k)")
                share = repr(1.0 / stat.width)
                mean = f"{stat.name}_k + warp_sum({stat.name}_s) * {share}"
                ends.append(f"{stat.name}_mean = {mean}")
                continue
            start, step, end = self.accumulate(stat, value)
            starts, steps, ends = starts + start, steps + step, ends + end
        self.math |= lines.imported
        exprs = [s.expr for s in level if s.expr is not None]
        ends.sort(key=lambda line: line.endswith("_mean"))
        out = [*starts, *self.loop(exprs, [*lines.lines, *steps]), *ends]
        return out + self.deviations([s for s in level if s.monoid == "variance"])

    def pivot(self, stat: Statistic) -> list[str]:
        """The row's first value, near which sums lose nothing."""
        assert stat.expr is not None
        lines = Lines(self.leaf, prefix=f"{stat.name}_p")
        (value,) = lines.assign([stat.expr])
        self.math |= lines.imported
        out = [*self.loads([stat.expr], "0"), *lines.lines, f"{stat.name}_k = {value}"]
        for name in loads_of([stat.expr]):
            for suffix in ("_v", "_0[", "_1["):
                new = suffix.replace("_", f"_{stat.name}", 1)
                out = [line.replace(safe(name) + suffix, safe(name) + new) for line in out]
        return [line.replace("[j]", "[0]").replace("2 * j", "0") for line in out]

    def deviations(self, variances: list[Statistic]) -> list[str]:
        """Σ(x − mean)² in a sweep of its own."""
        if not variances:
            return []
        lines = Lines(self.leaf, prefix="b")
        values = lines.assign([s.expr for s in variances if s.expr is not None])
        steps: list[str] = []
        starts: list[str] = []
        ends: list[str] = []
        for stat, value in zip(variances, values, strict=True):
            name = stat.name
            starts.append(f"{name}_q = zero()")
            steps.append(f"{name}_d = {value} - {name}_mean")
            steps.append(f"{name}_q = {name}_q + {name}_d * {name}_d")
            ends.append(f"{name} = warp_sum({name}_q) * {1.0 / stat.width!r}")
        exprs = [s.expr for s in variances if s.expr is not None]
        return [*starts, *self.loop(exprs, [*lines.lines, *steps]), *ends]

    def final(self) -> list[str]:
        """The sweep that stores, and the values that a row has once."""
        wide = [s for s in self.epilogue.stores if not self.once(s)]
        narrow = [s for s in self.epilogue.stores if self.once(s)]
        out: list[str] = []
        if wide:
            lines = Lines(self.leaf, prefix="v")
            kept: list[str] = []
            after: list[str] = []
            rooms: list[str] = []
            for store in wide:
                values = lines.assign(store.lanes)
                more = self.keep(store, values)
                rooms, kept, after = rooms + more[0], kept + more[1], after + more[2]
            self.math |= lines.imported
            exprs = [e for s in wide for e in s.lanes]
            out += self.loop(exprs, [*lines.lines, *kept], rooms, after)
        if narrow:
            lines = Lines(self.leaf, prefix="w")
            values = [lines.assign(s.lanes)[0] for s in narrow]
            self.math |= lines.imported
            exprs = [e for s in narrow for e in s.lanes]
            loads = self.loads(exprs, "0") if self.kernel.width == 1 else []
            inner = [line.replace("[j]", "[0]") for line in lines.lines]
            out += [*loads, *inner, "if lane == 0:"]
            for store, value in zip(narrow, values, strict=True):
                target = f"{safe(store.buffer)}_out"
                shown = value.replace("[j]", "[0]")
                out.append(f"{INDENT}{target}[row, 0] = Float32({shown}).to({target}.element_type)")
        return out

    def once(self, store: StoreExpr) -> bool:
        """Whether a store has one column."""
        return store.narrow or self.kernel.width == 1

    def keep(self, store: StoreExpr, values: list[str]) -> tuple[list[str], list[str], list[str]]:
        """Room, assignments and the write of one wide store."""
        name = f"{safe(store.buffer)}_out"
        self.rows |= {"vector", "store"}
        if store.split:
            rooms = [f"{name}_{i} = vector({self.vec})" for i in (0, 1)]
            kept = [f"{name}_{i}[j] = {v}" for i, v in enumerate(values)]
            after = [
                f"store({name}, row, {self.apart('index', store.split, i)}, {name}_{i})"
                for i in (0, 1)
            ]
            return rooms, kept, after
        lanes = len(values)
        rooms = [f"{name}_v = vector({lanes * self.vec})"]
        at = ["j"] if lanes == 1 else ["2 * j", "2 * j + 1"]
        kept = [f"{name}_v[{i}] = {v}" for i, v in zip(at, values, strict=True)]
        return rooms, kept, [f"store({name}, row, index, {name}_v)"]

    def apart(self, index: str, split: int, lane: int) -> str:
        """The vector of one lane where lanes lie `split` columns apart."""
        block = split // self.vec
        if block == 1:
            return f"{index} * 2 + {lane}"
        return f"{index} // {block} * {2 * block} + {index} % {block} + {lane * block}"

    def loop(
        self,
        exprs: list[Expr],
        inner: list[str],
        rooms: list[str] | None = None,
        after: list[str] | None = None,
    ) -> list[str]:
        """A sweep: vectors of the row by lanes in turn, and the values of a vector one by one."""
        vectors = self.points // self.vec
        head = [
            f"for step in cutlass.range({-(-vectors // 32)}):",
            f"{INDENT}index = step * LANES + lane",
            f"{INDENT}if index < {vectors}:",
        ]
        body = [*self.loads(exprs, "index"), *(rooms or [])]
        body.append(f"for j in cutlass.range_constexpr({self.vec}):")
        body += [INDENT + i for i in inner]
        return [*head, *(INDENT * 2 + b for b in [*body, *(after or [])])]

    def loads(self, exprs: list[Expr], index: str) -> list[str]:
        """The vectors that some expressions read."""
        lines = []
        for name in sorted(loads_of(exprs)):
            o = self.kinds[name]
            if o.kind in ("col", "scalar"):
                continue
            self.rows.add("load")
            x = safe(name)
            row = "0" if o.kind == "row" else "row"
            if o.split:
                for lane in (0, 1):
                    at = self.apart(index, o.split, lane)
                    lines.append(f"{x}_{lane} = load({x}, {row}, {at}, {self.vec})")
                continue
            at = index
            if o.kind == "periodic":
                at = f"{index} % {o.period // self.vec}"
            lines.append(f"{x}_v = load({x}, {row}, {at}, {o.lanes * self.vec})")
        return lines

    def module(self, names: list[str], body: list[str]) -> str:
        """The whole text."""
        rows = self.kernel.rows
        title = (
            f"{self.kernel.name} of {self.program.graph.name}: rows {rows} × {self.kernel.width}."
        )
        notes = [f"    {o.name}: {o.kind} {o.dtype}" for o in self.epilogue.operands]
        for store in self.epilogue.stores:
            shape = show_shape(self.program.buffers[store.buffer].shape)
            notes.append(f"    -> {store.buffer}: {shape} {store.dtype}")
        tensors = ", ".join(f"{n}: cute.Tensor" for n in names)
        lines = [
            '"""' + title,
            "",
            *notes,
            '"""',
            "",
            "import cutlass",
            "import cutlass.cute as cute",
            "from cutlass import Float32",
            f"from coda.runtime.row_math import {', '.join(sorted(self.rows))}",
        ]
        if self.math:
            lines.append(f"from coda.runtime.epilogue_math import {', '.join(sorted(self.math))}")
        lines += [
            "",
            "",
            "@cute.kernel",
            f"def kernel({tensors}, rows: cutlass.Int32):",
            "    thread, _, _ = cute.arch.thread_idx()",
            "    block, _, _ = cute.arch.block_idx()",
            "    lane = thread % LANES",
            f"    row = block * {WARPS} + thread // LANES",
            "    if row < rows:",
            *(INDENT * 2 + b for b in body),
            "",
            "",
            "@cute.jit",
            f"def launch({tensors}, rows: cutlass.Int32, stream):",
            f"    kernel({', '.join(names)}, rows).launch(",
            f"        grid=[cute.ceil_div(rows, {WARPS}), 1, 1],",
            f"        block=[{WARPS} * LANES, 1, 1],",
            "        stream=stream,",
            "    )",
        ]
        return "\n".join(lines) + "\n"


def stats_of(expr: Expr | None) -> set[str]:
    """The statistics that an expression reads."""
    match expr:
        case Stat(name=name):
            return {name}
        case Call(args=args):
            return set().union(*(stats_of(a) for a in args))
    return set()


def loads_of(exprs: list[Expr]) -> set[str]:
    """The operands that expressions load."""
    found: set[str] = set()
    stack, seen = list(exprs), set()
    while stack:
        expr = stack.pop()
        if expr in seen:
            continue
        seen.add(expr)
        if isinstance(expr, Load):
            found.add(expr.operand)
        elif isinstance(expr, Call):
            stack.extend(expr.args)
    return found
