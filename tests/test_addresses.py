"""No password gets into a spec, a run folder or a message, wherever a tracking URI comes from."""

import pytest

from sweep import run, sync
from sweep.addresses import has_password, without_login
from sweep.document import SpecError
from sweep.readback import read_run
from sweep.spec import read_spec
from tests.tracked_sweeps import SPEC, run_folder

SECRET = "hunter2-of-nobody"
HARMLESS = (
    "http://127.0.0.1:5000",
    "https://mlflow.example.org/path@place",
    "https://mlflow.example.org:5000/path@place",
    "https://[::1]:5000",
    "sqlite:////home/me/a:b@c/mlflow.db",
    "postgresql://me@db.example.org:5432/mlflow?sslmode=require",
    "postgresql:///mlflow?passfile=/run/secrets/pgpass",
    "mysql+pymysql://me@db/mlflow?read_default_file=/home/me/my.cnf",
    "databricks://profile",
    "mlruns",
)
TELLING = (
    "http://me:SECRET@127.0.0.1:5000",
    "HTTPS://SECRET@mlflow.example.org",
    "https://me:SECRET/with/slashes@mlflow.example.org/",
    "postgresql://me:SECRET@db/mlflow",
    "postgresql://me:SECRET/with/slashes@db/mlflow",
    "postgresql+psycopg://:SECRET@db/mlflow",
    "postgresql://me@db/mlflow?password=SECRET",
    "postgresql://me@db/mlflow?sslmode=require&sslpassword=SECRET",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BUID%3Dme%3BPWD%3DSECRET",
    "https://mlflow.example.org/?access_token=SECRET",
)


@pytest.fixture(params=TELLING)
def uri(request) -> str:
    assert has_password(request.param)
    return request.param.replace("SECRET", SECRET)


@pytest.fixture
def refused(tmp_path, capsys):
    """A command that must be refused with what to do, without repeating the secret or leaving it anywhere."""

    def check(command, *arguments: str) -> str:
        assert command([str(argument) for argument in arguments]) == 2
        said = "".join(capsys.readouterr())
        assert SECRET not in said
        for way in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "~/.mlflow/credentials", "PGPASSFILE"):
            assert way in said
        assert not (tmp_path / "runs").exists()
        return said

    return check


@pytest.mark.parametrize("harmless", HARMLESS)
def test_an_address_without_a_secret_is_taken(tmp_path, harmless):
    file = tmp_path / "small.yaml"
    file.write_text(SPEC)
    assert read_spec(file, [f"tracking.uri={harmless}"]).tracking.uri == harmless


def test_a_password_in_the_file_is_refused_by_its_line(tmp_path, uri, refused):
    file = tmp_path / "small.yaml"
    file.write_text(f"{SPEC}tracking:\n  uri: '{uri}'\n")
    line = file.read_text().splitlines().index(f"  uri: '{uri}'") + 1
    said = refused(run.main, file, "--out", tmp_path / "runs")
    assert f"line {line}, tracking.uri: expected a URI without a password or token" in said


@pytest.mark.parametrize("argument", ["--tracking-uri=URI", "--set=tracking.uri=URI", "--set=tracking={uri: 'URI'}"])
def test_a_password_in_an_argument_is_refused(tmp_path, uri, refused, argument):
    file = tmp_path / "small.yaml"
    file.write_text(SPEC)
    refused(run.main, file, "--out", tmp_path / "runs", argument.replace("URI", uri))


@pytest.mark.parametrize("login", [f"me:{SECRET}@", f"me:{'x' * 80}{SECRET}@"])
def test_what_is_wrong_elsewhere_is_told_without_the_password(tmp_path, capsys, login):
    """A mistyped key, and a line that is no YAML."""
    file = tmp_path / "small.yaml"
    file.write_text(f"{SPEC}tracking: {{uri: postgresql://{login}db/mlflow\n")
    assert run.main([str(file)]) == 2
    file.write_text(SPEC)
    assert run.main([str(file), "--set", f"traking.uri=postgresql://{login}db/mlflow"]) == 2
    said = "".join(capsys.readouterr())
    assert "unknown 'traking.uri'" in said
    assert not {SECRET, "x" * 20} & {part for part in (SECRET, "x" * 20) if part in said}


def test_sync_refuses_a_password_of_its_own_argument(tmp_path, uri, refused):
    folder = run_folder(tmp_path / "kept")
    refused(sync.main, folder.path, "--tracking-uri", uri)


class TestFolderOfAnEarlierVersion:
    """Whose `spec.yaml` may hold a password."""

    URI = f"postgresql://me:{SECRET}@127.0.0.1:9/mlflow"

    def test_it_is_still_read(self, tmp_path):
        assert read_run(run_folder(tmp_path, self.URI)).objective.metric == "macro_f1"

    def test_sync_says_how_it_is_sent(self, tmp_path, refused):
        folder = run_folder(tmp_path / "kept", self.URI)
        assert "give the same URI, without the password, as --tracking-uri" in refused(sync.main, folder.path)

    @pytest.mark.parametrize(
        ("then", "now", "same"),
        [
            (URI, "postgresql://me@127.0.0.1:9/mlflow", True),
            (f"https://me:{SECRET}@mlflow.example.org", "https://mlflow.example.org", True),
            (URI, "postgresql://me@127.0.0.1:9/other", False),
        ],
    )
    def test_it_goes_on_without_the_password(self, then, now, same):
        assert (without_login(then) == without_login(now)) is same


def test_a_weights_url_may_hold_no_login_either(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SPEC.replace("weights: none", f"weights: 'https://me:{SECRET}@host/x.h5#sha256={'0' * 64}'"))
    with pytest.raises(SpecError, match="without a user and password") as error:
        read_spec(file)
    assert SECRET not in str(error.value)
