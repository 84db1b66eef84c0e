"""The pipeline of a one-step generator: from classes and noise to images in one evaluation.

It asks for diffusers and a network alone, neither for a schedule nor for formulas, since at t = 1
and s = 0 the matched statistic's sample is what the network returns. So it is also the pipeline
that is shipped beside the weights, for those who have no flowspace.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowspace.errors import InputError

__all__ = ["OneStepPipeline"]

OUTPUTS = ("pil", "np", "pt")


class OneStepPipeline(DiffusionPipeline):
    """Images of classes from noise, in one evaluation of a trained generator.

    Args:
        generator: the trained network, of the matched statistic.
        alpha: the schedule that it was trained with, a formula in t; kept for the record.
        beta: likewise.
    """

    model_cpu_offload_seq = "generator"

    def __init__(self, generator: ModelMixin, alpha: str = "1 - t", beta: str = "t") -> None:
        super().__init__()
        self.register_modules(generator=generator)
        self.register_to_config(alpha=alpha, beta=beta)

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int] | Tensor | None = None,
        *,
        count: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> "ImagePipelineOutput | tuple[Any]":
        """Return one image a label.

        Args:
            labels: classes; None for a generator without classes.
            count: how many images a generator without classes draws.
            generator: the source of the noise: one, or one for each image, which makes an image
                independent of its batch.
            latents: the noise itself, ``(B, channels, h, w)``, instead of ``generator``; of any
                precision.
            scale: of classifier-free guidance, for a generator whose null class was trained; other
                than 1 costs a second evaluation.
            output_type: ``"pil"``, ``"np"`` (floats in [0, 1], channels last) or ``"pt"`` (in [-1,
                1]).
            return_dict: False returns a tuple.

        Raises:
            InputError: if labels are missing or out of range, the noise has another shape, or the
                null class is needed and was not trained.
        """
        noise, classes = self._start(labels, count, generator, latents, output_type)
        images = self._evaluated(noise, classes)
        if scale != 1:
            without = self._evaluated(noise, self._without(classes))
            images = without + scale * (images - without)
        return self._finished(images.float(), output_type, return_dict)

    def _start(
        self,
        labels: Sequence[int] | Tensor | None,
        count: int,
        generator: Any,
        latents: Tensor | None,
        output_type: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the noise and the classes of a call, checked."""
        if output_type not in OUTPUTS:
            raise InputError(
                f"got output_type = {output_type!r}; write one of {', '.join(map(repr, OUTPUTS))}"
            )
        classes = self._classes(labels)
        if classes is not None:
            count = len(classes)
        return self._noise(count, generator, latents), classes

    def _evaluated(self, noise: Tensor, classes: Tensor | None) -> Tensor:
        """Return the generator's images at t = 1 and s = 0."""
        one = torch.ones(len(noise), device=noise.device)
        zero = torch.zeros_like(one)
        return self.generator(noise, one, zero, labels=classes)

    def _without(self, classes: Tensor | None) -> Tensor:
        """Return the null class for each row, which guidance needs."""
        if classes is None:
            raise InputError("got scale for a generator without classes; leave it out")
        return torch.full_like(classes, self.generator.require_null())

    def _noise(self, count: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Return the noise of so many images: what was given, or drawn."""
        network = self.generator
        shape = (count, *network.latent_shape)
        if latents is None:
            return randn_tensor(
                shape, generator=generator, device=network.device, dtype=network.dtype
            )
        if tuple(latents.shape) != shape:
            raise InputError(
                f"got latents of shape {tuple(latents.shape)}; this generator takes {shape}"
            )
        return latents.to(network.device, network.dtype)

    def _classes(self, labels: Sequence[int] | Tensor | None) -> Tensor | None:
        """Return the labels on the network's device, checked; None where it has no classes."""
        count = self.generator.config["classes"]
        if labels is None:
            if not count:
                return None
            raise InputError(
                f"got no labels for a generator of {count} classes; write labels=[...]"
            )
        if not count:
            raise InputError("got labels for a generator without classes; write count= instead")
        classes = torch.as_tensor(labels, device=self.generator.device)
        whole = classes.ndim == 1 and not classes.is_floating_point()
        outside = (classes < 0) | (classes > count)
        if not whole or bool(outside.any()):
            raise InputError(
                f"got labels = {classes.tolist()}; write integers from 0 to {count - 1}, or "
                f"{count} for no class"
            )
        if bool((classes == count).any()):
            self.generator.require_null()
        return classes

    def _finished(
        self, images: Tensor, output_type: str, return_dict: bool
    ) -> "ImagePipelineOutput | tuple[Any]":
        found: Any = images
        if output_type != "pt":
            found = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            found = self.numpy_to_pil(found)
        if not return_dict:
            return (found,)
        return ImagePipelineOutput(images=found)
