"""Which optimiser trains which parameter, and that both resume together."""

import pytest
import torch
from torch import nn

from flowspace import InputError
from flowspace.recipes.networks import SmallViT
from flowspace.training import LoopSettings, MuonAdamW, TensorBatches, Together, assign, train

pytestmark = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9"
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.label = nn.Linear(4, 8), nn.Embedding(3, 8)
        self.tokens = nn.Parameter(torch.randn(2, 8))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(8), "mlp": nn.Linear(8, 8), "table": nn.Embedding(3, 8)}
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = self.embed(x) + self.label.weight.sum(0) + self.tokens.sum(0)
        for block in self.blocks:
            h = h + torch.tanh(block["mlp"](block["norm"](h))) + block["table"].weight.mean(0)
        return self.head(h)


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else():
    found = assign(Net())
    assert found["muon"] == ["blocks.0.mlp.weight", "blocks.1.mlp.weight"]
    assert found["adamw"] == [
        "tokens",
        "embed.weight",
        "embed.bias",
        "label.weight",
        "blocks.0.norm.weight",
        "blocks.0.norm.bias",
        "blocks.0.mlp.bias",
        "blocks.0.table.weight",
        "blocks.1.norm.weight",
        "blocks.1.norm.bias",
        "blocks.1.mlp.bias",
        "blocks.1.table.weight",
        "head.weight",
        "head.bias",
    ]


def test_every_parameter_of_the_generator_is_in_its_group():
    pytest.importorskip("diffusers")
    pytest.importorskip("timm")
    from flowspace.vision import CrossFlowGenerator

    with torch.device("meta"):
        network = CrossFlowGenerator.from_preset("crossflow-b", depth=1)
    found = assign(network)
    assert found["muon"] == [
        "blocks.0.qkv.weight",
        "blocks.0.proj.weight",
        "blocks.0.mlp.fc1_g.weight",
        "blocks.0.mlp.fc1_x.weight",
        "blocks.0.mlp.fc2.weight",
    ]
    assert found["adamw"] == [
        "position",
        "time_token",
        "embed.weight",
        "label.weight",
        "times.s.first.weight",
        "times.s.second.weight",
        "blocks.0.norm1.weight",
        "blocks.0.norm2.weight",
        "blocks.0.q_norm.weight",
        "blocks.0.k_norm.weight",
        "norm.weight",
        "head.weight",
    ]


def test_one_step_is_that_of_torchs_own_optimisers():
    mine, theirs, x = Net(), Net(), torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    both = MuonAdamW(1e-2, 0.1)(mine)
    names = assign(theirs)
    parameters = dict(theirs.named_parameters())
    apart = [
        torch.optim.Muon(
            [parameters[n] for n in names["muon"]],
            lr=1e-2,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [parameters[n] for n in names["adamw"]], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)
        ),
    ]
    for _ in range(3):
        for network, optimizers in ((mine, [both]), (theirs, apart)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (network(x) - x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("at", [6, 7, 20])
def test_a_run_with_both_that_was_stopped_continues_to_the_same_weights(tmp_path, at):
    settings = LoopSettings(steps=24, batch=8, warmup=5, checkpoint_every=7)
    batches = TensorBatches((torch.randn(50, 4, generator=torch.Generator().manual_seed(1)),))
    calls = 0

    def loss(net, batch, draws):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        (x,) = batch
        return (net(x) - x).square().mean()

    whole, stopped = Net(), Net()
    calls = at + 1
    train("a", whole, batches, loss, settings, None, optimizer=MuonAdamW())
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        train("a", stopped, batches, loss, settings, tmp_path, optimizer=MuonAdamW())
    again = Net()
    train("a", again, batches, loss, settings, tmp_path, optimizer=MuonAdamW())
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_the_rates_of_both_follow_the_warm_up_and_the_decay():
    seen = []

    class Watched(Together):
        def step(self, closure=None):
            seen.append({group["lr"] for group in self.param_groups})
            super().step(closure)

    settings = LoopSettings(steps=10, batch=8, warmup=4, final_rate=0.1)
    batches = TensorBatches((torch.randn(50, 4),))

    def loss(net, batch, draws):
        return net(batch[0]).square().mean()

    train(
        "a",
        Net(),
        batches,
        loss,
        settings,
        None,
        optimizer=lambda net: Watched(MuonAdamW(1e-3)(net).optimizers),
    )
    assert all(len(rates) == 1 for rates in seen)
    rates = [rate for (rate,) in seen]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3]) and rates == rates[
        :4
    ] + sorted(rates[4:], reverse=True)


def test_it_trains_a_small_vit():
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(32, 4, 2, 2, generator=draw)
    wanted = torch.tanh(z.flip(1) * 2)
    y, t = torch.zeros(32, dtype=torch.long), torch.full((32,), 0.5)
    torch.manual_seed(0)
    network = SmallViT(4, 2, outputs=4, width=32, depth=2, heads=2)
    optimizer, losses = MuonAdamW(3e-3)(network), []
    for _ in range(60):
        loss = (network(z, t, t, labels=y) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_misuse_is_one_clear_error():
    with pytest.raises(InputError, match="no linear layer inside 'layers'"):
        assign(Net(), ("layers",))
    with pytest.raises(InputError, match="learning_rate"):
        MuonAdamW(0.0)
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match="two optimisers"):
        Together([torch.optim.SGD([p], 0.1), torch.optim.SGD([p], 0.1)])
