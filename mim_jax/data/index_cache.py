"""Where indices of folders and shards are kept between runs."""

import hashlib
import os
import pathlib

CACHE_VARIABLE = "MIM_JAX_INDEX_CACHE"
"""Names the folder; an empty text keeps nothing."""


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
