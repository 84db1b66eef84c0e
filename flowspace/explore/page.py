"""The page: its frame, and what passes between the fields, the processes and the panels."""

from importlib import resources

from nicegui import Client, ui
from starlette.requests import Request

from flowspace.errors import FlowspaceError
from flowspace.explore.answers import (
    Answer,
    Derived,
    Properties,
    Refused,
    Residual,
    Trajectories,
    WrittenOut,
)
from flowspace.explore.design import Design, DesignError, python_of
from flowspace.explore.panels import (
    DesignFields,
    FlowPanel,
    MapsPanel,
    ResidualPanel,
    TrainingPanel,
    quiet_button,
)
from flowspace.explore.presets import PRESETS
from flowspace.explore.workers import Calculator

__all__ = ["add_page"]

LOOK_EVERY = 0.03
"""Seconds between two looks at what the processes have sent."""

SLOW = 0.5
"""Seconds after which the page says that it is still working."""


def add_page() -> None:
    """Put the page at the root of NiceGUI's app."""

    @ui.page("/", title="flowspace explore", dark=None, reconnect_timeout=2)
    async def root(request: Request, client: Client) -> None:
        page = ExplorePage(dict(request.query_params))
        await client.connected()
        if not client.is_deleted:
            page.begin()
            client.on_delete(page.end)


class ExplorePage:
    """One page, of one browser window.

    Args:
        query: the names and formulas of the link that it was opened by.
    """

    def __init__(self, query: dict[str, str]) -> None:
        self._calculator: Calculator | None = None
        ui.add_css(resources.files("flowspace.explore").joinpath("explore.css").read_text())
        ui.colors(primary="var(--accent)")
        design, problem = PRESETS[0].design, ""
        try:
            if query:
                design = Design.from_query(query)
        except FlowspaceError as error:
            problem = f"The link is not a design: {error}"
        with ui.element("div").classes("explore"):
            self._build_top()
            if problem:
                ui.label(problem).classes("problem")
            with ui.element("div").classes("columns"):
                self._fields = DesignFields(design, self._changed)
                with ui.element("div").classes("main"):
                    self._residual, self._maps = ResidualPanel(), MapsPanel()
                    with ui.element("section").classes("pair"):
                        self._flow, self._training = FlowPanel(), TrainingPanel(design)

    def begin(self) -> None:
        """Start to answer."""
        self._calculator = Calculator()
        self._calculator.ask(self._fields.design)
        ui.timer(LOOK_EVERY, self._look)

    def end(self) -> None:
        """Stop every process of the page."""
        self._training.stop()
        if self._calculator is not None:
            self._calculator.stop()
            self._calculator = None

    def _build_top(self) -> None:
        with ui.element("header").classes("top"):
            ui.html("flowspace <span>explore</span>", tag="h1", sanitize=False)
            ui.element("div").classes("grow")
            self._dark = ui.dark_mode(None)
            with ui.element("div").classes("links"):
                quiet_button("copy link", "link", self._copy_link)
                quiet_button("copy Python", "code", self._copy_python)
                quiet_button("", "contrast", self._switch_dark).props('aria-label="light or dark"')

    def _changed(self, design: Design) -> None:
        self._training.take(design)
        ui.navigate.history.replace(f"/?{design.query()}")
        if self._calculator is not None:
            self._calculator.ask(design)

    def _look(self) -> None:
        """Show what has come from the processes."""
        self._training.poll()
        if self._calculator is None:
            return
        try:
            for answer in self._calculator.poll():
                self._show(answer)
        except FlowspaceError as error:
            self._show(Refused({"statistic": str(error)}))
        if self._calculator.waiting > SLOW:
            self._residual.say("still working")
        else:
            self._residual.say("")

    def _show(self, answer: Answer) -> None:
        match answer:
            case Refused():
                self._fields.mark(answer.problems)
                self._residual.fade()
            case Derived():
                self._fields.mark({})
                self._residual.fade()
                self._residual.show_derived(answer)
                self._maps.show(answer.maps)
            case Properties():
                self._residual.show_properties(answer)
            case Residual():
                self._residual.show_residual(answer)
            case WrittenOut():
                self._fields.learn(answer)
            case Trajectories():
                self._flow.show(answer)

    def _copy_link(self) -> None:
        ui.run_javascript("navigator.clipboard.writeText(window.location.href)")
        ui.notify("The link is copied. It opens this design.", position="bottom")

    def _copy_python(self) -> None:
        try:
            ui.clipboard.write(python_of(self._fields.design))
        except DesignError:
            ui.notify("These formulas are no design yet.", position="bottom")
            return
        ui.notify("The Python that builds this is copied.", position="bottom")

    async def _switch_dark(self) -> None:
        is_dark = await ui.run_javascript("document.body.classList.contains('body--dark')")
        self._dark.set_value(not is_dark)
