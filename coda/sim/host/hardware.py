"""An arch and a number of multiprocessors -> the answers that a CUDA driver would give.

Host code of CuTe DSL and quack asks for the number of clusters that fit (the grid of a persistent
kernel, an argument of its launch) and for sizes of memory. Compiling without a launch, and launches
on a simulated device, take the answers from here: a driver may be absent, and a real one needs a
context and answers for its own GPU only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from coda.sim.types import SimError

SMEM_PER_SM, L2 = 233472, 50 << 20  # bytes

# Caches of driver answers in libraries.
_REMEMBERED = (
    ("quack.cute_dsl_utils", "get_device_multiprocessor_count"),
    ("quack.cute_dsl_utils", "get_max_active_clusters"),
    ("quack.cute_dsl_utils", "_get_device_capacity_cached"),
    ("quack.cute_dsl_utils", "get_compile_target_capacity"),
    ("flash_attn.cute.cute_dsl_utils", "get_max_active_clusters"),
    ("flash_attn.cute.cute_dsl_utils", "get_device_capacity"),
    ("flash_attn.cute.cute_dsl_utils", "_get_device_arch_and_num_sms"),
    ("flash_attn.cute.interface", "_get_device_arch"),
)


def driver_answers(sms: int, l2: int = L2) -> list[tuple[Any, str, Callable[..., Any]]]:
    """(owner, attribute, replacement) for every query that cutlass makes to a driver.

    Args:
        sms: multiprocessors of the device; a cluster takes one of them for each of its blocks.
        l2: bytes of its L2 cache.
    """
    from cutlass.base_dsl.runtime import cuda
    from cutlass.utils.hardware_info import HardwareInfo

    def attribute(which: Any, device_id: int = 0) -> int:
        name = which.name
        if name.endswith("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"):
            return SMEM_PER_SM
        if name.endswith("MULTIPROCESSOR_COUNT"):
            return sms
        raise SimError(f"the simulated device does not know its attribute {name}")

    def clusters(self: Any, cluster_size: int, stream: Any = None) -> int:
        return max(1, sms // cluster_size)

    return [
        (HardwareInfo, "__init__", lambda self, device_id=0: None),
        (HardwareInfo, "get_max_active_clusters", clusters),
        (HardwareInfo, "get_device_multiprocessor_count", lambda self: sms),
        (HardwareInfo, "get_l2_cache_size_in_bytes", lambda self: l2),
        (cuda, "get_device_attribute", attribute),
        (cuda, "initialize_cuda_context", lambda *a, **k: None),
    ]


def forget_answers() -> None:
    """Clear the libraries' caches of driver answers."""
    for module, name in _REMEMBERED:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None and hasattr(function, "cache_clear"):
            function.cache_clear()
