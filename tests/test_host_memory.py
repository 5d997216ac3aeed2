import ctypes
import platform
import subprocess
import sys

import pytest

from mim_jax import host_memory

FAULTS_OF_A_SECOND_ARRAY = """
import resource
import numpy as np
from mim_jax.host_memory import keep_freed_memory
{call}
np.ones(2**26, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**26, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    """Pages that the kernel maps anew for 64 MiB, after as much was freed."""
    program = [sys.executable, "-c", FAULTS_OF_A_SECOND_ARRAY.format(call=call)]
    return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_freed_memory_is_used_again_without_the_kernel():
    assert faults("assert keep_freed_memory()") < 100 < faults("")


def test_a_machine_with_an_accelerator_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(host_memory, "entry_points", lambda group: [group])
    assert not host_memory.keep_freed_memory()


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed_memory()
