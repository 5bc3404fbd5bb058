"""Tasks -> encoded documents, on every core, in order. Read next: prepare/shards.py, which writes them."""

import collections
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np

import tokenizer

worker = {}  # what a worker process holds: the job, the tokenizer, the folder for its files


def begin(job, folder, scratch):
    worker.update(job=job, tok=tokenizer.load(folder), scratch=scratch)


def begin_process(*what):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism: no pool of threads in each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    parent = multiprocessing.parent_process()  # and if it is killed, nobody would
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    begin(*what)


def work(number, task):
    """job(task, tok, out, count) writes uint32 ids to `out` -> [(tokens, bytes, split)] of its documents, split 0 train, 1 val."""
    count = collections.Counter()
    with open(os.path.join(worker["scratch"], str(number)), "wb") as out:
        docs = worker["job"](task, worker["tok"], out, count)
    return np.array(docs, dtype=np.int64).reshape(-1, 3), count


def encoded(todo, job, folder, scratch, workers):
    """(number, task, size) -> in the same order (number, task, size, path of its ids, documents, counts), on all workers."""
    pool = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_process, (job, folder, scratch)) if workers > 1 else None
    )
    waiting = collections.deque()
    if not pool:
        begin(job, folder, scratch)

    def first():
        number, task, size, result = waiting.popleft()
        path = os.path.join(scratch, str(number))
        yield number, task, size, path, *(result.result() if pool else result)
        if os.path.exists(path):
            os.unlink(path)

    try:
        for number, task, size in todo:
            waiting.append((number, task, size, pool.submit(work, number, task) if pool else work(number, task)))
            if len(waiting) > (2 * workers if pool else 0):
                yield from first()
        while waiting:
            yield from first()
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
