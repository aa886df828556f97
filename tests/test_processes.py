"""Process groups end with everything that was started in them."""

import os
import sys
import time
from pathlib import Path

import pytest

from fedsim import processes
from fedsim.processes import ProcessGroup, find_command


@pytest.fixture
def group(tmp_path: Path) -> ProcessGroup:
    return ProcessGroup(dict(os.environ), tmp_path, tmp_path / "log")


def wait_for(group: ProcessGroup, line: str) -> None:
    deadline = time.monotonic() + 10
    while group.last_line() != line and time.monotonic() < deadline:
        time.sleep(0.01)
    assert group.last_line() == line


def is_gone(group_id: int) -> bool:
    try:
        os.killpg(group_id, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("end", [ProcessGroup.end, ProcessGroup.kill])
def test_orphans_end_with_their_group(group: ProcessGroup, end) -> None:
    parent = group.start("sh", "-c", "sleep 100 & echo started")
    wait_for(group, "started")
    parent.wait()
    assert not is_gone(parent.pid)
    end(group)
    assert is_gone(parent.pid)


def test_all_processes_share_one_group_apart_from_ours(group: ProcessGroup) -> None:
    first = group.start("sleep", "100")
    second = group.start("sleep", "100")
    assert os.getpgid(second.pid) == first.pid != os.getpgrp()
    group.end()
    assert is_gone(first.pid)
    assert (first.returncode, second.returncode) == (-15, -15)


def test_a_process_that_does_not_listen_is_killed(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    process = group.start(sys.executable, "-c", deaf)
    wait_for(group, "deaf")
    group.end()
    assert process.returncode == -9


def test_a_group_can_end_twice_and_start_again(group: ProcessGroup) -> None:
    group.end()
    group.start("true").wait()
    group.end()
    group.end()
    assert group.start("true").wait() == 0
    group.kill()


def test_programs_are_found_beside_this_python() -> None:
    assert Path(find_command("flwr")).parent == Path(sys.executable).parent
    assert find_command("no-such-program") == "no-such-program"
