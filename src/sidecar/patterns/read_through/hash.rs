//! Reads of a hash, as far as their answers can be made from the whole of it.

use crate::origin::fields::Fields;
use crate::sidecar::resp::{CommandArgs, Protocol, encode};

/// The commands that load a hash which is missing.
const LOADING: [&str; 8] = ["hexists", "hget", "hgetall", "hkeys", "hlen", "hmget", "hstrlen", "hvals"];
/// Those that would take what the cache lacks for nothing.
const PARTIAL: [&str; 2] = ["hrandfield", "hscan"];

/// Whether the command of this name loads a hash that is missing.
pub fn loads(name: &str) -> bool {
    LOADING.contains(&name)
}

/// Why the command of this name is not carried out on a hash that is loaded. `None`: it is.
pub fn refusal(name: &str, rule: &str) -> Option<String> {
    PARTIAL.contains(&name).then(|| {
        format!(
            "NOPERM {} of a key of the rule `{rule}` would not load what the cache lacks: HGETALL, HKEYS and HVALS do",
            name.to_ascii_uppercase()
        )
    })
}

/// A read of one hash.
#[derive(Debug, PartialEq, Eq)]
pub enum HashRead {
    /// HGET.
    Get(Vec<u8>),
    /// HMGET.
    Many(Vec<Vec<u8>>),
    /// HGETALL.
    All,
    /// HKEYS.
    Keys,
    /// HVALS.
    Values,
    /// HLEN.
    Length,
    /// HEXISTS.
    Exists(Vec<u8>),
    /// HSTRLEN.
    FieldLength(Vec<u8>),
}

impl HashRead {
    /// The one that the command of this name, in lower case, asks for.
    pub fn parse(name: &[u8], args: &CommandArgs<'_>) -> Option<Self> {
        let field = || args.get(2).map(<[u8]>::to_vec);
        Some(match name {
            b"hget" => Self::Get(field()?),
            b"hmget" => Self::Many(args.iter().skip(2).map(<[u8]>::to_vec).collect()),
            b"hgetall" => Self::All,
            b"hkeys" => Self::Keys,
            b"hvals" => Self::Values,
            b"hlen" => Self::Length,
            b"hexists" => Self::Exists(field()?),
            b"hstrlen" => Self::FieldLength(field()?),
            _ => return None,
        })
    }

    /// Appends what `hash` answers, for a client of this protocol.
    pub fn answer(&self, hash: &[u8], protocol: Protocol, out: &mut Vec<u8>) {
        let fields = Fields::of(hash);
        let count = fields.clone().count();
        let value = |out: &mut Vec<u8>, field: &[u8]| match fields.clone().get(field) {
            Some(value) => encode::bulk(out, value),
            None => encode::null(out, protocol),
        };
        match self {
            Self::Get(field) => value(out, field),
            Self::Many(names) => {
                encode::array(out, names.len());
                names.iter().for_each(|field| value(out, field));
            }
            Self::All => {
                encode::map(out, protocol, count);
                fields.clone().flat_map(|(field, value)| [field, value]).for_each(|text| encode::bulk(out, text));
            }
            Self::Keys => {
                encode::array(out, count);
                fields.clone().for_each(|(field, _)| encode::bulk(out, field));
            }
            Self::Values => {
                encode::array(out, count);
                fields.clone().for_each(|(_, value)| encode::bulk(out, value));
            }
            Self::Length => encode::integer(out, count as i64),
            Self::Exists(field) => encode::integer(out, i64::from(fields.get(field).is_some())),
            Self::FieldLength(field) => encode::integer(out, fields.get(field).map_or(0, <[u8]>::len) as i64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::fields::pack;
    use crate::sidecar::resp::{CommandScan, CommandScanner};

    fn answer(command: &str, protocol: Protocol) -> String {
        let mut wire = Vec::new();
        encode::command(&mut wire, &command.split(' ').collect::<Vec<_>>());
        let mut scanner = CommandScanner::default();
        assert!(matches!(scanner.scan(&wire), Ok(CommandScan::Complete { .. })));
        let args = CommandArgs::new(&wire, scanner.ranges());
        let name = args.name().to_ascii_lowercase();
        assert!(loads(std::str::from_utf8(&name).expect("text")));
        let mut out = Vec::new();
        let hash = pack([(&b"name"[..], &b"Ann"[..]), (b"mail", b"")]);
        HashRead::parse(&name, &args).expect("a read").answer(&hash, protocol, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn reads_are_answered_from_the_hash_as_a_server_does() {
        for (command, reply) in [
            ("HGET k name", "$3\r\nAnn\r\n"),
            ("HGET k none", "$-1\r\n"),
            ("HMGET k none name", "*2\r\n$-1\r\n$3\r\nAnn\r\n"),
            ("HGETALL k", "*4\r\n$4\r\nname\r\n$3\r\nAnn\r\n$4\r\nmail\r\n$0\r\n\r\n"),
            ("HKEYS k", "*2\r\n$4\r\nname\r\n$4\r\nmail\r\n"),
            ("HVALS k", "*2\r\n$3\r\nAnn\r\n$0\r\n\r\n"),
            ("HLEN k", ":2\r\n"),
            ("HEXISTS k mail", ":1\r\n"),
            ("hexists k none", ":0\r\n"),
            ("HSTRLEN k name", ":3\r\n"),
            ("HSTRLEN k none", ":0\r\n"),
        ] {
            assert_eq!(answer(command, Protocol::Resp2), reply, "{command}");
        }
        assert_eq!(answer("HGETALL k", Protocol::Resp3), "%2\r\n$4\r\nname\r\n$3\r\nAnn\r\n$4\r\nmail\r\n$0\r\n\r\n");
        assert_eq!(answer("HMGET k none", Protocol::Resp3), "*1\r\n_\r\n");
        assert!(refusal("hscan", "user").is_some_and(|text| text.contains("HSCAN of a key of the rule `user`")));
        assert!(refusal("hget", "user").is_none());
    }
}
