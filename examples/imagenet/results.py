"""Numbers that others have published; none of them was measured here.

They are the CrossFlow paper's (arXiv 2606.19970), tables 1 and 2, unless another source is named:
FIDs of 50,000 class-conditional samples of ImageNet at 256 pixels. An ablation's number belongs to
the config of that name in ``configs/paper``, whose objective is the paper's, and to no other.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CROSSFLOW",
    "PAPER_CONFIGS",
    "PUBLISHED",
    "PaperRow",
    "PublishedMethod",
    "paper_row",
]

PAPER_CONFIGS = Path(__file__).parent / "configs" / "paper"
"""The configs that are the paper's."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables of its own models.

    Attributes:
        setting: what the row says of itself.
        fid: its number.
        table: where it stands.
    """

    setting: str
    fid: float
    table: str


CROSSFLOW = {
    "crossflow-b": PaperRow("Full CrossFlow-B", 2.54, "tables 1 and 2"),
    "crossflow-l": PaperRow("CrossFlow-L", 1.69, "table 1"),
    "crossflow-xl": PaperRow("CrossFlow-XL", 1.62, "table 1"),
    "b-sd-vae": PaperRow("Encoder: SD-VAE, 16 latent channels", 4.08, "table 2"),
    "b-flux2": PaperRow("Encoder: FLUX.2, 128 latent channels", 3.81, "table 2"),
    "b-consistency": PaperRow(
        "Loss: the consistency-loss baseline of section 4.3", 8.70, "table 2"
    ),
    "b-estimated": PaperRow("Loss: JVP with estimated marginal velocity", 7.06, "table 2"),
    "b-no-gan": PaperRow("Loss: without GAN loss", 8.86, "table 2"),
    "b-no-perceptual": PaperRow("Loss: without perceptual loss", 30.21, "table 2"),
    "b-neither": PaperRow("Loss: without both perceptual and GAN losses", 50.65, "table 2"),
    "b-adamw": PaperRow("Optimizer: AdamW in place of Muon", 2.80, "table 2"),
    "b-t-and-s": PaperRow("Time conditioning: t and s", 2.73, "table 2"),
    "b-label-dropout": PaperRow("Class conditioning: drop class labels by 10%", 2.76, "table 2"),
}
"""The paper's own results by the name of the config in `PAPER_CONFIGS`.

They were read in a text without its formulas. So the row of the loss with FID 8.70 has no name in
the table; section 4.3 calls it the consistency-loss baseline, and section B.2 says what the row of
the time conditioning is. Figure 4's FIDs, of three adversarial weights, are in the picture alone.
"""


def paper_row(config: Path) -> PaperRow | None:
    """Return the paper's row for a config's file, if it is one of the paper's."""
    if config.resolve().parent != PAPER_CONFIGS.resolve():
        return None
    return CROSSFLOW.get(config.stem)


@dataclass(frozen=True)
class PublishedMethod:
    """A method's row in table 1.

    Attributes:
        name: of the method and its network.
        family: the heading that it stands under.
        steps: of its sampler.
        evaluations: of the network in a step: 2 with guidance.
        parameters: in millions, without a decoder's; None where none is given.
        fid: as published.
        source: where, unless in table 1 of the CrossFlow paper.
    """

    name: str
    family: str
    steps: int
    evaluations: int
    parameters: int | None
    fid: float
    source: str = ""


LATENT_STEPS = "multi-step latent-space diffusion/flow"
PIXEL_STEPS = "multi-step pixel-space diffusion/flow"
LATENT_ONE = "1-NFE latent-space diffusion/flow"
PIXEL_GAN = "1-NFE pixel-space GAN"
PIXEL_ONE = "1-NFE pixel-space diffusion/flow"
ACROSS_ONE = "1-NFE latent-to-pixel"

PUBLISHED = (
    PublishedMethod("DiT-XL/2", LATENT_STEPS, 250, 2, 675, 2.27),
    PublishedMethod("SiT-XL/2", LATENT_STEPS, 250, 2, 675, 2.06),
    PublishedMethod("SiT-XL/2 + REPA", LATENT_STEPS, 250, 2, 675, 1.42),
    PublishedMethod("ADM-G", PIXEL_STEPS, 250, 2, 554, 4.59),
    PublishedMethod("SiD, UViT", PIXEL_STEPS, 1000, 2, 2500, 2.44),
    PublishedMethod("VDM++", PIXEL_STEPS, 256, 2, 2500, 2.12),
    PublishedMethod("SiD2", PIXEL_STEPS, 512, 2, None, 1.38),
    PublishedMethod("PixelDiT-XL/16", PIXEL_STEPS, 100, 2, 797, 1.61),
    PublishedMethod("iCT-XL/2", LATENT_ONE, 1, 1, 675, 34.24),
    PublishedMethod("Shortcut-XL/2", LATENT_ONE, 1, 1, 676, 10.60),
    PublishedMethod("MeanFlow-XL/2", LATENT_ONE, 1, 1, 676, 3.43),
    PublishedMethod("iMF-XL/2", LATENT_ONE, 1, 1, 659, 1.72),
    PublishedMethod("MF-RAE, DiTDH-XL", LATENT_ONE, 1, 1, 841, 2.03, "arXiv 2511.13019"),
    PublishedMethod("BigGAN-deep", PIXEL_GAN, 1, 1, 56, 6.95),
    PublishedMethod("StyleGAN-XL", PIXEL_GAN, 1, 1, 166, 2.30),
    PublishedMethod("GigaGAN", PIXEL_GAN, 1, 1, 569, 3.45),
    PublishedMethod("EPG-L/16", PIXEL_ONE, 1, 1, 540, 8.82),
    PublishedMethod("pMF-B/16", PIXEL_ONE, 1, 1, 118, 3.12),
    PublishedMethod("pMF-L/16", PIXEL_ONE, 1, 1, 410, 2.52),
    PublishedMethod("pMF-H/16", PIXEL_ONE, 1, 1, 956, 2.22),
    PublishedMethod("CrossFlow-B", ACROSS_ONE, 1, 1, 95, CROSSFLOW["crossflow-b"].fid),
    PublishedMethod("CrossFlow-L", ACROSS_ONE, 1, 1, 315, CROSSFLOW["crossflow-l"].fid),
    PublishedMethod("CrossFlow-XL", ACROSS_ONE, 1, 1, 461, CROSSFLOW["crossflow-xl"].fid),
)
"""Table 1, and MF-RAE beside it.

Its numbers of evaluations read "2502", "10002", "2562", "5122" and "1002" in the text, without the
sign between the factors: 250 x 2 and so on, since section 4.1 gives DiT and SiT 250 steps.
"""
