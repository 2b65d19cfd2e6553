//! Larder's own keys are no business of applications: they neither see nor touch them.

use std::rc::Rc;

use super::{Flow, Request};
use crate::sidecar::commands::Effect;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::slots::{LARDER_PREFIX, is_larder_key};

/// The first of a command's keys that is Larder's own.
#[inline]
pub fn named_by<'a>(request: &Request<'a>) -> Option<&'a [u8]> {
    if request.spec.keys.is_empty() {
        return None;
    }
    match request.spec.only_key(&request.args) {
        Some(key) => is_larder_key(key).then_some(key),
        None if request.args.iter().skip(1).any(is_larder_key) => among_all(request),
        None => None,
    }
}

#[cold]
fn among_all<'a>(request: &Request<'a>) -> Option<&'a [u8]> {
    let keys = request.spec.keys(&request.args).ok()?;
    let mut keys = keys.iter().filter(|at| at.effect != Effect::Route).filter_map(|at| request.args.get(at.index as usize));
    keys.find(|key| is_larder_key(key))
}

/// Says so.
#[cold]
pub fn refuse(session: &Rc<Session>, key: &[u8]) -> Flow {
    super::refuse(session, &refusal(key))
}

/// The error for a command that names `key`.
pub fn refusal(key: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&key[..key.len().min(64)]);
    format!("NOPERM the key `{shown}` is Larder's own, as all that begin with `larder:`: use another name")
}

/// Appends `list`, an array of key names as it came, without those of Larder's own.
pub fn hide(list: &[u8], out: &mut Vec<u8>) {
    let whole = || memchr::memmem::find(list, LARDER_PREFIX).is_none();
    let Some(items) = (!whole()).then(|| reply::elements(list)).flatten() else {
        return out.extend_from_slice(list);
    };
    let shown: Vec<&[u8]> = items.into_iter().filter(|item| !reply::text(item).is_some_and(is_larder_key)).collect();
    encode::array(out, shown.len());
    shown.iter().for_each(|item| out.extend_from_slice(item));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_larder_are_hidden_and_others_pass() {
        let shown = |list: &[u8]| {
            let mut out = Vec::new();
            hide(list, &mut out);
            String::from_utf8_lossy(&out).into_owned()
        };
        assert_eq!(shown(b"*2\r\n$12\r\nlarder:l:{a}\r\n$1\r\nx\r\n"), "*1\r\n$1\r\nx\r\n");
        assert_eq!(shown(b"*1\r\n$9\r\nx-larder:\r\n"), "*1\r\n$9\r\nx-larder:\r\n");
        assert_eq!(shown(b"*0\r\n"), "*0\r\n");
        assert_eq!(shown(b"-ERR larder:\r\n"), "-ERR larder:\r\n");
    }
}
