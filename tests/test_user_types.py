"""A type checker sees what a user sees: what is usual passes, what is wrong is refused.

In `tests/user/wrong.py` each wrong line is followed by the rule that refuses it. pyright reports a
comment that is not needed, so a wrong line that passes is an error too.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "user"


def checked(folder):
    """Return pyright's report on a folder with a configuration."""
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "-p", str(folder), "--outputjson"]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_users_programs_have_the_types_that_they_say():
    report = checked(FOLDER)
    told = [
        f"{Path(each['file']).name}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in report["generalDiagnostics"]
    ]
    assert told == []
    assert report["summary"]["filesAnalyzed"] == 2


@pytest.mark.slow
def test_each_wrong_line_is_refused_by_its_rule_and_each_type_is_compared(tmp_path):
    """Without the comments every wrong line is an error, and so is every type that is changed."""
    wrong = (FOLDER / "wrong.py").read_text()
    usual = (FOLDER / "usual.py").read_text()
    rules = re.findall(r"# pyright: ignore\[(\w+)\]", wrong)
    types = len(re.findall(r"^\s+assert_type\(", usual, re.MULTILINE))
    bare = re.sub(r"  # pyright: ignore\[\w+\]", "", wrong)
    other = re.sub(r"(    assert_type\(.*, )\w+\)", r"\1bytes)", usual)
    (tmp_path / "wrong.py").write_text(bare)
    (tmp_path / "usual.py").write_text(other)
    (tmp_path / "pyrightconfig.json").write_text((FOLDER / "pyrightconfig.json").read_text())
    told = checked(tmp_path)["generalDiagnostics"]
    lines = {
        name: {each["range"]["start"]["line"] for each in told if each["file"].endswith(name)}
        for name in ("wrong.py", "usual.py")
    }
    assert len(lines["wrong.py"]) == len(rules) > 25
    assert len(lines["usual.py"]) == types > 15
