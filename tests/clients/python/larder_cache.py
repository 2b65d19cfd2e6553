"""Runs examples/clients/python/larder_cache.py against the port given, and prints what came of it as JSON."""
import json
import pathlib
import sys
import threading
import time

import redis

EXAMPLES = pathlib.Path(__file__).parents[3] / "examples" / "clients" / "python"
sys.path.insert(0, str(EXAMPLES))
from larder_cache import LarderCache  # noqa: E402

CALLERS = 30
client = redis.Redis(port=int(sys.argv[1]), socket_timeout=20)
cache = LarderCache(client, patience=15.0)


def stampede():
    """How many of many callers at once load the same key, and what they get."""
    loads, found = [], []
    together = threading.Barrier(CALLERS)

    def load():
        loads.append(1)
        time.sleep(0.5)
        return {"items": 3}

    def call():
        together.wait()
        found.append(cache.get_or_load("cart:1", load))

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [{"items": 3}] * CALLERS, found
    return len(loads)


def late_fill():
    """What is cached after a load that outlasted an invalidation."""

    def load():
        cache.invalidate("cart:2")
        return "old"

    assert cache.get_or_load("cart:2", load) == "old"
    return client.get("cart:2")


def uncovered():
    """What is cached under a key without a rule."""
    assert cache.get_or_load("other:1", lambda: "x", ttl=100) == "x"
    return json.loads(client.get("other:1"))


found = {"loads": stampede(), "ttl": client.ttl("cart:1"), "late": late_fill(), "uncovered": uncovered()}
print(json.dumps(found))
