"""Rules for stacks of matrices and for the cells of recurrent networks: each row of the batch is
worked on alone, and torch.func.jvp differentiates that on the rows that have a tangent.
"""

from typing import Any

import torch
from torch import Tensor

from flowspace.derivatives.rules.dual import (
    Dual,
    LostRowsError,
    restrict,
    shared_rows,
    whole_primal,
)
from flowspace.derivatives.rules.registry import At, Call, forward, rule, sum_of, tangent_of


@rule(
    "linalg_qr linalg_svd linalg_svdvals linalg_cholesky linalg_cholesky_ex linalg_inv "
    "linalg_inv_ex linalg_pinv linalg_det linalg_slogdet linalg_matrix_exp linalg_matrix_power "
    "linalg_eig linalg_eigvals linalg_eigh linalg_eigvalsh linalg_lu_factor "
    "linalg_solve_triangular linalg_cond inverse pinverse det slogdet logdet "
    "cholesky cholesky_solve cholesky_inverse svd qr matrix_exp matrix_power triangular_solve"
)
def linalg_qr(call: Call, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The tangent is that of torch.func.jvp, for each matrix of a stack."""
    ndim = call.duals[0].ndim
    for dual in call.duals:
        dual.untouched(-1, -2)
    if call.duals[0].layout is not None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim != ndim:
                raise LostRowsError  # vectors, perhaps one for each matrix
    return forward(call, shared_rows(call.duals))


@rule("linalg_solve")
def linalg_solve(call: Call, a: Any, b: Any, *, left: bool = True) -> Any:
    """The tangent of x = solve(a, b) is solve(a, db - da x).

    b may hold a vector for each matrix, which is then a matrix of one column.
    """
    if not left:
        return linalg_qr(call, a, b, left=left)
    x, matrix, side = call.out.detach(), whole_primal(a), whole_primal(b)
    vectors = side.ndim == 1 or (side.ndim < matrix.ndim and side.shape == matrix.shape[:-1])
    if vectors:
        x, b = x[..., None], _as_columns(b)
    duals = [value for value in (a, b) if isinstance(value, Dual)]
    for dual in duals:
        dual.untouched(-1, -2)
    restricted, layout = shared_rows(duals), duals[0].layout
    layout = layout and layout.on(x.ndim - duals[0].ndim + layout.axis)
    change = tangent_of(b)
    if isinstance(a, Dual):
        change = sum_of(change, -(a.tangent @ restrict(x, layout)))
    tangent = torch.linalg.solve(restricted(a), change)
    if vectors:
        tangent = tangent[..., 0]
    return At(tangent, layout)


def _as_columns(vectors: Any) -> Any:
    """Return vectors, or a dual of them, as matrices of one column."""
    if isinstance(vectors, Dual):
        primal, tangent = vectors.primal[..., None], vectors.tangent[..., None]
        return Dual(primal, tangent, vectors.layout)
    return vectors[..., None]


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def lstm_cell(call: Call, x: Any, state: Any, *weights: Any) -> list[Tensor]:
    """The tangent is that of torch.func.jvp, for the moving rows of x (B, C) and of the state."""
    layout = call.duals[0].layout
    parts = [x, state]
    if isinstance(state, tuple | list):
        parts = [x, *state]
    if layout is None or any(isinstance(weight, Dual) for weight in weights):
        return forward(call)
    for part in parts:
        shape = whole_primal(part).shape
        if len(shape) != 2 or layout.axis != 0 or shape[0] != layout.size:
            raise LostRowsError

    def restricted(value: Any) -> Any:
        """A weight may have as many rows as the batch, and is left whole."""
        if isinstance(value, Dual):
            return value.rows
        if any(value is part for part in parts):
            return restrict(value, layout)
        return value

    return forward(call, restricted)
