"""The training loop: what a killed run leaves continues to the same weights; checkpoints are whole
or absent.
"""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowspace import RunError
from flowspace.training import (
    Batches,
    Checkpoints,
    Draws,
    Game,
    Journal,
    LoopSettings,
    TensorBatches,
    Terms,
    Watch,
    cosine_decay,
    records,
    seed_of,
    train,
)

SETTINGS = LoopSettings(steps=40, batch=16, warmup=5, checkpoint_every=7)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))


def loss(net, batch, draws):
    (x,) = batch
    return (net(x + torch.randn(x.shape, generator=draws.generator)) - x).square().mean()


def data():
    return TensorBatches((torch.randn(50, 4, generator=torch.Generator().manual_seed(1)),))


def equal(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 6, 7, 20, 39])
def test_a_run_that_was_stopped_continues_to_the_same_weights(tmp_path, at):
    whole = network()
    average = train("a", whole, data(), loss, SETTINGS, None)
    calls = 0

    def failing(net, batch, draws):
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise Killed
        return loss(net, batch, draws)

    with pytest.raises(Killed):
        train("a", network(), data(), failing, SETTINGS, tmp_path)
    resumed = network()
    continued = train("a", resumed, data(), loss, SETTINGS, tmp_path)
    assert equal(whole, resumed)
    assert equal(average, continued)


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_weights(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys, time, torch
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        from pathlib import Path
        from test_training import SETTINGS, data, loss, network
        from flowspace.training import train
        def slow(*arguments):
            time.sleep(float(sys.argv[2]))
            return loss(*arguments)
        net = network()
        train("a", net, data(), slow, SETTINGS, Path(sys.argv[1]))
        """
    )
    run = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen([*run, "0.05"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("step-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(int(path.stem.split("-")[1]) for path in tmp_path.glob("step-*.safetensors"))
    assert 0 < reached < SETTINGS.steps
    subprocess.run([*run, "0"], check=True, stderr=subprocess.DEVNULL)
    whole, resumed = network(), network()
    train("a", whole, data(), loss, SETTINGS, None)
    train("a", resumed, data(), loss, SETTINGS, tmp_path)
    assert equal(whole, resumed)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train("a", network(), data(), loss, SETTINGS, tmp_path)

    def never(*_):
        raise AssertionError("trained again")

    assert equal(first, train("a", network(), data(), never, SETTINGS, tmp_path))


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    whole = network()
    train("a", whole, data(), loss, SETTINGS, None)
    train("a", network(), data(), loss, SETTINGS, tmp_path)
    last = sorted(tmp_path.glob("step-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    resumed = network()
    with pytest.warns(UserWarning, match="cannot be read"):
        train("a", resumed, data(), loss, SETTINGS, tmp_path)
    assert equal(whole, resumed)


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path):
    train("a", network(), data(), loss, SETTINGS, tmp_path)
    with pytest.raises(RunError, match="batch: 16 there, 8 now"):
        train(
            "a",
            network(),
            data(),
            loss,
            LoopSettings(steps=40, batch=8, warmup=5, checkpoint_every=7),
            tmp_path,
        )


def test_only_unreadable_checkpoints_are_an_error(tmp_path):
    (tmp_path / "step-00000007.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning), pytest.raises(RunError, match="none of the 1 checkpoints"):
        Checkpoints(tmp_path, {}).latest()


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


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    def lost(net, batch, draws):
        return net(batch[0]).sum() * torch.nan

    settings = dataclasses.replace(SETTINGS, skips=2)
    with (
        pytest.warns(UserWarning, match=r"nan at step \d"),
        pytest.raises(RunError, match=r"nan at step 2.*skips = 2"),
    ):
        train("a", network(), data(), lost, settings, None)


def test_the_log_has_one_json_object_a_line(tmp_path):
    train("a", network(), data(), loss, SETTINGS, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 39]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines)


@pytest.mark.parametrize("cut", [1, 7, 12])
def test_a_line_that_a_killed_run_left_unfinished_costs_no_other(tmp_path, cut):
    journal = Journal(tmp_path)
    for step in range(3):
        journal.write({"step": step, "loss": 0.5})
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    journal.write({"step": 3, "loss": 0.25})
    left = [2] if cut == 1 else []  # only the end of the line is missing
    assert [record["step"] for record in records(tmp_path)] == [0, 1, *left, 3]
    assert records(tmp_path / "nowhere") == []


@given(rows=st.integers(1, 40), size=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_pass_over_the_data_sees_every_row_once(rows, size, seed):
    batches: Batches = TensorBatches((torch.arange(rows),))
    stream = torch.cat(
        [batches(step * size, (step + 1) * size, seed)[0] for step in range(3 * rows // size + 1)]
    )
    for number in range(len(stream) // rows):
        assert torch.equal(
            stream[number * rows : (number + 1) * rows].sort().values, torch.arange(rows)
        )


def test_seeds_of_neighbouring_steps_differ():
    seeds = {seed_of(seed, step) for seed in range(50) for step in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_learning_rate_rises_then_falls_to_its_final_share():
    plan = LoopSettings(steps=100, warmup=10, final_rate=0.1)
    rates = [cosine_decay(step, plan) for step in range(101)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.1)


def test_the_averaged_weights_follow_their_recursion():
    plan = LoopSettings(steps=3, batch=4, ema=0.9, warmup=1)
    net, seen = nn.Linear(4, 4), []

    def recording(module, batch, draws):
        seen.append(module.weight.detach().clone())
        return loss(module, batch, draws)

    average = train("a", net, data(), recording, plan, None)
    expected = seen[0].clone()
    for step, weight in enumerate([*seen[1:], net.weight.detach()]):
        decay = min(0.9, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.weight, expected)


class Duel(Game):
    """A network that pulls its outputs to those the opponent likes; the opponent tells outputs
    from inputs.
    """

    def __init__(self):
        torch.manual_seed(5)
        self.opponent = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.start = 3

    def optimizer(self, network):
        return torch.optim.Adam(network.parameters(), lr=1e-2)

    def loss(self, network, opponent, batch, draws):
        (x,) = batch
        made = network(x + draws.rows(lambda rows, g: torch.randn(rows, 4, generator=g), 0))
        parts = {"near": (made - x).square().mean(1), "liked": -0.1 * opponent(made).squeeze(1)}
        return Terms(parts, parts, {"t": x[:, 0].sigmoid()}, made, (x, made.detach()))

    def answer(self, opponent, terms, draws):
        real, made = terms.shown
        return (1 - opponent(real)).relu().squeeze(1) + (1 + opponent(made)).relu().squeeze(1)


def plain():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("at", [2, 5, 20])
def test_both_players_continue_to_the_same_weights(tmp_path, at):
    whole, game = plain(), Duel()
    average = train("a", whole, data(), game, SETTINGS, None)

    class Stopped(Duel):
        def answer(self, opponent, terms, draws):
            if draws.step >= at:
                raise Killed
            return super().answer(opponent, terms, draws)

    with pytest.raises(Killed):
        train("a", plain(), data(), Stopped(), SETTINGS, tmp_path)
    resumed, again = plain(), Duel()
    continued = train("a", resumed, data(), again, SETTINGS, tmp_path)
    assert (
        equal(whole, resumed)
        and equal(average, continued)
        and equal(game.opponent, again.opponent)
    )


def test_the_opponent_learns_only_from_its_start_and_only_in_its_turn():
    before, game = Duel(), Duel()
    train("a", plain(), data(), game, dataclasses.replace(SETTINGS, steps=3))
    assert equal(before.opponent, game.opponent)
    train("a", plain(), data(), game, dataclasses.replace(SETTINGS, steps=4))
    assert not equal(before.opponent, game.opponent)


def test_rows_in_parts_train_what_the_whole_batch_does():
    whole, parts = plain(), plain()
    train("a", whole, data(), Duel(), SETTINGS)
    train("a", parts, data(), Duel(), dataclasses.replace(SETTINGS, accumulate=4))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_log_has_the_gradient_of_each_part_at_the_prediction_by_time(tmp_path):
    train("a", plain(), data(), Duel(), dataclasses.replace(SETTINGS, steps=1), tmp_path)
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    x = data()(0, 16, 0)[0]
    noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed_of(0, 0, 3, 0)))
    slopes = 2 * (plain()(x + noise) - x).detach().norm(dim=1) / 4
    assert record["slopes"]["near"] == pytest.approx(float(slopes.mean()), rel=1e-5)
    bins = [b for b in record["slopes_by"]["t"]["near"] if b is not None]
    assert min(bins) <= record["slopes"]["near"] <= max(bins)
    assert record["raw"]["near"] + record["raw"]["liked"] == pytest.approx(
        record["loss"], rel=1e-5
    )


@given(step=st.integers(0, 9), cut=st.integers(1, 7), seed=st.integers(0, 3))
def test_rows_draw_the_same_however_the_batch_is_cut(step, cut, seed):
    def draw(rows, generator):
        return torch.randn(rows, 3, generator=generator), torch.rand(rows, generator=generator)

    whole = Draws(seed, step, 0, 8, 8, torch.device("cpu")).rows(draw, 2)
    parts = [
        Draws(seed, step, a, b, 8, torch.device("cpu")).rows(draw, 2)
        for a, b in ((0, cut), (cut, 8))
    ]
    assert all(
        torch.equal(torch.cat(both), w)
        for both, w in zip(zip(*parts, strict=True), whole, strict=True)
    )


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    def lost(net, batch, draws):
        return loss(net, batch, draws) * (torch.nan if draws.step == 7 else 1)

    seen = []

    class Look(Watch):
        every = 1

        def __call__(self, step, averaged):
            seen.append(averaged[0].weight.clone())
            return {"score": float(step == 2)}

    with pytest.warns(UserWarning, match="nan at step 7"):
        train("a", network(), data(), lost, SETTINGS, tmp_path, watch=Look())
    assert torch.equal(seen[6], seen[7]) and not torch.equal(seen[7], seen[8])
    assert any(
        "nan" in json.loads(line).get("why", "")
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    )


def test_the_best_is_the_one_with_the_lowest_score(tmp_path):
    class Look(Watch):
        every = 5

        def __call__(self, step, averaged):
            return {"score": abs(step - 14) + 1.0}

    train("a", network(), data(), loss, SETTINGS, tmp_path, watch=Look())
    from safetensors import safe_open

    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert file.metadata()["step"] == "15"
