"""What `scripts/upgrade` prints of a changelog, and that an interrupted upgrade leaves the project as it was."""

import zipfile
from pathlib import Path

import pytest

from dagster_sbatch.commands import lock
from dagster_sbatch.commands.upgrade import changes_between, upgrade
from dagster_sbatch.commands.vendored import Wheel

CHANGELOG = """\
# Changes

## 1.10.0

Faster.

## 1.2.0 (2027)

### In your own files

- two

### Corrected

- nothing of yours

## 1.1.0

### In your own files

- one

## 1.0.0

### In your own files

- zero
"""


def make_wheel(folder: Path, version: str) -> Wheel:
    """A file that is like a wheel of the engine."""
    folder.mkdir(exist_ok=True)
    path = folder / f"dagster_sbatch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dagster_sbatch/CHANGELOG.md", CHANGELOG)
    return Wheel(path)


@pytest.mark.parametrize(
    ("engine", "other", "changes"),
    [
        ("1.10.0", "1.0.0", "1.2.0 (2027)\n- two\n\n1.1.0\n- one"),
        ("1.10.0", "1.1.0", "1.2.0 (2027)\n- two"),
        ("1.1.0", "1.2.0", "1.2.0 (2027)\n- two"),
        ("1.10.0", "1.2.0", ""),
        ("1.2.0", "1.2.0", ""),
    ],
)
def test_what_changed_between_two_versions(engine: str, other: str, changes: str, tmp_path: Path) -> None:
    assert changes_between(make_wheel(tmp_path, engine), other) == changes


def test_an_interrupted_upgrade_leaves_the_project_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, seen = tmp_path / "project", []
    project.mkdir()
    old = make_wheel(project / "vendor", "1.0.0")
    (project / "requirements").mkdir()
    (project / "requirements" / "dev.txt").write_text(old.requirement)
    for name in ("pyproject.toml", "pixi.toml"):
        (project / name).write_text(f'dagster-sbatch = {{ path = "{old.source}" }}\n')

    def state() -> dict[str, bytes]:
        return {str(path.relative_to(project)): path.read_bytes() for path in project.rglob("*") if path.is_file()}

    def interrupt(root: Path, folder: Path) -> None:
        seen.append((root / "pixi.toml").read_text())
        (folder / "dev.txt").write_text("half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(lock, "resolve", interrupt)
    before = state()
    with pytest.raises(KeyboardInterrupt):
        upgrade(project, str(make_wheel(tmp_path / "new", "1.1.0").path), tmp_path)
    assert seen == ['dagster-sbatch = { path = "./vendor/dagster_sbatch-1.1.0-py3-none-any.whl" }\n']
    assert state() == before
