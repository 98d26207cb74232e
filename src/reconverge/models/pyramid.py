"""The four outputs of a classifier's stages, as segmentation and detection use them."""

from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from reconverge.base.errors import Exit, Stop

STRIDES = (4, 8, 16, 32)  # pixels of the image for one position of each output


class Pyramid(nn.Module):
    """A backbone whose `features` are the outputs of its four stages, each behind a layer norm: (N, 3, H, W)
    -> four maps (N, widths[i], H / STRIDES[i], W / STRIDES[i]).

    `body` is the classifier without its last norm and its head. Below `body.`, the names of parameters are
    those of the classifier. The norms `norm0` to `norm3` are new: over channels, eps 1e-6, as in the authors'
    code for segmentation and detection. H and W that are no multiples of 32 give sizes rounded as the model
    does. Errors: Stop(USAGE) for a model without four stages of these strides.
    """

    body: Any  # as timm's models, beside nn.Module's methods

    def __init__(self, classifier: Any, name: str):
        """`classifier`: a model of timm, which is changed. `name`: for the error message."""
        super().__init__()
        _refuse(classifier, name)
        complete = set(classifier.state_dict())
        classifier.prune_intermediate_layers(len(STRIDES), prune_norm=True, prune_head=True)
        if hasattr(classifier, "head"):
            classifier.head = nn.Identity()  # ConvNeXt's contains the last norm
        self.body = classifier
        self.widths = [level["num_chs"] for level in _levels(classifier)]
        for level, width in enumerate(self.widths):
            self.add_module(f"norm{level}", LayerNorm2d(width, eps=1e-6))
        # Names of classifier weights that have no use here, for files that contain them.
        self.dropped = frozenset(f"body.{key}" for key in complete - set(self.body.state_dict()))

    def features(self, images: Tensor) -> list[Tensor]:
        maps = self.body.forward_intermediates(images, indices=len(STRIDES), intermediates_only=True)
        return [self.get_submodule(f"norm{level}")(x) for level, x in enumerate(maps)]

    # The methods below have the names of timm's models, so that other code can treat this model like timm's.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.body.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        own = self.body.no_weight_decay() if hasattr(self.body, "no_weight_decay") else set()
        return {f"body.{name}" for name in own}


def _levels(classifier: nn.Module) -> list[dict]:
    known = getattr(classifier, "feature_info", None)
    return list(known)[-len(STRIDES) :] if isinstance(known, list | tuple) else []


def _refuse(classifier: nn.Module, name: str) -> None:
    """Errors: Stop(USAGE) for a model without four stages of the right strides."""
    methods = ("forward_intermediates", "prune_intermediate_layers")
    strides = tuple(level["reduction"] for level in _levels(classifier))
    if strides == STRIDES and all(hasattr(classifier, method) for method in methods):
        return
    levels = f"has outputs at the strides {', '.join(map(str, strides))}" if strides else "names no stages"
    raise Stop(
        Exit.USAGE,
        f"{name} as the backbone of a pyramid; this model {levels}",
        f"a model of timm with four stages at the strides {', '.join(map(str, STRIDES))}, such as ConvNeXt,"
        " Swin or ResNet",
        "model=convnext_t, or another model with four stages",
    )
