"""Command-line input -> checked values, or one CodaError.

Files, numbers and Python code come from outside. Whatever is wrong with them is reported here, with
what was found and what would work, so that commands can rely on the values that they get.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from torch import Tensor

from coda.block import Block, parse
from coda.errors import CallError, CodaError, InternalError, TextError, Where
from coda.ir.graph import walk
from coda.ir.types import DType
from coda.lowering.compiler import check_dims
from coda.measure import load_inputs, random_inputs
from coda.runtime import cache
from coda.runtime.call import choose_target
from coda.sim.host.kept import refusal

P = ParamSpec("P")
R = TypeVar("R")
LARGEST = 2**63 - 1  # size or seed
UNREAD = 141  # the shell's exit code of a process that writes to a closed pipe


def described(error: BaseException) -> str:
    """The type, and the first line of the message, of an exception from foreign code."""
    try:
        text = str(error).strip()
    except Exception:
        text = "(its message cannot be read)"
    name = type(error).__name__
    return f"{name}: {text.splitlines()[0]}" if text else name


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command, so that all its failures are CodaErrors or exits that the shell expects.

    Raises:
        CodaError: if there is not enough memory, or a file cannot be accessed.
        InternalError: for any other exception, which is a bug of coda.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (CodaError, typer.Exit, typer.Abort):
            raise
        except MemoryError as e:
            raise _no_memory(e) from e
        except BrokenPipeError:
            discard_output()
            raise typer.Exit(UNREAD) from None
        except OSError as e:
            if e.filename is None:
                raise  # of stdout: `main` tells it
            raise CodaError(f"{e.filename}: {e.strerror}", found=described(e)) from e
        except Exception as e:
            if hasattr(e, "exit_code"):
                raise  # wrong usage, as typer tells it
            if "allocate memory" in str(e) or "out of memory" in str(e):
                raise _no_memory(e) from e
            raise InternalError(
                "coda ended where it should not",
                found=described(e),
                help="please report the command and:\n" + traceback.format_exc(),
            ) from e

    return run


def _no_memory(error: BaseException) -> CodaError:
    return CodaError(
        "there is not enough memory", found=described(error), help="give smaller --dims"
    )


def discard_output() -> None:
    """Send what is still to be printed on stdout to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# blocks


def is_file(path: Path) -> bool:
    """Whether the file exists; False also for a path that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_text(path: Path) -> str:
    """The text of a file. Raises TextError if it is not text or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise TextError(f"{path} is no text", found=described(e), help="a .coda file") from e
    except OSError as e:
        raise TextError(f"{path} cannot be read", found=described(e)) from e


def names_model(target: str) -> bool:
    """Whether a target is a model rather than a file with blocks. Raises CodaError if empty."""
    file, _, name = target.partition(":")
    path = Path(file)
    if not file:
        raise CodaError(
            "a target names a file or a module", found=repr(target), help="FILE.py:NAME"
        )
    try:
        if path.is_dir() or path.suffix == ".json":
            return True
        return bool(name) and path.suffix not in (".py", ".coda") and not path.exists()
    except (OSError, ValueError):
        return False


def load_block(target: str) -> Block:
    """The block that FILE.py:NAME or FILE.coda names. Raises CodaError."""
    file, _, name = target.partition(":")
    path = Path(file)
    if not is_file(path):
        raise CodaError("there is no such file", found=file, help="FILE.py:NAME or FILE.coda")
    if path.suffix == ".coda":
        try:
            block = parse(read_text(path), str(path))
        except RecursionError as e:
            raise TextError(f"{path} is nested too deeply", found=described(e)) from e
        found = {block.graph.name: block}
    else:
        found = {k: v for k, v in run_file(path).items() if isinstance(v, Block)}
    if not name and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        several = f"{file} has several blocks" if found else f"{file} has no block"
        raise CodaError(
            f"{file} has no block `{name}`" if name else several,
            help=" or ".join(f"{file}:{n}" for n in found) or "a function under @coda.block",
        )
    return found[name]


def traced(block: Block, dtype: DType) -> Block:
    """The block, traced for an element type. Raises CodaError if its function fails."""
    with foreign(f"`{block.__name__}` cannot be traced for {dtype}", "the function's own error"):
        block.graph_of(dtype)
    return block


def run_file(path: Path) -> dict[str, Any]:
    """The globals of a Python file that was run; it prints to stderr. Raises CodaError."""
    sys.path.insert(0, str(path.parent))
    with foreign(f"{path} does not run", f"python {path} shows the same", path):
        return runpy.run_path(str(path))


@contextlib.contextmanager
def foreign(message: str, help: str, path: Path | None = None) -> Iterator[None]:
    """Run foreign code: its exceptions, except ctrl-c, become a CodaError, and so does `sys.exit`.

    It prints to stderr.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (CodaError, KeyboardInterrupt):
        raise
    except SystemExit as e:
        raise CodaError(
            message,
            found=f"it ends the process: sys.exit({e.code!r})",
            help='calls of sys.exit belong below `if __name__ == "__main__":`',
            where=_place(e, path),
        ) from e
    except BaseException as e:
        raise CodaError(message, found=described(e), help=help, where=_place(e, path)) from e


def _place(error: BaseException, path: Path | None) -> Where | None:
    """The innermost line of a file at which an error was raised."""
    if isinstance(error, SyntaxError) and error.lineno and error.filename == str(path):
        return Where(str(path), error.lineno, max((error.offset or 1) - 1, 0))
    steps = [s for s, _ in traceback.walk_tb(error.__traceback__)]
    lines = [n for _, n in traceback.walk_tb(error.__traceback__)]
    mine = [i for i, s in enumerate(steps) if s.f_code.co_filename == str(path)]
    return Where(str(path), lines[mine[-1]]) if mine else None


# numbers


def parse_dims(text: str) -> dict[str, int]:
    """The sizes of "M=8192,D=4096". Raises CodaError."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        name, number = name.strip(), number.strip()
        digits = number.isascii() and number.isdigit()
        if not digits or not name.isidentifier() or name in sizes:
            word = f"`{name}` has two sizes" if name in sizes else "a size cannot be read"
            raise CodaError(word, found=part, help="--dims M=8192,D=4096")
        if len(number) > 20 or int(number) > LARGEST:
            raise CodaError(f"`{name}` is too large", found=number, help=f"at most {LARGEST}")
        sizes[name] = int(number)
    return sizes


def check_seed(seed: int) -> int:
    """A seed of torch and numpy. Raises CodaError."""
    if not 0 <= seed <= LARGEST:
        raise CodaError("there is no such seed", found=str(seed), help=f"--seed 0 to {LARGEST}")
    return seed


def check_memory(block: Block, dtype: DType, sizes: Mapping[str, int]) -> None:
    """Raise CallError if the arguments and the largest value, in float64, exceed the memory."""
    graph = block.graph_of(dtype)
    shapes = [[d.size(sizes) for d in n.shape] for n in graph.inputs]
    largest = max((math.prod(d.size(sizes) for d in n.shape) for n in walk(graph.roots)), default=0)
    needed = 8 * (sum(map(math.prod, shapes)) + largest)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise CallError(
            f"`{graph.name}` of these sizes does not fit into memory",
            found=f"{needed / 1e9:.0f} GB in float64; there are {there / 1e9:.0f}",
            help="give smaller --dims",
        )


# options


def check_training(memory: str, wanted: str, *, backward: bool, frozen: bool = False) -> None:
    """Raise CodaError for options that contradict each other."""
    if (memory or wanted) and not backward:
        raise CodaError("--memory and --wanted belong to --backward", found=memory or wanted)
    if backward and frozen:
        raise CodaError("weights that keep their values are not trained", found="--frozen")


def names_of(wanted: str) -> list[str] | None:
    """The names in "x,w"; None if the text is empty."""
    return [n.strip() for n in wanted.split(",")] if wanted else None


def arguments_of(
    block: Block, element: DType, sizes: dict[str, int], file: str, seed: int
) -> list[Tensor]:
    """The arguments from a file, or random ones if there is none. Raises CodaError."""
    graph = block.graph_of(element)
    if file:
        return load_inputs(graph, Path(file))
    check_memory(block, element, check_dims(graph, sizes))
    return random_inputs(graph, sizes, seed)


# directories


def check_kept(out: str) -> str:
    """The absolute path of --out, or "". Raises CodaError if kernels cannot be kept there."""
    if not out:
        check_cache()
        return ""
    try:
        path = Path(out).resolve()
        why = refusal(path)
    except (OSError, ValueError, RuntimeError) as e:
        path, why = Path(out), f"is no directory ({described(e)})"
    if why:
        raise CodaError(f"--out {path} {why}", found=out, help="name a directory of your own")
    return str(path)


def check_cache() -> None:
    """Raise CodaError if the kernel cache is refused: kernels would be lost with the process."""
    why = cache.why_refused()
    if why:
        raise CodaError(f"the cache {why}", help="set CODA_CACHE_DIR to a directory of your own")


# results


def plain(value: Any) -> Any:
    """Data for JSON, with null for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str, text: str) -> None:
    """Write a file. Raises CodaError if that fails."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as e:
        raise CodaError(
            "the page cannot be written", found=f"{path}: {e.strerror}", help="another path"
        ) from e


def explained_model(
    target: str, sizes: dict[str, int], arch: str, dtype: DType, *, training: bool
) -> Any:
    """The graph breaks of a model, its blocks, and the ops outside of them."""
    unknown = sizes.keys() - {"B", "S"}
    if unknown:
        raise CodaError(
            f"a model has no dim `{unknown.pop()}`", found=target, help="--dims B=1,S=2048"
        )
    from coda.integrations.model_report import explain_model

    with contextlib.redirect_stdout(sys.stderr):
        return explain_model(
            target,
            sizes.get("B", 1),
            sizes.get("S", 2048),
            dtype.torch,
            training=training,
            arch=choose_target(arch).arch if arch else "",
        )
