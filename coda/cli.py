"""The command line: explain, compile, run, check, cache, doctor.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import coda
from coda.block import Block
from coda.border import (
    UNREAD,
    arguments_of,
    check_cache,
    check_kept,
    check_seed,
    check_training,
    discard_output,
    explained_model,
    load_block,
    names_model,
    names_of,
    parse_dims,
    plain,
    reported,
    traced,
    write_text,
)
from coda.check import check_gradients, check_kernels
from coda.doctor import examine
from coda.errors import CodaError, InternalError
from coda.ir.types import dtype_of
from coda.lowering.algebra.policy import DEFAULT_POLICY, MemoryPolicy
from coda.lowering.compiler import request, run_stage
from coda.lowering.explain_stages import pass_facts, passes_table, record_stages, training_graphs
from coda.lowering.program.program import Program
from coda.lowering.stages import show_value, stage_names
from coda.measure import ErrorReport, measure, measure_gradients
from coda.options import (
    Arch,
    Backward,
    BlockOrModel,
    Dims,
    Frozen,
    Html,
    Inputs,
    Json,
    Memory,
    Seed,
    Target,
    Type,
    Wanted,
)
from coda.runtime import cache as kernel_cache
from coda.runtime.bind import bind_sizes
from coda.runtime.call import choose_backend, choose_target
from coda.runtime.compile import Compiled, compile_program, show_progress, usage_table
from coda.runtime.settings import CACHE_DIR, CHECK

app = typer.Typer(
    name="coda",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Output(Console):
    """Tables on stdout; `main` handles a closed pipe."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _print_json(found: Any) -> None:
    print(json.dumps(plain(found), indent=2, allow_nan=False))


def _show_version(asked: bool) -> None:
    if asked:
        print(coda.__version__)
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """Transformer blocks written as mathematics, compiled to fused kernels."""


def _block(target: str, dtype: str) -> Block:
    """The block that a target names, traced for an element type. Raises CodaError."""
    return traced(load_block(target), dtype_of(dtype))


@app.command()
@reported
def explain(
    target: BlockOrModel,
    *,
    dims: Dims = "",
    arch: Arch = "",
    dtype: Type = "bf16",
    frozen: Frozen = False,
    backward: Backward = False,
    memory: Memory = "",
    wanted: Wanted = "",
    as_json: Json = False,
    text: Annotated[bool, typer.Option("--text", help="print the Program's text")] = False,
    html: Html = "",
    passes: Annotated[bool, typer.Option("--passes", help="list the stages")] = False,
    stop_after: Annotated[str, typer.Option(help="print the result of a stage such as laws")] = "",
) -> None:
    """The lowering of a block: kernels, bytes, modelled times, and the kernel of each op.

    With --passes: the stages of its lowering, what each did and how long it took.

    Of a model: its graph breaks, blocks, and what is left to torch and why, on meta tensors of
    --dims B=1,S=2048.
    """
    if names_model(target):
        found = explained_model(target, parse_dims(dims), arch, dtype_of(dtype), training=backward)
        _show(found, html, as_json=as_json)
        return
    block, element, sizes = _block(target, dtype), dtype_of(dtype), parse_dims(dims)
    check_training(memory, wanted, backward=backward, frozen=frozen)
    if passes or stop_after:
        graphs = [(block.graph_of(element), DEFAULT_POLICY)]
        if backward:
            kept = names_of(wanted), memory or block.memory
            graphs = training_graphs(graphs[0][0], sizes, *kept)
        shown = stage_names(stop_after, "--stop-after")
        found = record_stages(
            graphs, sizes, choose_target(arch), frozen=frozen, check=int(CHECK.get()), show=shown
        )
        if as_json and not shown:
            _print_json({name: pass_facts(record) for name, record in found.items()})
        for name, record in found.items() if not (as_json or shown) else ():
            _Output().print(passes_table(name, record))
        return
    if backward:
        kept = names_of(wanted), memory or None
        found = block.explain_training(arch or None, element, *kept, **sizes)
        programs = [found.forward.program, found.backward.program]
    else:
        found = block.explain(arch or None, element, frozen=frozen, **sizes)
        programs = [found.program]
    if text:
        print("\n".join(str(p) for p in programs), end="")
    else:
        _show(found, html, as_json=as_json)


def _show(found: Any, html: str, *, as_json: bool) -> None:
    """Print a report, or write its page to a file. Raises CodaError if that cannot be written."""
    if as_json:
        _print_json(found.json())
    elif html:
        write_text(html, found.html())
    else:
        found.print(_Output())


@app.command()
@reported
def stage(
    name: Annotated[str, typer.Argument(help="a stage, as `coda explain --passes` lists them")],
    target: Target,
    *,
    dims: Dims = "",
    arch: Arch = "",
    dtype: Type = "bf16",
    chunked: Annotated[bool, typer.Option(help="chunk, as the backward of --memory min")] = False,
) -> None:
    """Run one stage of the lowering on a block, checked before and after.

    Stages from `place` on take a Program: that of the stages from `chunks` on, of the block as it
    is. Laws that leave a choice are applied wherever they can be.
    """
    (name,) = stage_names(name, "stage") or ("",)
    graph = _block(target, dtype).graph_of(dtype_of(dtype))
    policy = MemoryPolicy(chunked=chunked)
    asked = request(graph, parse_dims(dims), choose_target(arch), frozen=False, policy=policy)
    print(show_value(run_stage(name, asked)), end="")


@app.command()
@reported
def run(
    target: Target,
    *,
    dims: Dims = "",
    arch: Arch = "",
    dtype: Type = "bf16",
    backend: Annotated[str, typer.Option(help="reference, sim or cuda")] = "",
    inputs: Inputs = "",
    seed: Seed = 0,
    schedule: Annotated[str, typer.Option(help="of backend sim: eager, late or random")] = "eager",
    show: Annotated[bool, typer.Option("--report", help="print the report of backend sim")] = False,
    backward: Backward = False,
    memory: Memory = "",
    wanted: Wanted = "",
    as_json: Json = False,
) -> None:
    """Run a block, and measure its error against float64, next to torch's, op by op.

    With --backward: the errors of its gradients.
    """
    element, sizes = dtype_of(dtype), parse_dims(dims)
    block, seed = _block(target, dtype), check_seed(seed)
    check_training(memory, wanted, backward=backward)
    graph = block.graph_of(element)
    given = arguments_of(block, element, sizes, inputs, seed)
    chosen = choose_backend(backend)
    if chosen != "sim" and (show or schedule != "eager"):
        raise CodaError(
            "--report and --schedule belong to backend sim", found=chosen, help="--backend sim"
        )
    run: Any = measure
    if backward:
        run = partial(measure_gradients, wanted=names_of(wanted), memory=memory or None)
    seen = None
    if chosen == "sim":
        arch = choose_target(arch).arch
        call = partial(run, block, block.graph_for(given), given, "sim", arch, sizes)
        report, seen = _simulate(call, arch, schedule, seed)
    else:
        report = run(block, graph, given, backend, arch, sizes)
    if as_json:
        found = report.json() | ({"simulator": seen.json()} if seen is not None and show else {})
        _print_json(found)
        return
    _Output().print(report.table())
    if seen is not None and show:
        print(seen)


@app.command()
@reported
def check(
    target: Target,
    *,
    dims: Dims = "",
    arch: Arch = "",
    dtype: Type = "bf16",
    backend: Annotated[str, typer.Option(help="one backend; default: all that are available")] = "",
    inputs: Inputs = "",
    seed: Seed = 0,
    backward: Backward = False,
    memory: Memory = "",
    wanted: Wanted = "",
    as_json: Json = False,
) -> None:
    """Compare each kernel with float64 on every backend, and name the first that is wrong.

    The exit code is 1 if one is wrong.
    """
    element, block, seed = dtype_of(dtype), _block(target, dtype), check_seed(seed)
    check_training(memory, wanted, backward=backward)
    given = arguments_of(block, element, parse_dims(dims), inputs, seed)
    sizes = bind_sizes(block.graph_of(element), given, parse_dims(dims))
    options: dict[str, Any] = {"element": element, "arch": arch}
    options["backends"] = [choose_backend(backend)] if backend else []
    if backward:
        options |= {"wanted": names_of(wanted), "memory": memory or None, "seed": seed}
    report = (check_gradients if backward else check_kernels)(block, given, sizes, **options)
    if as_json:
        _print_json(report.json())
    else:
        _Output().print(report.table())
        print(report.verdict())
    raise typer.Exit(0 if report.wrong is None else 1)


def _simulate(
    call: Callable[[], ErrorReport], arch: str, schedule: str, seed: int
) -> tuple[ErrorReport, Any]:
    """Measure a block on a simulated GPU: the errors, and the simulator's report."""
    from coda.runtime.simulate import device
    from coda.sim import SimError

    if schedule not in ("eager", "late", "random"):
        raise CodaError("a schedule is eager, late or random", found=schedule)
    try:
        with device(arch, schedule=schedule, seed=seed) as gpu:
            report = call()
    except SimError as e:
        raise CodaError(f"the simulated GPU stopped: {e}") from e
    return report, gpu.report()


@app.command(name="compile")
@reported
def compile_(
    target: Target,
    *,
    dims: Dims = "",
    arch: Arch = "",
    dtype: Type = "bf16",
    frozen: Frozen = False,
    out: Annotated[str, typer.Option(help="write a directory that loads without recompiling")] = "",
    emit: Annotated[str, typer.Option(help="print source, ptx or cubin (its path)")] = "",
    backward: Backward = False,
    memory: Memory = "",
    wanted: Wanted = "",
    as_json: Json = False,
) -> None:
    """Compile a block's kernels, with or without a GPU, and print the resources of each."""
    if emit not in ("", "source", "ptx", "cubin"):
        raise CodaError("there is no such thing to emit", found=emit, help="source, ptx or cubin")
    out = check_kept(out)
    block, element, sizes = _block(target, dtype), dtype_of(dtype), parse_dims(dims)
    check_training(memory, wanted, backward=backward, frozen=frozen)
    if backward:
        kept = names_of(wanted), memory or None
        both = block.lower_training(arch or None, sizes, element, *kept)
        programs = dict(zip(("forward", "backward"), both, strict=True))
    else:
        programs = {"": block.lower(arch or None, sizes, element, frozen=frozen)}
    with CACHE_DIR.as_given(out):
        done = [c for which, program in programs.items() for c in _compile(program, which)]
    if as_json:
        _print_json([c.json() for c in done])
    elif emit:
        for c in done:
            print(
                c.cubin
                if emit == "cubin"
                else (c.source if emit == "source" else c.ptx).read_text()
            )
    else:
        _Output().print(usage_table(choose_target(arch).arch, done))


def _compile(program: Program, which: str) -> list[Compiled]:
    """The compiled kernels of a Program in its order, with `which` before their names."""
    found = {c.kernel: c for c in show_progress(compile_program(program), len(program.kernels))}
    done = [found[k.name] for k in program.kernels if k.name in found]
    return [replace(c, kernel=f"{which} {c.kernel}".strip()) for c in done]


class CacheAction(StrEnum):
    """The actions of `coda cache`."""

    LS = "ls"
    SIZE = "size"
    PRUNE = "prune"
    CLEAR = "clear"
    PATH = "path"


@app.command()
@reported
def cache(
    action: Annotated[CacheAction, typer.Argument(help="ls, size, prune, clear or path")],
) -> None:
    """List or delete the compiled kernels in the cache on disk."""
    check_cache()
    if action is CacheAction.PATH:
        print(kernel_cache.cache_directory())
    elif action is CacheAction.CLEAR:
        kernel_cache.clear()
    elif action is CacheAction.PRUNE:
        print(f"{kernel_cache.prune()} deleted")
    else:
        found = kernel_cache.objects()
        for one in found if action is CacheAction.LS else ():
            when = datetime.fromtimestamp(one.used).isoformat(" ", "minutes")
            print(f"{when}  {one.size / 1e3:8.1f} kB  {one.path}")
        total = sum(o.size for o in found) / 1e6
        print(f"{len(found)} kernels, {total:.1f} MB of at most {kernel_cache.LIMIT / 1e6:.0f}")


@app.command()
@reported
def doctor(*, as_json: Json = False) -> None:
    """Print the versions, the GPU, the available backends, and what is missing."""
    report = examine()
    if as_json:
        _print_json(report.json())
    else:
        _Output().print(report.table())
    raise typer.Exit(0 if report.good else 1)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script.

    Exit codes: 0 for success; 1 for a bug of coda or a broken installation; 2 for a wrong call; 130
    after ctrl-c and 141 for a closed pipe, as in shells.
    """
    for name in ("stdout", "stderr"):  # None where the shell has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        code: Any = app(arguments, standalone_mode=False, prog_name="coda")
        sys.stdout.flush()
    except CodaError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, InternalError) else 2)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        discard_output()
        if isinstance(e, BrokenPipeError):
            sys.exit(UNREAD)
        print(f"CodaError: the output cannot be written ({e.strerror})", file=sys.stderr)
        sys.exit(2)
    except Exception as e:
        usage = getattr(e, "exit_code", None)  # of typer, whose classes have moved
        if usage is None:
            raise
        show = getattr(e, "show", None)
        if show is not None:
            show(file=sys.stderr)
        sys.exit(usage)
    sys.exit(code or 0)
