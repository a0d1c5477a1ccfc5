"""Writes docs/model.md: constants, errors, the examples beside cuBLAS, and which decisions flip.

`python benchmarks/model_page.py` takes ten minutes, eight of them for `held_out`, and needs no GPU.
`python benchmarks/model_page.py examples slower` writes these tables alone. The page's head and
what is between its tables is written by hand; a table stands between `<!-- name -->` and
`<!-- end -->`.
"""

import itertools
import re
import runpy
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import model
import stages

import coda
from coda.kernels.gemm.configs import case_of, choice, deepened, ranked
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.stages import need
from coda.kernels.gemm.time import time_of
from coda.lowering import compiler
from coda.lowering.explain import Explanation
from coda.lowering.program import cublas
from coda.lowering.program.cost import hbm_bytes
from coda.lowering.program.target import Config, find_target
from coda.lowering.program.text import show_config

PAGE = Path(__file__).parents[1] / "docs/model.md"
GPUS = ("H100 SXM", "H200", "B200")
ROWS = (8192, 2048)


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def percent(error):
    """An error with its sign."""
    return f"{error:+.1%}".replace("%", " %")


def constants():
    """The rates of each GPU."""
    names = {
        "tensor cores of an SM, TFLOP/s, 16 bits": lambda r: r.tensor_of(16) / 1e12,
        "the same, 8 bits": lambda r: r.tensor_of(8) / 1e12,
        "memory, TB/s": lambda r: r.bandwidth / 1e12,
        "feed of an SM, GB/s": lambda r: r.feed / 1e9,
        "start of a GEMM, µs": lambda r: r.start * 1e6,
        "start of another kernel, µs": lambda r: r.ramp * 1e6,
        "k-step from memory, µs": lambda r: r.latency * 1e6,
        "instructions of an SM, 10⁹ a second": lambda r: r.issue / 1e9,
        "special functions of an SM, 10⁹ a second": lambda r: r.special / 1e9,
    }
    targets = [find_target(g) for g in GPUS]
    rows = [[name, *(f"{f(t.rates):.4g}" for t in targets)] for name, f in names.items()]
    rows.append(["speed with two stages", *(f"{t.speed(2):.3g}" for t in targets)])
    return table(["constant", *GPUS], rows)


def summary(points):
    """Number, median and largest error, and how many are within 12 %."""
    errors = [abs(p.error()) for p in points]
    within = sum(e <= 0.12 for e in errors)
    middle = f"{statistics.median(errors):.1%}".replace("%", " %")
    return [len(errors), middle, f"{max(errors):.1%}".replace("%", " %"), f"{within}"]


def sets():
    """The errors on what was fitted, and on what was not."""
    fit, rest = model.fit_tiles(), model.tiles()
    rows = [
        ["8B layer, training", "fit", *summary(model.layer("8b"))],
        ["tiles, 8192×4096×4096 and 64×4096×4096", "fit", *summary(fit)],
        ["1B layer, training", "held out", *summary(model.layer("1b"))],
        ["tiles, other problems", "held out", *summary([p for p in rest if p not in fit])],
    ]
    return table(["points", "", "number", "median error", "largest", "within 12 %"], rows)


def tiles():
    """Each tile of quack's bare GEMM: error."""
    names = list(dict.fromkeys(p.name.split(" ", 1)[1] for p in model.tiles()))
    problems = dict.fromkeys(p.name.split(" ")[0] for p in model.tiles())
    found = {p.name: percent(p.error()) for p in model.tiles()}
    rows = [[problem, *(found[f"{problem} {n}"] for n in names)] for problem in problems]
    return table(["M×N×K", *(n.replace("x", "×") for n in names)], rows)


def layers():
    """Each GEMM of the Llama layers, and what its epilogue adds to the bare GEMM of cuBLAS."""
    rows = []
    for name in ("8b", "1b"):
        for p in model.layer(name):
            bare = bare_us(p.work.problem)
            now = p.modelled()
            cells = [name, p.name, "×".join(map(str, p.work.problem)), p.pipeline.ab]
            cells += [f"{p.us:.0f}", f"{now:.0f}", percent(p.error())]
            rows.append([*cells, f"{p.us - bare:.0f}", f"{now - bare:.0f}"])
    head = ["layer", "GEMM", "M×N×K", "A/B stages", "measured", "modelled", "error"]
    return table([*head, "adds, measured", "adds, modelled"], rows)


def bare_us(problem):
    """µs of cuBLAS on the H200, as it is frozen."""
    return cublas.cublas_seconds("H200", *problem) * 1e6


def published():
    """The frozen model of cuBLAS on published times."""
    rows = []
    for gpu in model.FROM:
        points = model.published(gpu)
        errors = model.errors(cublas.RATES[gpu], points)
        ranks = model.spearman(
            [p.us for p in points], [p.us * (1 + e) for p, e in zip(points, errors, strict=True)]
        )
        middle = f"{statistics.median(map(abs, errors)):.1%}".replace("%", " %")
        rows.append([gpu, len(points), 4, middle, f"{ranks:.2f}"])
    return table(["GPU", "shapes", "constants", "median error", "Spearman"], rows)


def held_out():
    """Each N and K, predicted by constants that were fitted on the others."""
    rows = []
    for gpu in model.FROM:
        every = []
        for (n, k), errors in model.held_out(gpu):
            every += errors
            rows.append([gpu, f"{n}×{k}", len(errors), *middle_and_most(errors)])
        rows.append([gpu, "all", len(every), *middle_and_most(every)])
    return table(["GPU", "N×K held out", "points", "median error", "largest"], rows)


def middle_and_most(errors):
    """The median and the largest error."""
    sizes = [abs(e) for e in errors]
    return [f"{x:.1%}".replace("%", " %") for x in (statistics.median(sizes), max(sizes))]


def attention():
    """Attention on an H100: two lengths are fitted, four held out."""
    rows = []
    for kernel, width in model.FAMILIES:
        errors = [b / a - 1 for _, a, b in model.attention(kernel, width)][1:-1]
        rows.append([kernel, width, len(errors), *middle_and_most(errors)])
    return table(["kernel", "width", "held out", "median error", "largest"], rows)


def rowwise():
    """Row-wise kernels on an H200."""
    rows = []
    for name, moved, again, us in model.ROWS:
        now = model.row_time(moved, again)
        cells = [name, f"{moved:.1f}", f"{again:.1f}", f"{us:.1f}", f"{now:.1f}"]
        rows.append([*cells, percent(now / us - 1)])
    return table(["kernel", "MB", "MB again", "measured", "modelled", "error"], rows)


def few_rows():
    """The GEMMs of a Llama-3-8B layer at few rows, with a CTA for each tile and with several."""
    rows, module = [], runpy.run_path(str(stages.ROOT / "examples/llama_layer.py"))
    for gpu in ("H200", "B200"):
        for count in (1, 16):
            program = module["layer"].lower(gpu, {**module["DIMS"], "M": count})
            saved = 0.0
            for kernel in gemms(program):
                offers = choice(program, kernel).offers
                alone = min((o for o in offers if o.config.split_k == 1), key=lambda o: o.seconds)
                saved += alone.seconds - offers[0].seconds
                cells = ["×".join(map(str, kernel.mainloop.problem(program.sizes)))]
                cells += [show_config(alone.config), f"{alone.seconds * 1e6:.1f}"]
                cells += [show_config(offers[0].config), f"{offers[0].seconds * 1e6:.1f}"]
                rows.append([gpu, *cells])
            whole = Explanation(program).seconds
            cells = [f"layer, M = {count}", "", f"{(whole + saved) * 1e6:.1f}", ""]
            rows.append([gpu, *cells, f"{whole * 1e6:.1f}"])
    return table(["GPU", "M×N×K", "a CTA for each tile", "µs", "chosen", "µs"], rows)


SHAPES = ((4096, 4096), (6144, 4096), (4096, 14336), (28672, 4096))


def swapped():
    """Bare GEMMs of 16 rows if the rows of B were those of the tile, and the 16 its columns."""
    rows, (m, block) = [], (16, bare())
    for gpu in ("H200", "B200"):
        for n, k in SHAPES:
            program = block.lower(gpu, {"M": m, "N": n, "K": k})
            kernel = next(gemms(program))
            offer, case = choice(program, kernel).offers[0], case_of(program, kernel)
            found = {}
            for high, parts in itertools.product((128, 256), (1, 2, 4)):
                config = Config(high, 16, (2, 1), split_k=parts)
                turned = replace(case.work, problem=(n, m, k))
                needed = need(case.demand, m, config, program.target)
                config, pipeline = deepened(needed, config, program.target)
                us = time_of(turned, config, pipeline, program.target).seconds * 1e6
                found.setdefault(parts > 1, []).append((us, show_config(tile_of(config))))
            cells = [show_config(tile_of(offer.config)), f"{offer.seconds * 1e6:.1f}"]
            for shared in (False, True):
                us, name = min(found[shared])
                cells += [name, f"{us:.1f}"]
            rows.append([gpu, f"{m}×{n}×{k}", *cells])
    head = ["GPU", "M×N×K", "chosen", "µs", "swapped", "µs", "swapped, shared tiles", "µs"]
    return table(head, rows)


def bare():
    """A block of one GEMM."""

    @coda.block
    def gemm(x: coda.Tensor["M K"], w: coda.Tensor["N K"]):
        return x @ w.T

    return gemm


def examples():
    """Each example beside cuBLAS with the rest fused: modelled µs, and the quotient."""
    rows = [row for name in stages.EXAMPLES for row in beside(name, name)]
    rows += beside("Llama-3.2-1B", "llama_layer", D=2048, F=8192, H=32, G=8, d=64)
    return table(["example", "part", "rows", *GPUS], rows)


def beside(shown, name, **sizes):
    """The rows of an example."""
    for count in ROWS:
        parts = {}
        for gpu in GPUS:
            for part, program in stages.programs(name, gpu, M=count, **sizes):
                parts.setdefault(part, []).append(Explanation(program))
        for part, found in parts.items():
            times = [(e.seconds, e.baseline) for e in found]
            cells = [f"{a * 1e6:.0f} / {b * 1e6:.0f} = {a / b:.2f}" for a, b in times]
            yield [shown, part, count, *cells]


def slower():
    """The kernels that are slower than cuBLAS and one more kernel."""
    rows = []
    for name in stages.EXAMPLES:
        for gpu in ("H200", "B200"):
            for part, program in stages.programs(name, gpu):
                found = Explanation(program)
                shown = {k["name"]: k for k in found.json()["kernels"]}
                for one in found.json()["slower"]:
                    us = shown[one["kernel"]]["modelled_us"]
                    cells = [gpu, name, f"{part} {one['kernel']}", f"{us:.0f}"]
                    rows.append([*cells, f"{one['us']:.0f}", one["why"]])
    return table(["GPU", "example", "kernel", "modelled", "slower by", "parts, µs"], rows)


def apart():
    """Programs some of whose GEMMs store their accumulators alone, and with all in epilogues."""
    rows = []
    for gpu in GPUS:
        for count in ROWS:
            chosen = [(n, *p) for n in stages.EXAMPLES for p in stages.programs(n, gpu, M=count)]
            with mock.patch.object(compiler, "separate", lambda best, *_: best):
                fused = [p for n in stages.EXAMPLES for _, p in stages.programs(n, gpu, M=count)]
            pairs = [(f"{n} {part}", p, q) for (n, part, p), q in zip(chosen, fused, strict=True)]
            moved = [(n, p, q) for n, p, q in pairs if parted(p) != parted(q)]
            for name, program, other in moved:
                times = [f"{Explanation(p).seconds * 1e6:.0f}" for p in (other, program)]
                moved_by = [f"{hbm_bytes(p) / 1e6:.0f}" for p in (other, program)]
                kernels = [len(p.kernels) for p in (other, program)]
                rows.append([gpu, count, name, *times, *moved_by, *kernels])
            rows.append([gpu, count, f"{len(moved)} of {len(pairs)}", *[""] * 6])
    head = ["GPU", "rows", "Program", "fused, µs", "chosen", "fused, MB", "chosen"]
    return table([*head, "fused, launches", "chosen"], rows)


FIELDS = ("tensor", "bandwidth", "feed", "start", "latency", "issue", "special")


def moved(target, field, factor):
    """A GPU one of whose constants is another."""
    rates = target.rates
    if field == "two stages":
        return replace(target, pipeline=((2, target.speed(2) * factor), *target.pipeline[1:]))
    if field == "tensor":
        value = tuple((bits, rate * factor) for bits, rate in rates.tensor)
        return replace(target, rates=replace(rates, tensor=value))
    return replace(target, rates=replace(rates, **{field: getattr(rates, field) * factor}))


def flips():
    """How many GEMMs of the examples have another tile if a constant moves by 10 %."""
    rows = []
    for gpu in ("H200", "B200"):
        found = [p for n in stages.EXAMPLES for _, p in stages.programs(n, gpu)]
        pairs = [(p, k) for p in found for k in gemms(p)]
        for field in (*FIELDS, "two stages"):
            counts = []
            for factor in (0.9, 1.1):
                target = moved(find_target(gpu), field, factor)
                tiles = [(k, ranked(replace(p, target=target), k)[0]) for p, k in pairs]
                other = [(k, c) for k, c in tiles if tile(c) != tile(k.config)]
                counts.append(len(other))
            rows.append([gpu, field, *counts, len(pairs)])
    return table(["GPU", "constant", "-10 %", "+10 %", "of GEMMs"], rows)


def choices():
    """How many Programs of the examples have other kernels if a constant moves by 10 %."""
    rows = []
    for gpu in ("H200", "B200"):
        found = [p for n in stages.EXAMPLES for _, p in stages.programs(n, gpu)]
        for field in (*FIELDS, "two stages"):
            counts = []
            for factor in (0.9, 1.1):
                target = moved(find_target(gpu), field, factor)
                counts.append(sum(parted(again(p, target)) != parted(p) for p in found))
            rows.append([gpu, field, *counts, len(found)])
    return table(["GPU", "constant", "-10 %", "+10 %", "of Programs"], rows)


def again(program, target):
    """A Program lowered for another GPU."""
    options = {"frozen": program.frozen, "policy": program.policy}
    return compiler.lower(program.graph, program.sizes, target, **options)


def parted(program):
    """The nodes of each kernel, as text: laws and partition of a Program, without its tiles."""
    return [program.normal.name, str(program.normal)] + [str(k.nodes) for k in program.kernels]


def tile_of(config):
    """A config without the depths of its pipelines."""
    return replace(config, loads=0, stores=0)


def tile(config):
    """A config without the depths of its pipelines, in words."""
    return show_config(tile_of(config))


QUICK = (constants, sets, tiles, layers, published, attention, rowwise, few_rows)
SLOW = (held_out, swapped, examples, slower, apart, flips, choices)


def renewed(text, writers):
    """The page with some of its tables written anew."""
    for write in writers:
        name = write.__name__
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        new = write()
        text, count = re.subn(
            pattern, lambda m, new=new: f"{m[1]}\n{new}\n{m[2]}", text, flags=re.S
        )
        assert count == 1, name
    return text


if __name__ == "__main__":
    chosen = [w for w in (*QUICK, *SLOW) if not sys.argv[1:] or w.__name__ in sys.argv[1:]]
    PAGE.write_text(renewed(PAGE.read_text(), chosen))
