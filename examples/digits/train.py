"""One-step digits in one file: ``python examples/digits/train.py`` leaves ``runs/one_step.png``.

The latent of an 8x8 digit is its first 16 principal components, standardised: a fixed encoder. A
small network maps a noisy latent, two times and a label to pixels, and is trained by CrossFlow.
"""

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from flowspace import AbsoluteError, CrossFlowLoss

LATENT, WIDTH, BATCH = 16, 256, 256


class Network(nn.Module):
    """Maps latents ``(B, 16)``, times and labels ``(B,)`` to pixels ``(B, 64)``."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Linear(LATENT, WIDTH)
        self.times = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(10, WIDTH)
        hidden = [nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)]
        self.body = nn.Sequential(*hidden, nn.SiLU(), nn.Linear(WIDTH, 64))

    def forward(self, z: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """Return the image that a noisy latent at time t becomes at time s."""
        times = self.times(torch.stack([t, s], 1))
        return self.body(self.latent(z) + times + self.label(labels))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--out", type=Path, default=Path("runs/one_step.png"))
options = parser.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)  # more would wait for each other

# the data, and the encoder: images in [-1, 1], latents of mean 0 and spread 1
pixels, numbers = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32) / 8 - 1
labels = torch.tensor(numbers)
centred = images - images.mean(0)
components = torch.linalg.svd(centred, full_matrices=False).Vh[:LATENT].T
latents = centred @ components
latents = latents / latents.std(0)

network = Network()
average = AveragedModel(network, avg_fn=get_ema_avg_fn(0.998))
loss_fn = CrossFlowLoss(penalty=AbsoluteError())
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
for step in range(options.steps):
    rows = torch.randint(len(images), (BATCH,))
    out = loss_fn(network, latents[rows], images[rows], cond={"labels": labels[rows]})
    optimizer.zero_grad()
    out.loss.mean().backward()
    optimizer.step()
    rate.step()
    average.update_parameters(network)
    if step % 500 == 0:
        print(f"step {step}: loss {float(out.loss.detach().mean()):.4f}", flush=True)

# one evaluation an image: ten of each class, a row a class
classes = torch.arange(10).repeat_interleave(10)
samples = loss_fn.flow_map(average).sample(torch.randn(100, LATENT), cond={"labels": classes})
nearest = torch.cdist(samples, images).argmin(1)
right = int((labels[nearest] == classes).sum())
print(f"the nearest real digit is of the class that was asked for in {right} of 100")
framed = nn.functional.pad(samples.view(10, 10, 8, 8), (1, 1, 1, 1), value=-1)
picture = framed.transpose(1, 2).reshape(100, 100).repeat_interleave(4, 0).repeat_interleave(4, 1)
options.out.parent.mkdir(parents=True, exist_ok=True)
plt.imsave(options.out, picture, cmap="gray_r", vmin=-1, vmax=1)
