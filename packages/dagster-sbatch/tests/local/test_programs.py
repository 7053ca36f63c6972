"""Programs of any language and batch scripts on this machine, and what they report by the command `pipes`."""

import base64
import re
import shutil
import signal
import sys
import zipapp
from pathlib import Path

import pytest

from dagster_sbatch.launchers import BatchScriptLauncher, CommandLauncher
from dagster_sbatch.slurm import SlurmRequest
from support import ROOT
from support.programs import PICTURE, REPORTS, foreign_elf, make
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = pytest.mark.local


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))


def run(folder: Path, text: str, **arguments: object) -> Outcome:
    return materialize(make(folder, text), folder, launcher=CommandLauncher(), **arguments)  # type: ignore[arg-type]


def run_batch(folder: Path, text: str, request: SlurmRequest | None = None) -> Outcome:
    path = folder / "relax.sbatch"
    path.write_text(text)
    return materialize(path, folder, launcher=BatchScriptLauncher(), request=request)


# ---- what works


def test_a_script_reports_by_the_command_pipes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a plot.png"
    picture.write_bytes(PICTURE)
    outcome = run(tmp_path, REPORTS, args=[str(picture), "a b"], extras={"trials": ["x y", 3]}, checks=("fine",))
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert (metadata["rows"], metadata["share"], metadata["where"]) == (12, 0.5, "0123")
    assert metadata["plot"] == f"![plot](data:image/png;base64,{base64.b64encode(PICTURE).decode()})"
    assert metadata["workload_seconds"] > 0
    assert outcome.checks == {"fine": True}
    out, err = capfd.readouterr()
    assert out == f"arguments: {picture} a b\nx y\n3\n"
    assert "WARNING" in err
    assert "half of it" in err


def test_the_commands_of_the_page_as_they_stand(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "packages" / "dagster-sbatch" / "docs" / "launchers.md").read_text()
    (block,) = re.findall(r"```bash\n(pipes .*?)```", page, re.DOTALL)
    (tmp_path / "plot.png").write_bytes(PICTURE)
    text = f"#!/bin/bash -e\ncp '{tmp_path}/plot.png' .\n{block}"
    outcome = run(tmp_path, text, checks=("no_gaps",), partitions=("a", "b"), partition_key="a")
    assert outcome.error == ""
    assert outcome.materializations["a"][0]["rows"] == 12
    assert outcome.checks == {"no_gaps": True}
    assert capfd.readouterr().out == "a\n"


def test_the_exit_code_alone_is_enough(tmp_path: Path) -> None:
    outcome = run(tmp_path, "#!/bin/sh\nexit 0\n")
    assert outcome.error == ""
    assert len(outcome.materializations[None]) == 1
    failed = run(tmp_path, "#!/bin/sh\necho 'no licence' >&2\nexit 3\n")
    assert "model.sh ended with exit code 3" in failed.error
    assert "no licence" in failed.error
    assert failed.materializations == {}


def test_a_binary_runs_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "echo it"
    shutil.copy(str(shutil.which("printf")), path)
    outcome = materialize(path, tmp_path, launcher=CommandLauncher(), args=["%s|", "a'b $HOME", ""])
    assert outcome.error == ""
    assert capfd.readouterr().out == "a'b $HOME||"


def test_a_script_with_data_behind_it_runs_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its data has bytes that would be line ends of Windows in a text."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "__main__.py").write_text("print('from a zipapp')")
    (tmp_path / "source" / "data").write_bytes(b"\0\r\n")
    path = tmp_path / "model.pyz"
    zipapp.create_archive(tmp_path / "source", path, interpreter=sys.executable)
    assert materialize(path, tmp_path, launcher=CommandLauncher()).error == ""
    assert capfd.readouterr().out == "from a zipapp\n"


def test_a_program_has_the_usual_signals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Python ignores SIGPIPE and SIGXFSZ; `producer | head` would report errors in place of ending."""
    assert run(tmp_path, "#!/bin/sh\ngrep SigIgn /proc/self/status\n").error == ""
    assert int(capfd.readouterr().out.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0


def test_a_failure_after_a_report_stores_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, "#!/bin/sh\npipes materialize --metadata rows=1\nkill -SEGV $$\n")
    assert "model.sh was killed by SIGSEGV" in outcome.error
    assert outcome.materializations == {}


def test_a_second_report_on_the_same_asset_is_refused_where_it_is_made(tmp_path: Path) -> None:
    text = "#!/bin/sh\npipes materialize --metadata rows=1\npipes materialize --metadata more=2 && exit 9\nexit 0\n"
    outcome = run(tmp_path, text)
    assert outcome.error == ""
    assert outcome.materializations[None][0]["rows"] == 1


def test_a_report_on_a_partition(tmp_path: Path) -> None:
    text = '#!/bin/sh\nfor key in $(pipes extra partition_keys); do pipes materialize --partition "$key" '
    text += "--metadata rows=5 --data-version v2; done\n"
    outcome = run(tmp_path, text, partitions=("a", "b"), partition_key="a")
    assert outcome.error == ""
    assert outcome.materializations["a"][0]["rows"] == 5


def test_a_program_may_run_the_python_of_the_environment(tmp_path: Path) -> None:
    report = f"{PIPES}    pipes.report_asset_materialization({{'n': 1}})"
    outcome = run(tmp_path, f"#!/bin/bash\n\"$PYTHON\" - <<'END'\n{report}\nEND\n")
    assert outcome.error == ""
    assert outcome.materializations[None][0]["n"] == 1


@pytest.mark.parametrize("end", ["raise ValueError('no data')", "import os; os._exit(0)"])
def test_the_exit_code_decides_also_over_a_pipes_session_in_it(end: str, tmp_path: Path) -> None:
    """As the script's author wants it: the step may fail."""
    text = f"#!/bin/bash\n\"$PYTHON\" - <<'END' || echo never mind\n{PIPES}    {end}\nEND\nexit $1\n"
    assert run(tmp_path, text, args=["0"]).error == ""
    assert "model.sh ended with exit code 4" in run(tmp_path, text, args=["4"]).error


def test_a_batch_script_runs_unchanged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It needs no execute permission, writes where it is started, and finds what is beside it."""
    (tmp_path / "input.txt").write_text("5\n")
    text = "#!/bin/bash -e\n#SBATCH -J relax -o out.%j\n#SBATCH --time=20 --mem=1G\ncd $SLURM_SUBMIT_DIR\n"
    text += "sort input.txt >result\npipes materialize --metadata rows=$(cat result) --metadata flags:text=$-\n"
    outcome = run_batch(tmp_path, text, SlurmRequest(mem="2G"))
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert metadata["rows"] == 5
    assert "e" in metadata["flags"]
    assert not (tmp_path / "result").exists()
    err = capfd.readouterr().err
    assert "relax.sbatch, line 3: --mem=1G does not apply. The asset requests mem='2G'." in err
    assert "--job-name=relax (line 2), --output=out.%j (line 2)" in err


@pytest.mark.parametrize("launcher", [CommandLauncher(), BatchScriptLauncher()])
@pytest.mark.parametrize("shell", ["/bin/bash -l", "/bin/sh -el", "/usr/bin/env -S bash --login"])
def test_a_login_shell_whose_profile_sets_the_path_anew_finds_pipes(
    shell: str, launcher: CommandLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do the programs that it starts; the script has its own name, arguments and folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".profile").write_text("cd /\nPATH=/usr/bin:/bin OF_PROFILE=read\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = "[ -x bin/pipes ] || [ -x ../bin/pipes ] || exit 9"
    report = 'pipes materialize --metadata words="$OF_PROFILE $0 $*"'
    text = f"#!{shell}\n{here}\nsh -c 'pipes log begun'\n{report}\nexit $3\n"
    path = make(tmp_path, text)
    outcome = materialize(path, tmp_path, launcher=launcher, args=["a b", "c", "0"])
    assert outcome.error == ""
    assert outcome.materializations[None][0]["words"] == f"read {path} a b c 0"
    assert "model.sh ended with exit code 7" in materialize(path, tmp_path, launcher=launcher, args=["", "", "7"]).error


# ---- what does not


def test_a_check_that_is_not_declared_is_refused_where_it_is_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The script decides what that means: here the result is stored."""
    outcome = run(
        tmp_path, "#!/bin/bash\npipes check gaps --passed || pipes check no_gaps --passed\n", checks=("no_gaps",)
    )
    assert (outcome.error, outcome.checks) == ("", {"no_gaps": True})
    assert "pipes: This step does not declare the check 'gaps'. The checks of this step are: no_gaps of probe." in (
        capfd.readouterr().err
    )


def test_a_program_with_pipes_of_its_own_that_reports_such_a_check_stores_nothing(tmp_path: Path) -> None:
    text = f"{PIPES}    pipes.report_asset_materialization()\n    pipes.report_asset_check('gaps', True)\n"
    outcome = materialize(text, tmp_path, checks=("no_gaps",))
    assert (
        "cannot be used: probe does not declare the check 'gaps'. The checks of this step are: no_gaps of probe. "
        in (outcome.error)
    )
    assert "Correct the name, or declare the check: check_specs=[AssetCheckSpec('gaps', asset=...)]" in outcome.error
    assert outcome.materializations == {}


def test_a_report_on_a_check_without_names_is_refused_in_words(tmp_path: Path) -> None:
    """As a program in another language may write it."""
    line = '{"method": "report_asset_check", "params": {"passed": true}}'
    text = f"{PIPES}    from dagster_pipes import decode_param\n"
    text += "    import os\n    path = decode_param(os.environ['DAGSTER_PIPES_MESSAGES'])['path']\n"
    text += f"    with open(path, 'a') as file:\n        print('{line}', file=file)\n"
    outcome = materialize(text, tmp_path, checks=("no_gaps",))
    assert "This step does not declare the check None. The checks of this step are: no_gaps of probe." in outcome.error


def test_bytes_that_are_no_text_and_values_that_are_too_large(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """#!/bin/bash
pipes log "$(printf 'caf\\xe9')"
pipes materialize --metadata all="$(printf 'x%.0s' {1..100001})" && exit 9
pipes materialize --metadata "$(printf 'caf\\xe9=\\xff\\xc3\\xa9')"
"""
    outcome = run(tmp_path, text)
    assert outcome.error == ""
    assert outcome.materializations[None][0]["caf\ufffd"] == "\ufffdé"
    err = capfd.readouterr().err
    assert "caf\ufffd" in err
    assert "the value of all has 100001 bytes, and metadata may have 100000" in err


BAD_PROGRAMS: dict[str, tuple[bytes, int, list[str]]] = {
    "for another CPU": (foreign_elf(), 0o755, ["was built for", "Build it for"]),
    "for Windows": (b"MZ\0\0" + bytes(60), 0o755, ["was built for Windows"]),
    "with an interpreter that is missing": (
        b"#!/opt/no/Rscript\n",
        0o755,
        ["asks for /opt/no/Rscript in its first line"],
    ),
    "whose interpreter is not on the PATH": (
        b"#!/usr/bin/env Rscript-4.9\n",
        0o755,
        ["asks for 'Rscript-4.9' in its first line", "no such program on the PATH. Load its module, or correct that"],
    ),
    "whose interpreter is not a program": (b"#!/etc/passwd\n", 0o755, ["asks for /etc/passwd", "is not a program on"]),
    "that is cut off": (b"\x7fELF\2\1", 0o755, ["is damaged, or no program of", "Build it again, or copy it again."]),
    "that is data": (b"PK\3\4\0\0", 0o755, ["is not a program: it is data", "and pass this file in args."]),
    "that is empty": (b"", 0o755, ["is not a program: it is empty"]),
    "with a byte order mark": (
        b"\xef\xbb\xbf#!/bin/bash\n",
        0o755,
        ["begins with a byte order mark", "Save it as UTF-8 without"],
    ),
    "in UTF-16": ("#!/bin/bash\n".encode("utf-16"), 0o755, ["begins with a byte order mark"]),
    "with the name of its interpreter only": (b"#!bash\n", 0o755, ["does not name its interpreter"]),
    "with CRLF": (b"#!/bin/bash\r\necho hello\r\n", 0o755, ["line ends of Windows", "\nsed -i 's/\\r$//' "]),
    "not executable": (b"#!/bin/bash\n", 0o644, ["is not executable", "\nchmod +x "]),
    "without a first line": (b"echo hello\n", 0o755, ["does not name its interpreter", "#!/usr/bin/env Rscript"]),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_a_program(name: str, tmp_path: Path) -> None:
    content, mode, texts = BAD_PROGRAMS[name]
    path = tmp_path / "model"
    path.write_bytes(content)
    path.chmod(mode)
    outcome = materialize(path, tmp_path, launcher=CommandLauncher())
    assert not outcome.success
    for text in texts:
        assert text in outcome.error


def test_a_batch_script_with_crlf_or_without_an_interpreter(tmp_path: Path) -> None:
    assert "line ends of Windows" in run_batch(tmp_path, "#!/bin/bash\n#SBATCH -N 1\r\n").error
    assert "begins with a byte order mark" in run_batch(tmp_path, "\ufeff#!/bin/bash\n").error
    assert "asks for 'relax' in its first line" in run_batch(tmp_path, "#!/usr/bin/env relax\n").error
    assert "sbatch would refuse it" in run_batch(tmp_path, "#SBATCH -N 1\n").error
    assert run_batch(tmp_path, "#! /bin/sh -e\nexit 0\n").error == ""


def test_a_folder_is_no_program(tmp_path: Path) -> None:
    outcome = materialize(tmp_path, tmp_path, launcher=CommandLauncher())
    assert "is a folder. Name the program in it." in outcome.error
