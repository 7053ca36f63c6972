"""The real `step` and `step-ca`: those on PATH, or built once from Debian's own source packages.

Debian packages smallstep's libraries but not its programs, so the programs' own sources are taken out of the source
packages and built against the packaged libraries. Nothing else is downloaded. What the programs need beyond Debian's
libraries (cloud key stores, hardware tokens, `step certificate`) is left out: an SSH CA uses none of it.
"""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import requirements
from .errors import NotInstalledError, SiteError
from .host import locked
from .requirements import CACHE

_CLI_SOURCE = "golang-github-smallstep-cli=0.15.16+ds-3"
_CA_SOURCE = "golang-github-smallstep-certificates=0.19.0-1"
_BUILD_PACKAGES = (
    "gcc",
    "golang-github-pquerna-otp-dev",
    "golang-github-shurcool-sanitized-anchor-name-dev",
    "golang-github-smallstep-certificates-dev",
    "golang-github-smallstep-cli-dev",
    "golang-github-smallstep-truststore-dev",
    "golang-go",
    "libc6-dev",
    "libpcsclite-dev",
    "pkg-config",
)
_LIBRARIES = Path("/usr/share/gocode")


@dataclass(frozen=True)
class Programs:
    """Paths of the client (`step`) and of the certificate authority (`step-ca`)."""

    step: Path
    step_ca: Path


def ensure_programs(install: bool) -> Programs:
    """Return step and step-ca from PATH, from the cache, or freshly built (a minute or two, once a machine).

    Raises:
        NotInstalledError: they are not there, and `install` is false.
        SiteError: the build failed.
    """
    on_path = shutil.which("step"), shutil.which("step-ca")
    if on_path[0] and on_path[1]:
        return Programs(Path(on_path[0]), Path(on_path[1]))
    built = Programs(CACHE / "step", CACHE / "step-ca")
    if not (built.step.exists() and built.step_ca.exists()):
        if not install:
            raise NotInstalledError("the programs step and step-ca are missing")
        with locked(CACHE / "lock"):
            if not (built.step.exists() and built.step_ca.exists()):
                with tempfile.TemporaryDirectory(prefix="build-", dir=CACHE) as folder:
                    _build(Path(folder))
    return built


def _build(folder: Path) -> None:
    """Build both programs in `folder`, and move them to the cache."""
    if missing := requirements.missing_packages(_BUILD_PACKAGES):
        requirements.install_packages(missing)
    _download_sources(folder)
    workspace = folder / "go"
    _unpack_ca(next(folder.glob("golang-github-smallstep-certificates_*.orig.tar.*")), workspace / "src/step-ca")
    _unpack_client(
        next(folder.glob("golang-github-smallstep-cli_*.orig.tar.*")), workspace / "src/github.com/smallstep/cli"
    )
    environment = {
        **os.environ,
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "GOPATH": f"{workspace}:{_LIBRARIES}",
        "GOCACHE": str(folder / "cache"),
    }
    for name, source in (("step-ca", _CA_SOURCE), ("step", _CLI_SOURCE)):
        package = "step-ca" if name == "step-ca" else "github.com/smallstep/cli/cmd/step"
        version = re.sub(r"^.*=([0-9.]+).*$", r"\1+debian", source)
        _run(
            [
                "go",
                "build",
                "-trimpath",
                "-ldflags",
                f"-s -w -X main.Version={version}",
                "-o",
                str(folder / name),
                package,
            ],
            environment,
        )
        (folder / name).rename(CACHE / name)


def _download_sources(folder: Path) -> None:
    """Fetch the upstream tarballs with an apt configuration of our own: the machine's has no source entries."""
    parts, lists = folder / "apt/parts", folder / "apt/lists"
    parts.mkdir(parents=True)
    (lists / "partial").mkdir(parents=True)
    configuration = Path("/etc/apt")
    for file in [configuration / "sources.list", *sorted((configuration / "sources.list.d").glob("*.list"))]:
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            (parts / file.with_suffix(".list").name).write_text(
                re.sub(r"(?m)^deb\s", "deb-src ", text), encoding="utf-8"
            )
    for file in sorted((configuration / "sources.list.d").glob("*.sources")):
        text = file.read_text(encoding="utf-8")
        (parts / file.name).write_text(re.sub(r"(?m)^Types:.*$", "Types: deb-src", text), encoding="utf-8")
    apt = ["apt-get", "--quiet=2"]
    for option in (
        f"Dir::Etc::SourceList={folder}/none",
        f"Dir::Etc::SourceParts={parts}",
        f"Dir::State::Lists={lists}",
        "Dir::Cache::pkgcache=",
        "Dir::Cache::srcpkgcache=",
        "APT::Sandbox::User=root",
    ):
        apt += ["--option", option]
    _run([*apt, "update"], cwd=folder)
    try:
        _run([*apt, "source", "--download-only", "--tar-only", _CLI_SOURCE, _CA_SOURCE], cwd=folder)
    except SiteError as error:
        raise SiteError(f"this release has other sources of step; put `step` and `step-ca` on PATH ({error})") from None


def _unpack_ca(tarball: Path, target: Path) -> None:
    """Take step-ca's main program, without the key stores and authorities that Debian does not package."""
    _unpack(tarball, target.with_name("ca-source"))
    main = next(target.with_name("ca-source").glob("cmd/step-ca/main.go")).read_text(encoding="utf-8")
    unpackaged = "kms/(awskms|azurekms|cloudkms|pkcs11|yubikey)|cas/(cloudcas|vaultcas)"
    left_out = rf'.*"github.com/smallstep/certificates/({unpackaged})"\n'
    target.mkdir()
    (target / "main.go").write_text(re.sub(left_out, "", main), encoding="utf-8")
    shutil.rmtree(target.with_name("ca-source"))


def _unpack_client(tarball: Path, target: Path) -> None:
    """Take the step client, with Debian's help printer, without what needs unpackaged libraries or an old API."""
    _unpack(tarball, target)
    for name in ("printer.go", "renderer.go"):
        shutil.copy(_LIBRARIES / "src/github.com/smallstep/cli/usage" / name, target / "usage" / name)
    main = target / "cmd/step/main.go"
    left_out = r'.*(cas/cloudcas"|cli/command/certificate")\n'
    main.write_text(re.sub(left_out, "", main.read_text(encoding="utf-8")), encoding="utf-8")
    (target / "command/ca/init.go").unlink()
    commands = target / "command/ca/ca.go"
    commands.write_text(re.sub(r".*initCommand\(\).*\n", "", commands.read_text(encoding="utf-8")), encoding="utf-8")


def _unpack(tarball: Path, target: Path) -> None:
    """Unpack a source tarball so that the content of its one top folder becomes `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, tarfile.open(tarball) as archive:
        archive.extractall(folder, filter="data")
        next(Path(folder).iterdir()).rename(target)


def _run(command: list[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SiteError(f"{command[0]} failed while building step:\n{(done.stdout + done.stderr)[-3000:]}")
