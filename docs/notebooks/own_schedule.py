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
# # A schedule of your own
#
# A **schedule** says how data becomes noise: the noisy state is
#
# $$z_t = \alpha(t)\, z + \beta(t)\, \epsilon$$
#
# with the data at t = 0 and the noise at t = 1. You will write one as text, see what it does to a
# picture, meet the errors that keep you from a wrong one, and train with it. It takes about a
# minute.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from flowspace import (
    CrossFlowLoss,
    LinearSchedule,
    MatchedStatistic,
    Schedule,
    ScheduleError,
    check_criteria,
)

warnings.filterwarnings("ignore", message="`torch.jit.script` is")  # torch's own
torch.manual_seed(0)
QUICK = bool(os.environ.get("FLOWSPACE_QUICK"))  # fewer steps, to see that it runs

# %% [markdown]
# ## Write it
#
# Two formulas in t are enough. This one is the linear path on a clock that runs three times as
# fast at the data: noise comes early. Papers call this a *shift* by 3.

# %%
early = Schedule(alpha="(1 - t)/(1 + 2*t)", beta="3*t/(1 + 2*t)")
print(early)

# %% [markdown]
# alpha falls from 1 to 0, beta rises from 0 to 1. What decides about noise is the ratio
# alpha/beta, called lambda: it has to fall all the way. Its derivative and everything else follow
# from the two formulas.

# %%
t = torch.linspace(0.01, 1, 200)
schedules = {"linear": LinearSchedule(), "early noise": early}

figure, (weights, ratio) = plt.subplots(1, 2, figsize=(9, 3))
for style, (name, schedule) in zip(("--", "-"), schedules.items(), strict=True):
    weights.plot(t, schedule.alpha(t), "C0" + style, label=f"alpha, {name}")
    weights.plot(t, schedule.beta(t), "C1" + style, label=f"beta, {name}")
    ratio.semilogy(t[:-1], schedule.signal_to_noise(t)[:-1], "C2" + style, label=name)
weights.set(xlabel="t", title="weights of data and noise")
ratio.set(xlabel="t", title="signal to noise, alpha/beta")
weights.legend(fontsize=8)
ratio.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## See it
#
# `perturb` makes the noisy state, and its velocity too. The same digit and the same noise, along
# both paths:

# %%
digit = torch.tensor(load_digits().images[0], dtype=torch.float32) / 8 - 1
times = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
noise = torch.randn(8, 8)

figure, axes = plt.subplots(2, len(times), figsize=(9, 3.9))
for row, (name, schedule) in zip(axes, schedules.items(), strict=True):
    repeated = digit.expand(len(times), 8, 8)
    z_t, velocity = schedule.perturb(repeated, noise.expand(len(times), 8, 8), times)
    for axis, picture, time in zip(row, z_t, times, strict=True):
        axis.imshow(picture, cmap="gray", vmin=-2, vmax=2)
        axis.set_title(f"{name}\nt = {time:.2f}", fontsize=8)
        axis.axis("off")
figure.tight_layout()

# %% [markdown]
# At t = 0.25 half of the mixture is already noise on the new path.
#
# ## What is refused
#
# A schedule is checked when it is made. An end that is wrong, a value that is not finite, a ratio
# that rises: each is an error that names the time and the value.

# %%
for alpha, beta in [
    ("1 - t", "2*t"),
    ("exp(-5*t)", "t"),
    ("(1 - t)**2", "sin(3*pi*t/2)**2"),
]:
    try:
        Schedule(alpha, beta)
        print(f"{alpha}, {beta}: fine")
    except ScheduleError as error:
        print(f"{alpha}, {beta}: {error}\n")

# %% [markdown]
# ## Which statistic?
#
# The **statistic** says what the network returns. `MatchedStatistic()` fits every schedule: it is
# derived from it, so that all four properties below hold. You need not choose one.

# %%
report = check_criteria(early, MatchedStatistic())
print(report)

# %% [markdown]
# ## Train with it
#
# The data are points along a parabola in the plane. The network gets a noisy point and answers
# with a clean one, in one evaluation. Only `schedule=` differs between the two runs.

# %%
first = torch.randn(4000)
second = 0.7 * first**2 - 0.7 + 0.2 * torch.randn(4000)
data = torch.stack([first, second], 1)


class Net(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, z_t, t, s):
        times = torch.stack([t, s], 1)[:, :, None] * torch.tensor([1.0, 3.0])
        features = [z_t, times.sin().flatten(1), times.cos().flatten(1)]
        return self.layers(torch.cat(features, 1))


def train(schedule, steps):
    """Return samples of one evaluation, after so many steps."""
    torch.manual_seed(0)
    net, loss_fn = Net(), CrossFlowLoss(schedule=schedule)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        points = data[torch.randint(len(data), (256,))]
        optimizer.zero_grad()
        loss_fn(net, points).loss.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return loss_fn.flow_map(net).sample(torch.randn(2000, 2))


# %%
steps = 20 if QUICK else 1200
panels = {"data": data[:2000]}
for name, schedule in schedules.items():
    panels[f"{name}, one evaluation"] = train(schedule, steps)

figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True)
for axis, (name, points) in zip(axes, panels.items(), strict=True):
    axis.scatter(points[:, 0], points[:, 1], s=2, alpha=0.4)
    axis.set(title=name, xlim=(-3.5, 3.5), ylim=(-2, 6))
figure.tight_layout()

# %% [markdown]
# Both bend the noise into the parabola, in one evaluation, with some stray points after so few
# steps. Which schedule is better depends on the data. Large latents ask for earlier noise, since
# many of their numbers say the same.
#
# ## Go on
#
# * A schedule may also be a subclass, or made of callables: the page *Write your own*.
# * The same check without Python: `flowspace derive --alpha "(1-t)/(1+2*t)" --beta "3*t/(1+2*t)"`.
