// Says that keys, or a tag, have changed, with plain ioredis: node announce.js key user:42 tag faces
const Redis = require("ioredis");

async function main() {
  const client = new Redis(process.env.REDIS_URL ?? "redis://127.0.0.1:6379");
  const words = process.argv.slice(2);
  for (let at = 0; at + 1 < words.length; at += 2) {
    console.log(await client.xadd("larder:events", "*", words[at], words[at + 1]));
  }
  await client.quit();
}

main();
