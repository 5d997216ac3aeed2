"""From host batches to batches on the devices, a step ahead of the computation."""

import collections
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

HostBatch = Mapping[str, np.ndarray]
DeviceBatch = dict[str, jax.Array]


class DeviceFeed:
    """Batches on the devices, transferred while earlier ones are computed with.

    Attributes:
        seconds_waited: time for which the host had no batch ready when it was asked for one.
        seconds_sending: time that the host took to hand batches to the devices.
    """

    def __init__(
        self, batches: Iterator[HostBatch], sharding: NamedSharding, ahead: int = 2
    ) -> None:
        """Takes host batches, each with this process's rows of the global batch.

        Args:
            batches: dictionaries of arrays, all of one shape.
            sharding: of the batch axis.
            ahead: batches kept on the devices beside the one in use.
        """
        self.seconds_waited = self.seconds_sending = 0.0
        self._batches = batches
        self._sharding = sharding
        self._ahead = ahead
        self._queue: collections.deque[DeviceBatch] = collections.deque()

    def __iter__(self) -> "DeviceFeed":
        return self

    def __next__(self) -> DeviceBatch:
        while len(self._queue) < self._ahead:
            start = time.perf_counter()
            batch = next(self._batches, None)
            ready = time.perf_counter()
            self.seconds_waited += ready - start
            if batch is None:
                break
            self._queue.append(self._put(batch))
            self.seconds_sending += time.perf_counter() - ready
        if not self._queue:
            raise StopIteration
        return self._queue.popleft()

    def _put(self, batch: HostBatch) -> DeviceBatch:
        return {
            name: jax.make_array_from_process_local_data(self._sharding, array)
            for name, array in batch.items()
        }
