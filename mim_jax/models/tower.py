"""Image towers that others trained (CLIP, SigLIP, DINO, MAE, BEiT, ...), as teachers that see.

A tower is a ViT with what its family puts on top, and the statistics of the images it was trained
on. Used frozen: what `see` gives carries no gradient.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.positions import bicubic_matrix
from mim_jax.models.transformer import (
    ATTENTION,
    Mlp,
    Transformer,
    class_attention,
    layer_norm,
)
from mim_jax.models.vit import ViT, vit_size

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of the channels, for values in [0, 1], of three families."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What the towers of one origin have in common.

    Attributes:
        encoder: fields of `ViT`.
        blocks: fields of `Transformer`.
        statistics: mean and standard deviation of the images.
        block_position_bias: every block has a `RelativePositionBias` of the encoder's grid.
        pool: see `Tower`.
    """

    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    block_position_bias: bool = False
    pool: str = "token"


POOLS = ("token", "mean", "attention")
"""See `Tower`."""

_CLIP_ENCODER = dict(positions="learned", pre_norm=True, patch_bias=False)

FAMILIES: dict[str, Family] = {
    "mae": Family(),
    "vit": Family(dict(positions="learned"), statistics=HALF),
    "cae": Family(
        dict(positions="sincos_row_first"), dict(qkv_bias="query_value", layer_scale=0.1)
    ),
    "clip": Family(_CLIP_ENCODER, dict(activation="quick_gelu", epsilon=1e-5), CLIP),
    "openclip": Family(_CLIP_ENCODER, dict(epsilon=1e-5), CLIP),
    "siglip": Family(
        dict(positions="learned", class_token=False, floor_grid=True),
        dict(activation="gelu_tanh"),
        HALF,
        pool="attention",
    ),
    "dino": Family(dict(positions="learned"), dict(epsilon=1e-12)),
    "dinov2": Family(dict(positions="learned"), dict(layer_scale=1.0)),
    "beit": Family(
        dict(positions="none", shared_position_bias=True),
        dict(qkv_bias="query_value", layer_scale=0.1, epsilon=1e-12),
        HALF,
    ),
    "beit_finetuned": Family(
        dict(positions="none"),
        dict(qkv_bias="query_value", layer_scale=0.1, epsilon=1e-12),
        HALF,
        block_position_bias=True,
        pool="mean",
    ),
}
"""Families by name; "vit" is a supervised ViT of timm, "openclip" a CLIP with exact GELU. BEiT's
blocks share their position bias in pre-training, and have one each after fine-tuning."""

TOWERS: dict[str, dict[str, Any]] = {
    "clip_b16": dict(family="clip", size="base", patch_size=16, image_size=224, outputs=512),
    "clip_l14": dict(family="clip", size="large", patch_size=14, image_size=224, outputs=768),
    "clip_l14_336": dict(family="clip", size="large", patch_size=14, image_size=336, outputs=768),
    "siglip_b16": dict(family="siglip", size="base", patch_size=16, image_size=224),
    "siglip_so400m": dict(family="siglip", size="so400m", patch_size=14, image_size=224),
    "siglip_so400m_384": dict(family="siglip", size="so400m", patch_size=14, image_size=384),
    "dino_b16": dict(family="dino", size="base", patch_size=16, image_size=224),
    "dinov2_b14": dict(family="dinov2", size="base", patch_size=14, image_size=518),
    "dinov2_b14_registers": dict(
        family="dinov2", size="base", patch_size=14, image_size=518, registers=4
    ),
    "mae_b16": dict(family="mae", size="base", patch_size=16, image_size=224),
    "beit_b16": dict(family="beit", size="base", patch_size=16, image_size=224),
    "vit_t16": dict(family="vit", size="tiny", patch_size=16, image_size=224),
    "vit_s16": dict(family="vit", size="small", patch_size=16, image_size=224),
    "vit_b16": dict(family="vit", size="base", patch_size=16, image_size=224),
    "vit_l16": dict(family="vit", size="large", patch_size=16, image_size=224),
    # The one that comes with the package, see `mim_jax.conversion.towers`.
    "tiny": dict(
        family="vit",
        width=64,
        depth=4,
        heads=4,
        patch_size=7,
        image_size=28,
        channels=1,
        mean=(0.2861,),
        std=(0.3530,),
    ),
}
"""Published towers by name, as `tower_settings` takes them."""


def tower_settings(name: str, path: str = "", **changes: Any) -> dict[str, Any]:
    """The fields of `config.model.teacher` for a named tower.

    Args:
        name: in `TOWERS`.
        path: where its weights are: a file, a folder of transformers or of a run, or "tiny".
        **changes: fields that differ.

    Returns:
        What `build_tower` reads. `image_size` is what the tower gets to see (positions that were
        learned on another size are resized, fixed ones are spread from `position_grid`, where it
        is not ()); `pool` is "", `epsilon` 0, `mean` and `std` () for those of the family;
        `norm_epsilon`, of the final norm, is 0 for that of the blocks; `logit_cap` is 0 for none;
        `compute_dtype` is "" for that of the config.
    """
    given = {**TOWERS[name], **changes}
    sizes = {"width": 0, "depth": 0, "heads": 0, "mlp_ratio": 4.0}
    if "size" in given:
        size = given.pop("size")
        sizes |= SO400M if size == "so400m" else vit_size(size)
    patch, image = given.pop("patch_size"), given.pop("image_size")
    return dict(
        path=path,
        **{**sizes, **{key: given.pop(key) for key in sizes if key in given}},
        patch_size=(patch, patch),
        image_size=(image, image) if isinstance(image, int) else tuple(image),
        **{
            "channels": 3,
            "registers": 0,
            "outputs": 0,
            "position_grid": (),
            "pool": "",
            "epsilon": 0.0,
            "norm_epsilon": 0.0,
            "logit_cap": 0.0,
            "mean": (),
            "std": (),
            "compute_dtype": "",
            **given,
        },
    )


SO400M = dict(width=1152, depth=27, heads=16, mlp_ratio=3.7362)
"""Shape-optimized ViT (Alabdulmohsin et al., 2023), which SigLIP and no one else here has."""


class AttentionPool(nn.Module):
    """A learned query attends to all tokens; then an MLP (SigLIP's head).

    The query of the projection `qkv` is used for the learned token, key and value for the others.
    """

    transformer: Transformer

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[batch, tokens, width]` -> `[batch, width]`."""
        blocks, (batch, _, width) = self.transformer, tokens.shape
        heads = (blocks.heads, width // blocks.heads)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(tokens.dtype), (batch, 1, width))
        qkv = nn.DenseGeneral((3, *heads), dtype=blocks.dtype, name="qkv")(
            jnp.concatenate([probe, tokens], axis=1)
        )
        x = jax.nn.dot_product_attention(qkv[:, :1, 0], qkv[:, 1:, 1], qkv[:, 1:, 2])
        x = nn.DenseGeneral(width, axis=(-2, -1), dtype=blocks.dtype, name="out")(x)
        normalized = layer_norm("norm", blocks.dtype, blocks.epsilon)(x)
        mlp = Mlp(blocks.mlp_ratio, blocks.dtype, blocks.activation, name="mlp")
        return (x + mlp(normalized))[:, 0]


class Seen(NamedTuple):
    """What a tower makes of images; class token and registers come before the patches.

    Attributes:
        tokens: `[batch, prefix + patches, width]`, after the final norm.
        projected: `[batch, prefix + patches, outputs]`, in the space that CLIP shares with
            texts; the tokens themselves for a tower without projection.
        blocks: outputs of all blocks, before the final norm: a list of arrays like `tokens`, or
            one array with a leading axis, see `Transformer`.
        pooled: `[batch, width or outputs]`, the tower's own representation of an image.
        class_attention: `[batch, patches]`, see `class_attention`; zeros without class token.
    """

    tokens: jax.Array
    projected: jax.Array
    blocks: Any
    pooled: jax.Array
    class_attention: jax.Array

    def patches(self, tokens: jax.Array) -> jax.Array:
        """Patch tokens of an array like `tokens`."""
        return tokens[:, -self.class_attention.shape[1] :]


class Tower(nn.Module):
    """An image encoder and what its family puts on top.

    Attributes:
        encoder: a ViT.
        outputs: width of a linear projection without bias; 0 for none.
        pool: what represents an image: "token" for the class token (or the mean of the patches,
            in a tower without it) in the space of the projection, "mean" for the normalized mean
            of the patches after the last block, "attention" for an `AttentionPool`.
        mean: of each channel in the images that it was trained on, for values in [0, 1].
        std: standard deviation of each channel.
    """

    encoder: ViT
    outputs: int = 0
    pool: str = "token"
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
        """`tokens`, `projected`, `blocks` and `pooled` of `Seen` for the tower's own images."""
        tokens, blocks = self.encoder(images)
        transformer = self.encoder.transformer
        projected = tokens
        if self.outputs:
            projection = nn.Dense(
                self.outputs, use_bias=False, dtype=transformer.dtype, name="projection"
            )
            projected = projection(tokens)
        pooled: Any
        if self.pool == "attention":
            pooled = AttentionPool(transformer, name="attention_pool")(tokens)
        elif self.pool == "mean":
            # The norm of the encoder itself, which has normalized token by token.
            norm = nn.LayerNorm(
                self.encoder.norm_epsilon or transformer.epsilon,
                transformer.dtype,
                use_fast_variance=False,
                parent=None,
            )
            weights = {"params": self.encoder.variables["params"]["norm"]}
            pooled = norm.apply(weights, blocks[-1][:, self.encoder.prefix_tokens :].mean(axis=1))
        else:
            pooled = projected[:, 0] if self.encoder.class_token else projected.mean(axis=1)
        return tokens, projected, blocks, pooled

    def inputs(self, images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
        """What the tower expects to see, float32 `[batch, *image_size, channels]`.

        Resized first, as PyTorch's bicubic interpolation without antialiasing does, then
        normalized anew (MaskAlign code). A grey image is repeated for a tower of colours.

        Args:
            images: `[batch, height, width, channels]`, normalized for the student.
            mean: of that normalization.
            std: of that normalization.

        Raises:
            ValueError: if the channels do not fit.
        """
        images = images.astype(jnp.float32)
        size, channels = images.shape[1:3], self.encoder.channels
        if tuple(size) != tuple(self.encoder.image_size):
            rows, columns = (
                jnp.asarray(bicubic_matrix(old, new), jnp.float32)
                for old, new in zip(size, self.encoder.image_size)
            )
            images = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, images)
        if images.shape[-1] not in (1, channels):
            raise ValueError(
                f"the teacher sees {channels} channels, but the images have {images.shape[-1]}; "
                "set data.channels to 1 or to the teacher's, or take another teacher."
            )
        if (tuple(mean), tuple(std)) == (self.mean, self.std):
            return images
        shares = images * jnp.asarray(std) + jnp.asarray(mean)
        shares = jnp.broadcast_to(shares, (*shares.shape[:-1], channels))
        return (shares - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def see(tower: Tower, params: Any, images: jax.Array) -> Seen:
    """What a frozen tower makes of images that are its own, see `Tower.inputs`; no gradient."""
    params = jax.lax.stop_gradient(params)
    (tokens, projected, blocks, pooled), collected = tower.apply(
        {"params": params}, jax.lax.stop_gradient(images), mutable=[ATTENTION]
    )
    encoder = tower.encoder
    if encoder.class_token:
        attention = class_attention(
            collected[ATTENTION]["encoder"]["transformer"],
            encoder.transformer,
            encoder.prefix_tokens,
        )
    else:
        attention = jnp.zeros((tokens.shape[0], tokens.shape[1] - encoder.prefix_tokens))
    return jax.lax.stop_gradient(Seen(tokens, projected, blocks, pooled, attention))


def initial_params(tower: Tower, rng: jax.Array) -> Any:
    """Random parameters of a tower."""
    encoder = tower.encoder
    return tower.init(rng, jnp.zeros((1, *encoder.image_size, encoder.channels)))["params"]


def build_tower(settings: Any, compute_dtype: str, **blocks: Any) -> Tower:
    """The tower of `config.model.teacher`, see `tower_settings`.

    Args:
        settings: the fields.
        compute_dtype: of the config; `settings.compute_dtype` takes precedence.
        **blocks: further fields of `Transformer`, such as `scan`.

    Raises:
        ValueError: for an unknown family, or sizes that are missing or do not fit together.
    """
    if settings.family not in FAMILIES:
        raise ValueError(
            f"the teacher's family is {settings.family!r}; known are {', '.join(FAMILIES)}."
        )
    if settings.pool not in ("", *POOLS):
        raise ValueError(f"the teacher's pool is {settings.pool!r}; known are {', '.join(POOLS)}.")
    for field in ("width", "depth", "heads"):
        if settings[field] < 1:
            raise ValueError(
                f"the teacher's {field} is {settings[field]}: give its weights by "
                "model.teacher.path, which tell it, or set it."
            )
    family = FAMILIES[settings.family]
    common = {
        "dtype": jnp.dtype(settings.compute_dtype or compute_dtype),
        "mlp_ratio": settings.mlp_ratio,
        **family.blocks,
        **blocks,
    }
    if settings.epsilon:
        common["epsilon"] = settings.epsilon
    if settings.logit_cap:
        common["logit_cap"] = settings.logit_cap
    encoder = ViT(
        tuple(settings.image_size),
        tuple(settings.patch_size),
        settings.channels,
        settings.width,
        Transformer(settings.depth, settings.heads, **common),
        position_grid=tuple(settings.position_grid) or None,
        registers=settings.registers,
        norm_epsilon=settings.norm_epsilon or None,
        **family.encoder,
    )
    grid = encoder.grid  # raises if image and patch do not fit
    if family.block_position_bias:
        encoder = encoder.clone(transformer=encoder.transformer.clone(position_bias=grid))
    mean, std = (
        tuple(given) or statistics
        for given, statistics in zip((settings.mean, settings.std), family.statistics)
    )
    return Tower(encoder, settings.outputs, settings.pool or family.pool, mean, std)


def check_grid(tower: Tower, grid: Sequence[int], student: str = "student") -> None:
    """Raises `ValueError` if a tower's patches are not in the places of the student's."""
    ours = tower.encoder.grid
    if tuple(grid) != ours:
        patch = tower.encoder.patch_size
        wanted = tuple(rows * side for rows, side in zip(grid, patch))
        raise ValueError(
            f"the teacher's grid is {ours[0]} x {ours[1]} patches (image {tower.encoder.image_size}"
            f", patch {patch}), but the {student}'s is {grid[0]} x {grid[1]}; set "
            f"model.teacher.image_size to {wanted}."
        )
