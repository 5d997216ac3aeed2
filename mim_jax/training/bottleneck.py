"""What limits a run that waits for its data, and which setting helps."""

import os

import ml_collections
import numpy as np

from mim_jax.data.decode import choose_backend
from mim_jax.data.pipeline import reading_threads
from mim_jax.data.stages import STAGES

TOLERATED_WAIT = 0.1
"""Share of the time that a run may wait for data without a word."""

ENOUGH_SECONDS = 1.0
"""Shortest time that a verdict is built on; single steps vary."""

LIMITS = {
    "read": "reading files limits",
    "decode": "decoding limits",
    "load": "reading and decoding limits",
    "augment": "cropping and augmentation limits",
    "pipeline": "making and handing over batches in Python limits",
    "transfer": "the transfer to the devices limits",
}

IN_MEMORY = ("embedded", "fashion_mnist")

CONVERSION_GAIN = {
    256: " (measured: 2.4 times as fast from JPEGs of 500 x 375, 27 times from 2000 x 1500)"
}
"""By the short side of the new files: images a second of one core, over those of the old ones.

`benchmarks/results/data_loading.json`; sizes that were not measured have no entry."""


class DataDoctor:
    """Finds the slowest stage between the disk and the devices.

    The threads that make batches time their stages. The pipeline's own are Python outside of them,
    and waiting that they do not explain, as they were idle: for the way from worker processes.
    """

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        """Starts without evidence, and passes over what it gets first: that filled the queues."""
        self._config = config
        self._told: str | None = None
        self._is_warm = False
        self._start()

    def _start(self) -> None:
        self._stages = np.zeros(len(STAGES))
        self._seconds = self._waiting = self._transfer = 0.0

    def made(self, seconds: np.ndarray) -> None:
        """Adds a batch: the seconds that it took in each of `STAGES`."""
        self._stages += seconds

    def advice(self, seconds: float, waiting: float, transfer: float) -> str | None:
        """One line if data limits the run by something that the last line did not name.

        Args:
            seconds: since the last call.
            waiting: of these, how long the devices waited for a batch.
            transfer: and how long they waited for one that was on its way to them.
        """
        self._seconds += seconds
        self._waiting += waiting
        self._transfer += transfer
        if self._seconds < ENOUGH_SECONDS:
            return None
        wait = min(1.0, (self._waiting + self._transfer) / self._seconds)
        limit, share = self._limit()
        is_warm, self._is_warm = self._is_warm, True
        self._start()
        if not is_warm or wait <= TOLERATED_WAIT or limit == self._told:
            return None
        self._told = limit
        whose = "the wait" if limit == "transfer" else f"the time of {self._makers_in_words()}"
        help_ = "; ".join(self._settings(limit))
        return f"data wait {wait:.0%}: {LIMITS[limit]} ({share:.0%} of {whose}). Helps: {help_}."

    def _limit(self) -> tuple[str, float]:
        """What takes most of the time, and its share."""
        waited = self._waiting + self._transfer
        if self._transfer > self._waiting:
            return "transfer", self._transfer / waited
        spent = dict(zip(STAGES, self._stages.tolist()))
        unexplained = max(0.0, self._waiting * self._makers - sum(spent.values()))
        spent["pipeline"] = spent.pop("other") + unexplained
        limit = max(spent, key=lambda name: spent[name])
        return limit, spent[limit] / max(sum(spent.values()), 1e-9)

    @property
    def _makers(self) -> int:
        """Threads that make batches, over all worker processes."""
        workers = self._config.data.workers
        return max(1, workers) * reading_threads(workers)

    def _makers_in_words(self) -> str:
        workers = self._config.data.workers
        kind, count = ("worker process", workers) if workers else ("thread", self._makers)
        plural = "" if count == 1 else "es" if workers else "s"
        return f"{count} {kind}{plural}"

    def _settings(self, limit: str) -> list[str]:
        """Settings that help, the simplest first."""
        data = self._config.data
        if limit == "transfer":
            lighter = ["data.bits=8"] if data.bits > 8 else []
            return [*lighter, "a smaller data.image_size", "more processes, each with its devices"]
        cores = os.cpu_count() or 1
        # Who waits for a disk, or for Python's lock, keeps no core busy; the others do.
        useful = {"read": 2 * cores, "load": 2 * cores, "pipeline": cores}
        in_use = data.workers if limit == "pipeline" else self._makers
        settings = []
        if in_use < useful.get(limit, cores):
            settings.append(f"data.workers={useful.get(limit, cores)}")
        if limit != "read" and choose_backend(data.backend) != "opencv":
            settings.append("data.backend=opencv")
        if limit in ("read", "decode", "load") and data.source not in IN_MEMORY:
            short_side = round(max(data.image_size) / 0.875)  # 256 for 224
            settings.append(
                f"smaller files by mim-jax data convert --source={data.source} --output=FOLDER "
                f"--short-side={short_side}{CONVERSION_GAIN.get(short_side, '')}"
            )
        if limit == "augment" and data.augment:
            settings.append("a lighter data.augment")
        if limit in ("augment", "pipeline"):
            settings.append("a smaller data.image_size")
        return settings or ["a machine with more CPU cores"]
