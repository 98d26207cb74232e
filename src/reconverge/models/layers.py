"""Which layer of its model a parameter belongs to, for learning rates that fall layer by layer towards the
stem.
"""

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
                "stages: the groups published for ConvNeXt's four stages; blocks: one group a block, for any"
                " model",
                "optim.layer_groups=blocks",
            )
        blocks = len(model.stages[2].blocks)  # type: ignore[union-attr,arg-type]
        return {name: _stages(name, blocks) for name, _ in model.named_parameters()}
    if not hasattr(model, "group_matcher"):
        raise Stop(
            Exit.USAGE,
            f"optim.layer_decay with a {type(model).__name__}",
            "a model that says which of its parameters form a block (group_matcher, as timm's do)",
            "optim.layer_decay=1.0",
        )
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]


def _stages(name: str, blocks: int) -> int:
    """The published groups of a ConvNeXt by timm's names, three consecutive blocks of its third stage each a
    group.

    12 groups and the head where that stage has 27 blocks (official code's optim_factory), 6 and the head
    where it has 9 (the authors' detection and segmentation code, for T). A downsampling layer goes with the
    first group of its stage.
    """
    last = 3 + -(-blocks // 3)  # the group of the fourth stage
    if name.startswith("stem."):
        return 0
    if found := re.match(r"stages\.(\d)\.(?:downsample|blocks\.(\d+))\.", name):
        stage, block = int(found[1]), int(found[2] or 0)
        return (1, 2, 3 + block // 3, last)[stage]
    return last + 1
