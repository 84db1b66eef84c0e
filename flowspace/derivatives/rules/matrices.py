"""Rules for stacks of matrices and for the cells of recurrent networks: each row of the batch is
worked on alone, and torch.func.jvp differentiates that on the rows that have a tangent.
"""

from typing import Any

from torch import Tensor

from flowspace.derivatives.rules.dual import (
    Dual,
    LostRowsError,
    restrict,
    shared_rows,
    whole_primal,
)
from flowspace.derivatives.rules.registry import Call, forward, rule


@rule(
    "linalg_qr linalg_svd linalg_svdvals linalg_cholesky linalg_inv linalg_pinv linalg_det "
    "linalg_slogdet linalg_matrix_exp linalg_matrix_power linalg_eigh linalg_eigvalsh "
    "linalg_solve linalg_solve_triangular linalg_cond inverse pinverse det slogdet logdet "
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
