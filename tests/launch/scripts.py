"""The launchers, and stand-ins for the programs they start."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def load(name):
    """A Python launcher as a module."""
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(folder, name, text):
    """An executable in `folder`, which goes in front of PATH."""
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(command, *, cwd, path=None, **environment):
    """Starts a command with `path` in front of PATH; its output is one text."""
    base = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES")}
    if path:
        base["PATH"] = f"{path}{os.pathsep}{base['PATH']}"
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={**base, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def multiprocess(*flags, cwd, **environment):
    """Starts launch/multiprocess.py."""
    return start([sys.executable, LAUNCH / "multiprocess.py", *flags], cwd=cwd, **environment)
