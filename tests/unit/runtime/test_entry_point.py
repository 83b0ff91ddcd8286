"""Commands end with messages and exit codes, whatever happens to their output."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.errors import ConfigError, DataError, PeerLostError, StorageError
from megamask.runtime import entry_point, versions
from megamask.storage.workdir import processes

ROOT = Path(__file__).parents[3]
SCRIPTS = [ROOT / "megamask" / "pretrain.py", *sorted((ROOT / "tools").glob("*.py"))]
SLOW = {"torch", "transformers", "deepspeed", "datasets", "sentencepiece", "matplotlib"}
"""Libraries whose import takes long."""
PRINTS = """
import sys
from megamask.runtime import entry_point

entry_point.begin()

@entry_point.command
def main():
    print("\\u6587" * 100_000)
    print("\\udcff", "warned", file=sys.stderr)
    return 9

entry_point.run(main)
"""


def script(source: str, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, **how)


# ---- output


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_character_that_the_terminal_lacks_is_escaped(encoding: str) -> None:
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = script(PRINTS, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.communicate()
    shown = "文".encode(encoding, "backslashreplace")
    assert (done.returncode, out, err) == (9, shown * 100_000 + b"\n", b"\\udcff warned\n")


def test_a_closed_pipe_does_not_change_the_exit_code() -> None:
    done = script(PRINTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout.close()
    assert (done.wait(), done.stderr.read()) == (9, b"\\udcff warned\n")


def test_a_full_disk_does_not_change_the_exit_code() -> None:
    with open("/dev/full", "wb") as full:
        assert script(PRINTS, stdout=full, stderr=full).wait() == 9


def test_a_slow_reader_of_a_non_blocking_pipe_gets_all_output() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    done = script(PRINTS, stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        assert pipe.read() == "文" * 100_000 + "\n"
    assert done.wait() == 9


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    opened = PRINTS.replace("    return 9", f"    return open({str(tmp_path / 'data')!r}, 'w').fileno() + 20")
    done = subprocess.run(["bash", "-c", 'exec "$0" -c "$1" >&- 2>&- <&-', sys.executable, opened], cwd=ROOT)
    assert done.returncode > 22
    assert (tmp_path / "data").read_bytes() == b""


# ---- errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("kind", [OSError, RuntimeError], ids=lambda kind: kind.__name__)
def test_a_full_disk_is_a_storage_error(number: int, kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    @entry_point.command
    def main() -> int:
        words = os.strerror(number)
        raise OSError(number, words, "model") if kind is OSError else RuntimeError(f"I/O error: {words} (os error 1)")

    assert main() == StorageError.exit_code
    assert os.strerror(number) in capsys.readouterr().err


def test_errors_become_exit_codes_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    @entry_point.command
    def main(error: Exception) -> int:
        raise error

    assert main(DataError("One.", "Two.")) == DataError.exit_code
    assert main(PeerLostError()) == PeerLostError.exit_code
    assert capsys.readouterr().err == "One.\nTwo.\n"
    for bug in (ValueError("no problem of the user"), FileNotFoundError(errno.ENOENT, "gone", "name")):
        with pytest.raises(type(bug)):
            main(bug)


def test_an_error_of_all_ranks_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @entry_point.command
    def main() -> int:
        raise ConfigError("One.")

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main() == ConfigError.exit_code
    assert capsys.readouterr().err == "One.\n"


def test_an_error_is_printed_where_no_rank_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @entry_point.command
    def main() -> int:
        raise ConfigError("One.")

    monkeypatch.setenv("RANK", "x")
    assert main() == ConfigError.exit_code
    assert capsys.readouterr().err == "One.\n"


# ---- signals

STUCK = """
import sys, threading, time
from megamask.runtime import entry_point

entry_point.begin()

@entry_point.command
def main():
    try:
        print("begun")
        {work}
    finally:
        print("cleaned up")
    return 0

entry_point.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_command_after_its_cleanup(number: signal.Signals) -> None:
    done = script(
        STUCK.format(work="time.sleep(60)"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert done.stdout.readline() == b"begun\n"
    done.send_signal(number)
    out, err = done.communicate()
    assert (done.returncode, out, err) == (128 + number, b"cleaned up\n", b"Stopped.\n")


@pytest.mark.parametrize("work", ["exec('try: time.sleep(60)\\nexcept BaseException: time.sleep(60)')", "stuck()"])
def test_a_command_that_ignores_a_signal_is_ended(work: str) -> None:
    """`stuck` waits in C for another thread, as a library does that trains a tokenizer, and runs no Python."""
    stuck = "import ctypes\nstuck = lambda: ctypes.CDLL(None).sleep(60) or ctypes.CDLL(None).sleep(60)\n"
    done = script(stuck + STUCK.format(work=work), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout.readline() == b"begun\n"
    done.send_signal(signal.SIGTERM)
    assert done.wait(timeout=30) == 143
    assert done.stderr.read() == b"Stopped.\n"


def test_a_stop_does_not_wait_for_the_end_of_the_interpreter() -> None:
    """The interpreter exit takes seconds if libraries have much to clean up, and no thread can interrupt it."""
    slow = "import atexit, time\natexit.register(time.sleep, 3600)\n"
    done = script(slow + STUCK.format(work="time.sleep(60)"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout.readline() == b"begun\n"
    done.send_signal(signal.SIGTERM)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out, err) == (143, b"cleaned up\n", b"Stopped.\n")


# ---- worker processes


def _asleep(path: Path) -> None:
    path.write_text(str(os.getpid()))
    signal.pause()


def _nothing() -> None:
    pass


def test_workers_are_killed_when_their_caller_stops(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), processes(1, _nothing) as pool:
        pool.submit(_asleep, tmp_path / "pid")
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            pass
        worker = int((tmp_path / "pid").read_text())
        for number in (signal.SIGINT, signal.SIGTERM):  # those are for the caller to hear
            os.kill(worker, number)
        assert Path(f"/proc/{worker}").exists()
        raise KeyboardInterrupt
    assert not Path(f"/proc/{worker}").exists()


# ---- every command


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_names_the_supported_python_versions(path: Path) -> None:
    """In an isolated Python without packages that reports an old version."""
    old = f"import sys, runpy; sys.version_info = (3, 10, 13); runpy.run_path({str(path)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", old], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (ConfigError.exit_code, "")
    assert done.stderr.startswith("megamask runs on Python 3.11 to 3.13, but this is Python 3.10 (")


@pytest.mark.parametrize(("version", "runs"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_supported_python_versions_match_pyproject(version: tuple[int, int], runs: bool) -> None:
    if runs:
        return versions.check_python(version)
    with pytest.raises(SystemExit) as ended:
        versions.check_python(version)
    assert ended.value.code == ConfigError.exit_code


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_printed_without_torch(path: Path) -> None:
    """The import of torch takes longer than everything else in `--help`."""
    source = f"""
import atexit, os, runpy, sys
atexit.register(lambda: print({SLOW!r} & set(sys.modules)))
os._exit = sys.exit  # which skips what is registered
sys.argv = [{str(path)!r}, "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "set()", "")
    assert "usage" in done.stdout


def test_text_is_prepared_without_torch() -> None:
    """torch would take memory in every worker process."""
    source = f"import sys, megamask.data.prepare; print({SLOW!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_the_list_of_subcommands_imports_no_library() -> None:
    source = "import sys, megamask.__main__ as m; m.main([]); print({'tyro', 'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("set()", "")


@pytest.mark.parametrize("flag", ["--help", "--list-recipes"])
def test_printing_commands_end_silently_at_a_closed_pipe(flag: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"$0" "$1" {flag} | head -1; echo "${{PIPESTATUS[0]}}"', sys.executable, str(SCRIPTS[0])],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[1:] == ["0"] and done.stderr == ""
