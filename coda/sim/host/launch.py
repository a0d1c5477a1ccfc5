"""Launches by CuTe DSL host code -> `Launch` objects, through a shim in C.

The shim replaces the CUDA runtime in host code that is compiled for the simulator. It is built with
`cc` at first use and kept in a cache directory.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import os
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from coda.sim.host import kept
from coda.sim.types import Fault, Launch, SimError, Unsupported

SOURCE = Path(__file__).with_name("launch.c")
MAX_SMEM = 232448  # bytes of shared memory that one block may have
CLUSTER_DIMENSION = 4  # cudaLaunchAttributeClusterDimension
PROGRAMMATIC = 6  # cudaLaunchAttributeProgrammaticStreamSerialization

_FATBIN_MAGIC, _ELF_MAGIC = 0xBA55ED50, b"\x7fELF"
_CUBIN_ENTRY = 2
_SYMBOL_TABLE = 2


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_ubyte * 64))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class _Symbol(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("address", ctypes.c_void_p))


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Config), ctypes.c_void_p
)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/coda-sim`, or a temporary directory if that is not usable."""
    home = os.environ.get("XDG_CACHE_HOME")
    path = (Path(home) if home else Path.home() / ".cache") / "coda-sim"
    return path if not kept.refusal(path) else scratch_cache()


def scratch_cache() -> Path:
    """A directory that ends with the process."""
    return Path(_scratch().name)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="coda-sim-")


def build_shim(directory: Path) -> Path:
    """Path of the shim in `directory`; compiled if it is missing or does not match its digest.

    Raises SimError if there is no C compiler, or if it fails.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = directory / f"launch-{os.uname().machine}-{digest}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(str(library) + ".lock"):
        if not kept.intact(library):
            kept.write(library, _compile())
    return library


def _compile() -> bytes:
    """The shim as a shared library."""
    compiler = os.environ.get("CC") or "cc"
    with tempfile.TemporaryDirectory(prefix="coda-sim-") as scratch:
        library = Path(scratch) / "launch.so"
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            raise SimError(
                f"the simulated device needs a C compiler, and {compiler!r} is not there; "
                "install one, or name yours in the environment variable CC"
            ) from None
        if done.returncode:
            raise SimError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        return library.read_bytes()


class Shim:
    """The loaded shim: addresses of its functions by the names of the CUDA calls they replace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self.library.coda_sim_refused.restype = ctypes.c_char_p
        rows = (_Symbol * 128).in_dll(self.library, "coda_sim_symbols")
        self.symbols: dict[str, int] = {}
        for row in rows:
            if row.name is None:
                break
            self.symbols[row.name.decode()] = row.address
        self._callback: object = None

    def install(self, handler: Callable[[Launch | SimError], int], arch: str, sms: int) -> None:
        """Pass launches to `handler`, which returns a CUDA error code."""

        def receive(image: int, name: bytes, config: Any, args: int) -> int:
            try:
                found: Launch | SimError = _launch(image, name.decode(), config[0], args, arch)
            except SimError as error:
                found = error
            return handler(found)

        callback = _Callback(receive)
        self.library.coda_sim_install(callback, capability(arch), sms)
        self._callback = callback

    def remove(self) -> None:
        """Refuse launches."""
        self.library.coda_sim_install(None, 0, 0)
        self._callback = None

    def refused(self) -> str | None:
        """Name of an unsupported CUDA call that host code made since the last query, or None."""
        name = self.library.coda_sim_refused()
        return None if name is None else name.decode().lstrip("_")

    def bind(self, image: bytes) -> bytes:
        """A copy of an ELF object file with its CUDA imports bound to the shim."""
        return rename_imports(image, self.symbols)


_shims: list[Shim] = []


def load_shim(directory: Path) -> Shim:
    """The shim, built in `directory` and loaded into this process once.

    A second copy of the library would resolve to the symbols of the first, as the loader does.
    """
    if not _shims:
        try:
            library = build_shim(directory)
        except OSError as e:
            cannot_keep(directory, str(e))
            library = build_shim(scratch_cache())
        _shims.append(Shim(library))
    return _shims[0]


def cannot_keep(directory: Path, why: str) -> None:
    """Warn that compiled files are not kept between processes."""
    warnings.warn(
        f"the simulator's cache {directory} {why}: what is compiled is not kept there",
        RuntimeWarning,
        stacklevel=2,
    )


def capability(arch: str) -> int:
    """Compute capability as an int: 90 for sm_90a."""
    return int(arch.removeprefix("sm_").rstrip("af"))


def rename_imports(image: bytes, names: Container[str]) -> bytes:
    """Replace the first character of each undefined symbol of `names` by S in an ELF object.

    A name may be the tail of a longer one in the string table. If the object defines the longer
    symbol, that is merely renamed; if it imports it, SimError is raised.
    """
    out = bytearray(image)
    sections = _sections(image)
    for kind, link, offset, size in sections:
        if kind != _SYMBOL_TABLE:
            continue
        strings = sections[link][2]
        imports: list[tuple[int, int]] = []
        renamed: list[int] = []
        for at in range(offset, offset + size, 24):
            name, _, _, section = struct.unpack_from("<IBBH", image, at)
            if section:
                continue
            start = strings + name
            end = image.index(b"\0", start)
            imports.append((start, end))
            if image[start:end].decode() in names:
                renamed.append(start)
        for start in renamed:
            if any(a < start < b for a, b in imports):
                raise SimError("the host code imports a symbol that ends like a CUDA call")
            out[start : start + 1] = b"S"
    return bytes(out)


def _sections(image: bytes) -> list[tuple[int, int, int, int]]:
    """(type, link, offset, size) of each section of an ELF file."""
    if image[:4] != _ELF_MAGIC:
        raise SimError("the host code is not an ELF object")
    (table,) = struct.unpack_from("<Q", image, 40)
    entry, count = struct.unpack_from("<HH", image, 58)
    out = []
    for k in range(count):
        header = struct.unpack_from("<IIQQQQIIQQ", image, table + k * entry)
        out.append((header[1], header[6], header[4], header[5]))
    return out


def cubin_of(address: int) -> bytes:
    """The cubin in an image passed to cudaLibraryLoadData: a fatbin or a bare ELF image."""
    magic, _, header, payload = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != _FATBIN_MAGIC:
        return ctypes.string_at(address, _elf_size(address))
    data = ctypes.string_at(address, header + payload)
    at = header
    while at < len(data):
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        if kind == _CUBIN_ENTRY:
            return data[at + header : at + header + size]
        at += header + size
    raise SimError("the host code's fatbin holds no cubin")


def _elf_size(address: int) -> int:
    head = ctypes.string_at(address, 64)
    if head[:4] != _ELF_MAGIC:
        raise SimError("the host code's kernel image is neither a fatbin nor an ELF file")
    segments, sections = struct.unpack_from("<QQ", head, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", head, 54)
    return max(segments + segment_size * segment_count, sections + section_size * section_count)


def _launch(image: int, name: str, config: _Config, args: int, arch: str) -> Launch:
    cubin = cubin_of(image)
    attributes = {
        config.attributes[k].id: bytes(config.attributes[k].value) for k in range(config.count)
    }
    cluster = struct.unpack_from("<3I", attributes.get(CLUSTER_DIMENSION, b"\1\0\0\0" * 3))
    launch = Launch(
        kernel=name,
        ptx="",
        cubin=cubin,
        grid=(config.grid[0], config.grid[1], config.grid[2]),
        block=(config.block[0], config.block[1], config.block[2]),
        cluster=(cluster[0], cluster[1], cluster[2]),
        smem=config.smem,
        args=args,
        attributes=attributes,
        arch=arch,
    )
    check_shape(launch)
    return launch


def is_programmatic(launch: Launch) -> bool:
    """Whether a launch may begin before the one in front of it has ended."""
    return any(launch.attributes.get(PROGRAMMATIC, b"")[:4])


def check_shape(launch: Launch) -> None:
    """Raise Fault for a launch that the driver would refuse."""
    name, grid, block, cluster = launch.kernel[:60], launch.grid, launch.block, launch.cluster
    if 0 in (*grid, *block, *cluster):
        raise Fault(f"{name}: grid {grid}, block {block}, cluster {cluster} has a zero")
    threads = block[0] * block[1] * block[2]
    if threads > 1024 or block[2] > 64:
        raise Fault(f"{name}: a block of {block} is more than 1024 threads (64 along z)")
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise Fault(f"{name}: grid {grid} is not a multiple of the cluster {cluster}")
    if cluster[0] * cluster[1] * cluster[2] > 16:
        raise Fault(f"{name}: a cluster of {cluster} is more than 16 blocks")
    if launch.smem > MAX_SMEM:
        raise Fault(f"{name}: {launch.smem} bytes of shared memory; a block has {MAX_SMEM}")


_known: dict[str, str] = {}  # PTX by its cubin's digest: compiled functions outlive a device


class PtxStore:
    """Cubin -> the PTX that it was assembled from, for this process and in `directory`."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def add(self, cubin: bytes, ptx: str) -> None:
        """Remember a pair."""
        digest = hashlib.sha256(cubin).hexdigest()
        _known[digest] = ptx
        self._keep(digest)

    def _path(self, digest: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{digest}.ptx.gz"

    def _keep(self, digest: str) -> None:
        """Write a known PTX into the directory, unless it exists there."""
        path = self._path(digest)
        if path is None or kept.intact(path):
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept.write(path, gzip.compress(_known[digest].encode(), 1, mtime=0))
        except OSError as e:
            cannot_keep(path.parent, f"cannot be written ({e.strerror})")

    def has(self, digest: str) -> bool:
        """Whether the PTX of a cubin with this digest is known; if so, the directory has it too."""
        path = self._path(digest)
        if digest in _known:
            self._keep(digest)
            return True
        if path is None:
            return False
        try:
            data = kept.read(path)
        except kept.Damaged:
            return False
        if data is not None:
            _known[digest] = gzip.decompress(data).decode()
        return data is not None

    def find(self, cubin: bytes, kernel: str) -> str:
        """The PTX of a cubin. Raises SimError if it is not known."""
        digest = hashlib.sha256(cubin).hexdigest()
        if digest not in _known and not self.has(digest):
            raise SimError(
                f"kernel {kernel[:60]}: only its cubin is there, and the simulator runs PTX; "
                "compile it inside the device, or with CUTE_DSL_KEEP=ptx,cubin"
            )
        return _known[digest]


def check_target(ptx: str, launch: Launch) -> None:
    """Raise Unsupported for PTX of another architecture than the device's."""
    at = ptx.find("\n.target")
    target = ptx[at + 8 :].split("\n", 1)[0].split(",")[0].strip()
    if at < 0 or target not in (launch.arch, launch.arch.replace("a", "f")):
        raise Unsupported(f"{launch.kernel[:60]} is for {target!r}; the device is {launch.arch}")
