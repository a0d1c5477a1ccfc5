"""A cubin -> the resources of its kernel; its PTX -> what ptxas says of its performance."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """Resources of a kernel.

    Attributes:
        registers: of a thread.
        stack, local: bytes of a thread in local memory; other than 0 means spills.
        shared: bytes of static shared memory.
        instructions: machine instructions in the code.
    """

    registers: int
    stack: int
    local: int
    shared: int
    instructions: int


@cache
def tool(name: str) -> str | None:
    """The path of cuobjdump, nvdisasm or ptxas, from its PyPI package or the search path."""
    import shutil

    for root in sys.path:
        found = sorted(Path(root).glob(f"nvidia/**/bin/{name}")) if Path(root).is_dir() else []
        if found:
            return str(found[0])
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def usage(cubin: Path) -> Usage | None:
    """The resources of the kernel in a cubin, or None without the tools."""
    dump = tool("cuobjdump")
    if dump is None or not cubin.exists():
        return None
    text = _run(dump, "--dump-resource-usage", str(cubin))
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if not found:
        return None
    registers, stack, shared, local = (max(int(f[i]) for f in found) for i in range(4))
    disassembler = tool("nvdisasm")
    sass = _run(disassembler, "-c", str(cubin)) if disassembler else ""
    count = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))
    return Usage(registers, stack, local, shared, count)


def complaints(ptx: Path, arch: str) -> tuple[str, ...] | None:
    """The codes of ptxas's performance warnings for a kernel, sorted; None without ptxas.

    C7510 to C7519 say that wgmma instructions are serialised: each waits for the one before.
    """
    assembler = tool("ptxas")
    if assembler is None:
        return None
    command = (assembler, f"-arch={arch}", str(ptx), "-o", "/dev/null")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(sorted(set(re.findall(r"\((C75\d\d)\)", done.stdout + done.stderr))))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
