"""Designs to start from: schedules, the variants of CrossFlow's Swiss roll, other papers'."""

from typing import NamedTuple

from flowspace.explore.design import Design

__all__ = ["PRESETS", "SUGGESTIONS", "Preset"]


class Preset(NamedTuple):
    """A design to start from.

    Attributes:
        name: what it is called.
        design: its formulas.
        note: what it shows, in a sentence.
    """

    name: str
    design: Design
    note: str


COSINE = ("cos(pi*t/2)", "sin(pi*t/2)")
COSINE_H = "cot(pi*t/2) - cot(pi*s/2)"
VARIANCE_PRESERVING = "(exp(-0.05*t - 4.975*t**2) - exp(-5.025))/(1 - exp(-5.025))"

PRESETS = (
    Preset(
        "Linear, the paper's statistic",
        Design(gamma="1", delta="-t/(t - s)"),
        "CrossFlow's own choice; O1, O2 and O3 of its table all hold. It is the matched one.",
    ),
    Preset(
        "Cosine, matched",
        Design(*COSINE),
        "The state moves at constant speed on a circle. The statistic follows from the schedule.",
    ),
    Preset(
        "Polynomial, matched",
        Design("(1 - t)**2", "1 - (1 - t)**2"),
        "More time near the noise. lambda' is 0 at t = 1, which is allowed.",
    ),
    Preset(
        "Variance preserving, matched",
        Design(VARIANCE_PRESERVING, f"sqrt(1 - ({VARIANCE_PRESERVING})**2)"),
        "The diffusion of DDPM, rescaled so that no signal is left at t = 1.",
    ),
    Preset(
        "O1: kappa = 0",
        Design(gamma="1", delta="-1"),
        "As in consistency models: the data term vanishes, so nothing ties f to the data.",
    ),
    Preset(
        "O2: the zero of b shifted by 0.1",
        Design(kappa="s", h="1/t - 1/(s + 0.1)"),
        "b is zero beside the diagonal, not on it: not anchored. It trains, but worse.",
    ),
    Preset(
        "O2: the zero of b shifted by 0.3",
        Design(kappa="s", h="1/t - 1/(s + 0.3)"),
        "The farther the zero of b is from the diagonal, the worse it trains.",
    ),
    Preset(
        "O2: b never zero",
        Design(kappa="s", h="1/t"),
        "No row is a reconstruction. Training diverges.",
    ),
    Preset(
        "O3: linear, with the cosine's h",
        Design(kappa="s", h=COSINE_H),
        "Anchored but not matched: on the diagonal f is tied to a multiple of the data.",
    ),
    Preset(
        "O3: cosine, with the linear's h",
        Design(*COSINE, kappa="sin(pi*s/2)", h="1/t - 1/s"),
        "Anchored but not matched: on the diagonal f is tied to a multiple of the data.",
    ),
    Preset(
        "O3: cosine, with its own h",
        Design(*COSINE, kappa="sin(pi*s/2)", h=COSINE_H),
        "h = lambda(t) - lambda(s) makes it matched.",
    ),
    Preset(
        "MeanFlow: the average velocity",
        Design(gamma="0", delta="1/(t - s)"),
        "Criterion 1 fails: the velocity stays in the residual, so it lives in one space.",
    ),
)

SUGGESTIONS = {
    "alpha": ["1 - t", "cos(pi*t/2)", "(1 - t)**2", "1 - t**2"],
    "beta": ["t", "sin(pi*t/2)", "1 - (1 - t)**2", "sqrt(1 - (1 - t)**2)"],
    "gamma": ["1", "0", "s/t"],
    "delta": ["-t/(t - s)", "1/(t - s)", "-1", "-(1 + t)/(t - s)"],
    "kappa": ["s", "sin(pi*s/2)", "s*(2 - s)", "s**2", "0"],
    "h": ["1/t - 1/s", COSINE_H, "1/t - 1/(s + 0.1)", "1/t"],
}
"""What may be picked for each formula; the first is what a new field begins with."""
