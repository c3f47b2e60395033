"""Which store is meant, and whether it is one that can be read."""

from pathlib import Path

import pytest

from mnist_lab.errors import LabError, without_password
from mnist_lab.paths import tracking_uri
from mnist_lab.tracking.sqlite import check_readable

PROJECT = Path(__file__).resolve().parents[2]
DEFAULT = f"sqlite:///{PROJECT}/mlruns/mlflow.db"


# ---- which store


@pytest.mark.parametrize(
    ("given", "environment", "uri"),
    [
        ("sqlite:////a/given.db", "sqlite:////b/environment.db", "sqlite:////a/given.db"),
        (None, "sqlite:////b/environment.db", "sqlite:////b/environment.db"),
        (None, None, DEFAULT),
        (None, "", DEFAULT),
        ("", None, DEFAULT),
        ("http://127.0.0.1:5000", None, "http://127.0.0.1:5000"),
        (None, "https://runs.example", "https://runs.example"),
        ("sqlite:///a/runs.db", None, "sqlite:///{here}/a/runs.db"),  # absolute at once
    ],
)
def test_the_argument_comes_before_the_environment_and_that_before_the_project(
    given: str | None, environment: str | None, uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if environment is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)

    assert tracking_uri(given) == uri.format(here=tmp_path)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:runs.db", "/a/100%25/runs.db", "/a/what?/runs.db"])
def test_a_uri_without_a_file_or_that_mlflow_would_read_as_another_is_refused(uri: str) -> None:
    with pytest.raises(LabError, match=r"^tracking store"):
        tracking_uri(uri if uri.startswith("sqlite") else f"sqlite:///{uri}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://bob:se-cret@host/runs", "postgresql://bob:***@host/runs"),
        ("postgresql://host/runs?user=bob&password=se-cret", "postgresql://host/runs?user=bob&password=***"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dse-cret", "mssql+pyodbc:///?odbc_connect=***"),
        ("http://bob:se-cret@127.0.0.1:5000", "http://bob:***@127.0.0.1:5000"),
        ("https://se-cret@runs.example", "https://***@runs.example"),
        ("HTTP://bob:se-cret@host", "HTTP://bob:***@host"),
        ("postgresql://bob@host/runs", "postgresql://bob@host/runs"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////home/a@b:c/mlflow.db", "sqlite:////home/a@b:c/mlflow.db"),
        (
            "neither 'postgresql://b:se-cret@a' nor http://c:se-cret@d",
            "neither 'postgresql://b:***@a' nor http://c:***@d",
        ),
    ],
)
def test_a_password_is_not_shown(text: str, shown: str) -> None:
    assert without_password(text) == shown


@pytest.mark.parametrize(
    "uri", ["postgresql://bob:se@cret@h/x", "http://bob:se/cret@h", "mysql://bob:se cret@h/x", 'http://b:s"e@h']
)
def test_a_password_that_a_uri_cannot_hold_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(
        LabError, match=r"^tracking store (postgresql|http|mysql)://\.\.\.: write .* as %XX, e.g. %40 for @"
    ) as refusal:
        tracking_uri(uri)

    assert "cret" not in str(refusal.value)


# ---- whether it can be read


def test_a_store_that_was_never_made_says_what_to_do_and_stays_unmade(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mlflow.db"

    with pytest.raises(LabError, match="no runs yet: .*mlflow.db does not exist; train first, e.g. `make step1`"):
        check_readable(f"sqlite:///{file}")

    assert list(tmp_path.iterdir()) == []
