"""The trainer with faults: `FAULTS="kind:rank:step ..."`; kinds: loss, gradient, sleep, stop,
and room, which leaves a rank no memory before step 1.

`SCORES="0.1 nan ..."` are what evaluations say of every held-out set, by step.
Run like `python -m cocoa_dist.train`, one process a rank.
"""

import os
import signal
import sys
import time

import torch

from cocoa_dist.objectives.reconstruction import Reconstruction
from cocoa_dist.train import __main__ as trainer
from cocoa_dist.train.engine import TrainEngine
from cocoa_dist.train.held_out import HeldOut
from cocoa_dist.train.pack_memory import HostMeter

SCORES = [float(score) for score in os.environ.get("SCORES", "").split()]
FAULTS = os.environ.get("FAULTS", "").split()
step_now = 0
whole_sums = Reconstruction.sums
whole_step = TrainEngine.train_step
whole_room = HostMeter.room


def train_step(self, packs, *, step, extras=()):
    global step_now
    step_now = step
    return whole_step(self, packs, step=step, extras=extras)


def sums(self, outputs, packs):
    found = whole_sums(self, outputs, packs)
    here = f":{os.environ['RANK']}:{step_now}"
    if f"loss{here}" in FAULTS:
        found["text"] = found["text"] * torch.nan
    if f"gradient{here}" in FAULTS:
        found["text"].register_hook(lambda gradient: gradient * torch.inf)
    if f"sleep{here}" in FAULTS:
        fall_asleep()
    if f"stop{here}" in FAULTS:
        os.kill(os.getpid(), signal.SIGSTOP)
    return found


def scores(self, engine, *, beat, stop):
    return {f"held_out_recall/{name}": SCORES[step_now - 1] for name in self.sets}


def fall_asleep() -> None:
    time.sleep(120)


def room(self) -> int:
    return 2**20 if f"room:{os.environ['RANK']}:0" in FAULTS else whole_room(self)


TrainEngine.train_step = train_step
HostMeter.room = room
Reconstruction.sums = sums
if SCORES:
    HeldOut.scores = scores

if __name__ == "__main__":
    sys.exit(trainer.main())
