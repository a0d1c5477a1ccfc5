"""A choice of laws is not placed if a bound says that it costs more than the best Program."""

import runpy
from pathlib import Path

import pytest

import coda
from coda.ir.text import parse
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.program.bound import least_price
from coda.lowering.program.price import CALLS, HELD, Price, price
from coda.lowering.program.target import find_target
from coda.lowering.program.time import Time
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
        least, found = bound_of(program), price(program)
        assert 0.5 * found.seconds < least.seconds <= found.seconds
        assert 0.5 * found.moved < least.moved <= found.moved
        assert 0 < least.launches <= found.launches


def test_no_random_block_costs_less_than_its_bound():
    author = runpy.run_path(str(ROOT / "benchmarks" / "random_blocks.py"))
    for seed in range(12):
        space = {}
        exec(compile(author["random_source"](seed), f"<{seed}>", "exec"), space)
        for program in programs(space[f"random_{seed:03d}"].graph, {"M": 37, "D": 64, "E": 96})[0]:
            least, found = bound_of(program), price(program)
            assert least.seconds <= found.seconds
            assert least.moved <= found.moved
            assert least.launches <= found.launches


def test_gains_are_not_folded_into_copies_of_weights_that_cost_too_much():
    """At real sizes the gain of a Llama layer's gate and up is not tried, which would copy them.

    If weights keep their values, each choice is placed.
    """
    module = runpy.run_path(str(ROOT / "examples" / "llama_layer.py"))
    graph, sizes = module["layer"].graph, module["DIMS"]
    placed, undercut = programs(graph, sizes)
    assert (len(placed), undercut) == (2, 1)
    assert not any(s.law.choice for s in lower(graph, sizes).steps)
    placed, undercut = programs(graph, sizes, frozen=True)
    assert (len(placed), undercut) == (3, 0)


def test_what_is_counted():
    """x (g · w)ᵀ: reads x and g · w, writes y, prepacks g · w from g and w; one launch."""

    @coda.block
    def block(x: T["M K"], g: T["K"], w: T["N K"]):
        return x @ (g * w).T

    m, n, k = 8, 16, 32
    moved = 2 * (m * k + n * k + m * n)
    copied, held = 2 * (k + n * k + n * k), HELD * 2 * n * k
    sizes, rates = {"M": m, "N": n, "K": k}, H100.rates
    for frozen, total, launch in (
        (True, moved, rates.ramp),
        (False, moved + copied / CALLS + held, (1 + 1 / CALLS) * rates.ramp),
    ):
        found = least_price(block.graph, sizes, H100, frozen=frozen)
        assert found.seconds == pytest.approx(total / rates.bandwidth + launch)
        assert (found.moved, found.launches) == (int(total), 1)


def test_a_contraction_takes_the_time_of_its_flops():
    @coda.block
    def block(x: T["M K"], w: T["N K"]):
        return x @ w.T

    found = least_price(block.graph, {"M": 4096, "N": 4096, "K": 4096}, H100, frozen=True)
    rate = H100.rates.tensor_of(16) * H100.multiprocessors
    assert found.seconds == pytest.approx(2 * 4096**3 / rate + H100.rates.ramp)


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
    assert least_price(graph, {"M": 8}, H100, frozen=False) == Price(Time(0.0), 0, 0)
    (program,), _ = programs(graph, {"M": 8})
    assert price(program).seconds > 0
