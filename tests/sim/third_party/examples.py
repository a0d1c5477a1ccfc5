"""CUTLASS's CuTe DSL examples, from a checkout that CODA_CUTLASS_DIR names: each checks itself."""

import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

HOPPER, BLACKWELL = "sm_90a", "sm_100a"


@dataclass(frozen=True)
class Example:
    """An example's file and the arguments of its `run`; names of types are resolved late."""

    name: str
    arch: str
    path: str
    arguments: dict[str, Any] = field(default_factory=dict)


def checkout() -> Path | None:
    """The examples of the checkout, if there is one."""
    root = os.environ.get("CODA_CUTLASS_DIR")
    path = Path(root) / "examples/python/CuTeDSL" if root else None
    return path if path is not None and path.is_dir() else None


@contextmanager
def loaded(example: Example) -> Iterator[ModuleType]:
    """An example as a module; its neighbours can be imported while it lives."""
    from cutlass.cute import testing

    root = checkout()
    assert root is not None
    path = root / "cute" / example.path
    name = "cutlass_example_" + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, benchmark = list(sys.path), testing.benchmark
    sys.path[:0] = [str(root), str(path.parent)]
    sys.modules[name] = module
    testing.benchmark = lambda *_, **__: 1.0  # it times CUDA graphs, after the comparison
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:], testing.benchmark = before, benchmark
        del sys.modules[name]


def run(example: Example) -> None:
    """Run an example and its own comparison with torch; raises AssertionError."""
    import cutlass
    from cutlass import utils

    words = {
        "f16": cutlass.Float16,
        "f32": cutlass.Float32,
        "smem": utils.TensorMapUpdateMode.SMEM,
    }
    arguments = {**COMMON, **example.arguments}
    found = {k: words.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()}
    with loaded(example) as module, redirect_stdout(io.StringIO()):
        module.run(**found)


COMMON = {
    "tolerance": 0.1,
    "warmup_iterations": 0,
    "iterations": 1,
    "skip_ref_check": False,
}
MAJORS = {"acc_dtype": "f32", "c_dtype": "f16", "a_major": "k", "b_major": "k", "c_major": "n"}
HOPPER_GEMM = {**MAJORS, "a_dtype": "f16", "b_dtype": "f16", "tile_shape_mn": (128, 128)}
BLACKWELL_GEMM = {**MAJORS, "ab_dtype": "f16"}
GROUPS = {
    "num_groups": 2,
    "problem_sizes_mnkl": [(128, 128, 64, 1), (256, 128, 192, 1)],
    "cluster_shape_mn": (1, 1),
    "tensormap_update_mode": "smem",
}
ATTENTION = {
    "q_shape": (1, 256, 2, 64),
    "k_shape": (1, 256, 2, 64),
    "out_dtype": "f16",
    "qk_acc_dtype": "f32",
    "pv_acc_dtype": "f32",
    "is_persistent": True,
    "is_causal": True,
    "bottom_right_align": False,
    "window_size": (-1, -1),
    "scale_q": 1.0,
    "scale_k": 1.0,
    "scale_v": 1.0,
    "inv_scale_o": 1.0,
    "scale_softmax": 0.0,
}

EXAMPLES = (
    Example(
        "dense GEMM",
        HOPPER,
        "hopper/kernel/dense_gemm/dense_gemm.py",
        {**HOPPER_GEMM, "mnkl": (256, 256, 320, 1), "cluster_shape_mn": (1, 1)},
    ),
    Example(
        "persistent dense GEMM",
        HOPPER,
        "hopper/kernel/dense_gemm/dense_gemm_persistent.py",
        {**HOPPER_GEMM, "mnkl": (512, 512, 320, 1), "cluster_shape_mn": (2, 1)},
    ),
    Example(
        "grouped GEMM",
        HOPPER,
        "hopper/kernel/grouped_gemm/grouped_gemm.py",
        {**HOPPER_GEMM, **GROUPS},
    ),
    Example(
        "attention",
        HOPPER,
        "hopper/kernel/attention/fmha.py",
        {**ATTENTION, "in_dtype": "f16", "mma_tiler_mn": (64, 128)},
    ),
    Example(
        "dense GEMM",
        BLACKWELL,
        "blackwell/kernel/dense_gemm/dense_gemm.py",
        {
            **BLACKWELL_GEMM,
            "mnkl": (256, 256, 320, 1),
            "mma_tiler_mn": (256, 128),
            "cluster_shape_mn": (2, 1),
        },
    ),
    Example(
        "persistent dense GEMM",
        BLACKWELL,
        "blackwell/kernel/dense_gemm/dense_gemm_persistent.py",
        {
            **BLACKWELL_GEMM,
            "mnkl": (512, 512, 320, 1),
            "mma_tiler_mn": (256, 128),
            "cluster_shape_mn": (2, 1),
        },
    ),
    Example(
        "grouped GEMM",
        BLACKWELL,
        "blackwell/kernel/grouped_gemm/grouped_gemm.py",
        {
            **BLACKWELL_GEMM,
            **GROUPS,
            "host_problem_shape_available": False,
            "mma_tiler_mn": (128, 128),
            "use_2cta_instrs": False,
        },
    ),
    Example(
        "attention",
        BLACKWELL,
        "blackwell/kernel/attention/fmha/fmha.py",
        {
            **ATTENTION,
            "qk_dtype": "f16",
            "pv_dtype": "f16",
            "mma_tiler_mn": (128, 128),
            "enable_ex2_emulation": False,
            "enable_skip_correction": False,
            "lse_calculation": False,
            "skip_softmax_threshold": 0.0,
        },
    ),
)
