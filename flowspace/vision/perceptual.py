"""Perceptual losses: distances of the features of a frozen network, between ``out.prediction`` and
``out.target``.

Images are in [-1, 1] everywhere; each network gets the range and normalisation that it was trained
with. A gradient flows to the prediction only: the network is frozen and the target detached.
CrossFlow's paper follows the practice of VQ-GAN (B.4), which is LPIPS; a second term on ConvNeXt's
features, as in the example's settings, is pixel MeanFlow's practice and not the paper's.
"""

import abc
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspace.arrays import over_rows
from flowspace.errors import InputError, RunError
from flowspace.objectives import LossOutput, Objective
from flowspace.penalties import HuberError, Penalty
from flowspace.vision.shapes import pair_of
from flowspace.vision.weights import read_tensors

__all__ = [
    "FeatureNetwork",
    "LearnedDistance",
    "PerceptualLoss",
    "TimmFeatures",
    "literal_pair",
]

RANGE_SLACK = 1.5
"""Predictions may leave [-1, 1] while they are learned, real images never do: a real one beyond
this has another range.
"""


class FeatureNetwork(nn.Module, abc.ABC):
    """A frozen network whose features are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stay in eval mode."""
        return super().train(False)

    def compile_network(self, **options: Any) -> "FeatureNetwork":
        """Compile the network in place, with what is done to its images; returns itself.

        Args:
            options: those of ``torch.compile``.
        """
        self.compile(**options)
        return self

    @abc.abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return features ``(B, ...)`` of images ``(B, 3, H, W)`` in [-1, 1], one a layer."""


class TimmFeatures(FeatureNetwork):
    """Feature maps of a timm network.

    Args:
        name: timm's name, such as ``convnextv2_base.fcmae_ft_in22k_in1k`` or
            ``vit_base_patch16_dinov3``.
        weights: a file of weights; None takes timm's pretrained ones from the hub's cache or the
            network.
        size: images are resized to squares of this many pixels a side, or to a pair (height,
            width), which keeps the proportions of rectangles; None leaves them.
        layers: indices of the intermediate layers; None takes the last one's tokens or map.
        mean: what the network's inputs are normalised by, in [0, 1] units; None takes timm's own
            for the name.
        std: likewise.

    Raises:
        RunError: if weights are missing or do not fit; it says where to put them.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | Path | None = None,
        size: int | Sequence[int] | None = 224,
        layers: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.layers = size, layers
        self.shape: tuple[int, int] | None = None
        if size is not None:
            self.shape = pair_of(size, "size")
        self.network = _timm(name, weights, size)
        own: Any = self.network.pretrained_cfg
        for key, given in (("mean", mean), ("std", std)):
            value = torch.tensor(given or own[key])
            self.register_buffer(key, value.reshape(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of each chosen layer."""
        x = (images + 1) / 2
        if self.shape is not None and tuple(x.shape[-2:]) != self.shape:
            x = F.interpolate(x, self.shape, mode="bicubic", antialias=True, align_corners=False)
        x = (x - self.mean) / self.std  # type: ignore[operator]
        network: Any = self.network
        if self.layers is None:
            return [network.forward_features(x)]
        return network.forward_intermediates(
            x,
            indices=list(self.layers),
            stop_early=True,
            intermediates_only=True,
        )


def _timm(name: str, weights: str | Path | None, size: int | Sequence[int] | None) -> nn.Module:
    """Return a network of timm, with its own weights or those of a file."""
    import timm

    _check_name(name)
    sized: dict[str, Any] = {}
    if size is not None and "vit" in name:
        sized["img_size"] = size
    try:
        network = timm.create_model(name, pretrained=weights is None, **sized)
    except Exception as error:
        raise RunError(
            f"timm has no weights of {name} on this machine ({type(error).__name__}: {error}); "
            "fetch them where there is a "
            f"network with: python -c \"import timm; timm.create_model('{name}', "
            'pretrained=True)", or give weights=FILE'
        ) from error
    if weights is not None:
        load_in_order(network, Path(weights))
    return network


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know, and say which are near."""
    import timm

    if ":" in name or timm.is_model(name):  # hf-hub:NAME is a network elsewhere
        return
    near = difflib.get_close_matches(name, timm.list_models(), 3)
    hint = "see timm.list_models()"
    if near:
        hint = f"near are {', '.join(near)}"
    raise InputError(f"timm knows no network {name!r}; {hint}")


def load_in_order(network: nn.Module, path: Path) -> None:
    """Load weights by name or, where another code named the same tensors otherwise, by their order
    and shapes.

    Raises:
        RunError: if neither fits.
    """
    tensors = dict(read_tensors(path))
    own = network.state_dict()
    if tensors.keys() != own.keys():
        theirs, wanted = _without_counts(tensors), _without_counts(own)
        shapes = [value.shape for value in theirs.values()]
        if shapes != [value.shape for value in wanted.values()]:
            raise RunError(
                f"{path} holds {len(theirs)} tensors that do not fit the network's {len(wanted)}, "
                "in name or order"
            )
        tensors = dict(zip(wanted, theirs.values(), strict=True))
    try:
        network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise RunError(
            f"{path} holds tensors of other shapes than the network's: {error}"
        ) from error


def _without_counts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors less the counts of batches, which some codes do not save."""
    found = {}
    for name, value in tensors.items():
        if not name.endswith("num_batches_tracked"):
            found[name] = value
    return found


@dataclass(frozen=True)
class PerceptualLoss:
    """The penalty of the difference of features, averaged over layers: a number for each row.

    Args:
        features: whose features are compared; LPIPS is `LearnedDistance`.
        penalty: of the difference of one layer. `HuberError()` is our choice; CrossFlow's paper
            names LPIPS' practice and no penalty.
        below: only rows with t below it count, the others are 0; 1 (with t = 1) and more takes
            all.
        unit: scale each feature vector to length 1 along its channels, as LPIPS does.
    """

    features: nn.Module
    penalty: Penalty = field(default_factory=HuberError)
    below: float = 2.0
    unit: bool = False
    checked: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, prediction: Tensor, target: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the loss of each row ``(B,)``.

        Args:
            prediction: images ``(B, 3, H, W)``, with gradient.
            target: images of the same shape; detached.
            t: times ``(B,)``, where ``below`` is used.

        Raises:
            InputError: if shapes differ, a target is far out of [-1, 1], or ``below`` has no
                times.
        """
        _check_shapes(prediction, target)
        if not self.checked:  # of the first images alone: it waits for the device
            _check_range(target)
            self.checked.append(True)
        if self.below > 1:
            return self._distance(prediction, target)
        if t is None:
            raise InputError(
                f"got below = {self.below} without times; write loss(out.prediction, out.target, "
                "out.t)"
            )
        rows = (t < self.below).nonzero().squeeze(1)
        if not len(rows):
            return prediction.new_zeros(len(prediction)) + 0 * prediction.sum()
        distance = self._distance(prediction[rows], target[rows])
        found = distance.new_zeros(len(prediction))  # in autocast's type, not the prediction's
        return found.index_add(0, rows, distance)

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.features, LearnedDistance):
            return self.features(prediction, target.detach())
        with torch.no_grad():
            wanted = self.features(target)
        found = self.features(prediction)
        if self.unit:
            found = [_unit(layer) for layer in found]
            wanted = [_unit(layer) for layer in wanted]
        penalties = []
        for a, b in zip(found, wanted, strict=True):
            penalties.append(self.penalty(a - b))
        return torch.stack(penalties).mean(0)


class LearnedDistance(FeatureNetwork):
    """LPIPS (Zhang et al., arXiv 1801.03924) by the package ``lpips``; inputs in [-1, 1].

    Args:
        net: the trunk, ``"vgg"``, ``"alex"`` or ``"squeeze"``.
        weights: a state dict of the trunk in torchvision's layout; None downloads it as lpips
            does.

    Raises:
        RunError: if the trunk's weights are missing.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        super().__init__()
        import warnings

        import lpips

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's own deprecations
                self.distance = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
        except OSError as error:
            raise RunError(
                f"the trunk of LPIPS ({net}) is not on this machine and cannot be fetched "
                f"({error}); give its torchvision "
                "weights: LearnedDistance(net, weights='vgg16.pth')"
            ) from error
        if weights is not None:
            _load_trunk(self.distance.net, Path(weights))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor | None = None) -> Any:
        """Return the distance of each row ``(B,)``."""
        if others is None:
            raise InputError(
                "LPIPS is a distance of two images; write "
                "PerceptualLoss(LearnedDistance())(prediction, target)"
            )
        return self.distance(images, others).flatten()


def _load_trunk(trunk: nn.Module, path: Path) -> None:
    """Load torchvision's ``features.N.*`` into lpips' slices, which keep the layers' numbers."""
    tensors = read_tensors(path)
    own = trunk.state_dict()
    found = {}
    for name, parameter in own.items():
        _, _, layer = name.partition(".")
        value = tensors.get(f"features.{layer}")
        if value is None or value.shape != parameter.shape:
            raise RunError(
                f"{path} has no {name} of the right shape; torchvision's weights of the same "
                "trunk are needed"
            )
        found[name] = value
    trunk.load_state_dict(found)


def literal_pair(
    objective: Objective, out: LossOutput, images: Tensor, largest_step: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scaled prediction f + (b/a) sg(D_t f), and the image: R divided by a.

    What is known of the paper's perceptual loss: it is applied to "the same scaled prediction and
    target" as the objective (appendix B.4; the formula is missing from its text), and without the
    analytical weight, with which training was unstable (section 3.3). That the scaled prediction
    is this one follows from the identity: it is R without its weight a. No bound of b/a is
    mentioned, so none is the default.

    For the linear schedule b/a is t (t - s)/s, which grows as s falls. At the paper's times its
    median off the diagonal is 0.5; it is above 1 in 34 % of those rows, above 4 in 11 %, and at
    most 70:

        python -c "from flowspace import CrossFlowLoss as C; t, s = C.published(8192).times(10**6);
        print((t * (t - s) / s)[s < t].quantile(t.new_tensor([0.5, 0.66, 0.89, 1])))"

    A bound is a choice of ours: predictions that were moved far along D_t f leave the range of
    images, where features mean little. Where a = 0 (s = 0 for the matched statistic) R holds
    neither f nor the image, and without a bound there is nothing to compare: the image is returned
    for both, so that the row counts 0.

    Args:
        objective: of a statistic with identity (II), such as `CrossFlowLoss`.
        out: what it returned.
        images: the targets it was given.
        largest_step: the bound of |b/a|; None takes b/a as it is.

    Raises:
        InputError: if the bound is not positive.
    """
    if largest_step is not None and not largest_step > 0:
        raise InputError(f"got largest_step = {largest_step}; write a number above 0, or None")
    c = objective.coefficients
    a = over_rows(c.prediction(out.t, out.s), images)
    b = over_rows(c.derivative(out.t, out.s), images)
    data = over_rows(c.data(out.t, out.s), images)
    f = out.prediction
    # b D_t f = R - a f + c x; on the diagonal b = 0 and nothing is added
    weighted = out.residual - a * f.detach() + data * images
    derivative = torch.where(b == 0, 0.0, weighted / torch.where(b == 0, 1.0, b))
    step = torch.where(a == 0, torch.inf, b / torch.where(a == 0, 1.0, a))
    if largest_step is not None:
        step = step.clamp(-largest_step, largest_step)
    scaled = f + step * derivative
    return torch.where(step.isinf(), images, scaled), images


def _unit(features: Tensor) -> Tensor:
    """Return features of length 1 along their channels: the second axis of maps, else the last."""
    channels = -1
    if features.ndim == 4:
        channels = 1
    return F.normalize(features, dim=channels)


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise InputError(
            f"got a prediction of shape {tuple(prediction.shape)} for a target of "
            f"{tuple(target.shape)}"
        )


def _check_range(target: Tensor) -> None:
    size = float(target.detach().abs().mean())
    if size > RANGE_SLACK:
        raise InputError(
            f"got targets of mean size {size:.3g}; images are in [-1, 1]: write images / 127.5 - 1"
        )
