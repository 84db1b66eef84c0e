"""Frozen encoders: images in [-1, 1] become latents of mean 0 and spread 1, and back.

`load_encoder` takes a name, a folder in diffusers' layout, an id on the hub, or the file of
VA-VAE; `LatentEncoder` any module that encodes and decodes. What an autoencoder's own pipeline
does around it (scaling, patches, normalisation, the range of its input) is done here, so that
every latent looks alike to the generator.
"""

import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspace.errors import InputError, RunError
from flowspace.inputs import kind_of, require
from flowspace.vision.weights import read_tensors

__all__ = ["SOURCES", "LatentEncoder", "from_ldm", "load_encoder"]

SMALLEST_SPREAD = 1e-6
"""A latent channel that varies less than this over the data is constant; dividing by its spread
would be noise.
"""

Generators = torch.Generator | list[torch.Generator] | None
"""Of a draw: one for all rows, one for each, or torch's own."""

Function = Callable[[Tensor], Any]
"""From images to latents, or back; see `LatentEncoder` for what it may return."""

RAE_EPSILON = 1e-5
"""What diffusers adds to the spread of RAE's latents before it divides by it."""


@dataclass(frozen=True)
class PublishedWeights:
    """Where published weights are.

    Attributes:
        repository: on the Hugging Face hub.
        files: what is needed of it; empty: a folder in diffusers' layout.
        subfolder: of the repository.
    """

    repository: str
    files: tuple[str, ...] = ()
    subfolder: str = ""


SOURCES = {
    "va-vae": PublishedWeights(
        "hustvl/vavae-imagenet256-f16d32-dinov2",
        ("vavae-imagenet256-f16d32-dinov2.pt", "latents_stats.pt"),
    ),
    "sd-vae": PublishedWeights("stabilityai/sd-vae-ft-ema"),
    "sd3-vae": PublishedWeights(
        "stabilityai/stable-diffusion-3-medium-diffusers", subfolder="vae"
    ),
    "flux2": PublishedWeights("black-forest-labs/FLUX.2-dev", subfolder="vae"),
    "rae-dinov2": PublishedWeights("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"),
    "rae-siglip2": PublishedWeights("nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08"),
    "rae-mae": PublishedWeights("nyu-visionx/RAE-mae-base-p16-ViTXL-n08"),
    "dc-ae": PublishedWeights("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"),
}
"""Published autoencoders by name.

The paper's ablation has a row "SD-VAE, 16 latent channels", cited from latent diffusion, whose
autoencoders here have 4 on 32 x 32. Packed to 16 x 16 (``pack=2``) these are 16 channels, which
may be what it means; its text does not decide it. SD3's has 16 channels before any packing.
"""

KINDS = (
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLKVAE",
    "AutoencoderRAE",
)
"""Classes of diffusers that encode one image to one grid of continuous latents. Others do not: of
videos, of sound, quantised, or without a scale of their latents, as the tiny ones.
"""

LEVELS = ("block_out_channels", "encoder_block_out_channels", "ch_mult")
"""What configs call the widths of an encoder's levels; each but the first halves the image."""


HUB_ID = r"[\w.-]+/[\w.-]+(/[\w.-]+)*"
"""What an id on the hub looks like, with folders below it."""


class LatentEncoder(nn.Module):
    """A frozen autoencoder in eval mode, with the normalisation of its latents.

    Args:
        autoencoder: one of diffusers' autoencoders, or any module with ``encode(images)`` and
            ``decode(latents)``. What ``encode`` returns may be the latents ``(B, C, h, w)``
            themselves, or hold them as ``latent`` or ``latent_dist``; what ``decode`` returns, the
            images ``(B, 3, H, W)`` in [-1, 1], or hold them as ``sample``. Two functions become
            such a module by `LatentEncoder.of`.
        mean: per channel of the latent, ``(C,)``, or of each channel at each position,
            ``(C, h, w)``, as RAE has it; None where the autoencoder says itself.
        std: likewise.
        sample: draw from the posterior; False takes its mean.
        pack: squares of so many cells a side become one cell of as many more channels, before the
            normalisation; None is the autoencoder's own (FLUX.2's pipeline packs 2 x 2, the others
            do not).

    Attributes:
        mean: ``(C, 1, 1)`` or ``(C, h, w)``, subtracted from latents; on the device of the
            autoencoder's weights.
        std: of the same shape, by which they are divided.
        known: whether mean and std are known; if not, `fit` estimates them.

    Raises:
        InputError: if the autoencoder is no module, or has no ``encode``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        autoencoder: nn.Module,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        sample: bool = False,
        pack: int | None = None,
    ) -> None:
        super().__init__()
        _check_has(autoencoder, "encode")
        self.autoencoder = autoencoder
        self.sample = sample
        self.patch = pack or _patch(autoencoder)
        statistics = _own_statistics(autoencoder)
        if mean is not None and std is not None:
            statistics = mean, std
        self.known = statistics is not None
        mean, std = statistics or (torch.zeros(1), torch.ones(1))
        device = _device(autoencoder, mean)
        self.register_buffer("mean", self._packed(mean, pack or 1).to(device))
        self.register_buffer("std", self._packed(std, pack or 1).to(device))
        self.requires_grad_(False).eval()

    @classmethod
    def of(
        cls,
        encode: Function,
        decode: Function,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> "LatentEncoder":
        """Return the encoder of two functions, or modules, or methods of one; see
        `LatentEncoder` for what they take and return, and for the statistics.
        """
        return cls(TwoFunctions(encode, decode), mean, std)

    def _packed(self, value: Tensor, pack: int) -> Tensor:
        """Return ``(C, 1, 1)`` or ``(C, h, w)`` of a statistic, spread over the channels of packed
        cells where it is one of the autoencoder's own channels.
        """
        value = _on_grid(value)
        channels = _config(self.autoencoder).get("latent_channels")
        if pack <= 1 or len(value) != channels:
            return value
        if value.shape[1:] == (1, 1):
            return value.repeat_interleave(pack**2, 0)
        return F.pixel_unshuffle(value, pack)

    def train(self, mode: bool = True) -> "LatentEncoder":
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)

    def compile_network(self, **options: Any) -> "LatentEncoder":
        """Compile in place what encodes, but not what decodes; returns itself.

        That is the autoencoder's module ``encoder`` where it has one, otherwise its ``encode``.

        Args:
            options: those of ``torch.compile``.
        """
        autoencoder: Any = self.autoencoder
        network = getattr(autoencoder, "encoder", None)
        if isinstance(network, nn.Module):
            network.compile(**options)
        else:
            autoencoder.encode = torch.compile(autoencoder.encode, **options)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, generator: Generators = None, check: bool = True) -> Tensor:
        """Return latents ``(B, C, h, w)`` in float32 of images ``(B, 3, H, W)`` in [-1, 1].

        Args:
            images: of which.
            generator: of the draws from the posterior, where they are drawn from it; a list of
                one a row makes what is drawn of a row independent of the rows beside it.
            check: look at the values of images and latents, for which a GPU is waited for three
                times.

        Raises:
            InputError: if images leave [-1, 1] or the latents are not finite, where that is
                checked; if images have a shape that the autoencoder does not take, or if the
                statistics of the latents are not known yet.
        """
        self._require_statistics()
        if not check:
            return self._standard(self._latents(images, self.sample, generator))
        return self._standard(self._raw(images, generator))

    @torch.no_grad()
    def encode_prediction(self, predictions: Tensor) -> Tensor:
        """Return the latents ``(B, C, h, w)`` that a network's own images stand for.

        This is the ``estimate`` of `CrossFlowLoss`, where a velocity is estimated from what the
        network says of the clean image, and the ``encode`` of several steps of a flow map. Two
        things differ from `encode`. Predictions may leave [-1, 1], most of all early in training;
        the autoencoder never saw such images, so they are clamped. And the posterior's mean is
        taken even where ``sample`` draws from it: the latent stands for an expectation, to which
        a draw would only add noise. Values are not looked at, so no step waits for the device.

        Args:
            predictions: images ``(B, 3, H, W)`` of any range.

        Raises:
            InputError: if the autoencoder does not take their shape, or the latents' statistics
                are not known yet.
        """
        self._require_statistics()
        return self._standard(self._latents(predictions.clamp(-1, 1), sample=False))

    def _standard(self, latents: Tensor) -> Tensor:
        """Return latents less their mean, over their spread."""
        own = tuple(self.mean.shape[1:])
        given = tuple(latents.shape[-2:])
        if own not in ((1, 1), given):
            raise InputError(
                f"got latents on {given[0]} x {given[1]} cells, of whose statistics each position "
                f"of {own[0]} x {own[1]} has its own; give images of that size, or fit again"
            )
        return (latents - self.mean) / self.std

    def _require_statistics(self) -> None:
        if not self.known:
            raise InputError(
                "the mean and spread of the latents are not known; call fit(batches of images) "
                "once, or give them"
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images of latents, by the autoencoder's own decoder.

        Raises:
            InputError: if it has none.
        """
        autoencoder: Any = self.autoencoder
        _check_has(autoencoder, "decode")
        raw = F.pixel_shuffle(latents * self.std + self.mean, self.patch)
        decoded = autoencoder.decode(raw.to(_dtype(autoencoder)))
        images = _held(decoded, "sample").float()
        if _from_zero(self.autoencoder):
            return images * 2 - 1
        return images

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], by_position: bool = False) -> "LatentEncoder":
        """Estimate the mean and spread of the latents from batches of images; returns itself.

        Args:
            batches: images ``(B, 3, H, W)`` in [-1, 1].
            by_position: of each channel at each position, as RAE does, whose latents then suit
                images of one size alone; by default of each channel.

        Raises:
            InputError: if there are no images, or a channel is constant.
        """
        axes = (0, 2, 3)
        if by_position:
            axes = (0,)
        count = 0
        total = squares = torch.zeros(1, dtype=torch.float64)
        for images in batches:
            latents = self._raw(images, None).double()
            total = total + latents.sum(axes).cpu()
            squares = squares + latents.square().sum(axes).cpu()
            count += latents.numel() // total.numel()
        if not count:
            raise InputError("got no images; fit() takes batches (B, 3, H, W) in [-1, 1]")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        if bool((std < SMALLEST_SPREAD).any()):
            raise InputError(f"{_least(std)} is constant over {count} cells; give other images")
        self.set_statistics(mean, std)
        return self

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take these as the mean and spread of each channel ``(C,)``, or of each channel at each
        position ``(C, h, w)``.
        """
        self.mean = _on_grid(mean).to(self.mean.device)
        self.std = _on_grid(std).to(self.std.device)
        self.known = True

    def _raw(self, images: Tensor, generator: Generators) -> Tensor:
        """Return the autoencoder's latents of images, packed, before the normalisation."""
        low, high = float(images.min()), float(images.max())
        if not (low >= -1.01 and high <= 1.01):
            raise InputError(
                f"got images between {low:.3g} and {high:.3g}; the encoder takes [-1, 1]"
            )
        latents = self._latents(images, self.sample, generator)
        if not bool(latents.isfinite().all()):
            raise InputError(f"got latents that are not finite from {self._why_not_finite()}")
        return latents

    def _why_not_finite(self) -> str:
        kind = _kind(self.autoencoder)
        dtype = _dtype(self.autoencoder)
        if dtype == torch.float16:
            return (
                f"{kind} in float16, which ends at 65504; write load_encoder(..., "
                "dtype=torch.bfloat16) or torch.float32, whose range is wider"
            )
        return f"{kind} in {dtype} on finite images; its weights are broken, fetch them again"

    def _latents(self, images: Tensor, sample: bool, generator: Generators = None) -> Tensor:
        """Return the same of images whose values are not looked at."""
        self._check_shape(images.shape)
        autoencoder: Any = self.autoencoder
        if _from_zero(autoencoder):
            images = (images + 1) / 2
        out = autoencoder.encode(images.to(_dtype(autoencoder)))
        if not hasattr(out, "latent_dist"):
            latents = _held(out, "latent")
        elif sample:
            latents = out.latent_dist.sample(generator)
        else:
            latents = out.latent_dist.mode()
        if not isinstance(latents, Tensor) or latents.ndim != 4:
            raise InputError(
                f"got {_shape_of(latents)} from encode() of {_kind(autoencoder)}; return "
                "latents (B, C, h, w): a vector (B, C) is latents[:, :, None, None]"
            )
        return F.pixel_unshuffle(latents, self.patch).float()

    def _check_shape(self, shape: Sequence[int]) -> None:
        """Refuse images that do not fill whole cells, and what RAE would squeeze to a square."""
        kind = _kind(self.autoencoder)
        if len(shape) != 4:
            raise InputError(f"got images of shape {tuple(shape)}; write (B, 3, H, W)")
        height, width = shape[2:]
        if kind == "AutoencoderRAE" and height != width:
            raise InputError(
                f"got images of {height} x {width} pixels for {kind}, which would squeeze them to "
                "a square; crop them to squares"
            )
        side = _cell_side(self.autoencoder) * self.patch
        if height % side or width % side:
            raise InputError(
                f"got images of {height} x {width} pixels for {kind}, of whose latents one cell "
                f"stands for {side} x {side} pixels; write multiples of {side}"
            )


def _on_grid(value: Tensor) -> Tensor:
    """Return a statistic as ``(C, 1, 1)`` or ``(C, h, w)``, of a scalar as ``(1, 1, 1)``; a first
    axis of one batch is dropped.
    """
    value = value.float()
    if value.ndim == 4:
        value = value.squeeze(0)
    if value.ndim == 3:
        return value
    return value.reshape(-1, 1, 1)


def _least(std: Tensor) -> str:
    """Name the channel of the smallest spread, and its position where it has one."""
    place = [int(index) for index in torch.unravel_index(std.argmin(), std.shape)]
    name = f"channel {place[0]} of the latents"
    if len(place) == 3:
        name += f" at row {place[1]}, column {place[2]}"
    return name


class TwoFunctions(nn.Module):
    """Two functions as one module; what they belong to moves with it, where it is a module.

    Args:
        encode: of images.
        decode: of latents.
    """

    def __init__(self, encode: Function, decode: Function) -> None:
        super().__init__()
        self.functions = encode, decode
        self.owners = nn.ModuleList()
        for function in self.functions:
            owner = getattr(function, "__self__", function)
            if isinstance(owner, nn.Module):
                self.owners.append(owner)

    def encode(self, images: Tensor) -> Any:
        """Call the first."""
        return self.functions[0](images)

    def decode(self, latents: Tensor) -> Any:
        """Call the second."""
        return self.functions[1](latents)


def _check_has(autoencoder: Any, method: str) -> None:
    """Raise InputError unless this is a module with a method of that name."""
    if isinstance(autoencoder, nn.Module) and callable(getattr(autoencoder, method, None)):
        return
    raise InputError(
        f"got {kind_of(autoencoder)} for an autoencoder, which is no module with {method}(...); "
        "give it encode(images) and decode(latents), or write LatentEncoder.of(encode, decode) "
        "with two functions"
    )


def _held(out: Any, name: str) -> Any:
    """Return what an output holds by this name, or the output itself where it holds nothing."""
    return getattr(out, name, out)


def _shape_of(value: Any) -> str:
    """Name a value by its shape, or by its type where it has none."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's weights; float32 of one without any."""
    for parameter in module.parameters():
        return parameter.dtype
    return torch.float32


def _device(module: nn.Module, other: Tensor) -> torch.device:
    """Return the device of a module's weights; that of a tensor for one without any."""
    for parameter in module.parameters():
        return parameter.device
    return other.device


def _config(autoencoder: nn.Module) -> Any:
    """Return the config of an autoencoder of diffusers; of another module, an empty one."""
    config = getattr(autoencoder, "config", None)
    if isinstance(config, Mapping):
        return config
    return {}


def _kind(autoencoder: nn.Module) -> str:
    return type(autoencoder).__name__


def _cell_side(autoencoder: nn.Module) -> int:
    """Return how many pixels a side become one cell; 1 where the config does not say."""
    config = _config(autoencoder)
    if "spatial_compression_ratio" in config:
        return config["spatial_compression_ratio"]
    for name in LEVELS:
        if name in config:
            return 2 ** (len(config[name]) - 1)
    return 1


def _from_zero(autoencoder: nn.Module) -> bool:
    """Whether it takes images in [0, 1], as RAE does."""
    return _kind(autoencoder) == "AutoencoderRAE"


def _patch(autoencoder: nn.Module) -> int:
    """FLUX.2's pipeline packs 2 x 2 cells into one: 128 channels at a sixteenth of the size."""
    config = _config(autoencoder)
    if _kind(autoencoder) == "AutoencoderKLFlux2":
        return config.patch_size[0]
    return 1


def _own_statistics(autoencoder: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the mean and spread that the autoencoder brings: of its batch norm, its config, or
    its scaling factor.
    """
    config = _config(autoencoder)
    kind = _kind(autoencoder)
    if kind == "AutoencoderKLFlux2":
        norm: Any = autoencoder.bn
        variance = norm.running_var + config.batch_norm_eps
        return norm.running_mean, variance.sqrt()
    if kind == "AutoencoderRAE":
        if autoencoder._latents_mean.numel() > 1:  # type: ignore[union-attr, operator]
            return torch.zeros(1), torch.ones(1)  # its encode() normalises
        return None
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return torch.tensor(mean), torch.tensor(std)
    scale = config.get("scaling_factor")
    if scale is None or scale == 1:
        return None
    shift = config.get("shift_factor") or 0.0
    return torch.tensor([shift]), torch.tensor([1 / scale])


# --- loading -------------------------------------------------------------------------------------


def _place_of(name_or_path: str | Path, weights: Path | None) -> tuple[str, Path]:
    """Return an encoder's name and the file or folder that it names, which need not be there."""
    require(
        isinstance(name_or_path, str | Path),
        "name_or_path",
        name_or_path,
        "write a name such as va-vae, a folder, or an id of the hub, owner/name",
    )
    name, path = str(name_or_path), Path(name_or_path)
    if name in SOURCES:
        path = _find(name, weights)
    if path.is_dir() and not (path / "config.json").exists():
        path = next(iter(sorted(path.glob("*vavae*.pt"))), path)
    return name, path


def load_encoder(
    name_or_path: str | Path,
    *,
    sample: bool = False,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
    pack: int | None = None,
) -> LatentEncoder:
    """Load a frozen encoder.

    Args:
        name_or_path: a name of `SOURCES`; a folder in diffusers' layout; VA-VAE's ``.pt``,
            beside its ``latents_stats.pt``; or the id of a repository on the hub in diffusers'
            layout, ``owner/name`` or ``owner/name/subfolder``, which is fetched unless it is in
            the cache.
        sample: draw from the posterior; False takes its mean.
        dtype: of the autoencoder; latents are float32. One whose config says ``force_upcast``, as
            SDXL's does, overflows in float16 and stays in float32, as in diffusers' pipelines.
        weights: the folder that holds ``NAME/`` for names; by default the hub's cache is asked,
            never the network.
        pack: see `LatentEncoder`.

    Raises:
        InputError: if it is neither text nor a path.
        RunError: if weights are missing; it names the file, where it goes and the command that
            fetches it. If the autoencoder is of a class that is not in `KINDS`. If an id cannot be
            fetched.

    Warns:
        UserWarning: if float16 was asked for and the config forbids it.
    """
    name, path = _place_of(name_or_path, weights)
    mean = std = None
    if path.is_dir():
        autoencoder = _from_folder(path)
    elif path.is_file():
        autoencoder = from_ldm(read_tensors(path))
        mean, std = _statistics_beside(path)
    elif re.fullmatch(HUB_ID, name):
        autoencoder = _from_hub(name)
    else:
        raise RunError(
            f"{name_or_path} is neither a folder, a file, an id on the hub (owner/name) nor one "
            f"of {', '.join(SOURCES)}"
        )
    config: Any = autoencoder.config
    if dtype == torch.float16 and config.get("force_upcast"):
        warnings.warn(
            f"the config of {name_or_path} says force_upcast: it overflows in float16 and stays "
            "in float32; dtype=torch.bfloat16 is as small and does not overflow",
            stacklevel=2,
        )
        dtype = torch.float32
    if _dtype(autoencoder) != dtype:  # diffusers warns of a cast, even of none
        autoencoder = autoencoder.to(dtype)
    return LatentEncoder(autoencoder, mean, std, sample, pack)


def _find(name: str, weights: Path | None) -> Path:
    """Return the folder of a source, in ``weights`` or in the hub's cache.

    Raises:
        RunError: if a file of it is missing.
    """
    source = SOURCES[name]
    place = None
    if weights is None:
        found = _in_cache(name)
    else:
        found = place = weights / name
    for file in source.files or ("config.json",):
        if not (found / file).exists():
            raise RunError(f"{found / file} is missing; {_fetch(name, place)}")
    return found


def _in_cache(name: str) -> Path:
    """Return the folder of a source in the hub's cache; the network is not asked."""
    source = SOURCES[name]
    wanted = source.files or (f"{source.subfolder}/*".lstrip("/"),)
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            source.repository, allow_patterns=list(wanted), local_files_only=True
        )
    except (ImportError, OSError, ValueError) as error:
        raise RunError(
            f"the weights of {name} are not on this machine; {_fetch(name, None)}"
        ) from error
    return Path(found) / source.subfolder


def _fetch(name: str, place: Path | None) -> str:
    """Return the command that fetches a source, into a folder or into the hub's cache."""
    source = SOURCES[name]
    command = ["hf download", source.repository, *source.files]
    if source.subfolder:
        command.append(f'--include "{source.subfolder}/*"')
    where = "the hub's cache"
    if place is not None:
        where = str(place)
        command.append(f"--local-dir {place}")
    return f"fetch it into {where} with: {' '.join(command)}"


def _from_hub(name: str) -> nn.Module:
    """Return the autoencoder of a repository on the hub, or of a folder in it."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    owner, repository, *below = name.split("/")
    place: dict[str, Any] = {"subfolder": "/".join(below)}
    source = f"{owner}/{repository}"
    try:
        config: Any = AutoencoderKL.load_config(source, **place)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{name} is no folder or file here, and cannot be fetched from the hub; check the "
            "name and the network, or give a folder. A pipeline's autoencoder is below it, as in "
            f"{source}/vae ({error})"
        ) from error
    kind = config.get("_class_name", "no class")
    return _of_kind(kind, name, source, **place)


def _from_folder(path: Path) -> nn.Module:
    """Return the autoencoder of a folder in diffusers' layout."""
    try:
        kind = json.loads((path / "config.json").read_text())["_class_name"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} holds no autoencoder that diffusers can load: {error}") from error
    from flowspace.vision.checked_model import check_digests

    if kind == "LinearAutoencoder":
        from flowspace.vision.linear import LinearAutoencoder

        return LinearAutoencoder.from_pretrained(path)
    check_digests(path)
    return _of_kind(kind, path, path, local_files_only=True)


def _of_kind(kind: str, name: object, source: str | Path, **options: Any) -> nn.Module:
    """Return an autoencoder of diffusers.

    Args:
        kind: its class.
        name: of the source, for errors.
        source: a folder, or a repository on the hub.
        options: of diffusers, where to look.

    Raises:
        RunError: if the class does not suit, or diffusers cannot load it.
    """
    import diffusers

    if kind not in KINDS:
        raise RunError(
            f"{name} holds {kind}, which does not encode one image to one grid of continuous "
            f"latents; write a folder of {', '.join(KINDS)}"
        )
    make_buildable(kind)
    try:
        made = getattr(diffusers, kind)
        loaded = made.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, AttributeError, NotImplementedError) as error:
        raise RunError(f"{name} holds no autoencoder that diffusers can load: {error}") from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise RunError(
            f"the weights of {name} lack {len(missing)} tensor(s) of {kind}, such as "
            f"{missing[0]}; fetch them again"
        )
    return model


def make_buildable(kind: str) -> None:
    """See that what an autoencoder of diffusers is made of is installed, and fits.

    Raises:
        RunError: if it is not.
    """
    if kind == "AutoencoderRAE":
        if importlib.util.find_spec("transformers") is None:
            raise RunError(
                "RAE's encoders are those of transformers, which is missing; write: pip install "
                "'flowspace[rae]'"
            )
        _nest_siglip()


class _Nested(nn.Module):
    """A vision model one level down, where diffusers (0.42) looks for it and RAE's weights have
    it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.vision_model(*args, **kwargs)


def _nest_siglip() -> None:
    """Let diffusers build RAE's SigLIP2, of which transformers took away a level since."""
    import transformers
    from diffusers.models.autoencoders import autoencoder_rae

    def build(config: Any) -> nn.Module:
        model = transformers.SiglipVisionModel(config)
        if hasattr(model, "vision_model"):
            return model
        return _Nested(model)

    autoencoder_rae.SiglipVisionModel = build  # type: ignore[misc]


def _statistics_beside(path: Path) -> tuple[Tensor | None, Tensor | None]:
    """Return the mean and spread that are kept beside VA-VAE's weights, or Nones."""
    beside = path.with_name("latents_stats.pt")
    if not beside.exists():
        return None, None
    found = read_tensors(beside)
    return found["mean"], found["std"]


KEPT = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
RENAMED = (
    (r"^(encoder)\.down\.(\d+)\.block\.(\d+)\.", r"\1.down_blocks.\2.resnets.\3."),
    (r"^(encoder)\.down\.(\d+)\.attn\.(\d+)\.", r"\1.down_blocks.\2.attentions.\3."),
    (r"^(encoder)\.down\.(\d+)\.downsample\.", r"\1.down_blocks.\2.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
IN_DECODER = (
    ("block.", "resnets."),
    ("attn.", "attentions."),
    ("upsample.", "upsamplers.0."),
)
IN_ATTENTION = (
    (".norm.", ".group_norm."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."),
)


def from_ldm(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build diffusers' AutoencoderKL from weights in the layout of latent diffusion, such as
    VA-VAE's.

    Widths, blocks and attention are read off the tensors; other tensors (losses, foundation
    models) are left out.

    Raises:
        RunError: if names or shapes do not make an autoencoder.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    tensors = {name: value for name, value in tensors.items() if name.startswith(KEPT)}
    levels = _numbers(tensors, "encoder.down.")
    if not levels:
        raise RunError(
            "the file holds no encoder.down.*: not an autoencoder in the layout of latent "
            "diffusion"
        )
    widths: list[int] = []
    down: list[str] = []
    up: list[str] = []
    for level in range(len(levels)):
        place = f"encoder.down.{level}"
        widths.append(len(tensors[f"{place}.block.0.conv1.weight"]))
        attention = ""
        if _numbers(tensors, f"{place}.attn."):
            attention = "Attn"
        down.append(f"{attention}DownEncoderBlock2D")
        up.insert(0, f"{attention}UpDecoderBlock2D")
    blocks = _numbers(tensors, "encoder.down.0.block.")
    settings: dict[str, Any] = {
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "block_out_channels": tuple(widths),
        "layers_per_block": len(blocks),
        "latent_channels": tensors["quant_conv.weight"].shape[0] // 2,
        "norm_num_groups": min(32, widths[0]),
        "sample_size": 256,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }
    network = AutoencoderKL(**settings)
    renamed = dict(_renamed(name, value, len(levels)) for name, value in tensors.items())
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise RunError(
            f"the file is not an autoencoder in the layout of latent diffusion: {error}"
        ) from error
    return network


def _numbers(names: Iterable[str], place: str) -> set[str]:
    """Return the numbers of the modules at a place, such as ``encoder.down.``."""
    found = set()
    for name in names:
        if name.startswith(place):
            number, _, _ = name.removeprefix(place).partition(".")
            if number.isdigit():
                found.add(number)
    return found


def _renamed(name: str, value: Tensor, levels: int) -> tuple[str, Tensor]:
    """Return the name in diffusers' layout, and the value: attention's 1 x 1 convolutions are
    linear layers there.
    """
    if found := re.match(r"decoder\.up\.(\d+)\.", name):
        rest = name[found.end() :]
        for old, new in IN_DECODER:
            rest = rest.replace(old, new, 1)
        level = levels - 1 - int(found[1])
        name = f"decoder.up_blocks.{level}.{rest}"
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    if ".attentions." in name:
        for old, new in IN_ATTENTION:
            name = name.replace(old, new)
        if value.ndim == 4:
            value = value.flatten(1)
    return name, value
