"""Statistics of a row -> lines of source: a thread's own values, then the lanes, then the warps.

A thread reduces the values of its vectors to a state. The lanes of a warp merge their states by
shuffles, and the warps of a row through shared memory: each writes its state, and after a barrier
every warp merges them all, in the same order, so that all threads have the same value.

    s0_s = s0_s + square(x)              each value
    s0_s = over_lanes(s0_s, sum_merge)   each warp
    keep(s0_of, warp, s0_s)              lane 0, then a barrier
    s0 = over_lanes(kept(s0_of, lane % 2), sum_merge, 2)
"""

from __future__ import annotations

from collections.abc import Sequence

from coda.ir.monoids import MONOIDS
from coda.kernels.lines import parts_of, safe
from coda.kernels.rowwise.pieces import Piece
from coda.kernels.rowwise.plan import first_part, has_planes, levels_of
from coda.kernels.rowwise.sweeps import Sweeps, VectorWork, indented
from coda.lowering.program.epilogue import Expr, Literal, Statistic


class Statistics(Sweeps):
    """The source of statistics over the elements of a row."""

    def early(self) -> list[list[Statistic]]:
        """The levels of statistics that have sweeps of their own."""
        levels, late = levels_of(self.epilogue)
        return [*levels, late] if late and not self.late() else levels

    def late(self) -> list[Statistic]:
        """The statistics that are computed in the sweep that stores.

        Where columns are computed apart from statistics there are none.
        """
        apart = self.epilogue.sinks and not self.plan.summed
        return [] if apart else levels_of(self.epilogue)[1]

    def length(self, stat: Statistic) -> str:
        """The text of the number of row values that a statistic reduces."""
        return f"Float32({safe(stat.operand or '')}.shape[1])"

    def merge(self, stat: Statistic) -> str:
        """The function that merges two states of a statistic, imported."""
        merge = MONOIDS[stat.monoid].warp.merge
        self.rows.add(merge)
        return merge

    def start(self, stat: Statistic) -> str:
        """The line that begins a statistic's state."""
        warp = MONOIDS[stat.monoid].warp
        self.rows |= {*warp.start}
        start = ", ".join(f"{s}()" for s in warp.start)
        return f"{stat.name}_s = {f'({start})' if len(warp.start) > 1 else start}"

    def step(self, stat: Statistic, value: str, state: str = "") -> str:
        """The line that adds a value to a statistic's state: several, if it has planes.

        Of a fold of pairs, `value` is two texts, of scores and of values.
        """
        state, step = state or f"{stat.name}_s", MONOIDS[stat.monoid].warp.step
        if not step.isidentifier():
            return f"{state} = {state} {step} {value}"
        (self.rows if has_planes(stat) else self.math).add(step)
        return f"{state} = {step}({state}, {value})"

    def finish(self, stat: Statistic, state: str) -> list[str]:
        """Lines that compute a statistic's value from the state of the row."""
        name, monoid = stat.name, MONOIDS[stat.monoid]
        if monoid.counted:
            share = f"* {1.0 / stat.width!r}" if stat.width else f"/ {name}_n"
            names = ", ".join(f"{name}_{p}" for p in ("n", *monoid.planes))
            return [f"{names} = {state}", f"{name} = {name}_{monoid.planes[-1]} {share}"]
        value = state
        if monoid.warp.finish:
            self.rows.add(monoid.warp.finish)
            value = f"{monoid.warp.finish}({state})"
        if monoid.of_pairs:
            return [f"{name}_{monoid.also}, {name} = {value}"]
        if monoid.average_of:
            value += f" * {1.0 / stat.width!r}" if stat.width else f" / {self.length(stat)}"
        return [f"{name} = {value}"]

    def over_lanes(self, stat: Statistic) -> str:
        """The text of a statistic's state, merged over the lanes of a warp."""
        self.rows.add("over_lanes")
        return f"over_lanes({stat.name}_s, {self.merge(stat)})"

    def own(self, level: Sequence[Statistic]) -> list[Statistic]:
        """The statistics of a level that are reduced; a mean is a plane of a variance beside it."""
        return [s for s in level if not self.variance(s, level)]

    def variance(self, stat: Statistic, level: Sequence[Statistic]) -> str:
        """The statistic of a level of which this one is a plane; "" for none."""
        pairs = {(first_part(s), MONOIDS[s.monoid].also): s.name for s in level}
        return pairs.get((stat.expr, stat.monoid), "")

    def ends(self, level: Sequence[Statistic]) -> list[str]:
        """Lines that merge the threads' states of a level."""
        own, warps = self.own(level), self.plan.warps
        planes = [s for s in level if s not in own]
        means = [f"{s.name} = {self.variance(s, level)}_{s.monoid}" for s in planes]
        if warps == 1:
            found = [line for s in own for line in self.finish(s, self.over_lanes(s))]
            return [*found, *means]
        self.rows |= {"keep", "kept"}
        out = [f"{s.name}_s = {self.over_lanes(s)}" for s in own]
        at = "warp" if self.plan.rows == self.plan.block else f"slot * {warps} + warp"
        out += ["if lane == 0:", *indented([f"keep({s.name}_of, {at}, {s.name}_s)" for s in own])]
        out.append(self.barrier())
        for s in own:
            other = at.replace("warp", f"lane % {warps}")
            state = f"over_lanes(kept({s.name}_of, {other}), {self.merge(s)}, {warps})"
            out += self.finish(s, state)
        return [*out, *means]

    def barrier(self) -> str:
        """The line at which the threads of a row wait for each other."""
        if self.plan.rows == 1:
            return "cute.arch.sync_threads()"
        threads = self.plan.threads
        return f"cute.arch.barrier(barrier_id=side + 1, number_of_threads={threads})"

    def shared_states(self) -> list[str]:
        """Lines that allocate the states of warps in shared memory.

        Rows that a CTA has in turn have two slots, so that a warp which is a row ahead overwrites
        nothing that another one still reads.
        """
        if self.plan.warps == 1:
            return []
        slots = 1 if self.plan.rows == self.plan.block else 2 * self.plan.rows
        out: list[str] = []
        for level in (*self.early(), self.late()):
            for s in self.own(level):
                self.rows.add("rooms")
                planes = len(MONOIDS[s.monoid].warp.start)
                out.append(f"{s.name}_of = rooms({planes}, {slots * self.plan.warps})")
        return out

    def sweep(self, level: list[Statistic]) -> list[str]:
        """One sweep over the row for the statistics of a level."""
        out = [self.start(s) for s in self.own(level)]
        for piece in self.pieces:
            if self.chosen(level, piece):
                out += self.loop(piece, lambda count, p=piece: self.reduced(level, p, count))
        return [*out, *self.ends(level)]

    def chosen(self, level: Sequence[Statistic], piece: Piece) -> list[Statistic]:
        """The statistics of a level that a piece adds to: sums are often 0 there."""
        found: list[Statistic] = []
        for s in self.own(level):
            zero = s.expr is not None and piece.special(s.expr) == Literal(0.0)
            if not (MONOIDS[s.monoid].sums and zero):
                found.append(s)
        return found

    def reduced(self, level: Sequence[Statistic], piece: Piece, count: int) -> VectorWork:
        """The work that adds the values of a batch to the states of a level."""
        chosen = self.chosen(level, piece)
        exprs = self.reduced_in(chosen, piece)
        work = VectorWork(exprs, [])
        work.inner, values = self.assigned(exprs, "a")
        self.take(chosen, values, work, count)
        return work

    def reduced_in(self, chosen: Sequence[Statistic], piece: Piece) -> list[Expr]:
        """The expressions that statistics reduce in a piece: one of each, or two of pairs."""
        exprs = [piece.special(s.expr) for s in chosen if s.expr is not None]
        return [part for expr in exprs for part in parts_of(expr)]

    def take(
        self, stats: Sequence[Statistic], values: Sequence[str], work: VectorWork, count: int
    ) -> None:
        """Append lines that add the values of a batch to the states of statistics."""
        rest = list(values)
        for stat in stats:
            name, value = f"{stat.name}_b{self.tag}", rest.pop(0)
            if has_planes(stat):
                self.rows.add("vector")
                at = f"k * {self.vec} + " if count > 1 else ""
                registers = {name: value}
                if MONOIDS[stat.monoid].of_pairs:
                    registers[f"{stat.name}_v{self.tag}"] = rest.pop(0)
                for one, text in registers.items():
                    work.before.append(f"{one} = vector({count * self.vec})")
                    work.inner.append(self.assign(one, text, start=at))
                work.last.append(self.step(stat, ", ".join(registers)))
            elif self.each == 1:
                work.inner.append(self.step(stat, value))
            else:
                self.rows |= {"both", "into"}
                (start,) = MONOIDS[stat.monoid].warp.start
                work.before.append(f"{name} = both({start}())")
                work.inner.append(self.step(stat, value, name))
                merged = f"into({stat.name}_s, {name}, {self.merge(stat)})"
                work.last.append(f"{stat.name}_s = {merged}")
