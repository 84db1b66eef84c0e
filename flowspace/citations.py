"""What to cite: BibTeX of the papers that an object is made of.

Each class has its papers in one table, `USED`; an object is walked through its fields, so an
objective brings those of its schedule, statistic, times, penalty, guidance and route too.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from flowspace import __version__
from flowspace.errors import InputError

__all__ = ["citation"]


class Paper(NamedTuple):
    """A paper as an entry of BibTeX has it.

    Attributes:
        key: the entry's name.
        authors: as BibTeX writes them, joined by ``and``.
        title: with braces round what keeps its capitals.
        number: of arXiv.
        year: of its publication, or of its arXiv number.
        venue: where it was published; empty for arXiv alone.
    """

    key: str
    authors: str
    title: str
    number: str
    year: int
    venue: str = ""

    def bibtex(self) -> str:
        """Return the entry."""
        kind, fields = "misc", {"author": self.authors, "title": self.title}
        if self.venue:
            kind = "inproceedings"
            fields["booktitle"] = self.venue
        fields["year"] = str(self.year)
        fields["eprint"] = self.number
        fields["archiveprefix"] = "arXiv"
        return _entry(kind, self.key, fields)


PAPERS = {
    paper.key: paper
    for paper in (
        Paper(
            "wang2026crossflow",
            "Wang, Xiyuan and Zhang, Xiao and Li, Yang and Jiang, Ruoxi and Zhong, Zhao and Bo, "
            "Liefeng and Zhang, Muhan",
            "{CrossFlow}: One-Step Generation Across Latent and Pixel Spaces",
            "2606.19970",
            2026,
        ),
        Paper(
            "lipman2023flow",
            "Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and "
            "Le, Matthew",
            "Flow Matching for Generative Modeling",
            "2210.02747",
            2023,
            "International Conference on Learning Representations",
        ),
        Paper(
            "liu2023flow",
            "Liu, Xingchao and Gong, Chengyue and Liu, Qiang",
            "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
            "2209.03003",
            2023,
            "International Conference on Learning Representations",
        ),
        Paper(
            "geng2025mean",
            "Geng, Zhengyang and Deng, Mingyang and Bai, Xingjian and Kolter, J. Zico and He, "
            "Kaiming",
            "Mean Flows for One-step Generative Modeling",
            "2505.13447",
            2025,
        ),
        Paper(
            "geng2025improved",
            "Geng, Zhengyang and Lu, Yiyang and Wu, Zongze and Shechtman, Eli and Kolter, J. Zico "
            "and He, Kaiming",
            "Improved Mean Flows: On the Challenges of Fastforward Generative Models",
            "2512.02012",
            2025,
        ),
        Paper(
            "lu2026pixel",
            "Lu, Yiyang and Lu, Susie and Sun, Qiao and Zhao, Hanhong and Jiang, Zhicheng and "
            "Wang, Xianbang and Li, Tianhong and Geng, Zhengyang and He, Kaiming",
            "One-step Latent-free Image Generation with Pixel Mean Flows",
            "2601.22158",
            2026,
        ),
        Paper(
            "zhang2025alphaflow",
            "Zhang, Huijie and Siarohin, Aliaksandr and Menapace, Willi and Vasilkovsky, Michael "
            "and Tulyakov, Sergey and Qu, Qing and Skorokhodov, Ivan",
            "{AlphaFlow}: Understanding and Improving {MeanFlow} Models",
            "2510.20771",
            2025,
        ),
        Paper(
            "song2023consistency",
            "Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya",
            "Consistency Models",
            "2303.01469",
            2023,
            "International Conference on Machine Learning",
        ),
        Paper(
            "kim2024consistency",
            "Kim, Dongjun and Lai, Chieh-Hsin and Liao, Wei-Hsiang and Murata, Naoki and Takida, "
            "Yuhta and Uesaka, Toshimitsu and He, Yutong and Mitsufuji, Yuki and Ermon, Stefano",
            "Consistency Trajectory Models: Learning Probability Flow {ODE} Trajectory of "
            "Diffusion",
            "2310.02279",
            2024,
            "International Conference on Learning Representations",
        ),
        Paper(
            "hu2025meanflow",
            "Hu, Zheyuan and Lai, Chieh-Hsin and Wu, Ge and Mitsufuji, Yuki and Ermon, Stefano",
            "{MeanFlow} Transformers with Representation Autoencoders",
            "2511.13019",
            2025,
        ),
        Paper(
            "hu2025cmt",
            "Hu, Zheyuan and Lai, Chieh-Hsin and Mitsufuji, Yuki and Ermon, Stefano",
            "{CMT}: Mid-Training for Efficient Learning of Consistency, Mean Flow, and Flow Map "
            "Models",
            "2509.24526",
            2025,
        ),
        Paper(
            "chen2025pixelflow",
            "Chen, Shoufa and Ge, Chongjian and Zhang, Shilong and Sun, Peize and Luo, Ping",
            "{PixelFlow}: Pixel-Space Generative Models with Flow",
            "2504.07963",
            2025,
        ),
        Paper(
            "ho2022classifier",
            "Ho, Jonathan and Salimans, Tim",
            "Classifier-Free Diffusion Guidance",
            "2207.12598",
            2022,
        ),
        Paper(
            "esser2024scaling",
            "Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and Entezari, Rahim and "
            'M{\\"u}ller, Jonas and Saini, Harry and Levi, Yam and Lorenz, Dominik and Sauer, '
            "Axel and Boesel, Frederic and Podell, Dustin and Dockhorn, Tim and English, Zion and "
            "Lacey, Kyle and Goodwin, Alex and Marek, Yannik and Rombach, Robin",
            "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
            "2403.03206",
            2024,
            "International Conference on Machine Learning",
        ),
        Paper(
            "ho2020denoising",
            "Ho, Jonathan and Jain, Ajay and Abbeel, Pieter",
            "Denoising Diffusion Probabilistic Models",
            "2006.11239",
            2020,
            "Advances in Neural Information Processing Systems",
        ),
        Paper(
            "song2021score",
            "Song, Yang and Sohl-Dickstein, Jascha and Kingma, Diederik P. and Kumar, Abhishek "
            "and Ermon, Stefano and Poole, Ben",
            "Score-Based Generative Modeling through Stochastic Differential Equations",
            "2011.13456",
            2021,
            "International Conference on Learning Representations",
        ),
        Paper(
            "lin2024common",
            "Lin, Shanchuan and Liu, Bingchen and Li, Jiashi and Yang, Xiao",
            "Common Diffusion Noise Schedules and Sample Steps are Flawed",
            "2305.08891",
            2024,
            "{IEEE/CVF} Winter Conference on Applications of Computer Vision",
        ),
        Paper(
            "karras2022elucidating",
            "Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli",
            "Elucidating the Design Space of Diffusion-Based Generative Models",
            "2206.00364",
            2022,
            "Advances in Neural Information Processing Systems",
        ),
        Paper(
            "albergo2023stochastic",
            "Albergo, Michael S. and Boffi, Nicholas M. and Vanden-Eijnden, Eric",
            "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions",
            "2303.08797",
            2023,
        ),
        Paper(
            "lipman2024guide",
            "Lipman, Yaron and Havasi, Marton and Holderrieth, Peter and Shaul, Neta and Le, Matt "
            "and Karrer, Brian and Chen, Ricky T. Q. and Lopez-Paz, David and Ben-Hamu, Heli and "
            "Gat, Itai",
            "Flow Matching Guide and Code",
            "2412.06264",
            2024,
        ),
    )
}
"""Each paper by its key."""

USED = {
    "AlphaFlowLoss": ("zhang2025alphaflow", "geng2025mean"),
    "Cascade": ("chen2025pixelflow",),
    "ConsistencyLoss": ("song2023consistency",),
    "CrossFlowLoss": ("wang2026crossflow",),
    "FlowMatchingLoss": ("lipman2023flow",),
    "ImprovedMeanFlowLoss": ("geng2025improved", "geng2025mean"),
    "MeanFlowDistillationLoss": ("hu2025meanflow", "geng2025mean"),
    "MeanFlowLoss": ("geng2025mean",),
    "PixelMeanFlowLoss": ("lu2026pixel", "geng2025improved", "geng2025mean"),
    "TrajectoryMatchingLoss": ("hu2025cmt", "geng2025mean"),
    "ConsistencyStatistic": ("song2023consistency", "kim2024consistency"),
    "MatchedStatistic": ("wang2026crossflow",),
    "MeanFlowStatistic": ("geng2025mean",),
    "Statistic": ("wang2026crossflow",),
    "CosineSchedule": ("albergo2023stochastic",),
    "LinearSchedule": ("liu2023flow",),
    "PolynomialSchedule": ("lipman2024guide",),
    "VariancePreservingSchedule": ("ho2020denoising", "song2021score", "lin2024common"),
    "KarrasTimes": ("karras2022elucidating",),
    "LogitNormalTimes": ("esser2024scaling",),
    "ShiftedTimes": ("esser2024scaling",),
    "ToDataTimes": ("song2023consistency",),
    "Adaptive": ("geng2025mean",),
    "Guidance": ("ho2022classifier",),
    "RandomGuidance": ("ho2022classifier", "geng2025improved"),
}
"""The papers of each class by its name. A class that is not there has those of its parent; the
routes to the derivative and the plain penalties come from no paper.
"""


def citation(*objects: Any) -> str:
    """Return what to cite for an objective or another object of flowspace, as BibTeX.

    The entry of flowspace itself comes first, then those of the papers that the object and its
    fields come from: objective, schedule, statistic, times, penalty, guidance. Each stands there
    once, also if several objects are given. Which numbers of a paper are used makes no difference.

    Args:
        objects: such as an objective, a schedule or a guidance.

    Raises:
        InputError: for what is no object of flowspace, and for a class in place of its object.
    """
    if not objects:
        raise InputError("got nothing to cite; write citation(loss_fn)")
    keys: list[str] = []
    for one in objects:
        if isinstance(one, type):
            raise InputError(
                f"got {one.__name__}, a class; write an object of it: citation({one.__name__}())"
            )
        if not _is_ours(one):
            raise InputError(
                f"got {type(one).__name__}, which is no object of flowspace; write "
                "citation(loss_fn), with the objective that you train with"
            )
        keys += _keys(one)
    entries = [_software(), *[PAPERS[key].bibtex() for key in dict.fromkeys(keys)]]
    return "\n\n".join(entries) + "\n"


def _keys(one: Any) -> Iterator[str]:
    """Iterate over the keys of an object's papers, and of those of its fields."""
    if not _is_ours(one):
        return
    for kind in type(one).__mro__:
        if kind.__name__ in USED:
            yield from USED[kind.__name__]
            break
    if not dataclasses.is_dataclass(one):
        return
    for field in dataclasses.fields(one):
        yield from _keys(getattr(one, field.name))


def _is_ours(one: Any) -> bool:
    """Return whether an object is of a class of flowspace, or of a subclass of one."""
    return any(kind.__module__.startswith("flowspace.") for kind in type(one).__mro__)


def _software() -> str:
    """Return the entry of flowspace itself."""
    fields = {
        "author": "{The flowspace authors}",
        "title": "flowspace: cross-space flow maps in {PyTorch}",
        "year": "2026",
        "version": __version__,
        "url": "https://github.com/flowspace-lib/flowspace",
    }
    return _entry("misc", "flowspace", fields)


def _entry(kind: str, key: str, fields: dict[str, str]) -> str:
    """Return an entry of BibTeX; a field that is empty is left out."""
    filled = {name: value for name, value in fields.items() if value}
    width = max(map(len, filled))
    lines = [f"  {name:<{width}} = {{{value}}}," for name, value in filled.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])
