"""The page of a run: pictures pixel by pixel, figures of one seed and of several, one file."""

import base64
import dataclasses
import html
import html.parser
import io
import re
import shlex
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowspace import cli
from flowspace.demo import page as pages
from flowspace.demo.record import Look, RunRecord
from flowspace.demo.report import copies, report

NAMES = ("cats", "dogs & <b>others</b>", "hens")


class Read(html.parser.HTMLParser):
    """What a browser would make of a page: its tags, addresses and words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def pictures(self):
        """Return the pictures of a page as uint8 arrays."""
        found = []
        for address in self.addresses:
            content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
            found.append(numpy.asarray(Image.open(io.BytesIO(content))))
        return found


def verdict(accuracy, frechet):
    return {"accuracy": accuracy, "diversity": 0.5, "frechet": frechet, "milliseconds": 0.25}


def method(*seeds):
    return {**seeds[0], "by_seed": list(seeds)}


def record(channels=1, **changes):
    """Return the record of a run of three classes, whose pictures are noise."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        size = (*shape, channels, 6, 6)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8)

    found = RunRecord(
        dataset="digits",
        folder=Path("runs/digits"),
        class_names=NAMES,
        conditional=True,
        samples=drawn(3, 50),
        nearest=drawn(3, 50),
        nearest_distance=torch.linspace(0, 1, 150).view(3, 50),
        real=drawn(30),
        real_labels=torch.arange(30) % 3,
        real_distance=torch.linspace(0, 1, 30),
        along=[Look(step, drawn(3, 4)) for step in range(0, 1000, 50)],
        others={"denoiser": drawn(3, 8)},
        curves={"crossflow": [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}]},
        metrics={
            "seeds": 1,
            "methods": {
                "real": method(verdict(0.98, 4.0)),
                "crossflow": method(verdict(0.5, 6.5)),
            },
        },
        settings={"width": 8, "generator": {"steps": 3}},
        seconds={"whole": 125.0, "crossflow": 100.0},
        counts={"training": 90, "held out": 30, "skipped": 0},
    )
    return dataclasses.replace(found, **changes)


def test_a_page_is_one_file_without_scripts():
    text = report(record())
    page = Read(text)
    assert page.addresses
    assert all(re.match(r"data:image/png;base64,|#", each) for each in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert all(each.startswith("http://www.w3.org/") for each in addresses)  # names of SVG
    assert not re.search(r"url\((?!#)|@import", text)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_on_the_page_pixel_by_pixel(channels):
    run = record(channels)
    shown = {picture.tobytes() for picture in Read(report(run)).pictures()}
    for pictures in (
        run.samples[:, :8].flatten(0, 1),
        run.held_out(0)[:8],
        run.nearest.flatten(0, 1)[:6],
        run.along[0].pictures[:, :4].flatten(0, 1),
        run.along[-1].pictures[:, :4].flatten(0, 1),
        run.others["denoiser"][:, :5].flatten(0, 1),
    ):
        for picture in pictures:
            assert picture.permute(1, 2, 0).numpy().tobytes() in shown


def test_names_of_folders_are_words_and_never_markup():
    page = Read(report(record(dataset="pictures/<i>mine</i>")))
    assert "i" not in page.tags
    assert "b" not in page.tags
    assert NAMES[1] in page.text
    assert "<i>mine</i>" in page.text


@settings(max_examples=10)
@given(st.floats(0.1, 10))
def test_the_share_of_near_samples_compares_with_held_out_pictures(scale):
    run = record()
    near = record(nearest_distance=run.nearest_distance * 0, real_distance=run.real_distance + 1)
    both = [run.nearest_distance * scale, run.real_distance * scale]
    alike = record(nearest_distance=both[0], real_distance=both[1])
    assert "100% of the samples are nearer" in str(copies(near)[1])
    assert "50% of the samples are nearer" in str(copies(alike)[1])


def test_one_seed_is_a_figure_and_several_are_a_mean_and_a_range():
    one = Read(report(record())).text
    assert "CrossFlow 0.500 0.50 6.5 2.5 0.25" in one
    assert "One seed." in one
    methods = {
        "real": method(verdict(0.98, 4.0), verdict(0.96, 5.0)),
        "crossflow": method(verdict(0.5, 6.5), verdict(0.7, 9.5)),
    }
    several = Read(report(record(metrics={"seeds": 2, "methods": methods}))).text
    assert "0.600 (0.500 to 0.700)" in several
    assert "8.0 (6.5 to 9.5) 3.5 (2.5 to 4.5)" in several
    assert "Means over 2 seeds" in several


def test_pictures_without_classes_have_no_accuracy():
    unknown = method(verdict(None, 6.5))
    metrics = {"seeds": 1, "methods": {"real": unknown, "crossflow": unknown}}
    run = record(metrics=metrics, conditional=False)
    page = Read(report(run))
    assert "accuracy" not in page.text
    assert "asked for" not in page.text
    assert "have no classes" in page.text


def test_a_page_says_what_is_doubtful_and_what_was_left_out():
    run = record(doubts=["Judges are weak."], skipped={"a.jpg": "is cut short"})
    page = Read(report(run)).text
    for words in ("Judges are weak.", "a.jpg is cut short", "generator.steps 3", "2.1 min"):
        assert words in page


def test_looks_during_training_are_few_with_the_first_and_the_last():
    words = Read(report(record())).words
    steps = [int(each.split()[1]) for each in words if re.fullmatch(r"step \d+", each)]
    assert len(steps) == 6
    assert [steps[0], *sorted(steps)[1:5], steps[5]] == steps
    assert (steps[0], steps[5]) == (0, 950)
    assert "during training" not in Read(report(record(along=[]))).text


def test_every_command_of_a_page_is_one_that_the_program_takes(monkeypatch):
    words = ["demo", "--data", "my pictures", "--side", "32"]
    for argv in (["pytest"], ["/usr/bin/flowspace", *words]):
        monkeypatch.setattr("sys.argv", argv)
        shown = re.findall(r"<pre>(.*?)</pre>", report(record(dataset="my pictures", others={})))
        parsed = []
        for command in shown:
            program, *rest = shlex.split(html.unescape(command))
            assert program == "flowspace"
            parsed.append(cli._parser().parse_args(rest))
        assert [each.data for each in parsed] == ["my pictures", "my pictures", "FOLDER"]
        assert [each.baselines for each in parsed] == [True, False, False]
        assert [each.seeds for each in parsed] == [1, 3, 1]
        assert [each.side for each in parsed][:2] in ([None, None], [32, 32])


# --- its pieces, which the reports of the examples share


def test_a_table_has_a_column_for_each_heading():
    table = pages.markdown_table(("a", "b"), [("x", "1"), ("y", "2")])
    assert table.splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |", "| y | 2 |"]


def test_the_page_escapes_what_it_is_given():
    table = (("<script>",), [("<script>",)])
    title = pages.heading("<script>")
    parts = ["<script>", table, title, pages.listing(["<script>"])]
    assert "<script>" not in pages.page("<script>", parts)


def test_a_small_png_is_enlarged_by_a_whole_number():
    picture = Image.new("L", (100, 10))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    assert "width:600px" in pages.page("a", [buffer.getvalue()])


LOG = [
    {"step": step, "loss": 1.0 / (step + 1), "raw": {"flow": 0.5, "liked": 0.1 - step}}
    for step in range(4)
] + [{"step": 3, "watch": {"kid": 0.5}}]


@pytest.fixture
def drawn(monkeypatch, numbers):
    """The curves of the figures that are made: by name, their steps and values."""
    found = {}

    def kept(figure):
        for axis in figure.axes:
            for line in axis.lines:
                found[line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
            found["scale"] = axis.get_yscale()
            figure.canvas.draw()
            low, high = axis.get_ylim()
            texts = [label.get_text() for label in axis.get_yticklabels(which="both")]
            places = axis.get_yticks().tolist() + axis.get_yticks(minor=True).tolist()
            said = [t for t, y in zip(texts, places, strict=True) if t and low <= y <= high]
            numbers.append(said)
        return vector(figure)

    vector = pages.vector
    monkeypatch.setattr(pages, "vector", kept)
    return found


@pytest.fixture
def numbers():
    """What the axis of values of each figure says."""
    return []


@pytest.mark.parametrize("least", [9.02e-3, 0.13, 1.0, 47.0])
@pytest.mark.parametrize("ratio", [1.0, 1.0001, 1.2, 1.9, 4.5, 9.0, 11.0, 60.0, 300.0, 1e5])
@pytest.mark.usefixtures("drawn")
def test_an_axis_has_a_few_numbers_whatever_its_range(least, ratio, numbers):
    """A loss from 0.13 to 0.45 had none: no power of ten lies between."""
    pages.curves({"loss": [(0, least), (1, least * ratio)]}, "loss")
    by_time = {"flow": [least, least * ratio]}
    pages.slopes([{"slopes_by": {"t": by_time}}])
    assert len(numbers) == 2
    for said in numbers:
        assert 2 <= len(set(said)) == len(said) <= 9


def test_losses_are_drawn_with_each_term_over_steps(drawn):
    pages.losses(LOG)
    assert drawn["loss"] == ([0, 1, 2, 3], [1, 1 / 2, 1 / 3, 1 / 4])
    assert drawn["liked"] == ([0, 1, 2, 3], [0.1, 0.1 - 1, 0.1 - 2, 0.1 - 3])
    assert drawn["scale"] == "symlog"
    pages.losses([{"step": 0, "loss": 1.0}])
    assert drawn["scale"] == "log"


def test_scores_are_drawn_where_the_average_was_looked_at(drawn):
    pages.scores(LOG)
    assert drawn == {"kid": ([3], [0.5]), "scale": "log"}


def test_slopes_are_means_over_the_second_half_of_the_log_by_time(drawn):
    by_time = [[1.0, None], [9.0, 9.0], [2.0, None], [4.0, 6.0]]
    pages.slopes([{"slopes_by": {"t": {"flow": row}}} for row in by_time])
    middles, values = drawn["flow"]
    assert middles == [0.25, 0.75]
    assert values == [3.0, 6.0]


@pytest.mark.parametrize("draw", [pages.losses, pages.scores, pages.slopes])
@pytest.mark.parametrize("log", [[], LOG])
def test_curves_take_the_colour_of_the_text_around_them(draw, log):
    text = draw(log).text
    assert text.startswith("<svg")
    assert "currentColor" in text
    assert pages.INK not in text


def test_a_sheet_has_a_row_for_each_class():
    torchvision = pytest.importorskip("torchvision")
    images = (torch.arange(12) % 3 * 100).to(torch.uint8)[:, None, None, None]
    picture = pages.sheet(images.expand(12, 3, 4, 4), classes=3)
    pixels = torchvision.io.decode_png(torch.frombuffer(bytearray(picture), dtype=torch.uint8))
    assert pixels.shape[1] == 3 * (4 + 2) + 2
    assert pixels[0, 3::6, 3].tolist() == [0, 100, 200]
