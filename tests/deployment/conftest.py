"""A real deployment on the loopback interface, for the tests of this folder."""

from collections.abc import Iterator

import pytest
from loopback import Federation


@pytest.fixture(scope="module")
def federation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    """A deployment with two SuperNodes, or with as many as an indirect parameter says."""
    federation = Federation(tmp_path_factory.mktemp("federation"), getattr(request, "param", 2))
    try:
        federation.start()
        assert len(federation.remaining()) >= 2 + 2 * len(federation.nodes)
        yield federation
    finally:
        federation.end()
    assert federation.remaining() == []
