"""Cache-aside with Larder's tokens: at most one load per key, and nothing outdated is stored, also on shared connections.

    cache = LarderCache(redis.Redis())
    user = cache.get_or_load("user:7", lambda: database.user(7))
"""
import json
import os
import time

import redis


class LarderCache:
    """Values as JSON, by keys that a CacheAside rule covers. `patience`: seconds until a load by another client is not waited for."""

    def __init__(self, client: redis.Redis, patience: float = 2.0):
        self.client = client
        self.patience = patience

    def get_or_load(self, key: str, load, ttl: float | None = None):
        """The cached value, or what `load()` gives. `ttl` in seconds; None: the rule's."""
        deadline = time.monotonic() + self.patience
        while True:
            left = max(0, int((deadline - time.monotonic()) * 1000))
            word, value, token = self.client.execute_command("LARDER.FETCH", key, "WAIT", left)
            if word in (b"value", "value", b"stale", "stale"):
                return json.loads(value)
            if word in (b"load", "load") or time.monotonic() >= deadline:
                return self._load(key, load, token, ttl)
            time.sleep(0.02)  # on a shared connection nobody is kept waiting

    def _load(self, key, load, token, ttl):
        value = load()
        text = json.dumps(value)
        px = [] if ttl is None else ["PX", int(ttl * 1000)]
        if token is None:  # no lease to be had: stored as any other client would
            self.client.execute_command("SET", key, text, *px)
        else:  # nil where the key was written or invalidated meanwhile: then this value may be outdated, and is not stored
            self.client.execute_command("LARDER.FILL", key, token, text, *px)
        return value

    def invalidate(self, *keys: str) -> int:
        """Forgets keys; loads that are under way are not stored."""
        return self.client.execute_command("LARDER.INVALIDATE", *keys)


if __name__ == "__main__":
    cache = LarderCache(redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")))
    for attempt in range(2):
        start = time.perf_counter()
        found = cache.get_or_load("cart:7", lambda: time.sleep(0.2) or {"items": 3})
        print(f"cart:7 = {found} ({(time.perf_counter() - start) * 1000:.1f} ms)")
