"""ImageNet: its classes from timm's lists; and the published numbers of images of data sets. Imports no torch
itself.
"""

import re
from typing import NamedTuple


class DataSet(NamedTuple):
    training: int  # images
    validation: int  # images; 0: no validation images were published
    classes: int


# Russakovsky et al. (2015); image-net.org's summary of fall 2011; Zhou et al. (2017), scene parsing.
DATASETS = {
    "imagenet1k": DataSet(1_281_167, 50_000, 1_000),
    "imagenet22k": DataSet(14_197_122, 0, 21_841),
    "ade20k": DataSet(20_210, 2_000, 150),
}


def imagenet1k() -> list[str]:
    """The 1,000 synsets, sorted: the order of classes in every published head."""
    from timm.data import ImageNetInfo  # imported here and below: it takes seconds

    return sorted(ImageNetInfo("imagenet-1k").label_names())


def of_head(rows: int) -> list[str] | None:
    """Synsets in the order of a published head with `rows` rows: 1000, 21841 (fall 2011) or another subset
    of ImageNet that timm knows; None for other numbers.
    """
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": rows})
    return ImageNetInfo(subset).label_names() if subset else None


def described(classes: list[str]) -> list[dict[str, str]]:
    """Synset and name of each class; a class that is not a synset is its own name."""
    names: dict[str, str] = {}
    if all(re.fullmatch(r"n\d{8}", name) for name in classes):
        from timm.data import ImageNetInfo

        # One synset of ImageNet-1K is not in ImageNet-22K.
        for info in (ImageNetInfo("imagenet-22k"), ImageNetInfo("imagenet-1k")):
            names |= {
                name: info.label_name_to_description(name) for name in set(classes) & set(info.label_names())
            }
    return [{"synset": name, "name": names.get(name, name)} for name in classes]
