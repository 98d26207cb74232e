"""The layer of each parameter, for layer-wise learning rate decay from the head to the stem."""

import re

from timm.models import ConvNeXt, group_parameters
from torch import nn

from reconverge.base.errors import Exit, Stop
from reconverge.models.pyramid import Pyramid


def layers(model: nn.Module, rule: str) -> dict[str, int]:
    """Parameter name -> layer: 0 for the stem, the largest number for the head. All that a segmenter has
    beside its backbone is its head.

    `rule`: auto, stages, stage_wise or blocks. Errors: Stop(USAGE).
    """
    body, prefix = (model.body, "body.") if isinstance(model, Pyramid) else (model, "")
    if rule in ("stages", "stage_wise") or (rule == "auto" and isinstance(body, ConvNeXt)):
        if not isinstance(body, ConvNeXt):
            raise Stop(
                Exit.USAGE,
                f"optim.layer_groups={rule} with a {type(body).__name__}",
                "stages and stage_wise, the published groups, for ConvNeXt models; blocks, one group for each"
                " block, for any model",
                "optim.layer_groups=blocks",
            )
        blocks = len(body.stages[2].blocks)  # type: ignore[union-attr,arg-type]
        layer = _stage_wise if rule == "stage_wise" else _stages
        return {name: layer(name.removeprefix(prefix), blocks) for name, _ in model.named_parameters()}
    if not hasattr(body, "group_matcher"):
        raise Stop(
            Exit.USAGE,
            f"optim.layer_decay with a {type(body).__name__}",
            "a model with the method group_matcher, as most timm models have it",
            "optim.layer_decay=1.0",
        )
    found = group_parameters(body, body.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    found = {prefix + name: layer for name, layer in found.items()}
    head = max(found.values()) + 1
    return {name: found.get(name, head) for name, _ in model.named_parameters()}


def _stages(name: str, blocks: int) -> int:
    """The published group of a ConvNeXt parameter, by its timm name. `blocks`: number of blocks of stage 3.

    Three consecutive blocks of the third stage form one group. That gives 12 groups and the head if this
    stage has 27 blocks (official code's optim_factory), and 6 and the head if it has 9 (the authors'
    detection and segmentation code, for T). A downsampling layer belongs to the first group of its stage.
    """
    last = 3 + -(-blocks // 3)  # the group of the fourth stage
    if name.startswith("stem."):
        return 0
    if found := re.match(r"stages\.(\d)\.(?:downsample|blocks\.(\d+))\.", name):
        stage, block = int(found[1]), int(found[2] or 0)
        return (1, 2, 3 + block // 3, last)[stage]
    return last + 1


def _stage_wise(name: str, blocks: int) -> int:
    """The published group in segmentation (the authors' layer_decay_optimizer_constructor): the stem and all
    downsampling layers, then the blocks of each stage, then the head.

    The head has the number that it has in `_stages`, so it is several layers above the fourth stage.
    """
    if found := re.match(r"(?:stem|stages\.(\d)\.(?:downsample|blocks))\.", name):
        return int(found[1]) + 1 if ".blocks." in found[0] else 0
    return _stages("head", blocks)
