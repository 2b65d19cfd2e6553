"""Says that keys, or a tag, have changed, with plain redis-py: python announce.py key user:42 tag faces"""
import os
import sys

import redis

client = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"), decode_responses=True)
words = sys.argv[1:]
for kind, what in zip(words[::2], words[1::2]):
    print(client.xadd("larder:events", {kind: what}))
