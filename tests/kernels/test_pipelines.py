"""Pipeline stages: what coda computes beforehand is what quack lays out when a kernel is traced."""

import itertools
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from coda.kernels.gemm.configs import case_of, refused
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.space import space
from coda.kernels.gemm.stages import Need, divide, stages
from coda.lowering.algebra.training import derive
from coda.lowering.compiler import lower
from coda.lowering.program.target import Config
from coda.measure import random_inputs, relative
from coda.runtime.dry_run import dry_run
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device, run_simulated
from tests.kernels.forced import forced, with_configs

ROOT = Path(__file__).parents[2] / "examples"
ARCHS = ("sm_90a", "sm_100a")
SMALL = {"M": 300, "D": 256, "F": 320, "H": 4, "G": 2, "d": 64, "V": 1000}
EXAMPLES = {
    "llama_mlp": ("llama_mlp", "mlp"),
    "llama_layer": ("llama_layer", "layer"),
    "qwen3_layer": ("qwen3_layer", "layer"),
    "gpt2_layer": ("gpt2_layer", "layer"),
    "starcoder2": ("gpt2_layer", "starcoder2_layer"),
    "neox_parallel": ("neox_parallel", "layer"),
    "gemma2_layer": ("gemma2_layer", "layer"),
    "unnamed_norm": ("unnamed_norm", "mlp"),
    "loss": ("lm_head_loss", "loss"),
    "logits_and_loss": ("lm_head_loss", "logits_and_loss"),
}
LARGE = {"sm_90a": (128, 256), "sm_100a": (256, 256)}


class Recorded(Exception):
    """The stages are known, and the rest of a trace is not needed."""


@pytest.fixture
def laid_out(monkeypatch):
    """(program, kernel, config) -> the stages that quack lays out for it."""
    from coda.kernels.gemm import staged

    found = []
    compute = staged.Staged._compute_stages

    def record(self, *args, **options):
        found.append(compute(self, *args, **options))
        raise Recorded

    # An attribute of its own makes each kernel new to quack, which would load a compiled one.
    turns, depths = itertools.count(), staged.depths
    monkeypatch.setattr(staged.Staged, "_compute_stages", record)
    monkeypatch.setattr(staged, "depths", lambda *own: (*depths(*own), ("turn", next(turns))))

    def of(program, kernel, config):
        found.clear()
        program = with_configs(program, {kernel.name: config})
        with pytest.raises(Recorded):
            dry_run(program, next(k for k in program.kernels if k.name == kernel.name))
        return found[-1]

    return of


def computed(program, kernel, config):
    """The same by coda, in quack's order."""
    found = stages(program, kernel, config)
    first = (found.accumulator,) if found.accumulator else ()
    return (*first, found.ab, found.d, found.c)


def programs(name, arch, sizes=None):
    """Inference, training forward and backward of an example."""
    file, block = EXAMPLES[name]
    block = runpy.run_path(str(ROOT / f"{file}.py"))[block]
    sizes = {s: (sizes or SMALL)[s] for s in block.graph.symbols}
    floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
    wanted = [n for n in floats if n not in ("cos", "sin")]
    return [block.lower(arch, sizes), *block.lower_training(arch, sizes, wanted=wanted)]


def compiled(program, kernel):
    """Every so many configs of the space that quack compiles for a kernel, whatever their speed."""
    case, target = case_of(program, kernel), program.target
    for config in space(target):
        refusal = refused(case, config, target)
        if refusal is None or refusal.topic == "registers":
            yield config


@pytest.mark.parametrize("arch", ARCHS)
def test_quack_lays_out_what_was_computed(arch, laid_out):
    """Of a layer that is trained: loads, tables, stores of halves, sums; another tile for each."""
    with device(arch):
        seen, turn = [], itertools.count(1)
        for program in programs("llama_layer", arch)[1:]:
            for kernel in gemms(program):
                if kernel.body.epilogue.operands:
                    every = list(compiled(program, kernel))
                    config = every[next(turn) * 7 % len(every)]
                    for one in (config, replace(config, loads=2, stores=1)):
                        assert laid_out(program, kernel, one) == computed(program, kernel, one)
                    seen.append(config)
    assert len(set(seen)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_quack_lays_out_what_was_computed_for_every_kernel(name, arch, laid_out):
    """Every kernel has an eighth of the space, another one than the kernel before it."""
    seen, turn = set(), itertools.count()
    with device(arch):
        for program in programs(name, arch):
            for kernel in gemms(program):
                for config in list(compiled(program, kernel))[next(turn) % 8 :: 8]:
                    expected = computed(program, kernel, config)
                    assert laid_out(program, kernel, config) == expected, (kernel.name, config)
                    seen.add(config)
    assert len(seen) > 5


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("depths", [None, (1, 1)], ids=str)
def test_a_backward_with_large_tiles_is_right_at_any_depth(arch, depths):
    """Of a Llama layer: two loaded matrices and up to three stored ones, sums over rows."""
    file, block = EXAMPLES["llama_layer"]
    block = runpy.run_path(str(ROOT / f"{file}.py"))[block]
    floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
    wanted = [n for n in floats if n not in ("cos", "sin")]
    sizes = {s: SMALL[s] for s in block.graph.symbols}
    training = derive(block.graph, sizes, wanted)
    program = lower(training.backward, sizes, arch, policy=training.policy())
    program = forced(program, Config(*LARGE[arch], (2, 1)))
    if depths is None:
        assert any(k.config.loads for k in gemms(program)) == (arch == "sm_90a")
    else:
        loads, stores = depths
        given = {k.name: replace(k.config, loads=loads, stores=stores) for k in gemms(program)}
        program = with_configs(program, given)
    inputs = random_inputs(program.graph, program.sizes)
    exact = run_reference(program, inputs, exact=True)
    rounded = run_reference(program, inputs)
    with device(arch, checks="raise") as gpu:
        found = run_simulated(program, inputs, program.sizes)
        assert not gpu.report().findings
    for one, other, true in zip(found, rounded, exact, strict=True):
        assert relative(one, true) <= 1.05 * relative(other, true) + 1e-7


def test_shared_memory_is_divided_in_the_order_of_the_library():
    """A/B get what whole stages fit beside the epilogue's, then loads, then stores."""
    need = Need(ab=49152, loads=16384, stores=8192, once=9728, subtiles=8, columns=32)

    def found(loads, stores, accumulators=0):
        one = divide(replace(need, accumulators=accumulators), (loads, stores), 232448)
        assert one.accumulator == accumulators
        return one.ab, one.d, one.c

    assert found(0, 0) == (2, 5, 5)
    assert found(2, 2) == (3, 3, 3)
    assert found(1, 1) == (4, 1, 1)
    assert found(0, 0, accumulators=2) == (3, 5, 2)
