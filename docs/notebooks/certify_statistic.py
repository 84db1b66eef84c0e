# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Certify your own statistic
#
# A **statistic** says what a network learns to return,
#
# $$f(z_t, t, s) = \gamma\, z_t + \delta \int_s^t v\, d\tau.$$
#
# You have an idea for a new pair gamma, delta. Before you spend a week of training on it, you can
# *prove* that its loss is right: derive it, check the criteria, and put the exact answer into the
# loss. On Gaussian data the exact answer is known in closed form, and the residual has to be zero.
# It takes seconds.

# %%
import warnings

import matplotlib.pyplot as plt
import torch

from flowspace import (
    CriterionError,
    CrossFlowLoss,
    LinearSchedule,
    MatchedStatistic,
    Statistic,
    check_criteria,
)

warnings.filterwarnings("ignore", message="`torch.jit.script` is")  # torch's own
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
schedule = LinearSchedule()

# %% [markdown]
# ## The idea
#
# The default has $\kappa(s) = s$, by which the loss weighs the data. Say that you want another
# weight, $\kappa(s) = s(2 - s)$, and the same delta. Then gamma follows.

# %%
statistic = Statistic.from_kappa(schedule, kappa="s*(2 - s)", delta="-t/(t - s)")
print(statistic)

# %% [markdown]
# ## The criteria
#
# They are decided by algebra, not by trying numbers.

# %%
report = check_criteria(schedule, statistic)
print(report)

# %% [markdown]
# Read it from the top. Criterion 1 is what allows a loss without a velocity. Criterion 2 says that
# f at (1, 0) is a sample. *Anchored*: on s = t the loss is a reconstruction. *Matched* fails here:
# on s = t the network reconstructs a multiple of the data. That trains, and trains worse; the
# table of the page *Swiss roll* has both.
#
# A wrong idea is refused, with what is left of t:

# %%
try:
    CrossFlowLoss(statistic=Statistic(gamma="1", delta="-1/(t - s)"))
except CriterionError as error:
    print(error)

# %% [markdown]
# ## Data of which everything is known
#
# Let the data be one number, $z \sim N(\mu, \sigma^2)$. Then $z_t$ is Gaussian too, with mean
# $\alpha \mu$ and variance $C_t = \alpha^2\sigma^2 + \beta^2$. The flow keeps the distance from
# the mean in units of the spread, so
#
# $$z_s = \alpha_s\mu + \sqrt{C_s/C_t}\,(z_t - \alpha_t\mu),$$
#
# and the integral of the velocity is $z_t - z_s$. That is the exact f of *every* statistic.

# %%
MEAN, SPREAD = 1.5, 0.4


def variance(t):
    return (schedule.alpha(t) * SPREAD) ** 2 + schedule.beta(t) ** 2


def flow(z_t, t, s):
    """z_s, of shape (B, 1), where the flow takes z_t."""
    ratio = (variance(s) / variance(t)).sqrt()[:, None]
    centred = z_t - schedule.alpha(t)[:, None] * MEAN
    return schedule.alpha(s)[:, None] * MEAN + ratio * centred


def exact(statistic):
    """The exact f of a statistic, as a model."""

    def model(z_t, t, s):
        gamma, delta = statistic.gamma(t, s)[:, None], statistic.delta(t, s)[:, None]
        return gamma * z_t + delta * (z_t - flow(z_t, t, s))

    return model


def clean(z_t, t):
    """The mean of the data given z_t, (B, 1)."""
    weight = (schedule.alpha(t) * SPREAD**2 / variance(t))[:, None]
    return MEAN + weight * (z_t - schedule.alpha(t)[:, None] * MEAN)


def velocity(z_t, t):
    """The mean of the velocity given z_t, (B, 1)."""
    return schedule.velocity(clean(z_t, t), z_t, t)


# %% [markdown]
# Is the flow right? Its picture: many paths from noise at t = 1 to data at t = 0, and the
# densities at both ends.

# %%
grid = torch.linspace(1, 0, 60)
noise = torch.randn(40, 1)
ones = torch.ones(40)
paths = torch.stack([flow(noise, ones, s * ones)[:, 0] for s in grid])

figure, axis = plt.subplots(figsize=(7, 3.2))
axis.plot(grid, paths, color="C0", alpha=0.4, linewidth=0.8)
points = torch.linspace(-3, 3, 200)
axis.plot(1 + 0.25 * torch.exp(-(points**2) / 2), points, "C1", label="noise")
density = torch.exp(-((points - MEAN) ** 2) / (2 * SPREAD**2))
axis.plot(-0.25 * density, points, "C2", label="data")
axis.set(xlabel="t", ylabel="z", xlim=(1.3, -0.3), xticks=(1, 0.75, 0.5, 0.25, 0))
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## The residual at the exact answer
#
# The loss compares the network with a target; what has to vanish is the residual R. On one path it
# is zero only in the mean. So give the loss the means: `velocity=` replaces the velocity of one
# path, and the targets are the mean of the data given $z_t$.


# %%
SIDE, ROWS = 40, 64


def residuals(statistic, model):
    """The largest |R| at each pair s < t of a grid, NaN elsewhere."""
    times = torch.linspace(0.05, 1, SIDE)
    later, earlier = torch.tril_indices(SIDE, SIDE, -1)
    t, s = times[later].repeat_interleave(ROWS), times[earlier].repeat_interleave(ROWS)
    latents, noise = MEAN + SPREAD * torch.randn(len(t), 1), torch.randn(len(t), 1)
    z_t, _ = schedule.perturb(latents, noise, t)
    loss_fn = CrossFlowLoss(statistic=statistic, velocity=velocity)
    out = loss_fn(model, latents, clean(z_t, t), noise=noise, t=t, s=s)
    table = torch.full((SIDE, SIDE), torch.nan)
    table[earlier, later] = out.residual.abs().unflatten(0, (-1, ROWS)).amax((1, 2))
    return table


right = residuals(statistic, exact(statistic))
wrong = residuals(statistic, exact(MatchedStatistic().on(schedule)))
print(f"largest residual at its exact f:           {right.nan_to_num(0).max():.1e}")
print(f"largest residual at another statistic's f: {wrong.nan_to_num(0).max():.1e}")

# %% [markdown]
# The first is rounding: the loss of this statistic is solved by its f. The second shows that the
# test can fail: put in the exact f of *another* statistic, the default, and the residual is far
# from zero.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
for axis, table, title in zip(axes, (right, wrong), ("its own exact f", "another f"), strict=True):
    image = axis.imshow(
        table.log10(), origin="lower", extent=(0.05, 1, 0.05, 1), vmin=-16, vmax=1, cmap="viridis"
    )
    axis.set(xlabel="t", ylabel="s", title=title)
colorbar = figure.colorbar(image, ax=axes, label="log10 of the largest |R|")
# %% [markdown]
# ## The sample
#
# Last, the step: one evaluation at (1, 0) has to land where the flow lands.

# %%
flow_map = CrossFlowLoss(statistic=statistic).flow_map(exact(statistic))
noise = torch.randn(20000, 1)
ones = torch.ones(len(noise))
for steps in (1, 2, 4):
    sample = flow_map.sample(noise, steps=steps)
    error = (sample - flow(noise, ones, 0 * ones)).abs().max()
    print(f"{steps} steps: error {error:.1e}, mean {sample.mean():.3f}, spread {sample.std():.3f}")

# %% [markdown]
# The statistic is certified: criteria by algebra, loss and step at the exact answer. What no
# certificate says is whether it *trains well*: for that see the page *Train well*. The library's
# own tests do the same with random schedules, statistics and Gaussians (`tests/test_gaussian.py`).
