"""Programs that are compared with reference numbers are compiled with optimizations.

They still fuse by the emitters of the other tests, since a process has one choice; before jaxlib
0.11 they fuse as users' programs do with `XLA_FLAGS=--xla_cpu_use_fusion_emitters=true python -m
pytest tests/golden`.
"""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def optimized():
    """Without optimizations the order of sums is another, and so is round-off."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
