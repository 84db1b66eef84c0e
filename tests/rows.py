"""Rows of the endless shuffled stream, as a training step gets them."""

from torch.utils.data import default_collate

from flowspace.training import KeyedRows


def batch(rows, first, last, seed, flip=True):
    """Latents in float32 where the rows have some, images in [-1, 1] and labels of these rows."""
    stream = KeyedRows(rows, seed, flip)
    *latents, pixels, labels = default_collate([stream[place] for place in range(first, last)])
    return *(part.float() for part in latents), pixels.float() / 127.5 - 1, labels
