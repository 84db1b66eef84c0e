"""The pages that tell how to come here from another library, and how to use this one with others:
the same numbers before and after, and the scripts in two processes.

That every block of them runs is tested in test_docs.py.
"""

import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from strategies import normal
from test_docs import DOCS, blocks
from tolerances import EXACT, TRAINED, within

from flowspace import (
    CosineSchedule,
    LinearSchedule,
    MeanFlowLoss,
    PolynomialSchedule,
    Schedule,
)

close = within(TRAINED)


def programs(page):
    """The Python of a page, in order."""
    found = blocks(DOCS / f"{page}.md")
    return [block for block in found if block.kind == "python"]


def names_of(page, *needed):
    """What the functions and classes of a page are called; its calls are left out."""
    for module in needed:
        pytest.importorskip(module)
    names = {"__name__": page}
    for block in programs(page):
        code = re.split(r"^torch\.manual_seed", block.code, flags=re.MULTILINE)[0]
        if re.search(r"^(def|class) ", code, re.MULTILINE):
            exec(re.split(r"^(?:net|out|model) = ", code, flags=re.MULTILINE)[0], names)
    return names


def batch(seed, lowest=0.02):
    """Data, noise, times from low to 1, and destinations: at 0, between and on the diagonal."""
    t = torch.linspace(lowest, 1, 8, dtype=torch.float64)
    shares = torch.tensor([0, 0.3, 0.7, 1] * 2, dtype=torch.float64)
    return normal(seed, 8, 4), normal(seed + 1, 8, 4), t, t * shares


def network(names, seed, **options):
    torch.manual_seed(seed)
    return names["Net"](**options).double()


def same(net, before, after):
    """Two losses of shape (B,) and their gradients are the same; neither is zero."""
    close(after, before)
    assert before.shape == (8,) and bool((before > 0).all())
    parameters = list(net.parameters())
    old = torch.autograd.grad(before.mean(), parameters)
    new = torch.autograd.grad(after.mean(), parameters)
    for found, wanted in zip(new, old, strict=True):
        close(found, wanted)
        assert wanted.abs().max() > 0


# --- coming from


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("page", ["coming_from_mean_flow", "coming_from_pixel_mean_flow"])
def test_a_script_with_jvp_has_the_loss_and_the_gradients_of_the_objective(page, seed):
    names, (x, noise, t, s) = names_of(page), batch(seed)
    net = network(names, seed)
    same(net, names["before"](net, x, noise, t, s), names["after"](net, x, noise, t, s))


@pytest.mark.parametrize("seed", range(3))
def test_pixel_mean_flow_with_two_heads_is_the_script_with_two_heads(seed):
    names, (x, noise, t, s) = names_of("coming_from_pixel_mean_flow"), batch(seed)
    net = network(names, seed, heads=2)
    old = names["before_with_head"](net, x, noise, t, s)
    same(net, old, names["after_with_head"](net, x, noise, t, s))


def test_a_network_of_the_duration_is_differentiated_through_it():
    names, (x, noise, t, s) = names_of("coming_from_mean_flow"), batch(0)
    net = network(names, 0)

    def script(z, t, r):
        return net(z, t, t - r)

    out = names["loss_fn"](names["with_duration"](net), x, noise=noise, t=t, s=s)
    same(net, names["before"](script, x, noise, t, s), out.loss)


def test_the_guidance_of_the_page_is_the_mixture_of_the_paper():
    names = {}
    [code] = [b.code for b in programs("coming_from_mean_flow") if "Guidance(" in b.code]
    exec("from flowspace import MeanFlowLoss\n" + code, names)
    guidance = names["guidance"]
    assert isinstance(names["guided"], MeanFlowLoss)
    v, t = normal(0, 8, 4), batch(0)[2]
    own = {"cond": normal(1, 8, 4), "null": normal(2, 8, 4)}

    def velocity(cond):
        return own["null" if bool((cond["labels"] == 1000).all()) else "cond"]

    labels, kept = torch.arange(8), torch.zeros(8, dtype=torch.bool)
    found = guidance.guided(v, velocity, t, {"labels": labels}, kept)
    omega, kappa = 1.0, 0.5
    mixed = omega * v + (1 - omega - kappa) * own["null"] + kappa * own["cond"]
    close(found, torch.where((t <= 0.8)[:, None], mixed, v))


LIBRARIES = {"coming_from_flow_matching": "flow_matching", "coming_from_torchcfm": "torchcfm"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("page", LIBRARIES)
def test_a_library_whose_time_runs_the_other_way_has_the_same_loss(page, seed):
    names = names_of(page, LIBRARIES[page])
    net, (x, noise, _, _) = network(names, seed), batch(seed)
    t = torch.linspace(0, 0.95, 8, dtype=torch.float64)
    same(net, names["before"](net, x, noise, t), names["after"](net, x, noise, t))


SCHEDULES = {
    "CondOTScheduler()": LinearSchedule(),
    "PolynomialConvexScheduler(n)": PolynomialSchedule(3),
    "CosineScheduler()": CosineSchedule(),
    "LinearVPScheduler()": Schedule("1 - t", "sqrt(1 - (1 - t)**2)"),
}


@pytest.mark.parametrize("theirs", SCHEDULES)
def test_a_scheduler_of_flow_matching_is_the_schedule_beside_it_in_the_table(theirs):
    pytest.importorskip("flow_matching")
    from flow_matching.path import AffineProbPath, scheduler

    made = eval(theirs, vars(scheduler) | {"n": 3})
    x, noise, t, _ = batch(0)
    sample = AffineProbPath(scheduler=made).sample(x_0=noise, x_1=x, t=1 - t)
    z_t, velocity = SCHEDULES[theirs].perturb(x, noise, t)
    close(z_t, sample.x_t)
    at = t < 1  # their variance-preserving velocity is 0/0 where there is no data
    close(velocity[at], -sample.dx_t[at])
    [row] = [line for line in page_lines("coming_from_flow_matching") if f"`{theirs}`" in line]
    ours = row.split("|")[2].strip(" `")
    assert eval(ours, vars(sys.modules["flowspace.schedules"]) | {"n": 3}) == SCHEDULES[theirs]


def page_lines(page):
    return (DOCS / f"{page}.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("theirs", "schedule"),
    [
        ("ConditionalFlowMatcher", LinearSchedule()),
        ("VariancePreservingConditionalFlowMatcher", CosineSchedule()),
    ],
)
def test_a_matcher_of_torchcfm_has_the_path_and_the_target_of_a_schedule(theirs, schedule):
    torchcfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    x, noise, t, _ = batch(0)
    matcher = getattr(torchcfm, theirs)(sigma=0.0)
    _, xt, ut = matcher.sample_location_and_conditional_flow(noise, x, t=1 - t)
    z_t, velocity = schedule.perturb(x, noise, t)
    within(EXACT)(z_t, xt)
    within(EXACT)(velocity, -ut)


# --- with several processes


def torchrun(script, folder):
    """Run a script in two processes, and return what they printed."""
    path = folder / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            path,
        ],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ENDS = "\nos._exit(0)  # gloo's threads now and then abort an interpreter that ends by itself\n"


@pytest.mark.parametrize("page", ["with_ddp", "with_fsdp"])
def test_the_script_of_a_page_trains_in_two_processes(page, tmp_path):
    [script] = [b.code for b in programs(page) if b.mark == "not run"]
    printed = torchrun(script + ENDS, tmp_path)
    for rank in range(2):
        assert f"process {rank} of 2: loss " in printed
    weights = torch.load(tmp_path / "model.pt")
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_the_script_of_accelerate_trains_in_two_processes_by_torchrun(tmp_path):
    pytest.importorskip("accelerate")
    [script] = [b.code for b in programs("with_accelerate")]
    printed = torchrun("import os\n" + script + ENDS, tmp_path)
    for rank in range(2):
        assert f"process {rank} of 2: loss " in printed


TWO_OF_LIGHTNING = """
import torch.distributed as dist


class Compared(lightning.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        assert dist.get_world_size() == 2
        for parameter in module.parameters():
            both = [torch.empty_like(parameter.grad) for _ in range(2)]
            dist.all_gather(both, parameter.grad)
            assert torch.equal(*both), "the gradients differ between the processes"


torch.manual_seed(int(os.environ["RANK"]))
loader = DataLoader(TensorDataset(torch.randn(128, 4), torch.randn(128, 16)), batch_size=32)
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", callbacks=Compared(), **options
)
trainer.fit(OneStep(), loader)
print(f"process {dist.get_rank()} of {dist.get_world_size()}", flush=True)
"""


def test_lightning_averages_the_gradients_of_two_processes(tmp_path):
    pytest.importorskip("lightning")
    module = next(b.code for b in programs("with_lightning") if "LightningModule" in b.code)
    printed = torchrun("import os\n" + module + TWO_OF_LIGHTNING + ENDS, tmp_path)
    assert "process 0 of 2" in printed and "process 1 of 2" in printed


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 1.0, "inference_mode": True},
    ],
    ids=str,
)
def test_the_options_of_lightning_that_the_page_names_work(options, tmp_path):
    lightning = pytest.importorskip("lightning")
    names = {}
    exec(next(b.code for b in programs("with_lightning") if "LightningModule" in b.code), names)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet, **options)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 16))
    module = names["OneStep"]()
    before = [parameter.clone() for parameter in module.parameters()]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    for old, new in zip(before, module.parameters(), strict=True):
        assert bool(new.isfinite().all()) and bool((new != old).any())
    noise = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), 8)
    [samples] = trainer.predict(module, noise)
    assert samples.shape == (8, 16) and bool(samples.isfinite().all())


# --- with torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_blocks_that_inductor_compiled_give_the_loss_of_the_plain_network():
    names = {}
    exec(programs("with_compile")[1].code.split("net = Net()")[0], names)
    torch.manual_seed(0)
    plain, net = names["Net"](), names["Net"]()
    net.load_state_dict(plain.state_dict())
    for block in net.blocks:
        block.compile(mode="reduce-overhead")
    t = torch.linspace(0.1, 1, 8)
    rest = {"noise": torch.randn(8, 4), "t": t, "s": t * torch.tensor([0, 1.0] * 4)}
    z, x = torch.randn(8, 4), torch.randn(8, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a compiled part")
        out = names["CrossFlowLoss"]()(net, z, x, **rest)
    wanted = names["CrossFlowLoss"]()(plain, z, x, **rest)
    within(1e-5)(out.loss, wanted.loss)
