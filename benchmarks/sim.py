"""Third-party kernels on the simulator: which agree with torch, at which schedule, in which time.

`python benchmarks/sim.py` runs all of them on both archs and writes the table of docs/sim.md;
`python benchmarks/sim.py PATTERN` runs the cases whose name matches, and prints their rows.
`--no-checks` does not look for bugs; `--speed` times the two floors alone.
"""

import argparse
import re
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import coda.sim as sim
from tests.sim.third_party import attention, epilogues, examples, gemm, rows
from tests.sim.third_party.cases import SCHEDULES, Case, argued, run

CASES = (*gemm.CASES, *epilogues.CASES, *rows.CASES, *attention.CASES)
PAGE = Path(__file__).parent.parent / "docs/sim.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
TILE = {"tile_M": 128, "tile_N": 256, "cluster_M": 2, "cluster_N": 1}


def gemm_floor():
    """A 1024 x 2048 x 512 GEMM with an epilogue of three operands and a reduction."""
    import torch
    from quack.epilogue import library

    m, n, k = 1024, 2048, 512
    a, b, c = (torch.randn(1, *s).bfloat16() for s in ((m, k), (n, k), (m, n)))
    d, out = torch.empty_like(c), torch.empty_like(c)
    sums, weight = torch.empty(1, m, n // TILE["tile_N"]), torch.rand(1, n)
    operands = {"weight": weight, "resid_out": out, "sqsum": sums}
    return lambda: library.rms_partial_epi.gemm(a, b, d, c, epi_args=operands, **TILE)


def attention_floor():
    """flash-attention forward, 4 heads, 1024 x 1024, width 128."""
    import torch
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = (torch.randn(1, 1024, 4, 128).bfloat16() for _ in range(3))
    return lambda: _flash_attn_fwd(q, k, v, return_lse=True)


def speed(arch: str, checks: str) -> None:
    """The floors, compiled and decoded before: the best of three launches."""
    for name, make in (("GEMM 1024x2048x512", gemm_floor), ("attention 4x1024", attention_floor)):
        wall, cpu = [], []
        with sim.device(arch, sms=8, checks=checks) as gpu:
            launch = make()
            for _ in range(4):
                begin = time.process_time()
                launch()
                cpu.append(time.process_time() - begin)
                wall.append(gpu.report().launches[-1].result.seconds)
            result = gpu.report().launches[-1].result
        rate = result.warp_instructions / min(wall[1:]) / 1e6
        print(
            f"{name} on {arch}, checks {checks}: {min(wall[1:]):.2f} s ({min(cpu[1:]):.2f} s of a "
            f"core), {rate:.2f} M warp-inst/s"
        )


def verdict(name: str, arch: str, findings: list) -> tuple[str, bool]:
    """What the table says of a case that agrees with torch, and whether all is well."""
    kinds = {f.kind for f in findings}
    left = kinds - argued(name, arch)
    if left:
        print(*(f for f in findings if f.kind in left), sep="\n", file=sys.stderr)
        return f"agrees; finds {', '.join(sorted(kinds))}", False
    return f"pass; {', '.join(sorted(kinds))}, argued" if kinds else "pass", True


def row(name: str, arch: str, what: str, error: str, times: list, count: int, total: int) -> str:
    """A row of the table: warp instructions of the first run, and of all in all the time."""
    seconds = " / ".join(f"{t:.2f}" for t in times)
    rate = total / sum(times) / 1e6 if sum(times) else 0.0
    return (
        f"| {name} | {arch} | {what} | {error} | {seconds} | {count / 1e3:,.0f} k | {rate:.2f} M |"
    )


def failed(name: str, arch: str, error: Exception) -> tuple[str, bool]:
    """The row of a case that does not run, or does not agree with torch."""
    first = str(error).splitlines()[0] if str(error) else ""
    return f"| {name} | {arch} | {type(error).__name__}: {first[:90]} | | | | |", False


def row_of(case: Case, arch: str, checks: str, cache: Path | None) -> tuple[str, bool]:
    """The row of a case on an arch, and whether all is well."""
    try:
        found = run(case, arch, SCHEDULES, checks, cache)
    except Exception as error:
        return failed(case.name, arch, error)
    what, ok = verdict(case.name, arch, [f for x in found for f in x.findings])
    error = f"{max(x.error for x in found):.0e}"
    total = sum(x.warp_instructions for x in found)
    times = [x.seconds for x in found]
    return row(case.name, arch, what, error, times, found[0].warp_instructions, total), ok


def example_row(example: examples.Example, checks: str) -> tuple[str, bool]:
    """The row of one of CUTLASS's examples, which compares by itself, and whether all is well."""
    name, launches = f"CUTLASS {example.name}", []
    for schedule, seed in SCHEDULES:
        with sim.device(example.arch, schedule=schedule, seed=seed, checks=checks) as gpu:
            try:
                examples.run(example)
            except Exception as error:
                return failed(name, example.arch, error)
        launches.append([x.result for x in gpu.report().launches])
    what, ok = verdict(name, example.arch, [f for xs in launches for x in xs for f in x.findings])
    counts = [sum(x.warp_instructions for x in xs) for xs in launches]
    times = [sum(x.seconds for x in xs) for xs in launches]
    return row(name, example.arch, what, "", times, counts[0], sum(counts)), ok


HEAD = """| kernel | arch | | error | seconds: eager / late / random | warp inst. | per second |
|---|---|---|---|---|---|---|
"""


def rows_that_match(pattern: str, checks: str, cache: Path | None) -> list[tuple[str, bool]]:
    """The rows of all cases and examples whose name matches, printed as they come."""
    chosen = [c for c in CASES if re.search(pattern, c.name)]
    jobs = [partial(row_of, c, arch, checks, cache) for c in chosen for arch in c.arches]
    if examples.checkout() is not None:
        some = [e for e in examples.EXAMPLES if re.search(pattern, f"CUTLASS {e.name}")]
        jobs += [partial(example_row, e, checks) for e in some]
    found = []
    for job in jobs:
        found.append(job())
        print(found[-1][0], flush=True)
    return found


def main():
    """Run, print, and write the page when all cases ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--cache", type=Path, help="keep compiled kernels here")
    options = parser.parse_args()
    if options.speed:
        for arch in ("sm_90a", "sm_100a"):
            for checks in ("off", "warn"):
                speed(arch, checks)
        return
    checks = "off" if options.no_checks else "warn"
    found = rows_that_match(options.pattern, checks, options.cache)
    if options.pattern:
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    table = HEAD + "\n".join(line for line, _ in found) + "\n"
    PAGE.write_text(before + BEGIN + table + END + after)
    print(f"{sum(ok for _, ok in found)} of {len(found)} pass; {PAGE} is written")


if __name__ == "__main__":
    main()
