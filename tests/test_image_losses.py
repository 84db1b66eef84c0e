"""Perceptual and adversarial losses: what they compare, whose gradient flows, and what they
refuse.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from flowspace import (
    AbsoluteError,
    CrossFlowLoss,
    HuberError,
    InputError,
    LinearSchedule,
    RunError,
    Schedule,
    SquaredError,
    Statistic,
)
from flowspace.vision.adversarial import (
    CHANGES,
    AdversarialLoss,
    Discriminator,
    augment,
    balance,
    tokens_of,
)
from flowspace.vision.perceptual import (
    FeatureNetwork,
    PerceptualLoss,
    TimmFeatures,
    literal_pair,
)


class Small(FeatureNetwork):
    """Two layers of random features."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(channels, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.requires_grad_(False)

    def forward(self, images):
        first = self.first(images)
        return [first, self.second(torch.relu(first))]


def pictures(rows=4, side=16, seed=0):
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_loss_is_the_penalty_of_the_features_averaged_over_layers_and_zero_for_equal_images():
    features, x, y = Small(), pictures(), pictures(seed=1)
    loss = PerceptualLoss(features, SquaredError())
    by_hand = [
        (a - b).square().flatten(1).mean(1) for a, b in zip(features(x), features(y), strict=True)
    ]
    torch.testing.assert_close(loss(x, y), sum(by_hand) / 2)
    assert torch.equal(loss(x, x), torch.zeros(4))


def test_the_gradient_flows_to_the_prediction_alone():
    features = Small()
    x, y = pictures().requires_grad_(), pictures(seed=1).requires_grad_()
    PerceptualLoss(features)(x, y).sum().backward()
    assert (
        x.grad.abs().sum() > 0
        and y.grad is None
        and all(p.grad is None for p in features.parameters())
    )


def test_below_counts_only_the_rows_that_are_nearer_to_the_data():
    features, x, y = Small(), pictures().requires_grad_(), pictures(seed=1)
    t = torch.tensor([0.2, 0.9, 0.5, 1.0])
    whole, some = PerceptualLoss(features)(x, y), PerceptualLoss(features, below=0.6)(x, y, t)
    torch.testing.assert_close(some, torch.where(t < 0.6, whole, 0.0))
    none = PerceptualLoss(features, below=0.1)(x, y, t)
    none.sum().backward()
    assert torch.equal(none, torch.zeros(4)) and torch.equal(x.grad, torch.zeros_like(x))
    with pytest.raises(InputError, match="without times"):
        PerceptualLoss(features, below=0.6)(x, y)


@pytest.mark.parametrize("penalty", [SquaredError(), HuberError()])
def test_below_takes_what_autocast_rounds(penalty):
    """The penalties of some rows are not always of the prediction's type."""
    features, x, y = Small(), pictures().requires_grad_(), pictures(seed=1)
    t = torch.tensor([0.2, 0.9, 0.5, 1.0])
    with torch.autocast("cpu", torch.bfloat16):
        whole = PerceptualLoss(features, penalty)(x, y)
        some = PerceptualLoss(features, penalty, below=0.6)(x, y, t)
    assert some.dtype == whole.dtype
    torch.testing.assert_close(some, torch.where(t < 0.6, whole, 0.0))
    some.float().sum().backward()
    assert x.grad.isfinite().all()


def test_unit_features_do_not_see_their_size():
    class Scaled(Small):
        def forward(self, images):
            return [3 * layer for layer in super().forward(images)]

    x, y = pictures(), pictures(seed=1)
    torch.testing.assert_close(*(PerceptualLoss(f, unit=True)(x, y) for f in (Small(), Scaled())))


class Both(nn.Module):
    """A map and tokens, whose channels stand at different axes."""

    def forward(self, images):
        return [images, images[:, 0]]


def test_unit_features_are_of_length_one_along_the_channels_of_maps_and_of_tokens():
    x, y = pictures(), pictures(seed=1)
    found = PerceptualLoss(Both(), SquaredError(), unit=True)(x, y)
    of_map = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
    a, b = x[:, 0], y[:, 0]
    of_tokens = a / a.norm(dim=2, keepdim=True) - b / b.norm(dim=2, keepdim=True)
    wanted = of_map.square().mean((1, 2, 3)) + of_tokens.square().mean((1, 2))
    torch.testing.assert_close(found, wanted / 2)


def test_a_limit_of_one_takes_all_rows_but_those_of_noise_alone_and_none_is_the_default():
    x, y, t = pictures(), pictures(seed=1), torch.tensor([0.2, 1.0, 0.999, 1.0])
    whole = PerceptualLoss(Both())(x, y)
    assert (whole > 0).all()
    torch.testing.assert_close(
        PerceptualLoss(Both(), below=1.0)(x, y, t), torch.where(t < 1, whole, 0.0)
    )


def test_only_the_first_targets_are_looked_at():
    """It waits for the device."""
    loss = PerceptualLoss(Both())
    with pytest.raises(InputError, match=r"127\.5"):
        loss(pictures(), torch.full((4, 3, 16, 16), 1.6))
    loss(pictures(), torch.full((4, 3, 16, 16), 1.4))
    loss(pictures(), torch.full((4, 3, 16, 16), 100.0))


def test_a_wrong_range_or_shape_is_refused():
    loss = PerceptualLoss(Small())
    with pytest.raises(InputError, match=r"127\.5"):
        loss(pictures(), 127.5 * (pictures() + 1))
    with pytest.raises(InputError, match="for a target of"):
        loss(pictures(), pictures(2))


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_timms_networks_are_frozen_features_of_normalised_images(name, tmp_path):
    import timm

    torch.manual_seed(0)
    sized = {"img_size": 64} if "vit" in name else {}
    torch.save(timm.create_model(name, **sized).state_dict(), tmp_path / "weights.pt")
    features = TimmFeatures(name, weights=tmp_path / "weights.pt", size=64, layers=[0, 1])
    x = pictures(2, 32).requires_grad_()
    found = features(x)
    assert len(found) == 2 and not features.train().network.training
    PerceptualLoss(features)(x, pictures(2, 32, 1)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in features.parameters())
    last = TimmFeatures(
        name, weights=tmp_path / "weights.pt", size=64, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    wanted = last.network.forward_features(
        nn.functional.interpolate((x + 1) / 2, (64, 64), mode="bicubic", antialias=True)
    )
    torch.testing.assert_close(last(x)[0], wanted)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(("size", "shape"), [(64, (64, 64)), ((32, 64), (32, 64))])
def test_rectangles_are_resized_in_both_directions_even_where_one_fits(
    name, size, shape, tmp_path
):
    import timm

    torch.manual_seed(0)
    sized = {"img_size": shape} if "vit" in name else {}
    torch.save(timm.create_model(name, **sized).state_dict(), tmp_path / "weights.pt")
    features = TimmFeatures(
        name, weights=tmp_path / "weights.pt", size=size, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    x = pictures(2, 64)[:, :, :48]
    resized = nn.functional.interpolate((x + 1) / 2, shape, mode="bicubic", antialias=True)
    wanted = features.network.forward_features(resized)
    torch.testing.assert_close(features(x)[0], wanted)
    assert PerceptualLoss(features)(x, x.flip(0)).shape == (2,)


def test_a_size_that_is_no_shape_is_refused():
    for size in (0, (64,), (64, -1), "64"):
        with pytest.raises(InputError, match="got size = "):
            TimmFeatures("convnext_atto", size=size)


def test_weights_under_other_names_load_by_their_order_and_what_does_not_fit_is_refused(tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("convnext_atto")
    torch.save(
        {f"renamed.{i}": v for i, v in enumerate(network.state_dict().values())},
        tmp_path / "renamed.pt",
    )
    features = TimmFeatures("convnext_atto", weights=tmp_path / "renamed.pt", size=32)
    for mine, theirs in zip(
        features.network.state_dict().values(), network.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(RunError, match="do not fit"):
        TimmFeatures("convnext_atto", weights=tmp_path / "other.pt", size=32)
    first, *_ = network.state_dict()
    torch.save(network.state_dict() | {first: torch.zeros(3)}, tmp_path / "shapes.pt")
    with pytest.raises(RunError, match="tensors of other shapes"):
        TimmFeatures("convnext_atto", weights=tmp_path / "shapes.pt", size=32)


def test_images_are_resized_to_224_pixels_where_nothing_is_said(tmp_path):
    import timm

    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("convnext_atto").state_dict(), path)
    found = TimmFeatures("convnext_atto", weights=path)(pictures(1, 32))[0]
    assert found.shape[2:] == (224 // 32, 224 // 32)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("convnext_ato", InputError, "near are .*convnext_atto"),
        ("0123456789", InputError, r"see timm\.list_models\(\)"),
        ("hf-hub:someone/network", RunError, "no weights of hf-hub:someone/network"),
        ("convnext_atto", RunError, "no weights of convnext_atto on this machine .*offline"),
    ],
)
def test_a_name_is_timms_or_the_hubs_and_weights_that_are_not_there_are_told(
    name, error, says, monkeypatch
):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(error, match=says):
        TimmFeatures(name)


def test_lpips_is_zero_for_equal_images_and_positive_for_others(tmp_path):
    pytest.importorskip("lpips")
    import torchvision

    from flowspace.vision.perceptual import LearnedDistance

    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "alexnet.pth")
    loss, x, y = (
        PerceptualLoss(LearnedDistance("alex", tmp_path / "alexnet.pth")),
        pictures(2, 64),
        pictures(2, 64, 1),
    )
    assert loss(x, x).abs().max() < 1e-6 and (loss(x, y) > 0).all() and loss(x, y).shape == (2,)
    x.requires_grad_(), y.requires_grad_()
    loss(x, y).sum().backward()
    assert x.grad.abs().sum() > 0 and y.grad is None
    assert not any(p.requires_grad for p in loss.features.parameters())
    with pytest.raises(InputError, match="distance of two images"):
        loss.features(x)
    with pytest.raises(RunError, match="right shape"):
        LearnedDistance("vgg", tmp_path / "alexnet.pth")
    weights = torch.load(tmp_path / "alexnet.pth", weights_only=True)
    torch.save(weights | {"features.0.weight": torch.zeros(3)}, tmp_path / "shapes.pth")
    with pytest.raises(RunError, match="right shape"):
        LearnedDistance("alex", tmp_path / "shapes.pth")


def literal_rows(t, s, **options):
    """A loss of rows at these times, its output, the images, and D_t f by torch.func.jvp."""
    loss_fn = CrossFlowLoss(penalty=AbsoluteError(), **options)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=draw, dtype=torch.float64, requires_grad=True)

    def model(z, t, s):
        return torch.tanh(z @ weight) * (1 + t)[:, None] + s[:, None]

    z, x, noise = torch.randn(3, len(t), 6, generator=draw, dtype=torch.float64)
    out = loss_fn(model, z, x, noise=noise, t=t, s=s)
    z_t, v = LinearSchedule().perturb(z, noise, t)
    slope = torch.func.jvp(lambda a, b: model(a, b, s), (z_t, t), (v, torch.ones_like(t)))[1]
    return loss_fn, out, x, slope.detach()


TIMES = [[0.9, 0.8, 0.5, 0.6, 1.0], [0.8, 0.1, 0.5, 0.02, 0.5]]


@pytest.mark.parametrize("bound", [None, 0.3, 1.0, 4.0])
def test_the_literal_pair_is_the_prediction_moved_along_its_derivative(bound):
    t, s = torch.tensor(TIMES, dtype=torch.float64)
    loss_fn, out, x, slope = literal_rows(t, s)
    step = (t * (t - s) / s).clamp(max=bound or torch.inf)
    found, wanted = literal_pair(loss_fn, out, x, bound)
    torch.testing.assert_close(found, out.prediction + step[:, None] * slope, rtol=1e-9, atol=1e-9)
    assert wanted is x and found.requires_grad


def test_the_bound_is_of_steps_of_either_sign():
    """Of b = (t - s)(t + s - 1.5), for which b/a is 4.2 and -4.2."""
    statistic = Statistic.from_kappa(LinearSchedule(), "s", "1/((t - s)*(t + s - 1.5))")
    t, s = torch.tensor([[0.7, 0.8], [0.1, 0.1]], dtype=torch.float64)
    loss_fn, out, x, slope = literal_rows(t, s, statistic=statistic, check=False)
    for bound, steps in ((None, [4.2, -4.2]), (3.0, [3, -3])):
        found, _ = literal_pair(loss_fn, out, x, bound)
        moved = torch.tensor(steps, dtype=torch.float64)[:, None] * slope
        torch.testing.assert_close(found, out.prediction + moved, rtol=1e-9, atol=1e-9)


def test_without_a_bound_the_literal_pair_is_the_residual_without_its_weight():
    t, s = torch.tensor(TIMES, dtype=torch.float64)
    loss_fn, out, x, _ = literal_rows(t, s)
    weight = loss_fn.coefficients.prediction(t, s)[:, None]
    found, _ = literal_pair(loss_fn, out, x)
    torch.testing.assert_close(found - x, out.residual / weight, rtol=1e-9, atol=1e-9)


def test_at_s_0_there_is_no_literal_pair_and_the_row_counts_nothing_unless_it_is_bounded():
    t = torch.tensor([0.6, 0.6], dtype=torch.float64)
    loss_fn, out, x, slope = literal_rows(t, torch.tensor([0.0, 0.3], dtype=torch.float64))
    found, _ = literal_pair(loss_fn, out, x)
    assert torch.equal(found[0], x[0]) and not torch.equal(found[1], x[1])
    found.sum().backward(inputs=out.prediction)
    assert torch.equal(out.prediction.grad[:, 0], torch.tensor([0.0, 1.0], dtype=torch.float64))
    bounded, _ = literal_pair(loss_fn, out, x, 1.0)
    torch.testing.assert_close(bounded[0], out.prediction[0] + slope[0], rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="got largest_step = 0"):
        literal_pair(loss_fn, out, x, 0)


def test_at_the_papers_times_a_third_of_the_rows_move_by_more_than_their_derivative():
    """The numbers of `literal_pair`'s page."""
    draw = torch.Generator().manual_seed(0)
    t, s = CrossFlowLoss.published(32 * 16 * 16).times(400_000, generator=draw)
    step = (t * (t - s) / s)[s < t]
    found = torch.stack([step.median(), (step > 1).float().mean(), (step > 4).float().mean()])
    torch.testing.assert_close(found, torch.tensor([0.516, 0.341, 0.107]), rtol=0.02, atol=0)
    assert 60 < step.max() < 70


# --- adversarial
# -------------------------------------------------------------------------------------------------


def judge():
    return Discriminator(Small(), [6, 8], width=8, kernel=3)


def test_hinge_losses_are_those_of_the_paper():
    critic, loss = judge(), AdversarialLoss(LinearSchedule(), augmented=False)
    critic.eval()
    real, fake, t = pictures(), pictures(seed=1), torch.tensor([0.0, 0.25, 0.5, 1.0])
    levels = ((fake + 1) * 127.5).round() / 127.5 - 1
    on_real, on_fake = critic(real), critic(levels)
    wanted = 0.5 * (torch.relu(1 - on_real).mean(1) + torch.relu(1 + on_fake).mean(1))
    torch.testing.assert_close(loss.discriminator(critic, real, fake), wanted)
    torch.testing.assert_close(loss.generator(critic, fake, t), -(1 - t) * critic(fake).mean(1))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_generators_weight_falls_with_the_noise(power):
    t = torch.linspace(0, 1, 9)
    torch.testing.assert_close(
        AdversarialLoss(LinearSchedule(), power=power).weight(t), (1 - t) ** power
    )


def test_the_weight_at_noise_is_a_number_where_alpha_is_rounded_below_zero():
    rounded = Schedule("1 - t - t**50/10**9", "t")
    one = torch.ones(1, dtype=torch.float64)
    assert float(rounded.alpha(one)) < 0
    assert float(AdversarialLoss(rounded, power=0.5).weight(one)) == 0


def test_each_turn_moves_its_own_player_only():
    critic, loss = judge(), AdversarialLoss(LinearSchedule())
    fake = pictures(seed=1).requires_grad_()
    loss.discriminator(critic, pictures(), fake).mean().backward()
    assert fake.grad is None and all(p.grad is not None for p in critic.heads.parameters())
    assert all(not p.requires_grad for p in critic.features.parameters())
    loss.generator(critic, fake, torch.full((4,), 0.3)).mean().backward()
    assert fake.grad.abs().sum() > 0


def test_a_discriminator_learns_to_tell_two_kinds_of_pictures_apart():
    torch.manual_seed(0)
    critic, loss = judge(), AdversarialLoss(LinearSchedule(), penalty=1e-3)
    optimizer = torch.optim.Adam(critic.heads.parameters(), 2e-2, betas=(0.5, 0.9))
    draw = torch.Generator().manual_seed(0)
    for step in range(120):
        real = torch.tanh(nn.functional.avg_pool2d(8 * pictures(16, 16, step), 3, 1, 1))
        value = loss.discriminator(
            critic, real, pictures(16, 16, 1000 + step), torch.rand(16, CHANGES, generator=draw)
        ).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value < 0.9
    real = torch.tanh(nn.functional.avg_pool2d(8 * pictures(16, 16, 5000), 3, 1, 1))
    assert critic(real).mean() > critic(pictures(16, 16, 6000)).mean() + 0.2


def test_a_head_is_its_formula_and_sees_positions_as_on_a_circle():
    """Features are normalised; then leaky(A x), a residual convolution, and a logit."""
    head = Discriminator(Small(), [6], width=5, kernel=3).double().eval().heads[0]
    tokens = torch.randn(2, 6, 7, dtype=torch.float64)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    def layer(module, x):
        return torch.einsum("oi,bin->bon", module.weight[..., 0], x) + module.bias[:, None]

    spread = tokens.var(1, unbiased=False, keepdim=True)
    x = (tokens - tokens.mean(1, keepdim=True)) / (spread + 1e-5).sqrt()
    x = leaky(layer(head.first, x))
    around = head.second.bias[:, None]
    for place in range(3):
        weight = head.second.weight[..., place]
        around = around + torch.einsum("oi,bin->bon", weight, x.roll(1 - place, 2))
    wanted = layer(head.last, (x + leaky(around)) / 2**0.5)
    torch.testing.assert_close(head(tokens), wanted)
    torch.testing.assert_close(head(tokens.roll(2, 2)), wanted.roll(2, 2))


def test_every_layer_of_a_head_stretches_by_one_at_most():
    head = Discriminator(Small(), [6], width=5, kernel=3).heads[0]
    for layer in (head.first, head.second, head.last):
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(7)
    for _ in range(30):
        head(torch.randn(2, 6, 7))
    for layer in (head.first, head.second, head.last):
        size = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(size) == pytest.approx(1, abs=0.02)


def test_tokens_are_positions_of_maps_and_tokens_and_one_of_a_vector():
    features = torch.randn(2, 5, 3, 4)
    assert torch.equal(tokens_of(features)[:, :, 5], features[:, :, 1, 1])
    tokens = torch.randn(2, 7, 5)
    assert torch.equal(tokens_of(tokens)[:, :, 6], tokens[:, 6])
    assert torch.equal(tokens_of(tokens[:, 0])[:, :, 0], tokens[:, 0])


def test_heads_that_do_not_fit_their_features_are_refused():
    with pytest.raises(InputError, match="2 layers for 1 heads"):
        Discriminator(Small(), [6])(pictures())
    with pytest.raises(InputError, match="got kernel = 4"):
        Discriminator(Small(), [6, 8], kernel=4)


class Seen(nn.Module):
    """Logits that keep the images they are of."""

    def forward(self, images):
        self.images = images
        return images.flatten(1)


def test_the_discriminator_sees_images_as_they_are_stored_and_a_row_s_pair_changed_alike():
    critic, fake = Seen(), 1.5 * pictures()
    AdversarialLoss(LinearSchedule(), augmented=False).discriminator(critic, fake, fake)
    real, stored = critic.images.chunk(2)
    assert torch.equal(real, fake)
    levels = (stored + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert (stored - fake.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6
    both, changes = levels.round() / 127.5 - 1, torch.rand(4, CHANGES)
    AdversarialLoss(LinearSchedule()).discriminator(critic, both, both, changes)
    torch.testing.assert_close(*critic.images.chunk(2))


def test_lecams_term_draws_logits_to_the_other_sides_mean():
    """Of real and fake logits alike; the means get no gradient."""
    real, fake = pictures(seed=2), pictures().requires_grad_()
    levels = ((fake.detach() + 1) * 127.5).round() / 127.5 - 1
    slope = torch.nn.Parameter(torch.ones(()))
    plain, with_term = (
        AdversarialLoss(LinearSchedule(), augmented=False, penalty=weight).discriminator(
            lambda images: slope * images.flatten(1), real, fake
        )
        for weight in (0.0, 0.3)
    )
    on_real, on_fake = (slope * images.flatten(1) for images in (real, levels))
    wanted = (on_real - on_fake.mean().detach()).square().mean(1)
    wanted = 0.3 * (wanted + (on_fake - on_real.mean().detach()).square().mean(1))
    torch.testing.assert_close(with_term - plain, wanted)
    found, asked = (
        torch.autograd.grad(loss.sum(), slope, retain_graph=True)[0]
        for loss in (with_term - plain, wanted)
    )
    torch.testing.assert_close(found, asked)


def test_the_generators_loss_keeps_the_precision_of_the_images():
    t = torch.full((4,), 0.3, dtype=torch.float64)
    loss = AdversarialLoss(LinearSchedule()).generator(Seen(), pictures(), t)
    assert loss.dtype == torch.float32


def test_r1_is_half_of_the_squared_gradient_at_real_images():
    critic = judge().double().eval()
    real, fake = pictures().double(), pictures(seed=1).double()
    plain, with_r1 = (
        AdversarialLoss(LinearSchedule(), augmented=False, r1=weight).discriminator(
            critic, real, fake
        )
        for weight in (0.0, 3.0)
    )
    real.requires_grad_()
    (slope,) = torch.autograd.grad(critic(real).mean(1).sum(), real)
    torch.testing.assert_close(with_r1 - plain, 1.5 * slope.square().flatten(1).sum(1))
    (with_r1 - plain).sum().backward()


def test_augmentation_shifts_by_whole_pixels_follows_its_generator_and_has_a_gradient():
    x = pictures(8, 16).requires_grad_()
    draws = (
        torch.rand(8, CHANGES, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    first, again, other = (augment(x, changes) for changes in draws)
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == x.shape
    first.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    empty = (first == 0).all(1).flatten(1).float().mean(1)
    assert empty.max() <= 1 - (14 / 16) ** 2 + 1e-6


@pytest.mark.parametrize("shape", [(16, 8), (8, 24), (3, 5)])
def test_augmentation_is_brightness_then_saturation_then_contrast_then_a_shift(shape):
    height, width = shape
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, height, width, generator=draw, dtype=torch.float64)
    changes = torch.rand(5, CHANGES, generator=draw, dtype=torch.float64)
    found = augment(images, changes)
    for image, numbers, changed in zip(images, changes.tolist(), found, strict=True):
        brightness, saturation, contrast, vertical, horizontal = numbers
        x = image + brightness - 0.5
        grey = x.mean(0)
        x = grey + 2 * saturation * (x - grey)
        x = x.mean() + (0.5 + contrast) * (x - x.mean())
        down = round((2 * vertical - 1) * height / 8)
        right = round((2 * horizontal - 1) * width / 8)
        for i in range(height):
            for j in range(width):
                wanted = torch.zeros(3, dtype=torch.float64)
                if 0 <= i + down < height and 0 <= j + right < width:
                    wanted = x[:, i + down, j + right]
                torch.testing.assert_close(changed[:, i, j], wanted)


def test_the_balance_has_a_floor_and_a_bound_and_is_formed_in_float32():
    images = torch.ones(3, 3, 2, 2, requires_grad=True)
    sums = images.sum((1, 2, 3))
    slope = 12**0.5  # of a sum over 12 numbers
    main = sums / slope
    weak = torch.tensor([0.0, 1e-6, 1e-3])
    found = balance(main, weak * sums / slope, images)
    torch.testing.assert_close(found, torch.tensor([1e4, 1e4, 1 / (1e-3 + 1e-6)]))
    found = balance(1e-3 * main, weak * sums / slope, images)
    torch.testing.assert_close(found, torch.tensor([1e3, 5e2, 1e-3 / (1e-3 + 1e-6)]))
    half = torch.ones(2, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    assert balance(half.sum((1, 2, 3)), half.sum((1, 2, 3)), half).dtype == torch.float32


def test_the_balance_makes_both_gradients_of_an_image_equally_long_whatever_the_other_images_are():
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    main, other = images.square().flatten(1).mean(1), 0.1 * images.abs().flatten(1).sum(1)
    slopes = [
        torch.autograd.grad(loss.sum(), images, retain_graph=True)[0].flatten(1)
        for loss in (main, other)
    ]
    found = balance(main, other, images)
    torch.testing.assert_close(
        found * slopes[1].norm(dim=1), slopes[0].norm(dim=1), rtol=1e-4, atol=1e-5
    )
    one = images[2:3].detach().requires_grad_()
    alone = balance(one.square().flatten(1).mean(1), 0.1 * one.abs().flatten(1).sum(1), one)
    torch.testing.assert_close(alone, found[2:3])
    assert not found.requires_grad


def test_negative_weights_are_refused():
    for name in ("power", "penalty", "r1"):
        with pytest.raises(InputError, match=name):
            AdversarialLoss(LinearSchedule(), **{name: -1.0})


def counting(graphs):
    """A backend of torch.compile that keeps what it was given and runs it as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_compiled_features_are_those_of_eager_ones_in_both_losses(name, tmp_path):
    import timm

    torch.manual_seed(0)
    sized = {"img_size": 32} if "vit" in name else {}
    torch.save(timm.create_model(name, **sized).state_dict(), tmp_path / "weights.pt")
    given = {"weights": tmp_path / "weights.pt", "size": 32, "layers": [0, 1]}
    graphs, more = [], []
    plain, compiled = TimmFeatures(name, **given), TimmFeatures(name, **given)
    assert compiled.compile_network(backend=counting(graphs)) is compiled
    x = pictures(2, 48).requires_grad_()
    found = [PerceptualLoss(f)(x, pictures(2, 48, 1)) for f in (plain, compiled)]
    torch.testing.assert_close(*found)
    assert graphs
    slopes = [torch.autograd.grad(loss.sum(), x)[0] for loss in found]
    torch.testing.assert_close(*slopes)
    channels = [tokens_of(layer).shape[1] for layer in plain(x)]
    torch.manual_seed(1)
    critic = Discriminator(plain, channels, width=8, kernel=3).eval()
    wanted = critic(x)
    critic.compile_network(backend=counting(more))
    torch.testing.assert_close(critic(x), wanted)
    assert more
