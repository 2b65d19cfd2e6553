//! CONFIG GET: any one server answers, without the secrets among its settings. The sidecar's login may be allowed to read them;
//! its clients are not.

use std::rc::Rc;

use super::{Flow, Request};
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Answer, Sink};

/// Settings whose values are passwords, or lead to keys.
const SECRETS: [&[u8]; 6] =
    [b"requirepass", b"masterauth", b"primaryauth", b"sentinel-pass", b"tls-key-file-pass", b"tls-client-key-file-pass"];

/// Forwards CONFIG GET.
pub fn get(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let worker = session.worker();
    let (waiting, place) = (session.clone(), session.take_place());
    let sink = Sink::Call(Box::new(move |_, answer| {
        waiting.answer(place, |out| match answer {
            Answer::Reply(bytes) => without_secrets(bytes, out),
            Answer::Failed(text) => encode::error(out, text),
        });
    }));
    let pending = Pending::new(sink, ANY_SLOT, Retry::Safe, session.lane(), worker.now());
    if worker.submit(&[request.raw], pending) { Flow::Continue } else { Flow::Wait }
}

/// Copies an array or a map of names and values; secrets become empty.
pub fn without_secrets(bytes: &[u8], out: &mut Vec<u8>) {
    let Some(parts) = reply::elements(bytes) else {
        return out.extend_from_slice(bytes);
    };
    let header = bytes.len() - parts.iter().map(|part| part.len()).sum::<usize>();
    out.extend_from_slice(&bytes[..header]);
    for pair in parts.chunks(2) {
        let is_secret = reply::text(pair[0]).is_some_and(|name| SECRETS.iter().any(|secret| name.eq_ignore_ascii_case(secret)));
        match pair {
            [name, _] if is_secret => {
                out.extend_from_slice(name);
                encode::bulk(out, b"");
            }
            pair => pair.iter().for_each(|part| out.extend_from_slice(part)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_left_out_in_both_protocols() {
        for header in ["*4\r\n", "%2\r\n"] {
            let mut reply = header.as_bytes().to_vec();
            for text in ["requirepass", "hunter2", "maxmemory", "0"] {
                encode::bulk(&mut reply, text.as_bytes());
            }
            let mut out = Vec::new();
            without_secrets(&reply, &mut out);
            let text = String::from_utf8(out).expect("text");
            assert!(text.starts_with(header) && text.contains("maxmemory\r\n$1\r\n0") && !text.contains("hunter2"), "{text}");
        }
        let mut out = Vec::new();
        without_secrets(b"-NOPERM no\r\n", &mut out);
        assert_eq!(out, b"-NOPERM no\r\n");
    }
}
