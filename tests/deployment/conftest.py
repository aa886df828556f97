"""A real deployment on the loopback interface, for the tests of this folder."""

from collections.abc import Iterator

import pytest
from loopback import Federation, remaining
from secured import Secured


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


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A federation of three SuperNodes with TLS and registered keys, as ``fedsim federation up`` starts it."""
    found = Secured(tmp_path_factory.mktemp("secured") / "federation")
    try:
        found.begin_up()
        yield found
    finally:
        done = found.command("down")
    assert done.returncode == 0, done.stderr
    assert remaining(found.folder) == []
