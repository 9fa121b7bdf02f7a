"""The trainer of a rank, with a pause in each step, so that a run lasts and leaves CPU time.

    paced_trainer.py SECONDS [arguments of `python -m cocoa_dist.train`]

How many steps fit into what a test waits for must not depend on how fast a machine is.
"""

from cocoa_dist.runtime import StopRequest

_STOP = StopRequest()
_STOP.install()

import sys  # noqa: E402
import time  # noqa: E402

from cocoa_dist.train import __main__ as trainer  # noqa: E402
from cocoa_dist.train import loop  # noqa: E402


def slow_down(seconds: float) -> None:
    known = loop.StageRun._extras

    def extras(self, batch):
        time.sleep(seconds)
        return known(self, batch)

    loop.StageRun._extras = extras  # called inside every step, on every rank


if __name__ == "__main__":
    slow_down(float(sys.argv[1]))
    trainer._STOP = _STOP
    sys.exit(trainer.main(sys.argv[2:]))
