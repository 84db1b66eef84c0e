"""`flowspace doctor`: what it says of a model is what the model is."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from flowspace import Derivative, InputError, SharedPrimal
from flowspace.cli import main
from flowspace.derivatives.shared_primal.kinds import warn_of_whole_numbers
from flowspace.doctor import libraries, machine, steps
from flowspace.doctor.examination import RouteFigures, examine_model
from flowspace.doctor.page import model_page
from flowspace.doctor.target import load

HEAD = """
import torch
from torch import nn

net = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 3))


def joined(z_t, t, s):
    return torch.cat([z_t, t[:, None], s[:, None]], 1)


def plain(z_t, t, s):
    return net(joined(z_t, t, s))


class Wrapped(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, z_t, t, s):
        return self.call(self.net, z_t, t, s)


def batch(model):
    return model, torch.randn(6, 2), torch.randn(6, 3)


"""


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """Examine a model that is written in a file, uncompiled and quickly."""
    monkeypatch.chdir(tmp_path)

    def one(program, name="build", **options):
        (tmp_path / "my_model.py").write_text(HEAD + textwrap.dedent(program))
        options = {"latents": None, "seconds": 0.2, "compiling": False} | options
        return examine_model(f"my_model.py:{name}", **options)

    return one


def by_name(found):
    return {route.name: route for route in found.routes}


def test_every_route_is_right_on_a_smooth_model_and_the_default_is_advised(examine):
    found = examine("def build(): return batch(plain)")
    routes = by_name(found)
    assert set(routes) == set(steps.ROUTES)
    assert routes["SharedPrimal()"].error < 1e-5 and routes["ForwardMode()"].error < 1e-5
    assert routes["FiniteDifference(order=2)"].error < routes["FiniteDifference(order=1)"].error
    assert all(route.eager.median > 0.5 for route in found.routes)
    assert found.accuracy.apart < 1e-6 and not found.hidden
    assert found.accuracy.findings == (False, False, True, True, 0)
    assert model_page(found).splitlines()[-1].startswith("Write: CrossFlowLoss(")


class Scaled(Derivative):
    """A wrong route: the derivative times 1.25."""

    def evaluate(self, fn, primals, tangents, indices):
        value, derivative = SharedPrimal().evaluate(fn, primals, tangents, indices)
        return value, 1.25 * derivative


def test_the_error_of_a_route_that_is_off_by_a_quarter_is_a_quarter(examine, monkeypatch):
    monkeypatch.setitem(steps.ROUTES, "SharedPrimal()", Scaled())
    found = examine("def build(): return batch(plain)")
    assert by_name(found)["SharedPrimal()"].error == pytest.approx(0.25, rel=1e-5)
    assert found.advised.name != "SharedPrimal()"  # which of the others depends on the machine


def figures(name, low, high, error=1e-6):
    return RouteFigures(name, error, steps.StepCost((low + high) / 2, low, high, 5), None, "")


@pytest.mark.parametrize(
    ("routes", "advised"),
    [
        (
            {"SharedPrimal()": (1.6, 1.7), "FiniteDifference(order=2)": (1.3, 1.4)},
            "SharedPrimal()",
        ),
        ({"SharedPrimal()": (2.6, 2.7), "ForwardMode()": (1.3, 1.4)}, "ForwardMode()"),
        ({"SharedPrimal()": (1.2, 2.7), "ForwardMode()": (1.0, 1.4)}, "SharedPrimal()"),
        (
            {"FiniteDifference(order=1)": (1.3, 1.4), "FiniteDifference(order=2)": (1.4, 1.5)},
            "FiniteDifference(order=2)",
        ),
    ],
)
def test_another_route_than_the_preferred_one_is_advised_where_it_is_clearly_cheaper(
    examine, routes, advised
):
    found = examine("def build(): return batch(plain)")
    measured = [figures(name, *cost) for name, cost in routes.items()]
    assert replace(found, routes=measured).advised.name == advised
    wrong = [replace(route, error=0.5) for route in measured]
    assert replace(found, routes=wrong).advised is None


def test_times_that_leave_torch_are_told_and_differences_are_advised(examine):
    found = examine("""
    def call(net, z_t, t, s):
        return net(joined(z_t, t, s)) * torch.tensor([float(x) for x in t])[:, None]
    def build(): return batch(Wrapped(call))
    """)
    routes = by_name(found)
    assert "leaves torch" in routes["SharedPrimal()"].failure
    assert "leaves torch" in routes["ForwardMode()"].failure
    assert found.accuracy.reference == "central differences in float64"
    assert found.advised.name == "FiniteDifference(order=2)"
    page = model_page(found)
    assert page.count("leaves torch") == 1
    assert page.splitlines()[-1] == "Write: CrossFlowLoss(derivative=FiniteDifference(order=2))"


def test_one_route_that_fails_does_not_end_the_others(examine, monkeypatch):
    class Broken(Scaled):
        def evaluate(self, fn, primals, tangents, indices):
            raise ZeroDivisionError("of its own")

    monkeypatch.setitem(steps.ROUTES, "ForwardMode()", Broken())
    routes = by_name(examine("def build(): return batch(plain)"))
    assert routes["ForwardMode()"].failure == "ZeroDivisionError: of its own"
    assert all(routes[name].right for name in routes if name != "ForwardMode()")


@pytest.mark.parametrize(
    ("call", "mix"),
    [("net(joined(z_t, t, s))", False), ("net(joined(z_t, t, s) - z_t.mean())", True)],
)
def test_rows_that_mix_are_found(examine, call, mix):
    found = examine(f"""
    def call(net, z_t, t, s):
        return {call}
    def build(): return batch(Wrapped(call))
    """)
    assert found.accuracy.findings.rows_mix is mix
    assert ("they mix" in model_page(found)) is mix


@pytest.mark.parametrize(
    ("times", "uses"),
    [("t, s", (True, True)), ("t, t", (True, False)), ("0 * t, 0 * s", (False, False))],
)
def test_a_model_that_does_not_use_its_times_is_told(examine, times, uses):
    found = examine(f"""
    def call(net, z_t, t, s):
        return net(joined(z_t, {times}))
    def build(): return batch(Wrapped(call))
    """)
    findings = found.accuracy.findings
    assert (findings.uses_t, findings.uses_s) == uses
    assert ("does not use s" in model_page(found)) is (uses == (True, False))


def test_whole_numbers_of_times_are_warned_of(examine):
    warn_of_whole_numbers.cache_clear()
    found = examine("""
    table = nn.Embedding(1000, 2)
    def call(net, z_t, t, s):
        return net(joined(z_t + table((t * 999).long()), t, s))
    def build(): return batch(Wrapped(call))
    """)
    assert "got whole numbers, by .long()" in model_page(found)
    assert by_name(found)["FiniteDifference(order=2)"].error > 1
    assert found.advised.name == "SharedPrimal()"


def test_what_is_detached_shows_as_a_disagreement(examine):
    found = examine("""
    def call(net, z_t, t, s):
        return net(joined(z_t, t.detach(), s))
    def build(): return batch(Wrapped(call))
    """)
    assert found.hidden and "disagree" in model_page(found)


def test_an_examination_leaves_the_model_as_it_was(examine):
    """Zeros stay zero, modes and dtypes stay, although all of them are changed on the way."""
    found = examine("""
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
            self.last = nn.Linear(8, 3)
            nn.init.zeros_(self.last.weight)
        def forward(self, z_t, t, s):
            return self.last(self.net(z_t * t[:, None]))
    def build(): return batch(Last())
    """)
    model = found.example.model
    assert not model.last.weight.any() and model.last.weight.dtype == torch.float32
    assert all(module.training for module in model.modules())
    assert found.accuracy.findings.zeros == 1 and found.accuracy.findings.draws
    assert by_name(found)["SharedPrimal()"].error < 1e-4
    assert "eval mode" in model_page(found) and "all zero" in model_page(found)


def test_a_shape_is_found_for_a_model_that_comes_alone(examine):
    assert examine("def build(): return plain").example.latents.shape == (4, 2)
    pictures = """
    class Pictures(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(5, 3, 3, padding=1)
        def forward(self, z_t, t, s):
            plane = torch.ones_like(z_t[:, :1])
            times = [plane * time[:, None, None, None] for time in (t, s)]
            return self.layer(torch.cat([z_t, *times], 1))
    build = Pictures()
    """
    assert examine(pictures).example.latents.shape == (4, 3, 32, 32)
    assert examine(pictures, latents=(2, 3, 8, 4)).example.images.shape == (2, 3, 8, 4)


def test_a_shape_is_not_one_whose_rows_are_taken_for_tokens(examine):
    """(4, 8) runs too, by broadcasting: its four rows are then four tokens of each row."""
    found = examine("""
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 24)
        def forward(self, z_t, t, s):
            q, k, v = self.layer(z_t + (t - s)[:, None, None]).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q, k, v)
    build = Attention()
    """)
    assert found.example.latents.shape == (4, 64, 8)
    assert found.accuracy.findings.rows_mix is False


def test_what_leaves_torch_unseen_is_wrong_and_not_advised(examine):
    found = examine("""
    def call(net, z_t, t, s):
        factor = torch.from_numpy(t.detach().numpy() ** 2)
        return net(joined(z_t, t, s)) * factor[:, None].to(z_t.dtype)
    def build(): return batch(Wrapped(call))
    """)
    assert by_name(found)["SharedPrimal()"].error > 0.05
    assert found.hidden and found.advised.name == "FiniteDifference(order=2)"


def test_parameters_of_half_precision_are_refused_with_the_dtypes(examine):
    with pytest.raises(InputError, match=r"bfloat16 .* and times of dtype torch.float32"):
        examine("""
        def build():
            return Wrapped(lambda net, *a: net(joined(*a))).bfloat16(), torch.ones(4, 2).bfloat16()
        """)


def test_a_condition_reaches_the_model(examine):
    found = examine("""
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.table = net, nn.Embedding(10, 2)
        def forward(self, z_t, t, s, labels):
            return self.net(joined(z_t + self.table(labels), t, s))
    def build():
        return *batch(Labelled()), {"labels": torch.arange(6)}
    """)
    assert all(route.right for route in found.routes)
    assert "cond labels" in model_page(found)


BAD = {
    "there is no such file": ("other.py:build", ""),
    "found no such module": ("other_module:build", ""),
    "did you mean build?": ("my_model:biuld", "def build(): return batch(plain)"),
    "has no nothing": ("my_model:nothing", ""),
    "which is a int and no function": ("my_model:build", "build = 3"),
    "build() fails: KeyError": ("my_model:build", "def build(): return {}['x']"),
    "build() fails: TypeError": ("my_model:build", "def build(width): return plain"),
    "cannot be imported: ZeroDivisionError": ("my_model:build", "1 / 0"),
    "imports no_such_library, which is not installed": (
        "my_model:build",
        "import no_such_library",
    ),
    "got 5 values from build()": ("my_model:build", "def build(): return plain, 1, 2, 3, 4"),
    "first from build(), which cannot be called": (
        "my_model:build",
        "def build(): return torch.ones(2, 2), plain",
    ),
    "got latents of dtype torch.int64": (
        "my_model:build",
        "def build(): return plain, torch.ones(2, 2).long()",
    ),
    "latents of dtype torch.float32 and shape (4, 7)": (
        "my_model:build",
        "def build(): return plain, torch.ones(4, 7)",
    ),
    "they have to be equal": (
        "my_model:build",
        "def build(): return plain, torch.ones(4, 2), torch.ones(4, 5)",
    ),
    "got cond of type list": (
        "my_model:build",
        "def build(): return plain, torch.ones(4, 2), torch.ones(4, 3), [1]",
    ),
    "returns one tensor of shape (B, *)": (
        "my_model:build",
        "def build(): return (lambda z_t, t, s: (z_t, t)), torch.ones(4, 2)",
    ),
    "found no shape of latents": ("my_model:build", "def build(): return lambda z, t, s: 1 / 0"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_target_that_cannot_be_used_is_one_clear_error(tmp_path, monkeypatch, message):
    name, program = BAD[message]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    (tmp_path / "my_model.py").write_text(HEAD + program)
    with pytest.raises(InputError) as raised:
        load(name)
    assert message in str(raised.value)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)


def test_json_says_the_same_as_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(HEAD + "def build(): return batch(plain)")
    arguments = ["doctor", "my_model.py:build", "--no-compile", "--seconds", "0.2", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["write"] == "SharedPrimal()"
    assert [route["name"] for route in found["routes"]] == list(steps.ROUTES)
    assert found["latents"] == [6, 2] and found["findings"]["uses_s"] is True


def test_a_model_that_no_route_differentiates_exits_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draws_anew = "generator = torch.Generator()\ndef build():\n    return (lambda z_t, t, s: "
    draws_anew += (
        "z_t + torch.randn(z_t.shape, generator=generator) * float(t[0])), torch.ones(4, 2)"
    )
    (tmp_path / "my_model.py").write_text(HEAD + draws_anew)
    assert main(["doctor", "my_model.py:build", "--no-compile", "--seconds", "0.1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("Write nothing yet")


def test_no_time_for_compiling_is_told(examine):
    found = examine("def build(): return batch(plain)", seconds=0.05, compiling=True)
    assert "--seconds" in found.compiled


@pytest.mark.slow
def test_compiled_steps_are_measured_where_there_is_a_compiler(examine):
    if not machine.examine_machine().compiling.startswith("yes"):
        pytest.skip("no C++ compiler")
    found = examine("def build(): return batch(plain)", seconds=120, compiling=True)
    assert not found.compiled and found.over_eager > 0
    assert by_name(found)["SharedPrimal()"].compiled.median > 0.5


def test_the_machine_page_says_what_is_installed_and_what_brings_the_rest(capsys, monkeypatch):
    listed = (
        ("ode", "torchdiffeq>=0.2.5"),
        ("odd", "flowspace[ode]"),
        ("odd", "no-such-thing>=2"),
    )
    monkeypatch.setattr(libraries, "_requirements", lambda: listed)
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert f"torch {torch.__version__}" in page and "math" in page
    assert "missing: no-such-thing" in page
    assert "pip install 'flowspace[odd" in page


def test_a_copy_that_is_not_installed_is_examined_all_the_same(capsys, monkeypatch):
    def nowhere(_):
        raise libraries.metadata.PackageNotFoundError("flowspace")

    libraries._requirements.cache_clear()
    monkeypatch.setattr(libraries.metadata, "requires", nowhere)
    assert main(["doctor"]) == 0
    assert "pip install -e ." in capsys.readouterr().out
    assert libraries.missing_library("torchdiffeq") == "pip install torchdiffeq"


def test_an_old_library_is_not_ready():
    assert libraries.Library("a", "1.10", "1.9.3").ready is False
    assert libraries.Library("a", "1.10", "1.10.0").ready is True
    assert libraries.Library("a", "2.9", "2.14.1+cpu").ready is True
    assert libraries.Library("a", "", "0.1").ready is True
    assert libraries.Library("a", "", None).ready is False


def test_the_smallest_extra_that_brings_a_library_is_named(monkeypatch):
    listed = (("ode", "torchdiffeq>=0.2.5"), ("test", "flowspace[ode]"), ("test", "pytest"))
    listed += (("demo", "scikit-learn>=1.4"),)
    monkeypatch.setattr(libraries, "_requirements", lambda: listed)
    assert libraries.missing_library("torchdiffeq") == "pip install 'flowspace[ode]'"
    assert libraries.missing_library("sklearn.datasets") == "pip install 'flowspace[demo]'"
    assert libraries.missing_library("never_heard_of") == "pip install never-heard-of"


def test_without_a_compiler_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(machine, "best_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert machine._compiling() == (
        "no: no C++ compiler is found; install g++ (or clang++), or set CXX"
    )


def test_the_machine_is_examined_in_less_time_than_torch_takes_to_be_imported():
    """Of processor time, within one process: beside other work both take longer."""
    code = (
        "import time, torch; imported = time.process_time(); from flowspace.cli import main; "
        "main(['doctor']); print((time.process_time() - imported) / imported)"
    )
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert min(float(each.stdout.splitlines()[-1]) for each in done) < 1
