"""`share_out`: work for several threads, results in order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from brim.checkpoints.scratch import Scratch

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 64
"""Items for each worker that may have begun or wait: the threads go on for a second or so while results are used."""


def share_out(
    items: Iterable[Item], work: Callable[[Item, Scratch], Result], *, workers: int
) -> Generator[Result, None, None]:
    """`work(item, memory)` of every item, in order; done by threads, each with memory of its own.

    An error comes in its place, after the results of all items before it; closing ends the work.
    """
    own = threading.local()

    def begin() -> None:
        own.scratch = Scratch()

    def done(item: Item) -> Result:
        return work(item, own.scratch)

    pool = ThreadPoolExecutor(workers, initializer=begin)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(done, item))
            if len(under_way) > _AHEAD * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
