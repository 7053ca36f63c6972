"""Layers, files and errors of the settings."""

from pathlib import Path

import pytest
from dotenv import dotenv_values

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.setting_files import load_settings
from dagster_sbatch.settings import Settings
from resources import PROJECT
from support import ROOT

SITES = ("musica", "elsewhere")

DOCUMENT = """\
# .env.musica: cluster access
SLURM_EDGE_NODE_HOST=musica.vie.asc.ac.at
SLURM_EDGE_NODE_USER=xy12345
SLURM_EDGE_NODE_KEY_PATH=~/.ssh/id_musica
# Slurm
SLURM_DEPLOYMENT_BASE_PATH=/home/xy12345/dagster-slurm
SLURM_PARTITION=zen4_0768_h100x4
SLURM_QOS=zen4_0768_h100x4
SLURM_SUPERCOMPUTER_SITE=musica
# deployment
DAGSTER_DEPLOYMENT=production_supercomputer
# OIDC identity
ASC_OIDC_CLIENT_ID=client-id
ASC_OIDC_USERNAME=xy12345
ASC_OIDC_TOKEN_URL=https://auth.asc.ac.at/application/o/token/
ASC_OIDC_APP_PASSWORD=test-app-password            # optional: one of the bootstrap paths
# automatic rotation
ASC_AUTHENTIK_API_BASE=https://auth.asc.ac.at
ASC_AUTHENTIK_CREDENTIALS_FILE=~/.config/dagster-slurm/musica-auth.env
ASC_AUTHENTIK_API_TOKEN=test-api-token          # bootstrap / recovery only
ASC_AUTHENTIK_TOKEN_IDENTIFIER=dagster-slurm
# step CA
ASC_STEP_CA_URL=https://auth.asc.ac.at:9000
ASC_STEP_FINGERPRINT=44b048473242281db1da57124c2b843741d6c92a8fb5d0482dec032e957f2919
"""
"""The file that users of MUSICA have already, with test values for the secrets."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "envs").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def test_with_nothing_set_workloads_run_here(root: Path) -> None:
    settings = load_settings(SITES, root)
    assert settings.deployment == "development"
    assert not settings.on_supercomputer
    assert Project(root).local_data_root(settings) == root / "data"


def test_a_relative_data_root_is_meant_from_the_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "here/data")
    monkeypatch.chdir(root)
    assert Project(ROOT).local_data_root(load_settings(SITES, root)) == ROOT / "here" / "data"


def test_the_users_document_works_verbatim(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setenv("HOME", "/home/me")
    write(root / "envs" / ".env.musica", DOCUMENT)
    settings = load_settings(SITES, root)
    assert settings.supercomputer_site == "musica"
    assert settings.edge_node_host == "musica.vie.asc.ac.at"
    assert settings.edge_node_port == 22
    assert settings.edge_node_key_path == Path("/home/me/.ssh/id_musica")
    assert settings.authentik_credentials_file == Path("/home/me/.config/dagster-slurm/musica-auth.env")
    assert settings.qos == "zen4_0768_h100x4"
    assert settings.oidc_app_password is not None
    assert settings.oidc_app_password.get_secret_value() == "test-app-password"
    assert "test-app-password" not in repr(settings)


def test_the_example_file_has_the_variables_of_the_document() -> None:
    ours = dotenv_values(ROOT / "envs" / ".env.musica.example")
    write_once = dict(line.split("=", 1) for line in DOCUMENT.splitlines() if not line.startswith("#"))
    assert list(ours) == list(write_once)
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert set(ours) <= known


def test_the_process_environment_wins_over_dotenv_over_envs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "staging_supercomputer")
    write(root / "envs" / ".env.musica", DOCUMENT)
    write(root / ".env", "SLURM_PARTITION=from_dotenv\nSLURM_QOS=from_dotenv\nSLURM_EDGE_NODE_PORT=2222\n")
    monkeypatch.setenv("SLURM_QOS", "from_environment")
    settings = load_settings(SITES, root)
    assert settings.deployment == "staging_supercomputer"  # though the file says production
    assert settings.qos == "from_environment"
    assert settings.partition == "from_dotenv"
    assert settings.edge_node_port == 2222
    assert settings.edge_node_user == "xy12345"


@pytest.mark.parametrize("layer", ["environment", "dotenv"])
def test_blank_means_unset(root: Path, monkeypatch: pytest.MonkeyPatch, layer: str) -> None:
    write(root / "envs" / ".env.musica", DOCUMENT)
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musica")
    if layer == "environment":
        monkeypatch.setenv("SLURM_QOS", "")
    else:
        write(root / ".env", "SLURM_QOS=\n")
    assert load_settings(SITES, root).qos == "zen4_0768_h100x4"


def test_the_deployment_may_come_from_the_file_of_the_site(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "envs" / ".env.musica", DOCUMENT)
    assert load_settings(SITES, root).deployment == "development"  # a file that lies there decides nothing
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musica")
    assert load_settings(SITES, root).deployment == "production_supercomputer"


def test_without_a_site_the_only_known_file_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    write(root / "envs" / ".env.unknown", "SLURM_QOS=x\n")
    with pytest.raises(ConfigurationError, match=r"has no file for one\. Copy the example"):
        load_settings(SITES, root)
    write(root / "envs" / ".env.musica", DOCUMENT)
    assert load_settings(SITES, root).edge_node_user == "xy12345"
    write(root / "envs" / ".env.elsewhere", DOCUMENT)
    with pytest.raises(
        ConfigurationError, match=r"\.env\.elsewhere, \.env\.musica\. Set it to one of elsewhere, musica\.$"
    ):
        load_settings(SITES, root)  # nothing has to be copied


def test_all_that_is_missing_is_told_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musica")
    with pytest.raises(ConfigurationError) as error:
        load_settings(SITES, root)
    text = str(error.value)
    for name in (
        "SLURM_EDGE_NODE_HOST=musica.vie",
        "SLURM_EDGE_NODE_USER=",
        "SLURM_EDGE_NODE_KEY_PATH=~",
        "SLURM_DEPLOYMENT_BASE_PATH=",
    ):
        assert name in text
    assert "SLURM_SUPERCOMPUTER_SITE=" not in text
    assert ".env.musica" in text


def test_a_login_node_whose_slurm_is_not_on_the_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service does not read the login profile that sets PATH."""
    for name, value in (("DAGSTER_DEPLOYMENT", "staging_supercomputer"), ("SLURM_SUPERCOMPUTER_SITE", "musica")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_EDGE_NODE_HOST", "localhost")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(ConfigurationError, match=r"no sbatch on the PATH .*extend PATH\. (.|\n)*SLURM_EDGE_NODE_USER="):
        load_settings(SITES, root)
    monkeypatch.setenv("SLURM_EDGE_NODE_HOST", "login.example.org")
    with pytest.raises(ConfigurationError) as other:
        load_settings(SITES, root)
    assert "sbatch" not in str(other.value)


def test_all_that_is_wrong_is_told_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setenv("SLURM_EDGE_NODE_PORT", "ssh")
    monkeypatch.setenv("ASC_STEP_CA_URL", "auth.asc.ac.at")
    write(root / "envs" / ".env.development", "")
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musica")
    with pytest.raises(ConfigurationError) as error:
        load_settings(SITES, root)
    text = str(error.value)
    assert "SLURM_EDGE_NODE_PORT" in text
    assert "ASC_STEP_CA_URL" in text


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SLURM_EDGE_NODE_PORT", "ssh", "this is not a whole number"),
        ("SLURM_MOST_GPU_HOURS_PER_RUN", "many", "this is not a number"),
        ("SLURM_KEEP_WITHIN_BUDGET", "maybe", "write true or false"),
        ("SLURM_BUDGET_START", "1.10.2026", "this is not a day of the form YYYY-MM-DD"),
        ("ASC_STEP_FINGERPRINT", "44b0", "this does not have the right form"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_words(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as error:
        load_settings(SITES, root)
    (line,) = [line for line in str(error.value).splitlines() if line.startswith(name)]
    assert line.startswith(f"{name}: {problem}. ")
    assert "Example: " in line


def test_a_line_that_means_nothing_is_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(root / ".env", 'SLURM_ACCOUNT=p1\nSLURM_QOS: dev\nSLURM_PARTITION="zen4\n')
    with pytest.raises(ConfigurationError) as error:
        load_settings(SITES, root)
    assert str(error.value).splitlines() == [
        f"{root}/.env, line {line}: this is not NAME=value, or lacks a quotation mark" for line in (2, 3)
    ]
    assert capfd.readouterr() == ("", "")


def test_an_unknown_deployment_names_the_valid_ones(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "produktion")
    with pytest.raises(ConfigurationError, match=r"'produktion'.*development, staging_supercomputer, production_super"):
        load_settings(SITES, root)


def test_an_unknown_site_names_the_nearest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musika")
    with pytest.raises(ConfigurationError, match="did you mean 'musica'"):
        load_settings(SITES, root)


def test_a_typing_error_in_a_file_is_told(root: Path) -> None:
    write(root / ".env", "SLURM_PARTITON=x\nMY_OWN_VARIABLE=y\n")
    with pytest.raises(ConfigurationError, match="SLURM_PARTITON; did you mean 'SLURM_PARTITION'") as error:
        load_settings(SITES, root)
    assert "MY_OWN_VARIABLE" not in str(error.value)


def test_a_file_that_is_not_utf_8_is_named(root: Path) -> None:
    (root / ".env").write_bytes("# für alle\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"/\.env cannot be read: line 1 is not in UTF-8"):
        load_settings(SITES, root)


def test_a_secret_that_others_can_read_is_refused_and_not_repeated(root: Path) -> None:
    path = root / ".env"
    write(path, "ASC_AUTHENTIK_API_TOKEN=test-api-token\n")
    load_settings(SITES, root)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match=r"ASC_AUTHENTIK_API_TOKEN.*\n  chmod 600 ") as error:
        load_settings(SITES, root)
    assert "test-api-token" not in str(error.value)


def test_files_never_reach_the_process_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musica")
    write(root / "envs" / ".env.musica", DOCUMENT)
    load_settings(SITES, root)
    import os

    assert "ASC_OIDC_APP_PASSWORD" not in os.environ


@pytest.mark.parametrize("value", ["p1\n#SBATCH --uid=0", "/a%j", "/a\\j", "/a|j", "/a:j", "/a=j"])
@pytest.mark.parametrize("name", ["SLURM_ACCOUNT", "SLURM_RESERVATION", "SLURM_DEPLOYMENT_BASE_PATH"])
def test_what_slurm_would_read_as_something_else_is_refused(
    name: str, value: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{name}: .* Example: "):
        load_settings(SITES, root)


def test_every_site_of_the_project_is_valid() -> None:
    from dagster_sbatch.sites import SITES

    for name in SITES.keys() | PROJECT.site_overrides.keys():
        assert PROJECT.load_site(name).partitions


@pytest.mark.parametrize(
    ("url", "switch", "problem"),
    [
        ("http://127.0.0.1:9000", "", ""),
        ("http://[::1]:9000", "", ""),
        ("http://localhost", "", ""),
        ("http://10.77.1.4:9300", "", "plain http would show secrets"),
        ("http://192.168.1.1", "", "plain http would show secrets"),
        ("http://169.254.169.254", "", "plain http would show secrets"),
        ("http://[fe80::1]", "", "plain http would show secrets"),
        ("http://auth.example.org", "", "plain http would show secrets"),
        ("http://10.77.1.4:9300", "true", ""),
        ("https://auth.example.org", "", ""),
        ("https://auth.example.org:port", "", "not a URL"),
        ("https://[::1", "", "not a URL"),
        ("auth.example.org", "true", "not a URL"),
    ],
)
def test_secrets_travel_in_the_clear_within_this_machine_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, url: str, switch: str, problem: str
) -> None:
    monkeypatch.setenv("ASC_ALLOW_HTTP", switch)
    monkeypatch.setenv("ASC_STEP_CA_URL", url)
    if not problem:
        assert load_settings(SITES, root).step_ca_url == url
        return
    with pytest.raises(ConfigurationError, match=f"ASC_STEP_CA_URL: {problem}"):
        load_settings(SITES, root)


FORMS = "Valid forms: /absolute/path, ~/path, $HOME/path, $DATA/path, $SCRATCH/path"


@pytest.mark.parametrize("path", ["/home/xy12345/dagster-slurm", "~/d", "$HOME/d '$e'", "$DATA", "$SCRATCH/a/b"])
def test_a_path_on_the_supercomputer_stays_as_it_was_written(
    root: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client does not know what the login profile there sets."""
    monkeypatch.setenv("HOME", "/home/of/this/machine")
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "staging_supercomputer")
    write(root / "envs" / ".env.musica", DOCUMENT + f"SLURM_DEPLOYMENT_BASE_PATH={path}/\nDATA_ROOT={path}\n")
    settings = load_settings(SITES, root)
    assert (settings.deployment_base_path, settings.data_root) == (path, path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("$SCRACH/dagster", "$SCRACH is unknown; did you mean '$SCRATCH'?"),
        ("$WORK/dagster", "$WORK is unknown; valid are $DATA, $HOME, $SCRATCH"),
        ("$DATA-1/dagster", "$DATA counts only as the first part, without braces. "),
        ("/data/$USER/dagster", "$USER is unknown; "),
        ("/data/$HOME", "$HOME counts only as the first part"),
        ("dagster", "is not an absolute path. " + FORMS),
        ("./dagster", "is not an absolute path. "),
        ("~xy12345/dagster", "is not an absolute path. "),
    ],
)
@pytest.mark.parametrize("name", ["SLURM_DEPLOYMENT_BASE_PATH", "DATA_ROOT", "SLURM_PYTHON"])
def test_any_other_path_there_is_refused(
    root: Path, path: str, text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P-9: it was accepted, and a folder of that name was made in the home."""
    write(root / "envs" / ".env.musica", DOCUMENT)
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setenv(name, path)
    with pytest.raises(ConfigurationError) as raised:
        load_settings(SITES, root)
    assert f"{name}: {path!r}" in str(raised.value)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("$HOM/id_musica", "$HOM is unknown; did you mean '$HOME'?"),
        ("/home/$USER/id_musica", "$USER is unknown; "),
        ("$SCRATCH/id_musica", "begins with $SCRATCH, which is not set on this machine"),
        ("id_musica", "is not an absolute path. " + FORMS),
        ("~no-such-user/id_musica", "there is no such user on this machine"),
    ],
)
@pytest.mark.parametrize("name", ["SLURM_EDGE_NODE_KEY_PATH", "ASC_AUTHENTIK_CREDENTIALS_FILE"])
def test_a_path_here_is_absolute(root: Path, path: str, text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a refresh made a key and secrets in a folder `$HOME`, below the one in which it was started."""
    monkeypatch.delenv("SCRATCH", raising=False)
    monkeypatch.setenv(name, path)
    with pytest.raises(ConfigurationError) as raised:
        load_settings(SITES, root)
    assert f"{name}: {path!r}" in str(raised.value)
    assert text in str(raised.value)


def test_the_home_has_two_names_here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SLURM_EDGE_NODE_KEY_PATH", "$HOME/.ssh/id_musica")
    assert load_settings(SITES, root).edge_node_key_path == Path("/home/me/.ssh/id_musica")


@pytest.mark.parametrize("name", ["SLURM_DEPLOYMENT_BASE_PATH", "DATA_ROOT"])
def test_a_misspelt_variable_is_refused_in_development_too(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "$SCRACH/dagster")
    with pytest.raises(ConfigurationError, match=r"\$SCRACH is unknown.*did you mean '\$SCRATCH'"):
        load_settings(SITES, root)


def test_variables_of_this_machine_count_for_data_here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data/of/mine")
    monkeypatch.delenv("SCRATCH", raising=False)
    known = {"$DATA/a": "/data/of/mine/a", "$HOME": "/home/me", "~/b": "/home/me/b", "c": f"{ROOT}/c"}
    for text, path in known.items():
        monkeypatch.setenv("DATA_ROOT", text)
        assert Project(ROOT).local_data_root(load_settings(SITES, root)) == Path(path)
    monkeypatch.setenv("DATA_ROOT", "$SCRATCH/a")
    with pytest.raises(ConfigurationError, match=r"\$SCRATCH, which is not set on this machine"):
        load_settings(SITES, root)


def test_braces_that_dotenv_would_replace_by_nothing_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "staging_supercomputer")
    write(root / "envs" / ".env.musica", DOCUMENT + "SLURM_DEPLOYMENT_BASE_PATH=${DATA}/dagster\n")
    with pytest.raises(ConfigurationError, match=r"SLURM_DEPLOYMENT_BASE_PATH: \$\{DATA\} would get .* Write \$DATA"):
        load_settings(SITES, root)
