"""The isotropic ConvNeXts (section 3.3 and Table 2): the layout of ViT with ConvNeXt blocks of one width, and
no downsampling after the stem.
"""

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Isotropic(nn.Module):
    """(N, 3, H, W) -> logits (N, classes). H and W must be multiples of 16.

    `layer_scale` None means no layer scale, as published for S and B.
    """

    def __init__(self, width: int, depth: int, classes: int, drop_path: float, layer_scale: float | None):
        super().__init__()
        rates = [drop_path * block / (depth - 1) for block in range(depth)]
        self.stem = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.blocks = nn.Sequential(
            *[ConvNeXtBlock(width, ls_init_value=layer_scale, drop_path=rate) for rate in rates]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self.recompute = False

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.recompute and torch.is_grad_enabled()
                else block(x)
            )
        return self.head(self.norm(x.mean((2, 3))))

    # The methods below have the names of timm's models, so that other code can treat this model like timm's.

    def get_classifier(self) -> nn.Linear:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.recompute = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The stem is one layer, and each block is one. Norm and head match neither: the last layer."""
        return {"stem": r"^stem", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}
