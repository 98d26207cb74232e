"""Published speed of the paper's models in images/s of inference, and published memory of training."""

# (model, pixels) -> images/s on a V100 (Tables 1 and 2).
V100 = {
    ("regnety_16g", 224): 334.7, ("effnet_b7", 600): 55.1, ("effnetv2_l", 480): 83.7,
    ("effnetv2_xl", 480): 56.5,
    ("deit_s", 224): 978.5, ("deit_b", 224): 302.1, ("vit_s", 224): 978.5, ("vit_b", 224): 302.1,
    ("vit_l", 224): 93.1,
    ("vit_b", 384): 93.1, ("vit_l", 384): 28.5,
    ("swin_t", 224): 757.9, ("swin_s", 224): 436.7, ("swin_b", 224): 286.6, ("swin_b_384", 384): 85.1,
    ("swin_l", 224): 145.0, ("swin_l_384", 384): 46.0,
    ("convnext_t", 224): 774.7, ("convnext_s", 224): 447.1, ("convnext_b", 224): 292.1,
    ("convnext_l", 224): 146.8, ("convnext_xl", 224): 89.3,
    ("convnext_t", 384): 282.8, ("convnext_s", 384): 163.5, ("convnext_b", 384): 95.7,
    ("convnext_l", 384): 50.4, ("convnext_xl", 384): 30.2,
    ("convnext_iso_s", 224): 1038.7, ("convnext_iso_b", 224): 320.1, ("convnext_iso_l", 224): 94.4,
}  # fmt: skip
# (model, pixels) -> images/s on an A100 with tf32 and channels_last (Table 12).
A100 = {
    ("swin_t", 224): 1325.6, ("swin_s", 224): 857.3, ("swin_b", 224): 662.8, ("swin_b_384", 384): 242.5,
    ("swin_l", 224): 435.9, ("swin_l_384", 384): 157.9,
    ("convnext_t", 224): 1943.5, ("convnext_s", 224): 1275.3, ("convnext_b", 224): 969.0,
    ("convnext_l", 224): 611.5, ("convnext_xl", 224): 424.4,
    ("convnext_b", 384): 336.6, ("convnext_l", 384): 211.4, ("convnext_xl", 384): 147.4,
}  # fmt: skip
# Model -> GB of memory for training with a batch of 32 images of 224 px (Table 2).
TRAINING_GB = {
    "vit_s": 4.9,
    "vit_b": 9.1,
    "vit_l": 22.5,
    "convnext_iso_s": 4.2,
    "convnext_iso_b": 7.7,
    "convnext_iso_l": 20.4,
}
# How the published figures were measured, in the words of our settings. In torch, deterministic kernels are
# off unless they are asked for, and the published codes do not ask.
CONDITIONS = {
    "V100": "deterministic=false precision=fp32 channels_last=false compile=false",
    "A100 tf32 channels_last": "deterministic=false precision=tf32 channels_last=true compile=false",
}


def figures(model: str, size: int) -> dict[str, float]:
    """The published numbers of a model at an image size: name of the number -> number."""
    found = {
        f"{gpu}, images/s": table.get((model, size))
        for gpu, table in (("V100", V100), ("A100 tf32 channels_last", A100))
    }
    if size == 224:
        found["training at batch 32, GB"] = TRAINING_GB.get(model)
    return {name: value for name, value in found.items() if value is not None}
