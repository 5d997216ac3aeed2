"""How the C library manages this process's memory, where that decides the speed of a step."""

import ctypes
from importlib.metadata import entry_points
from importlib.util import find_spec

# Parameters of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees; returns whether the C library can.

    On CPU, XLA allocates the temporary arrays of a step as one block and frees it at the end of
    the step. glibc gives so large a block back to the kernel, which must map and clear every page
    of it again for the next step: a tenth of the step at best, more than half on some virtual
    machines. With one arena, no separate mappings and no trimming the pages stay.

    Call it before JAX starts its threads. Other C libraries (macOS, Windows, musl) are left as
    they are, and so is a machine on which JAX has an accelerator to compute with.
    """
    if entry_points(group="jax_plugins") or find_spec("libtpu"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) == 1 for name, value in settings])
