"""Whatever comes in, there is a right answer or one of the package's own errors, soon.

Texts into formulas, broken bytes into every kind of file, odd values into configs and into public
objects. In the suite that takes about a minute; FLOWSPACE_FUZZ_MINUTES=60 tries other examples,
and sixty times as many.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import flowspace
from flowspace import (
    CrossFlowLoss,
    FlowMap,
    FlowMatchingLoss,
    FlowspaceError,
    Guidance,
    ImprovedMeanFlowLoss,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    PixelMeanFlowLoss,
    Schedule,
    Statistic,
    TrajectoryMatchingLoss,
    VelocityFlow,
    check_criteria,
)
from flowspace.cli import main
from flowspace.time_functions import TimeFunction
from flowspace.training import Checkpoints

MINUTES = float(os.environ.get("FLOWSPACE_FUZZ_MINUTES", "0"))

LONGEST = 5.0
"""Seconds that one answer may take, of this process's own time."""


def search(examples):
    """So many examples, always the same; in a long search other ones, and more."""
    return settings(
        max_examples=int(examples * max(1.0, MINUTES)),
        deadline=None,
        derandomize=not MINUTES,
        database=None,
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * bool(MINUTES),
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def an_answer_or(*errors):
    """Let the package's own errors through, and nothing that takes long."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(FlowspaceError, *errors):
            yield
    assert time.process_time() - start < LONGEST


# --- formulas ----------------------------------------------------------------------------------

STARTED = []
"""What a text made this process start, by the interpreter's own account."""


def _listen(event, arguments):
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.remove"):
        STARTED.append((event, arguments))


sys.addaudithook(_listen)

PIECES = (
    *("t", "s", "pi", "e", "0", "1", "2", "3", "64", "0.5", "1e-9", "1e30", "-", "+", "*", "/"),
    *("**", "(", ")", ",", " ", "sin(", "cos(", "tan(", "cot(", "exp(", "log(", "sqrt(", "abs("),
    *("1 - t", "t/(t - s)", "(1 - t)**2", "cos(pi*t/2)", "sin(pi*t/2)", "1/3", "x", "alpha", "."),
    *(
        "[",
        "]",
        "{",
        "}",
        "lambda: ",
        "__import__('os').system('false')",
        "__class__",
        "import os",
    ),
    *(";", "\n", "\0", "\\", "'", '"', "if t else s", "not ", "==", "<", "∞", "π", "²", "t.diff"),
)
"""What texts are put together of."""


def whole_formulas():
    """Formulas that can be read, nested."""
    leaves = st.sampled_from(["t", "s", "pi", "1", "2", "0.5", "3"])

    def nested(inner):
        calls = st.builds("{}({})".format, st.sampled_from(["sin", "cos", "exp", "log"]), inner)
        pairs = st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner)
        powers = st.builds("({})**{}".format, inner, st.sampled_from(["2", "0.5", "-1", "1/3"]))
        return calls | pairs | powers

    return st.recursive(leaves, nested, max_leaves=8)


def texts():
    """Whole formulas, pieces in any order, and any characters at all."""
    pieces = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
    return st.one_of(whole_formulas(), whole_formulas(), pieces, st.text(max_size=40))


@search(60)
@given(text=texts(), number=st.integers(1, 2))
def test_a_text_is_a_formula_or_refused(text, number):
    STARTED.clear()
    with an_answer_or():
        function = TimeFunction(text, number)
        times = [torch.tensor([0.7, 0.4]), torch.tensor([0.2, 0.1])][:number]
        assert function(*times).shape == (2,)
        assert function.dot(*times).shape == (2,)
    assert not STARTED


@search(12)
@given(alpha=texts(), beta=texts(), gamma=texts(), delta=texts())
def test_schedules_and_statistics_of_any_texts_are_judged_or_refused(alpha, beta, gamma, delta):
    STARTED.clear()
    schedule = flowspace.LinearSchedule()
    with an_answer_or():
        schedule = Schedule(alpha, beta)
        assert math.isfinite(schedule.alpha(torch.tensor(0.5)))
    with an_answer_or():
        statistic = Statistic(gamma, delta)
        assert str(check_criteria(schedule, statistic))
    with an_answer_or():
        loss_fn = CrossFlowLoss(schedule=schedule, statistic=Statistic.from_kappa(schedule, gamma))
        out = loss_fn(lambda z, t, s: z, torch.ones(4, 2))
        assert out.loss.shape == (4,)
    assert not STARTED


@search(10)
@given(options=st.dictionaries(st.sampled_from(["alpha", "beta", "gamma", "delta"]), texts()))
def test_the_command_that_derives_ends_with_an_answer_or_one_line(options):
    STARTED.clear()
    arguments = [f"--{name}={text}" for name, text in options.items()]
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        an_answer_or(SystemExit),
    ):
        main(["derive", *arguments])
    assert "Traceback" not in said.getvalue()
    assert not STARTED


# --- files -------------------------------------------------------------------------------------


@st.composite
def faults(draw):
    """A function that breaks bytes: flips, cuts, inserts, or puts others in their place."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "early", "cut", "insert", "replace"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    bit, filling = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=24))

    def broken(content):
        if kind == "replace":
            return filling
        if kind == "early":  # heads and tables stand in the first bytes
            at = int(where * min(300, len(content)))
        else:
            at = int(where * len(content))
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + filling + content[at:]
        return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

    return broken


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@search(60)
@given(fault=faults())
def test_a_broken_checkpoint_is_passed_over_or_refused_and_never_another(folder, fault):
    settings, tensors = {"rate": 0.1}, {"a": torch.arange(6.0), "b": torch.eye(2)}
    checkpoints = Checkpoints(folder / "checkpoints", settings)
    for step in (1, 2):
        path = checkpoints.save(step, {**tensors, "step": torch.tensor(step)})
    path.write_bytes(fault(path.read_bytes()))
    with an_answer_or():
        step, found = checkpoints.latest()
        assert step in (1, 2) and found["step"] == step
        assert all(torch.equal(found[key], value) for key, value in tensors.items())


@search(40)
@given(fault=faults())
def test_a_broken_file_of_tensors_is_refused_and_never_another(folder, fault):
    files = pytest.importorskip("flowspace.vision.tensor_files")
    path = folder / "whole.safetensors"
    tensors = {"a": torch.arange(6.0), "b": torch.eye(2)}
    files.write_whole(path, tensors, {"settings": "here"})
    path.write_bytes(fault(path.read_bytes()))
    with an_answer_or():
        found, metadata = files.read_whole(path)
        assert all(torch.equal(found[key], value) for key, value in tensors.items())
        assert metadata.get("settings", "here")
    with an_answer_or():
        files.metadata_of(path)


@search(40)
@given(fault=faults(), ending=st.sampled_from(["pt", "safetensors"]))
def test_a_broken_file_of_strangers_weights_is_refused_or_a_network(folder, fault, ending):
    """Their formats have no digest, so other numbers in them are not noticed."""
    pytest.importorskip("diffusers")
    from safetensors.torch import save_file

    from flowspace.vision.convert import convert, to_layout
    from flowspace.vision.dit import DiT

    path = folder / f"weights.{ending}"
    small = {"channels": 1, "size": 2, "patch": 1, "classes": 2, "depth": 1, "width": 4}
    tensors = to_layout(DiT(**small, heads=1, hidden=4), "sit")
    tensors["t_embedder.mlp.0.weight"] = torch.zeros(4, 256)
    if ending == "pt":
        torch.save({"ema": tensors, "steps": 3}, path)
    else:
        save_file(tensors, path)
    path.write_bytes(fault(path.read_bytes()))
    STARTED.clear()
    with an_answer_or():
        network = convert(path, "sit", heads=1)
        assert network.latent_shape == (1, 2, 2)
    assert not STARTED


def picture(kind, size=24):
    from PIL import Image

    made, image = io.BytesIO(), Image.radial_gradient("L").resize((size, size)).convert("RGB")
    image.save(made, kind)
    return made.getvalue()


@search(60)
@given(fault=faults(), kind=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_a_broken_picture_is_a_picture_or_skipped(folder, fault, kind):
    pytest.importorskip("torchvision")
    from flowspace.vision import FolderImages

    root = folder / "pictures"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "a" / "whole.png").write_bytes(picture("PNG"))
    (root / "b" / f"broken.{kind.lower()}").write_bytes(fault(picture(kind)))
    with an_answer_or():
        images = FolderImages(root, size=8)
        for index in range(len(images)):
            pixels, label = images[index]
            assert pixels.shape == (3, 8, 8) and pixels.abs().max() <= 1
            assert label in (0, 1)
    for path in (root / "b").iterdir():
        path.unlink()


@search(60)
@given(fault=faults(), about=st.sampled_from(["shard", "index"]))
def test_a_broken_shard_or_index_is_refused_or_has_pictures(folder, fault, about):
    pytest.importorskip("torchvision")
    from flowspace.vision import ShardImages

    root = folder / "shards"
    root.mkdir(exist_ok=True)
    for path in root.iterdir():
        path.unlink()
    with tarfile.open(root / "0.tar", "w") as shard:
        for number in range(3):
            for ending, content in (("png", picture("PNG")), ("cls", b"1")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    if about == "index":
        ShardImages(root, size=8)
        (path,) = root.glob("flowspace-index*")
    else:
        path = root / "0.tar"
    path.write_bytes(fault(path.read_bytes()))
    with an_answer_or():
        images = ShardImages(root, size=8)
        for index in range(len(images)):
            pixels, label = images[index]
            assert pixels.shape == (3, 8, 8) and 0 <= label < 10**9


@search(30)
@given(fault=faults())
def test_a_broken_config_of_a_network_is_refused_or_builds_one(folder, fault):
    pytest.importorskip("diffusers")
    from flowspace.vision.dit import DiT

    small = {"channels": 1, "size": 2, "patch": 1, "classes": 2, "depth": 1, "width": 4}
    place = folder / "network"
    DiT(**small, heads=1).save_pretrained(place)
    path = place / "config.json"
    path.write_bytes(fault(path.read_bytes()))
    foreign = (OSError, ValueError, TypeError, AttributeError, RuntimeError, KeyError)
    with an_answer_or(*foreign):  # diffusers' own errors come first
        DiT.from_pretrained(place)


# --- configs -----------------------------------------------------------------------------------

ODD = (
    *(0, -1, 1, 2, 10**30, -(10**30), 2**63, 0.5, -0.5, 1e308, math.inf, -math.inf, math.nan),
    *(True, False, None, "", "a text", "1", "\0", "∞", [], [1, 2], {}, {"a": 1}, [[[]]], 1j),
)


def odd_values():
    """Values of the wrong kind, out of range, or right."""
    plain = st.sampled_from(ODD)
    return st.one_of(plain, st.integers(), st.floats(), st.text(max_size=9), st.lists(plain))


@pytest.fixture(scope="module")
def program():
    pytest.importorskip("pydantic")
    place = Path(__file__).parents[1] / "examples" / "imagenet"
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    return importlib.import_module("settings")


def leaves(kind, before=()):
    """The path of every setting."""
    for field in dataclasses.fields(kind):
        inner = field.type if isinstance(field.type, type) else None
        if inner is not None and dataclasses.is_dataclass(inner):
            yield from leaves(inner, (*before, field.name))
        else:
            yield (*before, field.name)


@search(120)
@given(data=st.data())
def test_a_setting_of_any_value_is_meant_or_refused(folder, program, data):
    keys = data.draw(st.sampled_from(sorted(leaves(program.ImageNetConfig))))
    value = data.draw(odd_values())
    path = folder / "config.yaml"
    path.write_text("name: a\n")
    text = json.dumps(value, default=str)
    with an_answer_or(program.SettingsError):
        config = program.load(path, [f"{'.'.join(keys)}={text}"])
        json.dumps(importlib.import_module("reading").as_dict(config), allow_nan=False)


@search(80)
@given(fault=faults(), data=st.data())
def test_a_broken_config_is_read_or_refused(folder, program, fault, data):
    place = Path(program.__file__).parent / "configs"
    text = data.draw(st.sampled_from(sorted(place.glob("*.yaml")))).read_bytes()
    path = folder / "broken.yaml"
    path.write_bytes(fault(text))
    with an_answer_or(program.SettingsError):
        config = program.load(path)
        json.dumps(importlib.import_module("reading").as_dict(config), allow_nan=False)


# --- public objects ----------------------------------------------------------------------------


def kinds():
    """Every public dataclass that can be built with keywords."""
    for name in flowspace.__all__:
        kind = getattr(flowspace, name)
        plain = dataclasses.is_dataclass(kind) and not getattr(kind, "__abstractmethods__", ())
        if plain and name != "CriteriaReport":
            yield kind


@search(300)
@given(data=st.data())
def test_a_public_object_takes_what_it_can_mean(data):
    kind = data.draw(st.sampled_from(list(kinds())))
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    known = [
        value
        for field in dataclasses.fields(kind)
        if (value := field.default) is not dataclasses.MISSING
    ]
    objects = st.sampled_from([*known, torch.tensor(0.5), torch.sin, flowspace, CrossFlowLoss])
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    chosen = {*needed, *data.draw(st.lists(st.sampled_from(names or [""]), max_size=3))}
    given_values = {name: data.draw(odd_values() | objects) for name in chosen if name}
    with an_answer_or():
        made = kind(**given_values)
        assert repr(made)


LOSSES = (
    CrossFlowLoss(),
    MeanFlowLoss(),
    ImprovedMeanFlowLoss(),
    PixelMeanFlowLoss(),
    FlowMatchingLoss(),
)
MODELS = {
    "itself": lambda z, t, s: z,
    "scaled": lambda z, t, s: z * (t - s).view(-1, *[1] * (z.ndim - 1)).cos(),
    "sum": lambda z, t, s: z.sum(-1),
    "constant": lambda z, t, s: torch.ones(3),
    "none": lambda z, t, s: None,
    "pair": lambda z, t, s: (z, z),
    "half": lambda z, t, s: z.half(),
    "text": "model",
}


def tensors():
    """Tensors of few rows, of any kind of numbers."""
    shapes = st.lists(st.integers(0, 4), max_size=3)
    kinds = st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
    )

    def made(shape, dtype, filling):
        return torch.full(shape, filling).to(dtype)

    finite = st.sampled_from([0.0, 0.5, 1.0, -1.0])
    odd = st.sampled_from([math.nan, math.inf])
    return st.builds(made, shapes, kinds, finite | finite | odd) | odd_values()


def right_or_odd(right):
    """Mostly what fits, else anything."""
    return st.one_of(st.just(right), st.just(right), st.just(right), tensors())


@search(150)
@given(data=st.data())
def test_a_loss_of_any_batch_is_a_loss_or_refused(data):
    loss_fn = data.draw(st.sampled_from(LOSSES))
    chosen = data.draw(st.sampled_from(list(MODELS)))
    model = MODELS[chosen]
    rows = torch.linspace(-1, 1, 12).view(4, 3)
    t, s = torch.tensor([0.9, 0.5, 0.4, 1.0]), torch.tensor([0.1, 0.5, 0.0, 0.2])
    arguments = {
        name: data.draw(right_or_odd(value))
        for name, value in {"noise": rows, "t": t, "s": s, "targets": rows, "cond": {}}.items()
        if data.draw(st.booleans())
    }
    latents = data.draw(right_or_odd(rows))
    with an_answer_or():
        out = loss_fn(model, latents, **arguments)
        assert out.loss.shape == (len(latents),)
        assert out.prediction.shape == out.target.shape
        finite = all(
            bool(value.isfinite().all())
            for value in (latents, *arguments.values())
            if isinstance(value, torch.Tensor)
        )
        if finite:
            assert out.loss.isfinite().all()


def few(steps):
    """Not many steps, which are meant, and take as long as they do."""
    return not isinstance(steps, (int, float)) or not 1000 < steps < math.inf


@search(80)
@given(data=st.data())
def test_a_sample_of_any_noise_is_a_sample_or_refused(data):
    loss_fn = data.draw(st.sampled_from(LOSSES))
    chosen = data.draw(st.sampled_from(list(MODELS)))
    model = MODELS[chosen]
    arguments = {}
    for name, values in {
        "steps": st.integers(1, 3) | odd_values().filter(few),
        "times": st.just([1.0, 0.5, 0.0]) | odd_values(),
        "cond": st.just({}) | odd_values(),
        "renoise": st.booleans() | odd_values(),
    }.items():
        if data.draw(st.booleans()):
            arguments[name] = data.draw(values)
    noise = data.draw(right_or_odd(torch.linspace(-1, 1, 12).view(4, 3)))
    with an_answer_or():
        sample = loss_fn.flow_map(model).sample(noise, **arguments)
        one_step = arguments.get("steps", 1) == 1 or "times" in arguments
        assert one_step or sample.shape == noise.shape  # one step may lead to another space


GIVEN = {
    "nothing": lambda *_, **__: None,
    "a number": lambda *_, **__: 2.0,
    "text": lambda *_, **__: "text",
    "its first argument": lambda first=None, *_, **__: first,
    "its last argument": lambda *given, **__: given[-1] if given else None,
    "other rows": lambda *_, **__: torch.ones(2),
    "a pair": lambda *_, **__: (torch.full((4,), 0.5), torch.full((4,), 0.25)),
    "a pair of pairs": lambda *_, **__: (torch.ones(4, 2), torch.ones(4, 2)),
    "whole numbers": lambda *_, **__: torch.ones(4, 3, dtype=torch.long),
    "complex numbers": lambda *_, **__: torch.ones(4, 3) + 0j,
    "another device": lambda *_, **__: torch.ones(4, 3, device="meta"),
    "no arguments": lambda: None,
    "a class": torch.nn.Linear,
}
"""What a function of the user may be, by what it returns."""


def functions():
    """Functions of the user, right ones and others, and what is no function."""
    return st.sampled_from(list(GIVEN.values())) | tensors()


ITSELF = FlowMap(MODELS["itself"], LinearSchedule(), MatchedStatistic())

USES = {
    "velocity": lambda part, z: CrossFlowLoss(velocity=part)(MODELS["itself"], z),
    "penalty": lambda part, z: CrossFlowLoss(penalty=part)(MODELS["itself"], z),
    "weight": lambda part, z: MeanFlowLoss(weight=part)(MODELS["itself"], z),
    "times": lambda part, z: MeanFlowLoss(times=part)(MODELS["itself"], z),
    "teacher": lambda part, z: MeanFlowDistillationLoss(teacher=part)(MODELS["itself"], z),
    "path": lambda part, z: TrajectoryMatchingLoss(teacher=part)(MODELS["itself"], z),
    "model": lambda part, z: ImprovedMeanFlowLoss()(part, z),
    "sampled": lambda part, z: FlowMap(part, LinearSchedule(), MatchedStatistic()).sample(z),
    "encode": lambda part, z: ITSELF.sample(z, steps=2, encode=part),
    "guidance": lambda part, z: ITSELF.sample(z, guidance=part),
    "generator": lambda part, z: CrossFlowLoss()(MODELS["itself"], z, generator=part),
    "fresh noise": lambda part, z: ITSELF.sample(z, steps=2, renoise=True, generator=part),
    "field": lambda part, z: VelocityFlow(part).sample(z, steps=2),
    "null": lambda part, z: Guidance(null={"labels": part}),
    "latents": lambda part, z: LinearSchedule().perturb(part, z, torch.full((4,), 0.5)),
    "noise": lambda part, z: LinearSchedule().perturb(z, part, torch.full((4,), 0.5)),
    "time": lambda part, z: LinearSchedule().perturb(z, z, part),
    "alpha": lambda part, z: Schedule(part, "t"),
    "delta": lambda part, z: Statistic("1", part),
    "kappa": lambda part, z: Statistic.from_kappa(LinearSchedule(), part, delta="-t/(t - s)"),
    "adapted": lambda part, z: flowspace.adapt(part),
    "output": lambda part, z: flowspace.adapt(torch.nn.Linear(3, 3), {}, output=part),
}
"""What takes a part of the user's own."""


@search(400)
@given(part=functions(), use=st.sampled_from(list(USES)))
def test_a_part_of_ones_own_is_used_or_refused(part, use):
    with an_answer_or():
        USES[use](part, torch.linspace(-1, 1, 12).view(4, 3))
