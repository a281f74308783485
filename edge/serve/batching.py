"""Texts of requests that come at the same time are run together, one text a core.

A text runs by itself, whatever its company (:class:`edge.Encoder`): what is gained is that cores are not idle and
threads hand over once a batch, not once a text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from edge.encoder import Encoder

T = TypeVar("T")
_SHARE = 8  # texts that a request puts into a batch before another one's turn comes


class _Job:
    """A request's texts, what is done with each, and what has come of them."""

    def __init__(self, function: Callable[[str], Any], texts: Sequence[str], future: asyncio.Future[list[Any]]) -> None:
        self.function = function
        self.texts = texts
        self.future = future
        self.results: list[Any] = [None] * len(texts)
        self.begun = 0
        self.left = len(texts)

    def run(self, place: int) -> Exception | None:
        """Do one text, in any thread; what went wrong."""
        try:
            self.results[place] = self.function(self.texts[place])
        except Exception as error:  # of this request alone
            return error
        return None


class Batcher:
    """Runs functions on texts, batch by batch. For one event loop.

    Attributes:
        waiting: Texts that are not begun.
    """

    def __init__(self, encoder: Encoder, most: int, wait: float, told: Callable[[int], None]) -> None:
        """Begin nothing yet.

        Args:
            encoder: Whose :meth:`edge.Encoder.each` runs a batch.
            most: Texts of a batch.
            wait: Seconds that the first text of a batch waits for others.
            told: Called with the size of each batch.
        """
        self.waiting = 0
        self._encoder = encoder
        self._most = most
        self._wait = wait
        self._told = told
        self._jobs: deque[_Job] = deque()
        self._task: asyncio.Task[None] | None = None  # runs while there are jobs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ruvltra-batch")

    async def each(self, function: Callable[[str], T], texts: Sequence[str]) -> list[T]:
        """What a function gives for each text, in their order; the first error of any of them is raised.

        A request that is cancelled meanwhile takes its texts that are not begun with it.
        """
        if not texts:
            return []
        job = _Job(function, texts, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.waiting += len(texts)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return cast("list[T]", await job.future)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._jobs:
            if self._wait and self.waiting < self._most:
                await asyncio.sleep(self._wait)
            batch = self._next()
            if not batch:
                continue
            self._told(len(batch))
            errors = await loop.run_in_executor(self._thread, self._do, batch)
            for (job, _), error in zip(batch, errors, strict=True):
                job.left -= 1
                if job.future.done():
                    continue
                if error is not None:
                    job.future.set_exception(error)
                elif not job.left:
                    job.future.set_result(job.results)

    def _next(self) -> list[tuple[_Job, int]]:
        """The next batch: from each request in turn some texts."""
        batch: list[tuple[_Job, int]] = []
        while self._jobs and len(batch) < self._most:
            job = self._jobs.popleft()
            if job.future.done():  # its client has gone, or one of its texts has failed
                self.waiting -= len(job.texts) - job.begun
                continue
            end = min(len(job.texts), job.begun + min(_SHARE, self._most - len(batch)))
            batch += [(job, place) for place in range(job.begun, end)]
            self.waiting -= end - job.begun
            job.begun = end
            if end < len(job.texts):
                self._jobs.append(job)
        return batch

    def _do(self, batch: list[tuple[_Job, int]]) -> list[Exception | None]:
        if len(batch) == 1:
            return [batch[0][0].run(batch[0][1])]
        return self._encoder.each(lambda one: one[0].run(one[1]), batch)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown()
