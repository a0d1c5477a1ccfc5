"""A GEMM kernel -> the Python source of its epilogue, a module on quack's `gemm_epilogue`."""

from __future__ import annotations

import hashlib
import itertools
from typing import assert_never

from coda.errors import InternalError, UnsupportedError
from coda.ir.dims import show_shape
from coda.ir.monoids import MONOIDS
from coda.ir.scalars import CHOICE
from coda.ir.types import bf16, e4m3, e5m2, f16, f32
from coda.kernels.gemm.dedupe import first_alike
from coda.kernels.gemm.imports import base_of, import_lines
from coda.kernels.gemm.mainloop import Gemm, shown_problem, tiles
from coda.kernels.gemm.operands import by_gemm, numbered, pack_tables, passed
from coda.kernels.gemm.ragged import is_sum, needs_mask
from coda.kernels.gemm.row_folds import split_folds
from coda.kernels.gemm.source import PAIRS, WHOLE, WORDS, GemmSource, Table
from coda.kernels.lines import Lines, parts_of, safe, stored
from coda.lowering.program.access import (
    Alternating,
    ColumnVector,
    Grouped,
    Line,
    OneElement,
    Partial,
    Periodic,
    RowVector,
    Shifted,
    Tile,
)
from coda.lowering.program.body import Body
from coda.lowering.program.cost import label
from coda.lowering.program.epilogue import (
    Acc,
    Call,
    Epilogue,
    Expr,
    Literal,
    Load,
    Operand,
    PickColumn,
    Position,
    ReduceColumns,
    SinkExpr,
    Stat,
    StoreExpr,
    SumRows,
    conditions,
    held,
    rounds_to_halves,
)
from coda.lowering.program.program import Program

COMPILED = {bf16, f16, e4m3, e5m2}
PAUSE = 4  # elements or column pairs between pauses


def emit_gemm(program: Program, kernel: Gemm) -> GemmSource:
    """The module of a GEMM, shared with those equal up to renaming. Raises UnsupportedError."""
    kinds = {o.dtype for o in kernel.mainloop.operands}
    if len(kinds) > 1 or not kinds <= COMPILED:
        raise UnsupportedError(
            "a contraction is compiled for operands of one type of 8 or 16 bits",
            found=", ".join(sorted(str(k) for k in kinds)),
            help='cast to bf16, or run it on backend="reference"',
            where=kernel.mainloop.contracts[0].where,
        )
    first, names = first_alike(program, kernel)
    return _emit(program, first).renamed(names)


def _emit(program: Program, kernel: Gemm) -> GemmSource:
    n = kernel.mainloop.problem(program.sizes)[1]
    weights = " | ".join(label(c.rhs, program) for c in kernel.mainloop.contracts)
    ragged = n % tiles(kernel).tile_n != 0
    a = label(kernel.mainloop.a, program)
    head = f"{kernel.name} of {program.graph.name}: {a} @ [{weights}].T"
    problem = shown_problem(program, kernel)
    return _GemmEmitter(program, kernel.body, ragged, base_of(program, kernel)).emit(
        f"{head}, {problem}."
    )


class _GemmEmitter:
    def __init__(
        self,
        program: Program,
        body: Body,
        ragged: bool,
        base: tuple[str, str],
    ) -> None:
        self.program, self.body, self.ragged = program, body, ragged
        self.base = base
        self.epilogue: Epilogue
        self.epilogue, self.folds = split_folds(body.epilogue)
        self.fold_of = {n: (f, i) for f in self.folds for i, n in enumerate(f.values)}
        self.pair = self.epilogue.pair
        self.kinds: dict[str, Operand] = {o.name: o for o in self.epilogue.operands}
        self.passed, self.tables = passed(self.epilogue), pack_tables(self.epilogue)
        self.numbered = numbered(self.epilogue)
        self.classes: set[str] = set()
        # Many values per element, for several columns at once, exceed the registers.
        several = len(self.epilogue.stores) > 1 and bool(self.epilogue.row_sums)
        crowded = held(self.epilogue) + conditions(self.epilogue) > 5
        self.pauses = program.target.tensor_memory and (crowded or several)
        # On sm_100a quack calls the epilogue for two columns in any case.
        self.two_columns = not self.pair and not program.target.tensor_memory
        self.two_columns &= rounds_to_halves(self.epilogue)
        self.masked = self.rows_masked = False

    # Leaves.

    def leaf(self, expr: Expr) -> str:
        match expr:
            case Acc(lane=lane):
                return f"acc{lane}" if self.pair else "acc"
            case Load(operand=name, lane=lane):
                return self.load(self.kinds[name], lane)
            case Stat(name=name):
                return f"{name}_0" if self.pair else name
            case Position():
                return f"{self.numbered[expr]}_0" if self.pair else self.numbered[expr]
        raise AssertionError(expr)

    def load(self, operand: Operand, lane: int) -> str:
        match operand.access:
            case Periodic():
                table = next(t for t in self.tables if operand.name in t.operands)
                lane = table.operands.index(operand.name)
                return f"{table.name}_{lane}" if self.pair else table.name
            case RowVector() | Tile() | Alternating():
                both = self.pair or isinstance(operand.access, Alternating)
                return safe(operand.name) + f"_{lane}" * both
            case ColumnVector() | OneElement():
                return safe(operand.name)
            case Grouped() | Shifted() | Line() | Partial():
                raise _not_read(operand)
            case _ as never:
                assert_never(never)

    def single(self, expr: Expr) -> str:
        """The name of a leaf in the prepass, where values are not unpacked into lanes."""
        match expr:
            case Acc():
                return "acc"
            case Load(operand=name):
                return safe(name)
            case Position():
                return self.numbered[expr]
        raise AssertionError(expr)

    # The module.

    def emit(self, head: str) -> GemmSource:
        body = Lines(self.leaf)
        returned: list[tuple[str, str]] = []
        d, outputs = self.stores(body, returned)
        sinks = self.sinks(body, returned)
        columns = {safe(buffer): buffer for f in self.folds for buffer, *_ in f.stores}
        before = self.prepass()
        parameters = self.parameters()
        text = self.module(
            head, parameters, body, returned, outputs=outputs, sinks=sinks, before=before
        )
        name = "coda_gemm_" + hashlib.sha256(text.encode()).hexdigest()[:24]
        passed = {o.name: safe(o.name) for o in self.passed if o.name not in self.fold_of}
        passed |= {f.partials: f.first for f in self.folds}
        numbers = {s.name: s.group for s in self.epilogue.statistics if s.group}
        numbers |= {n: 1 for n, (_, i) in self.fold_of.items() if i}
        numbers |= {"pause": PAUSE} if self.pauses else {}
        numbers |= dict.fromkeys(self.numbered.values(), 1)
        masks = ("inside",) if self.masked else ()
        rows = ("inside_rows",) if self.rows_masked else ()
        stored = tuple(outputs)
        sinks |= columns
        return GemmSource(text, name, d, stored, passed, self.tables, sinks, masks, rows, numbers)

    def parameters(self) -> list[str]:
        names = [safe(o.name) for o in self.passed]
        names += [t.name for t in self.tables]
        names += [s.name for s in self.epilogue.statistics if s.group]
        names += [safe(s.buffer) for s in self.epilogue.sinks if self.in_turn(s)]
        names += [*self.numbered.values(), *["pause"] * self.pauses]
        return names + ["inside"] * self.masked + ["inside_rows"] * self.rows_masked

    def stores(
        self, body: Lines, returned: list[tuple[str, str]]
    ) -> tuple[str | None, list[tuple[str, str, int]]]:
        first, d = by_gemm(self.epilogue), None
        outputs: list[tuple[str, str, int]] = []
        for store in self.epilogue.stores:
            values = [stored(v, store.dtype, body.imported) for v in body.assign(store.lanes)]
            name = safe(store.buffer)
            if self.epilogue.apart(store):
                for lane, value in enumerate(values):
                    outputs.append((f"{name}_{lane}", store.buffer, lane))
                    returned.append((f"{name}_{lane}", value))
                continue
            if store is first:
                d = store.buffer
                returned.insert(0, ("D", self.packed(values)))
            elif len(values) == 2:
                body.imported.add("word")
                outputs.append((name, store.buffer, PAIRS if self.pair else WORDS))
                returned.append((name, f"word({', '.join(values)}, {store.dtype.name!r})"))
            else:
                outputs.append((name, store.buffer, WHOLE))
                returned.append((name, values[0]))
        return d, outputs

    def packed(self, values: list[str]) -> str:
        """The text of one value, or of a column pair."""
        return f"pack({', '.join(values)})" if len(values) == 2 else values[0]

    def sinks(self, body: Lines, returned: list[tuple[str, str]]) -> dict[str, str]:
        found: dict[str, str] = {}
        for sink in self.epilogue.sinks:
            values = body.assign([p for e in sink.lanes for p in parts_of(self.inside(sink, e))])
            if self.pair and len(values) == 1:
                values.append("0.0" if is_sum(sink) else values[0])
            value = ", ".join(values)
            value = f"{'pack' * self.pair}({value})" if len(values) > 1 else value
            found[safe(sink.buffer)] = sink.buffer
            if self.in_turn(sink):
                body.lines.append(f"{safe(sink.buffer)}({value})")
                continue
            returned.append((safe(sink.buffer), value))
        return found

    def in_turn(self, sink: SinkExpr) -> bool:
        """Whether a sum is an op that adds values as they are computed."""
        summed = isinstance(sink, SumRows | ReduceColumns) and is_sum(sink)
        return summed and self.pauses and not self.pair

    def inside(self, sink: SinkExpr, expr: Expr) -> Expr:
        """The value of a sink, masked to 0 in padding columns (of a sum over rows: rows)."""
        rows = isinstance(sink, SumRows)
        if not (rows or self.ragged) or not needs_mask(sink, expr, self.kinds):
            return expr
        if rows:
            self.rows_masked = True
            mask = Operand("inside_rows", f32, ColumnVector())
        else:
            self.masked = True
            mask = Operand("inside", f32, RowVector())
        self.kinds[mask.name] = mask
        return Call(CHOICE, (Load(mask.name), expr, Literal(0.0)))

    def prepass(self) -> tuple[Lines, list[tuple[str, str]]]:
        lines = Lines(self.single)
        groups = [s for s in self.epilogue.statistics if s.group and s.expr is not None]
        values = lines.assign([s.expr for s in groups if s.expr is not None])
        return lines, [(s.name, v) for s, v in zip(groups, values, strict=True)]

    def module(
        self,
        head: str,
        parameters: list[str],
        body: Lines,
        returned: list[tuple[str, str]],
        *,
        outputs: list[tuple[str, str, int]],
        sinks: dict[str, str],
        before: tuple[Lines, list[tuple[str, str]]],
    ) -> str:
        definition = self.definition(outputs, sinks, before)
        first = ["acc = pause(acc)"] * self.pauses + self.unpacked(parameters)
        lines = self.function("epilogue", parameters, first, body, returned)
        if before[1]:
            needed = [p for p in parameters if _mentions(before[0], p)]
            lines = [*self.function("prepass", needed, [], *before), "", "", *lines]
        imported = (
            body.imported | before[0].imported | ({"pack", "unpack", "neighbours"} & self.used)
        )
        for fold in reversed(self.folds):
            rows = Lines(fold.leaf)
            lines = [*fold.function(rows), "", "", *lines]
            imported |= rows.imported
        imported = sorted(imported)
        imports = import_lines(self.classes, imported, base=self.base[0])
        title = ['"""' + head, "", *self.notes(), '"""', ""]
        return "\n".join([*title, *imports, "", "", *lines, "", "", *definition]) + "\n"

    def notes(self) -> list[str]:
        """The operands and results, for the module's docstring."""
        own = [o for o in self.epilogue.operands if o.name not in self.fold_of]
        notes = [f"    {o.name}: {o.access.word} {o.dtype}" for o in own]
        for fold in self.folds:
            notes.append(
                f"    {', '.join(fold.values)}: {fold.statistic.monoid} of {fold.partials}"
            )
            notes += [f"    -> {buffer}: {value}" for buffer, _, value in fold.stores]
        for store in self.epilogue.stores:
            buffer = self.program.buffers[store.buffer]
            notes.append(f"    -> {store.buffer}: {show_shape(buffer.shape)} {store.dtype}")
        for sink in self.epilogue.sinks:
            notes.append(f"    -> {sink.buffer}: {sink.monoid} of each tile")
        return notes

    def unpacked(self, parameters: list[str]) -> list[str]:
        """Lines that unpack every value of a column pair, or of two neighbours, into its lanes."""
        if not self.pair:
            twice = [o for o in self.passed if isinstance(o.access, Alternating)]
            self.used = {"neighbours"} if twice else set()
            apart = [(safe(o.name), o.dtype.name) for o in twice]
            return [f"{n}_0, {n}_1 = neighbours({n}, {of!r})" for n, of in apart]
        self.used = {"pack", "unpack"}
        lanes = RowVector | Tile  # accesses with an element for each lane
        paired = {safe(o.name) for o in self.passed if isinstance(o.access, lanes)} | {"inside"}
        paired |= {t.name for t in self.tables} | {*self.numbered.values()}
        paired |= {s.name for s in self.epilogue.statistics if s.group}
        lines = ["acc0, acc1 = unpack(acc)"]
        return lines + [f"{p}_0, {p}_1 = unpack({p})" for p in parameters if p in paired]

    def function(
        self,
        name: str,
        parameters: list[str],
        first: list[str],
        body: Lines,
        returned: list[tuple[str, str]],
    ) -> list[str]:
        results = ", ".join(f"{key!r}: {value}" for key, value in returned)
        inner = [*first, *body.lines, f"return {{{results}}}"]
        return [f"def {name}({', '.join(['acc', *parameters])}):", *(f"    {i}" for i in inner)]

    def definition(
        self,
        outputs: list[tuple[str, str, int]],
        sinks: dict[str, str],
        before: tuple[Lines, list[tuple[str, str]]],
    ) -> list[str]:
        lines = ["KERNEL = gemm_epilogue("]
        if self.base[1]:
            lines.append(f"    {self.base[1]}")
        stores = {s.buffer: s for s in self.epilogue.stores}
        shown = [self.output(name, stores[buffer], lane) for name, buffer, lane in outputs]
        if shown:
            lines.append(f"    outputs=({', '.join(shown)},),")
        ops = [f"{n!r}: {self.make(c)}" for n, c in self.operators()]
        if ops:
            lines += ["    ops={", *(f"        {o}," for o in ops), "    },"]
        reduced, extra = self.reductions()
        if reduced:
            lines += ["    outs={", *(f"        {r}," for r in reduced), "    },"]
        if extra:
            lines.append(f"    extra_ops=({', '.join(extra)},),")
        if self.pair:
            # The DSL's loop vectoriser crashes on sm_100a where both lanes share a value.
            lines.append('    mode="acc_pair", vectorize=False,')
        if self.two_columns:
            lines.append("    two_columns=True,")
        if before[1]:
            names = ", ".join(repr(n) for n, _ in before[1])
            lines.append(f"    prepass=prepass, prepass_outs=({names},),")
        return [*lines, ")(epilogue)"]

    def reductions(self) -> tuple[list[str], list[str]]:
        """The entries of the ops that reduce, and the ops that are neither results nor operands."""
        reduced: list[str] = []
        extra: list[str] = []
        for sink in itertools.filterfalse(self.in_turn, self.epilogue.sinks):
            name = safe(sink.buffer)
            match sink:
                case PickColumn(index=index):
                    chosen = f'ColVecLoad("{safe(index)}_index")'
                    reduced.append(f"{name!r}: {self.make(f'Select({name!r}, {chosen})')}")
                    extra.append(self.make(chosen))
                case SumRows(monoid=monoid):
                    reduced.append(f"{name!r}: {self.make(MONOIDS[monoid].rows.format(name))}")
                case ReduceColumns(monoid=monoid):
                    reduced.append(f"{name!r}: {self.make(MONOIDS[monoid].sink.format(name))}")
                case _ as never:
                    assert_never(never)
        extra += [self.make(store) for fold in self.folds for store in fold.store_ops]
        return reduced, extra

    def output(self, name: str, store: StoreExpr, lane: int) -> str:
        if lane >= 0:
            return self.make(f"SplitStore({name!r}, {self.epilogue.split})")
        if lane == PAIRS:
            return self.make(f"PairStore({name!r})")
        half = self.pair and len(store.lanes) == 1
        return self.make(f"HalfStore({name!r})") if half else repr(name)

    def operators(self) -> list[tuple[str, str]]:
        """(name, constructor) of the op of every parameter."""
        found = [(safe(o.name), self.loader(o)) for o in self.passed]
        found += [(t.name, self.table(t)) for t in self.tables]
        for stat in self.epilogue.statistics:
            if stat.group:
                found.append((stat.name, MONOIDS[stat.monoid].group.format(stat.name)))
        for sink in filter(self.in_turn, self.epilogue.sinks):
            op = "SumInTurn" if isinstance(sink, SumRows) else "ColumnSumInTurn"
            found.append((safe(sink.buffer), f"{op}({safe(sink.buffer)!r})"))
        for at, name in self.numbered.items():
            found.append((name, f"Number({name!r}, {at.axis!r}, {at.inner}, {at.count})"))
        found += [("pause", 'Pause("pause")')] * self.pauses
        found += [("inside", 'RowVecLoad("inside")')] * self.masked
        return found + [("inside_rows", 'ColVecLoad("inside_rows")')] * self.rows_masked

    def loader(self, operand: Operand) -> str:
        """The constructor of the op that loads an operand, or folds it."""
        name = safe(operand.name)
        if operand.name not in self.fold_of:
            return f"{self.operator(operand)}({name!r})"
        fold, number = self.fold_of[operand.name]
        return fold.op if number == 0 else f"FoldedRow({name!r}, {fold.first!r}, {number})"

    def operator(self, operand: Operand) -> str:
        """The class of the op that loads an operand."""
        match operand.access:
            case RowVector():
                return "RowInTurn" if self.pauses and not self.pair else "RowVecLoad"
            case ColumnVector():
                return "ColVecLoad"
            case Tile() | Alternating():
                return "TileLoad"
            case OneElement():
                return "Scalar"
            case Periodic() | Grouped() | Shifted() | Line() | Partial():
                raise _not_read(operand)
            case _ as never:
                assert_never(never)

    def table(self, table: Table) -> str:
        """The op of a table: by TMA if it is whole subtiles of 64 columns, else by plain loads."""
        tma = "" if table.by_tma else ", tma=False"
        return f"rotary_cos_sin_load({table.name!r}{tma})"

    def make(self, text: str) -> str:
        """Return a constructor's text, and record its class for the imports."""
        self.classes.add(text.split("(", 1)[0])
        return text


def _not_read(operand: Operand) -> InternalError:
    return InternalError(
        f"a GEMM's epilogue has no load for `{operand.name}`",
        found=f"{operand.access}",
        help="this is a fault of coda, not of the block: please report it",
    )


def _mentions(lines: Lines, name: str) -> bool:
    words = " ".join(lines.lines).replace("(", " ").replace(")", " ").replace(",", " ").split()
    return name in words
