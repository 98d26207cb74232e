"""UPerNet (Xiao et al. 2018) for semantic segmentation, as the paper trains it on ADE20K (section 4).

The layers of the decoder are those of segmentation-models-pytorch; its forward pass is written anew here,
because torch's bilinear resizing and adaptive pooling are not deterministic on CUDA.
"""

from typing import Any

import numpy as np
import torch
from segmentation_models_pytorch.base.modules import Conv2dReLU
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from reconverge.base import chance
from reconverge.models.pyramid import Pyramid
from reconverge.models.resample import Pool, Resize

DROPOUT = 0.1  # rate of whole channels before each classifier, in training
AUXILIARY_LEVEL = 2  # the output that the auxiliary head looks at: of the third stage


class Decoder(UPerNetDecoder):
    """Four maps, from fine to coarse -> (N, channels, H / 4, W / 4).

    A pyramid of averages (1, 2, 3, 6 bins a side) around the coarsest map; from there, each finer map is
    added to the enlarged coarser one; all four are enlarged and joined.
    """

    def __init__(self, widths: list[int], channels: int):
        super().__init__((3, 0, *widths), decoder_channels=channels)  # smp counts maps from the image itself
        self.feature_norms = nn.ModuleList()  # the pyramid has them
        for block in self.psp.blocks:
            block[0] = Pool(block[0].output_size)
        self.resize = Resize()

    def forward(self, maps: list[Tensor]) -> Tensor:
        top = maps[-1]
        pooled = [self.resize(block(top), top.shape[2:]) for block in self.psp.blocks]
        merged = [self.psp.out_conv(torch.cat([top, *pooled], dim=1))]  # from coarse to fine
        for block, finer in zip(self.fpn_lateral_blocks, maps[-2::-1], strict=True):
            merged.append(block.conv_norm_relu(finer) + self.resize(merged[-1], finer.shape[2:]))
        smooth = [merged[0], *(conv(x) for conv, x in zip(self.fpn_conv_blocks, merged[1:], strict=True))]
        enlarged = [self.resize(x, maps[0].shape[2:]) for x in reversed(smooth)]
        return self.fusion_block(torch.cat(enlarged, dim=1))


class UPerNet(Pyramid):
    """In evaluation: (N, 3, H, W) -> logits (N, classes, H / 4, W / 4). Resize() gives them for each pixel.

    In training, it also takes the masks of `draw`, and returns (logits, logits of the auxiliary head), the
    latter (N, classes, H / 16, W / 16).
    """

    def __init__(self, classifier: nn.Module, name: str, classes: int, channels: int):
        """`channels`: width of the decoder; the auxiliary head has half of it. Published: 512."""
        super().__init__(classifier, name)
        self.decoder = Decoder(self.widths, channels)
        self.classifier = nn.Conv2d(channels, classes, 1)
        _, auxiliary = widths(channels)
        self.auxiliary = Conv2dReLU(self.widths[AUXILIARY_LEVEL], auxiliary, 3, padding=1)
        self.auxiliary_classifier = nn.Conv2d(auxiliary, classes, 1)

    def forward(self, images: Tensor, *masks: Tensor) -> Any:
        """`masks`: (N, channels) for the decoder, (N, channels // 2) for the auxiliary head."""
        maps = self.features(images)
        decoded = self.decoder(maps)
        if not self.training:
            return self.classifier(decoded)
        assert len(masks) == 2, "a training forward pass needs its dropout masks: call draw"
        seen = self.auxiliary(maps[AUXILIARY_LEVEL])
        return (
            self.classifier(_dropped(decoded, masks[0])),
            self.auxiliary_classifier(_dropped(seen, masks[1])),
        )

    def get_classifier(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        return self.classifier, self.auxiliary_classifier


def widths(channels: int) -> tuple[int, int]:
    """Channels of the decoder and of the auxiliary head."""
    return channels, channels // 2


def draw(
    channels: int, images: int, key: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The dropout masks of a microbatch for the decoder and the auxiliary head: float32 (images, channels) of
    0 or 1 / (1 - DROPOUT). `channels`: of the decoder. key = (seed, step, microbatch).

    A row belongs to one image, so a forward pass of fewer images takes the rows of its images.
    """
    first, second = (
        _mask(chance.uniform((images, width), *key[:1], "dropout", head, *key[1:]), device)
        for head, width in zip(("decoder", "auxiliary"), widths(channels), strict=True)
    )
    return first, second


def _mask(uniform: np.ndarray, device: torch.device) -> Tensor:
    keep = 1 - DROPOUT
    mask = torch.from_numpy((uniform < keep) / keep).float()
    return mask.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else mask


def _dropped(x: Tensor, mask: Tensor) -> Tensor:
    """Dropout2d: whole channels of an image become 0."""
    return x * mask.to(x.dtype)[:, :, None, None]
