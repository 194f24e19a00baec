import pytest

from tests.integration.damage import DAMAGE, Damage, Outcome, outcomes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return outcomes(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.what)
def test_what_is_wrong_is_told_and_what_served_goes_on(
    damage: Damage, found: dict[str, Outcome]
) -> None:
    outcome = found[damage.model]
    assert outcome.state == damage.state
    assert damage.words in outcome.reason
    assert outcome.answers == (2 if damage.state == "ready" and not damage.serving else 1)
