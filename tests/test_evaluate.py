"""Judging: samples follow from their number alone; each score against a formula of its own."""

import dataclasses
import importlib
import itertools
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowspace import RunError

pytest.importorskip("torch_fidelity")
pytest.importorskip("timm")
evaluate = importlib.import_module("flowspace.vision.evaluate")
CPU = torch.device("cpu")


class Fixed(evaluate.Extractor):
    """Features that are the pixels themselves."""

    name = "pixels"

    def __call__(self, images):
        return evaluate.Features(images.flatten(1).float() / 64, None)


def plan(count=23, **more):
    return evaluate.Plan(count, 3, (2, 4, 4), **({"batch": 4, "shard": 2} | more))


def sample(noise, labels):
    images = torch.tanh(noise.mean(1, keepdim=True) + labels[:, None, None, None])
    return images.expand(-1, 3, -1, -1)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_images_do_not_depend_on_the_number_of_processes(tmp_path, ranks):
    plan().draw(sample, tmp_path / "one", "a", CPU)
    for rank in range(ranks):
        plan().draw(sample, tmp_path / "many", "a", CPU, rank, ranks)
    assert files(tmp_path / "one") == files(tmp_path / "many")
    assert len(plan().read(tmp_path / "many", "a")) == 23


def test_drawing_goes_on_where_it_was_stopped(tmp_path):
    plan().draw(sample, tmp_path / "whole", "a", CPU)
    calls = itertools.count()

    def failing(noise, labels):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return sample(noise, labels)

    with pytest.raises(KeyboardInterrupt):
        plan().draw(failing, tmp_path / "again", "a", CPU)
    with pytest.raises(RunError, match="is missing"):
        plan().read(tmp_path / "again", "a")
    plan().draw(sample, tmp_path / "again", "a", CPU)
    assert files(tmp_path / "whole") == files(tmp_path / "again")


def test_samples_of_another_plan_or_maker_are_refused(tmp_path):
    plan().draw(sample, tmp_path, "a", CPU)
    for other, maker in ((plan(), "b"), (dataclasses.replace(plan(), seed=1), "a")):
        with pytest.raises(RunError, match="another run or plan"):
            other.draw(sample, tmp_path, maker, CPU)


def test_a_sample_that_is_not_finite_is_named(tmp_path):
    def broken(noise, labels):
        return torch.where(labels[:, None, None, None] == 2, torch.nan, sample(noise, labels))

    with pytest.raises(RunError, match="sample 2 is not finite"):
        plan().draw(broken, tmp_path, "a", CPU)


@given(
    count=st.integers(1, 40),
    classes=st.integers(1, 7),
    first=st.integers(0, 30),
    seed=st.integers(0, 5),
)
def test_a_sample_is_its_number(count, classes, first, seed):
    p = evaluate.Plan(count, classes, (2, 3), seed)
    noise, labels = p.inputs(first, first + 5)
    alone, label = p.inputs(first + 3, first + 4)
    assert (
        torch.equal(noise[3:4], alone)
        and torch.equal(labels[3:4], label)
        and label == (first + 3) % classes
    )


@given(st.floats(-3, 3))
def test_rounding_is_to_the_nearest_of_255_levels(x):
    level = evaluate.rounded(torch.tensor(x))
    assert level.dtype == torch.uint8
    assert abs(float(level) - min(max((x + 1) * 127.5, 0), 255)) <= 0.5 + 1e-4


def sets(shift=0.0, spread=1.0, seed=0, rows=600):
    draw = torch.Generator().manual_seed(seed)
    return evaluate.Features(shift + spread * torch.randn(rows, 4, generator=draw), None)


def scores(samples, real):
    return evaluate.judge(Fixed(), samples, real).values


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    found = scores(sets(0.5, 2.0, 1, 20000), sets(0, 1, 2, 20000))["Frechet distance (pixels)"]
    assert found == pytest.approx(4 * (0.5**2 + (2 - 1) ** 2), rel=0.05)


def test_kid_is_the_unbiased_discrepancy_of_a_cubic_kernel():
    x, y = sets(0.3, 1.2, 1, 300), sets(0, 1, 2, 300)
    a, b = x.features.double(), y.features.double()

    def kernel(u, v):
        return (u @ v.T / 4 + 1) ** 3

    def off(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    expected = off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert scores(x, y)["KID (pixels)"] == pytest.approx(float(expected), rel=1e-4)


def test_scores_see_corruption_and_collapse():
    real = sets(seed=3)
    kids = [scores(sets(0, spread, 4), real)["KID (pixels)"] for spread in (1.0, 1.5, 2.5)]
    assert abs(kids[0]) < 0.1 < kids[1] < kids[2]
    same = scores(real, real)
    assert same["precision"] == same["recall"] == 1
    far = scores(sets(50.0, 1, 5), real)
    assert far["precision"] == far["recall"] == 0
    collapsed = scores(sets(0, 0.05, 6), real)
    assert collapsed["precision"] > 0.9 > 0.2 > collapsed["recall"]


def test_only_inception_gives_fid_and_its_missing_weights_are_named(tmp_path):
    assert not {"FID", "IS", "KID"} & scores(sets(), sets(seed=1)).keys()
    with pytest.raises(RunError, match=r"weights-inception-2015.*evaluation\.weights=PATH"):
        evaluate.Inception(None)
    with pytest.raises(RunError, match="nowhere"):
        evaluate.Inception(tmp_path / "nowhere.pth")


class Bomb:
    """Pickled, it runs a command when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": {"w": x}}, lambda x: [x]])
def test_weights_of_inception_are_never_unpickled(tmp_path, wrap):
    weights, witness = tmp_path / "weights.pth", tmp_path / "executed"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save(wrap(Bomb(witness)), weights)
        with pytest.raises(RunError, match="cannot be read as weights"):
            evaluate.Inception(weights)
    assert not witness.exists()


def test_weights_of_another_network_are_not_inceptions(tmp_path):
    for value, match in (
        ({"a": torch.ones(1)}, "does not hold"),
        ([torch.ones(1)], "list"),
        ({1: torch.ones(1)}, "1"),
    ):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(RunError, match=match):
            evaluate.Inception(tmp_path / "other.pth")


@pytest.mark.slow
def test_inceptions_weights_are_loaded_from_tensors(tmp_path, monkeypatch):
    network = importlib.import_module(
        "torch_fidelity.feature_extractor_inceptionv3"
    ).FeatureExtractorInceptionV3
    torch.save({}, tmp_path / "nothing.pth")
    with monkeypatch.context() as patched:
        patched.setattr(network, "load_state_dict", lambda self, tensors: None)
        drawn = network(
            "inception-v3", ["2048"], feature_extractor_weights_path=str(tmp_path / "nothing.pth")
        )
    torch.save(drawn.state_dict(), tmp_path / "weights.pth")
    extractor = evaluate.Inception(tmp_path / "weights.pth")
    found = extractor.network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in drawn.state_dict().items())
    assert extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).features.shape == (1, 2048)


def test_a_reference_is_pinned_by_its_digest():
    real = sets()
    assert evaluate.judge(Fixed(), sets(seed=1), real, real.digest).reference == real.digest
    with pytest.raises(RunError, match="is pinned"):
        evaluate.judge(Fixed(), sets(seed=1), sets(0.1), real.digest)
