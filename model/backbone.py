"""Images -> pyramid features P3..P7: any timm backbone with features at strides 8, 16 and 32, then an FPN."""

from collections import OrderedDict
from functools import partial

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from errors import UserError

STRIDES = (8, 16, 32, 64, 128)
BACKBONE_STRIDES = STRIDES[:3]
HUB = "hf-hub:"


class BackboneError(UserError):
    """The backbone cannot be built as asked; the message names the flag that helps."""


def hub_model(name: str) -> tuple[str, dict]:
    """The architecture of a model on the hub, and what its config.json says of weights and normalisation.

    A weights file names the architecture alone, so the network is the one that timm builds by this name.
    Raises BackboneError.
    """
    try:
        config, architecture, changes = timm.models.load_model_config_from_hf(name.removeprefix(HUB))
    except Exception as error:  # of the network, the hub, the file
        raise BackboneError(
            f"{name!r} (--backbone) cannot be had from the hub: {type(error).__name__}: {error}"
        ) from error
    if changes or not timm.is_model(architecture):
        raise BackboneError(
            f"{name!r} (--backbone) is {architecture!r} with settings of its own, {changes}, which a weights file "
            "cannot name; take a model without them, or one that timm has by name"
        )
    return architecture, {key: value for key, value in config.items() if key not in ("input_size", "fixed_input_size")}


def create_body(name: str, pretrained: bool, overlay: dict | None = None) -> nn.Module:
    """timm feature extractor. Raises BackboneError for an unknown name and for weights that cannot be had.

    overlay: fields to replace in timm's own configuration of the pretrained weights
    """
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise BackboneError(f"timm has no backbone {name!r} (--backbone); similar: {close}")
    try:
        create = partial(
            timm.create_model, name, pretrained=pretrained, pretrained_cfg_overlay=overlay, features_only=True
        )
        try:  # swin-like models take only images of their training size unless told not to; others refuse the word
            return create(strict_img_size=False)
        except TypeError:
            return create()
    except Exception as error:
        if not pretrained:
            raise BackboneError(f"timm cannot build {name!r} as a feature extractor (--backbone): {error}") from error
        raise BackboneError(
            f"no pretrained weights for {name!r}: {type(error).__name__}: {error}\n"
            "Connect to the hub, put the weights into its cache (HF_HOME), or start from scratch with --no-pretrained."
        ) from error


class _ConstantNorm(torch.autograd.Function):
    """Batch norm with given statistics: one kernel each way, in the type of x, which is not kept for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(torch.zeros_like(mean), var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return F.batch_norm(upstream, *ctx.saved_tensors, eps=ctx.eps), None, None, None, None, None


class FrozenNorm(nn.Module):
    """A batch norm whose statistics and weights are constants, and the activation that some of timm's norms include.

    timm's and torchvision's own compute x * scale + shift with a float32 scale, which is several kernels and turns
    bfloat16 activations, and with them the rest of the backbone, into float32.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self.drop, self.act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))

    def forward(self, x: Tensor) -> Tensor:
        x = _ConstantNorm.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


def freeze_norms(module: nn.Module) -> None:
    """Put a FrozenNorm in the place of every batch norm inside. Raises BackboneError."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if not child.affine or child.running_mean is None:
                raise BackboneError(
                    f"batch norm {name!r} has no weights or statistics to freeze; take --no-frozen-norm"
                )
            setattr(module, name, FrozenNorm(child))
        else:
            freeze_norms(child)


class Backbone(nn.Module):
    """(B, 3, H, W), H and W multiples of 32 -> five maps of `channels` at strides 8, 16, 32, 64, 128.

    `frozen_norm` turns batch norms into constants: pretrained statistics beat those of the few images on a rank.
    The attribute `name` is the architecture's, also where the argument was a model on the hub (hf-hub:user/repo).
    """

    def __init__(self, name: str, channels: int, pretrained: bool = False, frozen_norm: bool = False):
        super().__init__()
        self.name, overlay = hub_model(name) if name.startswith(HUB) else (name, None)
        self.body = create_body(self.name, pretrained, overlay)
        if frozen_norm:
            freeze_norms(self.body)
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

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        taps = [features[i] for i in self.taps]
        if self.channels_last:
            taps = [rearrange(t, "b h w c -> b c h w") for t in taps]
        return list(self.neck(OrderedDict((str(i), t) for i, t in enumerate(taps))).values())
