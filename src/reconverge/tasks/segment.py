"""Semantic segmentation: UPerNet on the backbone model=NAME, cross-entropy of pixels, mIoU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reconverge.config.settings import Train
from reconverge.data import map_transforms
from reconverge.data.loader import Batch, Images
from reconverge.data.mix import Normalise
from reconverge.data.sources import Source
from reconverge.distributed.world import World
from reconverge.models import create, drop_path, segmentation, upernet
from reconverge.report import map_pictures, pictures
from reconverge.run import map_outcomes, reader
from reconverge.training.datasets import Datasets
from reconverge.training.evaluate_maps import Evaluator, Result
from reconverge.training.pixel_loss import pixel_loss


class Segment:
    """A task (see Task), whose `model` takes normalised images (N, 3, H, W), stochastic depth masks (N,
    drops) and the two dropout masks of UPerNet, and returns its two logits.
    """

    scores = ("miou", "pixel_accuracy", "mean_accuracy", "loss")

    def __init__(
        self,
        cfg: Train,
        data: Datasets,
        model: Callable[..., Any],
        rates: list[float],
        world: World,
        workers: int,
    ):
        self._cfg, self._data, self._model, self._rates, self._device = cfg, data, model, rates, world.device
        self._normalise = Normalise(cfg.data.mean, cfg.data.std, world.device, cfg.channels_last)
        self._evaluator = Evaluator(cfg.segment, self._normalise, world, workers, cfg.data.on_bad_image)

    @staticmethod
    def network(cfg: Train, classes: int) -> nn.Module:
        net = segmentation.build(cfg.model, classes, cfg.seed, cfg.segment.channels)
        create.refuse_sizes(net, {"augment.size": cfg.augment.size})
        return net

    @staticmethod
    def on_meta(cfg: Train, classes: int) -> nn.Module:
        net = segmentation.on_meta(cfg.model, classes, cfg.segment.channels)
        create.refuse_sizes(net, {"augment.size": cfg.augment.size})
        return net

    @staticmethod
    def augmented(cfg: Train, source: Source) -> Images:
        transform = map_transforms.training(cfg.augment.size, cfg.segment, cfg.augment.flip, cfg.data.mean)
        return Images(source, map_transforms.mapped(transform), cfg.seed, cfg.data.on_bad_image)

    def inputs(self, batch: Batch, key: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W), label maps (N, H, W), masks (N, drops), and UPerNet's masks (upernet.draw)."""
        (maps,) = batch.targets
        masks = drop_path.draw(self._rates, len(maps), key, self._device)
        dropped = upernet.draw(self._cfg.segment.channels, len(maps), key, self._device)
        return self._normalise(batch.images), maps, masks, *dropped

    def loss(self, images: Tensor, maps: Tensor, *masks: Tensor) -> Tensor:
        return pixel_loss(self._model(images, *masks), maps, self._cfg.batch)

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, Result] | None:
        assert self._data.validation is not None, "without validation images evaluate_every is never"
        return self._evaluator(models, self._data.validation)

    def draw_inputs(self, folder: Path, images: Tensor, maps: Tensor, *masks: Tensor) -> None:
        map_pictures.first_batch(folder, images, maps, self._data.training.classes, self._cfg.data)

    def draw_results(self, folder: Path, step: int, results: dict[str, Result]) -> None:
        validation, clock = self._data.validation, self._data.clock
        assert validation is not None
        map_outcomes.save(folder / "outcomes.npz", step, validation, results)
        pictures.curves(folder, reader.metrics(folder), clock.steps_per_epoch, self._cfg)
        map_pictures.predictions(folder, validation, results)
