"""A choice of laws is not placed if a bound says that it costs more than the best Program."""

import runpy
from pathlib import Path

import pytest

import coda
from coda.ir.text import parse
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.program.bound import least_price
from coda.lowering.program.cost import HELD, price
from coda.lowering.program.target import find_target
from coda.lowering.stages import Stages

ROOT = Path(__file__).parents[2]
T = coda.Tensor
H100 = find_target("sm_90a")


def bound_of(program):
    per_call = program.policy.per_call
    return least_price(
        program.normal, program.sizes, program.target, frozen=program.frozen, per_call=per_call
    )


def programs(graph, sizes, **options):
    """The Programs of all choices of laws that were placed, and the number that were not."""
    stages = Stages()
    lower(graph, {s: sizes[s] for s in graph.symbols}, stages=stages, **options)
    placed = [t.ran[-1].after for t in stages.trials if t.ran[-1].stage.name == "memory"]
    return placed, len(stages.trials) - len(placed)


@pytest.mark.parametrize("file", ["llama_layer", "gpt2_layer"])
def test_no_example_costs_less_than_its_bound(file):
    module = runpy.run_path(str(ROOT / "examples" / f"{file}.py"))
    graph, sizes = module["layer"].graph, module["DIMS"]
    training = derive(graph, {s: sizes[s] for s in graph.symbols})
    found = programs(graph, sizes)[0] + programs(graph, sizes, frozen=True)[0]
    found += programs(training.backward, sizes, policy=training.policy())[0]
    for program in found:
        assert 0.5 * price(program) < bound_of(program) <= price(program)


def test_no_random_block_costs_less_than_its_bound():
    author = runpy.run_path(str(ROOT / "benchmarks" / "random_blocks.py"))
    for seed in range(12):
        space = {}
        exec(compile(author["random_source"](seed), f"<{seed}>", "exec"), space)
        for program in programs(space[f"random_{seed:03d}"].graph, {"M": 37, "D": 64, "E": 96})[0]:
            assert bound_of(program) <= price(program)


def test_gains_are_not_folded_into_copies_of_weights_that_cost_too_much():
    """At real sizes a Llama layer is placed once; if weights keep their values, each choice is."""
    module = runpy.run_path(str(ROOT / "examples" / "llama_layer.py"))
    graph, sizes = module["layer"].graph, module["DIMS"]
    (program,), undercut = programs(graph, sizes)
    assert undercut == 2
    assert not any(s.law.choice for s in program.steps)
    placed, undercut = programs(graph, sizes, frozen=True)
    assert (len(placed), undercut) == (3, 0)


def test_what_is_counted():
    """x (g · w)ᵀ: reads x and g · w, writes y, prepacks g · w from g and w; one launch."""

    @coda.block
    def block(x: T["M K"], g: T["K"], w: T["N K"]):
        return x @ (g * w).T

    m, n, k = 8, 16, 32
    moved = 2 * (m * k + n * k + m * n)
    prepacked = 2 * (k + n * k + n * k + HELD * n * k)
    sizes = {"M": m, "N": n, "K": k}
    for frozen, total in ((True, moved), (False, moved + prepacked)):
        found = least_price(block.graph, sizes, H100, frozen=frozen)
        assert found == pytest.approx(total / H100.bandwidth + H100.launch)


def test_parts_that_a_slice_leaves_out_are_not_counted():
    """Only the columns of `y` are returned, so that no kernel has to compute the other product."""
    text = """
    block part(%x: [M, 32] bf16, %v: [64, 32] bf16, %w: [64, 32] bf16) {
      %1 = contract %x, %v bf16                         : [M, 64] bf16
      %2 = contract %x, %w bf16                         : [M, 64] bf16
      %3 = concat %1, %2 axis -1                        : [M, 128] bf16
      %4 = slice %3 axis -1 from 0 size 64 step 1       : [M, 64] bf16
      return out = %4
    }
    """
    graph = parse(text, "part")
    assert least_price(graph, {"M": 8}, H100, frozen=False) == 0
    (program,), _ = programs(graph, {"M": 8})
    assert price(program) > 0
