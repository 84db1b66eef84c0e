"""The pipeline and the decoder: one evaluation, the same after saving and loading elsewhere, at
home in diffusers.
"""

import ast
import base64
import importlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from flowspace import (
    FlowMap,
    FlowspaceError,
    InputError,
    LinearSchedule,
    MatchedStatistic,
    RunError,
)
from flowspace.vision import CrossFlowGenerator
from flowspace.vision.card import model_card
from flowspace.vision.one_step import OneStepPipeline
from flowspace.vision.pipeline import CrossFlowDecoder, CrossFlowPipeline
from flowspace.vision.standalone import standalone


def network(**changes):
    torch.manual_seed(0)
    settings = {
        "channels": 4,
        "grid": 4,
        "patch": 2,
        "classes": 5,
        "depth": 2,
        "width": 32,
        "heads": 4,
    }
    made = CrossFlowGenerator(**(settings | changes)).eval()
    last = getattr(made.head, "last", made.head)
    torch.nn.init.normal_(last.weight, std=0.1)
    return made


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_call_is_one_evaluation_of_the_generator_at_pure_noise():
    made = network()
    pipeline, calls = CrossFlowPipeline(made), []
    made.register_forward_hook(lambda *_: calls.append(1))
    images = pipeline(labels=[0, 3], generator=draw(), output_type="pt").images
    assert len(calls) == 1
    noise = torch.randn(2, 4, 4, 4, generator=draw())
    wanted = FlowMap(made, LinearSchedule(), MatchedStatistic()).sample(
        noise, cond={"labels": torch.tensor([0, 3])}
    )
    torch.testing.assert_close(images, wanted)


def test_pictures_come_as_pil_numpy_or_tensors():
    pipeline = CrossFlowPipeline(network())
    pictures = pipeline(labels=[1], generator=draw()).images
    assert pictures[0].size == (8, 8) and pictures[0].mode == "RGB"
    array = pipeline(labels=[1], generator=draw(), output_type="np").images
    assert array.shape == (1, 8, 8, 3) and array.min() >= 0 and array.max() <= 1
    (tensor,) = pipeline(labels=[1], generator=draw(), output_type="pt", return_dict=False)
    torch.testing.assert_close(
        torch.tensor(array).permute(0, 3, 1, 2), (tensor.clamp(-1, 1) + 1) / 2
    )


def test_with_a_generator_for_each_image_an_image_does_not_depend_on_its_batch():
    pipeline = CrossFlowPipeline(network())
    both = pipeline(labels=[2, 4], generator=[draw(7), draw(8)], output_type="pt").images
    alone = pipeline(labels=[4], generator=[draw(8)], output_type="pt").images
    torch.testing.assert_close(both[1:], alone)


def test_a_saved_pipeline_gives_the_same_samples_in_a_fresh_process(tmp_path):
    pipeline = CrossFlowPipeline(network(), alpha="cos(pi*t/2)", beta="sin(pi*t/2)")
    pipeline.save_pretrained(tmp_path)
    images = pipeline(labels=[0, 1], generator=draw(), output_type="pt").images
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import torch
from flowspace.vision.pipeline import CrossFlowPipeline
pipeline = CrossFlowPipeline.from_pretrained({str(tmp_path)!r})
draw = torch.Generator().manual_seed(0)
images = pipeline(labels=[0, 1], generator=draw, output_type="pt").images
assert torch.equal(images, torch.load({str(tmp_path / "images.pt")!r}, weights_only=True))
schedule = str(pipeline.schedule)
assert schedule == "alpha(t) = cos(pi*t/2), beta(t) = sin(pi*t/2)", schedule
print("equal")"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_several_steps_encode_and_guidance_takes_two_evaluations():
    made = network(null_trained=True)
    pipeline, calls = CrossFlowPipeline(made), []
    made.register_forward_hook(lambda *_: calls.append(1))

    def encode(images):
        return (
            torch.nn.functional.avg_pool2d(images, 2).mean(1, keepdim=True).expand(-1, 4, -1, -1)
        )

    pipeline(labels=[0], steps=3, encode=encode, output_type="pt")
    assert len(calls) == 3
    guided = pipeline(labels=[0], generator=draw(), scale=2.0, output_type="pt").images
    assert len(calls) == 5
    one, none = (
        pipeline(labels=[label], generator=draw(), output_type="pt").images for label in (0, 5)
    )
    torch.testing.assert_close(guided, none + 2 * (one - none))


def test_a_generator_without_classes_counts_images():
    assert CrossFlowPipeline(network(classes=0))(count=3, output_type="pt").images.shape == (
        3,
        3,
        8,
        8,
    )


def test_pictures_may_be_rectangles():
    pipeline = CrossFlowPipeline(network(grid=(2, 5)))
    assert pipeline(labels=[1]).images[0].size == (10, 4)
    card = model_card("Wide", pipeline.generator, "1 - t", "t")
    assert "latent of 4 x 2\nx 5 to an image of 4 x 10 pixels" in card


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p(), "labels="),
        (lambda p: p(labels=[6]), "0 to 4"),
        (lambda p: p(labels=[0.5]), "integers"),
        (lambda p: p(labels=[0], steps=2), "encode="),
        (lambda p: p(labels=[0], output_type="jpg"), "'pil'"),
        (lambda p: p(labels=[0], latents=torch.zeros(2, 4, 4, 4)), "this generator takes"),
    ],
)
def test_misuse_is_one_clear_error(call, says):
    with pytest.raises(InputError, match=says):
        call(CrossFlowPipeline(network()))


def test_the_pipeline_that_is_shipped_evaluates_once_and_draws_one_where_nothing_is_said():
    made, seen = network(classes=0), []
    made.register_forward_hook(lambda *call: seen.append(call[1]))
    pipeline = OneStepPipeline(made)
    images = pipeline(generator=draw(), output_type="pt").images
    [(noise, t, s)] = seen
    assert torch.equal(noise, torch.randn(1, 4, 4, 4, generator=draw()))
    assert (t.tolist(), s.tolist()) == ([1], [0])
    assert torch.equal(images, made(noise, t, s)) and not images.requires_grad
    again = pipeline(count=1, latents=noise.double(), output_type="pt", return_dict=False)
    assert torch.equal(again[0], images)
    pictures = pipeline(latents=30 * noise, output_type="np").images
    wide = pipeline(latents=30 * noise, output_type="pt").images
    assert wide.abs().max() > 1
    wanted = (wide.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(torch.tensor(pictures), wanted.permute(0, 2, 3, 1))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_its_guidance_is_of_any_strength(scale):
    pipeline = OneStepPipeline(network(null_trained=True))
    guided, one, none = (
        pipeline(labels=[label, 3], generator=draw(), scale=given, output_type="pt").images[:1]
        for label, given in ((0, scale), (0, 1.0), (5, 1.0))
    )
    torch.testing.assert_close(guided, none + scale * (one - none))


def test_of_a_generator_in_bfloat16_it_draws_noise_of_that_and_returns_float32():
    made, seen = network().bfloat16(), []
    made.register_forward_hook(lambda *call: seen.append(call[1][0].dtype))
    images = OneStepPipeline(made)(labels=[1], output_type="pt").images
    assert seen == [torch.bfloat16] and images.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "call", "says"),
    [
        ({}, {}, "got no labels for a generator of 5 classes"),
        ({}, {"labels": [-1]}, "integers from 0 to 4"),
        ({}, {"labels": [6]}, "integers from 0 to 4"),
        ({}, {"labels": [0.5]}, "integers from 0 to 4"),
        ({}, {"labels": [[0]]}, "integers from 0 to 4"),
        ({}, {"labels": [5]}, "null"),
        ({}, {"labels": [0], "scale": 2.0}, "null"),
        ({}, {"labels": [0], "output_type": "jpg"}, "write one of 'pil', 'np', 'pt'"),
        ({}, {"labels": [0], "latents": torch.zeros(2, 4, 4, 4)}, r"takes \(1, 4, 4, 4\)"),
        ({}, {"labels": [0], "latents": torch.zeros(1, 4, 2, 8)}, r"takes \(1, 4, 4, 4\)"),
        ({"classes": 0}, {"labels": [0]}, "write count= instead"),
        ({"classes": 0}, {"scale": 2.0}, "got scale for a generator without classes"),
    ],
)
def test_what_the_shipped_pipeline_cannot_draw_is_one_clear_error(changes, call, says):
    with pytest.raises(InputError, match=says):
        OneStepPipeline(network(**changes))(**call)


# --- the decoder
# -------------------------------------------------------------------------------------------------


def test_the_decoder_tells_the_generator_how_noisy_its_latents_are():
    made, z = network(condition="t,s", null_trained=True), torch.randn(3, 4, 4, 4)
    decoder, y = CrossFlowDecoder.of(made, t=0.2), torch.tensor([0, 1, 2])
    zero, level = torch.zeros(3), torch.full((3,), 0.2)
    torch.testing.assert_close(decoder.decode(z, labels=y).sample, made(z, level, zero, labels=y))
    torch.testing.assert_close(
        decoder.decode(z, t=0.7, labels=y).sample, made(z, torch.full((3,), 0.7), zero, labels=y)
    )
    (free,) = decoder.decode(z, return_dict=False)
    torch.testing.assert_close(free, made(z, level, zero, labels=torch.full((3,), 5)))
    scaled = CrossFlowDecoder.of(made, t=0.2, rescale=True)
    torch.testing.assert_close(
        scaled.decode(z, labels=y).sample, made(0.8 * z, level, zero, labels=y)
    )
    for bad in (0.0, 1.5):
        with pytest.raises(InputError, match="noise level"):
            decoder.decode(z, t=bad)


def test_a_null_class_that_was_not_trained_is_never_drawn_from(tmp_path):
    """Old configs do not say whether it was, and count as untrained."""
    pipeline, z = CrossFlowPipeline(network()), torch.randn(2, 4, 4, 4)
    decoder = CrossFlowDecoder.of(pipeline.generator)
    for call in (
        lambda: pipeline(labels=[0], scale=2.0),
        lambda: pipeline(labels=[0, 5]),
        lambda: decoder.decode(z),
    ):
        with pytest.raises(InputError, match="null class was not trained"):
            call()
    pipeline(labels=[0])
    decoder.decode(z, labels=torch.tensor([0, 1]))
    CrossFlowDecoder.of(network(classes=0)).decode(z)
    pipeline.save_pretrained(tmp_path)
    place = tmp_path / "generator" / "config.json"
    old = json.loads(place.read_text())
    old.pop("null_trained")
    old.pop("_digests")
    place.write_text(json.dumps(old))
    again = CrossFlowPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="null_trained=True"):
        again(labels=[5])
    again.generator.register_to_config(null_trained=True)
    again(labels=[5])


def test_the_decoder_is_saved_and_loaded(tmp_path):
    made, z = network(null_trained=True), torch.randn(2, 4, 4, 4)
    decoder = CrossFlowDecoder.of(made, t=0.3)
    decoder.save_pretrained(tmp_path)
    again = CrossFlowDecoder.from_pretrained(tmp_path)
    assert (
        torch.equal(decoder.decode(z).sample, again.decode(z).sample) and again.config["t"] == 0.3
    )


def test_it_is_the_vae_of_diffusers_dit_pipeline():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_type="ada_norm_zero",
    )
    decoder = CrossFlowDecoder.of(network(null_trained=True))
    pipeline = DiTPipeline(transformer, decoder, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=[0, 1],
        guidance_scale=1.0,
        generator=draw(),
        num_inference_steps=2,
        output_type="np",
    ).images
    assert images.shape == (2, 8, 8, 3)


class Hub(BaseHTTPRequestHandler):
    """Answers what the client of the hub asks while it uploads files, and keeps them."""

    kept: dict[str, bytes] = {}  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            answer = {"url": f"{host}/somebody/emoji"}
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": f"{host}/somebody/emoji/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        else:
            answer = {}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


PUSH = """
import sys
from flowspace.vision import CrossFlowPipeline
pipeline = CrossFlowPipeline.from_pretrained(sys.argv[1])
if sys.argv[2] == "push":
    pipeline.push_to_hub("somebody/emoji", token="hf_none")
else:
    again, name = sys.argv[1] + "/again", "somebody/emoji"
    pipeline.save_pretrained(again, push_to_hub=True, repo_id=name, token="hf_none")
"""


@pytest.mark.parametrize("how", ["push", "save"])
def test_a_pushed_pipeline_is_uploaded_whole_with_its_own_card(tmp_path, how):
    """By the hub's own client, to a hub of this machine."""
    pipeline = CrossFlowPipeline(network())
    pipeline.card = "---\nlibrary_name: diffusers\n---\n# Emoji, from PATH_OR_REPOSITORY\n"
    pipeline.save_pretrained(tmp_path)
    Hub.kept = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        here = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path), how],
            env=os.environ | here,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.shutdown()
        server.server_close()
    weights = "generator/diffusion_pytorch_model.safetensors"
    told = {"README.md", "model_index.json", "generator/config.json", weights}
    assert set(Hub.kept) == told | {"pipeline.py", "generator/crossflow_generator.py"}
    assert Hub.kept["README.md"].decode().endswith("# Emoji, from somebody/emoji\n")
    assert Hub.kept[weights] == (tmp_path / weights).read_bytes()


def test_a_pipeline_without_a_card_is_saved_with_one_that_tells_its_sizes(tmp_path):
    CrossFlowPipeline(network()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "2 blocks of width 32, 5 classes" in card and "trust_remote_code=True" in card
    assert CrossFlowPipeline.from_pretrained(tmp_path).card == (tmp_path / "README.md").read_text()


# --- without flowspace
# -------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["flowspace"] = None  # importing it raises
import torch
from diffusers import DiffusionPipeline


def draw(seed):
    return torch.Generator().manual_seed(seed)


for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    calls, wanted = torch.load(folder + "/images.pt", weights_only=True)
    for call, images in zip(calls, wanted, strict=True):
        seeds = call.pop("seed")
        source = [draw(seed) for seed in seeds]
        if len(source) == 1:
            source = source[0]
        found = pipeline(**call, generator=source, output_type="pt").images
        assert torch.equal(found, images), (call, float((found - images).abs().max()))
    assert pipeline(**calls[0]).images[0].mode == "RGB"
    print("equal")
"""


def test_diffusers_draws_the_same_bits_without_flowspace(tmp_path):
    """From the folder alone, by the code that lies in it."""
    with_classes = network(null_trained=True, mlp="gelu")
    without = network(classes=0, condition="t,s", head_kind="convolutional", head_channels=4)
    cases = {
        "classes": (
            CrossFlowPipeline(with_classes),
            [
                {"labels": [0, 3], "seed": [0]},
                {"labels": [0, 3], "seed": [7, 8]},
                {"labels": [1, 5], "seed": [2], "scale": 2.5},
            ],
        ),
        "cosine": (
            CrossFlowPipeline(without, alpha="cos(pi*t/2)", beta="sin(pi*t/2)"),
            [{"count": 3, "seed": [1]}],
        ),
    }
    for name, (pipeline, calls) in cases.items():
        pipeline.save_pretrained(tmp_path / name)
        images = []
        for call in calls:
            settings = {key: value for key, value in call.items() if key != "seed"}
            sources = [draw(seed) for seed in call["seed"]]
            if len(sources) == 1:
                sources = sources[0]
            images.append(pipeline(**settings, generator=sources, output_type="pt").images)
        torch.save((calls, images), tmp_path / name / "images.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *(str(tmp_path / name) for name in cases)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["equal", "equal"], done.stderr[-2000:]


def test_code_of_a_folder_runs_for_nobody_who_did_not_ask(tmp_path):
    """Neither in diffusers without trust, nor in flowspace, which has its own."""
    from diffusers import DiffusionPipeline

    pipeline = CrossFlowPipeline(network())
    pipeline.save_pretrained(tmp_path)
    for code in [tmp_path / "pipeline.py", *(tmp_path / "generator").glob("*.py")]:
        code.write_text("raise AssertionError('this code ran')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)
    again = CrossFlowPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert again.generator.dtype == torch.float64 and again.card is not None
    given = CrossFlowPipeline.from_pretrained(tmp_path, generator=pipeline.generator)
    assert given.generator is pipeline.generator


def test_a_repository_of_the_hub_is_fetched_and_loaded_with_its_card(tmp_path, monkeypatch):
    pipeline, asked = CrossFlowPipeline(network()), {}
    pipeline.card = "---\nlibrary_name: diffusers\n---\n# Emoji\n"
    pipeline.save_pretrained(tmp_path)

    def fetch(name, *, allow_patterns, revision):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    again = CrossFlowPipeline.from_pretrained("somebody/emoji", revision="main")
    assert asked["name"] == "somebody/emoji" and asked["revision"] == "main"
    assert "generator/*" in asked["patterns"] and again.card == pipeline.card
    images = [
        each(labels=[1], generator=draw(), output_type="pt").images for each in (pipeline, again)
    ]
    assert torch.equal(*images)


def test_a_folder_of_before_the_code_was_shipped_is_loaded(tmp_path):
    CrossFlowPipeline(network(), alpha="1 - t**2", beta="t**2").save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    told = json.loads(index.read_text())
    told["_class_name"] = "CrossFlowPipeline"
    told["generator"] = ["flowspace.vision.generator", "CrossFlowGenerator"]
    index.write_text(json.dumps(told))
    for code in [tmp_path / "pipeline.py", *(tmp_path / "generator").glob("*.py")]:
        code.unlink()
    assert CrossFlowPipeline.from_pretrained(tmp_path).config["alpha"] == "1 - t**2"


ALONE = ["one_step", "generator", "dit_dh", "pixel_mean_flow", "pixel_flow"]


@pytest.mark.parametrize("name", ALONE)
def test_a_module_in_one_file_defines_what_it_did_and_imports_no_flowspace(name):
    module = importlib.import_module(f"flowspace.vision.{name}")
    code = standalone(f"flowspace.vision.{name}")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "flowspace" not in ast.unparse(node)
    names = {"__name__": name}
    exec(compile(code, name, "exec"), names)
    assert set(module.__all__) <= names.keys()
    assert names["InputError"].__doc__ == InputError.__doc__


def test_two_modules_with_one_name_for_two_things_are_not_put_in_one_file():
    with pytest.raises(RunError, match="both define Source; rename one of them"):
        standalone("flowspace.vision.rae")


# --- broken files
# -------------------------------------------------------------------------------------------------

WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(kind, folder):
    """Save a pipeline, a generator or a decoder; returns its class and where its weights are."""
    made = network()
    if kind == "decoder":
        made = CrossFlowDecoder.of(made)
    if kind == "pipeline":
        made = CrossFlowPipeline(made)
    made.save_pretrained(folder)
    (weights,) = folder.rglob(WEIGHTS)
    return type(made), weights


@pytest.mark.parametrize("place", [0.2, 0.6, 0.99])
@pytest.mark.parametrize("kind", ["pipeline", "generator", "decoder"])
def test_one_flipped_bit_of_the_weights_is_found_and_its_file_named(kind, place, tmp_path):
    of, weights = saved(kind, tmp_path)
    of.from_pretrained(tmp_path)
    data = bytearray(weights.read_bytes())
    data[int(place * len(data))] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match=f"{WEIGHTS} is not what was saved"):
        of.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["pipeline", "generator", "decoder"])
def test_a_config_with_another_name_or_value_of_an_argument_is_refused(kind, tmp_path):
    """diffusers itself only logs a name that it does not know, and takes the default."""
    of, weights = saved(kind, tmp_path)
    config = weights.with_name("config.json")
    text = config.read_text()
    told = json.loads(text)
    for name in sorted(key for key in told if not key.startswith("_")):
        for changed in ({f"{name}s": told[name]}, {name: "another"}):
            kept = {key: value for key, value in told.items() if key != name}
            config.write_text(json.dumps(kept | changed))
            with pytest.raises(RunError, match=r"config.json is not what was saved"):
                of.from_pretrained(tmp_path)
    config.write_text(text)
    of.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["pipeline", "generator", "decoder"])
def test_weights_that_lack_a_tensor_are_refused_even_without_digests(kind, tmp_path):
    """diffusers itself only warns, and leaves the tensor empty."""
    from safetensors.torch import load_file, save_file

    of, weights = saved(kind, tmp_path)
    config = weights.with_name("config.json")
    told = json.loads(config.read_text())
    assert told.pop("_digests").keys() == {WEIGHTS, "config.json"}
    config.write_text(json.dumps(told))
    of.from_pretrained(tmp_path)
    tensors = load_file(weights)
    gone = sorted(tensors)[3]
    tensors.pop(gone)
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(RunError, match=f"lack 1 tensor.*{gone}"):
        of.from_pretrained(tmp_path)


def test_weights_that_were_trained_on_and_saved_again_have_new_digests(tmp_path):
    network().save_pretrained(tmp_path)
    again = CrossFlowGenerator.from_pretrained(tmp_path)
    torch.nn.init.normal_(again.head.weight)
    again.save_pretrained(tmp_path)
    last, told = CrossFlowGenerator.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(last.head.weight, again.head.weight) and not told["missing_keys"]


def test_a_pipeline_whose_schedule_is_lost_is_refused(tmp_path):
    CrossFlowPipeline(network()).save_pretrained(tmp_path)
    place = tmp_path / "model_index.json"
    told = json.loads(place.read_text())
    told.pop("beta")
    place.write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"model_index.json names no schedule"):
        CrossFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("alpha", ["10**10**10", "cos(" * 200 + "t" + ")" * 200, "(1-t)**9999", 3])
def test_a_schedule_of_a_stranger_is_refused_and_keeps_nobody_waiting(alpha, tmp_path):
    CrossFlowPipeline(network()).save_pretrained(tmp_path)
    place = tmp_path / "model_index.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"alpha": alpha}))
    with pytest.raises(FlowspaceError, match=r"."):
        CrossFlowPipeline.from_pretrained(tmp_path)
