"""What lies at a URL (`s3://`, `gs://`, any of fsspec's): listed, fetched and put, and what goes wrong said in words.

Who may do what there is found by fsspec's own backends, from the environment or the machine's role: a URL has no
secrets in it, and none is kept.
"""

import errno
import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from cxr_models.storage import FULL

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
EXAMPLES = "s3://bucket/folder or gs://bucket/folder"
INSTALL = "pip install 'cxr-sweep[cluster]'"

# Object stores: folders are not made there, and a bucket has neither a user nor a port.
BUCKETS = ("s3", "gs", "s3a", "gcs", "memory")
_WEB = ("http", "https")
_FOLDERS = ("file", "local")
_CHATTY = ("gcsfs", "s3fs", "fsspec", "botocore", "aiobotocore", "google.auth")
# What signed addresses carry.
_SECRETS = ("signature", "sig", "token", "password", "secret", "awsaccesskeyid", "credential")
# When an object changed, by the names the backends have for it; the first that is there counts.
_STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "generation",
    "content_md5",
    "mtime",
    "LastModified",
    "updated",
    "created",
)
_REFUSED = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
)
_NO_BUCKET = re.compile("bucket does not exist|NoSuchBucket", re.IGNORECASE)
_UNREACHABLE = ("ConnectionError", "HTTPClientError", "ClientConnectionError", "TimeoutError", "gaierror")


class StorageError(ValueError):
    """What lies at a URL cannot be had, or nothing can be put there.

    Attributes:
        transient: whether another attempt may succeed.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NothingThere(StorageError):  # noqa: N818 - what is so
    """There is no such object, or no such bucket."""


class ThereAlready(StorageError):  # noqa: N818 - what is so
    """An object that was to be new is there."""


@dataclass(frozen=True)
class Entry:
    """One object.

    Attributes:
        size: in bytes.
        stamp: another one when its contents are others.
    """

    size: int
    stamp: str


def is_url(text: str) -> bool:
    """Whether a text names a place at a URL rather than a path."""
    return bool(URL.match(text))


def in_bucket(text: str) -> bool:
    """Whether a text is the URL of a place in an object store."""
    return is_url(text) and text.partition("://")[0] in BUCKETS


def url_problem(url: str) -> str:
    """Why a URL cannot name a place for data or run folders, judged by the text alone, or an empty string.

    It repeats no secret of the URL.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"expected a URL such as {EXAMPLES}, got one that cannot be read ({error})"
    if _has_secret(parts):
        return (
            f"expected a URL without credentials, such as {EXAMPLES}, got one of {parts.scheme}:// with a key, a "
            "password or a signature in it; give them in the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS) or by the machine's role"
        )
    if parts.scheme in _WEB:
        return f"expected a place whose files can be listed, such as {EXAMPLES}, got an address of a web server"
    if "::" in url:
        return f"expected one plain URL such as {EXAMPLES}, got a chain of them"
    if not (parts.netloc or parts.path.strip("/")):
        return f"expected the name of a bucket or folder behind {parts.scheme}://, as in {EXAMPLES}"
    return ""


def _has_secret(parts: SplitResult) -> bool:
    signed = any(
        name.lower().replace("-", "").endswith(_SECRETS) for name in parse_qs(parts.query, keep_blank_values=True)
    )
    in_bucket = parts.scheme in BUCKETS and re.search("[@:]", parts.netloc)
    return signed or bool(in_bucket) or ":" in parts.netloc.rpartition("@")[0]


def without_credentials(text: str) -> str:
    """A text as it may be shown: what stands behind the scheme of a URL with a secret in it is left out."""

    def shown(found: re.Match[str]) -> str:
        try:
            return f"{found[1]}..." if _has_secret(urlsplit(found[0])) else found[0]
        except ValueError:
            return found[0]

    return re.sub(rf"({URL.pattern})\S+", shown, text)


def digest_of(url: str) -> str:
    """Names a URL in a cache."""
    return hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


class Store:
    """The objects at a URL. Its methods may be called by several threads at once.

    Args:
        url: of a folder or of a single file.

    Raises:
        StorageError: the URL cannot be used, or the package for its scheme is not installed.
    """

    def __init__(self, url: str) -> None:
        if problem := url_problem(url):
            raise StorageError(problem)
        self.url = url.rstrip("/")
        self._scheme = urlsplit(url).scheme
        try:
            from fsspec.core import url_to_fs

            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is told in our words
            # A listing that was kept would hide what other machines have put there since.
            filesystem, root = url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise StorageError(
                f"expected a package that reads {self._scheme}://\n  found: {_line(error)}\n  remedy: {INSTALL} brings "
                "those of s3:// and gs://; for others install what is named above"
            ) from error
        except ValueError as error:
            raise StorageError(
                f"expected a URL such as {EXAMPLES}, got {self._scheme}://, which fsspec does not know"
            ) from error
        except Exception as error:
            raise self._problem("reach", self.url, error) from error
        self._filesystem: Any = filesystem
        self._root = str(root).rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Store":
        """The folder around it."""
        return Store(self.url.rpartition("/")[0])

    def child(self, name: str) -> "Store":
        """A folder in it."""
        return Store(f"{self.url}/{name}")

    def address(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    def file(self) -> Entry | None:
        """The object at the URL itself; None where that is a folder.

        Raises:
            NothingThere: there is neither.
        """
        with self._told("read", self.url):
            found = self._filesystem.info(self._root)
        return _entry(found) if found["type"] == "file" else None

    def files(self) -> dict[str, Entry]:
        """Name below the URL -> object, of all that lie there."""
        with self._told("list", self.url):
            found: Mapping[str, Any] = self._filesystem.find(self._root, detail=True)
        below = f"{self._root}/"
        return {
            path.removeprefix(below): _entry(details)
            for path, details in found.items()
            # What consoles of object stores make for an empty folder is an object with a slash at its end.
            if details.get("type", "file") == "file" and not path.endswith("/") and path.startswith(below)
        }

    def folders(self) -> set[str]:
        """Names of the folders right below the URL; none where there is nothing."""
        try:
            with self._told("list", self.url):
                found = self._filesystem.ls(self._root, detail=True)
        except NothingThere as error:
            if _NO_BUCKET.search(str(error.__cause__)):
                raise
            return set()
        return {each["name"].rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory"}

    def get(self, name: str, target: Path) -> None:
        """Fetch an object, or the one at the URL itself for "", into a file."""
        with self._told("read", self.address(name)):
            self._filesystem.get_file(self._path(name), str(target))

    def read(self, name: str) -> bytes:
        """A small object."""
        with self._told("read", self.address(name)):
            found: bytes = self._filesystem.cat_file(self._path(name))
        return found

    def put(self, name: str, source: Path) -> None:
        """Put a file there; who reads sees the old object or the new one."""
        with self._told("write", self.address(name)):
            self._make_folder(name)
            self._replace(name, lambda path: self._filesystem.put_file(str(source), path))

    def write(self, name: str, contents: bytes, *, new: bool = False) -> None:
        """Put a small object there.

        Args:
            name: of the object.
            contents: of it.
            new: it must not be there yet. Stores that cannot check that themselves are asked before.

        Raises:
            ThereAlready: it is, and `new`.
        """
        with self._told("write", self.address(name)):
            self._make_folder(name)
            if not new:
                self._replace(name, lambda path: self._filesystem.pipe_file(path, contents))
                return
            try:
                self._filesystem.pipe_file(self._path(name), contents, mode="create")
            except FileExistsError:
                raise
            except (TypeError, NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.EINVAL):
                    raise
                if self._filesystem.exists(self._path(name)):
                    raise FileExistsError(name) from error
                self._filesystem.pipe_file(self._path(name), contents)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        try:
            with self._told("remove", self.address(name)):
                self._filesystem.rm_file(self._path(name))
        except NothingThere:
            pass

    def _replace(self, name: str, write: Callable[[str], None]) -> None:
        """Let an object take the place of the one that is there; a folder of this machine has to be helped."""
        path = self._path(name)
        if self._scheme not in _FOLDERS:
            write(path)
            return
        folder, _, own = path.rpartition("/")
        scratch = f"{folder}/.{uuid.uuid4().hex}-{own}"
        write(scratch)
        self._filesystem.mv(scratch, path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_folder(self, name: str) -> None:
        if self._scheme not in BUCKETS:
            self._filesystem.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _told(self, doing: str, url: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # of the disk here, which has words of its own
            raise self._problem(doing, url, error) from error

    def _problem(self, doing: str, url: str, error: Exception) -> StorageError:
        names = {kind.__name__ for kind in type(error).__mro__}
        expected, said = f"expected to {doing} {url}", _line(error)
        if isinstance(error, FileExistsError):
            return ThereAlready(f"{expected}\n  found: it is there already\n  remedy: choose another name")
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            what = "no such bucket" if _NO_BUCKET.search(said) else "nothing there"
            return NothingThere(f"{expected}\n  found: {what} ({said})\n  remedy: check the URL")
        code = getattr(error, "code", None) or getattr(error, "status", None)
        if (
            isinstance(error, PermissionError)
            or names.intersection(_REFUSED)
            or code in (401, 403)
            or said.startswith(("Forbidden", "OSError: Forbidden"))
        ):
            return StorageError(
                f"{expected}\n  found: no permission ({said})\n  remedy: give credentials that may do that, as the "
                "storage's own tools find them: AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, "
                "GOOGLE_APPLICATION_CREDENTIALS for gs://, or the machine's role"
            )
        if names.intersection(_UNREACHABLE):
            return StorageError(
                f"{expected}\n  found: the storage cannot be reached ({said})\n  remedy: check the network"
                + (", and for a storage of your own AWS_ENDPOINT_URL" if self._scheme.startswith("s3") else ""),
                transient=True,
            )
        return StorageError(f"{expected}\n  found: {said}\n  remedy: check the URL and the storage", transient=True)


def _entry(details: Mapping[str, Any]) -> Entry:
    stamp = next((f"{key} {details[key]}" for key in _STAMPS if details.get(key)), "")
    return Entry(int(details["size"] or 0), stamp)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
