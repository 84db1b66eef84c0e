"""Latents computed once: the same as the encoder's, whole after a kill, refused when they are
others'.
"""

import importlib
import pickle

import pytest
import safetensors.torch
import torch
from rows import batch

from flowspace import InputError, RunError

pytest.importorskip("diffusers")
latents = importlib.import_module("flowspace.vision.latents")
encoders = importlib.import_module("flowspace.vision.encoders")
data = importlib.import_module("flowspace.vision.data")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    draw = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(7):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    return data.FolderImages(root, 16)


def encoder(seed=0):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(seed)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return encoders.LatentEncoder(network, torch.zeros(1), torch.ones(1))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("flip", [True, False])
def test_rows_are_what_the_encoder_makes_of_the_images(images, tmp_path, flip):
    latents.encode(images, encoder(), tmp_path, flip=flip, shard=4, batch=3)
    for first, last in ((0, 14), (11, 31), (40, 41)):
        z, x, y = batch(latents.LatentImages(tmp_path, flip), first, last, 3, flip)
        pictures, labels = batch(images, first, last, 3, flip)
        torch.testing.assert_close(x, pictures)
        assert torch.equal(y, labels)
        torch.testing.assert_close(z, encoder().encode(pictures), rtol=1e-3, atol=2e-3)


def test_a_run_that_was_stopped_leaves_whole_shards_and_goes_on(images, tmp_path):
    latents.encode(images, encoder(), tmp_path / "whole", shard=4)

    class Stopping(encoders.LatentEncoder):
        calls = 0

        def encode(self, images, generator=None):
            self.calls += 1
            if self.calls > 5:
                raise KeyboardInterrupt
            return super().encode(images, generator)

    stopping = Stopping(encoder().autoencoder, torch.zeros(1), torch.ones(1))
    with pytest.raises(KeyboardInterrupt):
        latents.encode(images, stopping, tmp_path / "again", shard=4)
    with pytest.raises(RunError, match="not complete"):
        latents.LatentImages(tmp_path / "again")
    for rank in range(2):
        latents.encode(images, encoder(), tmp_path / "again", shard=4, rank=rank, ranks=2)
    assert files(tmp_path / "whole") == files(tmp_path / "again")


def test_others_latents_and_torn_shards_are_refused(images, tmp_path):
    latents.encode(images, encoder(), tmp_path, shard=4)
    with pytest.raises(RunError, match="another encoder"):
        latents.encode(images, encoder(1), tmp_path, shard=4)
    torn = tmp_path / "latents-00000004.safetensors"
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(RunError, match=r"00000004.*delete it"):
        latents.LatentImages(tmp_path)
    with pytest.raises(RunError, match=r"encode\.py CONFIG"):
        latents.LatentImages(tmp_path / "none")


def test_mirror_images_must_have_been_encoded_and_statistics_known(images, tmp_path):
    latents.encode(images, encoder(), tmp_path, flip=False)
    with pytest.raises(RunError, match=r"data\.flip=false"):
        latents.LatentImages(tmp_path)
    unknown = encoder()
    unknown.known = False
    with pytest.raises(InputError, match="fit"):
        latents.encode(images, unknown, tmp_path / "x")


def test_a_sampled_posterior_is_drawn_once(images, tmp_path):
    sampled = encoder()
    sampled.sample = True
    for name in ("a", "b"):
        latents.encode(images, sampled, tmp_path / name, shard=5)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    mean = batch(latents.LatentImages(tmp_path / "a"), 0, 14, 0)[0]
    assert not torch.allclose(mean, encoder().encode(batch(images, 0, 14, 0)[0]), atol=1e-2)


def test_the_draw_of_a_posterior_is_the_images_own(images, tmp_path):
    """Whatever is encoded beside it: other batches and other shards give the same latents."""
    sampled = encoder()
    sampled.sample = True
    latents.encode(images, sampled, tmp_path / "a", shard=14, batch=14)
    latents.encode(images, sampled, tmp_path / "b", shard=5, batch=2)
    one, other = latents.LatentImages(tmp_path / "a"), latents.LatentImages(tmp_path / "b")
    for index in range(14):
        for mirrored in (False, True):
            latent = one.row(index, mirrored)[0]
            torch.testing.assert_close(latent, other.row(index, mirrored)[0], rtol=0, atol=2e-2)
        apart = one.row(index)[0] - one.row(index, True)[0].flip(-1)
        assert apart.abs().max() > 0.1  # the mirror image has a draw of its own


def test_a_flipped_bit_in_a_shard_is_noticed_when_it_is_opened_and_digests_are_made_once(
    images, tmp_path, monkeypatch
):
    latents.encode(images, encoder(), tmp_path, shard=4)
    checked = []
    check = latents.check_whole

    def counted(path):
        checked.append(path.name)
        check(path)

    monkeypatch.setattr(latents, "check_whole", counted)
    monkeypatch.setattr(latents, "MOST_OPEN", 1)
    whole = latents.LatentImages(tmp_path)
    for index in (0, 13, 1, 12):
        whole.row(index)
    assert checked == ["latents-00000000.safetensors", "latents-00000012.safetensors"]
    path = tmp_path / "latents-00000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"00000004.*does not hold what was written.*delete it"):
        latents.LatentImages(tmp_path).row(5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_row_is_the_image_with_its_latent_and_class(images, tmp_path, mirrored):
    latents.encode(images, encoder(), tmp_path, shard=4, batch=3)
    cached = latents.LatentImages(tmp_path)
    assert len(cached) == len(images)
    for index in (0, 3, 4, 13, -1):
        latent, image, label = cached.row(index, mirrored)
        pixels, expected = images.row(index, mirrored)
        assert latent.dtype == torch.float16 and latent.shape == (4, 8, 8)
        assert image.dtype == torch.uint8 and torch.equal(image, pixels) and label == expected
        torch.testing.assert_close(
            latent.float(),
            encoder().encode(pixels[None].float() / 127.5 - 1)[0],
            rtol=1e-3,
            atol=2e-3,
        )
    assert list(cached.order(3, 1)) == list(images.order(3, 1))
    for index in (14, -15):
        with pytest.raises(IndexError, match="14 images"):
            cached.row(index)


def test_cached_latents_refuse_what_was_not_encoded(images, tmp_path):
    with pytest.raises(RunError, match=r"encode\.py CONFIG"):
        latents.LatentImages(tmp_path / "none")
    latents.encode(images, encoder(), tmp_path, flip=False, shard=4)
    with pytest.raises(RunError, match=r"data\.flip=false"):
        latents.LatentImages(tmp_path)
    with pytest.raises(InputError, match="without mirror images"):
        latents.LatentImages(tmp_path, flip=False).row(0, mirrored=True)
    (tmp_path / "latents-00000004.safetensors").unlink()
    with pytest.raises(RunError, match="not complete"):
        latents.LatentImages(tmp_path, flip=False)


def test_cached_latents_are_read_by_the_workers_of_a_loader(images, tmp_path):
    latents.encode(images, encoder(), tmp_path, shard=4)
    cached = latents.LatentImages(tmp_path)
    wanted = [cached.row(index) for index in range(14)]
    again = pickle.loads(pickle.dumps(cached))

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 14

        def __getitem__(self, index):
            return again.row(index)

    loader = torch.utils.data.DataLoader(Rows(), batch_size=5, num_workers=2)
    for first, (z, x, y) in zip(range(0, 14, 5), loader, strict=True):
        for row in range(len(y)):
            latent, image, label = wanted[first + row]
            assert torch.equal(z[row], latent) and torch.equal(x[row], image) and y[row] == label


def test_latents_encoded_again_are_not_read_from_the_old_file(images, tmp_path):
    latents.encode(images, encoder(), tmp_path, shard=4)
    old = latents.LatentImages(tmp_path)
    before = old.row(0)[0]
    for path in tmp_path.iterdir():
        path.unlink()
    latents.encode(images, encoder(1), tmp_path, shard=4)
    assert not torch.equal(latents.LatentImages(tmp_path).row(0)[0], before)
    with pytest.raises(RunError, match="written again"):
        old.row(13)


def test_a_folder_that_cannot_be_written_is_one_error(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        latents.encode(images, encoder(), tmp_path / "file", shard=4)


@pytest.mark.parametrize("text", [None, "{", "[1]", '"x"', '{"made": "{}"}', '{"made": 3}'])
def test_files_of_others_are_no_shards_of_latents(images, tmp_path, text):
    metadata = None
    if text is not None:
        metadata = {"about": text}
    path = tmp_path / "latents-00000000.safetensors"
    safetensors.torch.save_file({"latents": torch.zeros(1)}, path, metadata)
    with pytest.raises(RunError, match="cannot be read as a shard of latents"):
        latents.LatentImages(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, 1e5])
def test_latents_that_are_not_finite_in_half_precision_are_named(images, tmp_path, value):
    class Overflowing(encoders.LatentEncoder):
        def encode(self, images, generator=None):
            latents = super().encode(images, generator)
            latents[-1, 0, 0, 0] = value
            return latents

    overflowing = Overflowing(encoder().autoencoder, torch.zeros(1), torch.ones(1))
    with pytest.raises(RunError, match=r"2\.png is not finite in half precision"):
        latents.encode(images, overflowing, tmp_path / "x", batch=3)
    assert not (tmp_path / "x").exists()
