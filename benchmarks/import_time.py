"""CPU time of `import coda` beyond torch, over `import torch`: the median of some processes.

python benchmarks/import_time.py [processes]
"""

import json
import statistics
import subprocess
import sys

CODE = """
import json, time
import torch
torch_s = time.process_time()
import coda
print(json.dumps([time.process_time() - torch_s, torch_s]))
"""


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ratios = []
    for _ in range(count):
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
        )
        coda_s, torch_s = json.loads(done.stdout)
        ratios.append(coda_s / torch_s)
    print(f"import coda: {statistics.median(ratios):.2f} of torch's CPU time, beyond torch")


if __name__ == "__main__":
    main()
