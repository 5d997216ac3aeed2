"""Batches on their way to the devices."""

import time

import jax
import ml_collections
import numpy as np

from mim_jax.training.feed import DeviceFeed
from mim_jax.training.sharding import batch_sharding, make_mesh


def sharding(devices):
    config = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    return batch_sharding(make_mesh(config, jax.devices()[:devices]))


def test_batches_come_in_order_and_whole():
    batches = [{"image": np.full((8, 2), i, np.uint8)} for i in range(5)]
    received = list(DeviceFeed(iter(batches), sharding(4)))
    assert len(received) == 5
    for i, batch in enumerate(received):
        assert len(batch["image"].sharding.device_set) == 4
        np.testing.assert_array_equal(batch["image"], batches[i]["image"])


def test_waiting_is_measured():
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield {"image": np.full((8, 2), i, np.uint8)}

    feed = DeviceFeed(slow(), sharding(1))
    list(feed)
    assert 0.1 < feed.seconds_waited < 2
