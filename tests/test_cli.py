"""The command line, from the outside."""

import subprocess
import sys

import pytest
import torch

from flowspace import InputError, __version__, cli
from flowspace.cli import main
from flowspace.demo import sets


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


def test_derive_derives_delta_from_kappa_and_gamma(capsys):
    assert main(["derive", "--kappa", "s", "--gamma", "1"]) == 0
    assert "delta(t, s) = -t/(t - s)" in capsys.readouterr().out


def test_what_derive_prints_of_the_papers_objective_is_fit_for_a_paper(capsys):
    assert main(["derive"]) == 0
    out = capsys.readouterr().out
    assert "gamma(t, s) = 1, delta(t, s) = -t/(t - s)" in out
    assert "b = -(t - s)/t" in out
    latex = out.splitlines()[-1].removeprefix("LaTeX").strip()
    assert latex == r"R = - \frac{s}{t^{2}} f - \frac{t - s}{t} D_t f + \frac{s}{t^{2}} x"


@pytest.mark.parametrize(
    ("arguments", "objective"),
    [
        (["--gamma", "1", "--delta", "-1"], "the data term vanishes"),
        (["--gamma", "1", "--delta", "-1"], "use ConsistencyLoss()"),
        (["--kappa", "0", "--delta", "-t"], "use ConsistencyLoss()"),
        (["--gamma", "0", "--delta", "1/(t-s)"], "use MeanFlowLoss(),"),
        (["--gamma", "t", "--delta", "-1"], "use MeanFlowLoss(statistic=...)"),
        (["--gamma", "2", "--delta", "-2*t/(t-s)"], "divide gamma and delta by 2"),
        (["--kappa", "s", "--delta", "t/s"], "use MatchedStatistic()"),
    ],
)
def test_derive_names_what_fits_and_exits_1(capsys, arguments, objective):
    assert main(["derive", *arguments]) == 1
    captured = capsys.readouterr()
    assert objective in captured.err
    assert objective in captured.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gamma", "1/(1-t)", "--delta", "-1"], "gamma(1,0) is infinite, delta(1,0) = -1"),
        (["--kappa", "s", "--delta", "t/s"], "delta(1,0) is infinite"),
        (["--gamma", "1", "--delta", "-(t-s)"], "b(t,t) is not 0 but infinite"),
        (["--gamma", "1", "--delta", "-sin(pi*(t-s))"], "b(t,t) is not 0 but infinite"),
        (["--gamma", "1", "--delta", "-(cos(pi*s/2)-cos(pi*t/2))"], "not 0 but infinite"),
    ],
)
def test_an_infinite_limit_is_called_infinite(capsys, arguments, said):
    assert main(["derive", *arguments]) == 1
    out = capsys.readouterr().out
    assert said in out
    assert " inf " not in out and "e+" not in out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--alpha", "1-2t"], "products are written *"),
        (["--alpha", "(1-t)(1+t)"], "products are written *"),
        (["--gamma", "t(t-s)", "--delta", "-1"], "products are written *"),
        (["--beta", "sin(pi t/2)"], "products are written *"),
        (["--alpha", "cos(\N{GREEK SMALL LETTER PI}*t/2)"], "write pi"),
        (["--alpha", "1 \N{MINUS SIGN} t"], "a minus is written -"),
        (["--alpha", "t", "--beta", "1-t"], "swapped: write alpha = 1-t, beta = t"),
    ],
)
def test_a_frequent_slip_gets_its_hint(capsys, arguments, hint):
    assert main(["derive", *arguments]) == 1
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "__import__('os')"], "is not allowed"),
        (["--alpha", "1-t", "--beta", "2*t"], "beta(1) = 2"),
        (["--gamma", "1"], "give two of the three"),
        (["--gamma", "1", "--kappa", "s", "--delta", "1"], "give two of the three"),
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


@pytest.mark.parametrize("below", ["", "deep/below"])
def test_a_run_in_place_of_a_file_is_refused_before_anything_is_read(
    capsys, monkeypatch, tmp_path, below
):
    monkeypatch.setattr(sets, "chosen", None)
    (tmp_path / "f.txt").write_text("")
    assert main(["demo", "--data", "shapes", "--out", str(tmp_path / "f.txt" / below)]) == 1
    assert f"{tmp_path / 'f.txt'} is a file; write a folder" in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_a_set_is_taken_before_a_folder_of_its_name_and_the_demo_says_so(
    capsys, monkeypatch, tmp_path, there
):
    def chosen(name, *_):
        raise InputError(f"was asked for {name}")

    monkeypatch.setattr(sets, "chosen", chosen)
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "digits").mkdir()
    assert main(["demo", "--data", "digits"]) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    if there:
        assert first.endswith("for the folder write --data ./digits")
        assert rest == ["flowspace: was asked for digits"]
        assert main(["demo", "--data", "./digits"]) == 1
        assert capsys.readouterr().err == "flowspace: was asked for ./digits\n"
    else:
        assert first == "flowspace: was asked for digits"


def test_a_place_that_cannot_be_written_is_one_line_on_stderr(capsys, tmp_path):
    (tmp_path / "seed-0").write_text("")
    assert main(["demo", "--out", str(tmp_path)]) == 1
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


def run(*arguments):
    """Run the command as a user does; return what it did and the seconds of its processor."""
    command = (
        "import sys, time\nfrom flowspace.cli import main\ntry:\n"
        "    sys.exit(main(sys.argv[1:]))\n"
        "finally:\n    print('seconds', time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False
    )
    return done, float(done.stdout.split()[-1])


def test_help_takes_half_a_second_of_the_processor():
    assert min(run("--help")[1] for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["derive", "--alhpa", "1-t"], "did you mean --alpha?"),
        (["derive", "--kapa=s"], "did you mean --kappa?"),
        (["demo", "--seed5", "3"], "did you mean --seeds?"),
        (["dmeo"], "did you mean demo?"),
        (["--vresion"], "did you mean --version?"),
        ([], "the following arguments are required: COMMAND"),
        (["doctor", "--jsn"], "did you mean --json?"),
    ],
)
def test_a_mistyped_argument_is_answered_in_a_second_with_what_was_meant(arguments, hint):
    done, seconds = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(hint)
    assert seconds < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--data", "digit"], "shapes; did you mean digits?"),
        (["demo", "--data", "nope"], "which is no folder"),
        (["demo", "--side", "36"], "whose pictures have 8 pixels a side"),
        (["demo", "--data", "shapes", "--side", "36"], "write one of 28, 32, 40, 48, 56, 64"),
        (["demo", "--seeds", "0"], "got --seeds 0; write 1 or more"),
        (["demo", "--steps", "-1"], "got --steps -1; write 1 or more"),
        (["demo", "--out", __file__], "is a file"),
        (["derive", "--gamma", "1"], "got 1 of --gamma, --delta and --kappa"),
        (["doctor", "--seconds", "0", "a:b"], "got --seconds 0; write more than 0"),
        (["doctor", "--seconds", "nan", "a:b"], "got --seconds nan; write more than 0"),
    ],
)
def test_a_value_that_cannot_be_is_answered_in_a_second(arguments, said):
    done, seconds = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("flowspace: ")
    assert said in done.stderr
    assert seconds < 1


def test_what_is_near_to_nothing_gets_no_hint(capsys):
    with pytest.raises(SystemExit):
        main(["derive", "--xyzzy", "1"])
    assert "did you mean" not in capsys.readouterr().err


def test_a_missing_library_is_named_with_the_extra_that_brings_it(capsys, monkeypatch):
    def fails(*_):
        raise ModuleNotFoundError("No module named 'torchdiffeq'", name="torchdiffeq")

    monkeypatch.setattr(cli, "_derive", fails)
    assert main(["derive"]) == 1
    assert capsys.readouterr().err == (
        "flowspace: torchdiffeq is not installed; write: pip install 'flowspace[ode]'\n"
    )
