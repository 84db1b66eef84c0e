"""Functions that work in each row of the batch on its own cost one pass, wherever the batch lies;
where they need the other rows, the derivative is right by a second one.
"""

import math

import pytest
import torch
import torch._dynamo  # where it is loaded within a pass, that costs another one
import torch.nn.functional as F
from comparison import by_differences, check_seeded
from programs import WHICH, choose
from strategies import normal
from torch import nn

from flowspace import SharedPrimal

SQUARE = normal(0, 6, 6)
TABLE = normal(1, 5, 6)
PICTURES, VOLUMES = normal(2, 4, 3, 5, 7), normal(3, 4, 2, 3, 5, 4)
CELLS = [normal(4, 24, 6), normal(5, 24, 6), normal(6, 24), normal(7, 24)]
SMALL = [normal(8, 4, 6), normal(9, 4, 4), normal(10, 4), normal(11, 4)]
ORDER = torch.tensor([[5, 1], [0, 2], [3, 4], [1, 5]])


def matrices(z, t):
    """Four of 3 x 3 for each row, in a stack that has the batch second."""
    entries = (z @ normal(12, 6, 36)).tanh() * t[:, None]
    return entries.unflatten(1, (4, 3, 3)).transpose(0, 1) + 4 * torch.eye(3, dtype=z.dtype)


def stacked(function):
    """A function of a stack of matrices; its first result, as rows of the batch."""

    def model(z, t):
        out = function(matrices(z, t))
        if isinstance(out, tuple):
            out = out[-1]
        return out.transpose(0, 1).flatten(1)

    return model


def symmetric(x):
    return x @ x.mT


LINALG = {
    "eig": lambda x: torch.linalg.eig(symmetric(x))[0].real,
    "lu_factor": lambda x: torch.linalg.lu_factor(x)[0],
    "inv_ex": lambda x: torch.linalg.inv_ex(x)[0],
    "solve from the right": lambda x: torch.linalg.solve(x, x.sin(), left=False),
    "solve vectors": lambda x: torch.linalg.solve(x, x[..., 0].sin()),
    "solve a vector": lambda x: torch.linalg.solve(x, normal(25, 3)),
    "solve for a stack of constants": lambda x: torch.linalg.solve(normal(26, 3, 3), x),
    "solve vectors by a constant": lambda x: torch.linalg.solve(
        normal(27, 4, x.shape[1], 3, 3), x[..., 0]
    ),
    "diagonal": lambda x: torch.linalg.diagonal(x) * x.diagonal(1, -1, -2).sum(-1, keepdim=True),
    "qr": torch.linalg.qr,
    "svdvals": torch.linalg.svdvals,
    "cholesky": lambda x: torch.linalg.cholesky(symmetric(x)),
    "inv": torch.linalg.inv,
    "inverse": torch.inverse,
    "pinv": torch.linalg.pinv,
    "det": torch.linalg.det,
    "slogdet": torch.linalg.slogdet,
    "matrix_exp": lambda x: torch.linalg.matrix_exp(x.contiguous()),
    "matrix_power": lambda x: torch.linalg.matrix_power(x, 3),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(symmetric(x)),
    "solve": lambda x: torch.linalg.solve(x, x.mT.sin()),
    "solve a constant": lambda x: torch.linalg.solve(x, normal(13, 4, x.shape[1], 3, 2)),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(x.triu(), x.sin(), upper=True),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(x, "nuc"),
}


def grid(z, t, axes=2):
    """Six points in each row's picture, some outside it."""
    points = (z @ normal(14, 6, 6 * axes)).tanh() * (1 + t[:, None])
    return points.reshape(len(z), 2, 3, *[1] * (axes - 2), axes)


def pictures(z, t):
    return PICTURES * (1 + z[:, :3, None, None] * t[:, None, None, None])


def cell(name):
    def model(z, t):
        state = z.sin() * t[:, None]
        if name == "lstm_cell":
            return torch.cat(torch.lstm_cell(z, (state, z.cos()), *CELLS), 1)
        if name == "gru_cell":
            return torch.gru_cell(z, state, *[w[:18] for w in CELLS])
        return torch.rnn_tanh_cell(z, state, *[w[:6] for w in CELLS])

    return model


def as_many_weights_as_rows(z, t):
    return torch.rnn_tanh_cell(z, z[:, :4] * t[:, None], *SMALL)


def triples(z):
    return z.view(len(z), 2, 3)


def points(z, t):
    """Five points in each row."""
    return (z @ normal(15, 6, 15)).view(len(z), 5, 3) * t[:, None, None]


def kernels(z, t, *shape):
    """Weights of a convolution for each row."""
    weights = (z @ normal(17, 6, math.prod(shape))).tanh() * t[:, None]
    return weights.reshape(len(z) * shape[0], *shape[1:])


def modulated(z, t):
    """As a StyleGAN does: the rows are groups of channels."""
    h = pictures(z, t).reshape(1, 12, 5, 7)
    out = F.conv2d(h, kernels(z, t, 2, 3, 3, 3), padding=1, groups=4)
    return out.reshape(4, 2, 5, 7).sin()


def enlarged(z, t):
    h = pictures(z, t).reshape(1, 12, 5, 7)
    out = F.conv_transpose2d(h, kernels(z, t, 3, 2, 2, 2), None, 2, 0, 0, 4)
    return out.reshape(4, 2, 10, 14).sin()


def smoothed(z, t):
    h = PICTURES.reshape(1, 12, 35)
    return F.conv1d(h, kernels(z, t, 3, 1, 5), padding=2, groups=12).view(4, 3, 35).sin()


def groups_of_two_rows(z, t):
    h = pictures(z, t).reshape(1, 12, 5, 7)
    return F.conv2d(h, normal(18, 4, 6, 3, 3), groups=2).reshape(4, -1)


def filled(z, t):
    out = torch.zeros(4, 6, dtype=z.dtype)
    out[:, :3] = z[:, :3] * t[:, None]
    out[..., 3] = t
    out[:, 4:] = 2
    return out * z


def spectrum(z, t):
    """As a Fourier neural operator keeps its modes."""
    out = torch.zeros(4, 6, dtype=torch.complex128)
    out[:, :4] = torch.fft.rfft(z)
    return torch.fft.irfft(out)[:, :6] * t[:, None]


def solution(z, t):
    """As torchdiffeq keeps its states, the batch second."""
    out = torch.empty(3, 4, 6, dtype=z.dtype)
    out[0], out[1] = z, z * t[:, None]
    out[2] = out[1] * out[0]
    return out[-1] + out.sum(0)


def summed(z, t):
    out = torch.zeros_like(z)
    out += z
    out *= t[:, None]
    return out.add_(1)


def scattered(z, t):
    return torch.zeros_like(z).scatter_(1, ORDER, z[:, :2]) * t[:, None]


def broadcast(z, t):
    out = torch.zeros(2, 4, 6, dtype=z.dtype)
    out[:] = z
    out[1, :, None] = t[:, None, None]
    return out.prod(0)


def seen_before(z, t):
    """The view is taken while its base is at rest."""
    out = torch.zeros(4, 6, dtype=z.dtype)
    view = out[:, :3]
    out[:] = z * t[:, None]
    return view * z[:, :3]


def seen_between(z, t):
    out = torch.zeros(4, 6, dtype=z.dtype)
    out[:, :3] = z[:, :3]
    view = out[:, 1:4]
    out[:, 3:] = z[:, 3:] * t[:, None]
    return torch.cat([view, out[:, 3:].sin()], 1)


def one_row_filled(z, t):
    out = torch.zeros_like(z)
    out[:] = z
    out[1] = z[2]
    return out * t[:, None]


def along_the_other_axis(z, t):
    out = torch.zeros(4, 4, dtype=z.dtype)
    out[:] = t
    return out * z[:, :4]


def weight_filled(z, t):
    weight = nn.Parameter(torch.zeros_like(z))
    with torch.no_grad():
        weight.copy_(z)
    return weight.detach() * 0 + weight * t[:, None]


def by_heads(z, t):
    """Two heads of four channels, as many as rows, with weights of their own."""
    heads = (z @ normal(19, 6, 8)).view(4, 2, 4).transpose(0, 1) * t[:, None]
    out = torch.bmm(heads, normal(20, 2, 4, 3))
    out = out + torch.baddbmm(normal(21, 2, 1, 3), heads.sin(), normal(22, 2, 4, 3))
    columns = normal(23, 2, 5, 4) @ heads.mT
    return torch.cat([out.transpose(0, 1), columns.permute(2, 0, 1)], 2)


def by_letters(z, t):
    """Ellipses, a diagonal, and an output that is not written."""
    h = triples(z) * t[:, None, None]
    h = torch.einsum("...i,ij->...j", h, SQUARE[:3, :3])
    h = torch.einsum("b...,b->b...", h, t.sin())
    squares = torch.einsum("...ij,...kj", h, h.sin())
    parts = torch.einsum("bii->bi", squares), torch.einsum(h, [0, 1, 2], SQUARE[:3], [2, 3])
    return torch.cat([part.flatten(1) for part in parts], 1)


def losses(z, t):
    h, p = z * t[:, None], z.sigmoid()
    named = {"reduction": "none"}
    return (
        F.mse_loss(h, z.sin(), **named)
        + F.huber_loss(h, TABLE[:1].expand(len(z), -1), **named)
        + F.smooth_l1_loss(z, h, **named)
        + F.binary_cross_entropy_with_logits(h, p, pos_weight=SQUARE[0].abs(), **named)
        + F.kl_div(h, p, **named)
    )


def pooled(z, t):
    h, indices = F.max_pool2d(pictures(z, t), 2, return_indices=True)
    wide = F.max_unpool2d(h.sin(), indices, 2, output_size=(5, 7))
    parts = wide, F.adaptive_max_pool3d(pictures(z, t), (2, 2, 3))
    return torch.cat([part.flatten(1) for part in parts], 1)


def enlarged_in_many_ways(z, t):
    h, volumes = pictures(z, t), VOLUMES * t.view(-1, 1, 1, 1, 1)
    parts = [
        F.interpolate(h, (6, 9), mode="bilinear", antialias=True),
        F.interpolate(h, (6, 9), mode="bicubic", antialias=True),
        F.interpolate(volumes, (4, 6, 5), mode="trilinear"),
        F.interpolate(volumes, (4, 6, 5), mode="nearest-exact"),
    ]
    return torch.cat([part.flatten(1) for part in parts], 1)


def turned(z, t):
    """As a spatial transformer turns its pictures."""
    rows = [t.cos(), -t.sin(), z[:, 0], t.sin(), t.cos(), z[:, 1]]
    theta = torch.stack(rows, 1).view(-1, 2, 3) * 0.2
    return F.grid_sample(
        PICTURES, F.affine_grid(theta, [4, 3, 5, 7], False), "bicubic", align_corners=False
    )


def windows(z, t):
    """As Longformer cuts its tokens into chunks that overlap."""
    h = z * t[:, None]
    return h.as_strided((4, 4, 3), (6, 1, 1)).sin() * h[:, 1:].contiguous()[:, None, :3]


def biased_in_part(z, t):
    """As MViT adds positions to its scores: all but those of one token."""
    scores = tokens_of(z) @ tokens_of(z.sin()).mT
    scores[:, 1:, 1:] += t[:, None, None] * SQUARE[:2, :2]
    return scores.softmax(-1).sum(1) * scores[:, 0].sin()


def tokens_of(z):
    return z.view(len(z), 3, 2)


def written_through_views(z, t):
    h = (z * 2).sin()
    first, second = h[:, :3], h.view(len(z), 2, 3)[:, 1]
    first.mul_(t[:, None])
    second[:, 1] = first[:, 0]
    h[:, 1::2] /= 3
    h.T[2].add_(t)
    return h * torch.cat([second, first], 1)


def parts_of_numbers(z, t):
    h = torch.complex(z, z.cos()).T.contiguous()
    h.real.mul_(t)
    h.imag[1:] += t
    h[2:4].conj().mul_(t)
    return torch.view_as_real(h.T).flatten(1)


def slots(z, t):
    out = torch.zeros(2, 4, 3, dtype=z.dtype)
    for i in range(2):
        out[i] = z[:, :3] * t[:, None]
        out[i, :, ::2] *= 2 + i
    return out.prod(0)


def a_copy_of_all(z, t):
    """One row for all of them, which are then written to."""
    h = (z * t[:, None]).unsqueeze(0).expand(3, 4, 6)
    first = h[0]
    first[:, 0] = 1
    return h.sum(0) + first


ONE_PASS = {
    "a view that is taken between": seen_between,
    "scores that are added to in part": biased_in_part,
    "views that are written through": written_through_views,
    "parts of complex numbers": parts_of_numbers,
    "slots that are filled and scaled": slots,
    "an expanded axis": a_copy_of_all,
    "equations with ellipses": by_letters,
    "losses of each number": losses,
    "pools with indices": pooled,
    "enlarged in many ways": enlarged_in_many_ways,
    "a picture that is turned": turned,
    "windows that overlap": windows,
    "vectors of a stack": lambda z, t: torch.linalg.solve(
        matrices(z, t)[0], normal(16, len(z), 3)
    ),
    "msort": lambda z, t: torch.msort((z * t[:, None]).T).T,
    "diag_embed": lambda z, t: torch.diag_embed(z).flatten(1) * t[:, None],
    "integrals": lambda z, t: (
        torch.cumulative_trapezoid(z) * torch.trapezoid(z * t[:, None])[:, None]
    ),
    "pairwise_distance": lambda z, t: F.pairwise_distance(z, z.sin(), keepdim=True) * t[:, None],
    "transforms of what is symmetric": lambda z, t: (
        torch.fft.hfft(torch.complex(z, z.sin()))
        * torch.fft.ihfft(z).imag.sum(1, True)
        * t[:, None]
    ),
    "heads with weights of their own": by_heads,
    "a matrix by a stack": lambda z, t: ((z * t[:, None]) @ normal(24, 4, 6, 3)).transpose(0, 1),
    "padded by nothing along the batch": lambda z, t: F.pad(z, (1, 2, 0, 0)) * t[:, None],
    "modulated": modulated,
    "modulated and enlarged": enlarged,
    "a picture smoothed by each row": smoothed,
    "zeros that are filled": filled,
    "modes": spectrum,
    "states of an integrator": solution,
    "zeros that are added to": summed,
    "zeros that are scattered into": scattered,
    "a batch that is filled twice": broadcast,
    **{f"linalg {name}": stacked(function) for name, function in LINALG.items()},
    "outer with frequencies": lambda z, t: torch.outer(t, SQUARE[0]).sin() * z,
    "outer, the batch second": lambda z, t: torch.outer(SQUARE[0], t).sin().T * z,
    "ger": lambda z, t: t.ger(SQUARE[0]).cos() * z,
    "tensordot": lambda z, t: torch.tensordot(z, SQUARE, 1) * t[:, None],
    "tensordot with the constant first": lambda z, t: torch.tensordot(SQUARE, z, ([1], [1])).T,
    "lstm_cell": cell("lstm_cell"),
    "gru_cell": cell("gru_cell"),
    "rnn_tanh_cell": cell("rnn_tanh_cell"),
    "a cell with as many weights as rows": as_many_weights_as_rows,
    "cross": lambda z, t: torch.cross(triples(z), triples(z.sin()), dim=2).flatten(1),
    "linalg.cross": lambda z, t: torch.linalg.cross(triples(z), triples(z.sin())).flatten(1),
    "take_along_dim": lambda z, t: torch.take_along_dim(z, ORDER, 1).repeat(1, 3) * t[:, None],
    "kthvalue": lambda z, t: z.kthvalue(2, dim=1, keepdim=True)[0] * z,
    "nanmedian": lambda z, t: z.nanmedian(1, keepdim=True)[0] * z,
    "aminmax": lambda z, t: z - z.aminmax(dim=1, keepdim=True)[1],
    "scatter into zeros": lambda z, t: torch.zeros_like(z).scatter(1, ORDER, z[:, :2]),
    "scatter a constant": lambda z, t: z.scatter(1, ORDER, TABLE[:4, :2]) * z,
    "scatter a number": lambda z, t: z.scatter(1, ORDER, 0.5) * z,
    "scatter_add": lambda z, t: z.scatter_add(1, ORDER, z[:, :2].sin()) * t[:, None],
    "special functions": lambda z, t: (
        torch.special.expm1(z) + torch.special.ndtr(z) + torch.special.expit(z).arctan()
    ),
    "samples": lambda z, t: F.grid_sample(pictures(z, t), grid(z, t), align_corners=False),
    "samples of a constant": lambda z, t: F.grid_sample(PICTURES, grid(z, t), align_corners=True),
    "samples at still points": lambda z, t: F.grid_sample(
        pictures(z, t), grid(SQUARE[:4], torch.ones_like(t)), align_corners=True
    ),
    "bicubic samples": lambda z, t: F.grid_sample(
        PICTURES, grid(z, t), "bicubic", "reflection", align_corners=True
    ),
    "nearest samples": lambda z, t: F.grid_sample(
        pictures(z, t), grid(z, t), "nearest", "border", align_corners=False
    ),
    "samples of volumes": lambda z, t: F.grid_sample(
        VOLUMES * t.view(-1, 1, 1, 1, 1), grid(z, t, 3), align_corners=False
    ),
    "distances in each row": lambda z, t: torch.cdist(points(z, t), points(z.sin(), t)),
    "distances to themselves": lambda z, t: torch.cdist(points(z, t), points(z, t)),
    "distances to a table": lambda z, t: torch.cdist(z * t[:, None], TABLE),
    "distances to a table of as many rows": lambda z, t: torch.cdist(z, SQUARE[:4]),
    "distances from a table": lambda z, t: torch.cdist(TABLE, z, p=1.0).T,
    "other distances": lambda z, t: torch.cdist(points(z, t), TABLE[:4, :3], p=3.0),
}
MIXED = {
    "an equation that sums over rows": lambda z, t: (
        z @ torch.einsum("bi,bj->ij", z, t[:, None] * z)
    ),
    "an ellipsis that is summed over": lambda z, t: z * torch.einsum("...i->i", z * t[:, None]),
    "windows across rows": lambda z, t: (z * t[:, None]).as_strided((4, 6), (5, 1)),
    "rrelu in place": lambda z, t: F.rrelu(z * t[:, None], training=True, inplace=True),
    "pooling of windows that are drawn": lambda z, t: F.fractional_max_pool2d(
        pictures(z, t), 2, (2, 3)
    ),
    "padded along the batch": lambda z, t: F.pad(z, (0, 0, 1, 0))[: len(z)] * t[:, None],
    "groups of two rows": groups_of_two_rows,
    "a view that was taken before": seen_before,
    "one row filled from another": one_row_filled,
    "the batch assigned to another axis": along_the_other_axis,
    "outer of both": lambda z, t: torch.outer(t, t.sin()) @ z,
    "distances between rows": lambda z, t: torch.cdist(z, z + 1),
    "scatter across rows": lambda z, t: z.scatter(0, torch.zeros(1, 6, dtype=torch.long), z),
}


def test_a_parameter_that_is_filled_moves():
    given = choose(4, "half")
    assert check_seeded(weight_filled, given, by_differences, tolerance=1e-7) == 2


@pytest.mark.parametrize("name", ONE_PASS)
@pytest.mark.parametrize("which", WHICH)
def test_one_pass_where_rows_stay_apart(name, which):
    model, given = ONE_PASS[name], choose(4, which)
    assert check_seeded(model, given, by_differences, tolerance=1e-7) == 1


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("which", WHICH)
def test_two_passes_where_they_do_not(name, which):
    passes = check_seeded(MIXED[name], choose(4, which), by_differences, tolerance=1e-7)
    assert passes == (2 if which in ("one", "half") else 1)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize("which", ["all", "half"])
@pytest.mark.parametrize("moving", ["rows", "matrices", "both"])
def test_products_of_groups_have_a_derivative(moving, which):
    """As the experts of transformers call them, in single precision; torch has none of it."""
    ends = torch.tensor([1, 4], dtype=torch.int32)
    z, v = normal(0, 4, 8).float(), normal(1, 4, 8).float()
    t, weights = torch.linspace(0.1, 0.9, 4), normal(2, 2, 8, 8).float()

    def factors(z, t):
        rows, matrices = normal(3, 4, 8).float(), weights
        if moving != "matrices":
            rows = z * t[:, None]
        if moving != "rows":
            matrices = weights * z.mean()
        return rows, matrices

    def model(z, t):
        return torch._grouped_mm(*factors(z, t), offs=ends).sin()

    def written(z, t):
        rows, matrices = factors(z, t)
        return torch.cat([rows[:1] @ matrices[0], rows[1:] @ matrices[1]]).sin()

    mask = choose(4, which)
    value, derivative = SharedPrimal()(model, (z, t), (v, torch.ones(4)), mask)
    wanted = torch.func.jvp(written, (z, t), (v, torch.ones(4)))
    torch.testing.assert_close(value, wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(derivative, wanted[1] * mask[:, None], rtol=1e-5, atol=1e-5)
