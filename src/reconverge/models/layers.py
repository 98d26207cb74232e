"""The layer of each parameter, for layer-wise learning rate decay from the head to the stem."""

import re

from timm.models import ConvNeXt, group_parameters
from torch import nn

from reconverge.base.errors import Exit, Stop


def layers(model: nn.Module, rule: str) -> dict[str, int]:
    """Parameter name -> layer: 0 for the stem, the largest number for the head.

    `rule`: auto, stages or blocks. Errors: Stop(USAGE).
    """
    if rule == "stages" or (rule == "auto" and isinstance(model, ConvNeXt)):
        if not isinstance(model, ConvNeXt):
            raise Stop(
                Exit.USAGE,
                f"optim.layer_groups=stages with a {type(model).__name__}",
                "stages, the published groups, for ConvNeXt models; blocks, one group for each block, for any"
                " model",
                "optim.layer_groups=blocks",
            )
        blocks = len(model.stages[2].blocks)  # type: ignore[union-attr,arg-type]
        return {name: _stages(name, blocks) for name, _ in model.named_parameters()}
    if not hasattr(model, "group_matcher"):
        raise Stop(
            Exit.USAGE,
            f"optim.layer_decay with a {type(model).__name__}",
            "a model with the method group_matcher, as most timm models have it",
            "optim.layer_decay=1.0",
        )
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]


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
