"""Decodes the validation images while the first epoch is trained, so that a damaged one is known before the
first evaluation.
"""

import multiprocessing
import os
import signal
from typing import Any

from reconverge.base.errors import Exit, Stop
from reconverge.base.signals import CAUGHT
from reconverge.base.terminal import say
from reconverge.data import image
from reconverge.data.sources import Source
from reconverge.distributed.world import World


class Early:
    """A process of rank 0 with a low priority, which decodes every validation image once.

    `on_bad_image`: as for training images; "substitute" only says which images evaluations will leave out.
    """

    def __init__(self, validation: Source, on_bad_image: str, rank: int):
        self.trouble: Stop | None = None  # what the run has to stop for, after it has saved its step
        self._stops = on_bad_image == "stop"
        self._receiver: Any = None  # None: finished, or another rank
        self._process: Any = None
        if rank == 0:
            context = multiprocessing.get_context("fork")
            self._receiver, sender = context.Pipe(duplex=False)
            self._process = context.Process(target=_decode, args=(validation, sender), daemon=True)
            self._process.start()
            sender.close()

    def news(self) -> bool:
        """Whether this rank knows something that was not said, or that the process has ended."""
        return self._receiver is not None and self._receiver.poll()

    def settle(self, world: World) -> None:
        """Say what was found since the last call, or on all ranks note it as `trouble`."""
        found = [text for texts in world.gather_objects(self._found()) for text in texts]
        if not found:
            return
        if not self._stops:
            for text in found:
                say(f"damaged validation image, which evaluations leave out: {text}")
            return
        self.trouble = Stop(
            Exit.DAMAGED,
            f"damaged validation images: {'; '.join(found[:5])}"
            f"{f'; and {len(found) - 5} more' if found[5:] else ''}",
            "validation images that Pillow can decode completely; the evaluation would stop at the first"
            " damaged one",
            "repair the file and run the same command again (if its size is another then, with"
            " resume_allow=[data]); or data.on_bad_image=substitute, which leaves it out of every evaluation",
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()  # it ignores signals that end a job
            self._process.join()

    def _found(self) -> list[str]:
        found = []
        try:
            while self._receiver is not None and self._receiver.poll():
                found.append(self._receiver.recv())
        except (EOFError, OSError):  # it has ended
            self._receiver.close()
            self._receiver = None
        return found


def _decode(validation: Source, sender: Any) -> None:
    os.nice(10)
    for number in CAUGHT:
        signal.signal(number, signal.SIG_IGN)  # as data workers
    training = os.getppid()
    for sample in range(len(validation)):
        if os.getppid() != training:  # it was killed
            break
        try:
            image.rgb(image.opened(validation.read(sample)))
        except image.Undecodable as error:
            sender.send(f"{validation.where(sample)}: {error}")
        except Stop as stop:
            if stop.code == Exit.DAMAGED:
                sender.send(str(stop.args[1]))
    os._exit(0)  # without what the training process does when it ends
