"""Images -> pyramid features P3..P7: any timm backbone with features at strides 8, 16 and 32, then an FPN."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from errors import UserError

STRIDES = (8, 16, 32, 64, 128)
HUB = "hf-hub:"


def hub_model(name: str) -> tuple[str, dict]:
    """Return the architecture of a model on the hub, and its weights and normalisation for timm's configuration."""
    try:
        config, architecture, changes = timm.models.load_model_config_from_hf(name.removeprefix(HUB))
    except Exception as error:  # network, hub or file
        raise UserError(f"the hub gives no {name!r} (--backbone): {type(error).__name__}: {error}") from error
    if changes or not timm.is_model(architecture):
        reason = f"is {architecture!r} with changed settings, {changes}, which a weights file cannot name"
        raise UserError(f"{name!r} (--backbone) {reason}; take one without them, or a model that timm has by name")
    return architecture, {key: value for key, value in config.items() if key not in ("input_size", "fixed_input_size")}


def create_body(name: str, pretrained: bool, overlay: dict | None = None) -> nn.Module:
    """Create timm's feature extractor; `overlay` replaces fields of its configuration."""
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise UserError(f"timm has no backbone {name!r} (--backbone); similar: {close}")
    settings = {"pretrained": pretrained, "pretrained_cfg_overlay": overlay, "features_only": True}
    try:
        try:  # without it swin-like models take only images of their training size; other models do not know it
            return timm.create_model(name, strict_img_size=False, **settings)
        except TypeError:
            return timm.create_model(name, **settings)
    except Exception as error:
        remedy = "\nConnect to the hub, put the weights into its cache (HF_HOME), or train with --no-pretrained."
        message = f"timm cannot build {name!r} (--backbone): {type(error).__name__}: {error}"
        raise UserError(message + remedy * pretrained) from error


class _ConstantNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(torch.zeros_like(mean), var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return F.batch_norm(gradient, *ctx.saved_tensors, eps=ctx.eps), *[None] * 5


class FrozenNorm(nn.Module):
    """A batch norm of constants, and the activation that some of timm's norms include. Unlike a BatchNorm2d with fixed
    statistics, it keeps no input for the gradient, half of what a ResNet-50 keeps; unlike timm's and torchvision's
    frozen norms, it leaves bfloat16 as it is."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self.eps = norm.eps
        self.drop, self.act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))

    def forward(self, x: Tensor) -> Tensor:
        x = _ConstantNorm.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


def freeze_norms(body: nn.Module) -> None:
    for name, norm in [(name, m) for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)]:
        body.set_submodule(name, FrozenNorm(norm))


class Backbone(nn.Module):
    """(B, 3, H, W), H and W multiples of 32 -> five maps of `channels` at strides 8, 16, 32, 64, 128.

    `frozen_norm` turns batch norms into constants: pretrained statistics beat those of the few images on a rank.
    `self.name` is the architecture's, also for a model on the hub (hf-hub:user/repo). Raises UserError.
    """

    def __init__(self, name: str, channels: int, pretrained: bool = False, frozen_norm: bool = False):
        super().__init__()
        self.name, overlay = hub_model(name) if name.startswith(HUB) else (name, None)
        self.body = create_body(self.name, pretrained, overlay)
        if frozen_norm:
            freeze_norms(self.body)
        strides, widths = self.body.feature_info.reduction(), self.body.feature_info.channels()
        if missing := set(STRIDES[:3]) - set(strides):
            raise UserError(f"{name!r} (--backbone) has features at strides {strides}, not at {sorted(missing)}")
        self.taps = [max(i for i, s in enumerate(strides) if s == stride) for stride in STRIDES[:3]]
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.neck = FeaturePyramidNetwork([widths[i] for i in self.taps], channels, LastLevelP6P7(channels, channels))
        normalisation = timm.data.resolve_model_data_config(self.body)
        self.mean, self.std = normalisation["mean"], normalisation["std"]

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body(images)
        taps = (features[i].movedim(3, 1) if self.channels_last else features[i] for i in self.taps)
        return list(self.neck({str(i): tap for i, tap in enumerate(taps)}).values())
