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
# # What the derivative costs
#
# The target of a flow map contains $D_t f$, the derivative of the network along the path. There
# are several **routes** to it. You will time them on one small transformer, and compare each with
# the same derivative in float64. It takes about a minute.
#
# Seconds differ from machine to machine. Ratios of one run can be compared, so all times here are
# over that of a plain training step of the same network.

# %%
import os
import statistics
import time
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace import FiniteDifference, ForwardMode, SharedPrimal

QUICK = bool(os.environ.get("FLOWSPACE_QUICK"))  # fewer rounds, to see that it runs
ROUNDS = 1 if QUICK else 7
torch.manual_seed(0)
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="`torch.jit.script` is")

# %% [markdown]
# ## A network
#
# Six blocks of attention, 64 tokens, fused attention as in any transformer of today.


# %%
class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h):
        heads = self.qkv(self.first(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.out(attended)
        return h + self.mlp(self.second(h))


class Transformer(nn.Module):
    def __init__(self, width=128, depth=6, heads=4, tokens=64):
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 8)
        self.times = nn.Linear(2, width)
        self.place = nn.Parameter(torch.randn(tokens, width) / 10)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, z, t, s):
        h = self.embed(z) + self.place + self.times(torch.stack([t, s], 1))[:, None]
        for block in self.blocks:
            h = block(h)
        return self.head(h)


ROWS = 16
net = Transformer()
z, v = torch.randn(2, ROWS, 64, 8)
t = torch.linspace(0.1, 1, ROWS)
s = t / 2
primals, tangents = (z, t, s), (v, torch.ones_like(t), None)

# %% [markdown]
# ## The routes
#
# * `SharedPrimal()`, the default: one forward pass that carries the derivative beside it.
# * `ForwardMode()`: a second forward pass, by torch's forward-mode derivatives.
# * `FiniteDifference()`: the network evaluated again, a little farther along the path.
# * `torch.func.jvp` with gradients, as in public scripts: value and derivative in one pass, which
#   keeps both for the backward pass.
#
# The last one does not work with fused attention:

# %%
directions = (v, torch.ones_like(t), torch.zeros_like(s))
try:
    torch.func.jvp(net, primals, directions)
except NotImplementedError as error:
    print(type(error).__name__, str(error)[:150])


# %%
def public_way(model, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(model, primals, directions)


def plain(model, primals, tangents):
    return model(*primals), torch.zeros(())


ROUTES = {
    "plain step": plain,
    "SharedPrimal": SharedPrimal(),
    "ForwardMode": ForwardMode(),
    "FiniteDifference, order 1": FiniteDifference(order=1),
    "FiniteDifference, order 2": FiniteDifference(order=2),
    "torch.func.jvp with gradients": public_way,
}

# %% [markdown]
# ## Time
#
# A training step is value, derivative and backward pass. The routes take turns, so that what
# disturbs one round disturbs all of it; shown is the median of the ratios.


# %%
def seconds(route):
    start = time.process_time()
    value, derivative = route(net, primals, tangents)
    (value - derivative.detach()).square().mean().backward()
    net.zero_grad()
    return time.process_time() - start


for route in ROUTES.values():
    seconds(route)  # the first call prepares what later ones use
rounds = []
for _ in range(ROUNDS):
    rounds.append({name: seconds(route) for name, route in ROUTES.items()})
ratios = {}
for name in ROUTES:
    ratios[name] = statistics.median(each[name] / each["plain step"] for each in rounds)

# %% [markdown]
# ## Error
#
# Against the same derivative in float64, over its largest entry.

# %%
exact = Transformer().double()
exact.load_state_dict(net.state_dict())
wide = [None if x is None else x.double() for x in (*primals, *tangents)]
wanted = ForwardMode()(exact, wide[:3], wide[3:])[1]

errors = {}
for name, route in ROUTES.items():
    if route is not plain:
        found = route(net, primals, tangents)[1].double()
        errors[name] = ((found - wanted).abs().max() / wanted.abs().max()).item()

print(f"{'route':30} {'step / plain step':>18} {'largest error':>14}")
for name, ratio in ratios.items():
    error = f"{errors[name]:.0e}" if name in errors else ""
    print(f"{name:30} {ratio:18.2f} {error:>14}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
names = list(errors)
left.barh(names, [ratios[name] for name in names], color="C0")
left.axvline(1, color="black", linewidth=0.8)
left.set(xlabel="training step / plain step")
right.barh(names, [errors[name] for name in names], color="C1")
right.set(xlabel="largest error", xscale="log", xlim=(1e-8, 1e-2))
left.invert_yaxis()
figure.tight_layout()

# %% [markdown]
# ## Only the rows that need it
#
# On s = t the loss is a reconstruction, and needs no derivative. Half of the rows are there by
# default. `rows=` says which rows need one; the losses do that for you.

# %%
shares = (0.0, 0.25, 0.5, 0.75, 1.0)


def with_share(share):
    rows = torch.arange(ROWS) < share * ROWS

    def route(model, primals, tangents):
        return SharedPrimal()(model, primals, tangents, rows=rows)

    return route


moving = {share: with_share(share) for share in shares}
for route in moving.values():
    seconds(route)
costs = {share: [] for share in shares}
for _ in range(ROUNDS):
    base = seconds(plain)
    for share, route in moving.items():
        costs[share].append(seconds(route) / base)
medians = [statistics.median(costs[share]) for share in shares]

plt.figure(figsize=(5, 2.8))
plt.plot(shares, medians, "o-")
plt.axhline(1, color="black", linewidth=0.8)
plt.xlabel("share of the rows with s < t")
plt.ylabel("step / plain step")
plt.title("SharedPrimal")
plt.tight_layout()

# %% [markdown]
# ## Go on
#
# * Larger networks, memory, half precision and torch.compile: the tables of the page *What the
#   derivative costs*, and the commands that print them.
# * Which route is for which network: the page *Which derivative?*.
