"""Django's own tests of its Redis cache backend, against the port given: prints what ran, what was skipped and what failed, as JSON.

    run.py PORT together     all in this process, one after the other, as Django's runner does
    run.py PORT apart        each in a process of its own, whose connections end with it
    run.py PORT prefixed     the same, and each with a KEY_PREFIX of its own

scripts/setup installs Django and unpacks the tests of the same release into .cache/django."""
import importlib
import io
import json
import os
import pathlib
import select
import signal
import sys
import time
import unittest

TESTS = pathlib.Path(__file__).parents[3] / ".cache" / "django" / "tests"
sys.path.insert(0, str(TESTS))

import django  # noqa: E402
from django.conf import settings  # noqa: E402

# A test that takes longer counts as failed. The longest waits for keys to expire, for some seconds.
LIMIT_S = 60
SUITE = "cache.tests.RedisCacheTests"

_, port, manner = sys.argv
settings.configure(
    CACHES={
        "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
        "redis": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": f"redis://127.0.0.1:{port}",
        },
    },
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sites", "cache"],
    ROOT_URLCONF="urls",
    SECRET_KEY="tests",
    USE_TZ=False,
)
django.setup()

from django.test.utils import get_runner, setup_test_environment  # noqa: E402


def names(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from names(test)
        else:
            yield test.id().rsplit(".", 1)[1]


def run(tests):
    """What comes of these tests, by name."""
    suite = unittest.defaultTestLoader.loadTestsFromName(tests)
    found = {"ran": [], "skipped": {}, "failed": {}}
    found["ran"] = list(names(suite))
    result = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0).run(suite)
    found["skipped"] = {test.id().rsplit(".", 1)[1]: reason for test, reason in result.skipped}
    for test, text in result.failures + result.errors:
        found["failed"][test.id().rsplit(".", 1)[-1]] = text.strip().splitlines()[-1]
    if result.testsRun != len(found["ran"]):
        found["failed"]["all"] = f"{result.testsRun} ran"
    found["ran"] = [name for name in found["ran"] if name not in found["skipped"]]
    return found


def run_apart(name):
    """What comes of one test in a process of its own. It is forked before any connection is made, and its connections end with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            if manner == "prefixed":
                settings.CACHES["redis"]["KEY_PREFIX"] = name
            # Django's tests read the settings, and what process they are in, when they are imported.
            importlib.import_module("cache.tests")
            with os.fdopen(writer, "w") as out:
                json.dump(run(f"{SUITE}.{name}"), out)
        finally:
            os._exit(0)
    os.close(writer)
    told, end = b"", time.monotonic() + LIMIT_S
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0] and (more := pipe.read(65536)):
            told += more
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return json.loads(told)
    except ValueError:
        return {"ran": [name], "skipped": {}, "failed": {name: f"no result within {LIMIT_S} s, or its process ended"}}


setup_test_environment()
runner = get_runner(settings)(verbosity=0, interactive=False)
databases = runner.setup_databases()
if manner == "together":
    found = run(SUITE)
else:
    tests = list(names(unittest.defaultTestLoader.loadTestsFromName(SUITE)))
    del sys.modules["cache.tests"]
    found = {"ran": [], "skipped": {}, "failed": {}}
    for test in tests:
        of_test = run_apart(test)
        found["ran"] += of_test["ran"]
        found["skipped"] |= of_test["skipped"]
        found["failed"] |= of_test["failed"]
runner.teardown_databases(databases)
print(json.dumps(found))
