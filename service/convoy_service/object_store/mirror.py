"""Models in an object store (S3, Google Cloud Storage, Azure), mirrored into a folder that is served.

A thread looks at what the store lists, every few seconds, and brings the versions that are wanted into
the folder: one rename each, after every file was held against the manifest's sha256. It keeps no state
that a lost folder would not bring back, and never waits for anything but its own requests: who serves
from the folder does not notice whether the store is there.

<folder>/<name>/<version>/           as `bundle` describes it, whole
<folder>/<name>/versions.toml        the policy, which goes both ways
<folder>/.store/incoming/<name>/...  versions on their way
<folder>/.store/policies/<name>.toml the policies that were last the same on both sides
<folder>/.store/lock                 held by the one process that keeps this folder up to date
"""

import contextlib
import errno
import hashlib
import itertools
import logging
import math
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import MemoryStore, from_url

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.files import (
    flush_file,
    hold_lock,
    replace_file,
    sync_folder,
    write_flushed,
)
from convoy_service.artifacts.reader import MANIFEST, Manifest
from convoy_service.backoff import Backoff
from convoy_service.duty_cycle import DutyCycle
from convoy_service.errors import BrokenVersion, ConvoyError, NotPossible
from convoy_service.rollout import policy as policies
from convoy_service.rollout.policy import FILE, Policy
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics

_PRIVATE = ".store"
# Who has made this in a version has its number: no other version that is published gets it. It stays,
# as someone may have listed the store before.
_CLAIM = "claimed"

# Files come in pieces: each is a request of its own, with its own retries, and between two there is
# time for what is more urgent. A link that does not carry one in `_REQUEST_S` is too slow.
_PIECE_BYTES, _REQUEST_S, _SILENCE_S, _CONNECT_S = 1 << 20, 60.0, 20.0, 5.0
# Within a request, for what passes by itself in a moment; outages are for the thread to sit out.
_RETRIES, _RETRIES_S = 3, 15.0
# Between tries, where the store can't be asked, and for one version that can't be had: its bytes are
# wrong, there is no room or no permission.
_LONGEST_RETRY_S, _LONGEST_VERSION_RETRY_S = 60.0, 300.0
# What this thread may take of a core while others are served: hashing does most of that.
_SHARE = 0.2
# How long a start waits for the store where the folder has something to serve.
_FIRST_LOOK_S = 10.0
_TELL_S = 10.0

log = logging.getLogger("convoy.store")

Key = tuple[str, int]


class Source(Protocol):
    """What of `obstore`'s stores is used: each of them, the one in memory too, is one."""

    def list(self) -> Any: ...

    def get(self, path: str, *, options: Any = None) -> Any: ...

    def put(self, path: str, file: Any, *, mode: Any = None) -> Any: ...


def open_source(url: str) -> Source:
    """The store of an `s3://`, `gs://` or `az://` URL, with the credentials that the environment has
    for it; asks nothing yet. Raises ConvoyError.
    """
    try:
        return from_url(
            url,
            client_options={
                # Not that it would be used: an endpoint whose URL says http is.
                "allow_http": True,
                "connect_timeout": timedelta(seconds=_CONNECT_S),
                "read_timeout": timedelta(seconds=_SILENCE_S),
                "timeout": timedelta(seconds=_REQUEST_S),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timedelta(seconds=_RETRIES_S),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
    except (BaseError, ValueError) as error:
        raise ConvoyError(f"{url}: {_words(error)}") from error


def cache_folder(url: str, caches: Path) -> Path:
    """Where in `caches` the models of this URL lie: each URL has a folder of its own."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", url).strip("-")[:80]
    return caches / f"{plain}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class _Object(NamedTuple):
    path: str
    size: int
    # Another one where its bytes are others.
    id: str


class _Listing(NamedTuple):
    # Model -> version -> the files in it.
    versions: dict[str, dict[int, dict[str, _Object]]]
    policies: dict[str, _Object]


class _Kept(NamedTuple):
    """A version in the folder that was verified: against which manifest, and how its files were."""

    manifest: str
    files: tuple[tuple[str, int, int], ...]


@dataclass
class _Try:
    """What came of trying to get something; until `at`, while it is what it was, not again."""

    what: object
    backoff: Backoff
    at: float = 0.0
    reason: str = ""


class _Refused(Exception):
    """What can't be had now, though the store answers. `kind` is for the metric."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


class _Waiting(Exception):
    """A version that is not there completely; nothing is wrong."""


class _Closed(Exception):
    pass


class _Changed(Exception):
    """What was being fetched has become something else: the next look sees what."""


class Store:
    """The models under a URL, kept in `folder` by a thread from `start` to `close`."""

    def __init__(
        self,
        url: str,
        folder: Path,
        metrics: Metrics,
        *,
        watch_s: float,
        newest: int,
        source: Source | None = None,
        piece_bytes: int = _PIECE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`newest`: so many versions of each model are brought, and those that its policy names.

        Raises ConvoyError where the URL or the credentials are no such thing, or the disk refuses.
        """
        self.url, self.folder = url, folder
        # Versions that are loaded: they stay while they are, whatever the store lists.
        self.in_use: Callable[[], Collection[Key]] = frozenset
        self.metrics, self._watch_s, self._newest = metrics, watch_s, newest
        self._source = source or open_source(url)
        self._piece_bytes, self._clock = piece_bytes, clock
        self._incoming = folder / _PRIVATE / "incoming"
        self._policies = folder / _PRIVATE / "policies"
        try:
            for each in (self._incoming, self._policies):
                each.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / _PRIVATE / "lock").open("a")
        except OSError as error:
            raise ConvoyError(
                f"the cache for {url} can't be made in {folder}: {error.strerror}: "
                "see --models-cache"
            ) from error
        self._held = False
        self._kept: dict[Key, _Kept] = {}
        self._tries: dict[Key | str, _Try] = {}
        # The ids of policies whose bytes are those in `_policies`.
        self._known_policies: dict[str, str] = {}
        self._looked = 0.0
        self._closed, self._first = threading.Event(), threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        metrics.store_begins()

    # What others ask.

    def start(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Begins, and waits until the folder has a version of every model that the store has; or, where
        there is something to serve in it, until the store has failed or kept it waiting too long.

        Raises ConvoyError where there is nothing, and the store can't be asked.
        """
        self._thread.start()
        since = self._clock()
        while not self._first.wait(0.1) and not stopping():
            if self._clock() - since > _FIRST_LOOK_S and bundles.names(self.folder):
                log.warning(
                    "%s has not answered in %g s: going on with what is in %s",
                    self.url, _FIRST_LOOK_S, self.folder,
                )  # fmt: skip
                return
        if not bundles.names(self.folder) and not stopping():
            waiting = [
                f"{name}/{version}: {why}" for (name, version), why in self.waiting().items()
            ]
            why = self._failure or f"{self.url} has no model: {'; '.join(waiting) or 'it is empty'}"
            raise ConvoyError(f"{why}; and there is none of it in {self.folder} yet")

    def close(self) -> None:
        """Ends the thread soon; a version on its way is gone on with next time."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
        if not self._thread.is_alive():  # else a request holds it up, and the lock is still its own
            self._lock.close()

    @classmethod
    def of(cls, settings: Settings) -> "Store":
        """That of `settings.models`, a URL. Raises ConvoyError."""
        url = str(settings.models)
        caches = settings.models_cache or Path("~/.cache/convoy/models")
        return cls(
            url,
            cache_folder(url, caches.expanduser()),
            Metrics(),
            watch_s=settings.store_watch_s,
            newest=settings.store_versions,
        )

    def waiting(self) -> dict[Key, str]:
        """Versions that the store has, but not so that they could be served, and why."""
        tries = list(self._tries.items())
        return {key: each.reason for key, each in tries if isinstance(key, tuple) and each.reason}

    # The thread.

    def _work(self) -> None:
        helper = threading.Thread(target=_start_obstore, daemon=True)
        helper.start()
        helper.join()
        backoff = Backoff(self._watch_s, _LONGEST_RETRY_S, jitter=True)
        while not self._closed.is_set():
            try:
                self.look()
                if backoff.failures:
                    log.info("%s is there again", self.url)
                backoff.reset()
                self._failure = ""
                # So that many replicas do not ask at once.
                delay_s = self._watch_s * random.uniform(0.9, 1.1)
            except _Closed:
                return
            # A panic in `obstore` is no Exception, and must not end this thread either.
            except BaseException as error:
                unforeseen = None if isinstance(error, BaseError | ConvoyError | OSError) else error
                delay_s = backoff.next_s()
                self.metrics.store_error(_kind(error, "store"))
                self._failure = f"{self.url} can't be read: {_words(error)}"
                log.warning(
                    "%s; going on with what is in %s, the next try is in %.1f s",
                    self._failure, self.folder, delay_s, exc_info=unforeseen,
                )  # fmt: skip
            self._first.set()
            self._closed.wait(delay_s)

    def look(self) -> None:
        """Looks once, and brings what is wanted. Raises what obstore raises, OSError, ConvoyError."""
        if not self._hold():
            return
        listing = self.list()
        if not listing.versions and bundles.names(self.folder):
            # An empty bucket is more likely a mistake than an order to remove everything.
            raise ConvoyError("it has no models: those in the cache are kept")
        self._sync_policies(listing)
        tried = self.bring(listing)
        self._clean(listing, tried)
        failed = False
        for key, each in list(self._tries.items()):
            if isinstance(key, tuple) and key not in tried:
                del self._tries[key]
            failed |= bool(each.backoff.failures)
        self.metrics.store_waiting(len(self.waiting()))
        if not failed:
            self.metrics.store_synced()

    def _hold(self) -> bool:
        """Whether this process is the one that keeps the folder up to date."""
        if not self._held:
            if not hold_lock(self._lock.fileno(), 0):
                if not self._first.is_set():
                    log.info("another process keeps %s up to date", self.folder)
                return False
            self._held = True
        return True

    def list(self) -> _Listing:
        listing = _sort(self._source.list().collect())
        self._looked = self._clock()
        return listing

    def bring(self, listing: _Listing) -> set[Key]:
        """Brings what is wanted of these; what it tried to, or did."""
        tried: set[Key] = set()
        bringing = [self._bring(name, listing, tried) for name in sorted(listing.versions)]
        # One of each model, then a second of each.
        while bringing := [each for each in bringing if next(each, False)]:
            self._first.set()
        return tried

    def _bring(self, name: str, listing: _Listing, tried: set[Key]) -> Iterator[bool]:
        """Brings the wanted versions of a model, the most wanted first; yields after each that is whole
        in the folder.
        """
        versions = listing.versions[name]
        policy = _policy(self.folder / name)
        named, most = policy.named, max(policy.newest, self._newest)
        order = sorted(versions, key=lambda version: (version in named, version), reverse=True)
        newest = 0
        for version in order:
            if version not in named and newest >= most:
                return
            tried.add((name, version))
            if self._have((name, version), versions[version]):
                newest += version not in named and version not in policy.skip
                yield True

    def _have(self, key: Key, files: dict[str, _Object]) -> bool:
        """Whether the version is whole in the folder, fetched if need be."""
        folder, before = self._place(key), self._kept.get(key)
        there = before is not None and before.files == _stats(folder)
        manifest = files.get(MANIFEST)
        if there and before and manifest and before.manifest == manifest.id:
            self._tries.pop(key, None)
            return True
        what = sorted((name, each.id, each.size) for name, each in files.items())
        last = self._tries.get(key)
        if last is None or last.what != what:
            if last:  # what was begun may be of other files
                shutil.rmtree(self._incoming_place(key), ignore_errors=True)
            last = self._tries[key] = self._new_try(what)
        elif last.at > self._clock():
            return there
        try:
            self._bring_up_to_date(key, files)
        except _Waiting as reason:
            last.at = math.inf  # until something in it changes
            if last.reason != str(reason):
                log.info("%s/%d in %s waits: %s", *key, self.url, reason)
            last.reason = str(reason)
        # What is listed and not there has been removed since; or it is our folder that has.
        except (_Changed, FileNotFoundError, PreconditionError) as error:
            log.info("%s/%d has changed while it was fetched: %s", *key, _words(error))
        except (_Refused, OSError, PermissionDeniedError, UnauthenticatedError) as error:
            self._failed(last, f"{key[0]}/{key[1]}", error)
            if isinstance(error, OSError):  # what it has written takes room that others need
                shutil.rmtree(self._incoming_place(key), ignore_errors=True)
        else:
            del self._tries[key]
            return True
        return there

    def _new_try(self, what: object) -> _Try:
        return _Try(what, Backoff(self._watch_s, _LONGEST_VERSION_RETRY_S, jitter=True))

    def _failed(self, last: _Try, what: str, error: Exception, kind: str = "denied") -> None:
        last.reason = _words(error)
        delay_s = last.backoff.next_s()
        last.at = self._clock() + delay_s
        self.metrics.store_error(_kind(error, kind))
        log.error(
            "%s of %s is not taken: %s; the next try is in %.0f s",
            what, self.url, last.reason, delay_s,
        )  # fmt: skip

    def _bring_up_to_date(self, key: Key, files: dict[str, _Object]) -> None:
        if MANIFEST not in files:
            raise _Waiting(f"{MANIFEST} is not there yet")
        listed, folder = files[MANIFEST], self._place(key)
        data, ours = self._get_twice(listed), _read(folder / MANIFEST)
        if not self._is(folder, data):
            if ours not in (None, data) and key in self.in_use() and self._is(folder, ours or b""):
                raise _Refused(
                    "changed",
                    "it is another one in the store than the one that is used here: a version never "
                    "changes, publish a new one",
                )
            self._fetch(key, files, data)
        self._kept[key] = _Kept(listed.id, _stats(folder))

    def _is(self, folder: Path, manifest: bytes) -> bool:
        """Whether the version in `folder` is whole, and this is its manifest."""
        if _read(folder / MANIFEST) != manifest:
            return False
        try:
            listed = bundles.read_manifest(folder).files
            return all(
                bundles.sha256(folder / name) == file.sha256 for name, file in listed.items()
            )
        except (BrokenVersion, FileNotFoundError):
            return False

    def _fetch(self, key: Key, files: dict[str, _Object], data: bytes) -> None:
        """Puts the version with this manifest into the folder, in place of what is there under its
        number.
        """
        incoming = self._incoming_place(key)
        manifest = self._begin(incoming, data)
        for name, file in manifest.files.items():
            there = files[name].size if name in files else None
            if there != file.bytes:
                said = "is not there yet" if there is None else f"has {there} of {file.bytes} bytes"
                raise _Waiting(f"{name} {said}")
        for left in incoming.iterdir():
            if left.name not in manifest.files and left.name != MANIFEST:
                left.unlink()
        self._check_room(incoming, manifest)
        log.info(
            "fetching %s/%d of %s, %.1f MB",
            *key, self.url, sum(file.bytes for file in manifest.files.values()) / 1e6,
        )  # fmt: skip
        for name, file in manifest.files.items():
            self._fetch_file(key, files, files[name], incoming / name, file.sha256)
        sync_folder(incoming)
        place = self._place(key)
        place.parent.mkdir(exist_ok=True)
        self._discard(place)
        incoming.rename(place)
        sync_folder(place.parent)
        log.info("%s/%d of %s is in %s", *key, self.url, place)

    def _begin(self, incoming: Path, data: bytes) -> Manifest:
        """The folder of a version on its way, with its manifest. Raises _Refused."""
        incoming.mkdir(parents=True, exist_ok=True)
        write_flushed(incoming / MANIFEST, data)
        try:
            return bundles.read_manifest(incoming)
        except BrokenVersion as error:
            raise _Refused("corrupt", str(error)) from error

    def _check_room(self, incoming: Path, manifest: Manifest) -> None:
        there = sum(each.stat().st_size for each in incoming.iterdir() if each.name != MANIFEST)
        missing = sum(file.bytes for file in manifest.files.values()) - there
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise OSError(
                errno.ENOSPC,
                f"no room: {missing / 1e6:.1f} MB are wanted, {free / 1e6:.1f} MB are free",
            )

    def _fetch_file(
        self, key: Key, files: dict[str, _Object], there: _Object, to: Path, sha256: str
    ) -> None:
        """Goes on where an earlier try has ended. Raises _Refused where the bytes are wrong."""
        digest, done = hashlib.sha256(), 0
        began = told = self._clock()
        with to.open("a+b") as file:
            file.seek(0)
            while piece := file.read(1 << 20):
                digest.update(piece)
                done += len(piece)
            duty = DutyCycle(_SHARE)
            while done < there.size:
                self._between(key, files)
                duty.begin()
                end = min(done + self._piece_bytes, there.size)
                piece = _get(self._source, there, done, end)
                digest.update(piece)
                file.write(piece)
                done += len(piece)
                self.metrics.store_fetched(len(piece))
                if self._first.is_set():
                    self._closed.wait(duty.rest_s())
                now = self._clock()
                if now - told > _TELL_S:
                    told = now
                    log.info(
                        "%s/%d: %s: %.0f of %.0f MB in %.0f s",
                        *key, to.name, done / 1e6, there.size / 1e6, now - began,
                    )  # fmt: skip
            flush_file(file)
        if digest.hexdigest() != sha256:
            to.unlink()
            raise _Refused("corrupt", f"{there.path}: its sha256 is not the manifest's")

    def _between(self, key: Key, files: dict[str, _Object]) -> None:
        """Between two pieces: whether to go on, and what can't wait until a large version is here."""
        if self._closed.is_set():
            raise _Closed
        if self._clock() - self._looked > self._watch_s:
            listing = self.list()
            self._sync_policies(listing)
            name, version = key
            if listing.versions.get(name, {}).get(version) != files:
                raise _Changed("its files are others now")

    def _get_twice(self, there: _Object) -> bytes:
        """Of what no checksum is known, so that it must at least be the same twice. Raises _Refused."""
        data = _get(self._source, there)
        if _get(self._source, there) != data:
            raise _Refused("corrupt", f"{there.path} has other bytes each time")
        return data

    # What goes.

    def _clean(self, listing: _Listing, tried: set[Key]) -> None:
        """Removes what nobody wants any more, after what takes its place has come."""
        in_use = set(self.in_use())
        for name in bundles.names(self.folder):
            there = {(name, version) for version in bundles.versions(self.folder / name)}
            wanted = there & tried
            if not wanted and name in listing.versions:
                continue  # what should take its place can't be had
            for key in sorted(there - wanted - in_use):
                log.info("removing %s/%d from %s: it is not wanted any more", *key, self.folder)
                self._discard(self._place(key))
                self._kept.pop(key, None)
            if not bundles.versions(self.folder / name):
                self._discard(self.folder / name)
                (self._policies / f"{name}.toml").unlink(missing_ok=True)
                self._known_policies.pop(name, None)
        for left in self._incoming.glob("*/*"):
            if (left.parent.name, int(left.name)) not in tried:
                shutil.rmtree(left, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        """It is gone at once, or not at all."""
        aside = self.folder / _PRIVATE / "gone"
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _place(self, key: Key) -> Path:
        return self.folder / key[0] / str(key[1])

    def _incoming_place(self, key: Key) -> Path:
        return self._incoming / key[0] / str(key[1])

    # Policies.

    def _sync_policies(self, listing: _Listing) -> None:
        names = {*listing.versions, *bundles.names(self.folder)}
        for gone in [key for key in self._tries if isinstance(key, str) and key not in names]:
            del self._tries[gone]
        for name in names:
            last = self._tries.setdefault(name, self._new_try(None))
            try:
                self._sync_policy(name, listing.policies.get(name), last)
            except (_Changed, PreconditionError, AlreadyExistsError, FileNotFoundError) as error:
                log.info("%s/%s has changed at the same time: %s", name, FILE, _words(error))
                self._known_policies.pop(name, None)
            except (_Refused, BaseError, OSError) as error:
                self._failed(last, f"{name}/{FILE}", error, "store")

    def _sync_policy(self, name: str, there: _Object | None, last: _Try) -> None:
        """Where only one side's policy has changed since both were the same, the other gets it; where
        both have, the store's counts.
        """
        path, same_path = self.folder / name / FILE, self._policies / f"{name}.toml"
        ours, same = _read(path), _read(same_path)
        what = (ours, there and there.id)
        if last.what != what:
            last.what, last.at = what, 0.0
            last.backoff.reset()
        elif last.at > self._clock():
            return
        theirs, known = same, there.id if there else ""
        if there is None:
            theirs = None
        elif there.id != self._known_policies.get(name) or same is None:
            theirs = self._get_twice(there)
        if theirs != same:
            if ours not in (same, theirs, None):
                log.warning("%s was changed here and in %s: the store's counts", path, self.url)
            self._take(path, ours, theirs)
            _replace(same_path, theirs)
            log.info("%s is now the store's: %s", path, _one_line(theirs))
        elif ours is None:
            self._take(path, ours, theirs)
        elif ours != same:
            known = self._put_policy(f"{name}/{FILE}", ours, same, listed=there is not None)
            _replace(same_path, ours)
            log.info("%s is now in the store, too: %s", path, _one_line(ours))
        self._known_policies[name] = known
        last.backoff.reset()
        last.reason = ""

    def _take(self, path: Path, ours: bytes | None, theirs: bytes | None) -> None:
        if ours == theirs:
            return
        try:
            with policies.alone(self.folder):  # orders change it under the same lock
                if _read(path) != ours:
                    raise _Changed("an order was given just now")
                _replace(path, theirs)
        except NotPossible as error:
            raise _Changed(str(error)) from error

    def _put_policy(self, path: str, data: bytes, same: bytes | None, listed: bool) -> str:
        """Writes it where the store still has `same`; its id there."""
        mode: Any = "create"
        if listed:
            # Some stores do not list what a condition must name.
            now = self._source.get(path)
            if bytes(now.bytes()) != same:
                raise _Changed("somebody has changed it just now")
            mode = {name: now.meta[name] for name in ("e_tag", "version") if now.meta[name]}
        try:
            written = self._source.put(path, data, mode=mode or "overwrite")
        except NotSupportedError:  # a store without conditions: the last who writes counts
            written = self._source.put(path, data, mode="overwrite")
        return written["e_tag"] or ""


def _get(source: Source, there: _Object, start: int = 0, end: int | None = None) -> bytes:
    options = None if end is None else {"range": (start, end)}
    data = bytes(source.get(there.path, options=options).bytes())
    if end is not None and len(data) != end - start:
        raise _Changed(f"{there.path} is shorter than listed")
    return data


def _sort(objects: Iterable[Any]) -> _Listing:
    """What of the objects in a store are versions and policies; others are none of ours."""
    listing = _Listing({}, {})
    for meta in objects:
        known = meta["e_tag"] or meta["last_modified"].isoformat()
        each = _Object(meta["path"], meta["size"], known)
        match each.path.split("/"):
            case [name, file] if file == FILE and bundles.is_name(name):
                listing.policies[name] = each
            case [name, version, file] if bundles.is_name(name) and bundles.is_version(version):
                listing.versions.setdefault(name, {}).setdefault(int(version), {})[file] = each
    return listing


def _start_obstore() -> None:
    """Has its threads, which decrypt and copy, begin at a low priority, that of who first asks for
    something. Not ours: it holds the interpreter's lock at times, and must not be kept waiting then.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    MemoryStore().list().collect()


def _policy(model: Path) -> Policy:
    """The policy in a model's folder; the usual one where it can't be read, which others report."""
    try:
        return policies.read(model)
    except ConvoyError:
        return Policy()


def _kind(error: BaseException, other: str) -> str:
    """What is counted."""
    if isinstance(error, _Refused):
        return error.kind
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return "denied"
    return "disk" if isinstance(error, OSError) else other


def _words(error: BaseException) -> str:
    """What it says, in short, and without what URLs are signed with."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = (str(error) or repr(error)).partition("\n")[0].partition(": <?xml")[0]
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", first)[:300]


def _one_line(policy: bytes | None) -> str:
    return "none" if policy is None else " ".join(policy.decode(errors="replace").split())[:300]


def _stats(folder: Path) -> tuple[tuple[str, int, int], ...]:
    try:
        return tuple(
            sorted(
                (entry.name, stat.st_size, stat.st_mtime_ns)
                for entry in os.scandir(folder)
                for stat in [entry.stat()]
            )
        )
    except FileNotFoundError:
        return ()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _replace(path: Path, data: bytes | None) -> None:
    """Has the file hold these bytes, or be none, at once."""
    if data is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    replace_file(path, data)


def pull(url: str, folder: Path, newest: int = 1, source: Source | None = None) -> list[Path]:
    """Brings the newest versions of each model in the store into a folder, where nothing is removed or
    replaced. They are returned, those too that were there.

    Raises ConvoyError where one can't be had.
    """
    store = Store(url, folder, Metrics(), watch_s=math.inf, newest=newest, source=source)
    store.in_use = lambda: {
        (name, version)
        for name in bundles.names(folder)
        for version in bundles.versions(folder / name)
    }
    try:
        tried = store.bring(store.list())
    except (BaseError, OSError) as error:
        raise ConvoyError(f"{url} can't be read: {_words(error)}") from error
    finally:
        store.close()
    if failed := [f"{name}/{version}: {why}" for (name, version), why in store.waiting().items()]:
        raise ConvoyError(f"{url}: {'; '.join(failed)}")
    shutil.rmtree(folder / _PRIVATE, ignore_errors=True)
    return [folder / name / str(version) for name, version in sorted(tried)]


def push(folder: Path, url: str, source: Source | None = None) -> tuple[int, bool]:
    """Puts the version in `folder`, models/<name>/<version>, into the store, as the next one of its
    model; its number there. One that the store has already, under whatever number, is not put there
    again: then False comes with the number.

    Every file is verified first, and the manifest goes last. Raises ConvoyError, BrokenVersion.
    """
    store = source or open_source(url)
    bundle, manifest = bundles.read(folder), (folder / MANIFEST).read_bytes()
    try:
        listed = _sort(store.list().collect()).versions.get(bundle.name, {})
        for version, files in listed.items():
            other = files.get(MANIFEST)
            if other and other.size == len(manifest) and _get(store, other) == manifest:
                return version, False
        for version in itertools.count(max(listed, default=0) + 1):
            there = f"{bundle.name}/{version}"
            try:
                store.put(f"{there}/{_CLAIM}", b"", mode="create")
            except AlreadyExistsError:
                continue
            except NotSupportedError:
                pass
            for name in [*bundle.manifest.files, MANIFEST]:
                store.put(f"{there}/{name}", folder / name)
            return version, True
    except (BaseError, OSError) as error:
        raise ConvoyError(
            f"{folder} could not be put into {url}: {_words(error)}; without its manifest nobody "
            "takes it for a version"
        ) from error
    raise AssertionError
