"""Which folder of models a command takes where none is named."""

from pathlib import Path

import pytest

from convoy_service.settings import default_models
from tests.conftest import REPOSITORY


def test_models_of_the_working_directory_are_taken_unless_it_has_a_package_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_models() == REPOSITORY / "models"
    local = tmp_path / "models"
    local.mkdir()
    assert default_models() == Path("models")
    (local / "__init__.py").touch()
    assert default_models() == REPOSITORY / "models"
    # A version was published into it.
    (local / "digits" / "1").mkdir(parents=True)
    (local / "digits" / "1" / "manifest.json").touch()
    assert default_models() == Path("models")
