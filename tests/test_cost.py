"""Costs: counted ones equal closed forms, and a counted training step is what the formula says."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("timm")

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowspace import CrossFlowLoss, InputError
from flowspace.cli import main
from flowspace.vision import CrossFlowGenerator
from flowspace.vision.cost import Cost, Share, generator_cost, rivals

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "imagenet" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", ["crossflow-b", "crossflow-l", "crossflow-xl"])
def test_the_forward_pass_is_that_of_its_matrices_and_its_attention(preset):
    cost = generator_cost(preset)
    with torch.device("meta"):
        c = CrossFlowGenerator.from_preset(preset).config
    d, layers, cells, tokens = c["width"], c["depth"], 256, 272
    blocks = layers * (2 * tokens * 12 * d**2 + 2 * 2 * tokens**2 * d)
    ends = 2 * cells * (32 * d + d * 768)
    assert cost.forward == pytest.approx(blocks + ends, rel=3e-3)


def test_a_counted_training_step_is_what_the_formula_says():
    settings = {
        "channels": 16,
        "grid": 8,
        "patch": 2,
        "classes": 10,
        "depth": 4,
        "width": 192,
        "heads": 3,
    }
    cost = generator_cost("crossflow-b", **settings)
    network, rows = CrossFlowGenerator(**settings), 8
    z, x = torch.randn(rows, 16, 8, 8), torch.randn(rows, 3, 16, 16)
    t = torch.full((rows,), 0.8)
    for share in (0.0, 0.5, 1.0):
        s = torch.where(torch.arange(rows) < share * rows, t, 0.3)
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):  # fused kernels go uncounted on a CPU
            CrossFlowLoss()(
                network, z, x, t=t, s=s, cond={"labels": torch.zeros(rows).long()}
            ).loss.mean().backward()
        wanted = rows * Cost("", 0, cost.forward, share, 0.0, 0).step
        assert counter.get_total_flops() == pytest.approx(wanted, rel=0.06), share


def test_sharding_divides_what_is_held_but_not_the_activations():
    cost = Cost("x", 1000, 1.0, 0.5, 10.0, 800)
    held = 4 * (1000 * 5 + 800 + 2 * 200)
    assert cost.memory(3) == held + 30
    assert cost.memory(3, 8, True) == held / 8 + 30
    beside = Cost("x", 1000, 1.0, 0.5, 10.0, 800, 1, (Share("encoder", 3, 2.0),))
    assert beside.hours(100.0, 0.5, 360) == pytest.approx(5.5 * 360 / 50 / 3600)


def test_rivals_have_their_published_costs():
    found = {
        name: (parameters, gflops, decoder) for name, parameters, gflops, decoder, _ in rivals()
    }
    dit = found["MeanFlow-XL/2 + SD-VAE decoder"]
    assert float(dit[1]) - float(dit[2]) == pytest.approx(2 * 118.6, rel=0.02)
    assert float(dit[2]) == pytest.approx(2 * 310, rel=0.02)
    rae = next(row for name, row in found.items() if name.startswith("MF-RAE"))
    assert float(rae[1]) == pytest.approx(
        0.62 * float(dit[1]), rel=0.05
    )  # its abstract: 38 % fewer than MeanFlow's


def test_the_command_prints_the_tables_and_refuses_what_is_no_preset(capsys):
    assert main(["cost", "crossflow-b", "--equal", "0.75"]) == 0
    text = capsys.readouterr().out
    assert "95.3 million" in text and "75% of the rows" in text and "not run here" in text
    assert main(["cost", "crossflow-huge"]) == 1
    assert "crossflow-xl" in capsys.readouterr().err
    with pytest.raises(InputError, match="share"):
        generator_cost("crossflow-b", equal=1.5)


def test_a_config_is_counted_with_what_stands_beside_its_generator(tmp_path, capsys):
    from flowspace.recipes.config import load
    from flowspace.recipes.imagenet.costs import cost_of

    configs = Path(__file__).parents[1] / "examples" / "imagenet" / "configs"
    whole, bare = (
        cost_of(load(configs / f"{name}.yaml")) for name in ("crossflow-b", "b-neither")
    )
    assert whole.step == bare.step == generator_cost("crossflow-b").step
    assert [share.name for share in bare.beside] == ["encoder (va-vae)"] and len(whole.beside) == 4
    assert whole.whole == pytest.approx(bare.whole + sum(share.step for share in whole.beside[1:]))
    assert not cost_of(load(configs / "b-neither.yaml", ["data.latents=somewhere"])).beside
    assert cost_of(load(configs / "b-estimated.yaml")).whole > whole.whole
    assert main(["cost", str(configs / "smoke.yaml")]) == 0
    assert "GAN on tf_efficientnet_lite0" in capsys.readouterr().out


def test_an_image_loss_is_counted_as_what_it_runs():
    """Three passes: forward on both images, and back to one of them, through weights without a
    gradient.
    """
    import timm

    from flowspace.recipes.imagenet.costs import PERCEPTUAL_PASSES, _image_loss

    share = _image_loss("vit_tiny_patch16_224", 224, PERCEPTUAL_PASSES, "x")
    network = timm.create_model("vit_tiny_patch16_224").requires_grad_(False).eval()
    one = torch.randn(1, 3, 224, 224, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(torch.randn(1, 3, 224, 224))
        network(one).sum().backward()
    assert counter.get_total_flops() == pytest.approx(share.step, rel=0.06)


def test_trainings_apart_from_the_generators_are_counted():
    from flowspace.recipes.config import load
    from flowspace.recipes.imagenet.costs import cost_of

    configs = ROOT / "examples" / "imagenet" / "configs"
    latent, stage, plain, adaptive = (
        cost_of(load(configs / f"{name}.yaml"))
        for name in ("b-latent", "b-stage-one", "crossflow-b", "b-gan-adaptive")
    )
    assert [share.name for share in latent.apart + stage.apart] == ["latent generator", "stage 1"]
    more = (
        64
        * 1_281_167
        * (3 * generator_cost(None, 1.0, **LIGHTNING).forward + plain.beside[0].step)
    )
    assert latent.apart[0].step == pytest.approx(more)
    assert latent.hours() - plain.hours() == pytest.approx(more / (0.4 * 989e12) / 3600)
    assert adaptive.whole > plain.whole


LIGHTNING = {
    "depth": 12,
    "width": 768,
    "heads": 12,
    "channels": 32,
    "grid": 16,
    "patch": 1,
    "outputs": 32,
}


def test_the_examples_page_has_the_table_that_the_command_prints(tmp_path, monkeypatch, capsys):
    page = (ROOT / "examples" / "imagenet" / "README.md").read_text()
    found = re.search(r"<!-- table: flowspace (.*) -->\n(.*?)\n<!-- end of table -->", page, re.S)
    assert found
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)  # where no run is
    assert main(found[1].split()) == 0
    assert capsys.readouterr().out.strip() == found[2]
    rows = [line.split(" | ") for line in found[2].splitlines()[2:]]
    assert len(rows) == len(
        [
            path
            for path in CONFIGS
            if "preset: null" not in path.read_text() and path.stem != "openmoji"
        ]
    )
    (tmp_path / "runs" / "b-adamw").mkdir(parents=True)
    (tmp_path / "runs" / "b-adamw" / "metrics.json").write_text('{"values": {"FID": 3.14159}}')
    assert main(found[1].split()) == 0
    assert "| 3.14 |" in capsys.readouterr().out
    assert main(["cost", str(tmp_path)]) == 1
    assert "no configs with a preset" in capsys.readouterr().err
