"""Django's own tests of its Redis cache backend, against the port given: prints how many ran and which failed, as JSON.

scripts/setup installs Django and unpacks the tests of the same release into .cache/django."""
import io
import json
import pathlib
import sys
import unittest

TESTS = pathlib.Path(__file__).parents[3] / ".cache" / "django" / "tests"
sys.path.insert(0, str(TESTS))

import django  # noqa: E402
from django.conf import settings  # noqa: E402

settings.configure(
    CACHES={
        "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
        "redis": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": f"redis://127.0.0.1:{sys.argv[1]}",
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

setup_test_environment()
runner = get_runner(settings)(verbosity=0, interactive=False)
databases = runner.setup_databases()
suite = unittest.defaultTestLoader.loadTestsFromName("cache.tests.RedisCacheTests")
result = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0).run(suite)
runner.teardown_databases(databases)
failed = {test.id().rsplit(".", 1)[1]: text.strip().splitlines()[-1] for test, text in result.failures + result.errors}
print(json.dumps({"ran": result.testsRun, "failed": failed}))
