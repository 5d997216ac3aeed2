#!/usr/bin/env python3
"""Sets up a virtual environment in this checkout, once, and runs a command in it.

    python3 launch/start.py mim-jax train --config mae:tiny
    python3 launch/start.py --extra test python -m pytest -n 2 --dist loadscope

Needs only Python 3.11 to 3.13 with `venv`. The environment is .venv, or the folder named by
MIM_JAX_VENV; it is made again when pyproject.toml or the Python version changes.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs the command and returns its exit code."""
    arguments = sys.argv[1:]
    extras = []
    while arguments[:1] == ["--extra"] and len(arguments) > 1:
        extras.append(arguments[1])
        arguments = arguments[2:]
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        version = ".".join(map(str, sys.version_info[:2]))
        print(f"error: this is Python {version}; mim_jax needs 3.11, 3.12 or 3.13.")
        return 2
    folder = Path(os.environ.get("MIM_JAX_VENV", ROOT / ".venv")).absolute()
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    install(folder, binaries, sorted(extras))
    environment = dict(os.environ, PATH=f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}")
    environment["VIRTUAL_ENV"] = str(folder)
    # On CPU, XLA asks for the memory of a step anew each time; huge pages make that cheap.
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if arguments[0] == "python":
        arguments[0] = str(binaries / "python")
    elif (binaries / arguments[0]).exists():
        arguments[0] = str(binaries / arguments[0])
    if os.name == "nt":
        return subprocess.call(arguments, env=environment)
    os.execvpe(arguments[0], arguments, environment)  # signals reach the command itself


def install(folder: Path, binaries: Path, extras: list[str]) -> None:
    """Makes the environment and installs the package, unless that was done already."""
    stamp = folder / ".mim_jax"
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + f"{sys.version}{ROOT}".encode()
    ).hexdigest()
    done = stamp.read_text().split() if stamp.is_file() else []
    if done[:1] == [wanted] and set(extras) <= set(done[1:]):
        return
    print(f"setting up {folder} (a few minutes at most)", flush=True)
    if done[:1] != [wanted]:
        try:
            venv.create(folder, with_pip=True, clear=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"error: could not make a virtual environment in {folder}: {error}\n"
                "On Debian and Ubuntu: apt install python3-venv."
            ) from error
        done = [wanted]
    extras = sorted({*extras, *done[1:]})
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    command = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--editable", target]
    if subprocess.call(command, stdout=sys.stderr):
        raise SystemExit("error: pip could not install mim_jax; its message is above.")
    stamp.write_text(" ".join([wanted, *extras]))


if __name__ == "__main__":
    sys.exit(main())
