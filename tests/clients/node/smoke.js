// A dozen operations of ioredis through a sidecar: node smoke.js PORT sentinel|cluster. Says `ok` at the end.
'use strict';
const assert = require('node:assert/strict');
const { setTimeout } = require('node:timers/promises');
const Redis = require('ioredis');

const [port, topology] = [Number(process.argv[2]), process.argv[3]];
// How often a message is published until it is heard: nodes of a Cluster drop it for peers that they have no connection to just then.
const ATTEMPTS = 10;
const address = { host: '127.0.0.1', port };

function clients() {
  const all = [
    new Redis(address),
    new Redis({ ...address, username: 'any', password: 'any', connectionName: 'smoke' }),
    new Redis({ sentinels: [address], name: 'main' }),
  ];
  all.push(topology === 'sentinel' ? new Redis({ ...address, db: 3 }) : new Redis.Cluster([address]));
  return all;
}

async function run(client) {
  const key = (name) => `{smoke}:${name}`;
  const names = ['text', 'number', 'hash', 'list', 'set', 'zset', 'binary'].map(key);
  await client.del(...names);
  assert.equal(await client.set(key('text'), 'value', 'EX', 100), 'OK');
  assert.equal(await client.get(key('text')), 'value');
  const ttl = await client.ttl(key('text'));
  assert.ok(ttl > 0 && ttl <= 100);
  assert.deepEqual(await client.mget(key('text'), key('none')), ['value', null]);
  assert.equal(await client.incrby(key('number'), 5), 5);
  assert.equal(await client.hset(key('hash'), { a: 1, b: 2 }), 2);
  assert.deepEqual(await client.hgetall(key('hash')), { a: '1', b: '2' });
  assert.equal(await client.rpush(key('list'), 'a', 'b', 'c'), 3);
  assert.deepEqual(await client.blpop(key('list'), 1), [key('list'), 'a']);
  assert.deepEqual(await client.lrange(key('list'), 0, -1), ['b', 'c']);
  assert.equal(await client.sadd(key('set'), 'x', 'y'), 2);
  assert.equal(await client.zadd(key('zset'), 1, 'one', 2.5, 'two'), 2);
  assert.deepEqual(await client.zrange(key('zset'), 0, -1, 'WITHSCORES'), ['one', '1', 'two', '2.5']);
  const bytes = Buffer.alloc(256000, 'é\r\n$-1');
  await client.set(key('binary'), bytes);
  assert.ok(bytes.equals(await client.getBuffer(key('binary'))));
  assert.deepEqual(await client.pipeline().get(key('text')).incr(key('number')).exec(), [[null, 'value'], [null, 6]]);
  assert.deepEqual(await client.multi().incr(key('number')).get(key('number')).exec(), [[null, 7], [null, '7']]);
  assert.equal(await client.eval('return redis.call("GET", KEYS[1])', 1, key('text')), 'value');
  await assert.rejects(client.lpush(key('text'), 'x'), /WRONGTYPE/);
  assert.equal(await client.del(...names), 7);
}

async function subscribe() {
  const [listener, speaker] = [new Redis(address), new Redis(address)];
  let heard;
  listener.on('message', (channel, message) => { heard = [channel, message]; });
  await listener.subscribe('smoke:news');
  for (let attempt = 0; attempt < ATTEMPTS && heard === undefined; attempt += 1) {
    await speaker.publish('smoke:news', 'hello');
    await setTimeout(attempt === 0 ? 100 : 1000);
  }
  assert.deepEqual(heard, ['smoke:news', 'hello']);
  listener.disconnect();
  speaker.disconnect();
}

async function main() {
  for (const client of clients()) {
    await run(client);
    client.disconnect();
  }
  await subscribe();
  console.log('ok');
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
