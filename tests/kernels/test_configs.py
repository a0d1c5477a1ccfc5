"""Configs of GEMMs: which are legal and why not, which is chosen, and that kernels are right."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

import coda
from coda.kernels.gemm import configs, quack_target
from coda.kernels.gemm.configs import USUAL, case_of, choice, legal, refused
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.space import space
from coda.lowering.algebra.policy import DEFAULT_POLICY
from coda.lowering.compiler import lower, request, run_stages
from coda.lowering.program.target import Config, find_target
from coda.lowering.program.text import show_config
from coda.lowering.stages import Stages
from coda.measure import random_inputs, relative
from coda.runtime.compile import base_of
from coda.runtime.reference import run_reference
from coda.runtime.simulate import device, run_simulated
from tests.kernels.forced import forced, with_configs

ARCHS = ("sm_90a", "sm_100a")
ROOT = Path(__file__).parents[2] / "examples"
T, f32 = coda.Tensor, coda.f32


@coda.block
def plain(x: T["M K"], w: T["N K"]):
    return x @ w.T


@coda.block
def boundary(x: T["M K"], w: T["N K"], r: T["M N"], g: T["N"], s: T["M 1", f32]):
    """A load, two stores, sums over columns and over rows, vectors of both kinds."""
    y = r + (x @ w.T) * s.cast(x.dtype)
    return {"y": y, "h": y * g, "ss": coda.sum(y * y), "db": coda.sum(y * r, axis=0)}


@coda.block
def gated(x: T["M K"], gate: T["N K"], up: T["N K"]):
    """Column pairs, of which both columns are stored and one value for each."""
    a, b = x @ gate.T, x @ up.T
    return a, b, coda.swiglu(a, b)


@coda.block
def heads(x: T["M K"], w: T["(H d) K"], g: T["d"]):
    """A statistic over groups of columns."""
    return coda.rms_norm((x @ w.T).reshape("M (H d) -> M H d"), g, eps=1e-6)


def program_of(block, arch, **sizes):
    program = lower(block.graph, sizes, arch)
    return program, next(gemms(program))


def fused(block, arch, **sizes):
    """As `program_of`, with each epilogue in its GEMM, whatever it costs."""
    asked = request(block.graph, sizes, arch, frozen=False, policy=DEFAULT_POLICY)
    with Stages() as record:
        record.begin(block.graph)
        program = run_stages(asked, lambda *_: False, record.trial())
    return program, next(gemms(program))


def shown(case):
    """The name of an arch or of a config in a test's name."""
    return (
        show_config(case).replace("×", "x").replace(" ", "_") if isinstance(case, Config) else case
    )


def tile(config):
    return config.tile_m, config.tile_n


@pytest.mark.parametrize("arch", ARCHS)
def test_the_space_has_each_config_once(arch):
    target = find_target(arch)
    every = space(target)
    assert len(set(every)) == len(every)
    assert set(USUAL[target.tensor_memory]) <= set(every)
    sizes = [c.tile_m * c.tile_n for c in every]
    assert sizes == sorted(sizes, reverse=True)
    assert any(c.pingpong for c in every) == (arch == "sm_90a")


def test_configs_are_refused_with_a_reason():
    program, kernel = program_of(heads, "sm_90a", M=8192, K=512, H=8, d=128)
    assert "group of 128 columns" in legal(program, kernel, Config(128, 192, (2, 1), pingpong=True))
    assert legal(program, kernel, Config(192, 128, (2, 1), pingpong=True)) == ""
    program, kernel = fused(gated, "sm_90a", M=8192, K=512, N=416)
    assert "32 columns" in legal(program, kernel, Config(256, 208, (2, 1)))
    assert "block of 832 columns" in legal(program, kernel, Config(128, 128, (2, 1)))
    program, kernel = program_of(boundary, "sm_90a", M=8192, K=512, N=1024)
    assert "registers" in legal(program, kernel, Config(128, 192, (2, 1), pingpong=True))
    assert legal(program, kernel, Config(128, 256, (2, 1), loads=2, stores=2)) == ""


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_without_a_legal_config_has_the_smallest_usual_one(arch, monkeypatch):
    program, kernel = program_of(plain, arch, M=8192, K=512, N=1024)
    reason = configs.Refusal("groups", "no tile is right")
    monkeypatch.setattr(configs, "refused", lambda *_: reason)
    found = configs.choose.__wrapped__(case_of(program, kernel), program.target)
    assert [tile(o.config) for o in found.offers] == [(128, 64)]
    assert dict(found.dropped) == {"groups": len(space(program.target))}


def test_tensor_memory_has_one_accumulator_of_512_columns():
    program, kernel = program_of(plain, "sm_100a", M=8192, K=512, N=4096)
    offers = {replace(o.config, dynamic=False): o.pipeline for o in choice(program, kernel).offers}
    assert offers[Config(256, 512, (2, 1))].accumulator == 1
    assert offers[Config(256, 256, (2, 1))].accumulator == 2


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("features", [416, 320, 448])
def test_stored_pairs_are_in_blocks_that_tiles_divide(arch, features):
    """Columns 416 apart: tiles of 64 divide them, and those of 128 and 256 do not."""
    sizes = {"M": 8192, "K": 512, "N": features}
    program, kernel = fused(gated, arch, **sizes)
    half = kernel.config.tile_n // 2
    assert features % half == 0 or half % features == 0
    assert "blocks" in dict(choice(program, kernel).dropped)


def test_what_no_estimate_would_choose_is_counted():
    program, kernel = program_of(plain, "sm_90a", M=300, K=512, N=4000)
    found = choice(program, kernel)
    dropped = dict(found.dropped)
    assert dropped["padding"] > 0
    assert len(found.offers) + sum(dropped.values()) == len(space(program.target))
    assert str(found).startswith(f"best of {len(found.offers)} configs; dropped: ")
    assert str(found) in str(plain.explain("sm_90a", M=300, K=512, N=4000))
    assert all(o.pipeline.ab >= 3 for o in found.offers)


def test_another_config_is_taken_if_it_is_clearly_faster():
    """1600 columns are ten tiles of 160 and 6.25 of 256."""
    _, narrow = program_of(plain, "sm_90a", M=8192, K=1600, N=1600)
    assert tile(narrow.config) == (128, 160)
    assert narrow.config.pingpong
    program, wide = program_of(plain, "sm_90a", M=8192, K=4096, N=4096)
    assert wide.config == Config(128, 256, (2, 1))
    best = min(o.seconds for o in choice(program, wide).offers)
    assert choice(program, wide).offers[0].seconds <= best / 0.9


def test_several_waves_take_tiles_from_a_queue():
    """Cluster launch control, where there is one; a single wave has nothing to take."""
    for m, arch, dynamic in (
        (8192, "sm_100a", True),
        (128, "sm_100a", False),
        (8192, "H200", False),
    ):
        _, kernel = program_of(plain, arch, M=m, K=4096, N=4096)
        assert kernel.config.dynamic == dynamic
        assert ("dynamic" in show_config(kernel.config)) == dynamic
    program, kernel = program_of(plain, "H200", M=8192, K=4096, N=4096)
    assert "launch control" in legal(program, kernel, replace(kernel.config, dynamic=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_few_rows_take_low_tiles_and_share_them(arch):
    """Of 16 rows and 4096 columns, tiles of one CTA each would leave half of the SMs idle."""
    program, kernel = program_of(plain, arch, M=16, K=4096, N=4096)
    assert kernel.config.tile_m == 128
    assert kernel.config.split_k > 1
    assert dict(choice(program, kernel).dropped)["height"] > 0
    _, many = program_of(plain, arch, M=8192, K=4096, N=4096)
    assert many.config.split_k == 1


def test_compiled_files_are_those_of_a_config():
    program, kernel = program_of(plain, "sm_90a", M=512, K=256, N=512)
    one, other = (Config(128, 128, (2, 1), pingpong=p) for p in (False, True))
    names = {base_of(program, replace(kernel, config=c)).name for c in (one, other)}
    assert len(names) == 2


def test_compiled_files_are_those_of_layouts_and_types():
    """The emitted text of a GEMM is its epilogue's: A and B may have any type and order."""

    @coda.block
    def transposed(x: T["M K"], w: T["K N"]):
        return x @ w

    def digest(block, **options):
        program = block.lower("sm_90a", {"M": 512, "K": 512, "N": 512}, **options)
        return base_of(program, program.kernels[0]).name.rpartition("-")[2]

    found = digest(plain), digest(transposed), digest(plain, dtype=coda.f16)
    assert len({*found}) == 3
    assert digest(plain) == found[0]


def test_compiled_files_are_those_of_the_sources_that_compile(monkeypatch):
    """An upgraded coda, whose ops make another kernel of the same text, finds no older file."""
    program, kernel = program_of(plain, "sm_90a", M=512, K=256, N=512)
    found = base_of(program, kernel)
    monkeypatch.setattr(quack_target, "sources_digest", lambda: "of other sources")
    assert base_of(program, kernel) != found


def worst(program, inputs):
    """The largest error of a result, beside that of torch's rounding. No finding of the checks."""
    exact, rounded = (run_reference(program, inputs, exact=e) for e in (True, False))
    with device(program.arch, checks="raise") as gpu:
        found = run_simulated(program, inputs, program.sizes)
        assert not gpu.report().findings
    errors = zip(found, rounded, exact, strict=True)
    return max(relative(o, t) / (1.05 * relative(r, t) + 1e-7) for o, r, t in errors)


# Tiles of every kind: cooperative and ping-pong, of one CTA and of two, with 16 to 512 columns.
KINDS = {
    "sm_90a": [
        Config(128, 160, (2, 1), pingpong=True),
        Config(192, 128, (1, 2), pingpong=True),
        Config(128, 208, (2, 1), pingpong=True),
        Config(256, 160, (2, 1)),
        Config(256, 192, (1, 2)),
        Config(128, 224, (2, 1)),
        Config(128, 64, split_k=2),
        Config(128, 256, (2, 1), split_k=4),
    ],
    "sm_100a": [
        Config(256, 224, (2, 1)),
        Config(256, 160, (2, 2)),
        Config(256, 512, (2, 1)),
        Config(128, 192, (1, 2)),
        Config(128, 64, (2, 1)),
        Config(128, 16, (1, 1)),
        Config(256, 128, (2, 1), dynamic=True),
        Config(128, 64, (1, 1), dynamic=True),
        Config(128, 64, split_k=4),
        Config(256, 128, (2, 1), split_k=2),
    ],
}
CASES = [(arch, config) for arch, configs in KINDS.items() for config in configs]
BLOCKS = {
    "boundary": (boundary, {"M": 300, "K": 256, "N": 328}),
    "gated": (gated, {"M": 300, "K": 256, "N": 224}),
    "heads": (heads, {"M": 300, "K": 256, "H": 5, "d": 64}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("arch", "config"), CASES, ids=shown)
def test_every_kind_of_config_is_right(name, arch, config):
    block, sizes = BLOCKS[name]
    program, kernel = program_of(block, arch, **sizes)
    reason = refused(case_of(program, kernel), config, program.target)
    if reason is None or reason.topic == "registers":
        program = with_configs(program, {kernel.name: config})
        assert worst(program, random_inputs(program.graph, program.sizes)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_a_layer_and_its_backward_are_right_in_new_tiles(arch):
    block = runpy.run_path(str(ROOT / "gpt2_layer.py"))["layer"]
    sizes = {"M": 200, "D": 128, "H": 2, "d": 64, "F": 192}
    floats = [i.name for i in block.graph.inputs if i.dtype.kind == "float"]
    sizes = {s: sizes[s] for s in block.graph.symbols}
    config = KINDS[arch][0]
    for program in block.lower_training(arch, sizes, wanted=floats):
        given = forced(program, config)
        assert any(tile(k.config) == tile(config) for k in gemms(given))
        assert worst(given, random_inputs(given.graph, given.sizes)) <= 1
