"""A Django site as its documentation has it: one view behind cache_page, one that uses the cache by hand, and Django's own Redis backend.

REDIS_URL is where the cache is, PORT where it serves (8080).
"""
import itertools
import os
import sys

import django
from django.conf import settings
from django.core.cache import cache
from django.core.management import execute_from_command_line
from django.http import JsonResponse
from django.urls import path
from django.views.decorators.cache import cache_page

settings.configure(
    ALLOWED_HOSTS=["*"],
    CACHES={
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": os.environ["REDIS_URL"],
            "KEY_PREFIX": "site",
        }
    },
    DEBUG=False,
    ROOT_URLCONF=__name__,
    SECRET_KEY="tests",
)
django.setup()
made = itertools.count(1)


@cache_page(60)
def page(request):
    return JsonResponse({"made": next(made)})


def visits(request):
    cache.add("visits", 0, timeout=60)
    return JsonResponse({"visits": cache.incr("visits"), "many": cache.get_many(["visits", "none"])})


urlpatterns = [path("page", page), path("visits", visits)]

if __name__ == "__main__":
    execute_from_command_line([sys.argv[0], "runserver", "--noreload", f"0.0.0.0:{os.environ.get('PORT', '8080')}"])
