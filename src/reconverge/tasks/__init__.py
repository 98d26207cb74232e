"""Tasks that the loop of train.py can train, one file each.

A task says which model is built, how samples are loaded, how a microbatch becomes the inputs of the model,
what the loss is, how the model is evaluated, and what is drawn. The loop, the checkpoints and the logs know
nothing of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from reconverge.config.settings import SEGMENT, Train
from reconverge.data.loader import Batch, Images
from reconverge.data.sources import Source
from reconverge.distributed.world import World
from reconverge.training.datasets import Datasets


class Task(Protocol):
    """`model`: takes what `inputs` returns, without the target, and returns what `loss` needs. `rates`: the
    stochastic depth rate of each block. `workers`: data workers of an evaluation.
    """

    def __init__(
        self,
        cfg: Train,
        data: Datasets,
        model: Callable[..., Any],
        rates: list[float],
        world: World,
        workers: int,
    ): ...

    @staticmethod
    def network(cfg: Train, classes: int) -> nn.Module:
        """The model on the CPU, with the initial weights of the seed. Errors: Stop(USAGE)."""

    @staticmethod
    def on_meta(cfg: Train, classes: int) -> nn.Module:
        """The same model on the meta device, where weights have no values. Errors: Stop(USAGE)."""

    @staticmethod
    def augmented(cfg: Train, source: Source) -> Images:
        """The training samples as data workers load and augment them."""

    def inputs(self, batch: Batch, key: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """What `loss` takes, for one microbatch: tensors with a row for each image. They hold every random
        draw of the microbatch; key = (seed, step, microbatch).
        """

    @property
    def loss(self) -> Callable[..., Tensor]:
        """Of `inputs`: the share of these images in the loss of the step, which is the sum of such shares."""

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, Any] | None:
        """The results of models in evaluation mode on the validation images, by kind of weights; None if a
        signal cut it short. A result has `left_out` and the numbers that `scores` names.

        Errors: Stop(NOT_FINITE, DAMAGED).
        """

    @property
    def scores(self) -> tuple[str, ...]:
        """The numbers of an evaluation, by their names in metrics.jsonl. The first one says which is best."""

    @property
    def draw_inputs(self) -> Callable[..., None]:
        """Of the folder of the run and `inputs`: first_batch.png."""

    def draw_results(self, folder: Path, step: int, results: dict[str, Any]) -> None:
        """outcomes.npz, curves.png and predictions.png in the folder of the run, after an evaluation."""


def of(cfg: Train) -> type[Task]:
    """The task of a run."""
    if cfg.task == SEGMENT:
        from reconverge.tasks.segment import Segment  # imports segmentation-models-pytorch

        return Segment
    from reconverge.tasks.classify import Classify

    return Classify
