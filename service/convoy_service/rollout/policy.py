"""Which versions of a model are to be served: its versions.toml, and what an operator's orders make
of it. Whoever serves the folder (a server, or several that share it) does what the file says.

    serve = 2              # the newest 2; or "newest", which is 1; or these: [3, 5]; or none: []
    skip = [4]             # never taken for the newest: it was rolled back
    [labels]               # names that requests may use for versions
    stable = 3             # answers requests that name no version; without, the newest that is served
    canary = 5             # gets a share of these
    [canary]               # has new versions begin as candidates, see `canary.Canary`
    share = 0.1
"""

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.files import hold_lock, replace_file
from convoy_service.errors import ConvoyError, NotPossible
from convoy_service.rollout.canary import Canary

FILE = "versions.toml"
STABLE, CANARY = "stable", "canary"

# Who changes a policy is done at once.
_WAIT_S = 1.0
_LARGEST = 2**20

_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")

Number = Annotated[int, msgspec.Meta(ge=1, lt=10**18)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What versions.toml says; the defaults are what holds without one."""

    serve: Number | Literal["newest"] | list[Number] = "newest"
    skip: list[Number] = []
    labels: dict[str, Number] = {}
    canary: Canary | None = None

    @property
    def newest(self) -> int:
        """How many of the newest are served; 0 where it is said which."""
        if isinstance(self.serve, list):
            return 0
        return 1 if self.serve == "newest" else self.serve

    @property
    def pinned(self) -> list[int]:
        """Those that are served, whatever is published; empty where it is said how many."""
        return self.serve if isinstance(self.serve, list) else []

    @property
    def nothing(self) -> bool:
        """No version is to be served."""
        return self.serve == [] and not self.labels

    @property
    def stable(self) -> int:
        """The version that answers requests which name none; 0: the newest that is served."""
        return self.labels.get(STABLE, 0)

    @property
    def candidate(self) -> int:
        """The version on trial; 0: none, or none yet."""
        return self.labels.get(CANARY, 0)

    @property
    def named(self) -> set[int]:
        """The versions that it wants, by number."""
        return {*self.pinned, *self.labels.values()}

    def __str__(self) -> str:
        """For a person to read."""
        if isinstance(self.serve, list):
            said = [", ".join(map(str, self.serve)) or "none"]
        else:
            said = ["newest" if self.newest == 1 else f"newest {self.newest}"]
        if self.skip:
            said.append(f"not {', '.join(map(str, self.skip))}")
        said += [f"{label} = {number}" for label, number in self.labels.items()]
        if self.canary:
            said.append(f"{self.canary.mode} {self.canary.share:.3g}")
        return "; ".join(said)


def read(model: Path) -> Policy:
    """The policy of the model in this folder. Raises ConvoyError, naming the file and what is wrong."""
    file = model / FILE
    try:
        written = bundles.contents(file, _LARGEST).decode()
        found = msgspec.convert(tomllib.loads(written), Policy)
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.MsgspecError) as error:
        raise ConvoyError(f"{file}: {error}") from error
    for label in found.labels:
        if not _LABEL.fullmatch(label):
            raise ConvoyError(
                f"{file}: {label!r} can't be a label: use letters, digits, '_' and '-', not "
                "beginning with a digit"
            )
    return found


# Change times, size and place of the file, if it is there: differs where it was changed.
Stamp = tuple[int, ...]


def stamp(model: Path) -> Stamp:
    try:
        stat = (model / FILE).stat()
    except OSError:
        return ()
    return (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)


def change(model: Path, make: Callable[[Policy], Policy]) -> tuple[Policy, Stamp]:
    """Makes of the policy in the file another one; a reader sees the one or the other. Comments in
    the file are lost. Raises ConvoyError where it can't be read or written (NotPossible where others
    hold it), and what `make` raises.
    """
    with alone(model.parent):
        before = read(model)
        after = make(before)
        if after != before:
            _write(model / FILE, after)
        return after, stamp(model)


@contextmanager
def alone(models: Path) -> Iterator[None]:
    """Holds the policies in a models folder against others who change one. Not `bundles.exclusive`:
    who publishes may have that for minutes.
    """
    try:
        descriptor = os.open(models, os.O_RDONLY)
    except OSError as error:
        raise ConvoyError(f"{models}: {error.strerror}") from error
    try:
        if not hold_lock(descriptor, _WAIT_S):
            raise NotPossible(f"{models} is locked by another process: try again")
        yield
    finally:
        os.close(descriptor)


def _write(file: Path, policy: Policy) -> None:
    try:
        # Whoever serves the folder reads it.
        replace_file(file, _toml(policy).encode(), 0o644)
    except OSError as error:
        raise ConvoyError(f"{file} can't be written: {error.strerror or error}") from error


def _toml(policy: Policy) -> str:
    values: dict[str, Any] = msgspec.to_builtins(policy)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {_value(value)}" for key, value in values.items() if key not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "".join(f"{line}\n" for line in lines)


def _value(value: Any) -> str:
    # The strings that a policy may hold need no escapes.
    return f'"{value}"' if isinstance(value, str) else str(value)


# What orders make of a policy. `msgspec.structs.replace` keeps the rest.


def promoted(policy: Policy, version: int) -> Policy:
    """This version answers the requests that name none, until another order; another one that was on
    trial is rejected.
    """
    if policy.candidate not in (0, version):
        policy = rejected(policy, policy.candidate)
    labels = {**untried(policy).labels, STABLE: version}
    skip = [number for number in policy.skip if number != version]
    return msgspec.structs.replace(policy, labels=labels, skip=skip)


def untried(policy: Policy) -> Policy:
    """No version is on trial."""
    labels = {name: number for name, number in policy.labels.items() if name != CANARY}
    return msgspec.structs.replace(policy, labels=labels)


def tried(policy: Policy, stable: int, candidate: int) -> Policy:
    """The candidate is on trial, and the stable version answers."""
    labels = {**policy.labels, STABLE: stable, CANARY: candidate}
    return msgspec.structs.replace(policy, labels=labels)


def rejected(policy: Policy, version: int) -> Policy:
    """This version is no candidate any more, and not taken for the newest."""
    labels = {
        name: number
        for name, number in policy.labels.items()
        if not (name in (CANARY, STABLE) and number == version)
    }
    skip = sorted({*policy.skip, version})
    return msgspec.structs.replace(policy, labels=labels, skip=skip)


def before(policy: Policy, stable: int, usable: Iterable[int], previous: int = 0) -> int:
    """The version to go back to from the stable one: that which answered before it (`previous`), if it
    is one of the `usable`, else the newest of these that is older. Raises NotPossible.
    """
    left = {*usable} - {stable, *policy.skip}
    if previous in left:
        return previous
    if older := [number for number in left if number < stable]:
        return max(older)
    raise NotPossible(f"there is no version before {stable} to go back to")


def rolled_back(policy: Policy, stable: int, before: int) -> Policy:
    """The version before answers, until another order; the one that did is not taken for the newest."""
    return promoted(rejected(policy, stable), before)


def pinned(policy: Policy, versions: Sequence[int]) -> Policy:
    """These versions are served and no others; none of them: again the newest, whichever it is."""
    labels = {name: number for name, number in policy.labels.items() if number in versions}
    serve: Any = sorted(set(versions)) or "newest"
    return msgspec.structs.replace(policy, serve=serve, labels=labels, skip=[])


def without(policy: Policy, missing: Iterable[int]) -> Policy:
    """The same without versions that are not there; where it pins no others, it pins none."""
    gone = set(missing)
    serve: Any = policy.serve
    if isinstance(serve, list) and serve:
        serve = [number for number in serve if number not in gone] or "newest"
    labels = {name: number for name, number in policy.labels.items() if number not in gone}
    return msgspec.structs.replace(policy, serve=serve, labels=labels)


def unloaded(policy: Policy) -> Policy:
    """No version is served."""
    return msgspec.structs.replace(policy, serve=[], labels={})


def loaded(policy: Policy) -> Policy:
    """Some version is served: the newest, where it was none."""
    return msgspec.structs.replace(policy, serve="newest") if policy.serve == [] else policy
