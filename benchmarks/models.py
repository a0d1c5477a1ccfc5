"""Models of transformers under backend coda: `python benchmarks/models.py [--write] [NAME ...]`.

Random weights at tiny sizes, in bf16, on the reference backend: graph breaks, operators in blocks
and left to torch, launches and bytes of one layer (forward and backward, from the difference of
models of two and three layers), and errors against float64 beside torch's own. `--write` puts the
table into docs/models.md.
"""

import sys
from importlib import import_module
from pathlib import Path

import torch
import torch._dynamo
from torch._dynamo.utils import counters

import coda
from coda.integrations.dynamo import backend
from coda.integrations.report import forget_report
from coda.lowering.program.cost import hbm_bytes, launch_count

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
zoo = import_module("tests.integrations.zoo")

HEAD = (
    "model | graph breaks | ops in blocks | left to torch | launches a layer: coda | between GEMMs "
    "fused | op by op | kB a layer: coda | between GEMMs fused | op by op | logits: torch | coda | "
    "gradients: torch | coda"
)
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"


def counted(name, layers):
    """Launches and bytes of a training step's regions: coda's, the pointwise-fused, torch's."""
    torch._dynamo.reset()
    forget_report()
    counters.clear()
    model = zoo.build(name, layers).to(torch.bfloat16)
    zoo.step(
        model, torch.compile(model, backend=backend), zoo.arguments(name, torch.bfloat16, 4, 64)
    )
    report = coda.last_report()
    total = [0] * 6
    for region in (r for g in report.graphs for r in g.regions):
        for side in filter(None, (region.forward, region.backward)):
            program = side.program
            for i, other in enumerate((None, side.pointwise, side.eager)):
                total[i] += launch_count(program) if other is None else other.launches
                total[3 + i] += hbm_bytes(program) if other is None else other.hbm_bytes
    breaks = sum(counters["graph_break"].values())
    return total, report.fused, sum(report.left.values()), breaks


def row(name):
    """One line of the table."""
    two, three = counted(name, 2), counted(name, 3)
    layer = [b - a for a, b in zip(two[0], three[0], strict=True)]
    torch._dynamo.reset()
    plain, ours, exact = (zoo.build(name) for _ in range(3))
    plain, ours, exact = plain.bfloat16(), ours.bfloat16(), exact.double()
    exact.load_state_dict({k: v.double() for k, v in plain.state_dict().items()})
    _, y, g = zoo.step(exact, exact, zoo.arguments(name, torch.float64))
    _, y1, g1 = zoo.step(plain, plain, zoo.arguments(name, torch.bfloat16))
    compiled = torch.compile(ours, backend=backend)
    _, y2, g2 = zoo.step(ours, compiled, zoo.arguments(name, torch.bfloat16))
    errors = [zoo.distance(y1, y), zoo.distance(y2, y), zoo.overall(g1, g), zoo.overall(g2, g)]
    numbers = [two[3], two[1], two[2], *layer[:3], *(f"{b / 1e3:.0f}" for b in layer[3:])]
    return " | ".join([name, *map(str, numbers), *(f"{e:.1e}" for e in errors)])


def main():
    torch.set_num_threads(1)
    names = [a for a in sys.argv[1:] if a != "--write"] or list(zoo.FAMILIES)
    lines = [HEAD, " | ".join(["---"] + ["--:"] * HEAD.count("|"))]
    for name in names:
        lines.append(row(name))
        print(lines[-1], flush=True)
    if "--write" in sys.argv:
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        table = "".join(f"| {one} |\n" for one in lines)
        PAGE.write_text(before + BEGIN + table + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
