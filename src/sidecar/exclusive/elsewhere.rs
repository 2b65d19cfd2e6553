//! What a client is told where a server of a Cluster refuses its command since the slot is elsewhere. Never where: to the client
//! there is one server.

/// Where a command's slot is, by the error of the server that was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elsewhere {
    /// At another server.
    Moved,
    /// On its way to another server.
    Moving,
    /// Nowhere.
    Nowhere,
}

impl Elsewhere {
    /// What an error says of the slot. `None`: it is about something else.
    pub fn of(error: &[u8]) -> Option<Self> {
        match error.split(u8::is_ascii_whitespace).next()? {
            b"-MOVED" => Some(Self::Moved),
            b"-ASK" | b"-TRYAGAIN" => Some(Self::Moving),
            b"-CLUSTERDOWN" => Some(Self::Nowhere),
            _ => None,
        }
    }

    /// The error for a command that is queued in a transaction, which the server thereby gives up.
    pub fn of_queued(self) -> String {
        let code = if self == Self::Nowhere { "CLUSTERDOWN" } else { "TRYAGAIN" };
        format!("{code} {}: nothing of the transaction is carried out, and it can safely be repeated", self.reason())
    }

    /// The error for EXEC.
    pub fn of_exec(self) -> String {
        format!("EXECABORT Transaction discarded: {}. Nothing was carried out, and it can safely be repeated", self.reason())
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Moved => "the slot has moved to another server",
            Self::Moving => "the slot is moving to another server",
            Self::Nowhere => "no server serves the slot now",
        }
    }
}

/// The error for a command by itself, instead of one that names a server.
pub fn instead_of(error: &[u8]) -> Option<String> {
    let names_a_server = error.starts_with(b"-MOVED ") || error.starts_with(b"-ASK ");
    let elsewhere = Elsewhere::of(error).filter(|_| names_a_server)?;
    Some(format!("TRYAGAIN {}: the command was not carried out, and can safely be repeated", elsewhere.reason()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_names_a_server() {
        for (error, code) in [
            ("-MOVED 5 10.0.0.7:6379\r\n", "TRYAGAIN the slot has moved"),
            ("-ASK 5 10.0.0.7:6379\r\n", "TRYAGAIN the slot is moving"),
            ("-TRYAGAIN Multiple keys request during rehashing of slot\r\n", "TRYAGAIN the slot is moving"),
            ("-CLUSTERDOWN Hash slot not served\r\n", "CLUSTERDOWN no server serves"),
        ] {
            let elsewhere = Elsewhere::of(error.as_bytes()).expect(error);
            assert!(elsewhere.of_queued().starts_with(code), "{}", elsewhere.of_queued());
            assert!(elsewhere.of_exec().starts_with("EXECABORT "), "{}", elsewhere.of_exec());
            let alone = instead_of(error.as_bytes());
            assert_eq!(alone.is_some(), error.contains("10.0.0.7"), "{error}");
            assert!(alone.is_none_or(|text| text.starts_with(code)));
        }
        for error in ["-ERR MOVED 5 a:1\r\n", "-MOVEDX 5 a:1\r\n", "-EXECABORT Transaction discarded", "+OK\r\n", ""] {
            assert_eq!((Elsewhere::of(error.as_bytes()), instead_of(error.as_bytes())), (None, None), "{error}");
        }
    }
}
