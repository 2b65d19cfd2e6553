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

pub mod cache_aside;
pub mod observe;
pub mod read_through;
pub mod write_behind;
pub mod write_through;
