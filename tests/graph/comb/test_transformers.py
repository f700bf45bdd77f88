"""Vision models of the transformers library, small configurations: captured, combed, pruned at half and exact."""

from __future__ import annotations

import pytest
import torch

from graphcomb import capture, verify
from graphcomb.graph.errors import CaptureError
from graphcomb.passes import RemoveChannels

from ...oracles.restriction import restriction

transformers = pytest.importorskip("transformers", reason="needs the zoo extra")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 3, 4]}
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4,
}  # fmt: skip
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


MODELS = {
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

# These specialise their batch size, so that it cannot be dynamic.
STATIC = {"Superpoint", "RTDETR", "DFine", "PixtralVision"}


@pytest.mark.parametrize("name", MODELS)
def test_a_vision_model_of_transformers_is_pruned_exactly(name: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    if name in STATIC:
        with pytest.raises(CaptureError):
            capture(model, x, dynamic_shapes="batch")
    program = capture(model, x, dynamic_shapes=None if name in STATIC else "batch")
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    verdict = verify.check(program, result)
    assert verdict.ok, verdict.disagreements
    assert restriction(program, result) <= 1e-10
    assert result.program.params < 0.9 * program.params
