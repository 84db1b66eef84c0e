"""What every stage of a run is given, and how one is trained."""

import functools
from dataclasses import dataclass
from typing import Any

import loop
import page
from accelerate import Accelerator
from rae_settings import RAEConfig
from reading import as_dict
from stage import LossesOf, Stage
from torch import nn

from flowspace.training import Rows
from flowspace.vision.data import Images

__all__ = ["DROPPED", "NOISE", "SPREAD", "STAGES", "TIMES", "Work"]

STAGES = ("decoder", "flow_matching", "mid_training", "distillation", "fine_tuning", "scratch")
"""In their order; what is trained in one depends on the settings of those before it."""

NOISE, TIMES, SPREAD, DROPPED = 0, 1, 2, 5
"""Streams of the draws of a step; 3 and 4 are the discriminator's."""


def fit(stage: Stage, accelerator: Accelerator) -> nn.Module:
    """Train a network in place, or go on with it; return its averaged copy, in eval mode."""
    t, adversary = stage.training, stage.adversary
    with loop.training(stage, accelerator) as run:
        for step in run.steps():  # each ends with the rate, the log, a checkpoint, a look
            run.zero_grad()
            for batch, draws in run.parts():  # this process's rows, in t.accumulate parts
                with run.exchanged(run.network):  # gradients, after the last part
                    with accelerator.autocast():
                        cost = stage.losses(run.network, batch, draws)
                    loss = cost.rows  # of each row, the weighted sum of the terms
                    run.measure(cost, loss)
                    accelerator.backward(loss.mean() / t.accumulate)
                if adversary and adversary.plays(step):
                    made, real = cost.shown()
                    with run.exchanged(adversary.wrapped):
                        with accelerator.autocast():
                            answer = adversary.answer(real, made, draws)
                        accelerator.backward(answer.float().mean() / t.accumulate)
                    run.measure_answer(answer)
            run.update()  # clips; what is not finite changes nothing
    return run.averaged()


@dataclass
class Work:
    """What every stage is given: the settings, the processes, what is read.

    ``rows`` are pictures, or latents that were encoded once.
    """

    config: RAEConfig
    accelerator: Accelerator
    images: Images
    rows: Rows

    @property
    def classes(self) -> int:
        """How many classes the pictures have."""
        return len(self.images.names)

    def fit(self, name: str, network: nn.Module, losses: LossesOf, **more: Any) -> Any:
        """Train a network as the settings of a stage say, or go on; return its average."""
        config = self.config
        number = STAGES.index(name)
        training = getattr(config, name).over(config.training, number)
        stage = Stage(
            name,
            network,
            losses,
            self.rows,
            training=training,
            depends=self.depends(number),
            folder=config.out / name,
            optimizer=loop.optimizer_of(training),
            flip=config.data.flip,
            workers=config.data.workers,
            begun=functools.partial(page.keep_config, config.out, as_dict(config)),
            **more,
        )
        return fit(stage, self.accelerator)

    def depends(self, number: int) -> dict[str, Any]:
        """Return the settings that what is trained in the stage of a number depends on."""
        settings = as_dict(self.config)
        found = {
            "data": settings["data"] | {"workers": None},
            "representation": settings["representation"],
            "network": settings["network"] | {"compile": None},
            "objectives": settings["objectives"],
            "teacher": settings["teacher"],
        }
        for earlier in STAGES[:number]:
            found[earlier] = settings[earlier]
        return found
