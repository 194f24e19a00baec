"""The version folder: written whole or not at all, and read only if it is what was written."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Scores, Variant
from convoy_service.errors import BrokenVersion, ConvoyError
from tests.unit.versions import GOLDEN, INT8, MANIFEST, ONNX, REPORT, RICH_GOLDEN, write, write_rich

TIMEOUT_S = 60.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "models" / "pets"


@pytest.fixture
def version(model: Path) -> Path:
    return write(model).folder


# Written and read.


def test_what_is_written_is_read(model: Path) -> None:
    write(model)
    bundle = bundles.read(model / "1")
    assert (bundle.name, bundle.version, bundle.onnx) == ("pets", 1, ONNX)
    assert dataclasses.replace(bundle.manifest, files={}) == MANIFEST
    assert np.array_equal(bundle.golden.pixels, GOLDEN.pixels)
    assert np.array_equal(bundle.golden.probabilities, GOLDEN.probabilities)
    assert bundle.sha256 == hashlib.sha256(ONNX).hexdigest()
    assert set(bundle.manifest.files) == {"model.onnx", "golden.npz"}


def test_variants_thresholds_and_the_report_are_read_as_written(model: Path) -> None:
    bundle = write_rich(model)
    assert bundle.variants == {"int8": INT8}
    assert np.array_equal(bundle.golden.variants["int8"], RICH_GOLDEN.variants["int8"])
    assert bundle.manifest.variants["int8"].speedup == 2.0
    assert bundle.manifest.thresholds is not None
    assert bundle.manifest.thresholds.per_class == [0.5, 0.7]
    assert bundle.manifest.evaluation == {"macro_f1": 0.5}
    assert (bundle.folder / "report.html").read_text() == REPORT
    assert set(bundle.manifest.files) == {
        "model.onnx", "model.int8.onnx", "golden.npz", "report.html",
    }  # fmt: skip


def test_a_variant_without_golden_answers_is_not_written(model: Path) -> None:
    with pytest.raises(ValueError, match="no golden answers of int8"):
        bundles.write(model, MANIFEST, ONNX, GOLDEN, {"int8": INT8})
    assert not model.exists()


@pytest.mark.parametrize(
    ("measured", "device", "fastest"),
    [
        ({"int8": (2.0, "cpu"), "fp16": (0.3, "cpu")}, "cpu", "int8"),
        ({"int8": (2.0, "cpu"), "fp16": (0.3, "cpu")}, "cuda:0", "fp32"),
        ({"int8": (0.9, "cpu"), "fp16": (1.8, "cuda:0")}, "cpu", "fp32"),
        ({"int8": (0.9, "cuda:0"), "fp16": (1.8, "cuda:0")}, "tensorrt:1", "fp16"),
        ({"int8": (1.5, "cpu"), "fp16": (1.6, "cpu")}, "cpu", "fp16"),
        ({"fp32": (1.0, "cpu")}, "cpu", "fp32"),
        ({"bf16": (3.0, "cpu")}, "cpu", "fp32"),
        ({}, "cpu", "fp32"),
    ],
)
def test_the_fastest_variant_is_the_one_that_was_on_such_a_device(
    measured: dict[str, tuple[float, str]], device: str, fastest: str, model: Path
) -> None:
    variants = {
        name: Variant(Scores(1.0, 1, 1, 0.0), 1.0, 1000.0, speedup, where)
        for name, (speedup, where) in measured.items()
    }
    bundle = dataclasses.replace(
        write_rich(model),
        manifest=dataclasses.replace(MANIFEST, variants=variants),
        variants={"int8": INT8, "fp16": INT8},
    )
    assert bundle.fastest(device) == fastest


def test_unknown_scores_stay_unknown(model: Path) -> None:
    bundles.write(model, dataclasses.replace(MANIFEST, scores=None, parity=None), ONNX, GOLDEN)
    manifest = bundles.read_manifest(model / "1")
    assert (manifest.scores, manifest.parity) == (None, None)


def test_versions_count_up_and_are_left_alone(model: Path) -> None:
    first = write(model)
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in first.folder.iterdir()}
    assert [write(model).version for _ in range(2)] == [2, 3]
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in first.folder.iterdir()} == before


def test_a_gap_in_the_versions_stays(model: Path, version: Path) -> None:
    version.rename(model / "7")
    assert write(model).version == 8


def test_the_folder_holds_nothing_but_the_version(model: Path, version: Path) -> None:
    names = {str(f.relative_to(model)) for f in model.rglob("*")}
    files = {"1", "1/model.onnx", "1/golden.npz", "1/manifest.json"}
    assert names == files | {"config.pbtxt", "labels.txt"}


def test_others_may_read_what_is_written(version: Path) -> None:
    """A temporary folder is its owner's alone; a version is served by another user."""
    umask = os.umask(0)
    os.umask(umask)
    assert version.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {f.stat().st_mode & 0o777 for f in version.iterdir()} == {0o666 & ~umask}


def test_files_that_the_manifest_does_not_list_are_ignored(version: Path) -> None:
    (version / "notes.txt").write_text("mine")
    assert bundles.read(version).onnx == ONNX


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "ä", "x" * 129])
def test_names_that_no_folder_or_url_takes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match="can't name a model"):
        bundles.check_name(name)


@pytest.mark.parametrize("name", ["a", "1", "resnet-50_v1.5", "x" * 128])
def test_plain_names_are_taken(name: str) -> None:
    bundles.check_name(name)


def test_a_name_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match="can't name a model"):
        write(tmp_path / ".hidden")
    assert list(tmp_path.iterdir()) == []


# Listed.


def test_only_positive_integers_without_leading_zeros_are_versions(model: Path) -> None:
    for name in ["1", "10", "9", "0", "01", "-1", "1.0", "+3", "x", ".4", "٣", " 5", "1" * 19]:
        (model / name).mkdir(parents=True)
    (model / "6").write_text("a file")
    assert bundles.versions(model) == [1, 9, 10]


def test_only_folders_with_a_version_are_models(model: Path, version: Path) -> None:
    models = model.parent
    for name in [".hidden/1", "empty", "no-version/x", "also/2"]:
        (models / name).mkdir(parents=True)
    (models / "file").write_text("")
    assert bundles.names(models) == ["also", "pets"]


def test_where_nothing_is_there_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert bundles.names(tmp_path / "missing") == []
    assert bundles.names(tmp_path / "file") == []
    assert bundles.versions(tmp_path / "missing") == []


# Damaged.


def edit(version: Path, **changes: Any) -> None:
    path = version / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def relist(version: Path, name: str, data: bytes) -> None:
    """Replaces a file and lists it as if it had been written so."""
    (version / name).write_bytes(data)
    files = json.loads((version / "manifest.json").read_text())["files"]
    files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit(version, files=files)


def unlist(version: Path, name: str) -> None:
    files = json.loads((version / "manifest.json").read_text())["files"]
    del files[name]
    edit(version, files=files)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path, size: int = -1) -> None:
    path.write_bytes(path.read_bytes()[:size])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def drop(version: Path, field: str) -> None:
    path = version / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[field]
    path.write_text(json.dumps(manifest))


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, GOLDEN.pixels)
    return file.getvalue()


def bad_zip() -> bytes:
    data = bytearray(npz(pixels=GOLDEN.pixels, probabilities=GOLDEN.probabilities))
    data[data.index(b"pixels.npy") + 200] ^= 1
    return bytes(data)


PIXELS, ANSWERS = GOLDEN.pixels, GOLDEN.probabilities
OUTSIDE = {"sha256": "", "bytes": 0}
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest missing": (lambda v: (v / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda v: (v / "manifest.json").write_text(""), "manifest.json: "),
    "manifest truncated": (lambda v: truncate(v / "manifest.json", 100), "manifest.json: "),
    "manifest not text": (
        lambda v: (v / "manifest.json").write_bytes(b"\xff\0"),
        "manifest.json: ",
    ),
    "manifest not UTF-8": (
        lambda v: (v / "manifest.json").write_bytes(
            (v / "manifest.json").read_bytes().replace("ö".encode(), b"\xff")
        ),
        "manifest.json: ",
    ),
    "manifest a list": (lambda v: (v / "manifest.json").write_text("[]"), "manifest.json: "),
    "manifest a folder": (
        lambda v: make_folder(v / "manifest.json"),
        "manifest.json: ",
    ),
    "labels no list": (lambda v: edit(v, labels="cat"), "manifest.json: .*labels"),
    "labels left out": (lambda v: drop(v, "labels"), "manifest.json: .*labels"),
    "batch size 0": (lambda v: edit(v, max_batch_size=0), "manifest.json: .*max_batch_size"),
    "resize unknown": (
        lambda v: edit(v, pixels={"height": 4, "width": 5, "channels": 3, "resize": "tile"}),
        "manifest.json: .*resize",
    ),
    "format unknown": (lambda v: edit(v, format=2), "manifest.json: format 2 is newer"),
    "file listed above": (lambda v: edit(v, files={"../x": OUTSIDE}), "manifest.json: .*'../x'"),
    "file listed below": (lambda v: edit(v, files={"a/b": OUTSIDE}), "manifest.json: .*'a/b'"),
    "file listed elsewhere": (
        lambda v: edit(v, files={"/etc/passwd": OUTSIDE}),
        "manifest.json: .*'/etc/passwd'",
    ),
    "file listed as ..": (lambda v: edit(v, files={"..": OUTSIDE}), r"manifest.json: .*'\.\.'"),
    "file listed as nothing": (lambda v: edit(v, files={"": OUTSIDE}), "manifest.json: .*''"),
    "file listed with NUL": (lambda v: edit(v, files={"a\0b": OUTSIDE}), "manifest.json: lists"),
    "manifest lists itself": (
        lambda v: edit(v, files={"manifest.json": OUTSIDE}),
        "manifest.json: .*'manifest.json'",
    ),
    "model not listed": (lambda v: unlist(v, "model.onnx"), "manifest.json: .*model.onnx"),
    "golden not listed": (lambda v: unlist(v, "golden.npz"), "manifest.json: .*golden.npz"),
    "model missing": (lambda v: (v / "model.onnx").unlink(), "model.onnx: No such file"),
    "model a folder": (
        lambda v: make_folder(v / "model.onnx"),
        "model.onnx: Is a directory",
    ),
    "model truncated": (
        lambda v: truncate(v / "model.onnx"),
        "model.onnx: 1023 bytes, the manifest says 1024",
    ),
    "model with a flipped bit": (lambda v: flip(v / "model.onnx"), "model.onnx: its sha256"),
    "manifest with another sum": (
        lambda v: edit(v, files={"model.onnx": {"sha256": "0" * 64, "bytes": 1024}}),
        "model.onnx: its sha256",
    ),
    "golden missing": (lambda v: (v / "golden.npz").unlink(), "golden.npz: No such file"),
    "golden with a flipped bit": (lambda v: flip(v / "golden.npz"), "golden.npz: its sha256"),
    "golden empty": (lambda v: relist(v, "golden.npz", b""), "golden.npz: "),
    "golden a text": (lambda v: relist(v, "golden.npz", b"golden"), "golden.npz: "),
    "golden half a zip": (lambda v: relist(v, "golden.npz", bad_zip()[:99]), "golden.npz: "),
    "golden a bad zip": (lambda v: relist(v, "golden.npz", bad_zip()), "golden.npz: "),
    "golden one array": (lambda v: relist(v, "golden.npz", npy()), "golden.npz: "),
    "golden without answers": (
        lambda v: relist(v, "golden.npz", npz(pixels=PIXELS)),
        "golden.npz: .*probabilities",
    ),
    "golden pickled": (
        lambda v: relist(
            v, "golden.npz", npz(pixels=PIXELS, probabilities=np.array([{}], dtype=object))
        ),
        "golden.npz: Object arrays cannot be loaded",
    ),
    "golden pixels of floats": (
        lambda v: relist(v, "golden.npz", npz(pixels=PIXELS / 255, probabilities=ANSWERS)),
        "golden.npz: expected",
    ),
    "golden a single number": (
        lambda v: relist(v, "golden.npz", npz(pixels=np.uint8(1), probabilities=ANSWERS)),
        "golden.npz: expected",
    ),
}


RICH_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "variant missing": (lambda v: (v / "model.int8.onnx").unlink(), "model.int8.onnx: No such"),
    "variant truncated": (
        lambda v: truncate(v / "model.int8.onnx"),
        "model.int8.onnx: 1023 bytes, the manifest says 1024",
    ),
    "variant with a flipped bit": (lambda v: flip(v / "model.int8.onnx"), "int8.onnx: its sha256"),
    "variant without golden answers": (
        lambda v: relist(v, "golden.npz", npz(pixels=PIXELS, probabilities=ANSWERS)),
        "golden.npz: has no answers of model.int8.onnx",
    ),
    "variant with answers of doubles": (
        lambda v: relist(
            v, "golden.npz", npz(pixels=PIXELS, probabilities=ANSWERS, int8=ANSWERS.astype(float))
        ),
        "golden.npz: expected",
    ),
    "report missing": (lambda v: (v / "report.html").unlink(), "report.html: No such file"),
    "report changed": (
        lambda v: (v / "report.html").write_text(REPORT.replace("pets", "cars")),
        "report.html: its sha256",
    ),
    "thresholds of other classes": (
        lambda v: edit(
            v, thresholds={"unsure": 0.5, "per_class": [0.5], "coverage": 1, "accuracy": 1}
        ),
        "manifest.json: thresholds of 1 classes for 2 labels",
    ),
    "a threshold that is no probability": (
        lambda v: edit(
            v, thresholds={"unsure": 50, "per_class": [0, 0], "coverage": 1, "accuracy": 1}
        ),
        "manifest.json: .*unsure",
    ),
    "a measured variant without its device": (
        lambda v: edit(v, variants={"int8": {"speedup": 2}}),
        "manifest.json: .*variants",
    ),
}


@pytest.mark.parametrize("kind", RICH_DAMAGE)
def test_damage_to_what_is_optional_is_noticed_too(kind: str, model: Path) -> None:
    damage, words = RICH_DAMAGE[kind]
    folder = write_rich(model).folder
    damage(folder)
    with pytest.raises(BrokenVersion, match=words) as caught:
        bundles.read(folder)
    assert str(folder) in str(caught.value)


def test_files_of_names_that_nobody_knows_are_verified_and_left_alone(model: Path) -> None:
    folder = write_rich(model).folder
    relist(folder, "model.bf16.onnx", b"of a later Convoy")
    relist(
        folder, "golden.npz", npz(pixels=PIXELS, probabilities=ANSWERS, int8=ANSWERS, bf16=PIXELS)
    )
    bundle = bundles.read(folder)
    assert set(bundle.variants) == set(bundle.golden.variants) == {"int8"}
    flip(folder / "model.bf16.onnx")
    with pytest.raises(BrokenVersion, match=r"model\.bf16\.onnx: its sha256"):
        bundles.read(folder)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_its_file_named(kind: str, version: Path) -> None:
    damage, words = DAMAGE[kind]
    bundles.read(version)
    damage(version)
    with pytest.raises(BrokenVersion, match=words) as caught:
        bundles.read(version)
    assert str(version) in str(caught.value)


def test_a_flipped_bit_in_the_manifest_never_gives_another_model(version: Path) -> None:
    path = version / "manifest.json"
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        for bit in (1, 0x80):
            data = bytearray(whole)
            data[position] ^= bit
            path.write_bytes(data)
            try:
                assert bundles.read(version).onnx == ONNX
            except BrokenVersion:
                refused += 1
    assert refused > len(whole)


def test_a_pickle_in_the_golden_file_is_not_run(version: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    hidden = np.empty(1, dtype=object)
    hidden[0] = Bomb()
    relist(version, "golden.npz", npz(pixels=hidden, probabilities=hidden))
    with pytest.raises(BrokenVersion):
        bundles.read(version)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_that_is_not_there_is_broken(tmp_path: Path) -> None:
    with pytest.raises(BrokenVersion, match="is missing"):
        bundles.read(tmp_path / "1")


# Several writers.


def test_threads_that_write_at_once_lose_nothing(model: Path) -> None:
    together = threading.Barrier(8)
    written: dict[int, bytes] = {}

    def publish(writer: int) -> None:
        together.wait(TIMEOUT_S)
        for number in range(5):
            onnx = f"{writer} {number}".encode()
            written[write(model, onnx).version] = onnx

    threads = [threading.Thread(target=publish, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert bundles.versions(model) == list(range(1, 41))
    assert {number: bundles.read(model / str(number)).onnx for number in range(1, 41)} == written
    assert len(set(written.values())) == 40
    assert not list(model.glob(".*"))


_WRITER = """
import sys
from pathlib import Path
from tests.unit import versions

print("started", flush=True)
sys.stdin.readline()
for number in range(5):
    print(versions.write(Path(sys.argv[1]), f"{sys.argv[2]} {number}".encode()).version)
"""


def process(code: str, *arguments: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_write_at_once_lose_nothing(model: Path) -> None:
    writers = [process(_WRITER, model, str(number)) for number in range(3)]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "started\n"
    versions = []
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for number, writer in enumerate(writers):
        own = writer.communicate(timeout=TIMEOUT_S)[0].split()
        versions += [int(version) for version in own]
        for position, version in enumerate(own):
            assert bundles.read(model / version).onnx == f"{number} {position}".encode()
    assert sorted(versions) == bundles.versions(model) == list(range(1, 16))


# Killed, and a disk that is full.

_STOPPED = """
import os, sys, time
from pathlib import Path
from tests.unit import versions

model, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real, calls = getattr(os, name), 0

def stop(*arguments, **options):
    global calls
    calls += 1
    if calls == count:
        print("stopped", flush=True)
        time.sleep(1000)
    return real(*arguments, **options)

setattr(os, name, stop)
versions.write(model, b"killed")
"""


@pytest.mark.parametrize(
    ("call", "count", "left"),
    [("fsync", 1, 0), ("fsync", 3, 0), ("fsync", 6, 0), ("rename", 1, 0), ("replace", 1, 1)],
)
def test_a_writer_that_is_killed_leaves_a_whole_version_or_none(
    call: str, count: int, left: int, model: Path
) -> None:
    with process(_STOPPED, model, call, str(count)) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "stopped\n"
        writer.kill()
    assert bundles.versions(model) == list(range(1, left + 1))
    assert bundles.names(model.parent) == (["pets"] if left else [])
    for version in bundles.versions(model):
        assert bundles.read(model / str(version)).onnx == b"killed"
    assert write(model).version == left + 1
    assert (model / "labels.txt").read_text(encoding="utf-8") == "cat\ndög\n"


_LIMITED = """
import resource, sys
from pathlib import Path
from convoy_service.errors import ConvoyError
from tests.unit import versions

resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    versions.write(Path(sys.argv[1]), bytes(5000))
except ConvoyError as error:
    print(error)
"""


def test_a_file_that_the_system_refuses_publishes_nothing_and_says_so(
    model: Path, version: Path
) -> None:
    before = sorted(model.rglob("*"))
    with process(_LIMITED, model) as writer:
        said = writer.communicate(timeout=TIMEOUT_S)[0]
    assert said == (
        f"the new version could not be written to {model}: File too large; nothing was published\n"
    )
    assert sorted(model.rglob("*")) == before


@pytest.mark.parametrize("call", range(1, 7))
def test_a_disk_that_fills_up_publishes_nothing_and_says_so(
    call: int, model: Path, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f: f.read_bytes() for f in model.rglob("*") if f.is_file()}
    real, left = os.fsync, [call]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConvoyError, match="No space left on device; nothing was published"):
        bundles.write(model, dataclasses.replace(MANIFEST, labels=["a", "b"]), b"more", GOLDEN)
    assert {f: f.read_bytes() for f in model.rglob("*") if f.is_file()} == before
    assert not list(model.glob(".*"))


def test_where_no_folder_can_be_made_nothing_is_published(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ConvoyError, match="Not a directory; nothing was published"):
        write(tmp_path / "models" / "pets")


def test_a_file_where_the_version_would_be_is_an_error(model: Path) -> None:
    model.mkdir(parents=True)
    (model / "1").write_text("a file")
    with pytest.raises(ConvoyError, match="nothing was published"):
        write(model)


# For Triton.


def triton_config(text: str) -> Any:
    """`text` as Triton's ModelConfig, of which this has the fields that are used."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference")
    enum = file.enum_type.add(name="DataType")
    for name, number in [("TYPE_INVALID", 0), ("TYPE_UINT8", 2), ("TYPE_FP32", 11)]:
        enum.value.add(name=name, number=number)
    fields: dict[str, list[tuple[str, int, Any, bool, str]]] = {
        "Tensor": [
            ("name", 1, field.TYPE_STRING, False, ""),
            ("data_type", 2, field.TYPE_ENUM, False, "DataType"),
            ("dims", 3, field.TYPE_INT64, True, ""),
            ("label_filename", 4, field.TYPE_STRING, False, ""),
        ],
        "Batching": [],
        "ModelConfig": [
            ("name", 1, field.TYPE_STRING, False, ""),
            ("platform", 2, field.TYPE_STRING, False, ""),
            ("max_batch_size", 4, field.TYPE_INT32, False, ""),
            ("input", 5, field.TYPE_MESSAGE, True, "Tensor"),
            ("output", 6, field.TYPE_MESSAGE, True, "Tensor"),
            ("dynamic_batching", 11, field.TYPE_MESSAGE, False, "Batching"),
        ],
    }
    for message, of_message in fields.items():
        added = file.message_type.add(name=message)
        for name, number, kind, repeated, type_name in of_message:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added.field.add(
                name=name,
                number=number,
                type=kind,
                label=label,
                type_name=f".inference.{type_name}" if type_name else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, kind())


@pytest.mark.parametrize("names", [("pixels", "probabilities"), ('in"put', "a\\b:0é")])
def test_triton_reads_the_config(names: tuple[str, str], model: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, input=names[0], output=names[1])
    bundles.write(model, manifest, ONNX, GOLDEN)
    config = triton_config((model / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.platform) == ("pets", "onnxruntime_onnx")
    assert config.max_batch_size == 16
    (source,), (sink,) = config.input, config.output
    assert (source.name, source.data_type, list(source.dims)) == (names[0], 2, [4, 5, 3])
    assert (sink.name, sink.data_type, list(sink.dims)) == (names[1], 11, [2])
    assert sink.label_filename == "labels.txt"
    assert config.HasField("dynamic_batching")


def test_triton_gets_a_fixed_batch_axis_as_a_dimension(model: Path) -> None:
    fixed = dataclasses.replace(MANIFEST, fixed_batch=True, max_batch_size=2)
    bundles.write(model, fixed, ONNX, GOLDEN)
    config = triton_config((model / "config.pbtxt").read_text(encoding="utf-8"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [2, 4, 5, 3]
    assert list(config.output[0].dims) == [2, 2]
    assert not config.HasField("dynamic_batching")


def test_what_a_killed_writer_left_is_removed_in_time(model: Path) -> None:
    model.mkdir(parents=True)
    old, young = model / ".publishing-old", model / ".publishing-young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    write(model)
    assert (old.exists(), young.exists()) == (False, True)


def test_config_and_labels_are_those_of_the_newest_version(model: Path, version: Path) -> None:
    newer = dataclasses.replace(MANIFEST, labels=["x", "y", "z"], max_batch_size=2)
    bundles.write(model, newer, ONNX, GOLDEN)
    assert (model / "labels.txt").read_text() == "x\ny\nz\n"
    config = triton_config((model / "config.pbtxt").read_text())
    assert (config.max_batch_size, list(config.output[0].dims)) == (2, [3])
