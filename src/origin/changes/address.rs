//! Where a database is and who asks it, from the URL that loads use as well.

use std::env;
use std::path::PathBuf;

use sqlx::postgres::PgConnectOptions;

use super::tls::Files;
use crate::origin::sql::postgres_options;

/// All that a connection takes. `Debug` is not derived: it holds a password.
pub struct Address {
    /// What the URL says, but for the password and the files.
    pub options: PgConnectOptions,
    /// The password. None: whoever asks has no need of one.
    pub password: Option<String>,
    /// The files for TLS.
    pub files: Files,
}

impl Address {
    /// Reads a URL, and the environment for what it leaves open, as loads do. A `.pgpass` is not read. The error names the remedy, and
    /// never the URL.
    ///
    /// # Errors
    /// It is none of a Postgres database.
    pub fn parse(url: &str) -> Result<Self, String> {
        let options = postgres_options(url)?;
        let parsed = reqwest::Url::parse(url.trim()).map_err(|_| "it cannot be read".to_owned())?;
        let parameter = |names: &[&str]| {
            let found = parsed.query_pairs().filter(|(name, _)| names.contains(&name.as_ref())).last();
            found.map(|(_, value)| value.into_owned())
        };
        let file = |names: &[&str], variable: &str| parameter(names).or_else(|| env::var(variable).ok()).map(PathBuf::from);
        let in_url = parsed.password().map(percent_decoded);
        Ok(Self {
            password: parameter(&["password"]).or(in_url).or_else(|| env::var("PGPASSWORD").ok()),
            files: Files {
                authorities: file(&["sslrootcert", "ssl-root-cert", "ssl-ca"], "PGSSLROOTCERT"),
                certificate: file(&["sslcert", "ssl-cert"], "PGSSLCERT"),
                key: file(&["sslkey", "ssl-key"], "PGSSLKEY"),
            },
            options,
        })
    }

    /// The Unix socket, where it is one.
    pub fn socket(&self) -> Option<PathBuf> {
        let port = self.options.get_port();
        let host = self.options.get_host();
        let directory = self.options.get_socket().cloned().or_else(|| host.starts_with('/').then(|| PathBuf::from(host)))?;
        Some(directory.join(format!(".s.PGSQL.{port}")))
    }

    /// The host's name or address.
    pub fn host(&self) -> &str {
        self.options.get_host().trim_start_matches('[').trim_end_matches(']')
    }

    /// The database's name: the user's, where none is said.
    pub fn database(&self) -> &str {
        self.options.get_database().unwrap_or_else(|| self.options.get_username())
    }
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let digits =
            text.get(at + 1..at + 3).filter(|digits| *byte == b'%' && digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(decoded_byte) => {
                decoded.push(decoded_byte);
                at += 3;
            }
            None => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_who_asks_and_how() {
        let url =
            "postgres://ann:p%40ss%25@db.test:5433/shop?sslmode=verify-full&sslrootcert=/ca.pem&sslcert=/c.pem&sslkey=/k.pem";
        let address = Address::parse(url).expect("a URL");
        assert_eq!(address.password.as_deref(), Some("p@ss%"));
        assert_eq!((address.host(), address.options.get_port(), address.database()), ("db.test", 5433, "shop"));
        assert_eq!(address.files.authorities, Some("/ca.pem".into()));
        assert_eq!((address.files.certificate, address.files.key), (Some("/c.pem".into()), Some("/k.pem".into())));
        let local = Address::parse("postgres://ann@localhost:5433?host=/run/pg&password=x").expect("a URL");
        assert_eq!(local.socket(), Some("/run/pg/.s.PGSQL.5433".into()));
        assert_eq!((local.password.as_deref(), local.database()), (Some("x"), "ann"));
        assert!(Address::parse("postgres://ann@h/d?sslmood=x").is_err_and(|why| why.contains("sslmood")));
    }

    #[test]
    fn what_is_no_escape_stays() {
        for (text, plain) in [("a%20b", "a b"), ("100%", "100%"), ("%zz", "%zz"), ("%+1", "%+1"), ("%c3%a4", "ä")] {
            assert_eq!(percent_decoded(text), plain);
        }
    }
}
