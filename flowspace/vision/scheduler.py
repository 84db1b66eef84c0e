"""A flow map in the pipelines of diffusers: its step as a scheduler, its model as their network.

A pipeline of diffusers asks its scheduler for timesteps, hands each to its network, and gives what
the network returns to ``scheduler.step``. `FlowMapScheduler` takes the step of `FlowMap`: from t
to the next time s of the grid. The network of a flow map must know s too, of which a pipeline says
nothing: `PipelineNetwork` asks the scheduler for it.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from flowspace.backends.torch_backend import time_dtype
from flowspace.errors import InputError, TimeError
from flowspace.flow_map import FlowMap
from flowspace.schedules import Schedule
from flowspace.solvers import falling_grid
from flowspace.statistics import AbstractStatistic, MatchedStatistic, Statistic
from flowspace.time_functions import TimeFunction

__all__ = ["FlowMapScheduler", "PipelineNetwork"]

SAME = 1e-5
"""Times that differ by less are one: timesteps are rounded to float32, more than once."""


class FlowMapScheduler(SchedulerMixin, ConfigMixin):
    """The step of a flow map, z_s = (1 + gamma/delta) z_t - f/delta, as a scheduler of diffusers.

    Saved and loaded as diffusers does, with its formulas as text. The step depends on the timestep
    that it is given, and on nothing that went before.

    Args:
        alpha: of the schedule, a formula in t.
        beta: likewise.
        gamma: of the statistic, a formula in t and s; with ``delta``, or neither for the matched
            statistic.
        delta: likewise. MeanFlow's is gamma = "0", delta = "1/(t - s)".
        renoise: step to s = 0 and back with fresh noise, as consistency models do.
        num_train_timesteps: the timestep of t = 1.

    Attributes:
        times: the grid ``(n + 1,)``, falling from 1 to 0, in float32.
        timesteps: what a pipeline hands to its network, ``(n,)``: the times but the last, times
            ``num_train_timesteps``.
        init_noise_sigma: 1, what a pipeline multiplies its noise by.

    Raises:
        InputError: if only one of gamma and delta is given.
        FlowspaceError: if formulas make no schedule or no statistic.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        alpha: str = "1 - t",
        beta: str = "t",
        gamma: str | None = None,
        delta: str | None = None,
        renoise: bool = False,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.schedule = Schedule(alpha, beta)
        self.statistic: AbstractStatistic = MatchedStatistic()
        if gamma is not None and delta is not None:
            self.statistic = Statistic(gamma, delta)
        elif gamma is not None or delta is not None:
            raise InputError(
                f"got gamma = {gamma!r} and delta = {delta!r}; write both, or neither for the "
                "matched statistic"
            )
        self.coefficients = self.statistic.coefficients(self.schedule)
        self.set_timesteps(1)

    @classmethod
    def of(cls, flow_map: FlowMap, **settings: Any) -> "FlowMapScheduler":
        """Return the scheduler of a flow map, such as ``loss_fn.flow_map(model)``.

        Args:
            flow_map: whose schedule and statistic are taken.
            settings: ``renoise`` and ``num_train_timesteps``.

        Raises:
            InputError: if one of them has no formula, which a file could keep.
        """
        alpha, beta = map(_text_of, flow_map.schedule.functions)
        formulas = {"alpha": alpha, "beta": beta}
        if isinstance(flow_map.statistic, Statistic):
            formulas["gamma"] = _text_of(flow_map.statistic.gamma)
            formulas["delta"] = _text_of(flow_map.statistic.delta)
        return cls(**formulas, **settings)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: "str | torch.device | None" = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the grid: even from 1 to 0, or given.

        Args:
            num_inference_steps: evaluations of the network.
            device: where ``timesteps`` are to be.
            timesteps: falling from ``num_train_timesteps``, without the last, which is 0; instead
                of a number.

        Raises:
            TimeError: if the number is no count, or timesteps do not fall strictly from
                ``num_train_timesteps`` and end above 0.
            InputError: if both are given, or neither.
        """
        whole, given = self._whole, None
        if (num_inference_steps is None) == (timesteps is None):
            raise InputError(
                f"got num_inference_steps = {num_inference_steps!r} and timesteps = "
                f"{timesteps!r}; write one of the two"
            )
        if timesteps is not None:
            given = [float(each) / whole for each in timesteps] + [0.0]
        self.times = falling_grid(torch.empty(1), num_inference_steps or 0, given)
        self.timesteps = (self.times[:-1] * whole).to(device)
        self.num_inference_steps = len(self.timesteps)

    @property
    def _whole(self) -> float:
        """The timestep of t = 1."""
        return float(self.config["num_train_timesteps"])

    def pair(self, timestep: "Tensor | float") -> tuple[Tensor, Tensor]:
        """Return the time t of a timestep, and the destination s that the network is asked for.

        Both are of shape ``()``. s is the next time of the grid, or 0 where noise is added anew.

        Raises:
            TimeError: if it is not one of ``timesteps``.
        """
        index = self._index_of(timestep)
        destination = index + 1
        if self.config["renoise"]:
            destination = -1
        return self.times[index], self.times[destination]

    def _index_of(self, timestep: "Tensor | float") -> int:
        time = float(torch.as_tensor(timestep).flatten()[0]) / self._whole
        apart = (self.times[:-1] - time).abs()
        index = int(apart.argmin())
        if float(apart[index]) > SAME:
            listed = [round(each, 3) for each in self.timesteps.tolist()]
            raise TimeError(
                f"got timestep = {time * self._whole:g}, which is not on the grid; write one of "
                f"{listed}, or set_timesteps first"
            )
        return index

    def scale_model_input(
        self, sample: Tensor, timestep: "Tensor | float | None" = None
    ) -> Tensor:
        """Return the sample as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return z_t = alpha z + beta eps, of the samples' shape.

        Args:
            original_samples: clean, ``(B, *)``.
            noise: standard normal, of their shape.
            timesteps: ``()`` or ``(B,)``, from 0 to ``num_train_timesteps``.
        """
        t = timesteps.to(original_samples.device, torch.float32) / self._whole
        z_t, _ = self.schedule.perturb(original_samples, noise, t)
        return z_t

    def step(
        self,
        model_output: Tensor,
        timestep: "Tensor | float",
        sample: Tensor,
        generator: "torch.Generator | list[torch.Generator] | None" = None,
        return_dict: bool = True,
    ) -> "SchedulerOutput | tuple[Tensor]":
        """Return the state at the next time of the grid.

        Args:
            model_output: f(z_t, t, s), of the states' shape; of another only in a single step,
                across spaces.
            timestep: one of ``timesteps``.
            sample: z_t, of shape ``(B, *)``.
            generator: of the noise that is added anew.
            return_dict: False returns a tuple.

        Raises:
            TimeError: if the timestep is not on the grid.
            InputError: if the output's shape is another than the states' in one of several steps.
        """
        index = self._index_of(timestep)
        t, s = self.pair(timestep)
        t, s = t.to(sample.device), s.to(sample.device)
        if model_output.shape == sample.shape:
            moved = self.coefficients.step(model_output, sample, t, s)
        elif len(self.timesteps) == 1:
            moved = self._across(model_output, sample)
        else:
            raise InputError(
                f"got shape {tuple(model_output.shape)} from the network for states of "
                f"{tuple(sample.shape)} in one of {len(self.timesteps)} steps; write "
                "num_inference_steps=1, or sample by FlowMap.sample(..., encode=...)"
            )
        if self.config["renoise"] and index + 1 < len(self.timesteps):
            noise = randn_tensor(
                moved.shape, generator=generator, device=moved.device, dtype=moved.dtype
            )
            following = self.times[index + 1].to(moved.device)
            moved, _ = self.schedule.perturb(moved, noise, following)
        if not return_dict:
            return (moved,)
        return SchedulerOutput(prev_sample=moved)

    def _across(self, model_output: Tensor, noise: Tensor) -> Tensor:
        """Return the sample of a single step into another space."""
        flow = FlowMap(lambda z_t, t, s: model_output, self.schedule, self.statistic)
        return flow.sample(noise)

    def __len__(self) -> int:
        return int(self._whole)


class PipelineNetwork(ModelMixin, ConfigMixin):
    """A model of flowspace where a pipeline of diffusers expects its network.

    It is called as ``network(sample, timestep, class_labels=...)`` and returns an object with
    ``.sample``. ``DDPMPipeline`` takes it as its ``unet``, ``DiTPipeline`` as its ``transformer``.
    It is not saved: save the model, and the scheduler.

    Args:
        model: a module called as ``model(z_t, t, s, **cond)``.
        scheduler: of the same pipeline, which knows the destinations.
        channels: of a state.
        size: height and width of a state: a side of a square, or a pair.
        labels: the model's name of the classes.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: FlowMapScheduler,
        channels: int,
        size: int | Sequence[int],
        labels: str = "labels",
    ) -> None:
        super().__init__()
        self.model = model
        self.scheduler = scheduler
        self.labels = labels
        self.register_to_config(sample_size=size, in_channels=channels, out_channels=channels)

    def forward(
        self,
        sample: Tensor,
        timestep: "Tensor | float",
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> "UNet2DOutput | tuple[Tensor]":
        """Return f(z_t, t, s) of states ``(B, *)`` at one of the scheduler's timesteps.

        Args:
            sample: z_t.
            timestep: one for all rows, ``()`` or ``(B,)``.
            class_labels: classes ``(B,)``, or None.
            return_dict: False returns a tuple.

        Raises:
            TimeError: if the timestep is not on the scheduler's grid.
        """
        t, s = self.scheduler.pair(timestep)
        like = {"device": sample.device, "dtype": time_dtype(sample)}
        t = t.to(**like).repeat(len(sample))
        s = s.to(**like).repeat(len(sample))
        cond = {}
        if class_labels is not None:
            cond[self.labels] = class_labels
        prediction = self.model(sample, t, s, **cond)
        if not return_dict:
            return (prediction,)
        return UNet2DOutput(sample=prediction)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Refuse: a model of any kind cannot be built from a file.

        Raises:
            InputError: always.
        """
        raise InputError(
            "got a PipelineNetwork to save, which only stands between a pipeline and a model; "
            "save network.model and network.scheduler"
        )


def _text_of(function: TimeFunction) -> str:
    """Return a formula as text, which a file keeps."""
    if function.expression is None:
        raise InputError(
            "got a schedule or a statistic of callables, which no file can keep; write formulas, "
            "such as Schedule(alpha='1 - t', beta='t')"
        )
    return str(function)
