"""The heap keeps freed memory: another tensor of the same size causes no page faults."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from megamask.runtime.cpu_memory import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2 ** 24).fill_(1)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):
    faults()
print(sum(faults() for _ in range(10)))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_used_again():
    def count(keep: bool) -> int:
        run = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    assert count(keep=True) * 3 < count(keep=False)
