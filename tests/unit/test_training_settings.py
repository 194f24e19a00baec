"""The roles of the training settings, and the sets of settings that follow from them."""

from dataclasses import dataclass, fields
from typing import Annotated

import pytest

from convoy.cli.recipes import NOT_INHERITED
from convoy_training.pipeline.job import AROUND, NOT_TRAINED, SEEN_IN_DATA
from convoy_training.pipeline.run import NOT_RECORDED
from convoy_training.settings import Role, TrainingSettings, roles, with_role

EVERY = {field.name for field in fields(TrainingSettings)}


def test_each_setting_declares_its_roles() -> None:
    declared = roles(TrainingSettings)
    assert declared.keys() == EVERY
    assert all(declared.values())


@dataclass(frozen=True)
class Forgotten:
    seed: Annotated[int, Role.FIT] = 0
    new: int = 0


@dataclass(frozen=True)
class Twice:
    seed: Annotated[int, Role.FIT, Role.DATA] = 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [(Forgotten, "Forgotten.new declares 0 roles"), (Twice, "Twice.seed declares 2 roles")],
)
def test_a_setting_without_a_role_is_refused(settings: type, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        roles(settings)


def test_what_a_manifest_does_not_record() -> None:
    assert {
        "models", "checkpoints", "summary", "textfile", "base", "retrain", "cache", "resume",
        "tensorboard", "mlflow_uri",
    } == NOT_RECORDED  # fmt: skip


def test_what_does_not_decide_where_a_checkpoint_lies() -> None:
    named = {
        "models", "checkpoints", "resume", "tensorboard", "mlflow_uri", "summary", "textfile",
        "retrain", "base", "compare", "variants", "cache", "skip_unreadable", "recipe", "mirror",
        "storage", "significance", "keep_weights",
    }  # fmt: skip
    limits = {name for name in EVERY if name.startswith(("min_", "max_"))}
    assert EVERY - with_role(Role.FIT) == named | limits


def test_what_has_no_part_in_what_a_version_comes_to_be() -> None:
    assert {
        "recipe", "models", "name", "cache", "checkpoints", "resume", "tensorboard", "mlflow_uri",
        "retrain", "base", "summary", "textfile",
    } == AROUND  # fmt: skip


def test_what_the_images_tell() -> None:
    assert {
        "data", "split_seed", "test_share", "validation_share", "skip_unreadable", "image_size",
        "channels", "resize",
    } == SEEN_IN_DATA  # fmt: skip


def test_what_is_no_reason_to_train_again() -> None:
    assert {
        "min_accuracy", "min_recall", "max_calibration_error", "max_parity", "min_agreement",
        "max_regression", "significance", "max_variant_loss", "max_slowdown", "max_megabytes",
        "compare", "warm_start",
    } == NOT_TRAINED  # fmt: skip


def test_what_a_retraining_does_not_inherit() -> None:
    assert {
        "models", "name", "retrain", "base", "warm_start", "summary", "textfile", "checkpoints",
        "resume", "tensorboard", "mlflow_uri", "compare",
    } == NOT_INHERITED  # fmt: skip
