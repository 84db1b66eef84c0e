"""`flowspace.citation` brings what an object is made of, as BibTeX that a reader of it accepts."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import flowspace
from flowspace import (
    Adaptive,
    Cascade,
    ConsistencyLoss,
    CosineSchedule,
    CrossFlowLoss,
    FlowMap,
    FlowMatchingLoss,
    Guidance,
    InputError,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    ShiftedTimes,
    SquaredError,
    TimePairs,
    citation,
)
from flowspace.citations import PAPERS, USED

ROOT = Path(__file__).parents[1]


def parsed(text):
    """Read BibTeX as BibTeX does: fields in braces that match, by key."""
    entries, rest = {}, text.strip()
    while rest:
        kind, key, rest = re.match(r"@(\w+)\{([\w:-]+),\s*(.*)", rest, re.DOTALL).groups()
        assert kind in ("misc", "inproceedings") and key not in entries
        fields = {}
        while not rest.startswith("}"):
            name, rest = re.match(r"(\w+)\s*=\s*\{(.*)", rest, re.DOTALL).groups()
            depth, end = 1, 0
            while depth:
                depth += {"{": 1, "}": -1}.get(rest[end], 0)
                end += 1
            assert name not in fields
            fields[name], rest = rest[: end - 1], rest[end:].lstrip(",").lstrip()
        entries[key], rest = fields, rest[1:].lstrip()
    return entries


def test_pybtex_reads_every_entry():
    pybtex = pytest.importorskip("pybtex.database")
    text = "\n\n".join(paper.bibtex() for paper in PAPERS.values())
    found = pybtex.parse_string(text, "bibtex").entries
    assert list(found) == list(PAPERS)
    assert str(found["wang2026crossflow"].persons["author"][-1]) == "Zhang, Muhan"


def test_an_objective_brings_its_parts_and_each_once():
    loss_fn = MeanFlowLoss(
        schedule=CosineSchedule(),
        times=TimePairs(ShiftedTimes(4096)),
        penalty=Adaptive(SquaredError(summed=True)),
        guidance=Guidance(null={"labels": 10}),
    )
    found = parsed(citation(loss_fn))
    assert next(iter(found)) == "flowspace"
    assert set(found) == {
        "flowspace",
        "geng2025mean",
        "albergo2023stochastic",
        "esser2024scaling",
        "ho2022classifier",
    }


def test_another_part_brings_other_papers():
    assert "liu2023flow" in parsed(citation(CrossFlowLoss()))
    assert "liu2023flow" not in parsed(citation(CrossFlowLoss(schedule=CosineSchedule())))
    assert "lipman2023flow" in parsed(citation(FlowMatchingLoss()))


def test_several_objects_are_cited_together():
    together = parsed(citation(CrossFlowLoss(), ConsistencyLoss(), Cascade(2)))
    assert {"wang2026crossflow", "song2023consistency", "chen2025pixelflow"} <= set(together)


def test_a_sampler_brings_its_schedule_and_statistic():
    found = parsed(
        citation(FlowMap(lambda z, t, s: z, CosineSchedule(), flowspace.MatchedStatistic()))
    )
    assert set(found) == {"flowspace", "albergo2023stochastic", "wang2026crossflow"}


def test_a_class_of_ones_own_has_its_parents_papers():
    class Mine(PixelMeanFlowLoss):
        pass

    assert "lu2026pixel" in parsed(citation(Mine()))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [((), "nothing to cite"), ((3,), "got int"), ((CrossFlowLoss,), "CrossFlowLoss()")],
)
def test_what_cannot_be_cited_is_one_clear_error(wrong, said):
    with pytest.raises(InputError, match=re.escape(said)):
        citation(*wrong)


def test_every_entry_is_valid_and_has_its_number_title_and_authors():
    text = "\n\n".join(paper.bibtex() for paper in PAPERS.values())
    entries = parsed(text)
    assert list(entries) == list(PAPERS)
    for fields in entries.values():
        assert re.fullmatch(r"\d{4}\.\d{4,5}", fields["eprint"]) and fields["year"].isdigit()
        assert fields["title"]
        for author in fields["author"].split(" and "):
            assert re.fullmatch(r"[^,]+, [^,]+", author)
    assert {key for keys in USED.values() for key in keys} == set(PAPERS)


@pytest.mark.parametrize("name", sorted(USED))
def test_a_paper_that_a_class_names_is_among_its_citations(name):
    """The arXiv numbers of a docstring, and of its module if that is the class's own."""
    kind = getattr(flowspace, name)
    text = kind.__doc__ or ""
    module = importlib.import_module(kind.__module__)
    if name.endswith("Loss") or name == "Cascade":
        text += (module.__doc__ or "") + inspect.getsource(kind)
    named = set(re.findall(r"\b\d{4}\.\d{5}\b", text))
    cited = {PAPERS[key].number for key in USED[name]}
    assert named <= cited | {
        "2206.00364"
    }  # the grid of consistency training is cited by its times


def test_the_papers_of_classes_are_known_for_all_that_name_one():
    """A public class whose docstring names a paper has an entry."""
    for name in flowspace.__all__:
        kind = getattr(flowspace, name)
        if inspect.isclass(kind) and re.search(r"arXiv\s+\d{4}\.\d{5}", kind.__doc__ or ""):
            assert name in USED, name


def test_the_citation_file_says_the_same_of_the_paper():
    yaml = pytest.importorskip("yaml")
    [reference] = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    paper = PAPERS["wang2026crossflow"]
    authors = [f"{a['family-names']}, {a['given-names']}" for a in reference["authors"]]
    assert " and ".join(authors) == paper.authors
    assert reference["url"].endswith(paper.number) and reference["year"] == paper.year
    assert reference["title"] == paper.title.replace("{", "").replace("}", "")
