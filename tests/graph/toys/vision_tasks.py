"""Models for detection, segmentation, depth, video and text of the transformers library, as `vision_encoders` has them."""

import pytest

from .vision_encoders import PYRAMID, SMALL, STAGES, SWIN

transformers = pytest.importorskip("transformers", reason="needs the zoo extra")

SWIN_FOUR = {
    "image_size": 64, "patch_size": 4, "embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4],
    "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip


DECODER = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5,
}  # fmt: skip


HGNET = {
    "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 16, 32, 48], "stage_mid_channels": [8, 8, 8, 16],
    "stage_out_channels": [16, 32, 48, 64], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
}  # fmt: skip


DEPTH = {
    "reassemble_hidden_size": 24, "patch_size": 8, "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16,
    "head_hidden_size": 8,
}  # fmt: skip


def with_resnet():
    """Options of a detector on a small ResNet."""
    backbone = transformers.ResNetConfig(embedding_size=8, **STAGES, out_features=["stage4"])
    return DECODER | {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone,
    }  # fmt: skip


def dinov2_levels():
    return transformers.Dinov2Config(
        **(SMALL | {"num_hidden_layers": 4}),
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )


TASKS = {
    "DPT": (
        lambda: transformers.DPTForDepthEstimation(
            transformers.DPTConfig(
                **(SMALL | {"num_hidden_layers": 4}),
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 12, 16, 20],
                fusion_hidden_size=16,
                reassemble_factors=[4, 2, 1, 0.5],
            )
        ),
        (3, 3, 32, 32),
    ),
    "DepthAnything": (
        lambda: transformers.DepthAnythingForDepthEstimation(
            transformers.DepthAnythingConfig(backbone_config=dinov2_levels(), **DEPTH)
        ),
        (3, 3, 32, 32),
    ),
    "GLPN": (
        lambda: transformers.GLPNForDepthEstimation(transformers.GLPNConfig(**PYRAMID, decoder_hidden_size=16)),
        (2, 3, 64, 64),
    ),
    "UperNet": (
        lambda: transformers.UperNetForSemanticSegmentation(
            transformers.UperNetConfig(
                backbone_config=transformers.ConvNextConfig(
                    **STAGES, out_features=["stage1", "stage2", "stage3", "stage4"]
                ),
                hidden_size=16,
                auxiliary_in_channels=24,
                auxiliary_channels=8,
            )
        ),
        (2, 3, 64, 64),
    ),
    "DETR": (
        lambda: transformers.DetrForObjectDetection(transformers.DetrConfig(**with_resnet(), d_model=24)),
        (2, 3, 64, 64),
    ),
    "CondDETR": (
        lambda: transformers.ConditionalDetrForObjectDetection(
            transformers.ConditionalDetrConfig(**with_resnet(), d_model=24)
        ),
        (2, 3, 64, 64),
    ),
    "SamVision": (
        lambda: transformers.SamVisionModel(
            transformers.SamVisionConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=3,
                image_size=64,
                patch_size=8,
                window_size=4,
                global_attn_indexes=[1],
                output_channels=16,
                mlp_dim=48,
            )
        ),
        (2, 3, 64, 64),
    ),
    "MaskFormer": (
        lambda: transformers.MaskFormerForInstanceSegmentation(
            transformers.MaskFormerConfig(
                fpn_feature_size=32,
                mask_feature_size=16,
                backbone_config=transformers.SwinConfig(**SWIN_FOUR),
                decoder_config=transformers.DetrConfig(
                    **(DECODER | {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2})
                ),
            )
        ),
        (2, 3, 64, 64),
    ),
    "VideoMAE": (
        lambda: transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**SMALL, num_frames=4)),
        (2, 4, 3, 32, 32),
    ),
    "TimeSformer": (
        lambda: transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**SMALL, num_frames=4)),
        (2, 4, 3, 32, 32),
    ),
    "ViViT": (
        lambda: transformers.VivitForVideoClassification(
            transformers.VivitConfig(**(SMALL | {"image_size": 32}), num_frames=4, tubelet_size=[2, 8, 8])
        ),
        (2, 4, 3, 32, 32),
    ),
    "Textnet": (
        lambda: transformers.TextNetForImageClassification(
            transformers.TextNetConfig(stem_out_channels=8, hidden_sizes=[8, 8, 16, 16, 24])
        ),
        (2, 3, 64, 64),
    ),
    "Superpoint": (
        lambda: transformers.SuperPointForKeypointDetection(transformers.SuperPointConfig()),
        (1, 3, 64, 64),
    ),
    "HGNetV2": (
        lambda: transformers.HGNetV2ForImageClassification(transformers.HGNetV2Config(**HGNET)),
        (2, 3, 64, 64),
    ),
    "RTDETR": (
        lambda: transformers.RTDetrForObjectDetection(
            transformers.RTDetrConfig(
                backbone_config=transformers.RTDetrResNetConfig(
                    embedding_size=8, **STAGES, layer_type="basic", out_features=["stage2", "stage3", "stage4"]
                ),
                encoder_hidden_dim=24,
                encoder_in_channels=[16, 24, 32],
                encoder_ffn_dim=32,
                encoder_attention_heads=3,
                d_model=24,
                num_queries=6,
                decoder_in_channels=[24, 24, 24],
                decoder_ffn_dim=32,
                decoder_attention_heads=3,
                decoder_layers=1,
                anchor_image_size=None,
                feat_strides=[8, 16, 32],
                num_denoising=0,
            )
        ),
        (2, 3, 64, 64),
    ),
    "Mask2Former": (
        lambda: transformers.Mask2FormerForUniversalSegmentation(
            transformers.Mask2FormerConfig(
                feature_size=32,
                mask_feature_size=32,
                hidden_dim=32,
                encoder_feedforward_dim=32,
                encoder_layers=1,
                decoder_layers=2,
                num_attention_heads=2,
                dim_feedforward=32,
                num_queries=5,
                backbone_config=transformers.SwinConfig(**SWIN_FOUR),
            )
        ),
        (2, 3, 64, 64),
    ),
    "DabDETR": (
        lambda: transformers.DabDetrForObjectDetection(transformers.DabDetrConfig(**with_resnet(), hidden_size=24)),
        (2, 3, 64, 64),
    ),
    "TableTransformer": (
        lambda: transformers.TableTransformerForObjectDetection(
            transformers.TableTransformerConfig(**with_resnet(), d_model=24)
        ),
        (2, 3, 64, 64),
    ),
    "DFine": (
        lambda: transformers.DFineForObjectDetection(
            transformers.DFineConfig(
                backbone_config=transformers.HGNetV2Config(**HGNET, out_features=["stage2", "stage3", "stage4"]),
                encoder_hidden_dim=32,
                encoder_in_channels=[32, 48, 64],
                encoder_ffn_dim=32,
                encoder_attention_heads=2,
                d_model=32,
                num_queries=6,
                decoder_in_channels=[32, 32, 32],
                decoder_ffn_dim=32,
                decoder_attention_heads=2,
                decoder_layers=2,
                anchor_image_size=None,
                feat_strides=[8, 16, 32],
                num_denoising=0,
                decoder_n_points=[2, 2, 2],
            )
        ),
        (2, 3, 64, 64),
    ),
    "ViTMAE": (lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**SMALL)), (3, 3, 32, 32)),
    "VJEPA2": (
        lambda: transformers.VJEPA2Model(
            transformers.VJEPA2Config(
                crop_size=32,
                patch_size=8,
                frames_per_clip=4,
                hidden_size=24,
                num_attention_heads=2,
                num_hidden_layers=2,
                pred_hidden_size=24,
                pred_num_attention_heads=2,
                pred_num_hidden_layers=1,
            )
        ),
        (2, 4, 3, 32, 32),
    ),
    "Siglip2Vision": (
        lambda: transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=SMALL)),
        (3, 3, 32, 32),
    ),
    "CLIPCls": (
        lambda: transformers.CLIPForImageClassification(
            transformers.CLIPConfig(vision_config=SMALL | {"projection_dim": 16})
        ),
        (3, 3, 32, 32),
    ),
    "Aimv2": (lambda: transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**SMALL)), (3, 3, 32, 32)),
    "PixtralVision": (
        lambda: transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**SMALL, head_dim=8)),
        (3, 3, 32, 32),
    ),
    "OwlViT": (lambda: transformers.OwlViTVisionModel(transformers.OwlViTVisionConfig(**SMALL)), (3, 3, 32, 32)),
    "PromptDepth": (
        lambda: transformers.PromptDepthAnythingForDepthEstimation(
            transformers.PromptDepthAnythingConfig(backbone_config=dinov2_levels(), **DEPTH)
        ),
        (3, 3, 32, 32),
    ),
    "VitMatte": (
        lambda: transformers.VitMatteForImageMatting(
            transformers.VitMatteConfig(
                hidden_size=24,
                backbone_config=transformers.VitDetConfig(
                    hidden_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=3,
                    image_size=64,
                    pretrain_image_size=64,
                    patch_size=16,
                    num_channels=4,
                    out_features=["stage2"],
                ),
                convstream_hidden_sizes=[8, 12, 16],
                fusion_hidden_sizes=[24, 16, 12, 8],
            )
        ),
        (2, 4, 64, 64),
    ),
    "ViTPose": (
        lambda: transformers.VitPoseForPoseEstimation(
            transformers.VitPoseConfig(
                backbone_config=transformers.VitPoseBackboneConfig(
                    image_size=[32, 32],
                    patch_size=[8, 8],
                    hidden_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=3,
                    mlp_ratio=2,
                    out_indices=[2],
                ),
                num_labels=5,
            )
        ),
        (3, 3, 32, 32),
    ),
    "BeitSeg": (
        lambda: transformers.BeitForSemanticSegmentation(
            transformers.BeitConfig(
                **(SMALL | {"num_hidden_layers": 4, "image_size": 64, "patch_size": 16}),
                use_relative_position_bias=True,
                out_indices=[0, 1, 2, 3],
            )
        ),
        (2, 3, 64, 64),
    ),
    "GroundingDinoSwin": (
        lambda: transformers.SwinBackbone(transformers.SwinConfig(**SWIN, out_features=["stage1", "stage2"])),
        (3, 3, 32, 32),
    ),
    "DonutSwin": (lambda: transformers.DonutSwinModel(transformers.DonutSwinConfig(**SWIN)), (3, 3, 32, 32)),
    "MgpStr": (
        lambda: transformers.MgpstrForSceneTextRecognition(
            transformers.MgpstrConfig(
                image_size=[32, 32],
                patch_size=8,
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=3,
                max_token_length=4,
                num_character_labels=10,
                num_bpe_labels=12,
                num_wordpiece_labels=14,
            )
        ),
        (3, 3, 32, 32),
    ),
}
