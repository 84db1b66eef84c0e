"""The scheduler of diffusers that takes a flow map's step, in their own pipelines; and theirs
against our solvers.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net
from strategies import PRESETS, any_statistics_for, formula_schedules, normal
from torch import nn

pytest.importorskip("diffusers")

import diffusers

from flowspace import (
    CosineSchedule,
    CrossFlowLoss,
    Euler,
    FlowMap,
    FlowspaceError,
    InputError,
    LinearSchedule,
    MatchedStatistic,
    MeanFlowLoss,
    MeanFlowStatistic,
    Schedule,
    Statistic,
    TimeError,
    VelocityFlow,
)
from flowspace.vision import FlowMapScheduler, PipelineNetwork


class Small(nn.Module):
    """A network of two times and classes on pictures of 2 x 4 x 4."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 2, 3, padding=1)
        self.label = nn.Embedding(6, 2)

    def forward(self, z, t, s, labels=None):
        f = torch.tanh(self.convolution(z)) * (1 + t * s).reshape(-1, 1, 1, 1)
        if labels is not None:
            f = f + self.label(labels)[:, :, None, None] * (t - s).reshape(-1, 1, 1, 1)
        return f


def looped(scheduler, model, z, steps, generator=None):
    """What a pipeline does with a scheduler."""
    scheduler.set_timesteps(steps)
    z = z * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t, s = (time.to(z).expand(len(z)) for time in scheduler.pair(timestep))
        f = model(scheduler.scale_model_input(z, timestep), t, s)
        z = scheduler.step(f, timestep, z, generator=generator).prev_sample
    return z


# --- ours in a loop of diffusers


@given(data=st.data(), steps=st.integers(1, 6))
@settings(max_examples=12)
def test_a_loop_over_the_scheduler_is_the_sampler_of_the_flow_map(data, steps):
    schedule = data.draw(formula_schedules)
    statistic = data.draw(any_statistics_for(schedule))
    flow_map = FlowMap(Net().float(), schedule, statistic)
    noise = normal(1, 5, 3).float()
    scheduler = FlowMapScheduler.of(flow_map)
    torch.testing.assert_close(
        looped(scheduler, flow_map.model, noise, steps),
        flow_map.sample(noise, steps=steps),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("loss_fn", [CrossFlowLoss(), MeanFlowLoss()], ids=["cross", "mean"])
@pytest.mark.parametrize("steps", [1, 3])
def test_with_fresh_noise_it_is_the_sampler_of_consistency_models(loss_fn, steps):
    flow_map = loss_fn.flow_map(Net().float())
    noise, draws = normal(1, 5, 3).float(), [torch.Generator().manual_seed(3) for _ in range(2)]
    scheduler = FlowMapScheduler.of(flow_map, renoise=True)
    torch.testing.assert_close(
        looped(scheduler, flow_map.model, noise, steps, generator=draws[0]),
        flow_map.sample(noise, steps=steps, renoise=True, generator=draws[1]),
        rtol=1e-6,
        atol=1e-6,
    )


def test_one_step_may_end_in_another_space():
    flow_map = CrossFlowLoss(schedule=CosineSchedule()).flow_map(Net(out=7).float())
    noise = normal(1, 5, 3).float()
    scheduler = FlowMapScheduler.of(flow_map)
    torch.testing.assert_close(looped(scheduler, flow_map.model, noise, 1), flow_map.sample(noise))
    with pytest.raises(InputError, match="num_inference_steps=1"):
        looped(scheduler, flow_map.model, noise, 2)


@given(data=st.data())
@settings(max_examples=8)
def test_a_scheduler_is_the_same_after_saving_and_loading(data, tmp_path_factory):
    schedule = data.draw(formula_schedules)
    statistic = data.draw(any_statistics_for(schedule))
    made = FlowMapScheduler.of(FlowMap(Net(), schedule, statistic), num_train_timesteps=100)
    folder = tmp_path_factory.mktemp("scheduler")
    made.save_pretrained(folder)
    again = FlowMapScheduler.from_pretrained(folder)
    arguments = {name for name in made.config if not name.startswith("_")}
    assert all(again.config[name] == made.config[name] for name in arguments)
    assert len(arguments) == 6
    f, z, t, s = normal(0, 4, 3), normal(1, 4, 3), torch.full((4,), 0.8), torch.full((4,), 0.3)
    wanted = statistic.coefficients(schedule).step(f, z, t, s)
    torch.testing.assert_close(again.coefficients.step(f, z, t, s), wanted)


def test_a_step_depends_on_its_timestep_and_on_no_step_before():
    scheduler = FlowMapScheduler(gamma="0", delta="1/(t - s)")
    scheduler.set_timesteps(timesteps=[1000, 700, 100])
    f, z = normal(0, 4, 3), normal(1, 4, 3)
    for _ in range(2):
        found = scheduler.step(f, 700.0, z, return_dict=False)[0]
        torch.testing.assert_close(found, z - (0.7 - 0.1) * f, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("renoise", "after"), [(False, 0.5), (True, 0.0)])
def test_timesteps_count_from_noise_in_any_unit(renoise, after):
    scheduler = FlowMapScheduler(renoise=renoise, num_train_timesteps=100)
    scheduler.set_timesteps(4)
    assert len(scheduler) == 100 and scheduler.num_inference_steps == 4
    assert scheduler.timesteps.tolist() == [100, 75, 50, 25]
    for timestep in (75, 75.00001, torch.tensor(75), torch.full((3,), 75.0)):
        t, s = scheduler.pair(timestep)
        assert (float(t), float(s)) == (0.75, after)
    assert float(scheduler.pair(25)[1]) == 0
    for timestep in (74.9, 75.1, 0):
        with pytest.raises(TimeError, match="not on the grid"):
            scheduler.pair(timestep)


def test_networks_and_schedulers_return_tuples_where_they_are_asked_to():
    model, scheduler = Small(), FlowMapScheduler()
    network, z = PipelineNetwork(model, scheduler, 2, 4), torch.randn(3, 2, 4, 4)
    labels, one, zero = torch.tensor([1, 2, 5]), torch.ones(3), torch.zeros(3)
    (found,) = network(z, 1000, labels, return_dict=False)
    assert torch.equal(found, model(z, one, zero, labels=labels))
    assert torch.equal(network(z, 1000).sample, model(z, one, zero))
    assert network.config["in_channels"] == network.config["out_channels"] == 2
    (moved,) = scheduler.step(found, 1000, z, return_dict=False)
    assert torch.equal(moved, scheduler.step(found, 1000, z).prev_sample)


def test_noise_is_added_as_the_schedule_does():
    scheduler = FlowMapScheduler(alpha="cos(pi*t/2)", beta="sin(pi*t/2)")
    x, eps, t = normal(0, 4, 3), normal(1, 4, 3), torch.tensor([0.0, 0.25, 0.5, 1.0])
    found = scheduler.add_noise(x, eps, 1000 * t)
    torch.testing.assert_close(found, CosineSchedule().perturb(x, eps, t)[0])


def test_times_are_of_float32_at_least_whatever_the_states_are():
    """Rounded to bfloat16, 0.999 would be 1."""

    class Seeing(nn.Module):
        def forward(self, z, t, s, y):
            self.seen = t, s, y
            return z

    scheduler, model = FlowMapScheduler(), Seeing()
    network = PipelineNetwork(model, scheduler, 2, 4, labels="y")
    scheduler.set_timesteps(timesteps=[1000, 999, 500])
    z = torch.randn(3, 2, 4, 4).bfloat16()
    network(z, 999, torch.tensor([1, 2, 5]))
    t, s, y = model.seen
    assert t.dtype == s.dtype == torch.float32 and y.tolist() == [1, 2, 5]
    assert t.tolist() == pytest.approx([0.999] * 3) and s.tolist() == [0.5] * 3
    t = torch.tensor([0.999, 0.5, 0.25])
    found = FlowMapScheduler(num_train_timesteps=8).add_noise(z, z.flip(0), 8 * t)
    assert torch.equal(found, LinearSchedule().perturb(z, z.flip(0), t)[0])


def test_times_that_differ_by_rounding_alone_are_one():
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(3)
    assert len(scheduler) == 1000 and scheduler.order == 1
    for off in (-0.004, 0.004):
        assert float(scheduler.pair(1000 * 2 / 3 + off)[1]) == pytest.approx(1 / 3)
    for off in (-0.02, 0.02):
        with pytest.raises(TimeError, match="not on the grid"):
            scheduler.pair(1000 * 2 / 3 + off)


def test_timesteps_that_are_given_count_in_the_same_unit():
    scheduler = FlowMapScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(timesteps=[100, 25])
    assert scheduler.times.tolist() == [1, 0.25, 0] and scheduler.timesteps.tolist() == [100, 25]


def test_the_last_step_adds_no_noise():
    scheduler, draw = FlowMapScheduler(renoise=True), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(2)
    z, before = normal(0, 4, 3), draw.get_state()
    scheduler.step(z, 500, z, generator=draw)
    assert torch.equal(draw.get_state(), before)
    scheduler.step(z, 1000, z, generator=draw)
    assert not torch.equal(draw.get_state(), before)


def test_timesteps_are_where_they_are_asked_to_be():
    scheduler = FlowMapScheduler()
    scheduler.set_timesteps(3, device="meta")
    assert scheduler.timesteps.device.type == "meta" and scheduler.times.device.type == "cpu"


def test_across_spaces_the_sample_is_that_of_the_statistic():
    """f of (2, -2) at (1, 0) is twice a sample."""
    scheduler, f = FlowMapScheduler(gamma="2", delta="-2*t/(t - s)"), normal(0, 5, 7)
    found = scheduler.step(f, 1000, normal(1, 5, 3)).prev_sample
    torch.testing.assert_close(found, f / 2)


# --- in their own pipelines


def pictured(tensor):
    return (tensor / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_ddpm_pipeline_draws_what_the_flow_map_draws(steps):
    model = Small()
    flow_map = MeanFlowLoss(schedule=CosineSchedule()).flow_map(model)
    scheduler = FlowMapScheduler.of(flow_map)
    pipeline = diffusers.DDPMPipeline(PipelineNetwork(model, scheduler, 2, 4), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    found = pipeline(3, generator=draw, num_inference_steps=steps, output_type="pt").images
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = pictured(flow_map.sample(noise, steps=steps))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


class Identity(diffusers.ModelMixin, diffusers.ConfigMixin):
    """An autoencoder that does nothing."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, scaling_factor=1.0):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def decode(self, latents):
        return diffusers.models.autoencoders.vae.DecoderOutput(sample=latents)


def test_dit_pipeline_draws_classes_of_a_network_of_two_times():
    model = Small()
    flow_map = CrossFlowLoss().flow_map(model)
    scheduler = FlowMapScheduler.of(flow_map)
    network = PipelineNetwork(model, scheduler, 2, 4)
    pipeline = diffusers.DiTPipeline(network, Identity(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        class_labels=[1, 4],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=3,
        output_type="pt",
    ).images
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = flow_map.sample(noise, cond={"labels": torch.tensor([1, 4])}, steps=3)
    torch.testing.assert_close(found, pictured(wanted), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match=r"save network\.model"):
        network.save_pretrained("nowhere")


def test_a_pipeline_with_the_scheduler_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline = diffusers.DDPMPipeline(unet, FlowMapScheduler(gamma="0", delta="1/(t - s)"))
    pipeline.save_pretrained(tmp_path)
    listed = json.loads((tmp_path / "model_index.json").read_text())
    assert listed["scheduler"] == ["flowspace.vision.scheduler", "FlowMapScheduler"]
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    images = []
    for each in (pipeline, again):
        each.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        images.append(each(generator=draw, num_inference_steps=2, output_type="np").images)
    assert np.array_equal(*images)


# --- theirs


@given(steps=st.integers(1, 12), seed=st.integers(0, 100), shift=st.sampled_from([1.0, 3.0]))
@settings(max_examples=20)
def test_the_flow_matching_scheduler_of_diffusers_is_our_euler(steps, seed, shift):
    """On its own grid, shifted or not, and on ours."""
    net, noise = Net(seed=seed).float(), normal(seed, 5, 3).float()

    def velocity(z, t):
        return net(z, t, t)

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps, sigmas=np.linspace(1, 0, steps + 1)[:-1])
    z = noise
    for timestep in theirs.timesteps:
        z = theirs.step(velocity(z, timestep.expand(5) / 1000), timestep, z).prev_sample
    times = torch.linspace(1, 0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    ours = VelocityFlow(velocity, Euler()).sample(noise, times=times)
    torch.testing.assert_close(z, ours, rtol=1e-5, atol=1e-5)
    if shift == 1:
        torch.testing.assert_close(VelocityFlow(velocity).sample(noise, steps=steps), ours)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_flow_map_scheduler_of_diffusers_is_ours_of_mean_flow(steps):
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        pytest.skip("this version of diffusers has none")
    net, noise = Net().float(), normal(1, 5, 3).float()
    theirs = diffusers.FlowMapEulerDiscreteScheduler()
    theirs.set_timesteps(steps)
    z = noise
    for i, timestep in enumerate(theirs.timesteps):
        t, s = (x.float().expand(5) for x in theirs.sigmas[i : i + 2])
        z = theirs.step(net(z, t, s), timestep, z).prev_sample
    ours = FlowMap(net, LinearSchedule(), MeanFlowStatistic()).sample(noise, steps=steps)
    torch.testing.assert_close(z, ours, rtol=1e-6, atol=1e-6)


# --- what does not fit


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: FlowMapScheduler(gamma="0"), InputError, "write both, or neither"),
        (lambda: FlowMapScheduler(delta="1"), InputError, "write both, or neither"),
        (
            lambda: FlowMapScheduler().set_timesteps(1, timesteps=[1000]),
            InputError,
            "one of the two",
        ),
        (lambda: FlowMapScheduler(alpha="t", beta="1 - t"), FlowspaceError, "swapped"),
        (lambda: FlowMapScheduler().set_timesteps(), InputError, "one of the two"),
        (lambda: FlowMapScheduler().set_timesteps(0), TimeError, "counts evaluations"),
        (lambda: FlowMapScheduler().set_timesteps(timesteps=[500]), TimeError, "falls strictly"),
        (lambda: FlowMapScheduler().pair(500), TimeError, r"write one of \[1000.0\]"),
        (
            lambda: FlowMapScheduler.of(
                FlowMap(Net(), Schedule(lambda t: 1 - t, lambda t: t), MatchedStatistic())
            ),
            InputError,
            "no file can keep",
        ),
        (
            lambda: FlowMapScheduler.of(
                FlowMap(Net(), PRESETS["linear"], Statistic("0", lambda t, s: 1 / (t - s)))
            ),
            InputError,
            "no file can keep",
        ),
    ],
)
def test_misuse_is_one_clear_error(call, error, says):
    with pytest.raises(error, match=says):
        call()
