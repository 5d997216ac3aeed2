"""Eight simulated devices, exact matrix products and quick compilation for all tests.

Models are so small here that compiling them takes longer than running them, so the compiler does
not optimize, fuses by its older and three times quicker emitters where it has them, and keeps
programs for other tests and other processes.
"""

import os
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    # Later ones have no choice of emitters, and end a process that asks for it.
    "--xla_cpu_use_fusion_emitters=false "
    * (tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11))
    + os.environ.get("XLA_FLAGS", "")  # the last of two counts, so a user may choose
    + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
