"""Third-party kernels on the simulator: which agree with torch, at which schedule, in which time.

`python benchmarks/sim.py` runs all of them on both archs and writes the table of docs/sim.md;
`python benchmarks/sim.py PATTERN` runs the cases whose name matches, and prints their rows.
`--checks` looks for bugs as well; `--speed` times the two floors alone.
"""

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import coda.sim as sim
from tests.sim.third_party import attention, epilogues, examples, gemm, rows
from tests.sim.third_party.cases import SCHEDULES, Case, run

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


def speed(arch, checks):
    """Seconds and warp instructions per second of the floors, once they are compiled."""
    for name, make in (("GEMM 1024x2048x512", gemm_floor), ("attention 4x1024", attention_floor)):
        with sim.device(arch, sms=8, checks=checks) as gpu:
            launch = make()
            for _ in range(2):
                launch()
            *_, last = gpu.report().launches
        result = last.result
        rate = result.warp_instructions / result.seconds / 1e6
        print(
            f"{name} on {arch}, checks {checks}: {result.seconds:.2f} s, {rate:.2f} M warp-inst/s"
        )


def rows_of(case: Case, arch: str, checks: str, cache: Path | None):
    """One row for a case on an arch, as Markdown."""
    start = time.perf_counter()
    try:
        found = run(case, arch, SCHEDULES, checks, cache)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        return f"| {case.name} | {arch} | {type(error).__name__}: {first[:90]} | | | |", False
    wall = time.perf_counter() - start
    seconds = " / ".join(f"{x.seconds:.2f}" for x in found)
    findings = sum(len(x.findings) for x in found)
    ok = "pass" if not findings else f"{findings} findings"
    count = found[0].warp_instructions
    rate = sum(x.warp_instructions for x in found) / sum(x.seconds for x in found)
    error = max(x.error for x in found)
    numbers = f"{error:.0e} | {seconds} | {count / 1e3:,.0f} k | {rate / 1e6:.2f} M"
    print(f"{case.name} [{arch}] {ok} in {wall:.0f} s", flush=True)
    return f"| {case.name} | {arch} | {ok} | {numbers} |", not findings


def example_rows():
    """A row for each of CUTLASS's examples that a checkout has."""
    if examples.checkout() is None:
        return []
    found = []
    for example in examples.EXAMPLES:
        times = []
        verdict = "pass"
        for schedule, seed in SCHEDULES:
            with sim.device(example.arch, schedule=schedule, seed=seed, checks="off") as gpu:
                try:
                    examples.run(example)
                except Exception as error:
                    verdict = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            launches = gpu.report().launches
            times.append(sum(x.result.seconds for x in launches))
            count = sum(x.result.warp_instructions for x in launches)
        rate = count / times[-1] if times[-1] else 0
        seconds = " / ".join(f"{t:.2f}" for t in times)
        numbers = f"| | {seconds} | {count / 1e3:,.0f} k | {rate / 1e6:.2f} M |"
        found.append(f"| CUTLASS {example.name} | {example.arch} | {verdict} {numbers}")
        print(found[-1], flush=True)
    return found


HEAD = """| kernel | arch | | error | seconds: eager / late / random | warp inst. | per second |
|---|---|---|---|---|---|---|
"""


def main():
    """Run, print, and write the page when all cases ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--checks", action="store_const", const="warn", default="off")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--cache", type=Path, help="keep compiled kernels here")
    options = parser.parse_args()
    if options.speed:
        for arch in ("sm_90a", "sm_100a"):
            for checks in ("off", "warn"):
                speed(arch, checks)
        return
    chosen = [c for c in CASES if re.search(options.pattern, c.name)]
    found = [rows_of(c, arch, options.checks, options.cache) for c in chosen for arch in c.arches]
    lines = [line for line, _ in found]
    if options.pattern:
        print("\n".join(lines))
        return
    lines += example_rows()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + HEAD + "\n".join(lines) + "\n" + END + after)
    print(f"{sum(ok for _, ok in found)} of {len(found)} pass; {PAGE} is written")


if __name__ == "__main__":
    main()
