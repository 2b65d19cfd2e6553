"""A cache as many teams write it, with plain redis-py. Against a bare Redis it has four faults:

- stampede: when a key expires, everybody who misses it loads it;
- no TTL: a value that is set without one stays until somebody deletes it;
- KEYS: invalidate_pattern walks all keys of a shared server, and holds up everybody else meanwhile;
- late set: a load that began before an invalidation stores the old value after it.

Through a Larder sidecar, under the policy beside this file, the same code has none of them.
"""
import functools
import json
import os
import sys
import time

import redis


class DistributedCache:
    """Values as JSON in Redis."""

    def __init__(self, client: redis.Redis):
        self.client = client

    def get(self, key: str):
        """The value, or None."""
        text = self.client.get(key)
        return None if text is None else json.loads(text)

    def set(self, key: str, value, ttl: int | None = None):
        """Stores a value. `ttl` in seconds; None: for good."""
        self.client.set(key, json.dumps(value), ex=ttl)

    def delete(self, key: str):
        """Forgets a value."""
        self.client.delete(key)

    def invalidate_pattern(self, pattern: str) -> int:
        """Forgets all values whose keys match."""
        keys = self.client.keys(pattern)
        return self.client.delete(*keys) if keys else 0


def cached(cache: DistributedCache, key: str, ttl: int | None = None):
    """Caches a function's results under `key`, in which {0} stands for its first argument."""

    def decorate(function):
        @functools.wraps(function)
        def call(*args):
            name = key.format(*args)
            value = cache.get(name)
            if value is None:
                value = function(*args)
                cache.set(name, value, ttl)
            return value

        return call

    return decorate


if __name__ == "__main__":
    cache = DistributedCache(redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")))

    @cached(cache, "user:{0}")
    def user(number):
        time.sleep(0.2)  # the database
        return {"id": number}

    for number in sys.argv[1:]:
        print(user(number), "TTL", cache.client.ttl(f"user:{number}"))
