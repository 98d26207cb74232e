"""One clock, the optimizer step: everything that is counted, derived once."""

from dataclasses import dataclass

from reconverge.base.errors import Exit, Stop
from reconverge.config.settings import Train


@dataclass(frozen=True)
class Clock:
    """All in steps, `microbatches` and `lr_factor` apart."""

    steps_per_epoch: int
    total: int  # length of the schedule
    warmup: int
    end: int  # where this run stops
    save_every: int  # 0: at the end only
    evaluate_every: int | None  # 0: at the end only; None: never
    microbatches: int  # of one step: V
    lr_factor: float  # batch / optim.lr_batch, the linear rule, where a recipe asks for it; else 1

    @classmethod
    def of(cls, cfg: Train, images: int) -> "Clock":
        """The tail of an epoch that does not fill a batch is dropped, as published. Errors: Stop(USAGE)."""
        if cfg.batch > images:
            fitting = min(cfg.microbatch, max(2, images // 2 * 2))
            raise Stop(
                Exit.USAGE,
                f"batch={cfg.batch} with {images} training images",
                "a batch within the data set",
                f"batch={images // fitting * fitting} microbatch={fitting}",
            )
        steps_per_epoch = images // cfg.batch
        total = steps_per_epoch * cfg.epochs

        def every(text: str) -> int:
            return int(text.removesuffix("epoch")) * (steps_per_epoch if text.endswith("epoch") else 1)

        return cls(
            steps_per_epoch=steps_per_epoch,
            total=total,
            warmup=steps_per_epoch * cfg.optim.warmup_epochs,
            end=min(total, cfg.steps or total),
            save_every=every(cfg.save_every),
            evaluate_every=None if cfg.evaluate_every == "never" else every(cfg.evaluate_every),
            microbatches=cfg.batch // cfg.microbatch,
            lr_factor=cfg.batch / cfg.optim.lr_batch if cfg.optim.lr_batch else 1.0,
        )

    def due(self, every: int | None, step: int) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens after `step` of them;
        None: never.
        """
        return every is not None and (step == self.end or (every > 0 and step % every == 0))
