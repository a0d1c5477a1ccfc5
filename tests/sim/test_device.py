"""The host side of the simulator: launches, tensors, what is patched and put back, threads."""

import ctypes
import json
import os
import struct
import sys
import threading
from collections import Counter
from pathlib import Path

import cutlass
import pytest
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack, make_fake_compact_tensor

import coda.sim as sim
from coda.sim.host import launch as shims
from coda.sim.types import BytesMoved, Finding, Launch, LaunchResult

MODULE = sys.modules["coda.sim.host.device"]


@cute.kernel
def double_kernel(a: cute.Tensor, b: cute.Tensor):
    """b = 2 a, one element for each thread."""
    thread, _, _ = cute.arch.thread_idx()
    b[thread] = a[thread] * 2


@cute.jit
def double(a: cute.Tensor, b: cute.Tensor):
    double_kernel(a, b).launch(grid=(3, 1, 1), block=(32, 1, 1))


@cute.jit
def double_in_clusters(a: cute.Tensor, b: cute.Tensor):
    double_kernel(a, b).launch(grid=(4, 2, 1), block=(64, 2, 1), cluster=(2, 1, 1), smem=1024)


def fakes():
    return [make_fake_compact_tensor(cutlass.Float32, (32,)) for _ in range(2)]


def compiled(function=double):
    return cute.compile(function, *fakes(), options="--enable-tvm-ffi")


@pytest.fixture
def x():
    return torch.arange(32.0)


@pytest.fixture
def y():
    return torch.zeros(32)


@pytest.fixture
def machine(monkeypatch):
    """A machine that notes launches, and the values of pointer parameters, and runs nothing."""

    class Machine:
        def __init__(self):
            self.launches: list[Launch] = []
            self.pointers: list[list[int]] = []
            self.names: list[list[str]] = []
            self.answer = LaunchResult

        def run(self, launch, allocations, options):
            values = (ctypes.c_void_p * 2).from_address(launch.args)
            self.launches.append(launch)
            self.pointers.append([ctypes.c_uint64.from_address(v).value for v in values])
            self.names.append([name for _, _, name in allocations])
            return self.answer(launch.kernel)

    found = Machine()
    monkeypatch.setattr(MODULE, "execute", found.run)
    return found


def snapshot():
    """All that a device may change, as it stands."""
    from cutlass._mlir._mlir_libs._cutlass_ir import _execution_engine
    from cutlass.base_dsl.compiler import Compiler
    from cutlass.base_dsl.export.external_binary_module import ExternalBinaryModule
    from cutlass.base_dsl.jit_executor import JitExecutor, JitFunctionArtifacts
    from cutlass.base_dsl.runtime import cuda
    from cutlass.cute import runtime
    from cutlass.cutlass_dsl import CuTeDSL, cuda_jit_executor, tvm_ffi_provider
    from cutlass.utils.hardware_info import HardwareInfo

    owners = [
        _execution_engine,
        Compiler,
        ExternalBinaryModule,
        ExternalBinaryModule.load_provider,
        JitExecutor,
        JitFunctionArtifacts,
        cuda,
        runtime._Tensor,
        CuTeDSL._get_dsl().envar,
        cuda_jit_executor.CudaDialectJitCompiledFunction,
        tvm_ffi_provider.TVMFFIJitCompiledFunctionBase,
        tvm_ffi_provider.TVMFFIJitCompiledFunction,
        tvm_ffi_provider.TVMFFIJitCompiledFunctionWithKwargs,
        HardwareInfo,
        torch.cuda,
        torch.autograd,
    ]
    modes = torch._C._len_torch_function_stack()
    return [dict(vars(o)) for o in owners], dict(os.environ), list(sys.meta_path), modes


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_launch_arrives_with_its_shape_its_ptx_and_its_arguments(machine, arch, x, y):
    with sim.device(arch):
        compiled(double_in_clusters)(x, y)
    (launch,) = machine.launches
    assert (launch.grid, launch.block, launch.cluster) == ((4, 2, 1), (64, 2, 1), (2, 1, 1))
    assert (launch.smem, launch.arch) == (1024, arch)
    assert "double_kernel" in launch.kernel
    assert f".entry {launch.kernel}(" in launch.ptx
    assert f".target {arch}" in launch.ptx
    assert launch.cubin[:4] == b"\x7fELF"
    assert machine.pointers == [[x.data_ptr(), y.data_ptr()]]
    assert sorted(machine.names[0]) == ["a: float32[32]", "b: float32[32]"]


def test_ptx_has_line_info_unless_it_is_not_wanted(machine, x, y):
    for wanted in (True, False):
        with sim.device(lineinfo=wanted):
            compiled()(x, y)
    with_lines, without = (launch.ptx for launch in machine.launches)
    assert Path(__file__).name in with_lines
    assert "\t.loc" in with_lines
    assert "\t.loc" not in without


def test_all_ways_to_call(machine, x, y):
    """TVM-FFI by position and by name, without it, and a `cute.jit` function called as it is."""
    with sim.device():
        function = compiled()
        function(x, y)
        function(a=x, b=y)
        plain = cute.compile(double, from_dlpack(x), from_dlpack(y))
        plain(from_dlpack(x), from_dlpack(y))
        double(from_dlpack(x), from_dlpack(y))
    assert machine.pointers == [[x.data_ptr(), y.data_ptr()]] * 4


def test_a_function_that_was_compiled_inside_serves_later_devices(machine, x, y):
    with sim.device():
        functions = compiled(), cute.compile(double, from_dlpack(x), from_dlpack(y))
    with sim.device(schedule="late"):
        functions[0](x, y)
        functions[1](from_dlpack(x), from_dlpack(y))
    assert len(machine.launches) == 2


def test_a_function_is_refused_where_it_cannot_run(machine, x, y):
    with sim.device():
        inside = compiled()
    outside = compiled()
    plain = cute.compile(double, *fakes())
    with sim.device("sm_100a"):
        with pytest.raises(sim.SimError, match="compiled outside of the simulated device"):
            outside(x, y)
        with pytest.raises(sim.SimError, match="compiled outside of the simulated device"):
            plain(from_dlpack(x), from_dlpack(y))
        with pytest.raises(sim.Unsupported, match=r"is for 'sm_90a'; the device is sm_100a"):
            inside(x, y)
    assert not machine.launches


def test_a_function_that_outlives_its_device_says_so(machine, x, y, capfd):
    from cutlass.base_dsl.common import DSLCudaRuntimeError

    with sim.device():
        plain = cute.compile(double, from_dlpack(x), from_dlpack(y))
        arguments = from_dlpack(x), from_dlpack(y)
        plain(*arguments)
    with pytest.raises(DSLCudaRuntimeError, match="cudaErrorNoDevice"):
        plain(*arguments)
    assert "was compiled for a simulated device and is launched outside" in capfd.readouterr().err
    assert len(machine.launches) == 1


def test_everything_is_put_back(machine, x, y):
    before = snapshot()
    with sim.device("sm_100a", sms=7):
        assert torch.cuda.get_device_properties().multi_processor_count == 7
        assert torch.cuda.get_device_capability() == (10, 0)
        assert cutlass.utils.HardwareInfo().get_max_active_clusters(2) == 3
        assert snapshot() != before
        compiled()(x, y)
    assert snapshot() == before
    assert not x.is_cuda


def test_compiling_after_a_device_is_as_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = compiled(), cute.compile(double, *fakes())
    with sim.device():
        inside = compiled(), cute.compile(double, *fakes())
    after = compiled(), cute.compile(double, *fakes())
    assert [f.artifacts.PTX is None for f in (*before, *inside, *after)] == [True] * 2 + [
        False
    ] * 2 + [True] * 2
    assert not list(tmp_path.iterdir())


def test_everything_is_put_back_after_an_exception(machine):
    before = snapshot()
    with pytest.raises(ZeroDivisionError), sim.device():
        raise ZeroDivisionError
    assert snapshot() == before


def test_everything_is_put_back_when_a_device_does_not_start(monkeypatch):
    before = snapshot()
    hooks = sys.modules["coda.sim.host.hooks"]
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "_libraries", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sim.device().__enter__()
    assert snapshot() == before
    with sim.device():
        pass


@pytest.mark.parametrize("ffi", [True, False])
@pytest.mark.parametrize("error", [sim.Deadlock("all wait"), KeyboardInterrupt(), ValueError("v")])
def test_the_machine_s_own_exception_is_raised(machine, x, y, ffi, error):
    def fail(launch):
        raise error

    with sim.device() as gpu:
        function = compiled() if ffi else cute.compile(double, from_dlpack(x), from_dlpack(y))
        arguments = (x, y) if ffi else (from_dlpack(x), from_dlpack(y))
        machine.answer = fail
        with pytest.raises(type(error)) as found:
            function(*arguments)
        assert found.value is error
        machine.answer = LaunchResult
        function(*arguments)
    first, second = gpu.report().launches
    assert first.error == f"{type(error).__name__}: {error}"
    assert second.error is None


def test_one_device_at_a_time():
    with sim.device(), pytest.raises(sim.SimError, match="active in this thread"):
        sim.device().__enter__()
    with sim.device():
        pass


def test_threads_take_turns_and_others_see_no_device(machine):
    active, seen, done = [], [], threading.Event()

    def work():
        a, b = torch.arange(32.0), torch.zeros(32)
        with sim.device():
            active.append(1)
            seen.append(len(active))
            compiled()(a, b)
            active.pop()

    def look():
        seen.append((torch.zeros(1).is_cuda, torch.cuda.current_device.__module__))
        done.set()

    threads = [threading.Thread(target=work) for _ in range(3)]
    with sim.device():
        for thread in threads:
            thread.start()
        threading.Thread(target=look).start()
        assert done.wait(10)
        assert torch.zeros(1).is_cuda
        assert not active
    for thread in threads:
        thread.join(60)
    assert seen == [(False, "torch.cuda"), 1, 1, 1]
    assert len(machine.launches) == 3


def test_what_is_asked_of_cuda_is_made_on_the_cpu(x):
    with sim.device():
        made = torch.zeros(2, device="cuda"), torch.ones(2, device=torch.device("cuda", 0))
        moved = [x.cuda(), x.to("cuda"), x.to(device="cuda"), x.cuda().cpu()]
        assert all(t.is_cuda and t.device.type == "cpu" for t in (*made, *moved))
        moved[0][0] = 7
        assert all(t.data_ptr() != x.data_ptr() for t in moved)
    assert x[0] == 0


def test_backward_functions_see_the_device(x):
    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 2

        @staticmethod
        def backward(ctx, gradient):
            assert gradient.is_cuda
            return gradient * 2

    x.requires_grad_()
    with sim.device():
        Seen.apply(x).sum().backward()
        torch.autograd.grad(Seen.apply(x).sum(), x)
    assert (x.grad == 2).all()


def test_storages_are_known_while_they_live(machine, x, y):
    with sim.device() as gpu:
        function = compiled()
        hidden = gpu.register(torch.zeros(8, dtype=torch.int32), "hidden")
        pointed = torch.zeros(4)
        pointed.data_ptr()
        function(x, y)
        del hidden, pointed
        function(torch.arange(64.0)[32:], y)
    first, second = (sorted(names) for names in machine.names)
    views = ["a: float32[32]", "b: float32[32]"]
    assert first == [*views, "hidden: int32[8]", "tensor: float32[4]"]
    assert second == ["a: float32[32]", "a: float32[32] #2", "b: float32[32]"]


def test_a_view_registers_its_whole_storage(machine, y):
    base = torch.arange(64.0)
    with sim.device() as gpu:
        compiled()(base[32:], y)
        blocks = {base: size for base, size, _ in gpu.memory.allocations()}
    assert blocks[base.data_ptr()] == 256
    assert machine.pointers[0][0] == base.data_ptr() + 128


def finding(kernel):
    text = "wgmma.wait_group 0;"
    return Finding("race", "read too [early]", kernel, 12, text, "gemm.py:3", 1, 0, 16)


def test_report(machine, x, y):
    def answer(kernel):
        result = LaunchResult(kernel, [finding(kernel)], {"a": BytesMoved(128, 0, 64, 0)})
        result.instructions, result.flops = Counter(load=3, fma=0), 4096
        result.sync_sites = {1: 4, 2: 0}
        return result

    machine.answer = answer
    with sim.device(schedule="random", seed=3) as gpu:
        compiled()(x, y)
        report = gpu.report()
        compiled()(x, y)
    assert len(report.launches) == 1
    assert report.findings == [finding(machine.launches[0].kernel)]
    (entry,) = report.launches
    assert entry.occupancy.blocks == 32
    assert 0 < entry.occupancy.registers < 64
    text = str(report)
    for part in ("double_kernel", "4,096", "1 race", "gemm.py:3", "read too [early]", "random"):
        assert part in text
    assert "load 3" in text
    assert "fma" not in text
    assert "1 of 2" in text
    data = json.loads(json.dumps(report.json()))
    assert data["launches"][0]["result"]["per_allocation"]["a"]["unique_loaded"] == 64
    assert data["launches"][0]["grid"] == [3, 1, 1]


def test_report_keeps_the_finding_that_was_raised(machine, x, y):
    def fail(kernel):
        raise sim.CheckFailed(finding(kernel))

    machine.answer = fail
    with sim.device(checks="raise") as gpu, pytest.raises(sim.CheckFailed):
        compiled()(x, y)
    assert [f.kind for f in gpu.report().findings] == ["race"]


def test_options_may_change_between_launches(machine, x, y, monkeypatch):
    schedules = []

    def run(launch, allocations, options):
        schedules.append(options.schedule)
        return LaunchResult(launch.kernel)

    monkeypatch.setattr(MODULE, "execute", run)
    with sim.device() as gpu:
        function = compiled()
        for schedule in ("eager", "late", "random"):
            gpu.options = sim.Options(schedule)
            function(x, y)
    assert schedules == ["eager", "late", "random"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "sm_80"}, "arch is sm_90a or sm_100a, not 'sm_80'"),
        ({"sms": 0}, "at least one multiprocessor, not 0"),
        ({"schedule": "lazy"}, "schedule is eager, late or random, not 'lazy'"),
        ({"checks": {"typo": "warn"}}, "no check is called 'typo'"),
    ],
)
def test_bad_arguments_of_a_device(arguments, message):
    with pytest.raises(ValueError, match=message):
        sim.device(**arguments)


def test_a_tensor_elsewhere_is_refused(machine, y):
    with sim.device():
        function = compiled()
        with pytest.raises(sim.SimError, match="argument a is on meta"):
            function(torch.empty(32, device="meta"), y)


def test_the_shim_is_built_once(tmp_path):
    built = shims.build_shim(tmp_path)
    stamp = built.stat().st_mtime_ns
    assert shims.build_shim(tmp_path) == built
    assert built.stat().st_mtime_ns == stamp
    assert {p.suffix for p in tmp_path.iterdir()} - {".lock"} == {".so", ".sha256"}


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(sim.SimError, match="needs a C compiler, and 'no-such-compiler' is not"):
        shims.build_shim(tmp_path)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(sim.SimError, match="failed"):
        shims.build_shim(tmp_path)


def test_a_cuda_call_that_is_not_simulated_is_named(tmp_path):
    shim = shims.Shim(shims.build_shim(tmp_path))
    assert shim.refused() is None
    assert shim.library.ScudaMalloc() == 801
    assert shim.refused() == "cudaMalloc"
    assert shim.refused() is None


SHAPE = {"grid": (4, 1, 1), "block": (128, 1, 1), "cluster": (1, 1, 1), "smem": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (0, 1, 1)}, "has a zero"),
        ({"block": (1025, 1, 1)}, "more than 1024 threads"),
        ({"block": (1, 1, 65)}, "64 along z"),
        ({"cluster": (3, 1, 1)}, "not a multiple of the cluster"),
        ({"grid": (32, 1, 1), "cluster": (32, 1, 1)}, "more than 16 blocks"),
        ({"smem": 232449}, "a block has 232448"),
    ],
)
def test_a_launch_that_a_driver_refuses(change, message):
    shims.check_shape(Launch("k", "", b"", args=0, **SHAPE))
    with pytest.raises(sim.Fault, match=message):
        shims.check_shape(Launch("k", "", b"", args=0, **(SHAPE | change)))


def elf(symbols, strings):
    """An ELF object of a symbol table and a string table: symbols as (name offset, section)."""
    table = b"".join(struct.pack("<IBBHQQ", name, 0, 0, at, 0, 0) for name, at in symbols)
    body = 64 + len(table)
    sections = body + len(strings)
    head = b"\x7fELF" + bytes(36) + struct.pack("<QIHHHHHH", sections, 0, 64, 0, 0, 64, 3, 2)
    rows = [
        (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (0, 2, 0, 0, 64, len(table), 2, 0, 8, 24),
        (0, 3, 0, 0, body, len(strings), 0, 0, 1, 0),
    ]
    return head + table + strings + b"".join(struct.pack("<IIQQQQIIQQ", *r) for r in rows)


def test_imports_are_renamed_and_nothing_else():
    strings = b"\0my_cudaGetDevice\0_cudaSetDevice\0"
    symbols = [(1, 1), (3, 0), (18, 1)]
    found = shims.rename_imports(elf(symbols, strings), {"_cudaGetDevice", "_cudaSetDevice"})
    assert found == elf(symbols, strings.replace(b"my_cuda", b"myScuda"))


def test_an_import_that_ends_like_a_cuda_call_is_not_renamed():
    strings = b"\0my_cudaGetDevice\0"
    with pytest.raises(sim.SimError, match="ends like a CUDA call"):
        shims.rename_imports(elf([(1, 0), (3, 0)], strings), {"_cudaGetDevice"})
    with pytest.raises(sim.SimError, match="not an ELF object"):
        shims.rename_imports(b"MZ", {"_cudaGetDevice"})


def test_the_cubin_of_an_image():
    cubin = elf([(1, 1)], b"\0k\0")
    entry = struct.pack("<HHIQ", 2, 1, 64, len(cubin)) + bytes(48) + cubin
    ptx = struct.pack("<HHIQ", 1, 1, 64, 4) + bytes(48) + b"ptx\0"
    for entries, found in (([entry], cubin), ([ptx, entry], cubin), ([ptx], None)):
        body = b"".join(entries)
        fatbin = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
        image = ctypes.create_string_buffer(fatbin)
        if found is None:
            with pytest.raises(sim.SimError, match="no cubin"):
                shims.cubin_of(ctypes.addressof(image))
        else:
            assert shims.cubin_of(ctypes.addressof(image)) == found
    bare = ctypes.create_string_buffer(cubin + b"rest")
    assert shims.cubin_of(ctypes.addressof(bare)) == cubin
    other = ctypes.create_string_buffer(bytes(64))
    with pytest.raises(sim.SimError, match="neither a fatbin nor an ELF file"):
        shims.cubin_of(ctypes.addressof(other))


def test_ptx_by_its_cubin(tmp_path, monkeypatch):
    monkeypatch.setattr(shims, "_known", {})
    shims.PtxStore(tmp_path).add(b"cubin", "text")
    assert shims.PtxStore(None).find(b"cubin", "k") == "text"
    monkeypatch.setattr(shims, "_known", {})
    with pytest.raises(sim.SimError, match="kernel k: only its cubin is there"):
        shims.PtxStore(None).find(b"cubin", "k")
    assert shims.PtxStore(tmp_path).find(b"cubin", "k") == "text"
