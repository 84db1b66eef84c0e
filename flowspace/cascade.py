r"""A cascade over resolutions: one network takes noise to an image, from small to large.

It is PixelFlow's (Chen et al., arXiv 2504.07963). Stage k of S, from the coarsest, k = 0, works at
1/2^(S-1-k) of an image's size. With u = k/S its first and its last state share one noise n of that
size,

$$\text{start}_k = (1 - t_k)\, \mathrm{Up}(\mathrm{Down}(x_k)) + t_k\, n$$

$$\text{end}_k = (1 - e_k)\, x_k + e_k\, n$$

$$t_k = 2 (1 - u)/(2 - u), \quad e_k = 1 - (k + 1)/S$$

where x_k is the image at the stage's size, Down the mean of 2 x 2 pixels (bilinear halving) and Up
their repetition (nearest). Times are flowspace's: 0 is data and 1 is noise, so t_k and e_k are
weights of the noise; the paper's run the other way.

**A stage is a path like any other.** With "data" = end, "noise" = start and t the stage's own
time, z_t = (1 - t) end + t start has the velocity start - end. No identity that flowspace trains
by asks for noise that is normal, or independent of the data. So any objective trains a stage as it
is, given latents = end and noise = start: flow matching (the paper's), or MeanFlow and CrossFlow,
whose stages take one evaluation each.

**A jump is exact.** Split the noise of stage k into what the coarser stage saw of it and the rest,
n = Up(m)/2 + d: m = 2 Down(n) is standard normal again, and d = n - Up(Down(n)) is independent of
it. With m the coarser stage's noise,

$$\text{start}_k = \mathrm{Up}(\text{end}_{k-1})/(2 - u) + t_k\, d$$

for each image and each noise. The paper's re-noising adds the same in law: a pixel of t_k d has
the spread beta = sqrt(3) (1 - u)/(2 - u), and the pixels of a 2 x 2 cell the correlation -1/3.
Hence one noise of the image's size holds all that a cascade needs, and a sample is a function of
it.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from torch.utils import _pytree as pytree

from flowspace.arrays import Cond, Model, checked_times, draw_noise, is_count
from flowspace.backends import torch_backend
from flowspace.errors import InputError, TimeError
from flowspace.flow_map import FlowMap
from flowspace.guidance import Guidance, RandomGuidance
from flowspace.inputs import check_model, check_states, checked_cond, kind_of, require
from flowspace.objectives import FlowMatchingLoss, LossOutput, Objective
from flowspace.solvers import Solver, VelocityFlow
from flowspace.times import PairSampler, RandomSource, drawn_pairs

__all__ = [
    "Cascade",
    "CascadeBatch",
    "CascadeFlow",
    "CascadeLoss",
    "CascadeOutput",
    "CascadeStage",
]

RAMP = (0, 1 / 6, 2 / 3, 1)
"""The paper's shares of the guidance in each of four stages: 1 + (g - 1) share (section 4.3)."""


def halved(images: Tensor, times: int = 1) -> Tensor:
    """Return images ``(B, C, H, W)`` halved so many times: each pixel is the mean of 2 x 2."""
    for _ in range(times):
        images = avg_pool2d(images, 2)
    return images


def doubled(images: Tensor) -> Tensor:
    """Return images ``(B, C, H, W)`` of twice the height and width: each pixel is repeated."""
    return interpolate(images, scale_factor=2, mode="nearest")


def _check_stages(name: str, value: Any) -> None:
    """Refuse what is no number of stages."""
    reason = "it counts resolutions, so write 1 or more, 4 in the paper"
    require(is_count(value), name, value, reason)


@dataclass(frozen=True)
class CascadeStage:
    """One stage: which path it is, and where it lies in the network's time.

    Args:
        index: k, from 0, the coarsest.
        count: S, how many stages there are.

    Raises:
        InputError: if count is no such count, or index no number below it.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        _check_stages("count", self.count)
        inside = isinstance(self.index, int) and 0 <= self.index < self.count
        reason = f"stages of a cascade of {self.count} are numbered from 0: write less"
        require(inside, "index", self.index, reason)

    @property
    def start(self) -> float:
        """The weight t_k of the noise in the stage's first state, the noisier; 1 for k = 0."""
        u = self.index / self.count
        return 2 * (1 - u) / (2 - u)

    @property
    def end(self) -> float:
        """The weight e_k of the noise in the stage's last state; 0 for the last stage."""
        return 1 - (self.index + 1) / self.count

    @property
    def length(self) -> float:
        """How much of the noise's weight the stage takes away."""
        return self.start - self.end

    @property
    def window(self) -> tuple[float, float]:
        """The network's times of the stage's last and first state.

        The windows of all stages fill [0, 1] in the order of the stages, each as long as its share
        of all lengths.
        """
        lengths = [CascadeStage(k, self.count).length for k in range(self.count)]
        whole = sum(lengths)
        later = sum(lengths[self.index + 1 :])
        return later / whole, sum(lengths[self.index :]) / whole

    def global_time(self, t: Tensor) -> Tensor:
        """Return the network's time for the stage's own, of any shape, in [0, 1]."""
        low, high = self.window
        return low + (high - low) * t

    def local(self, function: Model) -> Model:
        """Return a model or a velocity that takes the stage's own times.

        Args:
            function: ``(z_t, t, s, **cond)`` or ``(z_t, t, **cond)``, at the network's times.
        """

        def at_own_times(z_t: Tensor, *times: Tensor, **cond: Any) -> Tensor:
            global_times = [self.global_time(t) for t in times]
            return function(z_t, *global_times, **cond)

        return at_own_times

    def path(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stage's last and its first state, ``(B, C, H, W)`` each (eqs. 2 and 3).

        An objective is given them as its latents and its noise.

        Args:
            images: x_k, at the stage's size, ``(B, C, H, W)``.
            noise: n, standard normal, of the same shape.
        """
        coarse = images
        if self.index:
            coarse = doubled(halved(images))
        end = (1 - self.end) * images + self.end * noise
        start = (1 - self.start) * coarse + self.start * noise
        return end, start

    def jump(self, state: Tensor, noise: Tensor) -> Tensor:
        """Return the stage's first state ``(B, C, H, W)`` from the last one of the stage before.

        Args:
            state: where the stage before ended, ``(B, C, H/2, W/2)``.
            noise: n, standard normal, ``(B, C, H, W)``; only what its halving loses is added, so
                the state's own noise may be 2 Down(n).
        """
        u = self.index / self.count
        details = noise - doubled(halved(noise))
        return doubled(state) / (2 - u) + self.start * details


class CascadeBatch(NamedTuple):
    """The rows of a batch that are trained in one stage.

    Attributes:
        stage: which.
        rows: their numbers in the batch, ``(b,)``.
        latents: the stage's last states, ``(b, C, h, w)``.
        noise: the stage's first states, of the same shape.
    """

    stage: CascadeStage
    rows: Tensor
    latents: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Cascade:
    """A sequence of stages, each at twice the height and width of the one before.

    With one stage it is no cascade: the path from noise to images.

    Args:
        stages: how many, at least 1; 4 in the paper.

    Raises:
        InputError: if stages is no such count.
    """

    stages: int = 4

    def __post_init__(self) -> None:
        _check_stages("stages", self.stages)

    def __len__(self) -> int:
        return self.stages

    def __getitem__(self, index: int) -> CascadeStage:
        if not 0 <= index < self.stages:
            raise IndexError(f"got stage {index} of a cascade of {self.stages}; they start at 0")
        return CascadeStage(index, self.stages)

    def __iter__(self) -> Iterator[CascadeStage]:
        return (self[k] for k in range(self.stages))

    def noises(self, noise: Tensor) -> list[Tensor]:
        """Return the noise of each stage, coarsest first: halved, and doubled in value.

        Args:
            noise: standard normal, of the images' shape, ``(B, C, H, W)``. So are its halvings.
        """
        self.check_size(noise)
        last = self.stages - 1
        return [self._noise_of(stage, noise, last) for stage in self]

    def batches(self, images: Tensor, noise: Tensor, stages: Tensor) -> Iterator[CascadeBatch]:
        """Yield the rows of each stage that has any, as an objective takes them.

        Args:
            images: ``(B, C, H, W)``.
            noise: standard normal, of the same shape.
            stages: the stage of each row, whole numbers ``(B,)``; on the CPU, since to find the
                rows of a stage on a GPU is to wait for it.

        Raises:
            InputError: if images do not halve S - 1 times, or shapes do not fit.
        """
        self._check_batch(images, noise, stages)
        last = self.stages - 1
        for stage in self:
            rows = (stages == stage.index).nonzero().flatten()
            if not len(rows):
                continue
            rows = _sent(rows, images.device)
            x_k = halved(images[rows], last - stage.index)
            n = self._noise_of(stage, noise[rows], last)
            end, start = stage.path(x_k, n)
            yield CascadeBatch(stage, rows, latents=end, noise=start)

    def assigned(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the stage of each row, ``(rows,)``: every S rows in a row hold each stage once.

        So every stage has its share of a batch, and of any part of it that a process holds; what
        is drawn is where the round starts.

        Args:
            rows: of the batch.
            generator: the source of the one number that is drawn, on its device.
        """
        device = None
        if generator is not None:
            device = generator.device
        first = torch.randint(self.stages, (), generator=generator, device=device)
        places = torch.arange(rows, device=device)
        return (first + places) % self.stages

    def ramp(self, guidance: Guidance, shares: Sequence[float] = RAMP) -> tuple[Guidance, ...]:
        """Return the guidance of each stage: 1 + (g - 1) share, with g the effective scale
        omega/(1 - own_weight) (section 4.3).

        Args:
            guidance: of full strength; its own_weight stays.
            shares: one for each stage; the paper's are for four.

        Raises:
            InputError: if shares are not as many as stages, or the guidance cannot be scaled.
        """
        is_random = isinstance(guidance, RandomGuidance)
        require(
            isinstance(guidance, Guidance) and not is_random,
            "guidance",
            guidance,
            "write for example Guidance(null={'labels': 1000}, omega=2.4)",
        )
        if len(shares) != self.stages:
            raise InputError(
                f"got {len(shares)} shares of guidance for {self.stages} stage(s); "
                "write one for each stage, coarsest first, as shares=(0, 0.5, 1) for three"
            )
        rest = 1 - guidance.own_weight
        full = guidance.omega / rest
        ramp = []
        for share in shares:
            scale = 1 + (full - 1) * share
            ramp.append(replace(guidance, omega=scale * rest))
        return tuple(ramp)

    def check_size(self, images: Tensor) -> None:
        """Refuse what are no images, or cannot be halved S - 1 times.

        Raises:
            InputError: unless they are ``(B, C, H, W)`` with H and W divisible by 2^(S-1).
        """
        check_states("images", images)
        if not isinstance(images, Tensor) or images.ndim != 4:
            kind = type(images).__name__
            raise InputError(
                f"got images of type {kind} and shape {tuple(images.shape)}; "
                "a cascade halves torch tensors of shape (B, C, H, W)"
            )
        height, width = images.shape[2:]
        unit = 2 ** (self.stages - 1)
        if height % unit or width % unit:
            raise InputError(
                f"got images of {height} x {width} for {self.stages} stages, "
                f"which halve them {self.stages - 1} time(s); "
                f"write sizes divisible by {unit}, or fewer stages"
            )

    def _check_batch(self, images: Tensor, noise: Tensor, stages: Tensor) -> None:
        self.check_size(images)
        rows = len(images)
        if noise.shape != images.shape:
            raise InputError(
                f"got noise of shape {tuple(noise.shape)} for images of {tuple(images.shape)}; "
                "write noise of the images' shape: each stage takes its halvings"
            )
        if stages.shape != (rows,) or stages.is_floating_point():
            raise InputError(
                f"got stages of {kind_of(stages)} for {rows} images; "
                "write one whole number for each, "
                "as cascade.assigned(len(images)) does"
            )
        outside = (stages < 0) | (stages >= self.stages)
        if bool(outside.any()):
            raise InputError(
                f"got stages from {int(stages.min())} to {int(stages.max())}; "
                f"they are numbered from 0, the coarsest, to {self.stages - 1}"
            )

    @staticmethod
    def _noise_of(stage: CascadeStage, noise: Tensor, last: int) -> Tensor:
        """Return a stage's noise from the images': each halving is doubled, which keeps its
        variance.
        """
        halvings = last - stage.index
        return 2**halvings * halved(noise, halvings)


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Return row numbers on a device; a GPU is not waited for, which takes pinned memory."""
    if device.type != "cuda" or rows.device.type != "cpu":
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


class CascadeOutput(NamedTuple):
    """What the loss of a cascade returns.

    Attributes:
        loss: of each row, ``(B,)``, with gradient.
        t: the stage's own time of each row, ``(B,)``.
        s: the stage's own destination of each row, ``(B,)``.
        stages: the stage of each row, ``(B,)``.
        outputs: what the objective returned for each stage that had rows, by its number.
    """

    loss: Tensor
    t: Tensor
    s: Tensor
    stages: Tensor
    outputs: dict[int, LossOutput]


@dataclass(frozen=True)
class CascadeLoss:
    """An objective on the stages of a cascade: each row is trained in one of them.

    With one stage it is the objective itself.

    Args:
        cascade: the stages.
        objective: any: ``FlowMatchingLoss()`` is PixelFlow's, ``MeanFlowLoss()`` and
            ``CrossFlowLoss()`` train stages of one evaluation. Or one for each stage, as
            distillation needs: its teacher is ``stage.local(teacher)``.
        packed: call the model once, with lists: of the states, times, destinations and conditions
            of each stage that has rows. Such a model may compute pictures of all sizes as one
            sequence. Flow matching alone allows it, since it differentiates nothing.

    Times are drawn for all rows at once where all stages draw alike, so those of a sampler such as
    `KeyedPairs` do not depend on which rows a process holds.

    Raises:
        InputError: if an objective is none, their number is wrong, or packed is asked of another
            objective than flow matching.
    """

    cascade: Cascade
    objective: Objective | Sequence[Objective]
    packed: bool = False

    def __post_init__(self) -> None:
        require(
            isinstance(self.cascade, Cascade),
            "cascade",
            self.cascade,
            "write for example Cascade(3)",
        )
        for objective in self._objectives:
            require(
                isinstance(objective, Objective),
                "objective",
                objective,
                "write for example FlowMatchingLoss(), or a list of one for each stage",
            )
        if len(self._objectives) != self.cascade.stages:
            raise InputError(
                f"got {len(self._objectives)} objectives for {self.cascade.stages} stage(s); "
                "write one for each stage, or a single one for all"
            )
        once = all(_evaluates_once(each) for each in self._objectives)
        if self.packed and not once:
            raise InputError(
                "got packed=True for an objective that evaluates the model more than once; "
                "write FlowMatchingLoss() without guidance, or packed=False"
            )

    @property
    def _objectives(self) -> Sequence[Objective]:
        if isinstance(self.objective, Sequence):
            return self.objective
        return [self.objective] * self.cascade.stages

    def sampler(self, model: Model, solver: Solver | None = None) -> "CascadeFlow":
        """Return the sampler of a model that was trained with this loss.

        Args:
            model: at the network's times.
            solver: None steps by the flow map; a solver integrates the model's velocity, which is
                all that flow matching trains.
        """
        flow = self._objectives[0].flow_map(model)
        return CascadeFlow(self.cascade, flow, solver)

    def __call__(  # noqa: PLR0913  # an objective's arguments, and the stages
        self,
        model: Model,
        images: Tensor,
        *,
        cond: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        stages: Tensor | None = None,
        t: Tensor | None = None,
        s: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CascadeOutput:
        """Return the loss of each row and what it was made of.

        The model is called once for each stage that has rows, at the stage's size, unless packed.

        Args:
            model: any callable ``model(z_t, t, s, **cond)`` on images of every stage's size and
                the network's times ``(B,)``: `CascadeStage.global_time`.
            images: ``(B, C, H, W)``, a floating dtype.
            cond: keyword arguments of the model; tensors whose first axis is B, also within lists
                and dicts, belong to the rows.
            noise: standard normal noise of the images' shape; by default drawn.
            stages: the stage of each row, ``(B,)``; by default `Cascade.assigned`.
            t: the stage's own times in (0, 1], of shape ``()`` or ``(B,)``; by default drawn by
                the objective's ``times``.
            s: destinations in [0, t], likewise; given if and only if t is; flow matching has none.
            generator: the source of what is drawn.

        Raises:
            InputError: if images do not halve, or shapes do not fit.
            TimeError: if given times are of the wrong type, shape or range.
        """
        check_model(model)
        given = checked_cond(cond)
        self.cascade.check_size(images)
        if noise is None:
            noise = draw_noise(images, generator)
        if stages is None:
            stages = self.cascade.assigned(len(images), generator)
        batches = list(self.cascade.batches(images, noise, stages))
        conds = [_cond_of_rows(given, batch.rows, images) for batch in batches]
        models = [batch.stage.local(model) for batch in batches]
        pairs = self._pairs(batches, images, t, s, generator)
        if self.packed:
            models = self._called_once(model, batches, conds, pairs)
        outputs = {}
        for batch, own_cond, local, own in zip(batches, conds, models, pairs, strict=True):
            times = {}
            if t is not None:
                times = {"t": own.t, "s": own.s}
            outputs[batch.stage.index] = self._objective_at(batch.stage, own)(
                local,
                batch.latents,
                cond=own_cond,
                noise=batch.noise,
                generator=generator,
                **times,
            )
        return _in_order(batches, outputs, stages)

    def _objective_at(self, stage: CascadeStage, pairs: "PairsOfStage") -> Objective:
        """Return a stage's objective with times that are known.

        It is a copy: to build another one would derive its coefficients again, in each step.
        """
        objective = copy.copy(self._objectives[stage.index])
        object.__setattr__(objective, "times", pairs)
        object.__setattr__(objective, "_drawn", True)  # `_pairs` has looked at them
        return objective

    def _pairs(
        self,
        batches: Sequence[CascadeBatch],
        images: Tensor,
        t: Tensor | None,
        s: Tensor | None,
        generator: torch.Generator | None,
    ) -> "list[PairsOfStage]":
        """Return the times of each stage's rows: those given, checked, or drawn."""
        if all(isinstance(each, FlowMatchingLoss) for each in self._objectives):
            s = t
        if t is not None and s is not None:
            given = PairsOfStage(*checked_times(t, s, images))
            return [given.of(batch.rows) for batch in batches]
        if t is not None or s is not None:
            raise TimeError("got only one of t and s; give both, or neither to have them drawn")
        times = self._objectives[0].times
        if all(each.times == times for each in self._objectives):
            drawn = _drawn_pairs(self._objectives[0], len(images), images, generator)
            return [drawn.of(batch.rows) for batch in batches]
        pairs = []
        for batch in batches:
            objective = self._objectives[batch.stage.index]
            pairs.append(_drawn_pairs(objective, len(batch.rows), images, generator))
        return pairs

    def _called_once(
        self,
        model: Model,
        batches: Sequence[CascadeBatch],
        conds: Sequence[Mapping[str, Any]],
        pairs: "Sequence[PairsOfStage]",
    ) -> list[Model]:
        """Return for each stage a model that hands out its part of one call."""
        states, times = [], []
        for batch, own in zip(batches, pairs, strict=True):
            schedule = self._objectives[batch.stage.index].schedule
            z_t, _ = schedule.perturb(batch.latents, batch.noise, own.t)
            states.append(z_t)
            times.append(batch.stage.global_time(own.t))
        cond = {}
        for name in conds[0]:
            cond[name] = [each[name] for each in conds]
        predictions = model(states, times, times, **cond)
        return [functools.partial(_handed_out, each) for each in predictions]


@dataclass(frozen=True)
class PairsOfStage(PairSampler):
    """Times that are known already, which an objective is given as if it drew them.

    So it need not check them again, for which it would wait for the device.

    Attributes:
        t: times, ``(b,)``.
        s: destinations, ``(b,)``.
        most: how many rows have s < t at most; None where that is not known.
    """

    t: Tensor
    s: Tensor
    most: int | None = None

    def draw(self, rows: int, source: RandomSource) -> tuple[Tensor, Tensor]:
        """Return t and s, each of shape ``(b,)``; the source is not used."""
        return self.t, self.s

    def most_off_diagonal(self, rows: int) -> int | None:
        """Return how many of the rows have s < t at most."""
        if self.most is None:
            return None
        return min(rows, self.most)

    def of(self, rows: Tensor) -> "PairsOfStage":
        """Return those of some rows."""
        return PairsOfStage(self.t[rows], self.s[rows], self.most)


def _drawn_pairs(
    objective: Objective, rows: int, images: Tensor, generator: torch.Generator | None
) -> PairsOfStage:
    """Return so many times as an objective draws them, beside the images."""
    times = objective.times
    t, s = drawn_pairs(
        times,
        rows,
        generator=generator,
        device=images.device,
        dtype=torch_backend.time_dtype(images),
    )
    objective._check_first_draw(t, s)
    most = None
    if isinstance(times, PairSampler):
        most = times.most_off_diagonal(rows)
    return PairsOfStage(t, s, most)


def _in_order(
    batches: Sequence[CascadeBatch], outputs: dict[int, LossOutput], stages: Tensor
) -> CascadeOutput:
    """Return what the stages gave in the order of the rows."""
    rows = torch.cat([batch.rows for batch in batches])
    back = rows.argsort()
    outs = outputs.values()
    loss = torch.cat([out.loss for out in outs])
    t = torch.cat([out.t for out in outs])
    s = torch.cat([out.s for out in outs])
    return CascadeOutput(loss[back], t[back], s[back], stages, outputs)


def _evaluates_once(objective: Objective) -> bool:
    """Return whether an objective needs no more of a model than its value at the state."""
    return isinstance(objective, FlowMatchingLoss) and objective.guidance is None


def _handed_out(prediction: Tensor, z_t: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
    """Return a prediction that was made before, whatever the model is asked."""
    return prediction


def _cond_of_rows(cond: Mapping[str, Any], rows: Tensor, images: Tensor) -> Cond:
    """Return the model's arguments for some rows of a batch; lists and dicts are gone through."""

    def of_rows(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(images):
            return leaf[rows.to(leaf.device)]
        return leaf

    return pytree.tree_map(of_rows, dict(cond))


@dataclass(frozen=True)
class CascadeFlow:
    """The sampler of a cascade: stage by stage, with an exact jump between two.

    Args:
        cascade: the stages that the model was trained on.
        flow: the model, at the network's times, with the statistic that it outputs:
            ``objective.flow_map(model)``.
        solver: None steps by the flow map; `Euler()` or `DormandPrince(atol=1e-6)`, the paper's,
            integrate its velocity.

    Raises:
        InputError: if flow or solver is none.
    """

    cascade: Cascade
    flow: FlowMap
    solver: Solver | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.flow, FlowMap),
            "flow",
            self.flow,
            "write for example FlowMatchingLoss().flow_map(model)",
        )
        require(
            self.solver is None or isinstance(self.solver, Solver),
            "solver",
            self.solver,
            "write Euler() or DormandPrince(atol=1e-6), or None to step by the flow map",
        )

    def sample(
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Any] | None = None,
        steps: int | Sequence[int] = 1,
        guidance: Guidance | Sequence[Guidance] | None = None,
    ) -> Tensor:
        """Return images ``(B, C, H, W)``, a function of the noise.

        Args:
            noise: standard normal noise of the images' shape, ``(B, C, H, W)``.
            cond: keyword arguments of the model.
            steps: of each stage: one number, or one for each stage, coarsest first; 30 in the
                paper for Euler's method. An adaptive solver takes its own.
            guidance: classifier-free guidance, or one for each stage, as `Cascade.ramp` makes.
                Its interval is of the network's times; a stage of strength 1 is not evaluated
                twice.

        Raises:
            InputError: if the noise does not halve, or guidance is none or of another number.
            TimeError: if steps are no counts, or of another number.
        """
        return self.states(noise, cond=cond, steps=steps, guidance=guidance)[-1]

    @torch.no_grad()
    def states(
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Any] | None = None,
        steps: int | Sequence[int] = 1,
        guidance: Guidance | Sequence[Guidance] | None = None,
    ) -> list[Tensor]:
        """Return the last state of each stage, coarsest first; the last one is the sample.

        The arguments are those of `sample`.
        """
        counts = self._steps(steps)
        strengths = self._guidances(guidance)
        noises = self.cascade.noises(noise)
        ends: list[Tensor] = []
        for stage in self.cascade:
            z = noises[stage.index]
            if ends:
                z = stage.jump(ends[-1], z)
            flow = self._of_stage(stage, strengths[stage.index])
            ends.append(flow.sample(z, cond=cond, steps=counts[stage.index]))
        return ends

    def _of_stage(self, stage: CascadeStage, guidance: Guidance | None) -> FlowMap | VelocityFlow:
        """Return the sampler of one stage, at the stage's own times."""
        model = self.flow.model
        if guidance is not None and not _is_idle(guidance):
            model = guidance.apply(model)
        flow = replace(self.flow, model=stage.local(model))
        if self.solver is None:
            return flow
        return VelocityFlow(flow.velocity, self.solver)

    def _steps(self, steps: int | Sequence[int]) -> list[int]:
        """Return the steps of each stage, checked."""
        counts = [steps] * self.cascade.stages
        if isinstance(steps, Sequence):
            counts = list(steps)
        whole = [count for count in counts if is_count(count)]
        if not len(counts) == len(whole) == self.cascade.stages:
            raise TimeError(
                f"got steps = {steps!r} for {self.cascade.stages} stage(s); "
                "write 1 or a larger integer, or one for each stage, coarsest first"
            )
        return whole

    def _guidances(
        self, guidance: Guidance | Sequence[Guidance] | None
    ) -> Sequence[Guidance | None]:
        """Return the guidance of each stage, checked."""
        if guidance is None or isinstance(guidance, Guidance):
            return [guidance] * self.cascade.stages
        if not isinstance(guidance, Sequence) or len(guidance) != self.cascade.stages:
            raise InputError(
                f"got guidance = {guidance!r} for {self.cascade.stages} stage(s); "
                "write one Guidance(...), or one for each stage, "
                "as cascade.ramp(Guidance(...)) returns"
            )
        return guidance


def _is_idle(guidance: Guidance) -> bool:
    """Return whether a guidance leaves every prediction as it is."""
    if isinstance(guidance, RandomGuidance) or isinstance(guidance.omega, Tensor):
        return False
    return guidance.omega == 1 - guidance.own_weight
