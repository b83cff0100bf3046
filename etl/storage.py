"""One root URL and the files under it: written whole or not at all, on this machine or in an object store.

The lake and the runs both write under the same root and know nothing of each other; what they share is this file.
A root is a folder (``outputs``) or an fsspec URL (``s3://bucket/prefix``). Files under it are named by a relative
path with forward slashes. Credentials and endpoints come from the usual ``AWS_*`` variables.
"""

import contextlib
import errno
import fcntl
import functools
import io
import itertools
import json
import mmap
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote

from etl import leases

if TYPE_CHECKING:
    import fsspec
    from botocore.credentials import Credentials
    from deltalake import DeltaTable
    from deltalake.table import FilterConjunctionType

# the folder of notebooks, params and the domain: around this package, or where the console script was called
PROJECT = Path(os.environ.get("ETL_PROJECT") or Path(__file__).resolve().parent.parent)
HELD = ".held"  # in a temporary folder: locked while its process lives
LOST_AND_FOUND = "lost+found"  # the file system's own, in the folder where a disk is mounted
NOT_RENAMED = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EROFS)  # by an error of these it may still be copied
CREDENTIALS = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
AT_ONCE = 50 << 20  # bytes: a larger file is asked for in parts that come at the same time
CONFLICTS = 8  # of a conditional write with nothing there, before it is an error
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # the schemes of object stores' URLs
# deltalake takes a backslash for a slash, decodes %41 once too often and cannot open the rest
NOT_IN_A_PATH = re.compile(r"\\|%[0-9A-Fa-f]{2}|[\x00-\x1f\x7f]")
# what S3 says to avoid, and what fsspec and URLs read as something else:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
NOT_IN_A_URL = re.compile(r"""[\\{}^%`\[\]"<>#|*?\x00-\x1f\x7f]|::""")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BadRoot(ValueError):
    """What was given is no root: its message says why, in a sentence."""


class Damaged(ValueError):
    """What is there is not what was written: its message names it."""


class Unreadable(ValueError):
    """What is there is no file that may be read: its message says what it is."""


class Unreachable(OSError):
    """An object store that does not answer, or for which there are no credentials: its message is a sentence."""


@dataclass(frozen=True)
class Entry:
    """What is at a path, without having opened it. `mark`: changes when the content does."""

    name: str
    bytes: int
    mark: str
    problem: str | None = None  # why it is no file to read: "is a symbolic link"
    modified: datetime | None = None  # UTC, by the store's own clock
    whole: bool = True  # it came at once, by a rename or as an object; False where it may still be written


_reached: Counter[str] = Counter()  # crash points, by how often this process came to them


def crash_point(name: str) -> None:
    """A place where the process may be told to die, by ETL_CRASH_AT=<name> or <name>@<n> for the n-th time it comes.

    ETL_CRASH_AT==<name> stops it there instead, and +<file> writes the names it comes to into that file.
    """
    wanted = os.environ.get("ETL_CRASH_AT")
    if wanted is None:
        return
    _reached[name] += 1
    if wanted.startswith("+"):
        with open(wanted[1:], "a") as names:
            names.write(f"{name}@{_reached[name]}\n")
    elif wanted.removeprefix("=") in (name, f"{name}@{_reached[name]}"):
        os.kill(os.getpid(), signal.SIGSTOP if wanted.startswith("=") else signal.SIGKILL)


def object_store_options() -> dict[str, str]:
    """What deltalake and Polars need besides a URL. They do not read every variable that botocore does."""
    options = {k: v for k, v in os.environ.items() if k.startswith("AWS_") and v}
    endpoint = tuple(options.pop(name) for name in CREDENTIALS if name in options)
    if endpoint and "AWS_ACCESS_KEY_ID" not in options and (resolved := _credentials(endpoint)):
        keys = resolved.get_frozen_credentials()  # asks again before they run out
        options |= {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
        options |= {"AWS_SESSION_TOKEN": keys.token} if keys.token else {}
    if options.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options


class _Credentials:
    """What an endpoint hands out as credentials, asked once. Polars does not ask it once it is given any option."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Credentials | None] = {}

    def __call__(self, endpoint: tuple[str, ...]) -> "Credentials | None":
        from botocore.session import Session

        if endpoint not in self._known:
            self._known[endpoint] = Session().get_credentials()
        return self._known[endpoint]

    def __reduce__(self) -> "tuple[type[_Credentials], tuple[()]]":
        return type(self), ()  # a worker of Dask asks for its own


_credentials = _Credentials()


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """A panic of a library written in Rust becomes a RuntimeError; it is a BaseException, which few expect."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each such library has its own class of that name
            raise
        raise RuntimeError(f"a library panicked: {error}") from error


def root_url(given: str) -> str:
    """A root in full, as it was given in an env file or with --root: an absolute folder or the URL of an object store.

    A relative folder is one of the project's, whatever the working folder; `~` is the home folder. Raises BadRoot for
    what is no such thing, or what a library would take for another place than the one that is meant.
    """
    if not given.strip():
        raise BadRoot("a root is a folder or a URL such as s3://bucket/prefix, and this one is empty")
    if variable := re.search(r"(?:^|/)(\$\{?[A-Za-z_]\w*\}?)", given):
        raise BadRoot(f"{given!r}: variables such as {variable[1]} are not filled in: write the folder itself, or ~")
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):/", given)
    if scheme and scheme[1].lower() == "file":
        return _folder(given, _path_of_file_url(given, given[scheme.end() - 1 :]))
    if scheme and scheme[1].lower() in STORES:
        return _store_url(given, scheme[1].lower(), given[scheme.end() - 1 :])
    if scheme:
        raise BadRoot(
            f"{given!r}: there is no store {scheme[1]}: a root is a folder or a URL such as s3://bucket/prefix"
        )
    if mistyped := re.match(rf"\s*(file|{'|'.join(STORES)})(?::|//)", given):
        raise BadRoot(f"{given!r}: a URL begins with {mistyped[1]}://, and a folder of that name with ./")
    return _folder(given, given)


def _path_of_file_url(given: str, rest: str) -> str:
    """The path in a URL; `rest`: what comes after `file:`."""
    host, path = "", rest
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
    if host.lower() not in ("", "localhost"):
        raise BadRoot(f"{given!r}: that is a file of the machine {host!r}: one of this machine is file:///folder")
    if re.search(r"[?#]", path):
        raise BadRoot(f"{given!r}: in a URL of a file ? and # are written %3F and %23")
    try:
        return "/" + unquote(path, errors="strict").lstrip("/")
    except UnicodeDecodeError:
        raise BadRoot(f"{given!r}: what is encoded there is not UTF-8") from None


def _store_url(given: str, scheme: str, rest: str) -> str:
    """The URL in the one way it is written; `rest`: what comes after the colon."""
    if not rest.startswith("//"):
        raise BadRoot(f"{given!r}: a URL begins with {scheme}://")
    path = rest[2:].rstrip("/")
    if wrong := NOT_IN_A_URL.search(path):
        raise BadRoot(f"{given!r}: {wrong[0]!r} cannot be in the URL of a root")
    bucket, *folders = path.split("/")
    if not bucket:
        raise BadRoot(f"{given!r}: no bucket is named: {scheme}://bucket/prefix")
    if {"", ".", ".."} & {*folders}:
        raise BadRoot(f"{given!r}: an object store has no folders that are called '', '.' or '..'")
    return f"{scheme}://{path}"


def _folder(given: str, path: str) -> str:
    """The absolute path of a folder that is there, or can be made."""
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise BadRoot(f"{given!r}: there is no such user; a folder of that name is ./{path}")
    full = os.path.abspath(PROJECT / path)
    try:
        full.encode()
    except UnicodeEncodeError:
        raise BadRoot(f"{given!r}: a root's path is UTF-8, and this one is not") from None
    # deltalake follows links: what they lead to counts as well
    if wrong := NOT_IN_A_PATH.search(full) or NOT_IN_A_PATH.search(os.path.realpath(full)):
        raise BadRoot(f"{given!r}: {wrong[0]!r} cannot be in the path of a root")
    if max(map(len, os.fsencode(full).split(b"/"))) > 255:
        raise BadRoot(f"{given!r}: the name of a folder has 255 bytes at most")
    above = full
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise BadRoot(f"{given!r}: {above} is no folder")
    return full


@functools.cache
def _delta_table() -> "type[DeltaTable]":
    """DeltaTable, whose `file_uris` are what the files are called.

    deltalake percent-encodes the path of the table in them, and Polars opens them as they are:
    https://github.com/delta-io/delta-rs
    """
    from deltalake import DeltaTable

    class Table(DeltaTable):
        def file_uris(self, partition_filters: "FilterConjunctionType | None" = None) -> list[str]:
            encoded = self.table_uri.removeprefix("file://").rstrip("/")
            folder = unquote(encoded)
            return [
                folder + uri.removeprefix(encoded) if uri.startswith(encoded) else uri
                for uri in super().file_uris(partition_filters)
            ]

    return Table


class _WithOSErrors:
    """A file system of S3's all of whose errors are OSErrors. Those that botocore has before there is any answer, such
    as for want of a network or of credentials, come through s3fs as they are."""

    def __init__(self, url: str, fs: "fsspec.AbstractFileSystem"):
        self._url, self._fs = url, fs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while it is unpickled
            raise AttributeError(name)
        attribute = getattr(self._fs, name)
        if not callable(attribute):
            return attribute
        from botocore.exceptions import BotoCoreError

        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return attribute(*arguments, **named)
            except BotoCoreError as error:
                why = re.sub(r"\?[^\"]*", "", str(error)).rstrip(".")  # without what was asked there
                raise Unreachable(f"{self._url} cannot be reached: {why}") from error

        return call


class Root:
    """A root in an object store, through fsspec. One PUT makes an object appear whole."""

    def __init__(self, url: str, fs: "fsspec.AbstractFileSystem", prefix: str):
        self.url, self._fs, self._prefix = url, fs, prefix

    @staticmethod
    def at(url: "str | Path | Root") -> "Root":
        """The root at `url`, which is what `root_url` takes. Raises BadRoot."""
        if isinstance(url, Root):
            return url
        url = root_url(str(url))
        if "://" not in url:
            return LocalRoot(url)
        import fsspec

        try:
            fs, prefix = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise BadRoot(f"{url!r}: {' '.join(str(error).split())}") from None
        if hasattr(fs, "call_s3"):
            fs = _WithOSErrors(url, fs)
        return Root(url, fs, prefix.rstrip("/"))

    def is_there(self) -> bool:
        """Whether the root is there at all: its folder, or anything in the object store."""
        return bool(self.names(""))

    def make(self) -> None:
        """Make the folder, where a root is one."""

    def each(self, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """The results in the order of the items; in an object store, where each is a request, many at once."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(work, items))

    def url_of(self, rel: str) -> str:
        """The full path or URL of a file or folder, for deltalake and Polars (with glob=False)."""
        return f"{self.url}/{rel}"

    def table(self, rel: str, version: int | None = None) -> "DeltaTable":
        """A handle on the Delta table in a folder, at its newest version when `version` is None.

        Its `file_uris` can be opened as they are. Raises what deltalake raises.
        """
        return _delta_table()(self.url_of(rel), version=version, storage_options=self.storage_options)

    @property
    def storage_options(self) -> dict[str, str]:
        """What deltalake and Polars need besides the URL."""
        return object_store_options()

    def _path(self, rel: str) -> str:
        return f"{self._prefix}/{rel}"

    def read(self, rel: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError."""
        data: bytes = self._fs.cat_file(self._path(rel), **({"max_concurrency": 1} if self._is_s3 else {}))
        return data  # with one at a time s3fs does not ask for the size first

    def read_marked(self, rel: str) -> tuple[bytes, str]:
        """The bytes of a file, and the mark that it has with them. Raises FileNotFoundError."""
        if self._is_s3:
            return self._fetched(rel)
        mark = self._etag(rel)  # what is written meanwhile has another one
        return self.read(rel), mark

    def open(self, rel: str) -> BinaryIO:
        """A file, to be read from anywhere in it. Raises FileNotFoundError."""
        return io.BytesIO(self.read(rel))

    def read_json(self, rel: str) -> dict[str, Any] | None:
        """The JSON document in a file; None when there is no file. Raises Damaged."""
        return self.read_json_marked(rel)[0]

    def read_json_marked(self, rel: str) -> tuple[dict[str, Any] | None, str | None]:
        """As `read_json`, and the mark that the file has with it; None, too, when there is no file."""
        try:
            data, mark = self.read_marked(rel)
            document = json.loads(data)
        except FileNotFoundError:
            return None, None
        except ValueError as error:
            raise Damaged(f"{rel} is damaged: {error}") from None
        if not isinstance(document, dict):
            raise Damaged(f"{rel} is damaged: it is no JSON object")
        return document, mark

    def read_at_most(self, rel: str, most: int) -> bytes:
        """As `read`, of an ordinary file of at most `most` bytes, and never waiting for anything.

        Raises Unreadable for what is no such file, before it is read, and FileNotFoundError.
        """
        if self._is_s3 and most <= AT_ONCE:
            return self._fetched(rel, most)[0]
        _refuse_above(self.size(rel), most)
        return bytes(self._fs.cat_file(self._path(rel)))

    @property
    def _is_s3(self) -> bool:
        return hasattr(self._fs, "call_s3")

    def region(self) -> str | None:
        """Of the bucket, where the store says it; None otherwise. Raises FileNotFoundError where there is no bucket."""
        if not self._is_s3:
            return None
        try:
            answer = self._fs.call_s3("head_bucket", Bucket=self._fs.split_path(self._prefix)[0])
        except PermissionError:  # of one who may list below a prefix alone
            return None
        return str(answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region") or "") or None

    def has_bucket(self) -> bool:
        """Whether files can be put there at all: no run makes a bucket."""
        try:
            self.region()
        except FileNotFoundError:
            return False
        return True

    def _asked(self, method: str, rel: str, **asked: Any) -> dict[str, Any]:
        """S3's answer to a request about a file, without any other before it. Raises OSError."""
        bucket, key, _ = self._fs.split_path(self._path(rel))
        answer: dict[str, Any] = self._fs.call_s3(method, Bucket=bucket, Key=key, **asked)
        return answer

    def _fetched(self, rel: str, most: int | None = None) -> tuple[bytes, str]:
        """A file's bytes and mark by one request; where the connection breaks, by another one."""
        import fsspec

        async def read(answer: dict[str, Any]) -> bytes:
            try:
                if most is not None:
                    _refuse_above(answer["ContentLength"], most)
                data: bytes = await answer["Body"].read()
                return data
            finally:
                answer["Body"].close()

        for attempt in range(CONFLICTS):
            answer = self._asked("get_object", rel)
            try:
                return fsspec.asyn.sync(self._fs.loop, read, answer), answer["ETag"]
            except Unreadable:
                raise
            except Exception as error:  # of several libraries: what breaks a connection
                if attempt == CONFLICTS - 1:
                    raise Unreachable(f"{self.url} breaks off: {type(error).__name__}: {error}") from error
        raise AssertionError("the last attempt returns or raises")

    def read_part(self, rel: str, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` to before `stop`, as far as it has any. Raises FileNotFoundError."""
        if start >= stop:
            return b""
        data: bytes = self._fs.cat_file(self._path(rel), start=start, end=stop)
        return data

    def write(self, rel: str, data: bytes) -> None:
        """Put `data` there, whole or not at all; a reader sees the old bytes or the new ones."""
        self._fs.pipe_file(self._path(rel), data)

    def put(self, rel: str, path: Path) -> None:
        """As `write`, of a file of this machine that need not fit into memory."""
        self._fs.put_file(str(path), self._path(rel))

    def create(self, rel: str, data: bytes) -> bool:
        """Put `data` there unless something is there already; of two racing writers with unlike bytes one gets True.

        What is there with the same bytes is ours: an answer that is lost on its way is asked for again, and the second
        is that something is there. So whoever must win alone writes bytes that nobody else can.
        """
        return self._put_if(rel, data, {"mode": "create"}) is not None  # If-None-Match on S3

    def _put_if(self, rel: str, data: bytes, condition: dict[str, str]) -> str | None:
        """Put `data` there if the store finds the condition met; the ETag that it has then, None when it is not met."""
        refusal: OSError | None = None
        for attempt in range(CONFLICTS):
            time.sleep(0.05 * attempt)
            try:
                answer = self._fs.pipe_file(self._path(rel), data, **condition)
                return answer["ETag"] if answer else ""
            except OSError as error:
                if not _is_conflict(error):
                    raise
                refusal = error
            # nothing there: something else happened to it at the same moment, and after a 409 AWS asks to try again
            with contextlib.suppress(FileNotFoundError):
                etag = self._etag(rel)
                return etag if self.read(rel) == data else None
        assert refusal is not None, "tried at least once"
        raise refusal

    def _etag(self, rel: str) -> str:
        etag: str = self._info(rel).get("ETag", "")
        return etag

    def _info(self, rel: str) -> dict[str, Any]:
        """What the store says of a file. Raises FileNotFoundError, also where only the names of others begin so."""
        if not self._is_s3:
            info: dict[str, Any] = self._fs.info(self._path(rel))
            return info
        head = self._asked("head_object", rel)
        return {"size": head["ContentLength"], "ETag": head["ETag"], "LastModified": head["LastModified"]}

    def exists(self, rel: str) -> bool:
        """Whether a file is there."""
        try:
            self._info(rel)
        except FileNotFoundError:
            return False
        return True

    def size(self, rel: str) -> int:
        """Bytes. Raises FileNotFoundError."""
        return int(self._info(rel)["size"])

    def files(self, rel: str) -> list[str]:
        """The paths of all files under a folder, at any depth; none when there is no such folder."""
        start = len(self._path(""))
        return sorted(path[start:] for path in self._fs.find(self._path(rel)))

    def names(self, rel: str) -> list[str]:
        """The names directly under a folder, sorted; none when there is no such folder, or a file of that name."""
        try:
            paths = self._fs.ls(self._path(rel), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for path in paths if (name := path.rstrip("/").rsplit("/", 1)[-1]))

    def entries(self, rel: str) -> list[Entry]:
        """What is directly under a folder, by name; none when there is no such folder."""
        try:
            infos = self._fs.ls(self._path(rel), detail=True)
        except FileNotFoundError:
            return []
        files = (info for info in infos if info["type"] == "file")  # a folder is only the beginning of a name here
        return sorted((_object(info["name"], info) for info in files), key=lambda entry: entry.name)

    def tree(self, rel: str) -> list[tuple[str, Entry]]:
        """What is below a folder at any depth, but folders: the path below it, and what is there. In order of paths.

        What `write` has not put into its place yet is not seen.
        """
        start = len(self._path(rel)) + 1
        infos = self._fs.find(self._path(rel), detail=True)
        return sorted((path[start:], _object(path, info)) for path, info in infos.items())

    def entry(self, rel: str) -> Entry | None:
        """What is at a path; None when nothing is."""
        try:
            return _object(rel, self._info(rel))
        except FileNotFoundError:
            return None

    def sync(self, rels: Iterable[str]) -> None:
        """Make sure that these files and folders would survive the loss of power. An object store's always do."""

    @property
    def may_tear(self) -> bool:
        """Whether a file that was written and not synced may be found torn after the loss of power."""
        return False

    def require_writable(self, rel: str) -> None:
        """Make sure that a folder is there and takes files, where a root has folders. Raises OSError."""

    def map(self, rel: str) -> "bytes | mmap.mmap":
        """As `read`, where it can be had without reading all of it: what is used of it."""
        return self.read(rel)

    def move(self, source: str, target: str, mark: str | None = None) -> bool:
        """Move a file; with a `mark` no other than the one that has it. One that is at `target` already and gone from
        `source` was moved before: fine.

        False when something is at `source` still: it could not be taken away, or is another file by now, which stays.
        """
        try:
            self._copy_if(source, target, mark)
        except FileNotFoundError:
            if not self.exists(target):
                raise
        except OSError as error:
            if not _is_conflict(error):
                raise
            return False
        else:
            return self._remove_if(source, mark)
        return True

    def _copy_if(self, source: str, target: str, mark: str | None) -> None:
        """Copy a file, where the store knows such a condition only the one that has the mark. Raises OSError."""
        if mark is None or not self._is_s3:
            self._fs.cp_file(self._path(source), self._path(target), **({"CopySourceIfMatch": mark} if mark else {}))
            return
        bucket, key, _ = self._fs.split_path(self._path(source))
        try:  # without asking for its size first
            self._asked("copy_object", target, CopySource={"Bucket": bucket, "Key": key}, CopySourceIfMatch=mark)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or _is_conflict(error):
                raise
            self._fs.cp_file(self._path(source), self._path(target), CopySourceIfMatch=mark)  # above 5 GB: in parts

    def _remove_if(self, rel: str, mark: str | None) -> bool:
        """Remove a file, with a `mark` only the one that has it, where the store knows such a condition; whether it is
        gone."""
        if mark is None or not self._is_s3:
            self.remove(rel)
            return True
        try:
            self._asked("delete_object", rel, IfMatch=mark)
        except FileNotFoundError:
            return True
        except OSError as error:
            if not _is_conflict(error):
                raise
            return not self.exists(rel)
        return True

    def remove(self, rel: str) -> None:
        """Remove a file; one that is missing is fine, and a folder of that name stays."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(rel))

    def remove_all(self, rels: Iterable[str]) -> None:
        """Remove many files; one that is missing is fine."""
        self.each(self.remove, rels)

    def remove_unfinished(self, rel: str, before: datetime) -> None:
        """Remove what writers that were killed `before` left below a folder. In an object store nothing shows."""

    def newest(self, rel: str) -> datetime | None:
        """When something was last put below a folder, by the store's own clock; None when nothing is there."""
        infos = self._fs.find(self._path(rel), detail=True).values()
        return max((info["LastModified"] for info in infos), default=None)

    def move_tree(self, source: str, target: str, last: str | None = None) -> None:
        """Move a folder to where nothing is: at once on this machine, file by file in an object store.

        `last`: a file of it that comes after all others, so that one which is not moved whole is known by not having
        it, and moved again; only then anything goes from `source`. Raises FileNotFoundError.
        """
        rels = self.files(source)
        if not rels:
            raise FileNotFoundError(self.url_of(source))
        others = [rel for rel in rels if rel != f"{source}/{last}"]
        self._copy(others, source, target)
        if last is not None:
            crash_point(f"copied, but for the last: {target}")
            self._copy([f"{source}/{last}"], source, target)
        crash_point(f"copied, not removed: {source}")
        self._fs.rm([*map(self._path, others)])
        self.remove_tree(source)

    def copy(self, rels: Iterable[str], source: str, target: str) -> None:
        """Have files of the folder `source` in the folder `target` too, in the place of what is there, under the same
        paths; their names are on the disk then."""
        by_folder = itertools.groupby(sorted(rels), key=os.path.dirname)
        for folder, of_folder in by_folder:
            self._copy([*of_folder], source, target)
            self.sync([f"{target}{folder[len(source) :]}"])

    def _copy(self, rels: "list[str]", source: str, target: str) -> None:
        to = [self._path(f"{target}{rel[len(source) :]}") for rel in rels]
        self._fs.copy([*map(self._path, rels)], to)

    def duplicate(self, rels: Iterable[str], target: str) -> None:
        """Have files in the folder `target` too, under the same paths, as they are now: what is written to one of the
        two is not in the other. One that is gone meanwhile is left out; nothing is synced."""
        there = [*filter(self.exists, rels)]
        self._fs.copy([*map(self._path, there)], [self._path(f"{target}/{rel}") for rel in there], on_error="ignore")

    def remove_tree(self, rel: str) -> None:
        """Remove a folder and all in it; one that is missing is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(rel), recursive=True)

    def remove_trees(self, rels: Iterable[str], first: str) -> None:
        """Remove many folders, siblings next to each other; a missing one is fine.

        The file called `first` goes first, so that a folder that is half removed is known by not having it.
        """
        for parent, siblings in itertools.groupby(rels, key=lambda rel: rel.rpartition("/")[0]):
            folders = {f"{self._path(rel)}/" for rel in siblings}
            start = len(self._path(parent)) + 1
            files = [path for path in self._fs.find(self._path(parent)) if path[: path.find("/", start) + 1] in folders]
            for now in (True, False):  # a request removes a thousand
                if batch := [path for path in files if path.endswith(f"/{first}") == now]:
                    self._fs.rm(batch)

    def mark(self, rel: str) -> str | None:
        """What changes whenever a file is written again; None when there is none."""
        try:
            return self._etag(rel)
        except FileNotFoundError:
            return None

    def replace(self, rel: str, data: bytes, mark: str | None) -> str | None:
        """Put `data` in the place of the file that has this mark, None for no file; its own mark then.

        None when something else or nothing is there. As with `create`, whoever must win alone writes bytes that nobody
        else can.
        """
        try:
            return self._put_if(rel, data, {"mode": "create"} if mark is None else {"IfMatch": mark})
        except FileNotFoundError:
            if mark is None:  # no file was asked for: the bucket is not there
                raise
            return None

    def which(self, rels: "list[str]") -> set[str]:
        """Those of some files of one folder that are there, at the cost of one request."""
        start = len(self._path(""))
        folder, _, name = os.path.commonprefix(rels).rpartition("/")
        return {*rels} & {path[start:] for path in self._fs.find(self._path(folder), prefix=name)}

    def lease(self, rel: str, holder: str, wait_s: float = 30) -> "contextlib.AbstractContextManager[leases.Lease]":
        """Hold the lease at `rel` for the length of the block; at most one holder at a time.

        Raises LeaseHeld when it is not free within `wait_s` seconds, and its holder is alive.
        """
        return leases.in_store(self, rel, holder, wait_s)


def _object(name: str, info: dict[str, Any]) -> Entry:
    mark, modified = str(info.get("ETag", "")), info.get("LastModified")
    return Entry(name.rsplit("/", 1)[-1], int(info["size"] or 0), mark, modified=modified)


def _is_conflict(error: OSError) -> bool:
    """Whether a store refused a conditional write: 412, whatever its body says, or 409 while another was under way."""
    answer = getattr(error.__cause__, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(error, FileExistsError) or status in (409, 412)


class LocalRoot(Root):
    """A root on this machine: files appear by rename, and are on the disk before they do."""

    def __init__(self, folder: str):
        self.url = folder

    def is_there(self) -> bool:
        return os.path.isdir(self.url)

    def has_bucket(self) -> bool:
        return True

    def make(self) -> None:
        os.makedirs(self.url, exist_ok=True)

    def each(self, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        return [work(item) for item in items]

    @property
    def storage_options(self) -> dict[str, str]:
        return {}

    def _path(self, rel: str) -> str:
        return f"{self.url}/{rel}"

    def read(self, rel: str) -> bytes:
        try:
            return Path(self._path(rel)).read_bytes()
        except NotADirectoryError:  # a file stands where a folder would
            raise FileNotFoundError(errno.ENOENT, "there is no such file", self._path(rel)) from None

    def open(self, rel: str) -> BinaryIO:
        return open(self._path(rel), "rb")

    def read_marked(self, rel: str) -> tuple[bytes, str]:
        mark = self.mark(rel)
        return self.read(rel), mark or ""

    def read_at_most(self, rel: str, most: int) -> bytes:
        try:
            # a pipe is not waited for, a link not followed; checked on what was opened, not on what was there before
            descriptor = os.open(self._path(rel), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except PermissionError:
            raise Unreadable("may not be read: permission denied") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Unreadable("is a symbolic link") from None
            if error.errno == errno.ENXIO:
                raise Unreadable("is a socket") from None
            raise
        try:
            info = os.fstat(descriptor)
            if problem := _no_file(info.st_mode):
                raise Unreadable(problem)
            _refuse_above(info.st_size, most)
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(info.st_size + 1)
        finally:
            os.close(descriptor)
        if len(data) != info.st_size:
            raise Unreadable("changed while it was read")
        return data

    def read_part(self, rel: str, start: int, stop: int) -> bytes:
        with self.open(rel) as file:
            file.seek(start)
            return file.read(max(0, stop - start))

    def _staged(self, path: str, data: Iterable[bytes]) -> str:
        folder = os.path.dirname(path)
        make_folder(folder)
        # the leading dot keeps a half-written file out of every listing
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".part", delete=False) as file:
            try:
                os.fchmod(file.fileno(), 0o644)
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
                os.utime(file.fileno(), ns=(time.time_ns(),) * 2)  # so that it is told from one written in place
            except OSError:  # a full disk, above all: do not leave it fuller
                os.unlink(file.name)
                raise
        return file.name

    def write(self, rel: str, data: bytes) -> None:
        self._write(rel, [data])

    def _write(self, rel: str, data: Iterable[bytes]) -> None:
        staged = self._staged(self._path(rel), data)
        crash_point(f"written, not there yet: in {os.path.dirname(rel)}")
        os.replace(staged, self._path(rel))
        crash_point(f"there, its name not synced: in {os.path.dirname(rel)}")
        sync(os.path.dirname(self._path(rel)))

    def put(self, rel: str, path: Path) -> None:
        with path.open("rb") as file:
            self._write(rel, iter(functools.partial(file.read, 1 << 20), b""))

    def create(self, rel: str, data: bytes) -> bool:
        staged = self._staged(self._path(rel), [data])
        try:
            os.link(staged, self._path(rel))  # unlike a rename, refuses to replace
        except FileExistsError:
            if os.stat(staged).st_nlink == 1:  # 2 on a network share whose answer was lost, and which was asked again
                return False
        finally:
            os.unlink(staged)
        crash_point(f"there, its name not synced: in {os.path.dirname(rel)}")
        sync(os.path.dirname(self._path(rel)))
        return True

    def exists(self, rel: str) -> bool:
        return os.path.exists(self._path(rel))

    def size(self, rel: str) -> int:
        return os.stat(self._path(rel)).st_size

    def names(self, rel: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._path(rel)) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def entries(self, rel: str) -> list[Entry]:
        try:
            files = sorted(os.scandir(self._path(rel)), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for file in files if not file.name.startswith(".") and (entry := _entry(file.path))]

    def tree(self, rel: str) -> list[tuple[str, Entry]]:
        return sorted(_below(self._path(rel), ""))

    def entry(self, rel: str) -> Entry | None:
        return _entry(self._path(rel))

    def sync(self, rels: Iterable[str]) -> None:
        for rel in rels:
            sync(self._path(rel))

    @property
    def may_tear(self) -> bool:
        return True

    def files(self, rel: str) -> list[str]:
        start = len(self._path(""))
        walked = os.walk(self._path(rel))
        return sorted(f"{folder}/{name}"[start:] for folder, _, names in walked for name in names if name[0] != ".")

    def require_writable(self, rel: str) -> None:
        make_folder(self._path(rel))
        if not os.access(self._path(rel), os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no file can be put into it", self._path(rel))

    def map(self, rel: str) -> "bytes | mmap.mmap":
        with open(self._path(rel), "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def move(self, source: str, target: str, mark: str | None = None) -> bool:
        make_folder(os.path.dirname(self._path(target)))
        if mark and self.mark(source) not in (mark, None):
            return False
        try:
            os.replace(self._path(source), self._path(target))
        except FileNotFoundError:
            if not self.exists(target):
                raise
        except OSError as error:
            if error.errno not in NOT_RENAMED:
                raise
            return self._copy_away(source, target, mark)
        else:
            if mark and self.mark(target) != mark:  # it came between the look and the move, and goes back
                with contextlib.suppress(FileExistsError):  # what came later is what its producer wants
                    os.link(self._path(target), self._path(source), follow_symlinks=False)
                os.unlink(self._path(target))
                return False
        return True

    def _copy_away(self, source: str, target: str, mark: str | None) -> bool:
        """As `move`, to another filesystem, or of a file that may not be taken away."""
        path = self._path(source)
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            self.put(target, Path(path))
        elif stat.S_ISLNK(mode):  # it, not what it leads to
            with contextlib.suppress(FileExistsError):
                os.symlink(os.readlink(path), self._path(target))
        else:
            return False
        if mark and self.mark(source) != mark:
            return False
        try:
            os.unlink(path)
        except OSError:
            return False
        return True

    def remove(self, rel: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            os.unlink(self._path(rel))

    def remove_unfinished(self, rel: str, before: datetime) -> None:
        for folder, _, names in os.walk(self._path(rel)):
            for name in names:
                if name.startswith(".") and name.endswith(".part"):  # as `_staged` names them
                    with contextlib.suppress(FileNotFoundError):
                        if os.stat(f"{folder}/{name}").st_mtime <= before.timestamp():
                            os.unlink(f"{folder}/{name}")

    def newest(self, rel: str) -> datetime | None:
        folders = [folder for folder, _, _ in os.walk(self._path(rel))]  # a file's own time is its producer's
        return max((datetime.fromtimestamp(os.stat(folder).st_mtime, UTC) for folder in folders), default=None)

    def _copy(self, rels: "list[str]", source: str, target: str) -> None:
        for rel in rels:
            path, to = self._path(rel), self._path(f"{target}{rel[len(source) :]}")
            make_folder(os.path.dirname(to))
            staged = f"{os.path.dirname(to)}/.{os.urandom(8).hex()}.part"
            try:
                os.link(path, staged)
            except OSError as error:
                if error.errno not in (*NOT_RENAMED, errno.EMLINK):
                    raise
                shutil.copyfile(path, staged)
                sync(staged)
            os.replace(staged, to)
            with contextlib.suppress(FileNotFoundError):  # what was a second name of the same file already stays
                os.unlink(staged)

    def duplicate(self, rels: Iterable[str], target: str) -> None:
        for rel in rels:
            to = self._path(f"{target}/{rel}")
            os.makedirs(os.path.dirname(to), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(self._path(rel), to)

    def move_tree(self, source: str, target: str, last: str | None = None) -> None:
        make_folder(os.path.dirname(self._path(target)))
        os.rename(self._path(source), self._path(target))
        for rel in (source, target):
            sync(os.path.dirname(self._path(rel)))

    def remove_tree(self, rel: str) -> None:
        shutil.rmtree(self._path(rel), ignore_errors=True)

    def remove_trees(self, rels: Iterable[str], first: str) -> None:
        by_parent = itertools.groupby(map(self._path, rels), key=os.path.dirname)
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(_remove_folders, [[*siblings] for _, siblings in by_parent], itertools.repeat(first)):
                pass

    def mark(self, rel: str) -> str | None:
        entry = _entry(self._path(rel))
        return entry.mark if entry else None

    def replace(self, rel: str, data: bytes, mark: str | None) -> str | None:
        if mark is None:
            return self.mark(rel) if self.create(rel, data) else None
        folder = os.open(os.path.dirname(self._path(rel)), os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # of all that replace files here
            if self.mark(rel) != mark:
                return None
            self.write(rel, data)
            return self.mark(rel)
        finally:
            os.close(folder)

    def which(self, rels: "list[str]") -> set[str]:
        return {*filter(self.exists, rels)}

    def lease(self, rel: str, holder: str, wait_s: float = 30) -> "contextlib.AbstractContextManager[leases.Lease]":
        make_folder(os.path.dirname(self._path(rel)))
        return leases.of_file(self._path(rel), holder, wait_s)


def _remove_folders(paths: list[str], first: str) -> None:
    """As shutil.rmtree of each, at half the cost where a folder holds the same files as the one before."""
    files = [first]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            try:
                for name in files:
                    os.unlink(f"{path}/{name}")
                os.rmdir(path)
            except OSError:  # it holds others
                files = [first, *(name for name in os.listdir(path) if name != first)]
                shutil.rmtree(path)


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """A folder for the length of the block; those of the same prefix whose process was killed go first."""
    with os.scandir(tempfile.gettempdir()) as others:
        for path in [other.path for other in others if other.name.startswith(prefix)]:
            _remove_abandoned(path)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, open(f"{folder}/.new", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, f"{folder}/{HELD}")  # never there without being held
        yield folder


def _remove_abandoned(folder: str) -> None:
    with contextlib.suppress(OSError), open(f"{folder}/{HELD}") as lock:  # another user's, or gone
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: str) -> None:
    """As os.makedirs, and each that is new is on the disk: a synced file in a folder without a name is lost."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    make_folder(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    sync(above)


def sync(path: str) -> None:
    """Put a file's bytes, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: str) -> Entry | None:
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    mark = f"{info.st_ino}-{info.st_mtime_ns}-{info.st_size}"
    modified = datetime.fromtimestamp(info.st_mtime, UTC)
    # what is written in place has both times from the same write; a rename or link afterwards changes the second
    whole = info.st_ctime_ns != info.st_mtime_ns
    return Entry(os.path.basename(path), info.st_size, mark, _no_file(info.st_mode), modified, whole)


def _below(folder: str, above: str) -> Iterator[tuple[str, Entry]]:
    """As `Root.tree`, in any order. A folder that cannot be entered is one of the entries."""
    try:
        found = [entry for entry in os.scandir(folder) if entry.name != LOST_AND_FOUND]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield above.rstrip("/"), Entry(os.path.basename(folder), 0, "", f"cannot be entered: {error.strerror}")
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path, f"{above}{entry.name}/")
        elif not (entry.name.startswith(".") and entry.name.endswith(".part")) and (seen := _entry(entry.path)):
            yield above + entry.name, seen


def _no_file(mode: int) -> str | None:
    """What is there instead of an ordinary file; None when it is one."""
    kinds = {
        stat.S_IFDIR: "is a folder",
        stat.S_IFLNK: "is a symbolic link",
        stat.S_IFIFO: "is a named pipe",
        stat.S_IFSOCK: "is a socket",
    }
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "is a device")


def _refuse_above(size: int, most: int) -> None:
    if size > most:
        raise Unreadable(f"has {size:,} bytes: more than the {most:,} that are read")
