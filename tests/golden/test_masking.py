"""Masks against the official samplers, their random numbers replayed."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.masking import (
    bernoulli_kept,
    block_mask,
    blockwise_kept,
    disjoint_counts,
    disjoint_masking,
    mask_triples,
    random_masking,
    uniform_kept,
    weighted_masking,
)
from tests.golden.cases import Case, case_params, mask_major


def attempts_of(calls: np.ndarray) -> np.ndarray:
    """Recorded calls (kind, low, high, value) of one image as four uniform numbers an attempt."""
    attempts, i = [], 0
    while i < len(calls):
        pair, i = calls[i : i + 2], i + 2
        uniform = [(x - low) / (high - low) if high != low else 0 for _, low, high, x in pair]
        place = []
        if i < len(calls) and calls[i][0] == 1:
            place, i = calls[i : i + 2], i + 2
        uniform += [(x - low + 0.5) / (high - low + 1) for _, low, high, x in place]
        attempts.append(uniform + [0] * (4 - len(uniform)))
    return np.asarray(attempts, np.float32)


def replayed(calls, starts, grid, masked, min_block, max_block=None) -> np.ndarray:
    """Block masks `[images, tokens]` from recorded calls."""
    tables = [attempts_of(calls[a:b]) for a, b in itertools.pairwise(starts)]
    longest = max(len(table) for table in tables)
    padded = [np.pad(table, ((0, longest - len(table)), (0, 0))) for table in tables]

    def one(table: jax.Array) -> jax.Array:
        draw = table.__getitem__
        return block_mask(draw, grid, masked, min_block=min_block, max_block=max_block)

    return np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(np.stack(padded))))


@pytest.mark.parametrize("path", case_params("cae", "mask"))
def test_block_masks_of_cae_match(path):
    case = Case(path)
    names = sorted({key.split("/")[0] for key in case.group("out")} - {"random"})
    assert names
    for name in names:
        masks = case[f"out/{name}/masks"]
        _, *grid = masks.shape
        setting = re.fullmatch(r"g[\dx]+_(\d+)(?:_max(\d+))?", name)
        assert setting, name
        draws = case.group(f"draw/{name}")
        calls, starts = draws["calls"], draws["call_start"]
        # The first call draws an area, from the smallest block on.
        ours = replayed(
            calls,
            starts,
            tuple(grid),
            masked=int(setting[1]),
            min_block=int(calls[0, 1]),
            max_block=int(setting[2]) if setting[2] else None,
        )
        np.testing.assert_array_equal(ours.reshape(masks.shape), masks, err_msg=name)


@pytest.mark.parametrize("path", case_params("cae", "mask"))
def test_random_masks_of_cae_match(path):
    case = Case(path)
    permutation = case["draw/random/permutation"]
    masked = int(case.cfg["random_ratio"] * permutation.shape[1])
    ours = random_masking(jnp.asarray(permutation), permutation.shape[1] - masked).mask
    np.testing.assert_array_equal(ours, case["out/random/masks"])


@pytest.mark.parametrize("path", case_params("cae"))
def test_the_mask_of_a_step_of_cae_matches(path):
    case, cfg = Case(path), Case(path).cfg
    side = cfg["img_size"] // cfg["patch_size"]
    ours = replayed(
        case["draw/mask_random_calls"],
        case["draw/mask_call_start"],
        (side, side),
        cfg["num_mask_patches"],
        cfg["min_block"],
    )
    np.testing.assert_array_equal(ours, case["in/bool_masked_pos"])


@pytest.mark.parametrize("path", case_params("dmjd", "mask"))
def test_disjoint_views_of_dmjd_match(path):
    case = Case(path)
    side = case.cfg["grid"]
    names = sorted({key.split("/")[0] for key in case.group("draw")})
    assert names
    for name in names:
        kind, mask_ratio, prediction_ratio = name.split("_")
        draws, golden = case.group(f"draw/{name}"), case.group(f"out/{name}")
        blocks = (side // 2, side // 2) if kind == "block" else None
        units = math.prod(blocks) if blocks else side * side
        kept, swapped = disjoint_counts(
            units, int(mask_ratio[1:]) / 100, int(prediction_ratio[1:]) / 100
        )
        assert kept == len(draws["perm_visible"])
        ours = disjoint_masking(
            jnp.asarray(draws["noise"]),
            jnp.asarray(draws["perm_visible"]),
            jnp.asarray(draws["perm_masked"]),
            swapped,
            blocks,
        )
        for part, key in zip(ours, ("ids_keep", "ids_restore", "mask"), strict=True):
            np.testing.assert_array_equal(mask_major(part, 2), golden[key], err_msg=name)


@pytest.mark.parametrize("path", case_params("maskalign"))
def test_tokens_that_maskalign_draws_by_attention_match(path):
    case = Case(path)
    kept = case.cfg["len_keep"]
    ours = weighted_masking(
        jnp.asarray(case["draw/exponential"]), jnp.asarray(case["out/importance"]), kept
    )
    np.testing.assert_array_equal(ours.keep_ids, case["out/ids_keep"])
    np.testing.assert_array_equal(np.argsort(ours.restore_ids, axis=1), case["out/ids_shuffle"])


@pytest.mark.parametrize("path", case_params("mr_mae"))
def test_tokens_that_mr_mae_draws_by_attention_match(path):
    case = Case(path)
    ours = weighted_masking(
        jnp.asarray(case["draw/exponential"]),
        jnp.asarray(case["out/teacher_cls_attention"]),
        case.cfg["len_keep"],
    )
    np.testing.assert_array_equal(ours.keep_ids, case["out/attentive_ids_keep"])
    np.testing.assert_array_equal(ours.mask, case["out/attentive_mask"])


def block_draws(random: np.random.Generator, side: int, share: float) -> np.ndarray:
    """The official sampler's calls for one image, as four uniform numbers a rectangle."""
    largest, mask, rows = int(share * side**2), np.zeros((side, side)), []
    while mask.mean() < share:
        area = random.integers(16, largest)
        aspect = random.uniform(0.3, 1 / 0.3)
        height = min(int(math.sqrt(area / aspect)), side)
        width = min(int(area / height), side)
        top = random.integers(0, side - height + 1)
        left = random.integers(0, side - width + 1)
        mask[top : top + height, left : left + width] = 1
        rows.append(
            [
                (area - 16 + 0.5) / (largest - 16),
                (aspect - 0.3) / (1 / 0.3 - 0.3),
                (top + 0.5) / (side - height + 1),
                (left + 0.5) / (side - width + 1),
            ]
        )
    return np.asarray(rows, np.float32)


@pytest.mark.parametrize("path", case_params("locality_alignment"))
def test_mask_samplers_of_locality_alignment_match(path):
    case = Case(path)
    cfg, samples = case.cfg, case.group("out/sampler")
    assert samples
    for name, golden in samples.items():
        kind, complement, null = name.split("_")
        complement, null = complement == "anti1", null == "null1"
        rows = 1 + complement + null
        random = np.random.default_rng(cfg["sampler_seed"])
        if kind == "blockwise":
            side, share = cfg["blockwise"]["side"], cfg["blockwise"]["target_ratio"]
            kept = []
            for _ in range(len(golden) // rows):
                table = jnp.asarray(block_draws(random, side, share))
                kept.append(blockwise_kept(table.__getitem__, (side, side), share=share))
            kept = jnp.stack(kept)
        elif kind == "uniform":
            kept = uniform_kept(random.uniform(size=(len(golden), 1 + golden.shape[1]))[::rows])
        else:
            uniform = random.uniform(size=golden.shape)[::rows]
            kept = bernoulli_kept(jnp.asarray(uniform), cfg["bernoulli_ratio"])
        ours = mask_triples(
            kept, complement=complement, null=null, null_value=0.0 if kind == "blockwise" else 1.0
        )
        np.testing.assert_array_equal(ours, golden, err_msg=name)


@pytest.mark.parametrize("path", case_params("locality_alignment"))
def test_the_masks_of_a_step_of_locality_alignment_match(path):
    case = Case(path)
    kept = uniform_kept(case["draw/uniform"][::3])
    np.testing.assert_array_equal(mask_triples(kept), case["out/mask"])
