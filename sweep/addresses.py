"""Passwords in addresses: told and refused before they can be kept, and masked where a text may hold one."""

import re
from urllib.parse import unquote

# A user, a colon and a password in front of the host; SQLAlchemy lets a slash stand in the password.
_LOGIN = re.compile(r"(//[^:/@\s]*):[^@\s]*@")
# The same of a web address, where what follows the colon may be a port. A lone name may be a token.
_WEB_LOGIN = re.compile(r"https?://([^/?#@]*@|[^:/?#@]*:(?!\d*([/?#]|$)).*@)", re.IGNORECASE)
_IN_QUERY = re.compile(r"(?<![a-z])([a-z_]*(?:password|passwd|pwd|token|secret))=[^&;\s'\"]*", re.IGNORECASE)

INSTEAD = (
    "give an MLflow server's by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or in ~/.mlflow/credentials, "
    "and a PostgreSQL database's in a file that PGPASSFILE names (or ~/.pgpass)"
)


def has_password(uri: str) -> bool:
    """Whether a tracking URI holds what only its owner should know."""
    is_web = re.match("https?:", uri, re.IGNORECASE)
    login = _WEB_LOGIN.match(uri) if is_web else _LOGIN.search(uri)
    return bool(login or _IN_QUERY.search(unquote(uri.partition("?")[2])))


def password_problem(uri: str) -> str:
    """Why a tracking URI is refused, in words that do not repeat it, or an empty string."""
    if not has_password(uri):
        return ""
    return f"expected a URI without a password or token, which files and the list of processes would show; {INSTEAD}"


def without_password(text: str) -> str:
    """The text with the passwords of all addresses in it masked, and what only looks like one."""
    text = re.sub(r"(https?://)[^:/?#@\s]+@", r"\1***@", _LOGIN.sub(r"\1:***@", text), flags=re.IGNORECASE)
    return _IN_QUERY.sub(r"\1=***", text)


def without_login(uri: str) -> str:
    """A URI without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", _LOGIN.sub("//", uri))
