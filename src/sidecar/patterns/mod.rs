//! The caching patterns, one file each.

/// Lua that ends a script where its key is there after all, with `{'value', VALUE}`. What is no string is not missing either: MGET
/// shows it as null, and so it stays.
macro_rules! end_with_value {
    () => {
        "\
local value = redis.pcall('GET', KEYS[1])
if type(value) == 'table' then
  if string.find(value.err, 'WRONGTYPE', 1, true) then return {'other'} end
  return value
end
if value then return {'value', value} end
"
    };
}

/// Lua that does so of a hash. A server has no empty one.
macro_rules! end_with_hash {
    () => {
        "\
local hash = redis.pcall('HGETALL', KEYS[1])
if hash.err then
  if string.find(hash.err, 'WRONGTYPE', 1, true) then return {'other'} end
  return hash
end
if #hash > 0 then return {'value', hash} end
"
    };
}

/// Lua for `put(name, ms)`, which stores a value for so long: the string in this argument, or the hash whose fields and values stand from
/// that argument on. Whatever is there goes.
macro_rules! put {
    ($string:literal, $hash:literal) => {
        concat!(
            "\
local function put(name, ms)
  if #ARGV < ",
            $hash,
            " then return redis.call('SET', name, ARGV[",
            $string,
            "], 'PX', ms) end
  redis.call('DEL', name)
  for i = ",
            $hash,
            ", #ARGV, 1000 do redis.call('HSET', name, unpack(ARGV, i, math.min(i + 999, #ARGV))) end
  redis.call('PEXPIRE', name, ms)
end
"
        )
    };
}

pub mod cache_aside;
pub mod content;
pub mod observe;
pub mod read_through;
pub mod write_behind;
pub mod write_through;
