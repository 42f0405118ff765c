"""Images -> pyramid features P3..P7: any timm backbone with features at strides 8, 16 and 32, then an FPN."""

from collections import OrderedDict

import timm
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

STRIDES = (8, 16, 32, 64, 128)
BACKBONE_STRIDES = STRIDES[:3]


class BackboneError(RuntimeError):
    """The backbone cannot be built as asked; the message names the flag that helps."""


def create_body(name: str, pretrained: bool) -> nn.Module:
    """timm feature extractor. Raises BackboneError for an unknown name and for weights that cannot be had."""
    if not timm.is_model(name.split("/")[-1].split(".")[0]) and "hub:" not in name:
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise BackboneError(f"timm has no backbone {name!r} (--backbone); similar: {close}")
    try:
        try:  # swin-like models take only images of their training size unless told not to; others refuse the word
            return timm.create_model(name, pretrained=pretrained, features_only=True, strict_img_size=False)
        except TypeError:
            return timm.create_model(name, pretrained=pretrained, features_only=True)
    except Exception as error:
        if not pretrained:
            raise BackboneError(f"timm cannot build {name!r} as a feature extractor (--backbone): {error}") from error
        raise BackboneError(
            f"no pretrained weights for {name!r}: {type(error).__name__}: {error}\n"
            "Connect to the hub, put the weights into its cache (HF_HOME), or start from scratch with --no-pretrained."
        ) from error


class Backbone(nn.Module):
    """(B, 3, H, W), H and W multiples of 32 -> five maps of `channels` at strides 8, 16, 32, 64, 128.

    `frozen_norm` makes batch norms constants: pretrained statistics beat those of the few images on a rank. They stay
    PyTorch's own in evaluation mode, one kernel in the type of the activations; timm's and torchvision's frozen ones
    are several, and turn bfloat16 into float32.
    """

    def __init__(self, name: str, channels: int, pretrained: bool = False, frozen_norm: bool = False):
        super().__init__()
        self.body = create_body(name, pretrained)
        self.frozen_norms = [m for m in self.body.modules() if isinstance(m, _BatchNorm)] if frozen_norm else []
        for norm in self.frozen_norms:
            norm.eval().requires_grad_(False)
        info = self.body.feature_info
        missing = set(BACKBONE_STRIDES) - set(info.reduction())
        if missing:
            raise BackboneError(
                f"backbone {name!r} (--backbone) has features at strides {sorted(set(info.reduction()))}, "
                f"the detector needs {BACKBONE_STRIDES}"
            )
        self.taps = [len(info.reduction()) - 1 - info.reduction()[::-1].index(s) for s in BACKBONE_STRIDES]
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        tap_channels = [info.channels()[i] for i in self.taps]
        self.neck = FeaturePyramidNetwork(tap_channels, channels, extra_blocks=LastLevelP6P7(channels, channels))
        data_config = timm.data.resolve_model_data_config(self.body)
        self.mean, self.std = data_config["mean"], data_config["std"]

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        taps = [features[i] for i in self.taps]
        if self.channels_last:
            taps = [rearrange(t, "b h w c -> b c h w") for t in taps]
        return list(self.neck(OrderedDict((str(i), t) for i, t in enumerate(taps))).values())
