"""The code root as it is sent: what git tracks, submodules, links, and folders without git."""

import os
import subprocess
from pathlib import Path

import pytest

from dagster_sbatch.environments.code import read_code, revision_of
from dagster_sbatch.errors import ConfigurationError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder of workloads in a repository: all of it tracked."""
    folder = tmp_path / "workloads"
    (folder / "helpers" / "deep").mkdir(parents=True)
    (folder / "helpers" / "deep" / "tool.py").write_text("WORD = 1\n")
    (folder / "main.py").write_text("import helpers.deep.tool\n")
    (tmp_path / "outside.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    return folder


def git(folder: Path, *command: str) -> None:
    subprocess.run(["git", "-C", str(folder), *command], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_with_sudo_the_repository_is_that_of_the_user(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git itself asks who has called sudo."""
    for path in (repository.parent, repository.parent / ".git", repository):
        os.chown(path, 12345, 12345)
    monkeypatch.setenv("SUDO_UID", "12345")
    assert sorted(read_code(repository).files) == ["helpers/deep/tool.py", "main.py"]


def test_a_line_in_a_nested_package_makes_another_digest(repository: Path) -> None:
    before = read_code(repository)
    assert sorted(before.files) == ["helpers/deep/tool.py", "main.py"]
    (repository / "helpers" / "deep" / "tool.py").write_text("WORD = 2\n")
    after = read_code(repository)
    changed = {name for name in after.digests if after.digests[name] != before.digests[name]}
    assert changed == {"helpers/deep/tool.py"}


def test_a_file_that_becomes_executable_has_another_digest(repository: Path) -> None:
    before = read_code(repository)
    (repository / "main.py").chmod(0o755)
    after = read_code(repository)
    assert (sorted(before.executable), sorted(after.executable)) == ([], ["main.py"])
    assert after.files == before.files
    assert {name for name in after.digests if after.digests[name] != before.digests[name]} == {"main.py"}


def test_only_what_git_tracks_is_sent_and_the_rest_is_listed(repository: Path) -> None:
    (repository.parent / ".gitignore").write_text("*.log\n")
    for name in ("new.py", "out.log", ".env", ".env.musica", "musica-auth.env"):
        (repository / name).write_text("SECRET=1\n")
    code = read_code(repository)
    assert sorted(code.files) == ["helpers/deep/tool.py", "main.py"]
    assert "new.py" in code.left_out
    assert "out.log" not in code.left_out


def test_a_dotenv_file_is_not_sent_though_git_tracks_it(repository: Path) -> None:
    for name in (".env", ".env.musica", "musica-auth.env"):
        (repository / name).write_text("SECRET=1\n")
    git(repository, "add", "--force", ".")
    code = read_code(repository)
    assert not any("env" in name for name in code.files)
    (note,) = code.notes
    assert "are not sent, because dotenv files may hold secrets: .env, .env.musica, musica-auth.env. Rename" in note


def test_a_file_that_was_deleted_is_not_sent(repository: Path) -> None:
    (repository / "main.py").unlink()
    assert list(read_code(repository).files) == ["helpers/deep/tool.py"]


def test_the_revision_says_whether_files_are_changed(repository: Path) -> None:
    assert revision_of(repository) == ""
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message=a")
    revision = revision_of(repository)
    assert len(revision) >= 7
    (repository / "main.py").write_text("")
    assert revision_of(repository) == f"{revision}-dirty"


def test_the_environment_of_a_git_hook_does_not_mislead(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert len(read_code(repository).files) == 2


def test_without_a_repository_all_but_hidden_files_and_caches(tmp_path: Path) -> None:
    for name in ("main.py", "a/b.py", ".env", ".hidden/c.py", "a/__pycache__/b.pyc", "notes.env"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    code = read_code(tmp_path)
    assert sorted(code.files) == ["a/b.py", "main.py"]
    assert [note.rpartition(": ")[2] for note in code.notes] == [
        "a/b.py, main.py",
        "notes.env. Rename one that the workloads read",
    ]


def test_without_git_as_without_a_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert sorted(read_code(repository).files) == ["helpers/deep/tool.py", "main.py"]


def test_data_in_the_code_is_too_much(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(9 << 20))
    with pytest.raises(ConfigurationError, match=r"more than 8 MB \(at data.bin\)"):
        read_code(tmp_path)


def test_a_file_that_is_too_much_for_the_memory_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "data.bin").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(ConfigurationError, match=r"more than 8 MB \(at data.bin\)"):
        read_code(tmp_path)


def test_without_a_repository_the_log_lists_what_is_sent(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"m{number:02}.py").write_text("")
    (tmp_path / "id_rsa").write_text("key")
    (note,) = read_code(tmp_path).notes
    assert f"{tmp_path} is in no git repository, so everything in it is sent (26 files): id_rsa, m00.py, m01.py" in note
    assert note.endswith("m18.py and 6 more")


def test_what_git_does_not_track_is_noted(repository: Path) -> None:
    (repository / "new.py").write_text("")
    (note,) = read_code(repository).notes
    assert note == f"git does not track these files in {repository}, so they are not sent: new.py"


def test_a_thousand_files_that_git_does_not_track_are_one_note(repository: Path) -> None:
    for number in range(1000):
        (repository / f"out{number:03}.csv").touch()
    (note,) = read_code(repository).notes
    assert note.endswith("out018.csv, out019.csv and 980 more")


# Names and files that cannot be sent


@pytest.fixture
def odd(repository: Path) -> Path:
    """A file whose name is not in UTF-8, as an archive from another machine may have."""
    path = repository / os.fsdecode(b"gr\xfc\xdfe.py")
    path.touch()
    return path


def test_a_name_that_is_not_utf_8_can_be_noted(repository: Path, odd: Path) -> None:
    (note,) = read_code(repository).notes
    assert note.endswith(r"not sent: gr\udcfc\udcdfe.py")
    odd.unlink()
    assert read_code(repository).notes == []


def test_a_name_that_is_not_utf_8_cannot_be_sent(folder: Path, odd: Path) -> None:
    add(folder)
    with pytest.raises(
        ConfigurationError, match=r"/workloads/gr\\udcfc\\udcdfe\.py is not in UTF-8\. Rename the file\."
    ):
        read_code(folder)


# Links and submodules


@pytest.fixture(params=["with git", "without git"])
def folder(request: pytest.FixtureRequest, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "without git":
        monkeypatch.setenv("PATH", str(repository))
    return repository


def add(folder: Path) -> None:
    subprocess.run(["/usr/bin/git", "-C", str(folder), "add", "--force", "."], check=True)


def test_a_link_within_the_code_root_is_sent_as_what_it_points_to(folder: Path) -> None:
    (folder / "tools").symlink_to("helpers")
    (folder / "helpers" / "again.py").symlink_to(folder / "main.py")
    add(folder)
    files = read_code(folder).files
    assert files["helpers/again.py"] == files["tools/again.py"] == files["main.py"]
    assert files["tools/deep/tool.py"] == files["helpers/deep/tool.py"]


@pytest.mark.parametrize("target", ["../outside.py", "../shared", "/etc/hostname", "../nothing"])
def test_a_link_that_leaves_the_code_root_is_refused(target: str, folder: Path) -> None:
    (folder.parent / "shared").mkdir()
    (folder.parent / "shared" / "x.py").write_text("")
    (folder / "linked").symlink_to(target)
    add(folder)
    with pytest.raises(ConfigurationError, match=r"workloads/linked is a link to /.*, outside the code root"):
        read_code(folder)


def test_a_link_to_a_dotenv_file_is_not_sent(folder: Path) -> None:
    (folder / ".env").write_text("SECRET=1")
    (folder / "settings").symlink_to(".env")
    add(folder)
    code = read_code(folder)
    assert "settings" not in code.files
    assert "settings. Rename one" in code.notes[-1]


def test_a_folder_on_the_way_that_became_a_link_is_refused(repository: Path) -> None:
    (repository / "helpers").rename(repository.parent / "helpers")
    (repository / "helpers").symlink_to("../helpers")
    with pytest.raises(ConfigurationError, match=r"helpers/deep/tool\.py is a link to .*, outside the code root"):
        read_code(repository)


@pytest.mark.parametrize(
    "links",
    [
        {"loop": "."},
        {"helpers/up": ".."},
        {"helpers/x": "../other", "other/y": "../helpers"},
    ],
)
def test_links_in_a_circle_are_refused(links: dict[str, str], folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "z.py").write_text("")
    for name, target in links.items():
        (folder / name).symlink_to(target)
    add(folder)
    with pytest.raises(ConfigurationError, match="which contains it"):
        read_code(folder)


@pytest.fixture
def submodule(repository: Path, tmp_path: Path) -> Path:
    origin = tmp_path / "origin"
    (origin / "inner").mkdir(parents=True)
    (origin / "inner" / "lib.py").write_text("")
    git(origin, "init", "--quiet")
    git(origin, "add", ".")
    git(origin, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message=a")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(origin), "sub")
    return repository / "sub"


def test_a_submodule_is_sent(repository: Path, submodule: Path) -> None:
    (submodule / "new.py").write_text("")
    (repository / "short").symlink_to("sub/inner")
    git(repository, "add", "short")
    code = read_code(repository)
    assert {"sub/inner/lib.py", "short/lib.py"} <= code.files.keys()
    assert code.left_out == ("sub/new.py",)


def test_a_submodule_that_is_not_checked_out_is_refused(repository: Path, submodule: Path) -> None:
    git(repository, "submodule", "--quiet", "deinit", "--force", "sub")
    with pytest.raises(ConfigurationError, match=r"(?s)/sub is not checked out here.*\ngit -C .* submodule"):
        read_code(repository)
