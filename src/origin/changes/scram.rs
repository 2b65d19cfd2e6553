//! How a password is proved without being told: SCRAM-SHA-256, of RFC 5802 and RFC 7677. Pure, but for the nonce.

use std::num::NonZeroU32;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use ring::{digest, hmac, pbkdf2};

/// The name of the exchange.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// No binding to a channel.
const HEADER: &str = "n,,";
/// The most rounds that a server may ask for: more would hold up everything else. Postgres asks for 4,096.
const MOST_ROUNDS: u32 = 1_000_000;

/// Why the exchange came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// The server's message has another form.
    #[error("the exchange about the password has another form")]
    Form,
    /// It asks for more than [`MOST_ROUNDS`].
    #[error("the server asks for {0} rounds, more than {MOST_ROUNDS}")]
    Rounds(u32),
    /// It does not know the password either.
    #[error("the server could not prove that it knows the password")]
    Server,
}

/// An exchange under way.
pub struct Exchange {
    /// The user as the exchange names it. Postgres takes it from the first message of the connection, and passes this over.
    user: &'static str,
    nonce: String,
    password: String,
    /// What the server has to prove at the end.
    expected: Option<Vec<u8>>,
}

impl Exchange {
    /// Begins one. `nonce`: what nobody can guess, and nobody used before, of printable letters without a comma.
    pub fn new(password: &str, nonce: String) -> Self {
        // As servers do: what cannot be prepared is taken as it is.
        let password = stringprep::saslprep(password).map_or_else(|_| password.to_owned(), std::borrow::Cow::into_owned);
        Self { user: "", nonce, password, expected: None }
    }

    /// The first message.
    pub fn first(&self) -> String {
        format!("{HEADER}{}", self.first_bare())
    }

    fn first_bare(&self) -> String {
        format!("n={},r={}", self.user, self.nonce)
    }

    /// The answer to the server's first message.
    ///
    /// # Errors
    /// It has another form, or asks for too much.
    pub fn answer(&mut self, server_first: &str) -> Result<String, ScramError> {
        let field = |name| server_first.split(',').find_map(|field| field.strip_prefix(name)).ok_or(ScramError::Form);
        let (nonce, salt, rounds) = (field("r=")?, field("s=")?, field("i=")?);
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(ScramError::Form);
        }
        let salt = BASE64_STANDARD.decode(salt).map_err(|_| ScramError::Form)?;
        let rounds: NonZeroU32 = rounds.parse().map_err(|_| ScramError::Form)?;
        if rounds.get() > MOST_ROUNDS {
            return Err(ScramError::Rounds(rounds.get()));
        }
        let mut salted = [0; digest::SHA256_OUTPUT_LEN];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, self.password.as_bytes(), &mut salted);
        let client_key = sign(&salted, b"Client Key");
        let stored_key = digest::digest(&digest::SHA256, client_key.as_ref());
        let without_proof = format!("c={},r={nonce}", BASE64_STANDARD.encode(HEADER));
        let said = format!("{},{server_first},{without_proof}", self.first_bare());
        let signature = sign(stored_key.as_ref(), said.as_bytes());
        let proof: Vec<u8> = client_key.as_ref().iter().zip(signature.as_ref()).map(|(a, b)| a ^ b).collect();
        let server_key = sign(&salted, b"Server Key");
        self.expected = Some(sign(server_key.as_ref(), said.as_bytes()).as_ref().to_vec());
        Ok(format!("{without_proof},p={}", BASE64_STANDARD.encode(proof)))
    }

    /// Whether the server's last message proves that it knows the password.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self, server_final: &str) -> Result<(), ScramError> {
        let proof = server_final.split(',').find_map(|field| field.strip_prefix("v=")).ok_or(ScramError::Server)?;
        let proof = BASE64_STANDARD.decode(proof).map_err(|_| ScramError::Form)?;
        if self.expected.as_ref() == Some(&proof) { Ok(()) } else { Err(ScramError::Server) }
    }
}

fn sign(key: &[u8], text: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 7677, section 3.
    fn exchange() -> Exchange {
        Exchange { user: "user", ..Exchange::new("pencil", "rOprNGfwEbeRWgbNEkqO".to_owned()) }
    }

    #[test]
    fn the_example_of_the_standard_is_reproduced() {
        let mut exchange = exchange();
        assert_eq!(exchange.first(), "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let answer = exchange.answer(&format!("r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"));
        let proof = "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        assert_eq!(answer, Ok(format!("c=biws,r={nonce},p={proof}")));
        assert_eq!(exchange.check("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="), Ok(()));
        assert_eq!(exchange.check("v=AAAA"), Err(ScramError::Server));
        assert_eq!(exchange.check("e=other-error"), Err(ScramError::Server));
    }

    #[test]
    fn a_server_that_does_not_keep_to_it_is_refused() {
        for (first, error) in [
            ("r=other%x,s=W22Z,i=4096", ScramError::Form),
            ("r=rOprNGfwEbeRWgbNEkqO,s=W22Z,i=4096", ScramError::Form),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=?,i=4096", ScramError::Form),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=0", ScramError::Form),
            ("r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=2000000", ScramError::Rounds(2_000_000)),
            ("", ScramError::Form),
        ] {
            assert_eq!(exchange().answer(first), Err(error), "{first}");
        }
    }
}
