"""What each torch function does to a tangent.

A rule is called like its torch function, with a `Call` before the arguments and a `Dual` in place
of every tensor that has a tangent. It returns the tangent of the output, a list of them, or an
`At` where the rows lie elsewhere in the output than in the input. It raises LostRowsError where
rows of the batch mix. A function without a rule is differentiated by torch.func.jvp, on all rows.

A tangent may be that of some rows only. Its dual's layout says where the batch lies: on which
axis, in how many blocks (outer) of how many entries a row (inner).

    (B, N, C)                      axis 0, outer 1, inner 1
    .transpose(0, 1)               axis 1
    .flatten(0, 1)                 axis 0, of N * B entries: outer N
    (B, N, C).flatten(0, 1)        axis 0, of B * N entries: inner N

To add a rule, decorate ``def name(call, x, ...)`` with ``@rule("name other_name")``: it gets
``x.tangent`` and returns the tangent of the output. ``x.rows`` is the primal where the tangent is,
``x.untouched(dim)`` says that the function works along dim, and ``call.out`` is what the function
returned.

The rules lie in one module per family. Importing this package registers all of them.
"""

from flowspace.derivatives.rules import (  # noqa: F401  # importing a family registers its rules
    arithmetic,
    attention,
    axes,
    matrices,
    norms,
    products,
    sampling,
    shapes,
)
from flowspace.derivatives.rules.dual import (
    ChosenRows,
    Dual,
    Layout,
    LostRowsError,
    restrict,
    rowwise,
    shared_rows,
)
from flowspace.derivatives.rules.indexing import assigned
from flowspace.derivatives.rules.norms import EVALUATING
from flowspace.derivatives.rules.random import RANDOM, decompositions
from flowspace.derivatives.rules.registry import (
    CONSTANT,
    NO_TENSORS,
    PLAIN_TYPES,
    RULES,
    At,
    Call,
    Rule,
    differentiable,
    forward,
    is_pointwise,
    may_draw,
    moves,
    pointwise,
    rule,
    rule_of,
    without_rule,
)

__all__ = [
    "CONSTANT",
    "EVALUATING",
    "NO_TENSORS",
    "PLAIN_TYPES",
    "RANDOM",
    "RULES",
    "At",
    "Call",
    "ChosenRows",
    "Dual",
    "Layout",
    "LostRowsError",
    "Rule",
    "assigned",
    "decompositions",
    "differentiable",
    "forward",
    "is_pointwise",
    "may_draw",
    "moves",
    "pointwise",
    "restrict",
    "rowwise",
    "rule",
    "rule_of",
    "shared_rows",
    "without_rule",
]
