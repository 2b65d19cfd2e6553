// Cache-aside of ioredis on one connection that all callers share: node cache_aside.js PORT. Says `ok` at the end.
'use strict';
const assert = require('node:assert/strict');
const { setTimeout: sleep } = require('node:timers/promises');
const Redis = require('ioredis');

const CALLERS = 50;
const client = new Redis({ host: '127.0.0.1', port: Number(process.argv[2]) });
let loads = 0;
let retries = 0;

async function get(key) {
  for (;;) {
    try {
      return await client.get(key);
    } catch (error) {
      // Somebody loads it, and this read must not wait.
      if (!error.message.startsWith('TRYAGAIN ')) throw error;
      retries += 1;
      await sleep(20);
    }
  }
}

async function user(id, loadMillis) {
  const key = `user:${id}`;
  const found = await get(key);
  if (found !== null) return found;
  loads += 1;
  await sleep(loadMillis);
  await client.set(key, `row ${id}`);
  return `row ${id}`;
}

async function main() {
  // Of all who ask, one loads: its SET passes the others' parked reads.
  const all = await Promise.all(Array.from({ length: CALLERS }, () => user(1, 300)));
  assert.deepEqual(new Set(all), new Set(['row 1']));
  assert.equal(loads, 1);
  const ttl = await client.ttl('user:1');
  assert.ok(ttl > 0, `TTL ${ttl}`);
  // Nothing else waits behind parked reads: the price is that their callers are told to try again. One loads all the same.
  assert.equal(retries, 0);
  let loaded = false;
  const slow = Promise.all(Array.from({ length: CALLERS }, () => user(2, 1000))).then(() => { loaded = true; });
  await sleep(50);
  assert.equal(await client.incr('counter'), 1);
  assert.equal(loaded, false);
  await slow;
  assert.equal(loads, 2);
  assert.ok(retries > 0);
  // A deletion while a load runs: its late value is not stored.
  const late = user(3, 300);
  await sleep(100);
  await client.del('user:3');
  await late;
  assert.equal(await client.get('user:3'), null);
  client.disconnect();
  console.log('ok');
}

main().catch((error) => { console.error(error); process.exit(1); });
