"""Ranks that are forks of this process and talk through pipes: they start in milliseconds, and each can die alone.

They stand in for torch.distributed where only storage is under test. Who loses a peer gets an error, as with gloo.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megamask.errors import MegamaskError
from megamask.runtime import ranks
from tests.processes.server import Place, Server, environment

Tell = Callable[[str], None]


class Alone(RuntimeError):
    """A peer has died."""


@dataclass
class Team:
    """Forked ranks and the pipe into which they tell."""

    pids: list[int]
    messages: int

    def hear(self, timeout: float = 60) -> str:
        """The messages since the last call; waits for one, or for the end of all ranks.

        After ``timeout`` seconds the ranks are aborted, which is an error.
        """
        if not select.select([self.messages], [], [], timeout)[0]:
            self.kill(which=signal.SIGABRT)
            raise AssertionError(f"no rank sent a message for {timeout} s")
        return os.read(self.messages, 1 << 16).decode()

    def kill(self, rank: int | None = None, which: signal.Signals = signal.SIGKILL) -> None:
        """A signal to one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, which)

    def end(self, timeout: float = 60, *, hangs: bool = False) -> tuple[str, list[int]]:
        """The last messages, and how each rank ended (negative: the signal).

        Who has not ended after ``timeout`` seconds is killed, as a launcher would; an error unless it may hang.
        """
        until, hung = time.monotonic() + timeout, []
        for pid in self.pids:
            handle = os.pidfd_open(pid)
            if not select.select([handle], [], [], max(0, until - time.monotonic()))[0]:
                hung.append(pid)
                os.kill(pid, signal.SIGKILL)
            os.close(handle)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        parts = []
        while part := os.read(self.messages, 1 << 16):  # all writers are gone, so it ends
            parts.append(part)
        os.close(self.messages)
        if hung and not hangs:
            raise AssertionError(f"{len(hung)} of {len(self.pids)} ranks hung for {timeout} s")
        return b"".join(parts).decode(), codes


def fork(world: int, act: Callable[[Tell], object], port: int = 0) -> Team:
    """Let ``world`` ranks do ``act``; each gets a function that tells its words to the caller.

    With a ``port`` they are to meet there as ranks of torch.distributed, and the pipes are not used.
    """
    messages, telling = os.pipe()
    pairs = [Pipe() for _ in range(world - 1)]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            os.close(messages)
            own_pairs = [hub for hub, _ in pairs] if rank == 0 else [pairs[rank - 1][1]]
            for end in (end for pair in pairs for end in pair if end not in own_pairs):
                end.close()  # or the death of a peer would not be seen
            _be(rank, world, port, own_pairs, act, lambda words: os.write(telling, words.encode()))
        pids.append(pid)
    os.close(telling)
    for pair in pairs:
        for end in pair:
            end.close()
    return Team(pids, messages)


def _be(rank: int, world: int, port: int, ends: list[Connection], act: Callable[[Tell], object], tell: Tell) -> None:
    code = 1
    try:
        os.environ |= environment(rank, world, port)

        def gather(value: Any) -> list[Any]:
            try:
                if rank:
                    ends[0].send(value)
                    return ends[0].recv()
                values = [value, *(end.recv() for end in ends)]
                for end in ends:
                    end.send(values)
                return values
            except (EOFError, OSError):
                raise Alone from None

        def by_main(act: Callable[[], Any]) -> Any:
            answer = None
            if rank == 0:
                try:
                    answer = (act(), None)
                except Exception as error:
                    answer = (None, error)
            answer, error = gather(answer)[0]
            if error is not None:
                raise error
            return answer

        if not port:
            ranks.gather, ranks.on_rank_zero, ranks.barrier = gather, by_main, lambda: gather(None)
            ranks.any_rank = lambda flag: any(gather(flag))
        act(tell)
        code = 0
    except MegamaskError as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except Alone:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


Apart = Callable[..., Any]


def apart(server: Server, target: str, folder: Path, **given: object) -> Any:
    """What ``target`` ("module:function"), called with ``folder`` and ``given``, returns in a process of its own.

    Where namespaces are allowed it works on a disk in memory, and may mount what it likes.
    """
    work, log, answer = folder / "work", folder / "log.txt", folder / "answer.json"
    work.mkdir()
    place = Place(environment(0, 1, 0), os.getcwd(), str(log), str(answer), str(work) if server.mounts else "")
    server.start(target, given | {"folder": str(work)}, [place])
    ended = server.ended()
    assert ended == (0, 0), f"{target}: {ended}\n{log.read_text()}"
    return json.loads(answer.read_text())
