"""The heap keeps freed memory: another tensor of the same size causes no page faults."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from megamask.runtime.cpu_memory import keep_freed_memory, return_freed_memory
torch.set_num_threads(1)
if {keep}:
    assert keep_freed_memory()
if {undo}:
    assert return_freed_memory()
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
    def count(keep: bool, undo: bool = False) -> int:
        code = FAULTS.format(keep=keep, undo=undo)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    kept, returned = count(keep=True), count(keep=False)
    assert kept * 3 < returned
    assert count(keep=True, undo=True) * 3 > returned * 2, "what the Trainer has beside megamask in the benchmark"
