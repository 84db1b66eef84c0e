"""The page of ``flowspace explore``: what it shows is what the library says."""

import contextlib
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PRESETS as SCHEDULES
from strategies import formula_schedules, normal, statistics_for

from flowspace import (
    CriterionError,
    InputError,
    LinearSchedule,
)
from flowspace.explore import server
from flowspace.explore.design import FORMS, Design, DesignError, python_of, read, report_of
from flowspace.explore.maps import GRID, coefficient_maps, terms
from flowspace.explore.mixture import GaussianMixture, flow
from flowspace.explore.presets import PRESETS, SUGGESTIONS
from flowspace.explore.training import objective_of, train
from flowspace.formulas import S, T, parse
from flowspace.schedules import TIME_FLOOR
from flowspace.typeset import text_of

by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
QUICK = [each for each in PRESETS if "Variance" not in each.name]
A_FORM_EACH = [PRESETS[0], PRESETS[1], PRESETS[5], PRESETS[-1]]
FEW = [*A_FORM_EACH, PRESETS[2], PRESETS[4]]
few = pytest.mark.parametrize("preset", FEW, ids=lambda preset: preset.name)
quick = pytest.mark.parametrize("preset", QUICK, ids=lambda preset: preset.name)

texts = st.text("ts 01+-*/()&=?%#^\N{GREEK SMALL LETTER PI}", max_size=20) | st.text(max_size=20)
form = st.sampled_from(list(FORMS))


@st.composite
def designs(draw):
    """Any text in any form, also text that is no formula."""
    formulas = {name: draw(texts) for name in draw(form)}
    return Design(draw(texts), draw(texts), **formulas)


# --- the design
# -------------------------------------------------------------------------------------------------


@given(designs())
def test_a_link_leads_back_to_its_design(design):
    query = dict(parse_qsl(design.query(), keep_blank_values=True))
    assert Design.from_query(query) == design


@given(designs())
def test_text_is_a_design_or_its_problems_are_named(design):
    try:
        read(design)
    except DesignError as error:
        assert error.problems
        assert error.problems.keys() <= {*design.formulas, "schedule", "statistic"}
        assert all(error.problems.values())


@pytest.mark.parametrize("query", [{"gamma": "1"}, {"kappa": "s", "h": "1/t", "delta": "-1"}])
def test_a_link_with_another_form_is_refused(query):
    with pytest.raises(InputError, match="one of these pairs"):
        Design.from_query(query)


def test_a_link_with_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="got alfa in the link"):
        Design.from_query({"alfa": "1 - t"})


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        ({"alpha": "1 - t^2"}, "alpha", "powers are written"),
        ({"beta": "2t"}, "beta", "products are written"),
        ({"alpha": "1 - s"}, "alpha", "t alone"),
        ({"alpha": "t", "beta": "1 - t"}, "alpha", "swapped"),
        ({"alpha": "cos(9*pi*t/2)", "beta": "sin(pi*t/2)"}, "schedule", "must fall"),
        ({"gamma": "1", "delta": "0"}, "delta", "which is zero"),
        ({"kappa": "t", "delta": "-1"}, "kappa", "depends on t"),
        ({"kappa": "0", "h": "1/t"}, "statistic", "which is zero"),
        ({"gamma": "__import__('os')", "delta": "-1"}, "gamma", "not allowed"),
    ],
)
def test_what_is_wrong_is_said_beside_its_field(changes, where, says):
    with pytest.raises(DesignError) as caught:
        read(Design(**changes))
    assert caught.value.problems.keys() == {where}
    assert says in caught.value.problems[where]


@pytest.mark.parametrize("preset", A_FORM_EACH, ids=lambda preset: preset.name)
def test_the_copied_python_builds_the_same(preset, capsys):
    names: dict = {}
    exec(python_of(preset.design), names)
    ours = read(preset.design)[1].coefficients(read(preset.design)[0])
    theirs = names["statistic"].coefficients(names["schedule"])
    t, s = torch.tensor([0.3, 0.9, 1.0]), torch.tensor([0.1, 0.8, 0.25])
    for (_, _, mine), (_, _, copied) in zip(terms(ours), terms(theirs), strict=True):
        torch.testing.assert_close(mine(t, s), copied(t, s))
    assert type(names["loss_fn"]) is type(objective_of(preset.design))
    assert str(names["loss_fn"].schedule) == str(read(preset.design)[0])
    assert "Criterion 1" in capsys.readouterr().out


@by_name
def test_a_preset_is_a_design(preset):
    read(preset.design)
    assert preset.note.endswith(".")


def test_the_variance_preserving_preset_is_the_library_s():
    design = next(each.design for each in PRESETS if "Variance" in each.name)
    t = torch.linspace(TIME_FLOOR, 1, 50, dtype=torch.float64)
    for name in ("alpha", "beta"):
        ours, theirs = (
            getattr(read(design)[0], name),
            getattr(SCHEDULES["variance preserving"], name),
        )
        torch.testing.assert_close(ours(t), theirs(t))


@pytest.mark.parametrize("name", list(SUGGESTIONS))
def test_what_may_be_picked_is_a_formula(name):
    for text in SUGGESTIONS[name]:
        assert name not in ("alpha", "beta") or parse(text).free_symbols <= {T}


# --- what is drawn
# -------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(formula_schedules.flatmap(lambda s: st.tuples(st.just(s), statistics_for(s))))
def test_maps_hold_the_library_s_coefficients(pair):
    schedule, statistic = pair
    c = statistic.coefficients(schedule)
    for each, function in zip(
        coefficient_maps(c), (c.prediction, c.derivative, c.data), strict=True
    ):
        rows, columns = np.indices((GRID, GRID))
        assert (np.isnan(each.values) == (rows > columns)).all()
        t, s, value = each.at(0.83, 0.41)
        assert abs(t - 0.83) <= 0.5 / GRID
        assert abs(s - 0.41) <= 0.5 / GRID
        there = torch.tensor([t, s], dtype=torch.float64)
        assert value == pytest.approx(float(function(*there)), rel=1e-9)


@quick
def test_singular_edges_are_the_report_s(preset):
    report = report_of(preset.design)
    marked = {edge for each in coefficient_maps(report.coefficients) for edge in each.singular}
    assert marked == set(report.singular)


def test_an_edge_where_a_coefficient_is_infinite_is_marked():
    c = report_of(Design(gamma="1", delta="-(t - s)")).coefficients
    b = coefficient_maps(c)[1]
    assert "s = t" in b.singular
    c = report_of(Design(gamma="1", delta="-s")).coefficients
    assert "s = 0" in coefficient_maps(c)[1].singular


# --- the parts of an answer
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    """The answers to a few presets, by name, each by its kind."""
    pytest.importorskip("latex2mathml")
    pytest.importorskip("torchdiffeq")
    from flowspace.explore.answers import answers

    found = {}
    for preset in FEW:
        found[preset.name] = {type(each).__name__: each for each in answers(preset.design)}
    return found


@few
def test_kappa_is_the_library_s(preset, parts):
    schedule, statistic = read(preset.design)
    shown = parts[preset.name]["Derived"].kappa
    if not shown:
        with pytest.raises(CriterionError):
            statistic.kappa(schedule)
        return
    difference = parse(shown) - statistic.kappa(schedule)
    assert float(difference.subs(S, 0.3)) == pytest.approx(0, abs=1e-12)


@few
def test_residual_and_reasons_are_the_report_s(preset, parts):
    report, found = report_of(preset.design), parts[preset.name]
    assert found["Residual"].latex == report.latex()
    assert found["Residual"].is_whole
    assert all(term.startswith("<math") for term in found["Residual"].markup)
    for name, reason in report.reasons.items():
        properties = found["Properties"]
        assert f"{properties.reasons[name]}" in reason
        assert properties.holds[name] == reason.startswith("holds")


@few
def test_every_form_of_the_same_statistic_has_the_same_coefficients(preset, parts):
    formulas = parts[preset.name]["WrittenOut"].formulas
    schedule, statistic = read(preset.design)
    b = statistic.coefficients(schedule).derivative
    t, s = torch.tensor([0.37, 0.9]), torch.tensor([0.11, 0.7])
    for names in FORMS:
        vanishes = names == ("gamma", "kappa") and formulas["gamma"] == "0"
        if names and set(names) <= formulas.keys() and not vanishes:
            other = read(preset.design.given_by(names, formulas))[1].coefficients(schedule)
            torch.testing.assert_close(other.derivative(t, s), b(t, s))


# --- the flow of a mixture
# -------------------------------------------------------------------------------------------------


def lopsided():
    means = torch.tensor([[1.5, 0.5], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_flow_takes_noise_to_the_mixture(name):
    """By its moments: mean alpha m, covariance alpha^2 Sigma + beta^2."""
    pytest.importorskip("torchdiffeq")
    schedule, mixture = SCHEDULES[name], lopsided()
    states = flow(schedule, mixture, normal(0, 4000, 2))[-1]
    floor = torch.tensor(TIME_FLOOR, dtype=torch.float64)
    alpha, beta = schedule.alpha(floor), schedule.beta(floor)
    w, means = mixture.weights[:, None], mixture.means
    mean = (w * means).sum(0)
    variance = (w * (mixture.spreads[:, None] ** 2 + (means - mean) ** 2)).sum(0)
    torch.testing.assert_close(states.mean(0), alpha * mean, atol=0.08, rtol=0)
    wanted = alpha**2 * variance + beta**2
    torch.testing.assert_close(states.var(0), wanted, atol=0.12, rtol=0)


@pytest.mark.parametrize("name", ["cosine", "polynomial", "variance preserving"])
def test_every_schedule_s_flow_is_the_linear_one_at_another_time(name):
    """z_t/(alpha + beta) is the linear schedule's state at time beta/(alpha + beta)."""
    pytest.importorskip("torchdiffeq")
    schedule, noise = SCHEDULES[name], normal(1, 6, 2)
    times = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
    total = schedule.alpha(times) + schedule.beta(times)
    ours = flow(schedule, lopsided(), noise, times) / total[:, None, None]
    linear = flow(LinearSchedule(), lopsided(), noise, schedule.beta(times) / total)
    torch.testing.assert_close(ours, linear, atol=2e-3, rtol=0)


# --- training
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, len(PRESETS) - 1])
def test_training_comes_nearer_to_the_data(index):
    looks = list(train(PRESETS[index].design, 150))
    first, last = looks[0], looks[-1]
    assert last.done
    assert (first.step, last.step) == (1, 150)
    assert last.distance < 0.7 * first.distance or last.distance < 0.25
    assert last.samples.shape == last.data.shape
    assert len(last.losses) <= 200


def test_training_that_diverges_ends_with_a_reason(monkeypatch):
    from flowspace.explore import training

    monkeypatch.setattr(training._Run, "step", lambda run: float("nan"))
    (look,) = train(Design(), 50)
    assert look.done
    assert "not finite at step 1" in look.problem


# --- the processes
# -------------------------------------------------------------------------------------------------


def answered(design, monkeypatch, answers=None):
    """Ask one question as a process is asked, and close the pipe; returns what it sends."""
    pytest.importorskip("latex2mathml")
    from flowspace.explore import workers

    if answers is not None:
        monkeypatch.setattr(workers, "answers", answers)
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=workers.answer_questions, args=(theirs,))
    thread.start()
    ours.send((7, design))
    found = []
    while not (found and isinstance(found[-1], workers.Ended)):
        number, answer = ours.recv()
        assert number == 7
        found.append(answer)
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    return found[1:-1]


def test_what_no_one_has_foreseen_is_said_and_ends_nothing(monkeypatch):
    def fails(design):
        raise RecursionError("too deep")

    (refused,) = answered(Design(), monkeypatch, fails)
    assert "RecursionError: too deep" in refused.problems["statistic"]


def test_a_process_answers_the_first_design_before_it_is_asked_and_says_nothing(monkeypatch):
    pytest.importorskip("latex2mathml")
    from flowspace.explore import workers

    seen, rehearsed = [], threading.Event()

    def answers(design):
        seen.append(design)
        yield "a part"
        rehearsed.set()
        yield "another"

    monkeypatch.setattr(workers, "answers", answers)
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=workers.answer_questions, args=(theirs,))
    thread.start()
    assert rehearsed.wait(60)
    assert seen == [Design()]
    assert not ours.poll()
    ours.close()
    thread.join(10)
    assert not thread.is_alive()


def test_the_parts_come_with_the_quick_ones_first(monkeypatch):
    pytest.importorskip("torchdiffeq")
    kinds = [type(each).__name__ for each in answered(Design(), monkeypatch)]
    assert kinds == ["Derived", "Properties", "Residual", "WrittenOut", "Trajectories"]


# --- the server
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org", "::"])
def test_another_host_is_refused(host):
    with pytest.raises(InputError, match="this machine alone"):
        server.local_host(host)


def test_a_taken_port_is_left():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        taken = other.getsockname()[1]
        with pytest.raises(InputError, match="which is taken"):
            server.free_port("127.0.0.1", taken)
    assert server.free_port("127.0.0.1", None) > 0


# --- in a browser
# -------------------------------------------------------------------------------------------------

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
LIMIT = 0.3
"""Seconds from a letter to the new kappa, on a machine that does nothing else."""

MEASURE = """() => {
  addEventListener('input', () => { window.typed = performance.now(); }, true);
  const kappa = document.querySelector('[data-testid="kappa"]');
  new MutationObserver(() => { window.answer = performance.now() - window.typed; })
    .observe(kappa, { attributes: true, attributeFilter: ['data-kappa'] });
}"""


def slowdown():
    """Return how many times slower the machine's other work makes this process."""
    wall, own = time.perf_counter(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    return max(1.0, (time.perf_counter() - wall) / 0.2)


@pytest.fixture(scope="module")
def address():
    """Where a server of the page listens, in a process of its own."""
    pytest.importorskip("nicegui")
    pytest.importorskip("latex2mathml")
    pytest.importorskip("torchdiffeq")
    port = server.free_port("127.0.0.1", None)
    command = [sys.executable, "-m", "flowspace.cli", "explore", "--no-open", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    process = subprocess.Popen(command, env=environment)
    where = f"http://127.0.0.1:{port}/"
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(where):
            break
        time.sleep(0.1)
    yield where
    process.terminate()
    process.wait(10)


@pytest.fixture
def window(address):
    """A browser window at phone width, and what its console said."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        context = browser.new_context(viewport={"width": 400, "height": 900})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(60_000)
        yield context
        browser.close()


def opened(window, address, said):
    """Open a page; what goes wrong there is appended to a list."""
    page = window.new_page()
    page.on("console", lambda line: line.type in ("error", "warning") and said.append(line.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    here = "http://127.0.0.1:"
    page.on("request", lambda asked: asked.url.startswith(here) or said.append(asked.url))
    page.goto(address)
    page.wait_for_selector("[data-kappa]")
    return page


def test_one_designs_trains_and_shares_in_a_browser(window, address):
    said: list[str] = []
    page = opened(window, address, said)
    page.get_by_label("form").click()
    page.get_by_role(
        "option", name="\N{GREEK SMALL LETTER KAPPA} and \N{GREEK SMALL LETTER DELTA}"
    ).click()
    field = page.get_by_role("textbox", name="kappa")
    assert field.input_value() == "s"

    page.evaluate(MEASURE)
    seconds = []
    for text in ("2*s", "s**2", "s*(2 - s)", "s + 1"):
        field.fill(text)
        page.wait_for_function(
            "k => document.querySelector('[data-kappa]').dataset.kappa == k",
            arg=text_of(parse(text)),
        )
        seconds.append(page.evaluate("window.answer") / 1000 / slowdown())
    print(f"kappa after {seconds} seconds of a machine that does nothing else")
    assert min(seconds) < LIMIT

    field.fill("2*s +")
    page.get_by_text("is not a formula").wait_for()
    field.fill("s")
    page.get_by_text("is not a formula").wait_for(state="hidden")

    page.get_by_label("preset").click()
    page.get_by_role("option", name="Cosine, matched").click()
    page.wait_for_selector("[data-kappa='sin(pi*s/2)']")
    page.wait_for_selector(".formulas:not(.stale)")
    page.get_by_role("button", name="copy LaTeX").click()
    copied = ""
    for _ in range(100):  # the server writes it when it hears of the click
        copied = page.evaluate("navigator.clipboard.readText()")
        if copied:
            break
        page.wait_for_timeout(100)
    assert (
        copied
        == report_of(Design.from_query({"alpha": "cos(pi*t/2)", "beta": "sin(pi*t/2)"})).latex()
    )

    button = page.get_by_label("start or stop training")
    button.click()
    page.get_by_text(re.compile(r"step \d+ of")).wait_for()
    button.click()
    page.wait_for_function("e => e.innerText == 'Start'", arg=button.element_handle())
    status = page.get_by_text(re.compile(r"step \d+ of")).inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == 400

    again = opened(window, page.url, said)
    again.wait_for_selector("[data-kappa='sin(pi*s/2)']")
    assert again.get_by_role("textbox", name="alpha").input_value() == "cos(pi*t/2)"
    assert page.get_by_text(re.compile(r"step \d+ of")).inner_text() == status
    assert said == []
