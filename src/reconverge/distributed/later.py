"""Numbers on their way from the device to the host, for which the host does not wait until it reads them."""

import math
import time

import torch
from torch import Tensor

from reconverge.base import launcher
from reconverge.base.errors import Exit, Stop

PAUSE = 2e-4  # seconds between two questions whether they are there


class Later:
    """The copy of a tensor on the host. It starts at once, in the order of the device's work."""

    def __init__(self, values: Tensor):
        """`values`: not written to until they are read."""
        self._values = values.detach()
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
        self._copied = recorded(values.device)

    def there(self) -> bool:
        return self._copied is None or self._copied.query()

    def read(self, minutes: float = math.inf) -> Tensor:
        """The values; waits until they are there. Errors: Stop(LOST) after `minutes`."""
        end = time.monotonic() + 60 * minutes
        while not self.there():
            if time.monotonic() > end:
                raise Stop(
                    Exit.LOST,
                    f"the device of rank {launcher.HERE.rank} of {launcher.HERE.size} has not finished its"
                    f" work within {minutes:g} minutes; it may wait for another rank",
                    "devices and ranks that answer within world_timeout",
                    "run the same command again to continue from the last checkpoint; the launcher's log may"
                    " show which rank or device was lost",
                )
            time.sleep(PAUSE)
        return self._values


def recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event after what the device has to do so far; None for a CPU, which has done it."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
