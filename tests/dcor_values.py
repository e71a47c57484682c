"""The `dcor` package in a process of its own.

It compiles with numba when it is imported. Beside torch that has aborted a process where nothing was compiled yet, and
numba's OpenMP layer takes all cores from torch whatever OMP_NUM_THREADS says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

from torch import Tensor

SERVER = """
import json, sys
import dcor, numpy
for line in sys.stdin:
    name, x, y = json.loads(line)
    print(float(getattr(dcor, name)(numpy.array(x), numpy.array(y), method="naive")), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def dcor_value(name: str, x: Tensor, y: Tensor) -> float:
    """dcor.NAME(x, y, method="naive") in float64; numbers travel with all their digits."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([name, x.double().tolist(), y.double().tolist()]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the process that runs dcor ended with {server.wait()}"
    return float(answer)
