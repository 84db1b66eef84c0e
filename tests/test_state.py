"""What a model keeps moves once a step, and is then what one plain forward pass leaves, however it
is kept and whatever a route evaluates beside that pass.
"""

from collections import deque

import pytest
import torch
from programs import choose
from torch import nn

from flowspace import CrossFlowLoss, DerivativeError, FiniteDifference, ForwardMode, SharedPrimal

ROUTES = [SharedPrimal(), ForwardMode(), FiniteDifference(), FiniteDifference(order=1)]


def mean(old, x):
    return 0.9 * old + 0.1 * x


def in_place(net, x):
    net.kept.lerp_(x, 0.1)


def by_out(net, x):
    torch.lerp(net.kept, x, 0.1, out=net.kept)


def by_data(net, x):
    net.kept.data = mean(net.kept.data, x)


def by_data_unread(net, x):
    net.kept.data = mean(net.kept, x)


def by_data_then_in_place(net, x):
    net.kept.data = mean(net.kept, x)
    net.kept.add_(1.0)


def by_data_and_in_place(net, x):
    net.kept.add_(x)
    net.kept.data = mean(net.kept, x)
    net.kept.add_(1.0)


def bound(net, x):
    net.kept = mean(net.kept, x)


def in_buffers(net, x):
    net._buffers["kept"] = mean(net.kept, x)


def registered_anew(net, x):
    new = mean(net.kept, x)
    del net.kept
    net.register_buffer("kept", new)


def parameter_by_data(net, x):
    net.frozen.data = mean(net.frozen.data, x)


def other_parameter(net, x):
    net.frozen = nn.Parameter(mean(net.frozen, x), requires_grad=False)


def average_of_weights(net, x):
    net.frozen.data = mean(net.frozen.data, net.linear.weight.data[0, :6])


def attribute(net, x):
    net.plain = mean(net.plain, x)


def entry(net, x):
    net.table["last"] = mean(net.table["last"], x)


def first_entry(net, x):
    net.table[len(net.table)] = x.clone()


def appended(net, x):
    net.several.append(x.clone())


def queued(net, x):
    net.queue.append(x.clone())


def numbered(net, x):
    net.calls += 1


def member(net, x):
    net.marks.add(len(net.marks))


def wrapped(net, x):
    net.linear.calls = getattr(net.linear, "calls", 0) + 1


STATES = [
    in_place,
    by_out,
    by_data,
    by_data_unread,
    by_data_then_in_place,
    by_data_and_in_place,
    bound,
    in_buffers,
    registered_anew,
    parameter_by_data,
    other_parameter,
    average_of_weights,
    attribute,
    entry,
    first_entry,
    appended,
    queued,
    numbered,
    member,
    wrapped,
]


class Keeping(nn.Module):
    """A network that keeps something of what it is given, beside running statistics."""

    def __init__(self, keep):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.keep = nn.Linear(7, 6), nn.BatchNorm1d(6), keep
        self.register_buffer("kept", torch.zeros(6))
        self.frozen = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.plain, self.table, self.several = torch.zeros(6), {"last": torch.zeros(6)}, []
        self.queue, self.calls, self.marks = deque(maxlen=3), 0, set()
        self.linear.calls = 0

    def forward(self, z, t):
        x = self.norm(self.linear(torch.cat([z, t[:, None]], 1))).tanh()
        with torch.no_grad():
            self.keep(self, x.detach()[0])
        return x

    def state(self):
        """All that it keeps, as numbers."""
        held = {name: value.tolist() for name, value in self.state_dict().items()}
        held["table"] = [(name, value.tolist()) for name, value in self.table.items()]
        held["queues"] = [[x.tolist() for x in each] for each in (self.several, self.queue)]
        held["others"] = self.plain.tolist(), self.calls, self.linear.calls, sorted(self.marks)
        return held


def point():
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    return z, torch.tensor([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("route", ROUTES, ids=repr)
@pytest.mark.parametrize("keep", STATES, ids=lambda keep: keep.__name__)
def test_what_a_model_keeps_moves_once_a_step(keep, route, rows):
    (z, t), plain, net = point(), Keeping(keep), Keeping(keep)

    def as_a_closure(z, t):
        return net(z, t)

    both = (z, t), (torch.ones_like(z), torch.ones_like(t))
    if isinstance(route, ForwardMode) and keep is by_data_and_in_place:
        with pytest.raises(DerivativeError, match="mutating directly"):
            route(as_a_closure, *both, choose(4, rows))
        return
    for _ in range(3):
        plain(z, t)
        route(as_a_closure, *both, choose(4, rows))
    assert net.state() == plain.state()


class Called:
    """An object that calls a network, and is none."""

    def __init__(self, net):
        self.net = net

    def __call__(self, z, t, s):
        return self.net(z, t)


@pytest.mark.parametrize("route", ROUTES, ids=repr)
def test_a_network_is_found_in_an_object_that_calls_it(route):
    (z, t), plain, net = point(), Keeping(attribute), Keeping(attribute)
    generator = torch.Generator().manual_seed(0)
    out = CrossFlowLoss(derivative=route)(Called(net), z, t=t, s=t / 2, generator=generator)
    plain(out.z_t, t)
    assert net.state() == plain.state()


@pytest.mark.parametrize("route", ROUTES[1:], ids=repr)
def test_a_tensor_keeps_its_memory_and_its_weights_are_trained(route):
    (z, t), net = point(), Keeping(average_of_weights)
    before = net.frozen, net.kept
    value, _ = route(net, (z, t), (torch.ones_like(z), torch.ones_like(t)))
    value.square().sum().backward()
    assert net.linear.weight.grad is not None
    assert (net.frozen, net.kept) == before or all(
        map(torch.equal, before, (net.frozen, net.kept))
    )
    assert net.frozen.data_ptr() and net.frozen.add(1).isfinite().all()


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 6), 0
        self.register_buffer("scale", torch.full((6,), 0.5))

    def forward(self, z, t):
        return torch.sin(self.linear(z) * t[:, None]) * self.scale


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("rows", [None, "half"])
@pytest.mark.parametrize("route", ROUTES[1:], ids=repr)
@pytest.mark.parametrize("within", [False, True])
def test_a_script_has_no_attributes_to_put_back(within, route, rows):
    (z, t), net = point(), Scripted()
    script = torch.jit.script(net)
    model = nn.Sequential()
    model.inner = script

    def of_inner(z, t):
        return model.inner(z, t)

    both, mask = ((z, t), (torch.ones_like(z), torch.ones_like(t))), choose(4, rows)
    if isinstance(route, ForwardMode):
        for _ in range(2):
            with pytest.raises(DerivativeError, match=r"torch\.jit, which drops tangents"):
                route(of_inner if within else script, *both, mask)
        return
    found = route(of_inner if within else script, *both, mask)[1]
    torch.testing.assert_close(found, route(net, *both, mask)[1], rtol=1e-3, atol=1e-3)
