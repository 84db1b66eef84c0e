"""The one-step generator as a program without flowspace: torch.export's archive, or ONNX."""

import abc
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowspace.errors import RunError
from flowspace.vision.generator import CrossFlowGenerator

__all__ = ["Export", "OneStep", "Onnx", "TorchExport"]

TOLERANCE = 1e-3
"""The largest difference from eager that an export may have, of images in [-1, 1]: well under half
of one of 255 levels.
"""

EXAMPLE, CHECKED = 2, 3
"""Rows of the traced batch, and of the one that is compared: another number, so that a batch that
was frozen in is found.
"""


class OneStep(nn.Module):
    """From noise and labels to images: the generator at t = 1, s = 0, where the matched
    statistic's sample is its output.
    """

    def __init__(self, generator: CrossFlowGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images ``(B, outputs, H, W)`` of noise ``(B, channels, h, w)`` and classes
        ``(B,)``.
        """
        one = torch.ones_like(noise[:, 0, 0, 0])
        zero = torch.zeros_like(one)
        return self.generator(noise, one, zero, labels=labels)

    def inputs(self, rows: int) -> tuple[Tensor, ...]:
        """Return noise, and labels for a generator of classes."""
        classes = self.generator.config["classes"]
        draw = torch.Generator().manual_seed(rows)
        noise = torch.randn(rows, *self.generator.latent_shape, generator=draw)
        if not classes:
            return (noise,)
        return noise, torch.arange(rows) % classes


class Export(abc.ABC):
    """A format; calling it writes a generator to a file, checked against eager and renamed into
    place only then.
    """

    def __call__(self, generator: CrossFlowGenerator, path: Path) -> float:
        """Write the program, for any number of rows, in float32 on the CPU; returns its largest
        difference from eager.

        Raises:
            RunError: if what was written draws other images.
        """
        network = OneStep(generator).to("cpu", torch.float32).eval()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"partial-{path.name}")
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, of its exporters
                self.write(network, partial)
                inputs = network.inputs(CHECKED)
                difference = self.run(partial, inputs) - network(*inputs)
                apart = float(difference.abs().max())
            if not apart <= TOLERANCE:
                raise RunError(
                    f"the program of {path} differs from eager by {apart:.2g}; nothing was kept"
                )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return apart

    def program(self, network: OneStep) -> torch.export.ExportedProgram:
        """Return the graph, for any number of rows."""
        inputs = network.inputs(EXAMPLE)
        rows: Any = tuple({0: torch.export.Dim("rows", min=1)} for _ in inputs)
        return torch.export.export(network, inputs, dynamic_shapes=rows)

    @abc.abstractmethod
    def write(self, network: OneStep, path: Path) -> None:
        """Write the program."""

    @abc.abstractmethod
    def run(self, path: Path, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run what was written."""


class TorchExport(Export):
    """``torch.export``'s archive; ``torch.export.load(path).module()(noise, labels)`` runs it."""

    def write(self, network: OneStep, path: Path) -> None:
        """Write the archive."""
        torch.export.save(self.program(network), path)

    def run(self, path: Path, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run it."""
        return torch.export.load(path).module()(*inputs)


class Onnx(Export):
    """ONNX with its weights in one file; inputs ``noise`` and ``labels``, output ``images``."""

    def write(self, network: OneStep, path: Path) -> None:
        """Write the model."""
        names = ["noise", "labels"]
        torch.onnx.export(
            self.program(network),
            (),
            str(path),
            input_names=names[: len(network.inputs(EXAMPLE))],
            output_names=["images"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    def run(self, path: Path, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run it by onnxruntime."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        given = {}
        for one, value in zip(session.get_inputs(), inputs, strict=True):
            given[one.name] = value.numpy()
        images, *_ = session.run(None, given)
        return torch.from_numpy(images)
