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
# # One-step pictures of your own
#
# You will train a generator of small pictures from nothing: handwritten digits of 8 x 8 pixels,
# one evaluation a picture. It takes one to two minutes on two CPU cores. To use your own pictures,
# change the second cell.

# %%
import copy
import os
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from flowspace import AbsoluteError, CrossFlowLoss

warnings.filterwarnings("ignore", message="`torch.jit.script` is")  # torch's own
torch.manual_seed(0)
QUICK = bool(os.environ.get("FLOWSPACE_QUICK"))  # fewer steps, to see that it runs

# %% [markdown]
# ## The pictures
#
# All that is needed: pictures of shape `(N, 1, H, W)` in [-1, 1], and a class for each.

# %%
data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(data.target)
SHOWN = 12


def sheet(pictures):
    """Put pictures (10, n, 1, 8, 8) on a sheet, one row a class, with a gap between them."""
    padded = nn.functional.pad(pictures[:, :, 0], (1, 1, 1, 1), value=1.0)
    return padded.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


real = torch.stack([images[labels == c][:SHOWN] for c in range(10)])
plt.figure(figsize=(5, 4.2))
plt.imshow(sheet(real), cmap="gray", vmin=-1, vmax=1)
plt.axis("off")
plt.title("real digits")
plt.tight_layout()
# %% [markdown]
# ## The latents
#
# The generator starts from a noisy **latent**, a short description of a picture, and answers with
# the **picture**. Any encoder will do. Here it is the simplest: the first 16 principal directions,
# each of mean 0 and spread 1, like the noise.

# %%
SIZE = 16
flat = images.flatten(1)
mean = flat.mean(0)
_, spread, directions = torch.linalg.svd(flat - mean, full_matrices=False)
spread, directions = spread[:SIZE] / len(flat) ** 0.5, directions[:SIZE]


def encode(pictures):
    return (pictures.flatten(1) - mean) @ directions.T / spread


latents = encode(images)
print(f"latents {tuple(latents.shape)}, mean {latents.mean():.3f}, spread {latents.std():.3f}")

# %% [markdown]
# ## The network
#
# Any function of the noisy latent, the time t, the destination s and the class. Keep the features
# of the times slow: the loss differentiates the network in t.


# %%
class Generator(nn.Module):
    def __init__(self, width=192, depth=4):
        super().__init__()
        self.embed, self.head = nn.Linear(SIZE + 16, width), nn.Linear(width, 64)
        self.classes = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(self.block(width) for _ in range(depth))

    @staticmethod
    def block(width):
        return nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, z_t, t, s, labels):
        times = torch.stack([t, s], 1)[:, :, None] * torch.linspace(0.5, 6, 4)
        features = [z_t, times.sin().flatten(1), times.cos().flatten(1)]
        h = self.embed(torch.cat(features, 1))
        for block in self.blocks:
            h = h + block(h + self.classes(labels))
        return self.head(h).unflatten(1, (1, 8, 8))


# %% [markdown]
# ## Train
#
# The loop is yours. The loss draws the times and the noise, computes the derivative of the network
# and returns one number a row.

# %%
STEPS = 40 if QUICK else 1500
net, loss_fn = Generator(), CrossFlowLoss(penalty=AbsoluteError())
optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.0)
rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.05)
losses = []
for _ in range(STEPS):
    rows = torch.randint(len(images), (256,))
    out = loss_fn(net, latents[rows], images[rows], cond={"labels": labels[rows]})
    optimizer.zero_grad()
    out.loss.mean().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    rate.step()
    losses.append(out.loss.mean().item())

smooth = torch.tensor(losses).unfold(0, 10, 10).mean(1)
plt.figure(figsize=(6, 2.4))
plt.plot(torch.arange(len(smooth)) * 10, smooth)
plt.xlabel("step")
plt.ylabel("loss")
plt.tight_layout()
# %% [markdown]
# ## Sample
#
# One evaluation: noise and a class in, a picture out.

# %%
wanted = torch.arange(10).repeat_interleave(SHOWN)
noise = torch.randn(len(wanted), SIZE)
net.eval()
samples = loss_fn.flow_map(net).sample(noise, cond={"labels": wanted})

figure, axes = plt.subplots(1, 2, figsize=(9, 4))
for axis, pictures, title in zip(
    axes, (real, samples.unflatten(0, (10, SHOWN))), ("real", "one evaluation"), strict=True
):
    axis.imshow(sheet(pictures), cmap="gray", vmin=-1, vmax=1)
    axis.set_title(title)
    axis.axis("off")
figure.tight_layout()

# %% [markdown]
# ## Judge
#
# Two questions. Is it the digit that was asked for? A nearest-neighbour classifier of the real
# digits says. Are the samples of a class different from each other? The mean distance within a
# class, over that of real digits, says: 1 is as diverse, 0 is one picture.

# %%
judge = KNeighborsClassifier(3).fit(flat.numpy(), labels.numpy())
right = (judge.predict(samples.flatten(1).numpy()) == wanted.numpy()).mean()


def within_classes(pictures):
    """The mean distance of two pictures of a class, of pictures (10, n, 1, 8, 8)."""
    points = pictures.flatten(2)
    return torch.cdist(points, points).sum() / (10 * SHOWN * (SHOWN - 1))


diversity = within_classes(samples.unflatten(0, (10, SHOWN))) / within_classes(real)
print(f"right digit: {right:.2f}, diversity: {diversity:.2f}")

# %% [markdown]
# ## Not copies
#
# Beside some samples, the nearest real digit of the whole set.

# %%
few = samples[::SHOWN]
nearest = images[torch.cdist(few.flatten(1), flat).argmin(1)]
figure, axes = plt.subplots(2, 10, figsize=(9, 2.2))
for row, pictures, name in zip(axes, (few, nearest), ("sample", "nearest"), strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture[0], cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
    row[0].set_title(name, fontsize=9)
figure.tight_layout()

# %% [markdown]
# ## Save it
#
# The network is a plain module, and the loss has no weights.

# %%
weights = {name: value.clone() for name, value in net.state_dict().items()}
again = copy.deepcopy(net)
again.load_state_dict(weights)  # torch.save(weights, "digits.pt") keeps them
same = loss_fn.flow_map(again).sample(noise, cond={"labels": wanted})
print("the same pictures:", torch.equal(same, samples))

# %% [markdown]
# ## Go on
#
# * A learned encoder, a perceptual term and judges: `flowspace demo`, and the page *Digits, the
#   demo*.
# * Larger pictures in colour: the page *Small pictures*.
