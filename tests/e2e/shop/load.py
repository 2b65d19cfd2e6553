"""The shop's customers: they read products by Zipf's law, a price changes now and then, and every body is compared with what the database
says. Serves at CONTROL_PORT (8081), with GET alone, and answers in JSON:

    /begin?rate=150&writes=2     begins a run: reads a second, and prices changed a second
    /status                      how many requests it has made so far, and how many failed
    /end                         ends the run: its figures
    /product?id=7&at=http://...  one product, read once from the address that is given: milliseconds, and whether it was right
    /delete?id=7&at=http://...   its price is changed through that address, which forgets it

TARGET (http://shop) is where the shop is, or several of it are, separated by commas; DATABASE_URL its database, which is only asked for what it holds before a run and after it.
"""
import bisect
import hashlib
import http.client
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import psycopg

TARGETS = os.environ.get("TARGET", "http://shop").split(",")
DATABASE_URL = os.environ["DATABASE_URL"]
PAGE_KIB = int(os.environ.get("PAGE_KIB", "1"))
READERS = int(os.environ.get("READERS", "8"))
# As a client's own timeout would be: who waits longer has left.
ANSWER_WITHIN_S = 5
# So that the requests of one connection reach all pods in turn.
RECONNECT = 50
MOST_EXAMPLES = 5


def price(number: int, version: int) -> int:
    return (number * 7919 + version * 31) % 100000


def expected(number: int, version: int):
    text = hashlib.md5(f"{number}:{version}".encode()).hexdigest() * (PAGE_KIB * 32)
    return {"id": number, "name": f"product {number}", "price": price(number, version), "version": version, "text": text}


class Failed(Exception):
    """A request that was not answered as it should."""


class Client:
    """One connection at a time to one address."""

    def __init__(self, target: str):
        self.address = urlsplit(target).netloc
        self.connection = None
        self.used = 0

    def ask(self, method: str, path: str, body=None):
        if self.used >= RECONNECT:
            self.close()
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(self.address, timeout=ANSWER_WITHIN_S)
            self.connection.request(method, path, body=None if body is None else json.dumps(body))
            answer = self.connection.getresponse()
            text = answer.read()
            self.used += 1
        except Exception as error:
            self.close()
            raise Failed(type(error).__name__) from error
        if answer.status != 200:
            raise Failed(f"{answer.status} {text[:200].decode(errors='replace')}")
        return json.loads(text)

    def close(self):
        if self.connection is not None:
            self.connection.close()
        self.connection, self.used = None, 0


class Books:
    """Which versions of each product a reader may see: what it was when the reader asked, or anything newer that was tried."""

    def __init__(self):
        self.lock = threading.Lock()
        # What a writer was told, what the database held when it was last asked, and the newest that was ever asked for.
        self.acknowledged: dict[int, int] = {}
        self.current: dict[int, int] = {}
        self.tried: dict[int, int] = {}

    def open(self):
        """Takes down what the database holds, and says what in it is not as it was written."""
        with psycopg.connect(DATABASE_URL) as connection:
            rows = connection.execute("SELECT id, name, price, version FROM products").fetchall()
        strange = [row for row in rows if (row[1], row[2]) != (f"product {row[0]}", price(row[0], row[3]))]
        with self.lock:
            behind = [row for row in rows if row[3] < self.acknowledged.get(row[0], 0)]
            for number, _, _, version in rows:
                self.acknowledged.setdefault(number, version)
                self.current[number] = version
                self.tried[number] = max(version, self.tried.get(number, 0))
        return strange + behind

    def least(self, number: int) -> int:
        with self.lock:
            return self.acknowledged[number]

    def judge(self, number: int, least: int, product) -> str | None:
        """What is wrong with a body, in a word: other than any version is, or older than one that was acknowledged before it was asked for."""
        version = product.get("version")
        with self.lock:
            newest = self.tried[number]
        if not isinstance(version, int) or not 1 <= version <= newest or product != expected(number, version):
            return "wrong"
        return "older" if version < least else None

    def write(self, client: Client, number: int):
        with self.lock:
            before = self.current[number]
            version = before + 1
            self.tried[number] = max(version, self.tried[number])
        try:
            client.ask("PUT", f"/products/{number}", {"price": price(number, version), "version": before})
        except Failed:
            self.look_again(number)
            raise
        with self.lock:
            self.acknowledged[number] = self.current[number] = version

    def look_again(self, number: int):
        """Whether a write that was not acknowledged took place, the database says. Its reader may still be told what was before: nobody was promised
        that the cache has forgotten it."""
        with psycopg.connect(DATABASE_URL) as connection:
            (version,) = connection.execute("SELECT version FROM products WHERE id = %s", (number,)).fetchone()
        with self.lock:
            self.current[number] = version
            self.tried[number] = max(version, self.tried[number])


BOOKS = Books()


class Run:
    """Readers and a writer, until they are told to stop."""

    def __init__(self, rate: float, writes: float):
        self.strange = BOOKS.open()
        self.numbers = sorted(BOOKS.tried)
        weights, total = [], 0.0
        for rank in range(1, len(self.numbers) + 1):
            total += 1 / rank
            weights.append(total)
        self.weights = weights
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self.latencies: list[float] = []
        self.faults: Counter = Counter()
        self.wrong: Counter = Counter()
        self.examples: list[str] = []
        self.requests = self.written = 0
        self.last_good = time.monotonic()
        self.longest_gap = 0.0
        jobs = [(self.read, rate / READERS)] * READERS + ([(self.write, writes)] if writes > 0 else [])
        self.threads = [
            threading.Thread(target=self.keep, args=(*job, TARGETS[index % len(TARGETS)]), daemon=True) for index, job in enumerate(jobs)
        ]
        for thread in self.threads:
            thread.start()

    def keep(self, action, rate: float, target: str):
        """Does something so many times a second, as long as it can: nobody catches up."""
        client, turn = Client(target), time.monotonic()
        while not self.stopped.is_set():
            try:
                action(client)
            except Failed as fault:
                with self.lock:
                    self.faults[str(fault)[:120]] += 1
            turn = max(turn + 1 / rate, time.monotonic() - 1)
            self.stopped.wait(max(0.0, turn - time.monotonic()))
        client.close()

    def pick(self) -> int:
        return self.numbers[bisect.bisect_left(self.weights, random.random() * self.weights[-1])]

    def read(self, client: Client):
        number = self.pick()
        least, start = BOOKS.least(number), time.monotonic()
        with self.lock:
            self.requests += 1
        product = client.ask("GET", f"/products/{number}")
        end = time.monotonic()
        fault = BOOKS.judge(number, least, product)
        with self.lock:
            self.latencies.append(end - start)
            self.longest_gap = max(self.longest_gap, end - self.last_good)
            self.last_good = end
            if fault:
                self.wrong[fault] += 1
                if len(self.examples) < MOST_EXAMPLES:
                    self.examples.append(f"{fault}: product {number}, version {product.get('version')}, at least {least}")

    def write(self, client: Client):
        with self.lock:
            self.requests += 1
        BOOKS.write(client, self.pick())
        with self.lock:
            self.written += 1

    def status(self):
        with self.lock:
            return {"requests": self.requests, "failed": sum(self.faults.values()), "wrong": self.wrong["wrong"]}

    def end(self):
        self.stopped.set()
        ended = time.monotonic()
        for thread in self.threads:
            thread.join(ANSWER_WITHIN_S + 2)
        seconds = ended - self.began
        strange = self.strange + BOOKS.open()
        with self.lock:
            ordered = sorted(self.latencies)
            at = lambda share: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000, 2) if ordered else None
            return {
                "requests": self.requests, "written": self.written, "seconds": round(seconds, 1),
                "failed": sum(self.faults.values()), "faults": dict(self.faults.most_common(MOST_EXAMPLES)),
                "wrong": self.wrong["wrong"], "older": self.wrong["older"], "examples": self.examples,
                "database": len(strange), "p50Ms": at(0.5), "p99Ms": at(0.99),
                "longestGapMs": round(max(self.longest_gap, ended - self.last_good) * 1000),
            }


def one(asked):
    """One product, from one address."""
    number, client = int(asked["id"]), Client(asked["at"])
    least, start = BOOKS.least(number), time.monotonic()
    product = client.ask("GET", f"/products/{number}")
    millis = (time.monotonic() - start) * 1000
    client.close()
    return {"ms": round(millis, 2), "fault": BOOKS.judge(number, least, product), "version": product.get("version")}


def delete(asked):
    client = Client(asked["at"])
    BOOKS.write(client, int(asked["id"]))
    client.close()
    return {"ok": True}


class Control(BaseHTTPRequestHandler):
    running: Run | None = None

    def do_GET(self):
        split = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(split.query).items()}
        try:
            status, answer = 200, self.act(split.path, asked)
        except Exception as error:
            status, answer = 500, {"error": repr(error)}
        print(f"{self.path}: {json.dumps(answer)}", file=sys.stderr, flush=True)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def act(self, path: str, asked):
        if path == "/begin":
            if Control.running is not None:
                Control.running.end()
            Control.running = Run(float(asked["rate"]), float(asked.get("writes", "0")))
            return {"ok": True}
        if path == "/status" and Control.running is not None:
            return Control.running.status()
        if path == "/end" and Control.running is not None:
            run, Control.running = Control.running, None
            return run.end()
        if path in ("/product", "/delete"):
            if Control.running is None:
                BOOKS.open()
            return one(asked) if path == "/product" else delete(asked)
        if path == "/healthz":
            return {"ok": True}
        raise LookupError(f"{path}: not now")

    def log_message(self, *_):
        """What is asked is told with its answer."""


if __name__ == "__main__":
    control = ThreadingHTTPServer(("", int(os.environ.get("CONTROL_PORT", "8081"))), Control)
    control.daemon_threads = True
    print(f"serving at port {control.server_port}", flush=True)
    control.serve_forever()
