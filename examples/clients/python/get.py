"""Reads keys through a Larder sidecar with plain redis-py: python get.py user:1 user:2"""
import os
import sys
import time

import redis

client = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"), decode_responses=True)
for key in sys.argv[1:]:
    start = time.perf_counter()
    value = client.get(key)  # a miss is loaded by the sidecar
    print(f"{key} = {value} ({(time.perf_counter() - start) * 1000:.1f} ms)")
