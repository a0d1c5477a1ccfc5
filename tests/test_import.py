"""What `import coda` loads, and what it leaves behind in the process."""

import json
import subprocess
import sys

CODE = """
import json, sys
import torch
modules = set(sys.modules)
from torch.optim import optimizer
hooks = len(optimizer._global_optimizer_post_hooks)
import coda
print(json.dumps({
    "modules": sorted(m for m in sys.modules if m not in modules),
    "hooks": len(optimizer._global_optimizer_post_hooks) - hooks,
}))
"""


def test_import_is_light():
    """Neither torch's compiler nor what only some calls need, and no hook on torch's optimizers."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    heavy = {"torch._dynamo", "sympy", "quack", "cutlass", "transformers", "rich"}
    assert not heavy & set(found["modules"])
    assert found["hooks"] == 0
