"""Costs: counted ones equal closed forms, and a counted training step is what the formula says.

What the paper says stands beside the paper's configs and nowhere else.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("pydantic")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "imagenet"))

import costs
import flops
import results
import rivals
import settings
from flops import Cost, Share, alone, cost_of, generator_cost
from settings import DataConfig, GeneratorConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowspace import ConsistencyLoss, CrossFlowLoss
from flowspace.vision import CrossFlowGenerator

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "imagenet"
CONFIGS = EXAMPLE / "configs"


def preset(name):
    return alone(GeneratorConfig(preset=name))


@pytest.mark.parametrize("name", ["crossflow-b", "crossflow-l", "crossflow-xl"])
def test_the_forward_pass_is_that_of_its_matrices_and_its_attention(name):
    cost = generator_cost(preset(name))
    with torch.device("meta"):
        c = CrossFlowGenerator.from_preset(name).config
    d, layers, cells, tokens = c["width"], c["depth"], 256, 272
    blocks = layers * (2 * tokens * 12 * d**2 + 2 * 2 * tokens**2 * d)
    ends = 2 * cells * (32 * d + d * 768)
    assert cost.forward == pytest.approx(blocks + ends, rel=3e-3)


SMALL = {"channels": 16, "grid": 8, "patch": 2, "depth": 4, "width": 192, "heads": 3}
ROWS = 8


def flops_of_a_step(network, loss_fn, s):
    """Count a training step of images of 16 pixels, forward and backward, at t = 0.8."""
    z, x = torch.randn(ROWS, 16, 8, 8), torch.randn(ROWS, 3, 16, 16)
    t = torch.full((ROWS,), 0.8)
    labels = torch.zeros(ROWS).long()
    # Fused kernels go uncounted on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_fn(network, z, x, t=t, s=s, cond={"labels": labels}).loss.mean().backward()
    return counter.get_total_flops()


def small(checkpointing=False):
    generator = GeneratorConfig(preset=None, checkpointing=checkpointing, **SMALL)
    return dataclasses.replace(alone(generator), data=DataConfig(size=16, classes=10))


@pytest.mark.parametrize("equal", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_counted_training_step_is_what_the_formula_says(equal, checkpointing):
    cost = dataclasses.replace(generator_cost(small(checkpointing)), equal=equal)
    network = CrossFlowGenerator(classes=10, **SMALL)
    network.gradient_checkpointing = checkpointing
    s = torch.where(torch.arange(ROWS) < equal * ROWS, 0.8, 0.3)
    counted = flops_of_a_step(network, CrossFlowLoss(), s)
    assert counted == pytest.approx(ROWS * cost.generator_step, rel=0.06)


def test_a_counted_step_of_consistency_has_its_boundary_and_a_derivative_of_every_row():
    config = small()
    objective = dataclasses.replace(config.objective, kind="consistency")
    cost = generator_cost(dataclasses.replace(config, objective=objective))
    network = CrossFlowGenerator(classes=10, **SMALL)
    counted = flops_of_a_step(network, ConsistencyLoss(), torch.zeros(ROWS))
    assert counted == pytest.approx(ROWS * cost.generator_step, rel=0.06)


def test_sharding_divides_what_is_held_but_not_the_activations():
    cost = Cost("x", parameters=1000, matrices=800, forward=1.0, activations=10.0)
    held = 4 * (1000 * 5 + 800 + 2 * 200)
    assert cost.memory(3) == held + 30
    assert cost.memory(3, devices=8) == held / 8 + 30


def test_hours_are_those_of_the_step_the_frozen_networks_and_the_other_trainings():
    bare = Cost("x", parameters=1, matrices=1, forward=1.0, activations=0.0, images=360)
    networks, trainings = (Share("encoder", 3, 2.0),), (Share("stage 1", 3, 180.0),)
    cost = dataclasses.replace(bare, networks=networks, trainings=trainings)
    assert bare.hours(0.5, peak=100.0) == pytest.approx(3.5 * 360 / 50 / 3600)
    assert cost.hours(0.5, peak=100.0) == pytest.approx((5.5 * 360 + 180) / 50 / 3600)


def test_networks_have_their_published_costs_as_the_papers_count_them():
    """A multiply-add is one FLOP in these papers. DiT's (arXiv 2212.09748) counts attention's own
    products, MF-RAE's (arXiv 2511.13019) leaves them out.
    """
    assert rivals.dit().total / 2e9 == pytest.approx(118.6, rel=0.01)
    counts = {
        310: rivals.sd_decoder(),
        114: rivals.dit(),
        106: rivals.representation_decoder(),
        157: rivals.latent_network(),
    }
    for published, found in counts.items():
        assert found.as_published / 1e9 == pytest.approx(published, rel=0.01)
    with_attention = rivals.representation_decoder().total / 2e9
    assert with_attention > 1.03 * 106


def test_mf_rae_costs_what_its_paper_says_beside_mean_flow():
    """In all 263 GFLOPs against 424, 420 against 538 in two evaluations, and 1,051 at 512."""
    network, decoder = rivals.latent_network(), rivals.representation_decoder()
    dit, vae = rivals.dit(), rivals.sd_decoder()
    large = rivals.latent_network(32).as_published + rivals.representation_decoder(32).as_published
    for published, counted in (
        (263, decoder.as_published + network.as_published),
        (424, vae.as_published + dit.as_published),
        (420, decoder.as_published + 2 * network.as_published),
        (538, vae.as_published + 2 * dit.as_published),
        (1051, large),
    ):
        assert counted / 1e9 == pytest.approx(published, rel=0.01)


def test_dit_dh_is_counted_by_its_matrices_and_its_attention():
    """Of one image with a multiply-add as two: 12 d^2 numbers of a block meet every cell, the
    modulation's 6 d^2 meet one condition in the encoder and one of each cell in the head.
    """
    d, wide, cells = 1152, 2048, 256
    encoder = 28 * (12 * cells + 6) * d**2
    head = 2 * (12 + 6) * cells * wide**2 + 2 * cells * wide**2
    ends = cells * (768 * d + d * wide + 2 * 768 * wide) + 2 * (512 * d + d**2)
    attention = 2 * cells**2 * (28 * d + 2 * wide)
    products = rivals.latent_network()
    assert products.layers == pytest.approx(2 * (encoder + head + ends), rel=1e-3)
    assert products.attention == pytest.approx(2 * attention)


def test_every_rival_is_a_published_method():
    names = {method.name for method in results.PUBLISHED}
    assert set(rivals.RIVALS) <= names and len(names) == len(results.PUBLISHED)


def test_the_command_prints_mf_raes_comparison(capsys):
    assert costs.main(["mf-rae"]) == 0
    text = capsys.readouterr().out
    row = re.search(r"\| MF-RAE in all \| ([\d.]+) \| 263 \| ([\d.]+) \|", text)
    assert float(row[1]) == pytest.approx(263, rel=0.01)
    products = (rivals.representation_decoder(), rivals.latent_network())
    assert float(row[2]) == pytest.approx(sum(each.total for each in products) / 1e9, abs=0.1)


@pytest.mark.parametrize("name", ["rae-dinov2", "rae-siglip2", "rae-mae"])
def test_a_representation_autoencoder_is_counted_with_its_published_decoder(name):
    pytest.importorskip("transformers")
    encoder = settings.EncoderConfig(name=name)
    whole, encoding = flops.whole_autoencoder(encoder, 256), flops.encoder_share(encoder, 256)
    decoder = rivals.representation_decoder().total
    assert whole.flops - encoding.flops == pytest.approx(decoder, rel=1e-6)


@pytest.fixture
def whole():
    """CrossFlow-B with VA-VAE in every step and every image loss."""
    return settings.load(CONFIGS / "crossflow-b.yaml", ["data.latents=null"])


# --- the program -------------------------------------------------------------------------------


def test_the_command_prints_its_tables_and_refuses_what_it_cannot_count(capsys, tmp_path):
    assert costs.main(["crossflow-b", "--equal", "0.75"]) == 0
    text = capsys.readouterr().out
    assert "| forward | 95.3 | 49.2 | 24.6 |" in text
    assert "75 % of the rows" in text and "40 %, assumed; not run here" in text
    assert "| crossflow-b, this code | 1-NFE latent-to-pixel | 1 | 95.3 |" in text
    assert costs.main([str(CONFIGS / "smoke.yaml")]) == 0  # no rival of its 32 pixels
    assert "DiT-XL/2 |" not in capsys.readouterr().out and "DiT-XL/2 |" in text
    refused = {
        "crossflow-huge": "crossflow-xl",
        "crossflow-b --equal 1.5": "between 0 and 1",
        "crossflow-b --batch 0": "1 or more",
        f"crossflow-b --run {tmp_path}": "train.py --profile",
        f"{CONFIGS / 'crossflow-b.yaml'} --equal 0.5": "objective.equal",
        "": "crossflow-b",
        str(tmp_path): "no configs of ImageNet",
        str(tmp_path / "none.yaml"): "cannot be read",
    }
    for command, reason in refused.items():
        assert costs.main(command.split()) == 1
        said = capsys.readouterr().err
        assert said.startswith("costs.py: ") and reason in said and "Traceback" not in said


def test_a_step_at_the_peak_is_fully_utilised(whole):
    step = cost_of(whole).step
    assert flops.utilisation(whole, rows=32, seconds=32 * step / 989e12) == pytest.approx(1)
    assert flops.utilisation(whole, rows=32, seconds=32 * step / 1e12, peak=2e12) == pytest.approx(
        0.5
    )


def test_a_profiled_run_says_the_utilisation(capsys, tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_text('{"utilisation": 0.2, "device": "a card"}')
    assert costs.main(["crossflow-b", "--run", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "20 %, measured on a card" in text and "assumed" not in text
    cost = generator_cost(preset("crossflow-b"))
    assert f"{cost.hours(0.2):,.0f} at 989" in text
    for wrong in ('{"utilisation": 2, "device": "x"}', '{"device": "x"}', "[]", "{"):
        profile.write_text(wrong)
        assert costs.main(["crossflow-b", "--run", str(tmp_path)]) == 1
        assert "profile.json" in capsys.readouterr().err


def test_a_config_is_counted_with_what_stands_beside_its_generator(whole):
    bare = dataclasses.replace(whole, perceptual=(), adversarial=None)
    estimated = dataclasses.replace(
        whole, objective=dataclasses.replace(whole.objective, estimated=True)
    )
    counts = cost_of(whole)
    losses = counts.networks[1:]
    assert counts.generator_step == generator_cost(preset("crossflow-b")).generator_step
    assert [network.name for network in cost_of(bare).networks] == ["encoder (va-vae)"]
    assert [network.name for network in losses] == [
        "lpips",
        "convnextv2_base.fcmae_ft_in22k_in1k",
        "GAN on vit_small_patch16_dinov3",
    ]
    beside = sum(network.flops for network in losses)
    assert counts.step == pytest.approx(cost_of(bare).step + beside)
    cached = dataclasses.replace(bare, data=dataclasses.replace(bare.data, latents="somewhere"))
    assert not cost_of(cached).networks
    (latents,) = cost_of(cached).trainings
    assert latents.flops == 2 * 1_281_167 * counts.networks[0].flops  # mirrored ones, too
    estimate = 0.5 * (counts.forward + counts.networks[0].flops)
    assert cost_of(estimated).step == pytest.approx(counts.step + estimate)


def test_an_image_loss_is_counted_as_what_it_runs():
    """Three passes: forward on both images, and back to one of them.

    The network's weights have no gradient.
    """
    import timm

    share = flops.image_loss("vit_tiny_patch16_224", 224, flops.PERCEPTUAL_PASSES)
    network = timm.create_model("vit_tiny_patch16_224").requires_grad_(False).eval()
    one = torch.randn(1, 3, 224, 224, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(torch.randn(1, 3, 224, 224))
        network(one).sum().backward()
    assert counter.get_total_flops() == pytest.approx(share.flops, rel=0.06)


def test_stage_one_is_counted_as_a_training_of_its_own(whole):
    stage = settings.StageOneConfig(
        channels=32, widths=(128, 128, 256, 256, 512), steps=1000, batch=256
    )
    encoder = settings.EncoderConfig(name=None, stage_one=stage)
    config = dataclasses.replace(whole, encoder=encoder)
    (training,) = cost_of(config).trainings
    assert not cost_of(whole).trainings
    parameters, forward = flops.counted(
        lambda: (flops.autoencoder(encoder), (flops.pictures(256),), {})
    )
    losses = sum(share.flops for share in flops.image_losses(whole.perceptual, None, 256))
    assert training.parameters == parameters
    assert training.flops == pytest.approx(1000 * 256 * (3 * forward + losses))


def test_gradients_compared_at_the_image_are_counted(whole):
    adaptive = dataclasses.replace(whole.adversarial, adaptive=True)
    shares = zip(
        cost_of(dataclasses.replace(whole, adversarial=adaptive)).networks[1:],
        cost_of(whole).networks[1:],
        strict=True,
    )
    ratios = [more.flops / plain.flops for more, plain in shares]
    assert ratios == pytest.approx([4 / 3, 4 / 3, 5 / 4])


def test_a_generator_of_latents_is_counted_with_the_decoder_of_its_images(whole):
    """The encoder and the decoder together are the autoencoder."""
    changes = ["generator.space=latent", "perceptual=[]", "adversarial=null"]
    changes += ["objective.kind=flow-matching", "objective.penalty=null", "data.latents=null"]
    changes += ["evaluation.evaluations=50"]
    cost = cost_of(settings.load(CONFIGS / "crossflow-b.yaml", changes))
    autoencoder = flops.whole_autoencoder(whole.encoder, 256)
    assert cost.networks[0].flops + cost.decoder == autoencoder.flops
    assert cost.generator_step == 3 * cost.forward  # no derivative
    image = (50 * cost.forward + cost.decoder) / 1e9
    row = costs.beside(cost)[0]
    assert row[1:3] == ("latent space", "50") and row[4] == f"{image:,.1f}"
    assert row[6] == f"{cost.decoder / 1e9:,.1f}"


def test_a_config_counts_its_own_optimiser_averages_and_steps(whole):
    training = dataclasses.replace(
        whole.training, optimizer="adamw", emas=(0.999,), steps=10, batch=4
    )
    cost = cost_of(dataclasses.replace(whole, training=training))
    assert cost.memory(0) == 4 * cost.parameters * (2 + 1 + 2)
    assert cost.images == 40 and cost_of(whole).images == 160 * 1_281_167


# --- the paper's numbers -----------------------------------------------------------------------


def test_the_papers_numbers_are_those_of_its_tables():
    """Tables 1 and 2 of arXiv 2606.19970, typed again from the text."""
    fids = "2.54 1.69 1.62 4.08 3.81 8.70 7.06 8.86 30.21 50.65 2.80 2.73 2.76"
    assert [row.fid for row in results.CROSSFLOW.values()] == [float(f) for f in fids.split()]
    others = {
        "DiT-XL/2": 2.27,
        "SiT-XL/2": 2.06,
        "SiT-XL/2 + REPA": 1.42,
        "ADM-G": 4.59,
        "SiD, UViT": 2.44,
        "VDM++": 2.12,
        "SiD2": 1.38,
        "PixelDiT-XL/16": 1.61,
        "iCT-XL/2": 34.24,
        "Shortcut-XL/2": 10.60,
        "MeanFlow-XL/2": 3.43,
        "iMF-XL/2": 1.72,
        "BigGAN-deep": 6.95,
        "StyleGAN-XL": 2.30,
        "GigaGAN": 3.45,
        "EPG-L/16": 8.82,
        "pMF-B/16": 3.12,
        "pMF-L/16": 2.52,
        "pMF-H/16": 2.22,
        "CrossFlow-B": 2.54,
        "CrossFlow-L": 1.69,
        "CrossFlow-XL": 1.62,
    }
    assert {m.name: m.fid for m in results.PUBLISHED if not m.source} == others


def test_only_the_papers_configs_have_a_number_of_the_paper():
    for name in results.CROSSFLOW:
        config = results.PAPER_CONFIGS / f"{name}.yaml"
        objective = settings.load(config).objective
        assert results.paper_row(config) is results.CROSSFLOW[name]
        assert objective.literal or objective.kind == "consistency", name
    for config in CONFIGS.rglob("*.yaml"):
        if config.parent != results.PAPER_CONFIGS:
            assert results.paper_row(config) is None


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A folder of configs that stands for the paper's, and the config of a run of one of them."""
    folder = tmp_path / "paper"
    folder.mkdir()
    base = CONFIGS / "crossflow-b.yaml"
    out = tmp_path / "runs" / "crossflow-b"
    literal = f"# As published.\nbase: {base}\nout: {out}\nobjective: {{literal: true}}\n"
    (folder / "crossflow-b.yaml").write_text(literal)
    (folder / "b-other.yaml").write_text(literal)
    monkeypatch.setattr(results, "PAPER_CONFIGS", folder)
    monkeypatch.setattr(costs, "PAPER_CONFIGS", folder)
    return folder


def test_a_number_of_the_paper_follows_the_folder_not_the_name(paper, tmp_path, capsys):
    assert costs.main([str(paper)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"`crossflow-b` .* \| 2\.54 \| Full CrossFlow-B \(tables 1 and 2\) \|", text)
    assert re.search(r"`b-other` .* \|  \| no number in the text \|", text)
    assert costs.main([str(paper / "crossflow-b.yaml")]) == 0
    assert "In the paper: Full CrossFlow-B, FID 2.54" in capsys.readouterr().out
    copy = tmp_path / "ours"
    copy.mkdir()
    (copy / "crossflow-b.yaml").write_text((paper / "crossflow-b.yaml").read_text())
    assert costs.main([str(copy)]) == 0
    assert "2.54" not in capsys.readouterr().out
    assert costs.main([str(copy / "crossflow-b.yaml")]) == 0
    assert "In the paper" not in capsys.readouterr().out


def test_our_number_is_that_of_a_run_with_the_same_losses(paper, capsys):
    config = settings.load(paper / "crossflow-b.yaml")
    other = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, literal=False)
    )
    eager = dataclasses.replace(
        config, generator=dataclasses.replace(config.generator, compile=False)
    )
    config.out.mkdir(parents=True)
    scores = {"values": {"FID": 3.14159}, "count": 50000}
    (config.out / "metrics.json").write_text(json.dumps(scores))
    ours = "3.14, 50,000 samples"
    for run, said in ((config, ours), (eager, ours), (other, "not run here")):
        (config.out / "config.json").write_text(json.dumps(run.as_dict()))
        assert costs.main([str(paper)]) == 0
        assert f"| {said} | 2.54 |" in capsys.readouterr().out


def test_the_examples_page_has_the_tables_that_the_commands_print(tmp_path, monkeypatch):
    page = (EXAMPLE / "README.md").read_text()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # where no run is
    assert len(costs.TABLES.findall(page)) == 3
    made = costs.with_tables(page)
    assert made == page, (
        "run: python examples/imagenet/costs.py --write examples/imagenet/README.md"
    )


def test_tables_are_written_where_the_page_names_their_command(tmp_path, capsys):
    begin = "<!-- table: python examples/imagenet/costs.py crossflow-b -->\n"
    end = "\n<!-- end of table -->\n"
    page = tmp_path / "page.md"
    page.write_text(f"above\n{begin}old{end}below\n")
    assert costs.main(["--write", str(page)]) == 0
    assert costs.main(["crossflow-b"]) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert page.read_text() == f"above\n{begin}{printed}{end}below\n"
