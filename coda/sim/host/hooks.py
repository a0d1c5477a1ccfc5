"""Patches CuTe DSL, torch, quack and flash-attention to use the active simulated device.

Every patch of the simulator is made here. A patched function calls `Host.here()`: in threads other
than the device's it behaves as before.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any, Protocol

from coda.sim.host.hardware import L2, SMEM_PER_SM, driver_answers, forget_answers
from coda.sim.host.kept import checked, print_on_stderr, recorded
from coda.sim.host.launch import PtxStore, Shim, capability
from coda.sim.host.patches import OnImport, OsWith, Patches
from coda.sim.host.tensors import CudaIsCpu
from coda.sim.types import SimError


class Host(Protocol):
    """The interface of a device that the hooks use."""

    arch: str
    sms: int
    lineinfo: bool
    shim: Shim
    dump: str
    kernels: str | None
    store: PtxStore
    mode: CudaIsCpu

    def here(self) -> bool:
        """Whether this is the device's thread."""
        ...

    def call(self, function: Any, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a compiled function on CPU tensors."""
        ...

    def launching(self) -> Any:
        """A context that raises a failed launch's own exception."""
        ...

    def wrap(self, tensor: Any) -> Any:
        """A tensor for host code, if it is a torch tensor."""
        ...

    def compiled(self, cubin: bytes, ptx: str) -> None:
        """A kernel was compiled."""
        ...


def install(host: Host) -> Patches:
    """Install all patches for a device; `undo` of the result removes them."""
    patches = Patches()
    try:
        _environment(patches, host)
        _compiler(patches, host)
        _engines(patches, host)
        _calls(patches, host)
        _driver(patches, host)
        _torch(patches, host)
        _libraries(patches, host)
    except BaseException:
        patches.undo()
        raise
    return patches


# Modules that read the variables below.
_READERS = (
    "cutlass.utils.blackwell_helpers",
    "flash_attn.cute.cute_dsl_utils",
    "flash_attn.cute.interface",
    "quack.cute_dsl_utils",
    "quack.rmsnorm_config",
)


def _environment(patches: Patches, host: Host) -> None:
    """Let libraries read the device's arch where they read environment variables, if they do."""
    number = str(capability(host.arch))
    seen = OsWith(
        {
            "CUTE_DSL_ARCH": host.arch,
            "QUACK_ARCH": number,
            "FLASH_ATTENTION_ARCH": f"sm_{number}",
            "FLASH_ATTENTION_NUM_SMS": str(host.sms),
        },
        host.here,
    )

    def reader(name: str) -> None:
        patches.set(sys.modules[name], "os", seen)

    watch = OnImport({name: partial(reader, name) for name in _READERS})
    patches.on_undo(watch.remove)


def _around(patches: Patches, host: Host, owner: Any, name: str, inside: Callable[..., Any]) -> Any:
    """Replace `owner.name` by `inside` in the device's thread."""
    original = getattr(owner, name)

    @functools.wraps(original, updated=())
    def patched(*args: Any, **kwargs: Any) -> Any:
        return (inside if host.here() else original)(*args, **kwargs)

    patches.set(owner, name, patched)
    return original


def _compiler(patches: Patches, host: Host) -> None:
    """Compile for the device's arch, with line information; keep PTX and cubin of each kernel."""
    from cutlass.base_dsl.compiler import CompileOptions
    from cutlass.base_dsl.jit_executor import JitFunctionArtifacts
    from cutlass.cutlass_dsl import CuTeDSL

    dsl = CuTeDSL._get_dsl()
    settings = {
        "_arch": host.arch,
        "no_cache": True,  # implied by keeping PTX; set explicitly, it does not warn
        "keep_ptx": True,
        "keep_cubin": True,
        "dump_dir": host.dump,
        "lineinfo": host.lineinfo,
    }
    for name, value in settings.items():
        patches.set(dsl.envar, name, value)

    def apply(self: Any, *args: Any) -> None:
        # Settings are written into options that `cute.compile` reuses, so they are restored.
        saved = {kind: copy(option) for kind, option in self.options.items()}
        patches.on_undo(lambda: self.options.update(saved))
        original_apply(self, *args)

    original_apply = _around(patches, host, CompileOptions, "apply_envar_settings", apply)

    def after(self: Any) -> None:
        original(self)
        if self.PTX and isinstance(self.CUBIN, bytes):
            host.compiled(self.CUBIN, self.PTX)

    original = _around(patches, host, JitFunctionArtifacts, "__post_init__", after)
    if host.kernels is not None:
        _kept_objects(patches, host, Path(host.kernels))


def _kept_objects(patches: Patches, host: Host, root: Path) -> None:
    """Verify objects loaded from the cache, and that the PTX of each exists."""
    from cutlass.cute import runtime
    from cutlass.cutlass_dsl import tvm_ffi_provider as provider

    def ours(path: Path) -> bool:
        return path.is_relative_to(root)

    load = checked(runtime.load_module, ours, host.store.has)
    _around(patches, host, runtime, "load_module", load)
    base = provider.TVMFFIJitCompiledFunctionBase
    _around(patches, host, base, "export_to_c", recorded(base.export_to_c, ours))


def _engines(patches: Patches, host: Host) -> None:
    """Bind the CUDA calls of compiled host code to the shim."""
    from cutlass._mlir._mlir_libs._cutlass_ir import _execution_engine
    from cutlass.base_dsl.compiler import Compiler
    from cutlass.base_dsl.export.external_binary_module import ExternalBinaryModule

    shim = host.shim

    def load(image: bytes, libraries: list[str], *rest: Any) -> Any:
        if not image:
            raise SimError("a shared library of compiled kernels cannot run on a simulated device")
        return binary(shim.bind(image), [str(shim.path), *libraries], *rest)

    binary = _around(patches, host, _execution_engine, "BinaryExecutionEngine", load)
    provider = ExternalBinaryModule.load_provider
    assert provider is not None
    _around(patches, host, provider, "execution_engine_constructor", load)

    def jit(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = original(self, *args, **kwargs)
        for name, address in shim.symbols.items():
            engine.raw_register_runtime(name, SimpleNamespace(value=address))
        engine.simulated = True
        return engine

    original = _around(patches, host, Compiler, "jit", jit)


class Loaded:
    """A compiled function that was loaded from an object file."""

    def __init__(self, function: Any, host: Host) -> None:
        self.function, self.host = function, host

    def __call__(self, *args: Any) -> Any:
        return current_host(self.host).call(self.function, (), args, {})


def _calls(patches: Patches, host: Host) -> None:
    """Pass CPU tensors to compiled functions as CUDA tensors; re-raise a launch's exception."""
    from cutlass.base_dsl.export.external_binary_module import ExternalBinaryModule
    from cutlass.base_dsl.jit_executor import JitExecutor
    from cutlass.cute import runtime
    from cutlass.cutlass_dsl import tvm_ffi_provider as provider
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction

    def create(self: Any) -> Any:
        self.simulated = True
        return original_create(self)

    base = provider.TVMFFIJitCompiledFunctionBase
    original_create = _around(patches, host, base, "_create_tvm_ffi_function", create)
    for kind in (provider.TVMFFIJitCompiledFunction, provider.TVMFFIJitCompiledFunctionWithKwargs):
        _call(patches, host, kind)

    def found(self: Any, name: str) -> Any:
        function = original_found(self, name)
        return Loaded(function, host) if self.enable_tvm_ffi else function

    original_found = _around(patches, host, ExternalBinaryModule, "__getattr__", found)

    def run(self: Any, arguments: Any) -> Any:
        _refuse_foreign(getattr(self.jit_module.engine, "simulated", False))
        with host.launching():
            return original_run(self, arguments)

    original_run = _around(patches, host, JitExecutor, "run_compiled_program", run)

    def load(self: Any) -> list[Any]:
        _refuse_foreign(getattr(self.engine, "simulated", False))
        self.__dict__["num_devices"] = 1
        original_load(self)
        return []  # handles of the shim: the real runtime must never unload them

    original_load = _around(
        patches, host, CudaDialectJitCompiledFunction, "_load_cuda_library", load
    )

    def tensor(self: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        original_tensor(self, host.wrap(value), *args, **kwargs)

    original_tensor = _around(patches, host, runtime._Tensor, "__init__", tensor)


def _call(patches: Patches, host: Host, kind: type) -> None:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_foreign(getattr(self, "simulated", False))
        names = self.execution_args.signature.parameters
        return host.call(functools.partial(original, self), names, args, kwargs)

    original = _around(patches, host, kind, "__call__", call)


def _refuse_foreign(simulated: bool) -> None:
    if not simulated:
        raise SimError(
            "this function was compiled outside of the simulated device, for a real GPU; compile "
            "it inside"
        )


_hosts: list[Host] = []


def current_host(fallback: Host) -> Host:
    """The active device, for functions that outlive the device that loaded them."""
    return _hosts[-1] if _hosts else fallback


def _driver(patches: Patches, host: Host) -> None:
    """Answer the queries that kernels' host code makes to the CUDA driver."""
    _hosts.append(host)
    patches.on_undo(_hosts.pop)
    for owner, name, answer in driver_answers(host.sms):
        _around(patches, host, owner, name, answer)


def _torch(patches: Patches, host: Host) -> None:
    """Let torch.cuda describe the simulated device."""
    import torch

    major, minor = divmod(capability(host.arch), 10)
    properties = SimpleNamespace(
        name=f"simulated {host.arch}",
        major=major,
        minor=minor,
        multi_processor_count=host.sms,
        total_memory=80 << 30,
        L2_cache_size=L2,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=SMEM_PER_SM,
        warp_size=32,
    )
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None, wait_stream=lambda s: None)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "synchronize": lambda device=None: None,
        "Stream": lambda *args, **kwargs: stream,
        "stream": lambda stream: nullcontext(),
    }
    for name, answer in answers.items():
        _around(patches, host, torch.cuda, name, answer)

    def backward(*args: Any, **kwargs: Any) -> Any:
        with host.mode:  # torch calls it with the mode off; backward functions launch kernels too
            return original(*args, **kwargs)

    original = _around(patches, host, torch.autograd, "_engine_run_backward", backward)


# Kernel caches in the memory of libraries: each kind of device has its own contents.
_kept: dict[tuple[Any, ...], Any] = {}


def _libraries(patches: Patches, host: Host) -> None:
    """Swap the caches of quack and flash-attention, now or when they are imported."""
    kind = (host.arch, host.sms, host.lineinfo, host.kernels)

    def contents(key: Any, cache: dict[Any, Any]) -> None:
        patches.contents(cache, _kept.setdefault((*kind, key), {}))

    def jit_caches() -> None:
        for wrapper in _jit_cached():
            contents((wrapper.__module__, wrapper.__qualname__), wrapper.cache)  # type: ignore[attr-defined]

    def attention() -> None:
        for function in _attention_functions():
            key = (*kind, "flash_attn", function.__qualname__)
            cache = _kept.setdefault(key, _attention_cache(host, function))
            patches.set(function, "compile_cache", cache)

    def store() -> None:
        cache = sys.modules["quack.cache"]
        patches.set(cache, "CACHE_ENABLED", host.kernels is not None)
        if host.kernels is not None:
            patches.set(cache, "CACHE_DIR", host.kernels)
            patches.set(sys.modules["quack.cache.jit"], "print", print_on_stderr)

    def plans() -> None:
        frontend = sys.modules["quack.epilogue.frontend"]
        for name in ("_plan_cache", "_call_cache"):
            patches.set(frontend.EpiMod, name, _PerDevice(name, kind))

    def gemm_plans() -> None:
        kept = _kept.setdefault((*kind, "gemm plans"), {})
        patches.set(sys.modules["quack.gemm"], "_gemm_plan_cache", kept)

    forget_answers()
    patches.on_undo(forget_answers)
    if "quack.cache.jit" in sys.modules:
        jit_caches()
    watch = OnImport(
        {
            "quack.cache": store,
            "quack.epilogue.frontend": plans,
            "quack.gemm": gemm_plans,
            "flash_attn.cute.interface": attention,
        }
    )
    patches.on_undo(watch.remove)
    known = set(_jit_cached())
    patches.on_undo(lambda: [w.cache_clear() for w in _jit_cached() if w not in known])  # type: ignore[attr-defined]


_wrappers: dict[int, list[FunctionType]] = {}


def _jit_cached() -> list[FunctionType]:
    """All functions that quack's `jit_cache` decorates, in any module.

    The search is repeated if modules were imported since.
    """
    module = sys.modules.get("quack.cache.jit")
    if module is None:
        return []
    if len(sys.modules) not in _wrappers:
        constants = module.jit_cache.__code__.co_consts
        code = next(c for c in constants if isinstance(c, CodeType) and c.co_name == "wrapper")
        found = [f for f in gc.get_referrers(code) if isinstance(f, FunctionType)]
        _wrappers.clear()
        _wrappers[len(sys.modules)] = found
    return _wrappers[len(sys.modules)]


def _attention_functions() -> list[FunctionType]:
    """The functions of flash-attention that cache compiled kernels."""
    modules = [
        sys.modules.get(f"flash_attn.cute.{n}") for n in ("interface", "compute_block_sparsity")
    ]
    found = [f for m in modules if m for f in vars(m).values() if isinstance(f, FunctionType)]
    return [f for f in found if hasattr(f, "compile_cache")]


def _attention_cache(host: Host, function: FunctionType) -> Any:
    """An empty cache, backed by files if the device has a cache directory."""
    from flash_attn.cute.cache_utils import (
        JITCache,
        JITPersistentCache,
        _compute_source_fingerprint,
    )

    if host.kernels is None:
        return JITCache()
    path = Path(host.kernels) / "flash_attn" / _compute_source_fingerprint() / function.__name__
    return JITPersistentCache(path)


class _PerDevice:
    """A dictionary for each object and kind of device, in place of an attribute of the object."""

    def __init__(self, name: str, kind: tuple[Any, ...]) -> None:
        self.name = name
        key = (*kind, "plans", name)
        self.found = _kept.setdefault(key, weakref.WeakKeyDictionary())

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        return self.found.setdefault(owner, {})

    def __set__(self, owner: Any, value: Any) -> None:
        owner.__dict__[self.name] = value
        self.found[owner] = {}
