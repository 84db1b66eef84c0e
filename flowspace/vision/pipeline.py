"""What one ships: a pipeline from labels to images in one evaluation, and the generator as a
decoder of noisy latents.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look for it here
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from flowspace.errors import InputError, RunError
from flowspace.flow_map import FlowMap
from flowspace.guidance import Guidance
from flowspace.schedules import TIME_FLOOR, Schedule
from flowspace.statistics import MatchedStatistic
from flowspace.vision.card import PLACE, model_card
from flowspace.vision.checked_model import CheckedModel
from flowspace.vision.generator import CrossFlowGenerator
from flowspace.vision.one_step import OneStepPipeline
from flowspace.vision.standalone import standalone

__all__ = ["CrossFlowDecoder", "CrossFlowPipeline"]

CODE = {
    "pipeline": "flowspace.vision.one_step",
    "generator/crossflow_generator": "flowspace.vision.generator",
}
"""Files of code in a folder, and the modules whose source they are."""

INDEX = {
    "_class_name": ["pipeline", "OneStepPipeline"],
    "generator": ["crossflow_generator", "CrossFlowGenerator"],
}
"""What ``model_index.json`` says of them: the file of each class, as diffusers finds it."""

DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")
FILES = ("README.md", "model_index.json", "generator/*")
"""What is fetched of a repository."""

UPLOAD = ("commit_message", "private", "token", "create_pr")


class CrossFlowPipeline(OneStepPipeline):
    """Images of classes from noise, in one evaluation of a trained generator of the matched
    statistic.

    Saved and loaded as diffusers does; the schedule is kept with the pipeline as formulas, and its
    model card as ``README.md``.

    Args:
        generator: the trained network.
        alpha: the schedule that it was trained with, a formula in t.
        beta: likewise.

    Attributes:
        card: the model card; None, until one is given or loaded, for one that tells the sizes
            alone.
    """

    def __init__(
        self, generator: CrossFlowGenerator, alpha: str = "1 - t", beta: str = "t"
    ) -> None:
        super().__init__(generator, alpha, beta)
        self.schedule = Schedule(alpha, beta)
        self.card: str | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "CrossFlowPipeline":
        """Load a pipeline with its card, from a folder or the hub; the code that is shipped with
        it is not run.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository of the hub.
            kwargs: ``generator``, a network that is loaded already; or those of diffusers' method
                for its models, such as ``torch_dtype``, and of the hub's, such as ``revision``.

        Raises:
            RunError: if the weights are not what was saved, a tensor is missing, or
                ``model_index.json`` has no formulas.
            FlowspaceError: if the formulas make no schedule.
        """
        kwargs.pop("trust_remote_code", None)
        download = {name: kwargs.pop(name) for name in DOWNLOAD if name in kwargs}
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            name = str(pretrained_model_name_or_path)
            folder = Path(snapshot_download(name, allow_patterns=list(FILES), **download))
        generator = kwargs.pop("generator", None)
        if generator is None:
            generator = CrossFlowGenerator.from_pretrained(folder / "generator", **kwargs)
        config: Any = cls.load_config(folder)
        if not {"alpha", "beta"} <= config.keys():
            raise RunError(f"{folder / cls.config_name} names no schedule; fetch it again")
        found = cls(generator, config["alpha"], config["beta"])
        card = folder / "README.md"
        if card.is_file():
            found.card = card.read_text()
        return found

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the pipeline, its card, and the code to draw from it without flowspace.

        ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` runs that code: it is
        the source of `OneStepPipeline` and of the generator, each in one file.

        Args:
            save_directory: the folder.
            push_to_hub: also upload it, to ``repo_id`` or to the folder's name.
            kwargs: those of diffusers' method and of `push_to_hub`.
        """
        upload = {name: kwargs.pop(name) for name in UPLOAD if name in kwargs}
        repository = kwargs.pop("repo_id", Path(save_directory).name)
        super().save_pretrained(save_directory, **kwargs)
        alpha, beta = self.config["alpha"], self.config["beta"]
        card = self.card or model_card("CrossFlow", self.generator, alpha, beta)
        folder = Path(save_directory)
        (folder / "README.md").write_text(card)
        _ship_code(folder)
        if push_to_hub:
            self.push_to_hub(repository, **upload)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Upload the pipeline and its card; diffusers' own method would put an empty card in its
        place.

        Args:
            repo_id: of the repository, made if it is not there.
            commit_message: of the upload.
            private: whether the repository is; by default as the owner's are.
            token: of the hub; by default the one that is stored.
            create_pr: ask to merge it rather than commit.
            kwargs: those of `save_pretrained`.
        """
        from huggingface_hub import create_repo

        repo_id = str(create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            card = Path(folder) / "README.md"
            card.write_text(card.read_text().replace(PLACE, repo_id))
            return str(self._upload_folder(folder, repo_id, token, commit_message, create_pr))

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
        steps: int = 1,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> "ImagePipelineOutput | tuple[Any]":
        """Return one image a label.

        Args:
            labels: classes; None for a generator without classes.
            count: how many images a generator without classes draws.
            generator: the source of the noise: one, or one for each image, which makes an image
                independent of its batch.
            latents: the noise itself, ``(B, channels, h, w)``, instead of ``generator``.
            scale: of classifier-free guidance, for a generator whose null class was trained; other
                than 1 costs a second evaluation.
            output_type: ``"pil"``, ``"np"`` (floats in [0, 1], channels last) or ``"pt"`` (in [-1,
                1]).
            return_dict: False returns a tuple.
            steps: evaluations; more than one needs ``encode``.
            encode: from images to latents, such as ``encode_prediction`` of
                `load_encoder`.

        Raises:
            InputError: if labels are missing or out of range, the noise has another shape, steps
                need an encoder, or the null class is needed and was not trained.
        """
        if steps > 1 and encode is None:
            raise InputError(
                f"got steps = {steps} without encode=, a function from images to latents such as "
                "an encoder's encode_prediction"
            )
        if steps == 1:
            return super().__call__(
                labels,
                count=count,
                generator=generator,
                latents=latents,
                scale=scale,
                output_type=output_type,
                return_dict=return_dict,
            )
        noise, classes = self._start(labels, count, generator, latents, output_type)
        cond, guidance = {}, None
        if classes is not None:
            cond["labels"] = classes
        if scale != 1:
            null = {"labels": self.generator.require_null()}
            guidance = Guidance(null=null, omega=scale)
        flow_map = FlowMap(self.generator, self.schedule, MatchedStatistic())
        images = flow_map.sample(noise, cond=cond, steps=steps, encode=encode, guidance=guidance)
        return self._finished(images.float(), output_type, return_dict)


def _ship_code(folder: Path) -> None:
    """Write the code of a saved pipeline beside its weights, and tell diffusers where it is."""
    for place, module in CODE.items():
        (folder / f"{place}.py").write_text(standalone(module))
    index = folder / "model_index.json"
    listed = json.loads(index.read_text()) | INDEX
    index.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n")


class CrossFlowDecoder(CheckedModel):
    """The generator where a pipeline expects an autoencoder's decoder: ``decode(latents, t)`` for
    latents that may be noisy.

    A latent that another model sampled is not clean; the generator was trained to map noisy ones,
    and is told how noisy this one is believed to be. So it may be the ``vae`` of diffusers'
    ``DiTPipeline``, which hands no labels on: there the generator is one without classes, or one
    whose null class was trained.

    Args:
        generator_config: of the trained network, what `CrossFlowGenerator` takes.
        t: the noise level that latents are believed to have where the caller does not say, in
            [TIME_FLOOR, 1].
        alpha: the schedule, a formula in t.
        beta: likewise.
        rescale: multiply latents by alpha(t) first, so that a clean latent lies where a noisy one
            of that level has its mean.
        scaling_factor: what diffusers' pipelines divide latents by before they hand them on.
    """

    @register_to_config
    def __init__(
        self,
        generator_config: dict[str, Any],
        t: float = 0.05,
        alpha: str = "1 - t",
        beta: str = "t",
        rescale: bool = False,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.generator = CrossFlowGenerator(**generator_config)
        self.schedule = Schedule(alpha, beta)
        _checked_level(t)

    @classmethod
    def of(cls, generator: CrossFlowGenerator, **settings: Any) -> "CrossFlowDecoder":
        """Wrap a trained generator; its weights are shared, not copied."""
        decoder = cls(generator.settings, **settings)
        decoder.generator = generator
        return decoder.eval()

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        *,
        t: "float | Tensor | None" = None,
        labels: Tensor | None = None,
        generator: Any = None,
    ) -> "DecoderOutput | tuple[Tensor]":
        """Return images ``(B, 3, H, W)`` in [-1, 1] of latents ``(B, channels, h, w)``.

        Args:
            z: latents in the generator's units.
            return_dict: False returns a tuple.
            t: the noise level, ``()`` or ``(B,)``; by default the decoder's own.
            labels: classes, where they are known; by default the null class, which has to be
                trained.
            generator: accepted and ignored, as autoencoders do.

        Raises:
            InputError: if t is outside [TIME_FLOOR, 1], or no labels come for a generator whose
                null class was not trained.
        """
        if t is None:
            t = self.config["t"]
        level = torch.as_tensor(t, device=z.device, dtype=torch.float32)
        _checked_level(level)
        level = level.expand(len(z)).contiguous()
        if labels is None and self.generator.config["classes"]:
            labels = torch.full((len(z),), self.generator.require_null(), device=z.device)
        if self.config["rescale"]:
            alpha = self.schedule.alpha(level).to(z.dtype)
            z = z * alpha.reshape(-1, 1, 1, 1)
        z = z.to(self.generator.dtype)
        images = self.generator(z, level, torch.zeros_like(level), labels=labels)
        if not return_dict:
            return (images,)
        return DecoderOutput(sample=images)


def _checked_level(t: "float | Tensor") -> None:
    level = torch.as_tensor(t)
    inside = (level >= TIME_FLOOR) & (level <= 1)
    if not bool(inside.all()):
        raise InputError(f"got t = {t}; the noise level of a latent is between {TIME_FLOOR} and 1")
