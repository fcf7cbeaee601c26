"""Files are replaced whole: what disks, links, other processes and killed writers may do to them."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

import pyro_vae
from pyro_vae.checkpoint import replacing
from pyro_vae.checkpoint.held import hold
from pyro_vae.checkpoint.replacing import replace_file

ROOT = os.path.dirname(os.path.dirname(pyro_vae.__file__))
ALONE = f"""
import os, sys, time, types
for name in ("pyro_vae", "pyro_vae.checkpoint"):  # without torch, which takes seconds to import
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = ["/".join([{ROOT!r}, *name.split(".")])]
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk(tmp_path, monkeypatch):
    """It takes the first half."""
    path = tmp_path / "f.pt"
    replace_file(path, b"old")
    write = os.write

    def full(file, data):
        if len(data) < 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:500])

    monkeypatch.setattr(replacing.os, "write", full)
    with pytest.raises(OSError, match=r"f.pt cannot be written: No space left on device. What was there before is as"):
        replace_file(path, b"x" * 1400)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f.pt"]


def test_a_limit_of_the_system_on_files(tmp_path):
    """A real one, in a process of its own."""
    code = f"""
{ALONE}
import resource, signal
from pyro_vae.checkpoint.replacing import replace_file
replace_file({str(tmp_path / "f.pt")!r}, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    replace_file({str(tmp_path / "f.pt")!r}, b"x" * 5000)
except OSError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "f.pt cannot be written: File too large" in found.stdout
    assert (tmp_path / "f.pt").read_bytes() == b"old"
    assert names(tmp_path) == ["f.pt"]


@pytest.mark.parametrize(
    ("path", "error", "what"),
    [
        ("{}/" + 300 * "n", OSError, "File name too long"),
        ("/proc/f.pt", OSError, "/proc/f.pt cannot be written: "),
        ("/dev/null", ValueError, "/dev/null: expected the name of a file, got a device"),
        ("{}/missing/f.pt", ValueError, "expected a file in a folder, got no folder .*missing. Try to make it"),
        ("{}", ValueError, "expected the name of a file, got that of a folder"),
    ],
)
def test_places_that_take_no_file(tmp_path, path, error, what):
    with pytest.raises(error, match=what) as found:
        replace_file(path.format(tmp_path), b"new")
    assert path.format(tmp_path) in str(found.value)
    assert names(tmp_path) == []


def test_the_longest_name_has_room_for_its_companions(tmp_path):
    path = tmp_path / (255 * "n")
    with hold(path):
        replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_that_lets_nobody_write(tmp_path, monkeypatch):
    """As it would tell a user who is not root."""

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    replace_file(tmp_path / "f.pt", b"old")
    monkeypatch.setattr(replacing.os, "open", denied)
    with pytest.raises(PermissionError, match=r"f.pt cannot be written: Permission denied.*get permission"):
        replace_file(tmp_path / "f.pt", b"new")
    with pytest.raises(PermissionError, match=r"f.pt cannot be written: Permission denied"), hold(tmp_path / "f.pt"):
        pass
    assert (tmp_path / "f.pt").read_bytes() == b"old"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664])
def test_the_mode_stays(tmp_path, mode):
    path = tmp_path / "f.pt"
    replace_file(path, b"old")
    path.chmod(mode)
    replace_file(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_a_new_file_has_the_mode_of_new_files(tmp_path):
    replace_file(tmp_path / "f.pt", b"new")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "f.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    replace_file(tmp_path / "real" / "f.pt", b"old")
    (tmp_path / "link.pt").symlink_to("real/f.pt")
    replace_file(tmp_path / "link.pt", b"new")
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real" / "f.pt").read_bytes() == b"new"
    assert names(tmp_path / "real") == ["f.pt"]


def test_temporary_files_follow_no_link(tmp_path, monkeypatch):
    """Somebody who guesses the next name gets nothing written through a link that lies there."""
    (tmp_path / "victim").write_bytes(b"precious")
    monkeypatch.setattr(replacing.secrets, "token_hex", lambda n: "guessed")
    replacing.companion(tmp_path / "f.pt", "-guessed.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError, match=r"f.pt cannot be written"):
        replace_file(tmp_path / "f.pt", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_the_new_bytes_are_on_the_disk_before_they_have_the_name(tmp_path, monkeypatch):
    """And then the folder."""
    done = []
    fsync, replace = os.fsync, os.replace
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    monkeypatch.setattr(os, "fsync", lambda f: (done.append(kinds[stat.S_IFMT(os.fstat(f).st_mode)]), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("name"), replace(a, b)))
    replace_file(tmp_path / "f.pt", b"new")
    assert done == ["file", "name", "folder"]


def test_a_trial_changes_nothing(tmp_path):
    replace_file(tmp_path / "f.pt", b"old")
    replace_file(tmp_path / "f.pt", b"new", trial=True)
    assert (tmp_path / "f.pt").read_bytes() == b"old"
    assert names(tmp_path) == ["f.pt"]


def test_a_trial_of_a_new_file_needs_room_for_the_next_one_beside_it(tmp_path, monkeypatch):
    written = []
    write = os.write
    monkeypatch.setattr(replacing.os, "write", lambda file, data: (written.append(len(data)), write(file, data))[1])
    replace_file(tmp_path / "f.pt", b"new", trial=True)
    assert sum(written) == 6
    assert names(tmp_path) == []


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    """Starts code in a process of its own, and waits until it has printed a line."""
    with ExitStack() as stack:

        def start(code):
            code = f"{ALONE}\npath = {str(tmp_path / 'f.pt')!r}\n{code}"
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stdout.readline().strip() == "ready"
            return process

        yield start


WRITER = """
from pyro_vae.checkpoint import replacing
def stop(file):
    print("ready", flush=True)
    time.sleep(60)
replacing.os.fsync = stop
replacing.replace_file(path, b"half of it")
"""
HOLDER = """
from pyro_vae.checkpoint.held import hold
with hold(path):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_is_cleared_away_and_nothing_else(tmp_path, script):
    path = tmp_path / "f.pt"
    replace_file(path, b"old")
    first, second = script(WRITER), script(WRITER)
    replacing.companion(tmp_path / "other.pt", "-0123.partial").write_bytes(b"")
    assert len(names(tmp_path)) == 4
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert len(names(tmp_path)) == 3  # that of the other file, and that of the writer who is still at it
    second.send_signal(signal.SIGKILL)
    second.wait()
    replace_file(path, b"newer")
    assert len(names(tmp_path)) == 2


def test_a_file_that_is_held_is_refused(tmp_path, script):
    other = script(HOLDER)
    refused = rf"f.pt is being written by another fit, in process {other.pid}. Try another file"
    with pytest.raises(ValueError, match=refused), hold(tmp_path / "f.pt"):
        pass
    refused = rf"g.pt is being .* in process {os.getpid()}"
    with hold(tmp_path / "g.pt"), pytest.raises(ValueError, match=refused), hold(tmp_path / "g.pt"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with hold(tmp_path / "f.pt"):  # a process that has ended holds nothing
        pass
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked")
def test_workers_that_outlive_a_killed_process_hold_nothing(tmp_path, script):
    worker = (
        "r, w = os.pipe()\n    if not os.fork():\n        os.write(w, b'.')\n        time.sleep(3)\n        os._exit(0)"
    )
    other = script(HOLDER.replace("    print", f"    {worker}\n    os.read(r, 1)\n    print"))  # it is there
    other.send_signal(signal.SIGKILL)
    other.wait()
    start = time.monotonic()
    with hold(tmp_path / "f.pt"):
        assert time.monotonic() - start < 2
