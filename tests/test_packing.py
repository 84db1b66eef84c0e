"""Pictures of several sizes in one row: what is done to the row is done to each picture alone."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal
from tolerances import EXACT, within

from flowspace.vision.packing import Packing

close = within(EXACT)
HEADS, WIDTH, CONTEXT = 2, 3, 4


@st.composite
def packed(draw):
    """A packing, and how many tokens each of its pictures has, in order."""
    size = st.tuples(st.integers(1, 3), st.integers(1, 4))
    sizes = tuple(draw(st.lists(size, min_size=1, max_size=3)))
    tokens = [n for pictures, n in sizes for _ in range(pictures)]
    return Packing(sizes), tokens, draw(st.integers(0, 100))


def tokens_of(packing, seed, *axes):
    """Tokens of each size, ``(B_k, n_k, *axes)``."""
    parts = enumerate(packing.sizes)
    return [normal(seed + k, pictures, n, *axes) for k, (pictures, n) in parts]


def pictures_of(packing, row):
    """The tokens ``(n, *)`` of every picture of a row."""
    return [picture for part in packing.split(row) for picture in part]


def attended(q, k, v):
    """Softmax attention of one picture, a head after the other: ``(n, heads, w)``."""
    heads = []
    for head in range(HEADS):
        scores = q[:, head] @ k[:, head].T / math.sqrt(WIDTH)
        heads.append(scores.softmax(1) @ v[:, head])
    return torch.stack(heads, 1)


@settings(max_examples=40)
@given(packed())
def test_a_row_is_all_tokens_in_order_and_is_split_again(case):
    packing, tokens, seed = case
    parts = tokens_of(packing, seed, 2)
    row = packing.join(parts)
    flat = torch.cat([part.flatten(0, 1) for part in parts])
    assert torch.equal(row.flatten(0, 1), flat)
    assert row.shape[0] == 1 or len(packing.sizes) == 1
    for part, again in zip(parts, packing.split(row), strict=True):
        assert torch.equal(part, again)
    assert [len(picture) for picture in pictures_of(packing, row)] == tokens


@settings(max_examples=40)
@given(packed())
def test_values_of_pictures_and_of_their_tokens_reach_every_token(case):
    packing, tokens, seed = case
    row = packing.join(tokens_of(packing, seed, 2))
    values = normal(seed + 9, len(tokens), 2)
    assert torch.equal(torch.cat(packing.by_size(values)), values)
    if len(packing.sizes) == 1:
        assert packing.spread(values).shape == (len(tokens), 1, 2)
    places = [normal(seed + k, n, 2) for k, (_, n) in enumerate(packing.sizes)]
    each = [
        place
        for place, (count, _) in zip(places, packing.sizes, strict=True)
        for _ in range(count)
    ]
    before = pictures_of(packing, row)
    for spread, parts in ((packing.spread(values), values), (packing.repeat(places), each)):
        after = pictures_of(packing, row + spread)
        for picture, given_, part in zip(after, before, parts, strict=True):
            assert torch.equal(picture, given_ + part)


@settings(max_examples=40)
@given(packed())
def test_attention_stays_within_a_picture(case):
    packing, _, seed = case
    q, k, v = (packing.join(tokens_of(packing, seed + 10 * i, HEADS, WIDTH)) for i in range(3))
    found = packing.self_attention(q, k, v)
    assert found.shape == q.shape
    each = zip(*(pictures_of(packing, row) for row in (found, q, k, v)), strict=True)
    for picture, *given_ in each:
        close(picture, attended(*given_))


@settings(max_examples=40)
@given(packed())
def test_a_picture_sees_the_tokens_that_there_are_of_its_own_context(case):
    packing, tokens, seed = case
    q = packing.join(tokens_of(packing, seed, HEADS, WIDTH))
    k, v = (normal(seed + i, len(tokens), CONTEXT, HEADS, WIDTH) for i in (7, 8))
    mask = normal(seed + 9, len(tokens), CONTEXT) > 0
    mask[:, 0] = True
    found = packing.cross_attention(q, k, v, mask)
    assert found.shape == q.shape
    each = zip(pictures_of(packing, found), pictures_of(packing, q), k, v, mask, strict=True)
    for picture, queries, keys, values, there in each:
        close(picture, attended(queries, keys[there], values[there]))
