"""What may stand in a URL, and what is said where nothing can be had from it."""

import threading

import pytest

from sweep.remote import NothingThere, StorageError, Store, ThereAlready, is_url, url_problem, without_credentials
from tests.stores import failing


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:hidden@bucket/x", "s3://KEY:hid/den@bucket/x", "gs://hidden@bucket", "s3://b/x?X-Amz-Signature=hidden",
     "sftp://me:hidden@host/x", "https://account.blob.net/x?sv=1&sig=hidden"],
)  # fmt: skip
def test_a_secret_in_a_url_is_refused_and_not_repeated(url):
    problem = url_problem(url)
    assert "without credentials" in problem
    assert "AWS_ACCESS_KEY_ID" in problem
    assert "hid" not in problem
    assert "hid" not in without_credentials(f"--set data.source={url}")


@pytest.mark.parametrize("url", ["s3://bucket/a b/x", "gs://bucket", "sftp://me@host/x", "abfs://box@account.net/x"])
def test_a_plain_url_passes(url):
    assert url_problem(url) == ""
    assert without_credentials(url) == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://host/x", "an address of a web server"),
        ("s3://", "the name of a bucket"),
        ("s3://b/x::zip://y", "a chain of them"),
    ],
)
def test_what_is_no_place_for_data(url, said):
    assert said in url_problem(url)


def test_what_is_a_path():
    assert not any(map(is_url, ["runs", "/x/y", "C:\\x", "a:b", "~/x", "phantom"]))


def test_a_scheme_that_nobody_knows():
    with pytest.raises(StorageError, match="got nosuch://, which fsspec does not know"):
        Store("nosuch://bucket/x")


def test_a_package_that_is_missing(monkeypatch):
    def absent(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(StorageError, match=r"Install s3fs to access S3\n  remedy: pip install 'cxr-sweep\[cluster\]'"):
        Store("s3://bucket/x")


class NoCredentialsError(Exception):
    """As botocore has it."""


class EndpointConnectionError(ConnectionError):
    """The same."""


@pytest.mark.parametrize(
    ("error", "said", "transient"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "no such bucket", False),
        (FileNotFoundError("x"), "nothing there", False),
        (PermissionError("Access Denied"), "no permission", False),
        (NoCredentialsError("Unable to locate credentials"), "no permission", False),
        (OSError("Forbidden: https://storage/b/x"), "no permission", False),
        (EndpointConnectionError("Could not connect"), "the storage cannot be reached", True),
        (OSError("SlowDown"), "OSError: SlowDown", True),
    ],
)
def test_what_went_wrong_is_said_once_with_a_remedy(error, said, transient):
    def fails(call, path):
        raise error

    store = Store("faulty://bucket/x")
    with failing(fails), pytest.raises(StorageError) as raised:
        store.files()
    message = str(raised.value)
    assert f"expected to list faulty://bucket/x\n  found: {said}" in message
    assert message.count("\n  remedy: ") == 1
    assert raised.value.transient is transient


@pytest.mark.parametrize("scheme", ["memory", "faulty", "file"])
def test_objects_come_and_go(scheme, tmp_path):
    store = Store(f"{scheme}://{tmp_path}/place")
    assert store.files() == {}
    assert store.folders() == set()
    with pytest.raises(NothingThere):
        store.file()
    store.write("a/b.txt", b"one", new=True)
    store.write("a/b.txt", b"other")
    with pytest.raises(ThereAlready):
        store.write("a/b.txt", b"third", new=True)
    (tmp_path / "here").write_bytes(b"file")
    store.put("c.txt", tmp_path / "here")
    store.put("c.txt", tmp_path / "here")
    assert {name: entry.size for name, entry in store.files().items()} == {"a/b.txt": 5, "c.txt": 4}
    assert store.folders() == {"a"}
    assert store.file() is None
    assert Store(store.address("c.txt")).file().size == 4
    assert store.read("a/b.txt") == b"other"
    store.get("c.txt", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"file"
    store.remove("c.txt")
    store.remove("c.txt")
    assert set(store.files()) == {"a/b.txt"}


def test_who_reads_a_folder_never_sees_half_an_object(tmp_path):
    store, ended, seen = Store(f"file://{tmp_path}/place"), threading.Event(), set()
    whole = [bytes([number]) * 3_000_000 for number in range(2)]
    store.write("x", whole[0])

    def look() -> None:
        while not ended.is_set():
            seen.add(store.read("x"))

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(40):
        store.write("x", whole[number % 2])
    ended.set()
    thread.join()
    assert seen <= set(whole)
    assert set(store.files()) == {"x"}
