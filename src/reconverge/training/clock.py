"""All durations of a run in optimizer steps, computed once from the settings."""

from dataclasses import dataclass

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Train


@dataclass(frozen=True)
class Clock:
    """All values are in steps, except `microbatches` and `lr_factor`."""

    steps_per_epoch: int
    total: int  # length of the schedule
    warmup: int
    end: int  # last step of this run
    save_every: int  # 0: at the end only
    evaluate_every: int | None  # 0: at the end only; None: never
    microbatches: int  # in one step, over all ranks
    lr_factor: float  # batch / optim.lr_batch (linear scaling of the learning rate); 1 without optim.lr_batch

    @classmethod
    def of(cls, cfg: Train, images: int) -> "Clock":
        """An incomplete last batch of an epoch is dropped, as published. Errors: Stop(USAGE)."""
        if cfg.batch > images:
            fitting = min(cfg.microbatch, max(2, images // 2 * 2))
            raise Stop(
                Exit.USAGE,
                f"batch={cfg.batch}, but there are only {images} training images",
                "a batch that is not larger than the data set",
                f"batch={images // fitting * fitting} microbatch={fitting}",
            )
        steps_per_epoch = images // cfg.batch
        total = cfg.schedule_steps or steps_per_epoch * cfg.epochs
        warmup = cfg.optim.warmup_steps
        warmup = steps_per_epoch * cfg.optim.warmup_epochs if warmup is None else warmup
        if warmup >= total:  # of one in steps and the other in epochs, only the number of images tells
            raise Stop(
                Exit.USAGE,
                f"a warm-up of {warmup} steps in a schedule of {total} steps",
                "a warm-up shorter than the schedule",
                f"optim.warmup_steps={total // 15}",
            )

        def every(text: str) -> int:
            return int(text.removesuffix("epoch")) * (steps_per_epoch if text.endswith("epoch") else 1)

        return cls(
            steps_per_epoch=steps_per_epoch,
            total=total,
            warmup=warmup,
            end=min(total, cfg.steps or total),
            save_every=every(cfg.save_every),
            evaluate_every=None if cfg.evaluate_every == "never" else every(cfg.evaluate_every),
            microbatches=cfg.batch // cfg.microbatch,
            lr_factor=cfg.batch / cfg.optim.lr_batch if cfg.optim.lr_batch else 1.0,
        )

    def due(self, every: int | None, step: int) -> bool:
        """Whether an action that is due after each `every` steps, and at the end, is due after `step`.

        `every`: 0 is only at the end, None is never.
        """
        return every is not None and (step == self.end or (every > 0 and step % every == 0))
