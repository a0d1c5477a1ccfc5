"""The corpus: what coda makes of all examples and of 100 random blocks, as texts to compare.

A refactoring moves nothing: the corpus written before it and the corpus written after it are equal.
This script runs against any tree of coda, so that both are written by the same script:

    PYTHONPATH=old python benchmarks/corpus.py write /tmp/old --quick
    PYTHONPATH=new python benchmarks/corpus.py write /tmp/new --quick
    python benchmarks/corpus.py compare /tmp/old /tmp/new --renames renames.txt

An entry is one Program: a block, an arch, sizes (`small`, `real`), a part (`inference`, `forward`
that saves, `backward`) and a memory policy. It is a file of sections: facts (launches, bytes,
modelled microseconds, largest error), graph, normal form, Program, sources, costs of each
kernel, and for small sizes a digest of each output's bits on the reference backend. An error is
an entry as well: its class and its message.

`--renames` names a file with one `old new` a line, as

    coda.runtime.epilogue_math coda.kernels.device_math

by which whole dotted names of the old texts are replaced before they are compared. Where entries
moved, `compare` prints what each costs before and after, marked worse or better, then the diff of
the first entries, and exits with 1:

    979 of 980 entries are equal, 1 moved: program 1, sources 1
      gpt2_layer.layer.real.sm_90a.inference.balanced   program, sources
          launches 6 -> 7 worse, hbm_bytes 538000000 -> 512000000 better

`write` takes about 6 minutes of one core, with `--quick` (examples, one policy) half a minute.
`--only TEXT` writes the entries whose names begin with TEXT; `compare --subset` compares such a
part with a whole. `--ptx` adds the PTX of some 40 kernels, which takes about 10 minutes more.

All that is read of coda, beyond Block, is in "The seams" below: a tree in which a seam has moved
needs an edit there, and nowhere else.
"""

import argparse
import difflib
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import random
import re
import runpy
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

ARCHS = ("sm_90a", "sm_100a")
POLICIES = ("min", "balanced", "speed")
RANDOM_BLOCKS = 100
SMALL = {"M": 101, "D": 128, "F": 192, "H": 4, "G": 2, "d": 32, "V": 500}
LLAMA = {"M": 8192, "D": 4096, "F": 14336, "H": 32, "G": 8, "d": 128, "V": 128256}
RANDOM_SIZES = {"M": 37, "D": 64, "E": 96}
TABLES = ("cos", "sin")  # arguments of examples that are not trained
# File, block, the name of its sizes.
EXAMPLES = (
    ("llama_mlp", "mlp", "DIMS"),
    ("llama_layer", "layer", "DIMS"),
    ("qwen3_layer", "layer", "DIMS"),
    ("gpt2_layer", "layer", "DIMS"),
    ("gpt2_layer", "starcoder2_layer", "STARCODER2_DIMS"),
    ("neox_parallel", "layer", "DIMS"),
    ("gemma2_layer", "layer", "DIMS"),
    ("unnamed_norm", "mlp", "DIMS"),
    ("lm_head_loss", "loss", "DIMS"),
    ("lm_head_loss", "logits_and_loss", "DIMS"),
    ("train_llama", "before", ""),
    ("train_llama", "between", ""),
    ("train_llama", "after", ""),
)
# Of these the PTX is kept, on both archs: file, block, the name of its sizes, trained or not.
COMPILED = (
    ("llama_mlp", "mlp", "DIMS", True),
    ("qwen3_layer", "layer", "DIMS", False),
    ("gpt2_layer", "layer", "DIMS", False),
    ("lm_head_loss", "loss", "DIMS", False),
)


# ---- The seams: what is read of coda --------------------------------------------------------


def coda_root():
    """The directory of the tree whose coda is imported."""
    import coda

    return Path(coda.__file__).parents[1]


@functools.cache
def named(name):
    """The function or class of this name at the top level of one of coda's modules."""
    root = coda_root()
    for file in sorted((root / "coda").rglob("*.py")):
        if re.search(rf"^(def|class) {name}\b", file.read_text(), re.M):
            dotted = ".".join(file.relative_to(root).with_suffix("").parts)
            return getattr(importlib.import_module(dotted.removesuffix(".__init__")), name)
    raise LookupError(f"coda has no {name}: edit the seams of {__file__}")


def source_of(program):
    """The generated modules of a Program, one after the other."""
    own = getattr(program, "source", None)
    return own() if own is not None else named("program_source")(program)


def text_of(program):
    """The Program as text."""
    own = getattr(program, "text", None)
    return own() if own is not None else named("show_program")(program)


def costs_of(program):
    """What `explain --json` tells of launches, bytes and times."""
    from coda.lowering.explain import Explanation

    return Explanation(program).json()


def outputs_of(program, inputs, exact=False):
    """The outputs of a Program on the reference backend; `exact`: in float64, never rounded."""
    return named("run_reference")(program, inputs, exact=exact)


def lowered(block, arch, dims, part, policy, dtype):
    """The Programs of a part: [inference], or [forward, backward] for "training"."""
    if part == "inference":
        return [block.lower(arch, dims, dtype=dtype, frozen=policy == "speed")]
    floats = [i.name for i in block.graph_of(dtype).inputs if i.dtype.kind == "float"]
    wanted = [n for n in floats if n not in TABLES]
    known = inspect.signature(block.lower_training).parameters
    word = "wanted" if "wanted" in known else "requires_grad"
    return block.lower_training(arch, dims, dtype=dtype, memory=policy, **{word: wanted})


def ptx_of(file, block, arch, dims, trained, cache):
    """The PTX of each kernel of a block by its name, compiled by the command line."""
    root = coda_root()
    target = f"{root / 'examples' / file}.py:{block}"
    sizes = ",".join(f"{k}={v}" for k, v in dims.items())
    call = [sys.executable, "-m", "coda", "compile", target, "--dims", sizes, "--arch", arch]
    call += ["--json", *(["--backward"] if trained else [])]
    environment = {**os.environ, "CODA_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    done = subprocess.run(
        call, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    found = {k["kernel"].replace(" ", "."): k["ptx"] for k in json.loads(done.stdout)}
    return {name: without_names(Path(path).read_text()) for name, path in found.items()}


def without_names(ptx):
    """PTX with its kernels numbered: their names hold paths of modules and digests of texts."""
    for i, name in enumerate(dict.fromkeys(re.findall(r"\.entry (\w+)", ptx))):
        ptx = ptx.replace(name, f"kernel{i}")
    return ptx


# ---- Blocks ---------------------------------------------------------------------------------


def example_block(file, name, dims):
    """An example: its block, dtype, small sizes and real sizes."""
    import coda

    module = runpy.run_path(str(coda_root() / "examples" / f"{file}.py"))
    block, every = module[name], module[dims] if dims else LLAMA
    sizes = [{s: table[s] for s in block.graph.symbols} for table in (SMALL, every)]
    return block, coda.bf16, *sizes


def random_block(seed):
    """A random block: itself, its dtype, its sizes and the memory policy that was drawn for it."""
    import coda

    space, name = {}, f"random_{seed:03d}"
    author = runpy.run_path(str(Path(__file__).with_name("random_blocks.py")))
    exec(compile(author["random_source"](seed), f"<{name}>", "exec"), space)
    block, draw = space[name], random.Random(f"policy {seed}").choice
    dtype = draw((coda.bf16, coda.bf16, coda.f32, coda.f16))
    sizes = {s: RANDOM_SIZES[s] for s in block.graph.symbols}
    return block, dtype, sizes, draw(POLICIES)


# ---- Entries --------------------------------------------------------------------------------


def random_input(node, sizes):
    """A seeded argument that depends on its name alone: activations around 0, gains around 1."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(node.name.encode()))
    shape = [d.size(sizes) for d in node.shape]
    if node.dtype.kind != "float":
        high = 2 if node.dtype.kind == "bool" else max(2, min(sizes.values(), default=2))
        return torch.randint(0, high, shape, generator=generator).to(node.dtype.torch)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if node.rank == 1:
        x = 1 + 0.1 * x
    elif node.name.startswith("w"):
        x = x / max(shape[-1], 1) ** 0.5
    return x.to(node.dtype.torch)


def facts_of(program):
    """Launches, bytes and microseconds of a Program; and the same of each kernel, as lines."""
    found = costs_of(program)
    kernels = found["kernels"]
    totals = ("launches", "hbm_bytes", "prepared_bytes", "temporary_bytes")
    facts = {name: found[name] for name in totals}
    facts["microseconds"] = sum(k["modelled_us"] for k in kernels)
    keys = ("read_bytes", "write_bytes", "flops", "modelled_us")
    lines = [f"{k['name']} {k['kind']} " + " ".join(f"{x} {k[x]!r}" for x in keys) for k in kernels]
    return facts, "\n".join(lines)


def relative(x, exact):
    """‖x − exact‖ / ‖exact‖ in float64."""
    difference = (x.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-300))


class Numbers:
    """The outputs of a part's Programs on the reference backend, beside those in float64."""

    def __init__(self):
        self.found, self.exact = {}, {}

    def run(self, program):
        """Run the next Program: what an earlier one returned is an argument, others are random.

        Returns: a line for each output, and the largest error.
        """
        import torch

        node_inputs = program.graph.inputs
        given = {i.name: random_input(i, program.sizes) for i in node_inputs}
        lines, worst = [], 0.0
        mine, exact = (
            outputs_of(program, [{**given, **before}[i.name] for i in node_inputs], wide)
            for before, wide in ((self.found, False), (self.exact, True))
        )
        for (name, _), x, y in zip(program.graph.outputs, mine, exact, strict=True):
            self.found[name], self.exact[name] = x, y
            bits = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest = hashlib.sha256(bits).hexdigest()[:24]
            error = relative(x, y) if x.is_floating_point() else 0.0
            lines.append(f"{name} {list(x.shape)} {x.dtype} {digest} error {error:.6e}")
            worst = max(worst, error)
        return "\n".join(lines), worst


def failure(error):
    """An error as text: its class and what it says, without the place in the block's file."""
    said = [getattr(error, k, "") for k in ("message", "found", "help")]
    return "\n".join([type(error).__name__, *(said if said[0] else [str(error)])])


def entry_of(program, numbers):
    """The sections of a Program, by their names. Where a kernel cannot be emitted: why."""
    facts, kernels = facts_of(program)
    try:
        sources = source_of(program)
    except Exception as e:
        sources = failure(e)
    sections = {
        "graph": str(program.graph),
        "normal": str(program.normal),
        "program": text_of(program),
        "sources": sources,
        "costs": kernels,
    }
    if numbers is not None:
        sections["bits"], facts["error"] = numbers.run(program)
    lines = "\n".join(f"{k} {v!r}" for k, v in facts.items())
    return {"facts": lines, **sections}


def entries_of(name, block, dtype, sizes, programs, is_asked):
    """(name of the entry, its sections) of a block on both archs, for each (part, policy)."""
    for arch, (part, policy) in itertools.product(ARCHS, programs):
        names = ("forward", "backward") if part == "training" else (part,)
        names = [f"{name}.{arch}.{one}.{policy}" for one in names]
        if not any(map(is_asked, names)):
            continue
        numbers = Numbers() if name.endswith(".small") else None
        try:
            found = lowered(block, arch, sizes, part, policy, dtype)
            for one, program in zip(names, found, strict=True):
                yield one, entry_of(program, numbers)
        except Exception as e:
            yield f"{names[-1]}.error", {"error": failure(e)}


def all_entries(options):
    """Every entry that the options ask for."""
    programs = [("inference", p) for p in ("balanced", "speed")]
    programs += [("training", p) for p in (("balanced",) if options.quick else POLICIES)]

    def is_asked(name):
        return name.startswith(options.only) or options.only.startswith(name)

    for file, name, dims in EXAMPLES:
        if is_asked(head := f"{file}.{name}"):
            block, dtype, small, real = example_block(file, name, dims)
            for which, sizes in (("small", small), ("real", real)):
                yield from entries_of(f"{head}.{which}", block, dtype, sizes, programs, is_asked)
    for seed in range(0 if options.quick else RANDOM_BLOCKS):
        if is_asked(head := f"random_{seed:03d}"):
            block, dtype, small, policy = random_block(seed)
            drawn = [("inference", policy), ("training", policy)]
            yield from entries_of(f"{head}.small", block, dtype, small, drawn, is_asked)
    if options.ptx:
        with tempfile.TemporaryDirectory() as cache:
            for file, name, dims, trained in COMPILED:
                sizes = example_block(file, name, dims)[-1]
                for arch in ARCHS:
                    if is_asked(head := f"{file}.{name}.ptx.{arch}"):
                        found = ptx_of(file, name, arch, sizes, trained, cache)
                        yield from ((f"{head}.{k}", {"ptx": v}) for k, v in found.items())


def write(options):
    """Write the corpus of the coda that is imported."""
    import torch

    torch.set_num_threads(1)
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        sys.exit(f"{directory} is not empty")
    count, failures, whole = 0, Counter(), hashlib.sha256()
    asked = (pair for pair in all_entries(options) if pair[0].startswith(options.only))
    for name, sections in asked:
        text = "".join(f"==== {k} ====\n{v.rstrip()}\n" for k, v in sections.items())
        (directory / f"{name}.txt").write_text(text)
        count += 1
        failures.update([sections["error"]] if "error" in sections else [])
        whole.update(f"{name}\n{text}".encode())
        if count == failures.total() == 20:
            break
    for text, times in failures.most_common(5):
        print(f"  {times} times {text.splitlines()}")
    print(f"{count} entries of {coda_root()}, {failures.total()} of them errors, in", end=" ")
    print(f"{time.process_time():.0f} s of one core; digest {whole.hexdigest()[:16]}")
    if count == failures.total():
        sys.exit("all entries are errors: coda is broken, or a seam of this script has moved")


# ---- Comparing ------------------------------------------------------------------------------


def renamer(path):
    """text -> text with whole dotted names replaced, as the lines `old new` of a file say."""
    lines = path.read_text().splitlines() if path else []
    table = {old: new for old, new in (line.split() for line in lines if line.strip())}
    if not table:
        return lambda text: text
    longest = sorted(table, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, longest))})(?!\w)")
    return lambda text: pattern.sub(lambda m: table[m[1]], text)


def sections_of(text):
    """An entry's sections by their names."""
    parts = re.split(r"^==== (\w+) ====\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def costs_between(old, new):
    """What launches, bytes, times and errors are before and after, and whether it got worse."""
    found = []
    tables = [dict(line.split() for line in x.get("facts", "").splitlines()) for x in (old, new)]
    for key in tables[0].keys() & tables[1].keys():
        before, after = (float(t[key]) for t in tables)
        margin = 0.01 * before if key == "error" else 0.0
        if before != after:
            word = "worse" if after > before + margin else "better"
            word = "alike" if abs(after - before) <= margin else word
            found.append(f"{key} {tables[0][key]} -> {tables[1][key]} {word}")
    return sorted(found)


def compare(options):
    """Print what moved between two corpora; exit with 1 if anything did."""
    renamed = renamer(options.renames)
    old, new = (
        {f.stem: f.read_text() for f in sorted(d.glob("*.txt"))} for d in (options.old, options.new)
    )
    if not old or not new:
        sys.exit(f"there is no corpus in {options.new if old else options.old}")
    names = sorted(new.keys() if options.subset else old.keys() | new.keys())
    moved, kinds, notes, diffs = 0, Counter(), [], []
    for name in names:
        if name not in old or name not in new:
            moved += 1
            notes.append(f"  {name}   only in {options.old if name in old else options.new}")
            continue
        before, after = renamed(old[name]), new[name]
        if before == after:
            continue
        moved += 1
        a, b = sections_of(before), sections_of(after)
        differ = [k for k in (a | b) if a.get(k) != b.get(k)]
        kinds.update(differ)
        notes.append(f"  {name}   {', '.join(differ)}")
        costs = costs_between(a, b)
        notes += [f"      {', '.join(costs)}"] if costs else []
        if len(diffs) < options.diffs:
            lines = before.splitlines(), after.splitlines()
            diffs.append("\n".join(difflib.unified_diff(*lines, name, name, lineterm="", n=2)))
    what = f": {', '.join(f'{k} {n}' for k, n in kinds.items())}" if kinds else ""
    print(f"{len(names) - moved} of {len(names)} entries are equal, {moved} moved{what}")
    print(*notes, *diffs, sep="\n", end="\n" if notes else "")
    return 1 if moved else 0


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write", help="write the corpus of the coda that is imported")
    writer.add_argument("directory", type=Path)
    writer.add_argument("--quick", action="store_true", help="examples with one policy")
    writer.add_argument("--only", default="", help="entries whose names begin so")
    writer.add_argument("--ptx", action="store_true", help="also the PTX of some kernels")
    writer.set_defaults(run=write)
    comparer = commands.add_parser("compare", help="print what moved; exit with 1 if anything did")
    comparer.add_argument("old", type=Path)
    comparer.add_argument("new", type=Path)
    comparer.add_argument("--renames", type=Path, help="a file of lines `old new`")
    comparer.add_argument("--subset", action="store_true", help="NEW was written of some entries")
    comparer.add_argument("--diffs", type=int, default=3, help="how many diffs to print")
    comparer.set_defaults(run=compare)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
