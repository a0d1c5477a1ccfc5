"""Files that are kept between processes are verified, in directories that nobody else may write."""

import gzip
import hashlib
import os
import stat
import subprocess
import sys
import warnings

import pytest

from coda import sim
from coda.kernels.gemm import quack_target
from coda.runtime import cache
from coda.sim.host import kept
from coda.sim.host import launch as shims


def bend(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def directory_instead(path):
    path.unlink()
    (path / "more").mkdir(parents=True)


DAMAGES = {
    "cut short": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "a bit": bend,
    "emptied": lambda p: p.write_bytes(b""),
    "a directory": directory_instead,
    "no digest": lambda p: kept.digest_file(p).unlink(),
    "empty digest": lambda p: kept.digest_file(p).write_text(""),
    "no text as digest": lambda p: kept.digest_file(p).write_bytes(b"\xff\xfe"),
    "digest of another": lambda p: kept.digest_file(p).write_text(hashlib.sha256().hexdigest()),
}
damages = pytest.mark.parametrize("hurt", DAMAGES.values(), ids=DAMAGES)


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "file"
    assert kept.read(path) is None
    for data in (b"first", b"second", b""):
        kept.write(path, data)
        assert kept.read(path) == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "file.sha256"]


@damages
def test_a_damaged_file_is_deleted_with_a_warning(tmp_path, hurt):
    path = tmp_path / "file"
    kept.write(path, b"0123456789")
    hurt(path)
    with pytest.warns(RuntimeWarning, match="it is rebuilt"), pytest.raises(kept.Damaged):
        kept.read(path)
    assert not path.exists()
    kept.write(path, b"new")
    assert kept.intact(path)


@damages
def test_a_damaged_shim_is_built_again(tmp_path, hurt):
    path = shims.build_shim(tmp_path)
    good = path.read_bytes()
    hurt(path)
    with pytest.warns(RuntimeWarning, match=path.name):
        assert shims.build_shim(tmp_path) == path
    assert path.read_bytes()[:4] == good[:4] == b"\x7fELF"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shims.build_shim(tmp_path)


@damages
def test_damaged_ptx_is_not_known(tmp_path, hurt, monkeypatch):
    cubin = hashlib.sha256(b"cubin").hexdigest()
    monkeypatch.setattr(shims, "_known", {})
    shims.PtxStore(tmp_path).add(b"cubin", "the text")
    (path,) = tmp_path.glob("*.ptx.gz")
    monkeypatch.setattr(shims, "_known", {})
    assert shims.PtxStore(tmp_path).has(cubin)
    hurt(path)
    monkeypatch.setattr(shims, "_known", {})
    store = shims.PtxStore(tmp_path)
    with pytest.warns(RuntimeWarning):
        assert not store.has(cubin)
    store.add(b"cubin", "the text")
    assert gzip.decompress(kept.read(path)) == b"the text"


def test_two_processes_write_the_same_bytes(tmp_path, monkeypatch):
    """So that the digest of one fits the file of the other."""
    found = []
    for now in (1000.0, 2000.0):
        monkeypatch.setattr("time.time", lambda now=now: now)
        monkeypatch.setattr(shims, "_known", {})
        shims.PtxStore(tmp_path / str(now)).add(b"cubin", "text")
        (path,) = (tmp_path / str(now)).glob("*.ptx.gz")
        found.append(path.read_bytes())
    assert found[0] == found[1]


def test_each_directory_gets_the_ptx_that_this_process_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(shims, "_known", {})
    shims.PtxStore(None).add(b"cubin", "text")
    for name in ("one", "other"):
        shims.PtxStore(tmp_path / name).add(b"cubin", "text")
        (path,) = (tmp_path / name).glob("*.ptx.gz")
        path.unlink()
        assert shims.PtxStore(tmp_path / name).has(hashlib.sha256(b"cubin").hexdigest())
        assert kept.intact(path)


class Compiled:
    """A compiled function as libraries export it."""

    class artifacts:
        CUBIN = b"cubin"

    def export(self, object_file_path, function_name=""):
        with open(object_file_path, "wb") as file:  # noqa: PTH123
            file.write(b"object")


@pytest.fixture
def store(tmp_path):
    """A store with one object, as quack writes it, and its loader."""
    name = "a" * 64
    path, scratch = tmp_path / f"{name}.o", tmp_path / f"{name}.o.tmp.77"
    ours = lambda p: p.is_relative_to(tmp_path)  # noqa: E731
    kept.recorded(Compiled.export, ours)(Compiled(), object_file_path=str(scratch))
    scratch.replace(path)
    belongs = []
    load = kept.checked(lambda p, **_: f"loaded {p}", ours, lambda c: belongs.append(c) or True)
    return path, load, belongs


def test_an_object_that_was_exported_loads(store, tmp_path):
    path, load, belongs = store
    assert load(str(path), enable_tvm_ffi=True) == f"loaded {path}"
    assert belongs == [hashlib.sha256(b"cubin").hexdigest()]
    assert load("/elsewhere/mine.o") == "loaded /elsewhere/mine.o"  # the user's own


@damages
def test_a_damaged_object_is_not_loaded(store, hurt):
    path, load, _ = store
    hurt(path)
    with pytest.warns(RuntimeWarning), pytest.raises(kept.Damaged):
        load(str(path), enable_tvm_ffi=True)
    assert not path.exists()


def test_an_object_without_its_ptx_is_not_loaded(store):
    path, _, _ = store
    load = kept.checked(lambda p: p, lambda p: True, lambda _: False)
    with pytest.warns(RuntimeWarning, match="missing"), pytest.raises(kept.Damaged):
        load(str(path))
    assert not path.exists()


# directories


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_may_write_is_not_used(tmp_path, monkeypatch, mode):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    monkeypatch.setenv("CODA_CACHE_DIR", str(shared))
    with pytest.warns(RuntimeWarning, match="chmod go-w"):
        found = cache.cache_directory()
    assert found != shared
    with pytest.warns(RuntimeWarning, match="chmod go-w"):
        assert sim.device("sm_90a", cache=shared).kernels is None
    assert not list(shared.iterdir())


def test_a_part_of_a_cache_that_others_may_write_is_not_used(tmp_path):
    (tmp_path / "ptx").mkdir()
    (tmp_path / "ptx").chmod(0o777)
    tmp_path.chmod(0o755)
    with pytest.warns(RuntimeWarning, match="ptx"):
        assert sim.device("sm_90a", cache=tmp_path).cache is None


def test_a_directory_of_another_user_is_not_used(tmp_path, monkeypatch):
    mine = os.geteuid()
    monkeypatch.setattr(kept.os, "geteuid", lambda: mine + 1)
    assert "another user" in kept.refusal(tmp_path)


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_directory_that_others_may_read_is_used(tmp_path, mode):
    tmp_path.chmod(mode)
    assert sim.device("sm_90a", cache=tmp_path).cache == tmp_path
    assert stat.S_IMODE((tmp_path / "ptx").stat().st_mode) == 0o700


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert sim.device("sm_90a", cache=tmp_path / "file").cache is None


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shims, "_known", {})
    monkeypatch.setattr(kept, "_replace", full)
    store = shims.PtxStore(tmp_path)
    with pytest.warns(RuntimeWarning, match="No space left"):
        store.add(b"cubin", "text")
    assert store.find(b"cubin", "k") == "text"
    monkeypatch.setattr(shims, "_shims", [])
    monkeypatch.setattr(kept, "_replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"), pytest.raises(OSError):
        shims.load_shim(tmp_path)  # its replacement in a temporary directory is full as well


# emitted modules


@pytest.mark.parametrize("old", [b"\xff\xfe", b"", b"VALUE = 1", None])
def test_an_emitted_module_is_what_was_emitted(tmp_path, old):
    name, text = f"emitted_{hash(old) & 0xFFFF}", "VALUE = 2\n"
    path = tmp_path / f"{name}.py"
    path.mkdir() if old is None else path.write_bytes(old)
    module = quack_target.load_module(text, name, tmp_path)
    assert module.VALUE == 2
    assert path.read_text() == text
    del sys.modules[name]
    assert not list(tmp_path.rglob("*.pyc"))


def test_bytecode_of_an_earlier_process_is_not_run(tmp_path):
    import py_compile

    path = tmp_path / "emitted_before.py"
    path.write_text("VALUE = 1\n")
    compiled = py_compile.compile(str(path))
    status = path.stat()
    text = "VALUE = 2\n"
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that Python takes it
    assert compiled is not None
    module = quack_target.load_module(text, "emitted_before", tmp_path)
    del sys.modules["emitted_before"]
    assert module.VALUE == 2


# whole processes

SIMULATED = """
import sys
import torch
import coda.sim
import quack

x = torch.randn(4, 128)
for cache in sys.argv[1:]:
    with coda.sim.device("sm_90a", cache=cache or None):
        y = quack.softmax(x)
    assert torch.allclose(y, x.softmax(-1), atol=1e-5)
"""


def simulate(*caches):
    return subprocess.run(
        [sys.executable, "-c", SIMULATED, *map(str, caches)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_simulated_process_mends_its_cache(tmp_path):
    assert simulate("", tmp_path).returncode == 0
    cut, directory = DAMAGES["cut short"], DAMAGES["a directory"]
    for pattern, hurt in (
        ("*.ptx.gz", cut),
        ("*.ptx.gz", lambda p: p.unlink()),
        ("*.o", cut),
        ("*.o", directory),
        ("*.so", cut),
    ):
        (path,) = tmp_path.rglob(pattern)
        hurt(path)
        again = simulate(tmp_path)
        assert again.returncode == 0, again.stderr
        (path,) = tmp_path.rglob(pattern)
        assert kept.intact(path)
    quiet = simulate(tmp_path)
    assert quiet.returncode == 0
    assert "rebuilt" not in quiet.stderr


@pytest.mark.slow
def test_the_command_line_mends_what_it_prints(tmp_path):
    """A damaged PTX or cubin is not printed, and is rebuilt with the object."""
    block = tmp_path / "tiny.coda"
    block.write_text("block f(%x: [M, 64] bf16) {\n  %0 = square %x\n  return out = %0\n}\n")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "coda", "compile", block, "--dims", "M=8", "--out", out]
    for ending in ("", ".ptx", ".cubin"):
        if ending:
            (path,) = (out / "kernels").glob(f"*{ending}")
            DAMAGES["cut short"](path)
        done = subprocess.run(
            [*command, "--emit", "ptx"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(".entry") == 1
        assert done.stdout.rstrip().endswith("}")
        assert ("rebuilt" in done.stderr) == bool(ending)
    assert kept.intact(path)
