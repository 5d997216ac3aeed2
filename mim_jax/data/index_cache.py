"""Where indices of folders and shards are kept between runs."""

import hashlib
import logging
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

CACHE_VARIABLE = "MIM_JAX_INDEX_CACHE"
"""Names the folder; an empty text keeps nothing."""

_log = logging.getLogger(__name__)


def index_file(prefix: str, *identity: object) -> pathlib.Path | None:
    """The file of one index in `~/.cache/mim_jax/index`, or None if nothing is to be kept.

    Args:
        prefix: of the file's name.
        identity: what the index belongs to, such as a path with its size and time.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(home, "mim_jax", "index")
    text = os.fsencode("\0".join(map(str, identity)))
    name = f"{prefix}{hashlib.sha256(text).hexdigest()[:32]}.npz"
    return pathlib.Path(folder, name) if folder else None


def keep_index(file: pathlib.Path, of: object, **arrays: Any) -> None:
    """Write an index at once; several processes may do so together.

    What cannot be written is said in a warning, and made anew the next time.

    Args:
        file: see `index_file`.
        of: what the index is of, for the warning.
        **arrays: by the names under which `np.load` gives them back.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as unfinished:
            np.savez(os.path.join(unfinished, file.name), **arrays)
            os.replace(os.path.join(unfinished, file.name), file)
    except OSError as error:
        _log.warning(
            "the index of %s cannot be kept in %s (%s), so it is made anew each time; set %s to a "
            "folder that can be written, or to an empty text",
            of, file.parent, error.strerror, CACHE_VARIABLE,
        )  # fmt: skip
