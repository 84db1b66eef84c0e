"""Judging: samples follow from their number alone; each score against a formula of its own."""

import dataclasses
import importlib
import itertools
import os
import pickle
import resource
import signal
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowspace import InputError, RunError

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


@pytest.mark.parametrize("wrong", [{"count": 0}, {"batch": 0}, {"shard": 0}, {"classes": -1}])
def test_a_plan_of_no_samples_is_refused(wrong):
    with pytest.raises(
        InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}.*; coun"
    ):
        dataclasses.replace(plan(), **wrong)
    assert not dataclasses.replace(plan(), classes=0).inputs(0, 5)[1].any()


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
    found = evaluate.frechet_distance(sets(0.5, 2.0, 1, 20000), sets(0, 1, 2, 20000))
    assert found == pytest.approx(4 * (0.5**2 + (2 - 1) ** 2), rel=0.05)
    x, y = sets(0.5, 2.0, 1, 50), sets(0, 1, 2, 50)
    assert scores(x, y)["Frechet distance (pixels)"] == evaluate.frechet_distance(x, y)


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


class Classic(Fixed):
    classic = True


def test_the_inception_score_is_the_number_of_classes_that_are_told_apart():
    real = sets(seed=1)
    for classes in (1, 2, 3):
        labels = torch.arange(600) % classes
        logits = 50 * torch.nn.functional.one_hot(labels, 5).float()
        found = evaluate.judge(Classic(), evaluate.Features(sets().features, logits), real).values
        assert found.keys() == {"FID", "KID", "KID, spread", "precision", "recall", "IS"}
        assert found["IS"] == pytest.approx(classes, rel=0.03)
    assert "IS" not in evaluate.judge(Classic(), sets(), real).values


class Classifier(Fixed):
    def __call__(self, images):
        numbers = images.flatten(1).float()
        return evaluate.Features(numbers, -numbers[:, :2])


def test_features_of_batches_are_those_of_all_images_in_their_order():
    images = pictures(7, 4)
    for extractor in (Fixed(), Classifier()):
        whole = extractor(images)
        found = evaluate.features_of(extractor, images.split(3))
        assert torch.equal(found.features, whole.features)
        assert found.logits is whole.logits or torch.equal(found.logits, whole.logits)


def test_some_of_the_features_are_those_of_the_same_images():
    whole = evaluate.Features(torch.randn(6, 4), torch.randn(6, 3))
    rows = torch.tensor([4, 1])
    some = whole[rows]
    assert torch.equal(some.features, whole.features[rows])
    assert torch.equal(some.logits, whole.logits[rows])
    assert sets()[rows].logits is None


@pytest.mark.parametrize(("rows", "step"), [(9, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_at_most_so_many_images_are_compared_and_these_are_spread(monkeypatch, rows, step):
    monkeypatch.setattr(evaluate, "COMPARED", 10)
    some = sets(rows=rows)
    found = evaluate._spread_over(some)
    assert torch.equal(found, some.features[::step]) and len(found) <= 10


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


def test_the_spread_of_kid_is_that_of_other_sets_of_this_size():
    for shift, most in ((0.3, 1.3), (0.0, 2.2)):  # sets that differ, and sets that do not
        found = []
        for seed in range(30):
            mine, theirs = sets(shift, 1, 2 * seed, 100), sets(0, 1, 2 * seed + 1, 100)
            found.append(evaluate.kernel_distance(mine, theirs))
        distances, spreads = torch.tensor(found, dtype=torch.float64).T
        assert 0.7 < spreads.mean() / distances.std() < most
    x, y = sets(0.3, 1, 0, 50), sets(0, 1, 1, 50)
    found = scores(x, y)
    assert (found["KID (pixels)"], found["KID (pixels), spread"]) == evaluate.kernel_distance(x, y)


def test_the_spread_of_kid_of_many_images_is_that_of_its_subsets(monkeypatch):
    mine, real = sets(0.3, 1, 0, 90), sets(0, 1, 1, 80)
    monkeypatch.setattr(evaluate, "SUBSET", 40)
    assert evaluate.kernel_distance(mine, real) == evaluate._subsets(mine, real, 40)
    fewer = mine[:79]
    assert evaluate.kernel_distance(fewer, real)[1] == evaluate._subsets(fewer, real, 39)[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["samples", "real images", "logits"])
def test_features_that_are_not_finite_are_one_error(value, where):
    both = {"samples": sets(rows=20), "real images": sets(seed=1, rows=20)}
    if where == "logits":
        both["samples"] = evaluate.Features(both["samples"].features, torch.full((20, 3), value))
    else:
        both[where].features[3, 1] = value
    with pytest.raises(InputError, match="not finite, of"):
        evaluate.judge(Fixed(), both["samples"], both["real images"])


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_fewer_than_four_pictures_are_not_compared(rows):
    for mine, theirs in ((rows, 20), (20, rows)):
        with pytest.raises(InputError, match=f"got {rows} .*; at least 4"):
            scores(sets(rows=mine), sets(rows=theirs))
    assert scores(sets(rows=4), sets(seed=1, rows=4)).keys()


def test_features_of_different_networks_are_not_compared():
    wide = evaluate.Features(torch.randn(20, 5))
    with pytest.raises(InputError, match="got 4 features of the samples and 5 of the real"):
        scores(sets(rows=20), wide)
    for odd in (torch.randn(20), torch.randn(20, 1), torch.randn(20, 2, 2)):
        with pytest.raises(InputError, match="of shape"):
            scores(evaluate.Features(odd), evaluate.Features(odd))
    with pytest.raises(InputError, match="no images"):
        evaluate.features_of(Fixed(), [])


def flips(path, count):
    """The contents of a file with one bit flipped, at places spread over it."""
    whole = path.read_bytes()
    for number in range(count):
        at = number * (8 * len(whole) - 1) // (count - 1)
        torn = bytearray(whole)
        torn[at // 8] ^= 1 << at % 8
        yield bytes(torn)


def test_a_flipped_bit_of_stored_samples_is_found(tmp_path):
    plan().draw(sample, tmp_path, "a", CPU)
    path = tmp_path / "samples-0000008.safetensors"
    whole = path.read_bytes()
    for torn in (*flips(path, 60), whole[:300], whole[:-1], b""):
        path.write_bytes(torn)
        with pytest.raises(RunError, match="samples-0000008"):
            plan().read(tmp_path, "a")
    path.write_bytes(whole)
    assert len(plan().read(tmp_path, "a")) == 23


def test_swapped_files_of_samples_are_found(tmp_path):
    plan().draw(sample, tmp_path, "a", CPU)
    first, second, spare = (tmp_path / f"samples-000000{n}.safetensors" for n in (0, 8, 1))
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    for use in (
        lambda: plan().read(tmp_path, "a"),
        lambda: plan().draw(sample, tmp_path, "a", CPU),
    ):
        with pytest.raises(RunError, match=r"0000000.*holds the samples from 8 on"):
            use()


@pytest.mark.parametrize("logits", [None, torch.randn(600, 3)])
def test_stored_features_are_what_was_stored(tmp_path, logits):
    path = tmp_path / "real.safetensors"
    real = evaluate.Features(sets().features, logits)
    real.save(path, "pixels of cats")
    again = evaluate.Features.load(path, "pixels of cats")
    assert again.digest == real.digest and (logits is None or torch.equal(again.logits, logits))
    with pytest.raises(RunError, match="holds features of 'pixels of cats', not of 'dogs'"):
        evaluate.Features.load(path, "dogs")
    for torn in (*flips(path, 60), b"", b"no file of tensors"):
        path.write_bytes(torn)
        with pytest.raises(RunError, match=r"real\.safetensors"):
            evaluate.Features.load(path, "pixels of cats")
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="cannot be read"):
        evaluate.Features.load(path)


def test_what_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))  # as a full disk
    try:
        with pytest.raises(RunError, match=r"samples-0000000.* cannot be written"):
            plan().draw(sample, tmp_path / "a", "a", CPU)
        with pytest.raises(RunError, match=r"real.* cannot be written"):
            sets().save(tmp_path / "a" / "real.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "a").iterdir())
    (tmp_path / "a" / "samples-0000000.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "a", tmp_path / "file"):
        with pytest.raises(RunError, match="cannot be written"):
            plan().draw(sample, folder, "a", CPU)


# --- more than one number
# -------------------------------------------------------------------------------------------------


def by(*names, shift=0.0, spread=1.0, seed=0, rows=400):
    return {
        name: sets(shift, spread, 10 * seed + number, rows) for number, name in enumerate(names)
    }


def test_the_validation_ratio_is_one_for_other_real_images():
    real, held_out = by("a", "b", rows=4000), by("a", "b", seed=1)
    assert evaluate.validation_ratio(held_out, real, held_out)["mean"] == 1
    others = by("a", "b", seed=2)
    found = evaluate.validation_ratio(others, real, held_out)
    assert found.keys() == {"a", "b", "mean"}
    assert found["mean"] == pytest.approx((found["a"] + found["b"]) / 2)
    for name in ("a", "b"):
        mine = evaluate.frechet_distance(others[name], real[name])
        assert found[name] == mine / evaluate.frechet_distance(held_out[name], real[name])
    worse = evaluate.validation_ratio(by("a", "b", shift=0.5, seed=3), real, held_out)
    assert found["mean"] < 2 < 10 < worse["mean"]
    copies = evaluate.validation_ratio(real, real, by("a", "b", seed=4, rows=4000))
    assert copies["mean"] < 1e-3


def test_ratios_that_compare_nothing_are_refused():
    real, held_out = by("a", "b"), by("a", "b", seed=1)
    for samples in (by("a"), {}, by("a", "c")):
        with pytest.raises(InputError, match="each extractor sees"):
            evaluate.validation_ratio(samples, real, held_out)
    with pytest.raises(InputError, match="as many of both"):
        evaluate.validation_ratio(by("a", "b", rows=300), real, held_out)
    blind = {name: evaluate.Features(torch.ones(400, 4)) for name in real}
    with pytest.raises(InputError, match="tells images apart"):
        evaluate.validation_ratio(blind, blind, blind)


def test_the_least_of_three_sets_and_their_spread():
    real = sets(seed=9, rows=60)
    three = [evaluate.judge(Fixed(), sets(seed=seed, rows=60), real) for seed in range(3)]
    found = evaluate.least_and_spread(three)
    for name in ("Frechet distance (pixels)", "KID (pixels)"):
        values = [one.values[name] for one in three]
        assert found.pop(name) == min(values)
        assert found.pop(f"{name}, spread of 3 sets") == max(values) - min(values)
    assert not found
    other = dataclasses.replace(three[0], reference="another")
    for some in ([], three[:1], [*three, other]):
        with pytest.raises(InputError, match="two or more"):
            evaluate.least_and_spread(some)


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        ("vit_small_patch14_dinov2", "FD-DINOv2 (vit_small_patch14_dinov2@28)"),
        ("vit_tiny_patch16_224", "Frechet distance (vit_tiny_patch16_224@28)"),
    ],
)
def test_the_distance_of_dinov2_is_that_of_its_class_token(monkeypatch, name, distance):
    timm = importlib.import_module("timm")
    perceptual = importlib.import_module("flowspace.vision.perceptual")
    network = timm.create_model(name, img_size=28, patch_size=14, depth=1).eval()
    monkeypatch.setattr(perceptual, "_timm", lambda *_: network)
    extractor = evaluate.TimmExtractor(perceptual.TimmFeatures(name, size=28), name)
    assert extractor.distance_name == distance
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = extractor(images)
    (tokens,) = extractor.network(images.float() / 127.5 - 1)
    if "dinov2" in name:
        assert torch.equal(found.features, tokens[:, 0]) and found.logits is None
    else:
        assert torch.equal(found.features, tokens.mean(1)) and found.logits is not None


# --- a judge is judged
# -------------------------------------------------------------------------------------------------


def pictures(count, size=16):
    """Discs of random places, sizes and colours."""
    draw = torch.Generator().manual_seed(1)
    place = torch.rand(count, 2, 1, 1, generator=draw) * size
    radius = size * (0.1 + 0.3 * torch.rand(count, 1, 1, generator=draw))
    front, back = (torch.rand(count, 3, 1, 1, generator=draw) for _ in range(2))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = ((y - place[:, 0]) ** 2 + (x - place[:, 1]) ** 2 < radius**2)[:, None]
    return (255 * torch.where(inside, front, back)).to(torch.uint8)


class Edges(evaluate.Extractor):
    """A small random network that was not trained."""

    name = "edges"

    def __init__(self):
        torch.manual_seed(3)
        first = torch.randn(8, 3, 3, 3) / 27**0.5
        self.first = first - first.mean((2, 3), keepdim=True)
        self.second = torch.randn(8, 8, 3, 3) / 72**0.5

    def __call__(self, images):
        h = torch.nn.functional.conv2d(images.float() / 127.5 - 1, self.first).relu()
        h = torch.nn.functional.conv2d(h, self.second).relu()
        return evaluate.Features(3 * h.mean((2, 3)))


class Blind(evaluate.Extractor):
    """Sees nothing."""

    name = "blind"

    def __call__(self, images):
        return evaluate.Features(torch.ones(len(images), 8))


class Colours(evaluate.Extractor):
    """Sees the mean colour alone."""

    name = "colours"

    def __call__(self, images):
        return evaluate.Features(images.float().mean((2, 3)) / 64)


def test_a_network_without_a_size_is_called_by_its_name_alone():
    for size, name in ((None, "resnet18"), (64, "resnet18@64")):
        features = types.SimpleNamespace(size=size)
        assert evaluate.TimmExtractor(features, "resnet18").name == name


def test_a_blurred_image_is_four_times_smaller_between():
    halves = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    halves[..., 4:] = 200
    row = evaluate._blurred(halves)[0, 0, 0].tolist()
    assert row == [0, 0, 25, 75, 125, 175, 200, 200]
    tiny = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
    assert (evaluate._blurred(tiny) == 4).all()


def test_shuffled_pixels_are_the_images_own_and_keep_their_colours():
    images = pictures(3, 6)
    found = evaluate._shuffled(images, torch.Generator().manual_seed(0))
    for before, after in zip(images.flatten(2), found.flatten(2), strict=True):
        assert sorted(before.T.tolist()) == sorted(after.T.tolist())
    assert not torch.equal(images, found)


def test_in_every_split_real_images_are_the_nearest():
    evaluate._check_order(Blind(), 4, {"FD": {"real": [1.0, 3.0], "blurred": [4.0, 3.1]}})
    for blurred in ([4.0, 2.0], [2.0, 4.0], [3.0, 4.0]):
        with pytest.raises(
            RunError, match=rf"blurred images by FD \({min(blurred):g}, real ones 3"
        ):
            evaluate._check_order(Blind(), 4, {"FD": {"real": [1.0, 3.0], "blurred": blurred}})


def test_a_judge_that_sees_images_passes():
    found = evaluate.check_judge(Edges(), pictures(400))
    assert found.keys() == {"Frechet distance (edges)", "KID (edges)"}
    for values in found.values():
        assert values.keys() == {"real", "blurred", "pixel-shuffled", "collapsed"}
        assert all(len(row) == 3 for row in values.values())
        assert all(max(values["real"]) < min(values[name]) for name in values if name != "real")
    assert found == evaluate.check_judge(Edges(), pictures(400))


def test_a_judge_that_is_blind_is_refused_and_told_to_what():
    with pytest.raises(
        RunError, match="blind does not tell apart real images, 100 a set"
    ) as raised:
        evaluate.check_judge(Blind(), pictures(200))
    for name in ("blurred", "pixel-shuffled", "collapsed"):
        for distance in ("Frechet distance (blind)", "KID (blind)"):
            assert f"{name} images by {distance}" in str(raised.value)
    with pytest.raises(RunError, match="colours does not tell apart") as raised:
        evaluate.check_judge(Colours(), pictures(200))
    assert "blurred images" in str(raised.value) and "pixel-shuffled images" in str(raised.value)
    assert "collapsed" not in str(raised.value)


def test_a_judge_with_too_many_features_for_so_few_images_is_refused():
    with pytest.raises(RunError, match="20 a set, from blurred images by Frechet"):
        evaluate.check_judge(Fixed(), pictures(40, 8))


@pytest.mark.parametrize(
    "images", [torch.zeros(20, 3, 8, 8), pictures(7), torch.zeros(20, 8, dtype=torch.uint8)]
)
def test_a_judge_is_tested_with_images(images):
    with pytest.raises(InputError, match="give uint8"):
        evaluate.check_judge(Edges(), images)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 6))
def test_the_nearest_training_image_is_the_one_that_a_search_finds(seed, count, many):
    draw = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, 256, (count, 3, 2, 2), generator=draw, dtype=torch.uint8)
    training = torch.randint(0, 256, (many, 3, 2, 2), generator=draw, dtype=torch.uint8)
    found = evaluate.nearest(samples, training)

    def distance(a, b):
        return float((a.double() - b.double()).square().mean().sqrt() / 255)

    for row, image in enumerate(samples):
        distances = [distance(image, other) for other in training]
        chosen = int(found.index[row])
        assert distances[chosen] == pytest.approx(min(distances), abs=1e-6)
        assert float(found.distance[row]) == pytest.approx(min(distances), abs=1e-6)
        apart = [distance(training[chosen], training[k]) for k in range(many) if k != chosen]
        assert float(found.apart[row]) == pytest.approx(min(apart), abs=1e-6)


def test_noisy_copies_have_a_share_of_one_and_what_lies_between_images_has_none():
    training = pictures(12)
    noisy = (training.int() + torch.tensor([[[[1]], [[-1]], [[1]]]])).clamp(0, 255)
    found = evaluate.nearest(noisy.to(torch.uint8), training)
    assert found.index.tolist() == list(range(12)) and found.share == 1
    assert evaluate.nearest(training, training).distance.max() == 0
    far = torch.stack([torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.4)])
    first, second, between = (255 * far).to(torch.uint8).split(1)
    wide = evaluate.nearest(between, torch.cat([first, first + 9, second]))
    assert wide.share == 0


def test_images_of_other_sizes_are_not_compared():
    with pytest.raises(InputError, match="images of one size"):
        evaluate.nearest(pictures(3, 8), pictures(3, 4))
    with pytest.raises(InputError, match="at least two"):
        evaluate.nearest(pictures(3, 8), pictures(1, 8))
