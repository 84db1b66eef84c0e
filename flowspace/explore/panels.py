"""The parts of the page: the fields of a design, and a panel for each thing that follows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nicegui import events, ui

from flowspace.explore import drawing
from flowspace.explore.answers import Derived, Properties, Residual, Trajectories, WrittenOut
from flowspace.explore.design import FORMS, Design
from flowspace.explore.maps import CoefficientMap
from flowspace.explore.mixture import TIMES
from flowspace.explore.presets import PRESETS, SUGGESTIONS
from flowspace.explore.training import SHOWN, TrainingLook, roll, train
from flowspace.explore.workers import Ended, Job, send_all

__all__ = [
    "DesignFields",
    "FlowPanel",
    "MapsPanel",
    "ResidualPanel",
    "TrainingPanel",
    "quiet_button",
]

LABELS = {
    "alpha": "\N{GREEK SMALL LETTER ALPHA}(t), of the data",
    "beta": "\N{GREEK SMALL LETTER BETA}(t), of the noise",
    "gamma": "\N{GREEK SMALL LETTER GAMMA}(t, s), of the state",
    "delta": "\N{GREEK SMALL LETTER DELTA}(t, s), of the velocity's integral",
    "kappa": "\N{GREEK SMALL LETTER KAPPA}(s)",
    "h": "h(t, s) = b/\N{GREEK SMALL LETTER KAPPA}",
}
FORM_LABELS = {
    "matched": "nothing: the matched statistic",
    "gamma, delta": "\N{GREEK SMALL LETTER GAMMA} and \N{GREEK SMALL LETTER DELTA}",
    "kappa, delta": "\N{GREEK SMALL LETTER KAPPA} and \N{GREEK SMALL LETTER DELTA}",
    "kappa, gamma": "\N{GREEK SMALL LETTER KAPPA} and \N{GREEK SMALL LETTER GAMMA}",
    "kappa, h": "h and \N{GREEK SMALL LETTER KAPPA}",
}
STEPS = [500, 2000, 8000]

POINTED_AT = f"""(e) => {{
  const r = e.currentTarget.getBoundingClientRect();
  const x = (e.clientX - r.left) * {drawing.PICTURE[0]} / r.width;
  const y = (e.clientY - r.top) * {drawing.PICTURE[1]} / r.height;
  const t = (x - {drawing.LEFT}) / {drawing.SIDE};
  const s = 1 - (y - {drawing.TOP}) / {drawing.SIDE};
  const inside = 0 <= s && s <= t && t <= 1;
  document.querySelectorAll('.cursor').forEach((c) => {{
    c.setAttribute('cx', inside ? x : -9);
    c.setAttribute('cy', inside ? y : -9);
  }});
  if (inside) emit(t, s);
}}"""
"""Moves the ring of every map to the pointer, and says where it is."""


class DesignFields:
    """What one types and picks.

    Args:
        design: what the fields begin with.
        on_change: called with the design after each change.
    """

    def __init__(self, design: Design, on_change: Callable[[Design], None]) -> None:
        self.design, self._on_change = design, on_change
        self._known: dict[str, str] = {}
        self._fields: dict[str, ui.input] = {}
        self._problems: dict[str, ui.label] = {}
        self._quiet = False
        self._build()
        self._show(design)

    def mark(self, problems: dict[str, str]) -> None:
        """Show what is wrong beside each field, and nothing beside the others."""
        for name, label in self._problems.items():
            text = problems.get(name, "")
            label.set_text(text)
            label.set_visibility(bool(text))
        for name, field in self._fields.items():
            field.props["error"] = name in problems
            field.update()

    def learn(self, written: WrittenOut) -> None:
        """Keep the formulas that follow: a form that is chosen next begins with them."""
        self._known = written.formulas

    def _build(self) -> None:
        with ui.element("div").classes("side"):
            names = [preset.name for preset in PRESETS]
            self._preset = ui.select(names, label="Start from", on_change=self._pick_preset)
            self._preset.props('outlined dense options-dense aria-label="preset"')
            self._note = ui.label().classes("note")
            ui.html("Schedule", tag="h2", sanitize=False)
            self._field("alpha")
            self._field("beta")
            self._problem("schedule")
            ui.html("Statistic", tag="h2", sanitize=False)
            self._form = ui.select(FORM_LABELS, label="given by", on_change=self._pick_form)
            self._form.props('outlined dense options-dense aria-label="form"')
            for name in ("gamma", "h", "kappa", "delta"):
                self._field(name)
            self._problem("statistic")
            ui.label(
                "t = 0 is data, t = 1 is noise, s is where the map goes. Write + - * / **, pi, "
                "exp, log, sqrt, sin, cos, tan, cot."
            ).classes("note")

    def _field(self, name: str) -> None:
        field = ui.input(LABELS[name], on_change=lambda: self._typed())
        field.props(
            f'outlined dense debounce=60 spellcheck=false autocomplete=off aria-label="{name}" '
            "hide-bottom-space no-error-icon"
        )
        field.classes("formula-field w-full")
        with field.add_slot("append"), ui.button(icon="expand_more") as button:
            button.props(f'flat dense round size=sm color=grey aria-label="pick {name}"')
            with ui.menu():
                for text in SUGGESTIONS[name]:
                    ui.menu_item(text, partial(field.set_value, text))
        self._fields[name] = field
        self._problem(name)

    def _problem(self, name: str) -> None:
        label = ui.label().classes("problem").props('role="alert"')
        label.set_visibility(False)
        self._problems[name] = label

    def _show(self, design: Design) -> None:
        """Fill the fields without answering to it."""
        self._quiet = True
        formulas = design.formulas
        for name, field in self._fields.items():
            field.set_visibility(name in formulas)
            if name in formulas:
                field.set_value(formulas[name])
        self._form.set_value(FORMS[design.form])
        preset = next((each for each in PRESETS if each.design == design), None)
        self._preset.set_value(preset and preset.name)
        self._note.set_text(preset.note if preset else "")
        self._note.set_visibility(preset is not None)
        self._quiet = False

    def _typed(self) -> None:
        if self._quiet:
            return
        formulas = {name: self._fields[name].value or "" for name in self.design.formulas}
        self._take(Design(**formulas))

    def _pick_preset(self, event: events.ValueChangeEventArguments) -> None:
        if not self._quiet and event.value:
            self._take(next(each.design for each in PRESETS if each.name == event.value))

    def _pick_form(self, event: events.ValueChangeEventArguments) -> None:
        if self._quiet:
            return
        form = next(names for names, label in FORMS.items() if label == event.value)
        begin = {name: SUGGESTIONS[name][0] for name in form}
        begin |= self._known | self.design.formulas
        self._take(self.design.given_by(form, begin))

    def _take(self, design: Design) -> None:
        self.design = design
        self._known = {}
        self._show(design)
        self._on_change(design)


class ResidualPanel:
    """The residual, kappa and the properties: the middle of the page."""

    def __init__(self) -> None:
        self._latex = ""
        with ui.element("section").classes("card residual") as self._card:
            with ui.element("div").classes("head"):
                ui.html("Residual", tag="h2", sanitize=False)
                self._state = ui.label().classes("note").props('aria-live="polite"')
                quiet_button("copy LaTeX", "content_copy", self._copy)
            self._formulas = _markup("formulas")
            self._long = ui.label(
                "Some coefficients are too long to read here; copy LaTeX has them."
            )
            self._long.classes("note text-center").set_visibility(False)
            self._kappa = _markup("kappa")
            self._kappa.props('data-testid="kappa"')
            self._properties = ui.element("div").classes("properties")
            self._advice = ui.label().classes("advice")

    def show_residual(self, residual: Residual) -> None:
        """Show R, broken between its terms where the window is narrow."""
        self._latex = residual.latex
        terms = "".join(residual.markup)
        self._long.set_visibility(not residual.is_whole)
        self._formulas.set_content(f'<div class="terms" tabindex="0">{terms}</div>')
        self._formulas.classes(remove="stale")

    def show_derived(self, derived: Derived) -> None:
        """Show kappa, at once."""
        self._kappa.set_content(derived.kappa_markup or "no \N{GREEK SMALL LETTER KAPPA}(s)")
        self._kappa.props(f'data-kappa="{derived.kappa}"')
        self._kappa.classes(remove="stale")

    def show_properties(self, properties: Properties) -> None:
        """Show which properties hold, and why."""
        self._properties.clear()
        with self._properties:
            for name, holds in properties.holds.items():
                _property(name, holds, properties.reasons[name])
        self._properties.classes(remove="stale")
        self._advice.set_text(properties.advice)
        self._advice.set_visibility(bool(properties.advice))

    def fade(self) -> None:
        """Say that what is shown is of an earlier design."""
        for part in (self._formulas, self._kappa, self._properties):
            part.classes(add="stale")

    def say(self, text: str) -> None:
        """Show a word beside the title."""
        if self._state.text != text:
            self._state.set_text(text)

    def _copy(self) -> None:
        ui.clipboard.write(self._latex)
        ui.notify("The residual is copied as LaTeX.", position="bottom")


class MapsPanel:
    """The coefficients over the triangle."""

    def __init__(self) -> None:
        self._maps: list[CoefficientMap] = []
        with ui.element("section"):
            ui.html("Its coefficients", tag="h2", sanitize=False)
            ui.label(
                "Over 0 \N{LESS-THAN OR EQUAL TO} s \N{LESS-THAN OR EQUAL TO} t "
                "\N{LESS-THAN OR EQUAL TO} 1. Red marks where there is no finite value."
            ).classes("note")
            self._grid = ui.element("div").classes("maps")
            self._readout = ui.label("Point at a map to read its values.").classes("readout")

    def show(self, maps: list[CoefficientMap]) -> None:
        """Draw the maps."""
        names = [each.name for each in maps]
        if names != [each.name for each in self._maps]:
            self._grid.clear()
            with self._grid:
                self._pictures = [_markup("") for _ in maps]
            for picture in self._pictures:
                picture.on("pointermove", self._point, throttle=0.05, js_handler=POINTED_AT)
        self._maps = maps
        for index, each in enumerate(maps):
            self._pictures[index].set_content(drawing.heat_map(each, index))

    def _point(self, event: events.GenericEventArguments) -> None:
        found = [each.at(*event.args) for each in self._maps]
        t, s, _ = found[0]
        values = [
            f"{each.name} = {drawing.number(value)}"
            for each, (_, _, value) in zip(self._maps, found, strict=True)
        ]
        self._readout.set_text(f"t = {t:.3f}, s = {s:.3f}:  {',  '.join(values)}")


class FlowPanel:
    """The exact flow of a mixture of Gaussians."""

    def __init__(self) -> None:
        self._trajectories: Trajectories | None = None
        with ui.element("div"):
            ui.html("Exact flow of a mixture", tag="h2", sanitize=False)
            ui.label(
                "Grey: noise at t = 1. Coloured: where the probability-flow ODE of this schedule "
                "takes it, to five Gaussians. The velocity is known in closed form."
            ).classes("note")
            self._picture = _markup("picture card")
            last = len(TIMES) - 1
            self._slider = ui.slider(min=0, max=last, value=last, on_change=self._draw)
            self._slider.props('aria-label="time of the flow"').classes("px-2")
            self._readout = ui.label().classes("readout")

    def show(self, trajectories: Trajectories) -> None:
        """Draw the trajectories."""
        self._trajectories = trajectories
        self._draw()

    def _draw(self) -> None:
        if self._trajectories is not None:
            shown = int(self._slider.value or 0)
            self._picture.set_content(drawing.paths(self._trajectories.states, shown))
            text = f"t = {float(TIMES[shown]):.2f}"
            if self._trajectories.states.size == 0:
                text = "The solver does not come through: this schedule changes too fast."
            self._readout.set_text(text)


class TrainingPanel:
    """A network trained on the Swiss roll, in a process of its own."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self._trained: Design | None = None
        self._job: Job | None = None
        with ui.element("div"):
            ui.html("Train a small network", tag="h2", sanitize=False)
            ui.label(
                "Grey: the Swiss roll. Coloured: samples in one step, from t = 1 to s = 0.02."
            ).classes("note")
            self._samples = _markup("picture card")
            data = roll(SHOWN, torch.Generator().manual_seed(0)).numpy()
            self._samples.set_content(drawing.clouds(data, data[:0]))
            with ui.element("div").classes("controls"):
                self._button = ui.button("Start", on_click=self._start_or_stop)
                self._button.props('outline no-caps aria-label="start or stop training"')
                self._steps = ui.select(STEPS, value=STEPS[1], label="steps").classes("steps")
                self._steps.props('outlined dense options-dense aria-label="training steps"')
                self._status = ui.label("").classes("readout").props('aria-live="polite"')
            self._bar = ui.linear_progress(0, show_value=False).props("rounded size=4px")
            self._curve = _markup("")

    def take(self, design: Design) -> None:
        """Train this design when it is started next."""
        self.design = design
        if self._job is None and self._trained not in (None, design):
            self._status.set_text("These samples are of an earlier design. Start trains this one.")

    def poll(self) -> None:
        """Show what the training has sent."""
        if self._job is None:
            return
        running, sent = self._job.running, self._job.poll()
        looks = [each for each in sent if isinstance(each, TrainingLook)]
        if looks:
            self._show(looks[-1])
        ends = [each for each in sent if isinstance(each, Ended)]
        if ends or not running:
            self.stop()
        if ends and ends[0].problem:
            self._status.set_text(ends[0].problem)

    def stop(self) -> None:
        """End the training; what it has shown stays."""
        if self._job is not None:
            self._job.stop()
            self._job = None
            self._button.set_text("Start")

    def _start_or_stop(self) -> None:
        if self._job is not None:
            self.stop()
            return
        self._job = Job(send_all, train, self.design, self._steps.value)
        self._trained = self.design
        self._button.set_text("Stop")
        self._status.set_text("starting")
        self._bar.set_value(0)

    def _show(self, look: TrainingLook) -> None:
        self._bar.set_value(look.step / look.steps)
        distance = drawing.number(look.distance)
        text = f"step {look.step} of {look.steps}, distance to the data {distance}"
        self._status.set_text(look.problem or text)
        self._samples.set_content(drawing.clouds(look.data, look.samples))
        self._curve.set_content(drawing.curve(look.losses, look.steps))


def _markup(classes: str) -> ui.html:
    """Return a place for markup that this package has made of numbers and parsed formulas."""
    return ui.html("", sanitize=False).classes(classes)


def quiet_button(text: str, icon: str, on_click: Callable[..., Any]) -> ui.button:
    """Return a button that draws no attention."""
    return ui.button(text, icon=icon, on_click=on_click).props("flat dense no-caps")


def _property(name: str, holds: bool, reason: str) -> None:
    sign, classes = "\N{HEAVY MULTIPLICATION X}", "property fails"
    if holds:
        sign, classes = "\N{CHECK MARK}", "property"
    with ui.element("div").classes(classes):
        ui.label(sign).classes("sign")
        with ui.element("div"):
            ui.label(name[0].upper() + name[1:]).classes("title")
            ui.label(reason).classes("note")
