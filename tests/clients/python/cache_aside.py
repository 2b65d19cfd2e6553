"""Runs examples/cache-aside/distributed_cache.py against the port given, and prints what came of each of its faults as JSON."""
import json
import pathlib
import sys
import threading
import time

import redis

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "cache-aside"
sys.path.insert(0, str(EXAMPLE))
from distributed_cache import DistributedCache, cached  # noqa: E402

CALLERS = 30
# The usual pool lends the connection returned last: a latecomer's GET goes over the one whose GET was told to load.
client = redis.Redis(port=int(sys.argv[1]), socket_timeout=20)
cache = DistributedCache(client)


def stampede():
    """How many of many callers at once load the same key."""
    loads = []
    together = threading.Barrier(CALLERS)

    @cached(cache, "user:{0}")
    def user(number):
        loads.append(number)
        time.sleep(0.5)
        return {"id": number}

    def call():
        together.wait()
        assert user(1) == {"id": 1}

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return len(loads)


def late_set():
    """What is cached after a load that outlasted an invalidation."""
    database = {"2": "old"}
    loading, invalidated = threading.Event(), threading.Event()

    @cached(cache, "user:{0}")
    def user(number):
        row = database[number]
        loading.set()
        assert invalidated.wait(20)
        return row

    loader = threading.Thread(target=user, args=("2",))
    loader.start()
    assert loading.wait(20)
    database["2"] = "new"
    cache.delete("user:2")
    invalidated.set()
    loader.join()
    return cache.get("user:2")


def pattern():
    """What invalidate_pattern gives."""
    cache.set("user:3", "x")
    try:
        return cache.invalidate_pattern("user:3*")
    except redis.ResponseError as refused:
        return str(refused)


found = {"loads": stampede(), "ttl": client.ttl("user:1"), "late": late_set(), "pattern": pattern()}
print(json.dumps(found))
