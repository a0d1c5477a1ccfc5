"""The installation -> findings with advice: package versions, GPU, backends, settings."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from rich.table import Table

import coda
from coda.errors import CodaError
from coda.runtime.call import BACKENDS, gpu_target
from coda.runtime.settings import VARIABLES, EnvironmentVariable

TESTED = {
    "torch": "2.13",
    "nvidia-cutlass-dsl": "4.8",
    "quack-kernels": "0.6",
    "flash-attn-4": "4.0",
    "triton": "3.7",
    "lark": "1",
    "numpy": "2",
}
OPTIONAL = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")


@dataclass(frozen=True)
class DiagnosisLine:
    """One line of the report; `advice` is empty if nothing has to be done."""

    what: str
    found: str
    advice: str = ""
    needed: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """The report of `coda doctor`."""

    findings: tuple[DiagnosisLine, ...]

    @property
    def good(self) -> bool:
        """Whether no required package or setting has advice."""
        return not any(f.needed and f.advice for f in self.findings)

    def json(self) -> list[dict[str, Any]]:
        """As plain data."""
        return [vars(f) for f in self.findings]

    def table(self) -> Table:
        """As a table."""
        table = Table(title="coda doctor", title_justify="left")
        for column in ("what", "found", "advice"):
            table.add_column(column)
        for f in self.findings:
            table.add_row(f.what, f.found, f.advice or "ok")
        return table


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _package(name: str, tested: str) -> DiagnosisLine:
    found = _version(name)
    if not found:
        return DiagnosisLine(name, "missing", f"pip install '{name}=={tested}.*'")
    if not (found + ".").startswith(tested + "."):
        return DiagnosisLine(name, found, f"tested with {tested}: pip install '{name}=={tested}.*'")
    return DiagnosisLine(name, found)


def _setting(variable: EnvironmentVariable) -> DiagnosisLine:
    try:
        return DiagnosisLine(variable.name, variable.get() or "not set")
    except CodaError as e:
        return DiagnosisLine(variable.name, e.found, e.message)


def examine() -> Diagnosis:
    """Examine the installation."""
    findings = [
        DiagnosisLine("coda", coda.__version__),
        DiagnosisLine("python", platform.python_version()),
        *(_package(name, tested) for name, tested in TESTED.items()),
    ]
    for name in OPTIONAL:
        found = _version(name)
        advice = "" if found else f"pip install {name} (registers and spills in `coda compile`)"
        findings.append(DiagnosisLine(name, found or "missing", advice, needed=False))
    compiler = shutil.which("cc") or shutil.which("gcc") or ""
    advice = "" if compiler else "install gcc or clang: backend sim builds a small library with it"
    findings.append(DiagnosisLine("C compiler", compiler or "missing", advice, needed=False))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    target = gpu_target()
    advice = "" if target else "no Hopper or Blackwell GPU: blocks run on backend reference"
    arch = target.arch if target else ""
    findings.append(DiagnosisLine("GPU", f"{gpu} {arch}".strip(), advice, needed=False))
    needs = {"cuda": target is not None, "sim": bool(compiler)}
    working = [name for name in BACKENDS if needs.get(name, True)]
    findings.append(DiagnosisLine("backends", ", ".join(working)))
    findings += [_setting(v) for v in VARIABLES]
    return Diagnosis(tuple(findings))
