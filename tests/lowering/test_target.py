"""Targets: which row is chosen, that each figure has a source, and the page that lists them."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

import coda
from coda.errors import ArchError
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.space import space
from coda.lowering.compiler import lower
from coda.lowering.program.target import ARCHS, TARGETS, find_target, of_device
from coda.lowering.program.text import program_source

PAGE = Path(__file__).parents[2] / "docs/targets.md"
SAID = (
    "name",
    "arch",
    "capability",
    "cta_pairs",
    "tensor_memory",
    "launch_control",
    "packed_arithmetic",
    "sources",
)  # no figures


@coda.block
def mlp(x: coda.Tensor["M D"], w: coda.Tensor["F D"], v: coda.Tensor["D F"]):
    return coda.silu(x @ w.T) @ v.T


def page():
    """The table of figures, and the list of their sources."""
    columns = "| GPU | arch | multiprocessors | shared memory, bytes | registers | L2, bytes "
    columns += "| TFLOP/s, 16 bits | 8 bits | TB/s | launch, µs |\n"
    out = [columns + "|---" * 10 + "|\n"]
    for t in TARGETS:
        cells = [t.name, t.arch, t.multiprocessors, t.shared_memory, t.registers, t.l2]
        cells += [f"{flops / 1e12:.0f}" for _, flops in t.peaks]
        cells += [f"{t.bandwidth / 1e12:g}", f"{t.launch * 1e6:g}"]
        out.append("".join(f"| {c} " for c in cells) + "|\n")
    out.append("\nTiles of a GEMM, with their clusters:\n\n| arch | tiles |\n|---|---|\n")
    for arch in ARCHS:
        tiles: dict[str, list[str]] = {}
        for c in space(find_target(arch)):
            tile = f"{c.tile_m}×{c.tile_n}{' ping-pong' if c.pingpong else ''}"
            tile += f" split-K {c.split_k}" if c.split_k > 1 else ""
            tiles.setdefault(tile, []).append("{}×{}".format(*c.cluster))
        shown = [f"{tile} ({', '.join(clusters)})" for tile, clusters in tiles.items()]
        out.append(f"| {arch} | {'; '.join(shown)} |\n")
    out.append("\nSpeed of a mainloop by its stages of A and B, as a fraction of its best:\n\n")
    out.append("| GPU | stages: speed |\n|---|---|\n")
    for t in TARGETS:
        speeds = ", ".join(f"{n}: {speed:g}" for n, speed in t.pipeline)
        out.append(f"| {t.name} | {speeds} |\n")
    out.append("\n## Sources\n\n| GPU | figure | from |\n|---|---|---|\n")
    out += [f"| {t.name} | {figure} | {text} |\n" for t in TARGETS for figure, text in t.sources]
    return "".join(out)


def test_the_page_of_the_targets(request):
    head = PAGE.read_text().partition("| GPU | arch")[0]
    if request.config.getoption("--update-golden"):
        PAGE.write_text(head + page())
    assert PAGE.read_text() == head + page()


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_figure_has_a_source(target):
    figures = [f.name for f in fields(target) if f.name not in SAID]
    assert [name for name, source in target.sources if source] == figures


def test_an_arch_stands_for_its_first_row():
    assert [find_target(a).name for a in ARCHS] == ["H100 SXM", "B200", "B300"]
    assert find_target("H200").arch == "sm_90a"
    with pytest.raises(ArchError, match="sm_80"):
        find_target("sm_80")


@pytest.mark.parametrize(
    ("name", "capability", "count", "row"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "H100 SXM"),
        ("NVIDIA H100 PCIe", (9, 0), 114, "H100 SXM"),
        ("NVIDIA H200", (9, 0), 132, "H200"),
        ("NVIDIA H200 MIG 1g.18gb", (9, 0), 16, "H200"),
        ("NVIDIA GH200 480GB", (9, 0), 132, "H100 SXM"),  # a row of its arch
        ("NVIDIA B200", (10, 0), 148, "B200"),
        ("NVIDIA B300 SXM6 AC", (10, 3), 148, "B300"),
    ],
)
def test_a_gpu_is_known_by_what_it_says(name, capability, count, row):
    found = of_device(name, capability, count)
    assert (found.name, found.multiprocessors) == (row, count)
    assert replace(found, multiprocessors=find_target(row).multiprocessors) == find_target(row)


def test_other_gpus_are_none():
    assert of_device("NVIDIA A100-SXM4-80GB", (8, 0), 108) is None
    assert of_device("NVIDIA GeForce RTX 5090", (12, 0), 170) is None


def test_programs_are_lowered_and_costed_for_their_target():
    sizes = {"M": 4096, "D": 1024, "F": 4096}
    h100, h200, b300 = (mlp.lower(name, sizes) for name in ("sm_90a", "H200", "B300"))
    assert h200.target is find_target("H200")
    assert program_source(h100) == program_source(h200)
    (slow, fast) = (mlp.explain(a, **sizes).json()["kernels"] for a in ("sm_90a", "H200"))
    assert all(s["modelled_us"] >= f["modelled_us"] for s, f in zip(slow, fast, strict=True))
    assert b300.arch == "sm_103a"
    assert program_source(b300) == mlp.source("sm_100a", **sizes)  # the same capabilities
    assert "on sm_103a (times modelled for B300)" in str(mlp.explain("B300", **sizes))


def test_a_part_of_a_gpu_takes_smaller_tiles():
    """What tiles are ranked by is the number of multiprocessors that are there."""
    whole = find_target("sm_90a")
    part = replace(whole, multiprocessors=16)
    sizes = {"M": 512, "D": 512, "F": 1024}
    tiles = [next(gemms(lower(mlp.graph, sizes, t))).config for t in (whole, part)]
    assert tiles[0].tile_m * tiles[0].tile_n < tiles[1].tile_m * tiles[1].tile_n
