"""The pipeline and the decoder: one evaluation, the same after saving and loading elsewhere, at home in diffusers."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from flowspace import FlowMap, InputError, LinearSchedule, MatchedStatistic
from flowspace.vision import CrossFlowGenerator
from flowspace.vision.pipeline import CrossFlowDecoder, CrossFlowPipeline


def network(**changes):
    torch.manual_seed(0)
    settings = {"channels": 4, "grid": 4, "patch": 2, "classes": 5, "depth": 2, "width": 32, "heads": 4}
    made = CrossFlowGenerator(**(settings | changes)).eval()
    torch.nn.init.normal_(made.head.weight, std=0.1)
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
    wanted = FlowMap(made, LinearSchedule(), MatchedStatistic()).sample(noise, cond={"labels": torch.tensor([0, 3])})
    torch.testing.assert_close(images, wanted)


def test_pictures_come_as_pil_numpy_or_tensors():
    pipeline = CrossFlowPipeline(network())
    pictures = pipeline(labels=[1], generator=draw()).images
    assert pictures[0].size == (8, 8) and pictures[0].mode == "RGB"
    array = pipeline(labels=[1], generator=draw(), output_type="np").images
    assert array.shape == (1, 8, 8, 3) and array.min() >= 0 and array.max() <= 1
    (tensor,) = pipeline(labels=[1], generator=draw(), output_type="pt", return_dict=False)
    torch.testing.assert_close(torch.tensor(array).permute(0, 3, 1, 2), (tensor.clamp(-1, 1) + 1) / 2)


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
images = pipeline(labels=[0, 1], generator=torch.Generator().manual_seed(0), output_type="pt").images
assert torch.equal(images, torch.load({str(tmp_path / "images.pt")!r}, weights_only=True))
assert str(pipeline.schedule) == "alpha(t) = cos(pi*t/2), beta(t) = sin(pi*t/2)", str(pipeline.schedule)
print("equal")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_several_steps_encode_and_guidance_takes_two_evaluations():
    made = network()
    pipeline, calls = CrossFlowPipeline(made), []
    made.register_forward_hook(lambda *_: calls.append(1))

    def encode(images):
        return torch.nn.functional.avg_pool2d(images, 2).mean(1, keepdim=True).expand(-1, 4, -1, -1)

    pipeline(labels=[0], steps=3, encode=encode, output_type="pt")
    assert len(calls) == 3
    guided = pipeline(labels=[0], generator=draw(), scale=2.0, output_type="pt").images
    assert len(calls) == 5
    one, none = (pipeline(labels=[label], generator=draw(), output_type="pt").images for label in (0, 5))
    torch.testing.assert_close(guided, none + 2 * (one - none))


def test_a_generator_without_classes_counts_images():
    assert CrossFlowPipeline(network(classes=0))(count=3, output_type="pt").images.shape == (3, 3, 8, 8)


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


# --- the decoder ----------------------------------------------------------------------------------------------------------


def test_the_decoder_tells_the_generator_how_noisy_its_latents_are():
    made, z = network(condition="t,s"), torch.randn(3, 4, 4, 4)
    decoder, y = CrossFlowDecoder.of(made, t=0.2), torch.tensor([0, 1, 2])
    zero, level = torch.zeros(3), torch.full((3,), 0.2)
    torch.testing.assert_close(decoder.decode(z, labels=y).sample, made(z, level, zero, labels=y))
    torch.testing.assert_close(
        decoder.decode(z, t=0.7, labels=y).sample, made(z, torch.full((3,), 0.7), zero, labels=y)
    )
    (free,) = decoder.decode(z, return_dict=False)
    torch.testing.assert_close(free, made(z, level, zero, labels=torch.full((3,), 5)))
    scaled = CrossFlowDecoder.of(made, t=0.2, rescale=True)
    torch.testing.assert_close(scaled.decode(z, labels=y).sample, made(0.8 * z, level, zero, labels=y))
    for bad in (0.0, 1.5):
        with pytest.raises(InputError, match="noise level"):
            decoder.decode(z, t=bad)


def test_the_decoder_is_saved_and_loaded(tmp_path):
    decoder, z = CrossFlowDecoder.of(network(), t=0.3), torch.randn(2, 4, 4, 4)
    decoder.save_pretrained(tmp_path)
    again = CrossFlowDecoder.from_pretrained(tmp_path)
    assert torch.equal(decoder.decode(z).sample, again.decode(z).sample) and again.config["t"] == 0.3


def test_it_is_the_vae_of_diffusers_dit_pipeline():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=5, norm_type="ada_norm_zero",
    )  # fmt: skip
    pipeline = DiTPipeline(transformer, CrossFlowDecoder.of(network()), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=[0, 1], guidance_scale=1.0, generator=draw(), num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (2, 8, 8, 3)
