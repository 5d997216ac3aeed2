"""GM-DF (Lai et al., 2025): what is known of the paper's recipe, and this project's choices."""

import ml_collections

from mim_jax.models.tower import tower_settings

VARIANTS = ("paper", "clip_joint", "experts", "prompts", "mim", "full", "tiny")
"""The paper's model on CLIP ViT-B/16; a ladder of ablations, each step of which adds one part, from
CLIP with a linear head to all of it ("full" is "paper"); and one for a laptop on procedural faces,
trained from scratch, as there is no pre-trained CLIP of that size."""

NO_META = dict(meta="none", alignment_weight=0.0)
LADDER = {
    "clip_joint": dict(
        NO_META, experts=0, second_order_layers=(), text_weight=0.0, mask_weight=0.0
    ),
    "experts": dict(NO_META, text_weight=0.0, mask_weight=0.0),
    "prompts": dict(NO_META, mask_weight=0.0),
    "mim": NO_META,
}
"""Fields of `model` that differ from the full method. Meta step and alignment come last."""


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="gm_df",
            model=dict(
                # CLIP: the path of OpenAI's file, or of a folder of transformers, which tells the
                # sizes of the image tower; those of the text tower are below.
                clip=tower_settings("clip_b16"),
                text=dict(vocabulary=49408, length=77, width=512, depth=12, heads=8, mlp_ratio=4.0),
                # "clip" keeps both towers as they are, "text" the text tower; "nothing" trains
                # all, and needs no path then.
                freeze="clip",
                # Number of training domains; 0 takes that of the sources of a mixture.
                domains=0,
                domain_width=64,
                # Experts in each block, 0 for none, and their hidden width.
                experts=3,
                expert_hidden=3072,
                # "none", or "domain": experts are weighed by domain (figure 2).
                expert_gate="none",
                # "output" norms what the experts give; "pre" replaces both norms of a block.
                norm_site="output",
                # "delta" norms the experts alone; "sum" MLP and experts (equation 3 as written).
                norm_mode="delta",
                # Blocks, from 0, whose MLP is followed through later attention.
                second_order_layers=(8, 9, 10),
                # Ids of "<start> a" and "face showing forgery clues <end>"; learned tokens of
                # domain and class come between.
                prompt_before=(49406, 320),
                prompt_after=(1710, 3649, 645, 32845, 23764, 49407),
                # Tau of a prompt, and its growth with the length of the domain's token.
                temperature=(0.07, 0.01),
                # What is classified: the "head" or the similarity with the prompts ("text").
                logit_of="head",
                # What is evaluated: the "logit", the similarity ("text"), or the mean of "both".
                score_of="logit",
                mask_ratio=0.5,
                decoder_width=384,
                decoder_depth=4,
                decoder_heads=6,
                # Weights of reconstruction, of images with prompts, and of domains.
                mask_weight=0.5,
                text_weight=0.3,
                alignment_weight=0.1,
                # Distance of domains: "moments", "w2", "w2_diagonal" or "mmd".
                alignment="moments",
                # Align real and fake images by themselves.
                align_by_class=False,
                # "none", "first" or "second" order.
                meta="first",
                # k: a batch has k + 1 equal blocks of one domain each, as many as
                # data.domains_per_batch says; the last is the meta-test.
                meta_train_domains=1,
                # Beta, the rate of the inner step.
                inner_rate=1e-4,
                # Add the classification of the meta-train domains to the outer loss.
                outer_train_loss=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
                attention="",
            ),
            data=dict(
                source="mix:0.2*folder:ff++ + 0.2*folder:wdf + 0.2*folder:celeb_df "
                "+ 0.2*folder:dfdc + 0.2*folder:dff",
                batches="domains",
                domains_per_batch=2,
                image_size=(224, 224),
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
                crop_area=(0.8, 1.0),
                workers=8,
            ),
            batch_size=32,
            epochs=40.0,
            # New modules; CLIP itself, where it is trained, has the paper's outer rate.
            optimizer=dict(
                name="adam",
                lr=1e-4,
                b2=0.999,
                weight_decay=1e-4,
                clip_norm=1.0,
                groups=dict(clip=dict(lr=3e-6)),
            ),
            schedule=dict(warmup_epochs=0.0, by_epoch=True),
            log=dict(pictures_every_steps=5000),
            evaluate=dict(protocols=("detection",), test_split="test"),
        )
    )
    config.model.update(LADDER.get(variant, {}))
    if variant == "tiny":
        config.model.update(
            clip=tower_settings(
                "clip_b16",
                width=64,
                depth=4,
                heads=4,
                patch_size=4,
                image_size=32,
                outputs=32,
            ),
            text=dict(vocabulary=8, length=16, width=32, depth=2, heads=2, mlp_ratio=4.0),
            freeze="nothing",
            domain_width=16,
            expert_hidden=64,
            second_order_layers=(1, 2),
            prompt_before=(6, 0),
            prompt_after=(1, 2, 3, 4, 7),
            decoder_width=48,
            decoder_depth=2,
            decoder_heads=4,
            inner_rate=1e-2,
        )
        config.data = dict(
            source="mix:" + " + ".join(f"0.25*synthetic:collections:{i}" for i in range(4)),
            batches="domains",
            domains_per_batch=2,
            image_size=(32, 32),
            crop_area=(0.8, 1.0),
        )
        config.batch_size = 64
        config.epochs = 10.0
        config.optimizer.update(lr=1e-3, groups=dict(clip=dict(lr=1e-3)))
        config.schedule.update(warmup_epochs=1.0, by_epoch=False)
        config.log = dict(every_steps=50, pictures_every_steps=200)
        config.checkpoint = dict(every_steps=200)
        config.evaluate = dict(protocols=("detection",), crop_ratio=1.0)
    return config
