"""The command line, from the outside."""

import subprocess
import sys

import pytest
import torch

from flowspace import __version__, cli
from flowspace.cli import main


def test_derive_prints_the_report_and_the_residual(capsys):
    assert (
        main(["derive", "--alpha", "1-t", "--beta", "t", "--gamma", "1", "--delta", "-t/(t-s)"])
        == 0
    )
    out = capsys.readouterr().out
    for line in (
        "kappa(s)    s",
        "Criterion 1 holds",
        "Criterion 2 holds",
        "matched     holds",
        "a = -s/t**2",
        "c = -s/t**2",
    ):
        assert line in out
    assert r"\frac{s}{t^{2}}" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gamma", "0", "--delta", "1/(t-s)"], "Criterion 1: "),
        (["--gamma", "0", "--delta", "1/(t-s)"], "Criterion 2: "),
        (["--gamma", "2", "--delta", "-2*t/(t-s)"], "Criterion 2: gamma(1,0) = 2"),
    ],
)
def test_derive_exits_1_with_the_reason(capsys, arguments, reason):
    assert main(["derive", *arguments]) == 1
    assert reason in capsys.readouterr().err


def test_derive_derives_gamma_from_kappa(capsys):
    assert main(["derive", "--kappa", "s", "--delta", "-t/(t-s)"]) == 0
    assert "gamma(t, s) = 1," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "__import__('os')"], "is not allowed"),
        (["--alpha", "1-t", "--beta", "2*t"], "beta(1) = 2"),
        (["--gamma", "1"], "give --delta"),
        (["--gamma", "1", "--kappa", "s", "--delta", "1"], "give --delta"),
        (["--kappa", "t", "--delta", "1"], "got kappa = t, which depends on t"),
    ],
)
def test_bad_input_is_one_line_on_stderr(capsys, arguments, message):
    assert main(["derive", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("flowspace: ")
    assert not captured.out


def test_the_demo_refuses_no_seeds(capsys, tmp_path):
    assert main(["demo", "--seeds", "0", "--out", str(tmp_path)]) == 1
    assert "--seeds 0" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_line_on_stderr(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("flowspace: ")
    assert "Not a directory" in last


def test_the_module_runs_as_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "flowspace.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == f"flowspace {__version__}"


@pytest.mark.parametrize(("told", "wanted"), [(None, 1), ("2", 2)])
def test_the_demo_keeps_to_one_thread_unless_it_is_told(monkeypatch, told, wanted):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    try:
        with cli._one_thread():
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
