"""Which optimiser trains which parameter; both as one optimiser of torch, whose steps can be
called off.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from flowspace import InputError
from flowspace.training.checkpoints import flatten_optimizer, restore_optimizer
from flowspace.training.optimizers import CombinedOptimizer, MuonAdamW, PlainAdamW, assign


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


@pytest.mark.parametrize("fused", [None, False])
def test_one_step_is_that_of_torchs_own_optimisers(fused):
    mine, theirs, x = Net(), Net(), torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    both = MuonAdamW(1e-2, 0.1, fused=fused)(mine)
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
            [parameters[n] for n in names["adamw"]],
            lr=1e-2,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            fused=fused is None,
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


def backward(network, number=0, scale=1.0):
    """Leave the gradients of one step's loss."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
    network.zero_grad()
    loss = (network(x) - x).square().mean()
    (scale * loss).backward()
    return loss.detach()


def train(network, optimizer, numbers):
    for number in numbers:
        backward(network, number)
        optimizer.step()


def everything(network, optimizer):
    """Every bit that a step may change, by name."""
    held = {f"weight {name}": p for name, p in network.named_parameters()}
    held |= flatten_optimizer(optimizer, network)
    return {name: tensor.detach().clone().view(torch.int32) for name, tensor in held.items()}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


BUILDERS = [
    pytest.param(MuonAdamW(1e-2), id="muon"),
    pytest.param(MuonAdamW(1e-2, fused=False), id="muon-apart"),
    pytest.param(PlainAdamW(1e-2), id="adamw"),
    pytest.param(PlainAdamW(1e-2, fused=False), id="adamw-apart"),
]


@pytest.mark.parametrize("build", BUILDERS)
def test_it_is_an_optimiser_of_torch(build):
    network = Net()
    optimizer = build(network)
    assert isinstance(optimizer, torch.optim.Optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(held) == set(network.parameters()) and len(held) == len(set(held))
    backward(network)
    optimizer.zero_grad()
    assert all(p.grad is None for p in network.parameters())
    losses = []

    def closure():
        losses.append(backward(network))
        assert torch.is_grad_enabled()
        return losses[-1]

    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    assert optimizer.step(closure) is losses[0] and len(losses) == 1 and len(hooked) == 1
    optimizer.step(closure)
    assert losses[1] < losses[0]
    assert optimizer.state.keys() == set(held)


@pytest.fixture(params=["read", "left to the device"])
def calling_off(request, monkeypatch):
    """Both ways of a step that may be called off: a GPU's is not read, which works here too."""
    if request.param != "read":
        monkeypatch.setattr("flowspace.training.optimizers.readable", lambda tensor: False)


@pytest.mark.usefixtures("calling_off")
@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("value", [1.0, 2.0, torch.nan, True])
def test_a_step_that_is_called_off_changes_no_bit(build, value):
    network, plain = Net(), Net()
    optimizer, steady = build(network), build(plain)
    for number in range(4):
        before = everything(network, optimizer)
        backward(network, number)
        for p in network.parameters():
            p.grad.fill_(torch.nan)
        optimizer.found_inf = torch.tensor(value)
        optimizer.step()
        after = everything(network, optimizer)
        assert_same({name: after[name] for name in before}, before)
        optimizer.found_inf = torch.tensor(0.0)
        train(network, optimizer, [number])
        train(plain, steady, [number])
        assert_same(everything(network, optimizer), everything(plain, steady))


@pytest.mark.usefixtures("calling_off")
def test_a_step_that_is_called_off_leaves_a_weight_without_gradient_alone():
    network = Net()
    optimizer = MuonAdamW()(network)
    backward(network)
    network.blocks[0]["mlp"].weight.grad = None
    optimizer.found_inf = torch.tensor(0.0)
    before = everything(network, optimizer)
    optimizer.step()
    after = everything(network, optimizer)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert "weight blocks.1.mlp.weight" in changed
    assert "weight blocks.0.mlp.weight" not in changed


@pytest.mark.usefixtures("calling_off")
@pytest.mark.parametrize("build", BUILDERS)
def test_a_scaled_gradient_is_unscaled_and_an_overflow_called_off_by_the_scaler(build):
    network, plain = Net(), Net()
    optimizer, steady = build(network), build(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))  # which makes its scale a tensor
    for number in range(3):
        before = everything(network, optimizer)
        backward(network, number)
        network.head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        after = everything(network, optimizer)
        assert_same({name: after[name] for name in before}, before)
        backward(network, number, scaler.get_scale())
        if number == 1:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        train(plain, steady, [number])
    assert scaler.get_scale() == 2.0**7
    assert_same(everything(network, optimizer), everything(plain, steady))


@pytest.mark.parametrize("build", BUILDERS)
def test_schedulers_of_torch_set_the_rates_of_all(build):
    network = Net()
    optimizer = build(network)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            assert group["lr"] == pytest.approx(rate * 0.5**step)
        train(network, optimizer, [step])
        scheduler.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    before = everything(network, optimizer)
    train(network, optimizer, [0])
    after = everything(network, optimizer)
    for name in before:
        if name.startswith("weight"):
            assert torch.equal(before[name], after[name])


def resumed_by_state_dict(build, network, optimizer):
    again = build(network)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return again


def resumed_from_tensors(build, network, optimizer):
    again = build(network)
    restore_optimizer(again, network, flatten_optimizer(optimizer, network))
    return again


@pytest.mark.parametrize("resumed", [resumed_by_state_dict, resumed_from_tensors])
@pytest.mark.parametrize("build", BUILDERS)
def test_training_goes_on_bit_for_bit_from_a_saved_state(build, resumed):
    network = Net()
    optimizer = build(network)
    train(network, optimizer, range(3))
    stopped = copy.deepcopy(network)
    held = {id(a): b for a, b in zip(network.parameters(), stopped.parameters(), strict=True)}
    saved = build(stopped)
    for p, slots in optimizer.state.items():
        for slot, value in slots.items():
            saved.state[held[id(p)]][slot] = value.clone()
    again = resumed(build, stopped, saved)
    train(network, optimizer, range(3, 6))
    train(stopped, again, range(3, 6))
    assert_same(everything(network, optimizer), everything(stopped, again))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("build", BUILDERS)
def test_a_copy_goes_on_alone(build, through):
    network = Net()
    optimizer = build(network)
    train(network, optimizer, range(2))
    other, copied = through((network, optimizer))
    train(other, copied, range(2, 4))
    assert copied.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    train(network, optimizer, range(2, 4))
    assert_same(everything(network, optimizer), everything(other, copied))


def test_a_network_is_split_alike_however_it_is_wrapped():
    def named(prefix, names):
        return {key: [prefix + name for name in group] for key, group in names.items()}

    plain = assign(Net())
    assert assign(torch.compile(Net())) == named("_orig_mod.", plain)
    assert assign(nn.ModuleDict({"module": Net()})) == named("module.", plain)
    both = nn.ModuleDict({"module": torch.compile(Net())})
    assert assign(both) == named("module._orig_mod.", plain)
    network = Net()
    network.blocks[1] = torch.compile(network.blocks[1])
    assert assign(network)["muon"] == ["blocks.0.mlp.weight", "blocks.1._orig_mod.mlp.weight"]
    child = nn.ModuleDict({"module": Net().blocks})
    assert assign(child, ("module",))["muon"] == ["module.0.mlp.weight", "module.1.mlp.weight"]


def test_a_compiled_network_trains_as_a_plain_one():
    network, plain = Net(), Net()
    compiled = torch.compile(network, backend="eager")
    optimizer, steady = MuonAdamW()(compiled), MuonAdamW()(plain)
    train(compiled, optimizer, range(2))
    train(plain, steady, range(2))
    assert_same(everything(network, optimizer), everything(plain, steady))


def test_a_network_whose_blocks_are_frozen_has_no_muon():
    network = Net()
    network.blocks.requires_grad_(False)
    (group,) = MuonAdamW()(network).param_groups
    assert "betas" in group
    network.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter asks for a gradient"):
        MuonAdamW()(network)


def test_it_trains():
    network = Net()
    optimizer, losses = MuonAdamW(3e-2)(network), []
    for _ in range(60):
        losses.append(float(backward(network)))
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_every_setting_reaches_its_optimiser():
    muon, adamw = MuonAdamW(1e-2, 0.1, (0.8, 0.9), 0.7)(Net()).param_groups
    assert (muon["lr"], muon["weight_decay"], muon["momentum"]) == (1e-2, 0.1, 0.7)
    assert muon["adjust_lr_fn"] == "match_rms_adamw"
    (plain,) = PlainAdamW(1e-2, 0.1, (0.8, 0.9), fused=False)(Net()).param_groups
    for group in (adamw, plain):
        assert (group["lr"], group["weight_decay"]) == (1e-2, 0.1)
        assert group["betas"] == (0.8, 0.9)
    assert adamw["fused"] and not plain["fused"]


def test_misuse_is_one_clear_error():
    with pytest.raises(InputError, match="no linear layer inside 'layers'"):
        assign(Net(), ("layers",))
    with pytest.raises(InputError, match="learning_rate"):
        MuonAdamW(0.0)
    with pytest.raises(InputError, match=r"weight_decay = -0\.1"):
        MuonAdamW(1e-2, -0.1)
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match="two optimisers"):
        CombinedOptimizer([torch.optim.SGD([p], 0.1), torch.optim.SGD([p], 0.1)])
    with pytest.raises(InputError, match="2 groups of 1"):
        CombinedOptimizer([torch.optim.SGD([{"params": [p]}, {"params": [q]}], 0.1)])
    with pytest.raises(InputError, match="make a new"):
        PlainAdamW()(Net()).add_param_group({"params": [p]})
