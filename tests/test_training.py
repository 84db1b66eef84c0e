"""What a training of one's own is made of: draws by (seed, step, row), the rows of a batch by
(seed, pass, index), checkpoints that are whole or absent.
"""

import os
import re
import socket
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from flowspace import InputError, LinearSchedule, RunError, TimePairs
from flowspace.training import (
    AdversarialStep,
    BatchRows,
    Checkpoints,
    Draws,
    KeyedPairs,
    KeyedRows,
    fill,
    locked,
    packed,
    seed_of,
    share_of,
    unpacked,
)
from flowspace.training import checkpoints as locks
from flowspace.training.checkpoints import digest_of, flatten_optimizer, restore_optimizer

CPU = torch.device("cpu")


# --- draws -------------------------------------------------------------------------------------


def test_seeds_of_neighbouring_steps_differ():
    seeds = {seed_of(seed, step) for seed in range(50) for step in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(step=st.integers(0, 9), cut=st.integers(1, 7), seed=st.integers(0, 3))
def test_rows_draw_the_same_however_the_batch_is_cut(step, cut, seed):
    pairs = KeyedPairs(TimePairs(), 1)

    def drawn(first, last):
        draws = Draws(seed, step, first, last, 8, CPU)
        pairs.draws = draws
        times = pairs(last - first)
        return draws.normal((3,), 0), draws.uniform((), 2), *times

    whole, parts = drawn(0, 8), [drawn(0, cut), drawn(cut, 8)]
    for both, value in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(both), value)
    t, s = whole[2:]
    assert LinearSchedule().alpha(t).shape == (8,) and (s <= t).all()


def test_seeds_are_those_of_earlier_versions():
    assert seed_of(0) == 1442695038202829496  # else a run that goes on would draw otherwise
    assert seed_of(1, 2, 3) == 8003460272182815284


def test_numbers_and_mirror_images_are_those_of_earlier_versions():
    """Else a run that goes on would draw otherwise."""
    draw = torch.Generator().manual_seed(seed_of(5, 2, 3, 7))
    found = Draws(5, 2, 3, 6, 8, CPU).normal((4,), 7)
    assert torch.equal(found, torch.randn(8, 4, generator=draw)[3:6])
    assert Draws(5, 2, 0, 6, 8, CPU).seed_of_rows == seed_of(5, 2)
    assert Draws(5, 2, 3, 6, 8, CPU).seed_of_rows == seed_of(5, 2, 3)
    for place in range(20):
        value, index = KeyedRows(Numbers(10), 5)[place]
        mirrored = seed_of(5, place // 10, index, 2) >> 31 & 1
        assert (int(value) < 0) == mirrored


@given(step=st.integers(0, 9), seed=st.integers(0, 3), stream=st.integers(0, 5))
def test_seeds_steps_streams_and_rows_draw_apart(step, seed, stream):
    here = Draws(seed, step, 0, 8, 8, CPU)
    numbers = here.normal((4,), stream)
    for other, at in (
        (here, stream + 1),
        (Draws(seed, step + 1, 0, 8, 8, CPU), stream),
        (Draws(seed + 1, step, 0, 8, 8, CPU), stream),
    ):
        assert not (other.normal((4,), at) == numbers).any()
    assert len(numbers.unique()) == numbers.numel()
    units = here.uniform((4,), stream)
    assert ((units >= 0) & (units < 1)).all()


@given(step=st.integers(0, 9), cut=st.integers(1, 7), stream=st.integers(0, 5))
def test_a_row_has_a_generator_of_its_own_however_the_batch_is_cut(step, cut, stream):
    def drawn(first, last, at=stream):
        generators = Draws(0, step, first, last, 8, CPU).generators(at)
        return [float(torch.rand((), generator=generator)) for generator in generators]

    whole = drawn(0, 8)
    assert whole == drawn(0, cut) + drawn(cut, 8)
    assert len({*whole, *drawn(0, 8, stream + 1)}) == 16


def test_what_need_not_be_alike_differs_by_process_and_step():
    seeds = [
        Draws(seed, step, first, first + 2, 8, CPU).seed_of_rows
        for seed in (0, 1)
        for step in (0, 1, 2)
        for first in (0, 2, 4)
    ]
    assert len(set(seeds)) == len(seeds)
    assert Draws(0, 1, 2, 4, 8, CPU).generator.initial_seed() == seeds[4]


def test_the_times_of_a_step_are_asked_for_after_the_step_is_known():
    pairs = KeyedPairs(TimePairs(equal=0.25), 1)
    assert pairs.most_off_diagonal(8) is None
    with pytest.raises(InputError, match="set draws"):
        pairs(8)
    pairs.draws = Draws(0, 0, 4, 8, 8, CPU)
    with pytest.raises(InputError, match="got 8 rows"):
        pairs(8)
    assert pairs.most_off_diagonal(4) == 4
    unknown = KeyedPairs(KeyedPairs(TimePairs(), 1), 1, pairs.draws)
    assert unknown.most_off_diagonal(4) is None
    pairs.draws = Draws(0, 0, 0, 8, 8, CPU)
    t, s = pairs(8)
    assert int((s < t).sum()) <= pairs.most_off_diagonal(8) == 6


# --- rows --------------------------------------------------------------------------------------


class Numbers:
    """Rows that are their own number, negative where mirrored."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def row(self, index, mirrored=False):
        return torch.tensor(-index - 1 if mirrored else index + 1), index

    def order(self, seed, number):
        draw = torch.Generator().manual_seed(seed_of(seed, number, 1))
        return torch.randperm(self.count, generator=draw).tolist()


@given(
    rows=st.integers(4, 40),
    ranks=st.sampled_from([1, 2, 4]),
    parts=st.sampled_from([1, 2]),
    start=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_processes_read_together_what_one_reads_from_any_step_on(rows, ranks, parts, start, seed):
    stream, batch = KeyedRows(Numbers(rows), seed), 8

    def read(rank, ranks, parts, first):
        shares = share_of(batch, rank, ranks, parts)
        loader = DataLoader(stream, batch_sampler=BatchRows(first, 7, batch, shares))
        assert len(loader) == (7 - first) * parts
        found = [values for values, _ in loader]
        return [torch.cat(found[i : i + parts]) for i in range(0, len(found), parts)]

    whole = read(0, 1, 1, 0)
    shared = [read(rank, ranks, parts, start) for rank in range(ranks)]
    for step, together in enumerate(zip(*shared, strict=True), start):
        assert torch.equal(torch.cat(together), whole[step])
    seen = torch.cat(whole).abs()
    for number in range(len(seen) // rows):
        assert sorted(seen[number * rows : (number + 1) * rows].tolist()) == list(
            range(1, rows + 1)
        )


def test_a_place_of_the_stream_is_that_of_its_pass():
    rows, seed = Numbers(9), 3
    for place in (0, 4, 9, 13, 26):
        number, at = divmod(place, 9)
        assert KeyedRows(rows, seed)[place][1] == rows.order(seed, number)[at]
    shares = share_of(8, 0, 1)
    assert len(BatchRows(2, 2, 8, shares)) == len(BatchRows(3, 2, 8, shares)) == 0
    assert list(BatchRows(2, 3, 8, shares)) == [list(range(16, 24))]


def test_half_of_the_rows_are_mirrored_and_none_where_they_shall_not():
    rows = Numbers(500)
    mirrored = sum(int(KeyedRows(rows, 0)[place][0] < 0) for place in range(1000))
    assert 430 < mirrored < 570
    passes = [[int(KeyedRows(rows, 0)[place][1]) for place in range(n, n + 500)] for n in (0, 500)]
    assert passes[0] != passes[1]
    turned = [{}, {}]
    for place in range(1000):
        value, index = KeyedRows(rows, 0)[place]
        turned[place // 500][index] = int(value) < 0
    alike = sum(turned[0][index] == turned[1][index] for index in range(500))
    assert 200 < alike < 300  # each pass mirrors others
    assert all(KeyedRows(rows, 0, flip=False)[place][0] > 0 for place in range(500))


def test_a_batch_that_cannot_be_shared_is_refused():
    for batch in (8, 9, 10):
        with pytest.raises(RunError, match="write a multiple of 6"):
            share_of(batch, 0, 3, 2)


# --- the adversarial step ----------------------------------------------------------------------


class Critic(nn.Module):
    """Frozen features and a head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(4, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)

    def forward(self, images):
        return self.head(self.features(images))[:, 0]


class Told:
    """Losses that keep by what changes they were to change their images."""

    changes = 5

    def __init__(self):
        self.seen = []

    def weight(self, t):
        return 1 - t

    def opinion(self, discriminator, fake, changes):
        self.seen.append(changes)
        assert not any(weight.requires_grad for weight in discriminator.parameters())
        return -discriminator(fake)

    def discriminator(self, discriminator, real, fake, changes):
        self.seen.append(changes)
        assert not fake.requires_grad
        return discriminator(fake) - discriminator(real)


def test_images_are_changed_by_draws_of_the_step_and_row_apart_for_each_player():
    def changes(first, last):
        told = Told()
        step, rows = AdversarialStep(Critic(), told), last - first
        draws = Draws(0, 1, first, last, 8, CPU)
        step.opinion(torch.randn(rows, 4), draws)
        step.answer(torch.randn(rows, 4), torch.randn(rows, 4, requires_grad=True), draws)
        return told.seen

    whole = changes(0, 8)
    assert whole[0].shape == whole[1].shape == (8, 5) and not (whole[0] == whole[1]).any()
    for one, first, second in zip(whole, changes(0, 3), changes(3, 8), strict=True):
        assert torch.equal(one, torch.cat([first, second]))


def test_only_the_heads_of_a_discriminator_are_trained_and_kept():
    critic = Critic()
    step = AdversarialStep(critic, Told(), start=1)
    (group,) = step.optimizer.param_groups
    assert group["params"] == list(critic.head.parameters())
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.0, 0.99), 0.0)
    assert step.kept().keys() == {"head.weight", "head.bias"}
    made = torch.randn(8, 4, requires_grad=True)
    assert [step.plays(number) for number in range(3)] == [False, True, True]
    heard = [step.opinion(made, Draws(0, number, 0, 8, 8, CPU)) for number in range(3)]
    assert heard[0] is heard[1] is None
    assert torch.equal(heard[2], -critic(made))
    with pytest.raises(RuntimeError):
        step.opinion(torch.randn(8, 7), Draws(0, 2, 0, 8, 8, CPU))
    asking = [name for name, weight in critic.named_parameters() if weight.requires_grad]
    assert asking == ["head.weight", "head.bias"]


# --- checkpoints -------------------------------------------------------------------------------


def test_parts_are_packed_and_unpacked():
    parts = {"network": {"a": torch.ones(2), "b:c": torch.zeros(1)}, "run": {"n": torch.tensor(3)}}
    again = unpacked(packed(parts))
    assert again.keys() == parts.keys()
    for name, tensors in parts.items():
        assert all(torch.equal(again[name][key], value) for key, value in tensors.items())


def test_only_the_tensors_of_the_same_network_are_filled(tmp_path):
    network, other = nn.Linear(2, 3), nn.Linear(2, 3)
    fill(network.state_dict(), other.state_dict(), tmp_path)
    assert torch.equal(network.weight, other.weight)
    with pytest.raises(RunError, match="holds another network: weight differ"):
        fill(network.state_dict(), nn.Linear(3, 3).state_dict(), tmp_path)
    with pytest.raises(RunError, match="bias"):
        fill(network.state_dict(), {"weight": other.weight}, tmp_path)
    with pytest.raises(RunError, match="bias"):
        fill({"weight": network.weight}, other.state_dict(), tmp_path)


def test_the_state_of_an_optimiser_is_flattened_and_restored():
    network, other = nn.Linear(2, 3), nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[network.weight]["note"] = "no tensor"
    tensors = flatten_optimizer(optimizer, network)
    slots = ("step", "exp_avg", "exp_avg_sq")
    assert tensors.keys() == {f"{name}/{slot}" for name in ("weight", "bias") for slot in slots}
    again = torch.optim.AdamW(other.parameters())
    restore_optimizer(again, other, tensors)
    for slot in slots:
        kept = optimizer.state[network.weight][slot]
        assert torch.equal(again.state[other.weight][slot], kept)


def test_only_unreadable_checkpoints_are_an_error(tmp_path):
    (tmp_path / "step-00000007.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning), pytest.raises(RunError, match="none of the 1 checkpoints"):
        Checkpoints(tmp_path, {}).latest()


@pytest.mark.parametrize("at", [-1, -9, -20])
def test_a_flipped_bit_is_passed_over_for_the_checkpoint_before(tmp_path, at):
    checkpoints = Checkpoints(tmp_path, {})
    for step in (1, 2):
        path = checkpoints.save(step, {"a": torch.full((8,), float(step))})
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-00000002.*another digest.*the one before"):
        step, tensors = checkpoints.latest()
    assert step == 1 and torch.equal(tensors["a"], torch.ones(8))


def test_a_checkpoint_under_another_name_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, {"a": torch.ones(1)})
    (tmp_path / "step-00000001.safetensors").rename(tmp_path / "step-00000005.safetensors")
    with pytest.warns(UserWarning, match="of step 1"), pytest.raises(RunError, match="none of"):
        checkpoints.latest()


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path):
    Checkpoints(tmp_path, {"batch": 16}).save(1, {"a": torch.ones(1)})
    with pytest.raises(RunError, match="batch: 16 there, 8 now"):
        Checkpoints(tmp_path, {"batch": 8}).latest()


def test_of_nested_settings_those_that_differ_are_named(tmp_path):
    before = {"objective": {"kind": "crossflow", "equal": 0.5}, "adversarial": None}
    Checkpoints(tmp_path, before).save(1, {"w": torch.zeros(1)})
    now = {"objective": {"kind": "consistency", "equal": 0.5}, "adversarial": {"power": 1}}
    told = (
        r"\(adversarial\.power: None there, 1 now, "
        r"objective\.kind: 'crossflow' there, 'consistency' now\)"
    )
    with pytest.raises(RunError, match=told):
        Checkpoints(tmp_path, now).latest()


def test_only_settings_that_differ_are_named_and_paths_are_settings(tmp_path):
    Checkpoints(tmp_path, {"batch": 16, "data": tmp_path}).save(1, {"a": torch.ones(1)})
    assert Checkpoints(tmp_path, {"batch": 16, "data": tmp_path}).latest()[0] == 1
    with pytest.raises(RunError, match=r"other settings \(batch: 16 there, 8 now\)"):
        Checkpoints(tmp_path, {"batch": 8, "data": tmp_path}).latest()


def test_tensors_that_share_their_memory_or_are_turned_are_saved_whole(tmp_path):
    numbers = torch.arange(6.0).reshape(2, 3)
    Checkpoints(tmp_path, {}).save(1, {"a": numbers, "b": numbers, "c": numbers.T})
    _, tensors = Checkpoints(tmp_path, {}).latest()
    assert torch.equal(tensors["a"], numbers) and torch.equal(tensors["b"], numbers)
    assert torch.equal(tensors["c"], numbers.T)


def test_settings_in_another_order_are_the_same(tmp_path):
    folder = tmp_path / "made" / "when saved"
    assert Checkpoints(folder, {}).latest() is None
    Checkpoints(folder, {"a": 1, "b": 2}).save(1, {"a": torch.ones(1)})
    assert Checkpoints(folder, {"b": 2, "a": 1}).latest()[0] == 1


def test_a_checkpoint_of_an_earlier_version_is_refused_by_that_name(tmp_path):
    metadata = {"step": "1", "fingerprint": Checkpoints(tmp_path, {}).fingerprint}
    save_file({"a": torch.ones(1)}, tmp_path / "step-00000001.safetensors", metadata)
    with pytest.raises(RunError, match="by an earlier version of flowspace, without a digest"):
        Checkpoints(tmp_path, {}).latest()


def test_a_digest_is_of_names_shapes_types_and_values_alone():
    numbers = torch.arange(12.0)
    digest = digest_of({"a": numbers[::2], "b": numbers})
    assert digest == digest_of({"b": numbers, "a": numbers[::2].clone().requires_grad_()})
    others = [numbers[1::2], numbers[::2].reshape(2, 3), numbers[::2].view(torch.int32)]
    found = {digest_of({"a": other, "b": numbers}) for other in others}
    assert len({digest, digest_of({"c": numbers[::2], "b": numbers}), *found}) == 5


def test_packed_tensors_have_no_gradient_and_only_who_keeps_them_has_them():
    parts = {"network": nn.Linear(2, 2).state_dict(keep_vars=True)}
    assert not any(tensor.requires_grad for tensor in packed(parts).values())
    assert packed(parts, kept=False) == {}


def test_what_a_killed_write_left_is_removed_by_the_next_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, {"a": torch.ones(2)})
    for name in (".tmpAbCdEf", "step-00000002.partial"):
        (tmp_path / name).write_bytes(b"torn")
    checkpoints.save(3, {"a": torch.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001.safetensors",
        "step-00000003.safetensors",
    ]


def test_an_interrupted_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, {"a": torch.ones(3)})

    def torn(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("flowspace.training.checkpoints.save_file", torn)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, {"a": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    step, tensors = checkpoints.latest()
    assert step == 1
    assert torch.equal(tensors["a"], torch.ones(3))


def test_only_the_latest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, {}, keep=2)
    for step in range(5):
        checkpoints.save(step, {"a": torch.full((2,), float(step))})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"step-{step:08d}.safetensors" for step in (3, 4)
    ]


def test_a_folder_is_one_processs_until_it_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from flowspace.training import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(RunError, match=f"is used by process {other.pid} on "), locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_lock_says_whose_it_is_and_nothing_of_whom_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LONGEST_GOODBYE", 0.0)
    folder, own = tmp_path / "runs" / "one", f"process {os.getpid()} on {socket.gethostname()}"
    with locked(folder):
        pass
    (folder / "lock").write_text("process 1 on a machine of a long name\n" * 3)
    with locked(folder):
        assert (folder / "lock").read_text() == f"{own}\n"
        used = re.escape(f"{folder} is used by {own}; wait for it")
        with pytest.raises(RunError, match=used), locked(folder):
            pass
        (folder / "lock").write_text("")  # as it is before its process has said so
        with pytest.raises(RunError, match="is used by another process; wait"), locked(folder):
            pass


def test_a_lock_that_is_let_go_soon_is_waited_for(tmp_path):
    held = locked(tmp_path)
    held.__enter__()
    letting_go = threading.Timer(0.3, held.__exit__, (None, None, None))
    letting_go.start()
    with locked(tmp_path):
        letting_go.join()
