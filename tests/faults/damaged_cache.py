"""A simulator cache that lost or broke the PTX of a kernel compiles it again.

What is right: a cache is never needed. An object file that does not load is deleted and compiled
again (so before); the PTX beside it must be treated likewise. Before, a missing file ended in SimError
("only its cubin is there"), a damaged one in gzip.BadGzipFile or EOFError, which are no SimError, and
it stays so in each later process until somebody deletes the cache. The same for the compiled shim:
an empty one is OSError, a truncated one kills the process (SIGBUS): it is loaded because it is there.
What is loaded should be checked: a digest of the object, the PTX and the shim written beside them
costs microseconds, and a flipped bit in an object's cubin would otherwise run on a GPU.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import sys
import torch
import coda.sim
import quack

x = torch.randn(4, 128)
with coda.sim.device("sm_90a", cache=sys.argv[1]):
    y = quack.softmax(x)
assert torch.allclose(y, x.softmax(-1), atol=1e-5)
"""


def process(directory: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE, directory], capture_output=True, text=True, check=False
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return "" if done.returncode == 0 else f"exit {done.returncode}: {last[:90]}"


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HURTS = (
    ("PTX deleted", "**/*.ptx.gz", Path.unlink),
    ("PTX truncated", "**/*.ptx.gz", halve),
    ("object truncated", "**/*.o", halve),
    ("shim truncated", "**/*.so", halve),
)
bad = 0
for name, pattern, hurt in HURTS:
    with tempfile.TemporaryDirectory() as d:
        assert not process(d)
        for path in Path(d).glob(pattern):
            hurt(path)
        after = process(d)
        bad += bool(after)
        print(f"{name}: {after or 'healed'}")
sys.exit(bool(bad))
