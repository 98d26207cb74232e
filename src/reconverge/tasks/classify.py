"""Image classification: normalise and mix, cross-entropy, top-1."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reconverge.config.settings import Train
from reconverge.data import transforms
from reconverge.data.loader import Batch, Images
from reconverge.data.mix import Mix, Normalise
from reconverge.data.sources import Source
from reconverge.distributed.world import World
from reconverge.models import create, drop_path
from reconverge.report import pictures
from reconverge.run import predictions, reader
from reconverge.training.datasets import Datasets
from reconverge.training.evaluate import Evaluator, Result


class Classify:
    """A task (see Task), whose `model` takes normalised images (N, 3, H, W) and stochastic depth masks (N,
    drops), and returns logits (N, classes).
    """

    scores = ("top1", "top5", "loss", "ece")

    def __init__(
        self,
        cfg: Train,
        data: Datasets,
        model: Callable[[Tensor, Tensor], Tensor],
        rates: list[float],
        world: World,
        workers: int,
    ):
        self._cfg, self._data, self._model, self._rates, self._device = cfg, data, model, rates, world.device
        self._normalise = Normalise(cfg.data.mean, cfg.data.std, world.device, cfg.channels_last)
        self._mix = Mix(cfg.augment.erase, cfg.mix, len(data.training.classes))
        self._evaluator = Evaluator(cfg.evaluate, self._normalise, world, workers, cfg.data.on_bad_image)

    @staticmethod
    def network(cfg: Train, classes: int) -> nn.Module:
        net = create.model(cfg.model, classes, cfg.seed)
        create.refuse_sizes(net, {"augment.size": cfg.augment.size, "evaluate.size": cfg.evaluate.size})
        return net

    @staticmethod
    def on_meta(cfg: Train, classes: int) -> nn.Module:
        net = create.on_meta(cfg.model, classes)
        create.refuse_sizes(net, {"augment.size": cfg.augment.size, "evaluate.size": cfg.evaluate.size})
        return net

    @staticmethod
    def augmented(cfg: Train, source: Source) -> Images:
        load = transforms.labelled(transforms.training(cfg.augment, cfg.data.mean, cfg.data.decode))
        return Images(source, load, cfg.seed, cfg.data.on_bad_image, erase=cfg.augment.erase)

    def inputs(self, batch: Batch, key: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, H, W), targets (N, classes), masks (N, drops)."""
        (labels,) = batch.targets
        images, targets = self._mix(self._normalise(batch.images), labels, key, batch.noise)
        return images, targets, drop_path.draw(self._rates, len(images), key, self._device)

    def loss(self, images: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        return cross_entropy(self._model(images, masks).float(), targets, reduction="sum") / self._cfg.batch

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, Result] | None:
        assert self._data.validation is not None, "without validation images evaluate_every is never"
        return self._evaluator(models, self._data.validation)

    def draw_inputs(self, folder: Path, images: Tensor, targets: Tensor, masks: Tensor) -> None:
        cfg, classes = self._cfg, self._data.training.classes
        pictures.first_batch(folder, images, targets, classes, cfg.data, cfg.mix)

    def draw_results(self, folder: Path, step: int, results: dict[str, Result]) -> None:
        validation, clock = self._data.validation, self._data.clock
        assert validation is not None
        predictions.save(folder / "outcomes.npz", step, validation, results)
        pictures.curves(folder, reader.metrics(folder), clock.steps_per_epoch, self._cfg)
        pictures.predictions(folder, validation, self._cfg.evaluate, results)
