"""A graph prints as text and parses back to the same nodes; it then means the same."""

import runpy
from pathlib import Path

import pytest
from hypothesis import given

import coda
from coda.block import Block
from coda.errors import InternalError
from coda.ir.dims import Dim
from coda.ir.graph import Cast, Const, Graph, Input, Map, Permute, Pick, Size
from coda.ir.text import parse, show
from coda.ir.types import bf16, f32, i64
from coda.ir.verify import verify
from tests.lowering.test_random_blocks import SETTINGS, blocks

ROOT = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(p for p in ROOT.glob("*.py") if p.stem != "demo")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_round_trip(path):
    found = [v for v in runpy.run_path(str(path), run_name="x").values() if isinstance(v, Block)]
    for block in found:
        again = parse(show(block.graph))
        assert again == block.graph
        assert all(a is b for a, b in zip(again.roots, block.graph.roots, strict=True))


@SETTINGS
@given(blocks())
def test_random_blocks_round_trip(graph):
    assert parse(show(graph)) == graph


def test_every_kind_of_node_and_number(golden):
    x = Input("x", (Dim.of("M"), Dim.of("D") // 2 + 3), bf16)
    index = Input("i", (Dim.of("M"),), i64)
    parts = [Const(v, f32) for v in (1e-5, -3.0, float("inf"), float("-inf"), 1e300)]
    total = Cast(Permute(x, (1, 0)), f32)
    for part in [*parts, Size(Dim.of("D") * 2 - 1, f32)]:
        total = Map("where", (Map("lt", (total, part)), total, part))
    graph = Graph("numbers", (x, index), (("y", total), ("p", Pick(x, index))))
    text = show(graph)
    golden("numbers.coda", text)
    assert parse(text) == graph


def test_a_block_written_as_text():
    block = coda.parse("block twice(%x: [M] f32) {\n  %y = add %x, %x  # sum\n  return out = %y\n}")
    assert block.fn is None
    assert str(block.graph).startswith("block twice(%x: [M] f32)")


def test_the_verifier_finds_a_stranger():
    x, y = (Input(n, (Dim.of("M"),), f32) for n in "xy")
    graph = Graph("f", (x,), (("out", Map("add", (x, y))),))
    with pytest.raises(InternalError, match="`y` is not an argument"):
        verify(graph, "test")


def test_the_verifier_finds_a_forged_shape():
    x = Input("x", (Dim.of("M"),), f32)
    node = Map("exp", (x,))
    object.__setattr__(node, "shape", (Dim.of("N"),))
    try:
        with pytest.raises(InternalError, match="do not follow"):
            verify(Graph("f", (x,), (("out", node),)), "test")
    finally:
        object.__setattr__(node, "shape", (Dim.of("M"),))
