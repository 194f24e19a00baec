"""The quick part of `make conformance`: tritonclient and curl, and the rows that take no load or time."""

from collections.abc import Iterator

import pytest

from tests.conformance import matrix, rows, servers
from tests.conformance.rows import PASSED

# Each is held over gRPC and HTTP by the first client that has it.
COLUMNS = ("tritonclient gRPC", "tritonclient gRPC stream", "tritonclient HTTP", "curl")
QUICK = [each.name for each in rows.ROWS if not each.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("models")
    servers.add_models(folder, slow=False)
    with servers.serving(folder) as place:
        yield place


@pytest.mark.parametrize("module", ["tritonclient_grpc", "tritonclient_http", "curl"])
def test_clients_that_others_wrote_get_what_they_should(
    place: dict[str, dict[str, str]], module: str
) -> None:
    (program,) = (each for each in matrix.PROGRAMS if each.module == module)
    cells = matrix.ask(program, place, QUICK, COLUMNS)
    assert matrix.failures(cells) == []
    outcomes = [outcome for found in cells.values() for outcome, _ in found.values()]
    assert outcomes.count(PASSED) > len(QUICK) / 2
