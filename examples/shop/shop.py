"""A catalogue behind a cache, as many teams write it: cache-aside with plain redis-py, and Postgres. Nothing in it knows of Larder.

    python shop.py prepare    makes the table and fills it, where that is not done yet
    python shop.py            serves at port 8080

    GET /products/7           the product, as JSON
    PUT /products/7           {"price": 1250, "version": 3}: the price that whoever reads it afterwards is told, where 3 is its version
    GET /healthz

DATABASE_URL says where Postgres is, REDIS_URL where the cache is; without that every request asks the database. PORT, PRODUCTS, PAGE_KIB
(how long a product's text is) and QUERY_SECONDS (how long its query takes, beside what it takes anyway) may be given.
"""
import contextlib
import json
import os
import queue
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg
import redis

PRODUCTS = int(os.environ.get("PRODUCTS", "1000"))
PAGE_KIB = int(os.environ.get("PAGE_KIB", "1"))
QUERY_SECONDS = float(os.environ.get("QUERY_SECONDS", "0.02"))

TABLE = """
CREATE TABLE IF NOT EXISTS products (id integer PRIMARY KEY, name text NOT NULL, price integer NOT NULL, version integer NOT NULL)
"""
ROWS = """
INSERT INTO products SELECT id, 'product ' || id, (id * 7919 + 31) %% 100000, 1 FROM generate_series(1, %s) AS id
ON CONFLICT DO NOTHING
"""
# pg_sleep stands for what a real one joins and sums.
READ = """
SELECT id, name, price, version, repeat(md5(id || ':' || version), %s) AS text FROM products, pg_sleep(%s) WHERE id = %s
"""
WRITE = "UPDATE products SET price = %s, version = version + 1 WHERE id = %s AND version = %s RETURNING version"


class Database:
    """A few connections, which are made anew when they are lost."""

    def __init__(self, url: str, size: int = 8):
        self.url = url
        self.idle = queue.LifoQueue()
        for _ in range(size):
            self.idle.put(None)

    @contextlib.contextmanager
    def connection(self):
        connection = self.idle.get()
        try:
            if connection is None or connection.closed:
                connection = psycopg.connect(self.url, autocommit=True, connect_timeout=5)
            yield connection
        finally:
            self.idle.put(connection)

    def row(self, query: str, *parameters):
        with self.connection() as connection:
            return connection.execute(query, parameters).fetchone()

    def product(self, number: int):
        row = self.row(READ, PAGE_KIB * 32, QUERY_SECONDS, number)
        return None if row is None else dict(zip(("id", "name", "price", "version", "text"), row))


class Cache:
    """Values as JSON in Redis, or none at all."""

    def __init__(self, url: str | None):
        self.client = redis.Redis.from_url(url) if url else None

    def get(self, key: str):
        text = self.client.get(key) if self.client else None
        return None if text is None else json.loads(text)

    def set(self, key: str, value):
        if self.client:
            self.client.set(key, json.dumps(value))  # no TTL: many forget it

    def delete(self, key: str):
        if self.client:
            self.client.delete(key)


class Shop:
    def __init__(self, database: Database, cache: Cache):
        self.database = database
        self.cache = cache

    def product(self, number: int):
        key = f"product:{number}"
        product = self.cache.get(key)
        if product is None:
            product = self.database.product(number)
            if product is not None:
                self.cache.set(key, product)
        return product

    def reprice(self, number: int, price: int, version: int):
        row = self.database.row(WRITE, price, number, version)
        if row is not None:
            self.cache.delete(f"product:{number}")
        return None if row is None else {"id": number, "version": row[0]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer leaves in one piece.
    wbufsize = -1
    disable_nagle_algorithm = True
    shop: Shop

    def do_GET(self):
        if self.path == "/healthz":
            return self.answer(200, {"ok": True})
        self.about_product(lambda number: self.shop.product(number))

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked = json.loads(body)
        self.about_product(lambda number: self.shop.reprice(number, int(asked["price"]), int(asked["version"])))

    def about_product(self, action):
        kind, _, number = self.path.strip("/").partition("/")
        if kind != "products" or not (number.isascii() and number.isdigit() and len(number) < 10):
            return self.answer(404, {"error": "no such page"})
        try:
            found = action(int(number))
        except Exception as error:  # whatever went wrong, the next request is answered
            what = f"{type(error).__name__}: {error}"
            print(f"error: {self.command} {self.path}: {what}", file=sys.stderr, flush=True)
            return self.answer(500, {"error": what})
        self.answer(404 if found is None else 200, found or {"error": "no such product, or of another version"})

    def answer(self, status: int, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Requests are not logged."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    database = Database(os.environ["DATABASE_URL"])
    if sys.argv[1:] == ["prepare"]:
        with database.connection() as connection:
            connection.execute(TABLE)
            connection.execute(ROWS, (PRODUCTS,))
        return
    Handler.shop = Shop(database, Cache(os.environ.get("REDIS_URL")))
    server = Server(("", int(os.environ.get("PORT", "8080"))), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"serving at port {server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
