"""Image classification: normalise and mix, cross-entropy, top-1."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reconverge.config.settings import Train
from reconverge.data.loader import Batch
from reconverge.data.mix import Mix, Normalise
from reconverge.distributed.world import World
from reconverge.models import drop_path
from reconverge.report import pictures
from reconverge.run import predictions, reader
from reconverge.training.datasets import Datasets
from reconverge.training.evaluate import Evaluator, Result


class Classify:
    """`model`: takes normalised images (N, 3, H, W) and stochastic depth masks (N, drops), and returns logits
    (N, classes). `rates`: the drop rate of each block. `workers`: data workers of an evaluation.
    """

    scores = ("top1", "top5", "loss", "ece")  # of an evaluation, by their names in metrics.jsonl

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

    def inputs(self, batch: Batch, key: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """What `loss` takes, for one microbatch: images (N, 3, H, W), targets (N, classes), masks (N, drops).

        They hold every random draw of the microbatch; key = (seed, step, microbatch).
        """
        (labels,) = batch.targets
        images, targets = self._mix(self._normalise(batch.images), labels, key, batch.noise)
        return images, targets, drop_path.draw(self._rates, len(images), key, self._device)

    def loss(self, images: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        """The share of these images in the loss of the step, which is the sum of such shares."""
        return cross_entropy(self._model(images, masks).float(), targets, reduction="sum") / self._cfg.batch

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, Result] | None:
        """The results of models in evaluation mode on the validation images; None if a signal cut it short.

        Errors: Stop(NOT_FINITE, DAMAGED).
        """
        assert self._data.validation is not None, "without validation images evaluate_every is never"
        return self._evaluator(models, self._data.validation)

    def draw_inputs(self, folder: Path, images: Tensor, targets: Tensor, masks: Tensor) -> None:
        """first_batch.png in the folder of the run."""
        cfg, classes = self._cfg, self._data.training.classes
        pictures.first_batch(folder, images, targets, classes, cfg.data, cfg.mix)

    def draw_results(self, folder: Path, step: int, results: dict[str, Result]) -> None:
        """outcomes.npz, curves.png and predictions.png in the folder of the run, after an evaluation."""
        validation, clock = self._data.validation, self._data.clock
        assert validation is not None
        predictions.save(folder / "outcomes.npz", step, validation, results)
        pictures.curves(folder, reader.metrics(folder), clock.steps_per_epoch, self._cfg.mix)
        pictures.predictions(folder, validation, self._cfg.evaluate, results)
