// Reads keys through a Larder sidecar with plain ioredis: node get.js user:1 user:2
const Redis = require("ioredis");

async function main() {
  const client = new Redis(process.env.REDIS_URL ?? "redis://127.0.0.1:6379");
  for (const key of process.argv.slice(2)) {
    const start = performance.now();
    const value = await client.get(key); // a miss is loaded by the sidecar
    console.log(`${key} = ${value} (${(performance.now() - start).toFixed(1)} ms)`);
  }
  await client.quit();
}

main();
