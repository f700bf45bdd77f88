"""Encoders and classifiers of the transformers library in small configurations, each with its input's shape."""

import pytest

transformers = pytest.importorskip("transformers", reason="needs the zoo extra")

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 3, 4]}


SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
}  # fmt: skip


ENCODERS = {
    "ViT": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)), (3, 3, 32, 32)),
    "DeiT": (lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL)), (3, 3, 32, 32)),
    "BEiT": (
        lambda: transformers.BeitForImageClassification(
            transformers.BeitConfig(**SMALL, use_relative_position_bias=True)
        ),
        (3, 3, 32, 32),
    ),
    "Dinov2": (lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL)), (3, 3, 32, 32)),
    "Dinov2Reg": (
        lambda: transformers.Dinov2WithRegistersForImageClassification(transformers.Dinov2WithRegistersConfig(**SMALL)),
        (3, 3, 32, 32),
    ),
    "DINOv3ViT": (lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL)), (3, 3, 32, 32)),
    "DINOv3ConvNext": (
        lambda: transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**STAGES)),
        (3, 3, 32, 32),
    ),
    "Data2Vec": (
        lambda: transformers.Data2VecVisionForImageClassification(transformers.Data2VecVisionConfig(**SMALL)),
        (3, 3, 32, 32),
    ),
    "CLIPVision": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SMALL, projection_dim=16)),
        (3, 3, 32, 32),
    ),
    "SiglipVision": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)), (3, 3, 32, 32)),
    "Swin": (lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)), (3, 3, 32, 32)),
    "Swinv2": (lambda: transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**SWIN)), (3, 3, 32, 32)),
    "Swin2SR": (
        lambda: transformers.Swin2SRForImageSuperResolution(
            transformers.Swin2SRConfig(
                image_size=16, patch_size=1, embed_dim=24, depths=[2, 2], num_heads=[3, 3], window_size=4, upscale=2
            )
        ),
        (2, 3, 16, 16),
    ),
    "ConvNext": (
        lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**STAGES)),
        (3, 3, 32, 32),
    ),
    "ConvNextV2": (
        lambda: transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**STAGES)),
        (3, 3, 32, 32),
    ),
    "ResNet": (
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ),
        (3, 3, 32, 32),
    ),
    "RegNet": (
        lambda: transformers.RegNetForImageClassification(
            transformers.RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8)
        ),
        (3, 3, 32, 32),
    ),
    "BiT": (
        lambda: transformers.BitForImageClassification(
            transformers.BitConfig(embedding_size=32, hidden_sizes=[128, 128], depths=[1, 1])
        ),
        (2, 3, 64, 64),
    ),
    "Segformer": (
        lambda: transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(num_encoder_blocks=4, **PYRAMID, decoder_hidden_size=16)
        ),
        (2, 3, 64, 64),
    ),
    "Pvt": (
        lambda: transformers.PvtForImageClassification(transformers.PvtConfig(image_size=64, **PYRAMID)),
        (2, 3, 64, 64),
    ),
    "PvtV2": (
        lambda: transformers.PvtV2ForImageClassification(transformers.PvtV2Config(image_size=64, **PYRAMID)),
        (2, 3, 64, 64),
    ),
    "PoolFormer": (
        lambda: transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig(**STAGES)),
        (2, 3, 64, 64),
    ),
    "MobileViT": (
        lambda: transformers.MobileViTForImageClassification(
            transformers.MobileViTConfig(
                image_size=64, hidden_sizes=[12, 16, 20], neck_hidden_sizes=[8, 8, 12, 16, 16, 20, 32]
            )
        ),
        (2, 3, 64, 64),
    ),
    "MobileViTV2": (
        lambda: transformers.MobileViTV2ForImageClassification(
            transformers.MobileViTV2Config(image_size=64, width_multiplier=0.25)
        ),
        (2, 3, 64, 64),
    ),
    "MobileNetV1": (
        lambda: transformers.MobileNetV1ForImageClassification(transformers.MobileNetV1Config(depth_multiplier=0.25)),
        (2, 3, 64, 64),
    ),
    "MobileNetV2": (
        lambda: transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(depth_multiplier=0.25)),
        (2, 3, 64, 64),
    ),
    "EfficientNet": (
        lambda: transformers.EfficientNetForImageClassification(
            transformers.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320)
        ),
        (2, 3, 64, 64),
    ),
    "LeViT": (
        lambda: transformers.LevitForImageClassification(
            transformers.LevitConfig(
                image_size=64,
                hidden_sizes=[16, 24, 32],
                num_attention_heads=[2, 3, 4],
                depths=[1, 1, 1],
                key_dim=[8, 8, 8],
            )
        ),
        (2, 3, 64, 64),
    ),
    "FocalNet": (
        lambda: transformers.FocalNetForImageClassification(
            transformers.FocalNetConfig(image_size=64, embed_dim=12, depths=[1, 1, 1, 1])
        ),
        (2, 3, 64, 64),
    ),
    "SwiftFormer": (
        lambda: transformers.SwiftFormerForImageClassification(
            transformers.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32])
        ),
        (2, 3, 64, 64),
    ),
    "Hiera": (
        lambda: transformers.HieraForImageClassification(
            transformers.HieraConfig(image_size=[64, 64], embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
        ),
        (2, 3, 64, 64),
    ),
    "ViTMSN": (lambda: transformers.ViTMSNForImageClassification(transformers.ViTMSNConfig(**SMALL)), (3, 3, 32, 32)),
    "IJepa": (lambda: transformers.IJepaForImageClassification(transformers.IJepaConfig(**SMALL)), (3, 3, 32, 32)),
    "ViTDet": (
        lambda: transformers.VitDetModel(
            transformers.VitDetConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=3,
                image_size=64,
                patch_size=8,
                use_relative_position_embeddings=True,
                window_block_indices=[0],
                window_size=4,
            )
        ),
        (2, 3, 64, 64),
    ),
    "YOLOS": (
        lambda: transformers.YolosForObjectDetection(
            transformers.YolosConfig(**(SMALL | {"image_size": [32, 32]}), num_detection_tokens=5)
        ),
        (3, 3, 32, 32),
    ),
}
