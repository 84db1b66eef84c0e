"""Plausible mistakes: each is one clear error of its own, before anything is lost."""

import copy
import pickle

import pytest
import sympy
import torch
from torch import nn

from flowspace import (
    AbsoluteError,
    Adaptive,
    CascadeLoss,
    ConsistencyLoss,
    CriterionError,
    CrossFlowLoss,
    Derivative,
    FlowMap,
    Guidance,
    HuberError,
    ImprovedMeanFlowLoss,
    InputError,
    LinearSchedule,
    LogitNormalTimes,
    MatchedStatistic,
    MeanFlowDistillationLoss,
    MeanFlowLoss,
    MeanFlowStatistic,
    PixelMeanFlowLoss,
    Schedule,
    ScheduleError,
    SharedPrimal,
    SquaredError,
    Statistic,
    TimeError,
    TimePairs,
    TimeSampler,
    ToDataTimes,
    TrajectoryMatchingLoss,
    UniformTimes,
    VelocityFlow,
    adapt,
    check_criteria,
)
from flowspace.time_functions import TimeFunction

Z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def model(z, t, s):
    return z * t[:, None]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "linear"},
        {"statistic": "matched"},
        {"times": UniformTimes()},
        {"penalty": "l1"},
        {"derivative": "auto"},
        {"weight": 2.0},
        {"velocity": torch.ones(3)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_argument_of_the_wrong_kind_is_named_with_what_to_write(options):
    with pytest.raises(
        InputError, match=f"got {next(iter(options))} = .*; .*write|it is a function"
    ):
        CrossFlowLoss(**options)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: TimePairs(0.5), TimeError),
        (lambda: TimePairs(UniformTimes), TimeError),
        (lambda: LogitNormalTimes(mean=float("nan")), TimeError),
        (lambda: Adaptive(1.0), InputError),
        (lambda: Adaptive(SquaredError), InputError),
        (lambda: FlowMap(model, LinearSchedule, MatchedStatistic()), InputError),
        (lambda: FlowMap(model, LinearSchedule(), None), InputError),
        (lambda: check_criteria(MatchedStatistic(), LinearSchedule()), InputError),
        (lambda: ConsistencyLoss(literal=True), CriterionError),
    ],
)
def test_parts_refuse_what_they_cannot_use(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    ("broken", "came"),
    [
        (lambda z, t, s: (z, z), "tuple"),
        (lambda z, t, s: z.sum(), r"shape \(\)"),
        (lambda z, t, s: z[:2], r"shape \(2, 3\)"),
    ],
)
def test_a_model_must_return_one_tensor_of_rows(broken, came):
    with pytest.raises(InputError, match=f"got {came}"):
        CrossFlowLoss()(broken, Z)


def test_cond_is_a_dict():
    with pytest.raises(InputError, match="write a dict"):
        CrossFlowLoss()(model, Z, cond=torch.ones(6))


def test_a_velocity_of_another_shape_is_refused():
    with pytest.raises(InputError, match="from velocity for states"):
        CrossFlowLoss(velocity=lambda z, t: z[:, :1])(model, Z)


def test_times_that_are_text_are_refused():
    with pytest.raises(TimeError, match=r"got t = '0\.5'"):
        CrossFlowLoss()(model, Z, t="0.5", s=torch.tensor(0.1))


def test_a_weight_may_be_a_number_at_every_time():
    plain, doubled = (
        CrossFlowLoss(weight=weight)(model, Z, generator=torch.Generator().manual_seed(1))
        for weight in (None, lambda t, s: 2.0)
    )
    torch.testing.assert_close(4 * plain.loss, doubled.loss)


@pytest.mark.parametrize("delta", ["sqrt(s - t)", "log(t - s - 5)", lambda t, s: t * torch.nan])
def test_a_delta_that_is_not_real_or_finite_is_refused(delta):
    with pytest.raises(CriterionError, match="not a finite real number"):
        Statistic("1", delta)


def test_the_matched_statistic_says_where_its_gamma_is():
    with pytest.raises(CriterionError, match=r"on\(schedule\).gamma"):
        _ = MatchedStatistic().gamma
    assert MatchedStatistic().on(LinearSchedule()).gamma.expression == sympy.Integer(1)
    assert (
        copy.deepcopy(MatchedStatistic())
        == pickle.loads(pickle.dumps(MatchedStatistic()))
        == MatchedStatistic()
    )
    assert MeanFlowStatistic() != MatchedStatistic()


def test_several_steps_keep_half_precision():
    network = nn.Linear(2, 2).bfloat16()

    def half(z, t, s):
        return network(z)

    noise = torch.randn(4, 2).bfloat16()
    for encode in (None, lambda x: x.float()):
        flow_map = FlowMap(half, LinearSchedule(), MatchedStatistic())
        assert flow_map.sample(noise, steps=3, encode=encode).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PixelMeanFlowLoss()(lambda z, t, s: z[:, :1], Z), "states and predictions"),
        (lambda: PixelMeanFlowLoss()(lambda z, t, s: z.sum(-1), Z), "states and predictions"),
        (
            lambda: PixelMeanFlowLoss().flow_map(lambda z, t, s: torch.ones(2)).sample(Z),
            "got shape .* from the model",
        ),
        (lambda: CascadeLoss(cascade=0, objective=CrossFlowLoss()), "got cascade = 0"),
        (lambda: TimeFunction("1e300", 1)(torch.tensor([0.5])), "cannot hold"),
    ],
    ids=["broadcast", "summed", "sampled", "cascade", "overflow"],
)
def test_what_a_search_over_inputs_found_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


# --- parts of one's own


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, z, t, s):
        times = torch.stack([t, s], 1).to(z.dtype)
        return self.linear(torch.cat([z, times], 1))


def drawn(t, s):
    """Return a function that draws these pairs."""
    return lambda rows, *, generator, device, dtype: (t, s)


class BeyondNoise(TimeSampler):
    def draw(self, rows, source):
        return 3 + source.uniform(rows)


ONES = torch.ones(6)
CROSS = CrossFlowLoss()
FLOW = CROSS.flow_map(model)


COEFFICIENTS = MatchedStatistic().coefficients(LinearSchedule())


class Unbegun(Schedule):
    """A schedule whose ``__init__`` forgets the one that it overrides."""

    def __init__(self, power):
        self.power = power


class Route(Derivative):
    """A route that returns what it was made with."""

    def __init__(self, found):
        self.found = found

    def evaluate(self, fn, primals, tangents, indices):
        return self.found


OF_ONES_OWN = {
    "a route of one tensor": (
        lambda: CrossFlowLoss(derivative=Route(Z))(model, Z),
        InputError,
        r"got dtype .* from Route.evaluate; return the value and the derivative",
    ),
    "a route of another shape": (
        lambda: CrossFlowLoss(derivative=Route((Z, Z[:2])))(model, Z),
        InputError,
        r"a derivative of .* shape \(2, 3\) beside a value of .* from Route.evaluate",
    ),
    "rows of another number": (
        lambda: SharedPrimal()(lambda z: z, (Z,), (Z,), torch.ones(2, dtype=torch.bool)),
        InputError,
        r"got rows of shape \(2,\) for 6 rows",
    ),
    "alpha that torch takes for a constant": (
        lambda: Schedule(lambda t: (1 - t).detach(), lambda t: t),
        ScheduleError,
        "derivative in t is 0 for torch.*rise by -1 .*without .detach",
    ),
    "beta from a table": (
        lambda: Schedule(
            lambda t: 1 - t,
            lambda t: torch.linspace(0, 1, 100_001)[(t * 100_000).round().long()].double(),
        ),
        ScheduleError,
        "rise by 1 a unit of time",
    ),
    "delta that torch takes for a constant": (
        lambda: Statistic("1", lambda t, s: (-t / (t - s)).detach()),
        CriterionError,
        "got delta = .*derivative in t is 0 for torch",
    ),
    "gamma of one time": (
        lambda: Statistic(lambda t: t, "-t"),
        CriterionError,
        "gamma fails on two float64 tensors",
    ),
    "kappa without a schedule": (
        lambda: Statistic.from_kappa("s", "1"),
        InputError,
        "got schedule = 's'",
    ),
    "times that are not in order": (
        lambda: CrossFlowLoss(times=drawn(0.1 * ONES, ONES))(model, Z),
        TimeError,
        "s = 1 in row 0 from times = .*out of range",
    ),
    "times of zero": (
        lambda: CrossFlowLoss(times=drawn(0 * ONES, 0 * ONES))(model, Z),
        TimeError,
        "t = 0, .* out of range",
    ),
    "times beyond noise": (
        lambda: CrossFlowLoss(times=TimePairs(BeyondNoise()))(model, Z),
        TimeError,
        "out of range",
    ),
    "one time": (
        lambda: CrossFlowLoss(times=lambda rows, **_: ONES)(model, Z),
        TimeError,
        r"got dtype .* from .*; return t and s of shape \(6,\)",
    ),
    "lists of times": (
        lambda: CrossFlowLoss(times=drawn([0.5] * 6, [0.5] * 6))(model, Z),
        TimeError,
        "got type list and type list",
    ),
    "a number for a difference": (
        lambda: SquaredError()(1.0),
        InputError,
        r"got a difference of type float; write a tensor of shape \(B, \*\)",
    ),
    "a difference without rows": (
        lambda: HuberError()(torch.tensor(1.0)),
        InputError,
        r"a difference of dtype torch.float32 and shape \(\)",
    ),
    "a list for a difference": (
        lambda: Adaptive()([1.0]),
        InputError,
        "a difference of type list",
    ),
    "an absolute error of a number": (
        lambda: AbsoluteError()(1.0),
        InputError,
        "a difference of type float",
    ),
    "times on no device": (
        lambda: TimePairs()(4, device="gpux"),
        InputError,
        "got device = 'gpux'; write for example \"cpu\"",
    ),
    "times of a dtype's name": (
        lambda: TimePairs()(4, dtype="float32"),
        InputError,
        "got dtype = 'float32'; write a real one",
    ),
    "whole times": (
        lambda: UniformTimes()(4, dtype=torch.int64),
        InputError,
        "got dtype = torch.int64; write a real one",
    ),
    "a derivative of nothing": (
        lambda: SharedPrimal()(None, (Z,), (Z,)),
        InputError,
        "got type NoneType for a function",
    ),
    "a number for a tangent": (
        lambda: SharedPrimal()(model, (Z, ONES, ONES), (Z, 1.0, None)),
        InputError,
        "got a tangent of type float for a primal of dtype",
    ),
    "a penalty of nothing": (
        lambda: CrossFlowLoss(penalty=lambda difference: None)(model, Z),
        InputError,
        "got type NoneType from penalty",
    ),
    "a weight of nothing": (
        lambda: CrossFlowLoss(weight=lambda t, s: None)(model, Z),
        InputError,
        "got type NoneType from weight",
    ),
    "a weight of other rows": (
        lambda: CrossFlowLoss(weight=lambda t, s: t[:2])(model, Z),
        InputError,
        r"shape \(2,\) from weight",
    ),
    "a velocity of nothing": (
        lambda: CrossFlowLoss(velocity=lambda z, t: None)(model, Z),
        InputError,
        "got type NoneType from velocity",
    ),
    "a model for a velocity": (
        lambda: CrossFlowLoss(velocity=model)(model, Z),
        InputError,
        r"cannot be called as velocity\(z_t, t\): missing",
    ),
    "a model for a teacher": (
        lambda: MeanFlowDistillationLoss(teacher=model)(model, Z),
        InputError,
        r"cannot be called as teacher\(z_t, t\)",
    ),
    "a model for a teacher on its trajectory": (
        lambda: TrajectoryMatchingLoss(teacher=model)(model, Z),
        InputError,
        r"cannot be called as teacher\(z_t, t\)",
    ),
    "a teacher of nothing": (
        lambda: TrajectoryMatchingLoss(teacher=lambda z, t: None)(model, Z),
        InputError,
        "got type NoneType from teacher",
    ),
    "an own velocity of another shape": (
        lambda: ImprovedMeanFlowLoss()(lambda z, t, s: torch.cat([z, z], 1), Z),
        InputError,
        r"got shape \(6, 6\) from the model",
    ),
    "complex numbers": (
        lambda: CROSS(lambda z, t, s: z + 0j, Z),
        InputError,
        "got dtype torch.complex64 from the model",
    ),
    "whole numbers": (
        lambda: CROSS.flow_map(lambda z, t, s: z.long()).sample(Z),
        InputError,
        "got dtype torch.int64 from the model",
    ),
    "float64 latents": (
        lambda: CROSS(Network(), Z.double()),
        InputError,
        r"latents of torch.float64 for a model of torch.float32; write latents.to\(torch.float32",
    ),
    "float64 noise": (
        lambda: CROSS.flow_map(Network()).sample(Z.double()),
        InputError,
        "states of torch.float64 for a model of torch.float32",
    ),
    "latents on another device": (
        lambda: CROSS(Network().to("meta"), Z),
        InputError,
        "got latents on cpu for a model on meta",
    ),
    "targets on another device": (
        lambda: CROSS(model, Z, Z.to("meta")),
        InputError,
        "got targets on meta beside latents on cpu",
    ),
    "noise on another device": (
        lambda: CROSS(model, Z, noise=Z.to("meta")),
        InputError,
        "got noise on meta beside latents on cpu",
    ),
    "latents of whole numbers": (
        lambda: LinearSchedule().perturb(torch.full((6, 3), 3), Z, 0.5 * ONES),
        InputError,
        "got latents of dtype torch.int64",
    ),
    "no noise": (
        lambda: LinearSchedule().perturb(Z, None, 0.5 * ONES),
        InputError,
        "got noise of type NoneType",
    ),
    "guidance by a number": (
        lambda: FLOW.sample(Z, guidance=2.0),
        InputError,
        "got guidance = 2.0; write for example Guidance",
    ),
    "a velocity guided by a number": (
        lambda: VelocityFlow(lambda z, t: z).sample(Z, guidance=2.0),
        InputError,
        "got guidance = 2.0",
    ),
    "noise of whole numbers for a field": (
        lambda: VelocityFlow(lambda z, t: z).sample(torch.ones(2, 3, dtype=torch.int64)),
        InputError,
        "got noise of dtype torch.int64",
    ),
    "no rows for a field": (
        lambda: VelocityFlow(lambda z, t: z).sample(Z[:0]),
        InputError,
        r"got noise of shape \(0, 3\)",
    ),
    "a list of conditions for a field": (
        lambda: VelocityFlow(lambda z, t: z).sample(Z, cond=[1]),
        InputError,
        "got cond of type list",
    ),
    "a condition of nothing": (
        lambda: Guidance(null={"labels": None}),
        InputError,
        r"got null\['labels'\] = None",
    ),
    "no encoder": (lambda: FLOW.sample(Z, encode=3), InputError, "got encode = 3"),
    "an encoder of nothing": (
        lambda: FLOW.sample(Z, steps=3, encode=lambda x: None),
        InputError,
        "got NoneType from encode",
    ),
    "an encoder of another shape": (
        lambda: FLOW.sample(Z, steps=3, encode=lambda x: x[:, :2], renoise=False),
        InputError,
        r"got shape \(6, 2\) from encode for states of shape \(6, 3\)",
    ),
    "a field of nothing": (
        lambda: VelocityFlow(lambda z, t: None).sample(Z),
        InputError,
        "got type NoneType from velocity",
    ),
    "a field without times": (
        lambda: VelocityFlow(lambda z: z).sample(Z),
        InputError,
        r"cannot be called as velocity\(z_t, t\)",
    ),
    "latents for a model": (
        lambda: CROSS(Z, model),
        InputError,
        "an array of dtype torch.float32",
    ),
    "a whole number for a time": (
        lambda: CROSS(model, Z, t=1, s=0),
        TimeError,
        "got t = 1; .*write t = 1.0",
    ),
    "the names of times": (
        lambda: adapt(Network(), times="t"),
        InputError,
        "got times = 't'; .*as {'timestep'",
    ),
    "rows below zero": (lambda: TimePairs()(-1), InputError, "got rows = -1; write how many"),
    "half a row": (lambda: UniformTimes()(2.5), InputError, r"got rows = 2\.5"),
    "rows in text": (lambda: ToDataTimes()("3"), InputError, "got rows = '3'"),
    "a truth value of rows": (lambda: TimePairs()(True), InputError, "got rows = True"),
    "a seed for a generator": (
        lambda: TimePairs()(3, generator=0),
        InputError,
        "got generator = 0; write torch.Generator",
    ),
    "a schedule that was not begun": (
        lambda: CrossFlowLoss(schedule=Unbegun(2)),
        ScheduleError,
        r"got a Unbegun without alpha and beta; write super\(\).__init__\(alpha, beta\)",
    ),
    "plain numbers for times": (
        lambda: COEFFICIENTS.data(0.5, 0.2),
        InputError,
        "got times of type float and type float for a function of t and s; write a tensor",
    ),
    "one time of two": (
        lambda: COEFFICIENTS.data(ONES),
        InputError,
        r"got times of dtype torch.float32 and shape \(6,\) for a function of t and s",
    ),
    "no time": (lambda: COEFFICIENTS.data(), InputError, "got times of nothing"),
    "whole numbers for times": (
        lambda: TimeFunction("t / 2")(torch.tensor(1)),
        InputError,
        "got times of dtype torch.int64",
    ),
    "an output by number": (lambda: adapt(Network(), output=3), InputError, "got output = 3"),
}


@pytest.mark.parametrize(("make", "error", "says"), OF_ONES_OWN.values(), ids=OF_ONES_OWN)
def test_a_part_of_ones_own_that_does_not_fit_is_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_wrong_sampler_is_found_in_the_place_of_a_right_one():
    for _ in range(5):  # what is freed leaves its place in memory, and its id, to the next
        CrossFlowLoss(times=drawn(0.5 * ONES, 0.2 * ONES))(model, Z)
        wrong = CrossFlowLoss(times=drawn(0.1 * ONES, ONES))
        for _ in range(2):
            with pytest.raises(TimeError, match="out of range"):
                wrong(model, Z)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: TimePairs(mask_first=value),
        lambda value: SquaredError(summed=value),
        lambda value: AbsoluteError(summed=value),
        lambda value: HuberError(summed=value),
        lambda value: ImprovedMeanFlowLoss(head=value),
        lambda value: PixelMeanFlowLoss(own_tangent=value),
        lambda value: MeanFlowLoss(check=value),
    ],
)
def test_a_switch_is_true_or_false(make):
    with pytest.raises(InputError, match="= 'no'; write True or False"):
        make("no")


@pytest.mark.parametrize(
    "alpha",
    [
        lambda t: torch.where(t < 0.5, 1 - 1.5 * t, 0.5 - 0.5 * t),
        lambda t: (1 - t.float()).double(),
        lambda t: (1 - t) ** 20,
    ],
    ids=["kink", "single precision", "steep"],
)
def test_a_callable_that_torch_follows_is_a_schedule(alpha):
    schedule = Schedule(alpha, lambda t: t)
    t = torch.tensor([0.3], dtype=torch.float64)
    assert schedule.alpha_dot(t) < 0


@pytest.mark.parametrize(
    ("alpha", "beta", "advice"),
    [
        ("t", "1 - t", "They are swapped: write alpha = 1 - t, beta = t"),
        ("2*t", "1 - t", None),
        ("t", "1 - t/2", None),
        ("1 - t/2", "t", "rescale it to zero terminal SNR"),
        ("1 + t/2", "t", None),
        ("1 - 2*t", "t", None),
    ],
)
def test_how_wrong_ends_are_mended_is_said_where_that_is_known(alpha, beta, advice):
    with pytest.raises(ScheduleError, match="but it must be") as raised:
        Schedule(alpha, beta)
    if advice is None:
        assert "swapped" not in str(raised.value) and "rescale" not in str(raised.value)
    else:
        assert advice in str(raised.value)
