"""A dozen operations of redis-py through a sidecar: smoke.py PORT sentinel|cluster. Says `ok` at the end."""

import asyncio
import sys
import time

import redis
import redis.asyncio
from redis.cache import CacheConfig
from redis.cluster import RedisCluster
from redis.connection import CacheProxyConnection
from redis.sentinel import Sentinel

PORT, TOPOLOGY = int(sys.argv[1]), sys.argv[2]
ADDRESS = ("127.0.0.1", PORT)
# How often a message is published until it is heard: nodes of a Cluster drop it for peers that they have no connection to just then.
ATTEMPTS = 10


def same(actual, expected):
    assert actual == expected, f"{actual!r} is not {expected!r}"


def clients():
    yield redis.Redis(*ADDRESS)
    yield redis.Redis(*ADDRESS, protocol=3, client_name="smoke", username="any", password="any")
    yield Sentinel([ADDRESS]).master_for("main")
    if TOPOLOGY == "sentinel":
        yield redis.Redis(*ADDRESS, db=3)
    else:
        yield RedisCluster(*ADDRESS)


def run(client):
    keys = [f"{{smoke}}:{name}" for name in ("text", "number", "hash", "list", "set", "zset", "binary")]
    text, number, hashed, listed, members, scored, binary = keys
    client.delete(*keys)
    same(client.ping(), True)
    same(client.set(text, "value", ex=100), True)
    same(client.get(text), b"value")
    assert 0 < client.ttl(text) <= 100
    if not isinstance(client, RedisCluster):  # which refuses keys of several slots by itself
        same(client.mset({"smoke:a": 1, "smoke:b": 2, "smoke:c": 3}), True)
        same(client.mget("smoke:a", "smoke:none", "smoke:c"), [b"1", None, b"3"])
    same(client.incrby(number, 5), 5)
    same(client.hset(hashed, mapping={"a": 1, "b": 2}), 2)
    same(client.hgetall(hashed), {b"a": b"1", b"b": b"2"})
    same(client.rpush(listed, "a", "b", "c"), 3)
    same(client.lrange(listed, 0, -1), [b"a", b"b", b"c"])
    same(list(client.blpop([listed], timeout=1)), [listed.encode(), b"a"])
    same(client.sadd(members, "x", "y"), 2)
    same(client.smembers(members), {b"x", b"y"})
    same(client.zadd(scored, {"one": 1, "two": 2.5}), 2)
    same([tuple(pair) for pair in client.zrange(scored, 0, -1, withscores=True)], [(b"one", 1.0), (b"two", 2.5)])
    same(client.set(binary, bytes(range(256)) * 1000), True)
    same(client.get(binary), bytes(range(256)) * 1000)
    same(client.pipeline(transaction=False).get(text).incr(number).execute(), [b"value", 6])
    same(client.pipeline(transaction=True).incr(number).get(number).execute(), [7, b"7"])
    same(client.eval("return redis.call('GET', KEYS[1])", 1, text), b"value")
    assert text.encode() in set(client.scan_iter(match="{smoke}:*"))
    try:
        client.lpush(text, "x")
    except redis.ResponseError as error:
        assert "WRONGTYPE" in str(error), error
    else:
        raise AssertionError("LPUSH on a string succeeded")
    same(client.delete(*keys), 7)


def subscribe(client):
    subscription = client.pubsub()
    subscription.subscribe("smoke:news")
    same(subscription.get_message(timeout=5)["type"], "subscribe")
    message = None
    for _ in range(ATTEMPTS):
        client.publish("smoke:news", "hello")
        message = subscription.get_message(timeout=1)
        if message is not None:
            break
    same(message["data"], b"hello")
    subscription.close()


def keep():
    """The client's own cache. It asks for a server's name and version, and uses nothing that older ones, or Valkey, have not."""
    with redis.Redis(*ADDRESS, protocol=3) as plain:
        CacheProxyConnection.DEFAULT_SERVER_NAME = plain.execute_command("HELLO", 3)[b"server"].decode()
    CacheProxyConnection.MIN_ALLOWED_VERSION = "7.0.0"
    with redis.Redis(*ADDRESS, protocol=3, cache_config=CacheConfig()) as keeping, redis.Redis(*ADDRESS) as writer:
        for number in range(30):
            writer.set("smoke:kept", number)
            deadline = time.monotonic() + 10
            while keeping.get("smoke:kept") != str(number).encode():
                assert time.monotonic() < deadline, "an old value is kept"
        same(keeping.get_cache().size, 1)
        assert keeping.mget("smoke:kept", "smoke:none") == [b"29", None]
        writer.delete("smoke:kept")
        deadline = time.monotonic() + 10
        while keeping.get("smoke:kept") is not None:
            assert time.monotonic() < deadline, "a deleted value is kept"


async def run_async():
    client = redis.asyncio.Redis(host=ADDRESS[0], port=PORT)
    same(await client.set("smoke:async", "value"), True)
    same(await asyncio.gather(*(client.get("smoke:async") for _ in range(50))), [b"value"] * 50)
    async with client.pipeline(transaction=True) as pipe:
        same(await pipe.incr("smoke:count").delete("smoke:count").execute(), [1, 1])
    async with client.pubsub() as subscription:
        await subscription.subscribe("smoke:news")
        same((await subscription.get_message(timeout=5))["type"], "subscribe")
        message = None
        for _ in range(ATTEMPTS):
            await client.publish("smoke:news", "hello")
            message = await subscription.get_message(timeout=1)
            if message is not None:
                break
        same(message["data"], b"hello")
    same(await client.delete("smoke:async"), 1)
    await client.aclose()


for each in clients():
    run(each)
    each.close()
with redis.Redis(*ADDRESS) as plain:
    subscribe(plain)
keep()
asyncio.run(run_async())
print("ok")
