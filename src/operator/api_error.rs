//! What a failed request to the API server means, in words, and what to do about it.

use std::error::Error as _;

use kube::runtime::watcher;

/// What a request that failed says, with what lies behind it: "connection refused" is the last of several errors.
pub fn describe(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!("{} ({})", status.message, status.code);
    }
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(deeper) = source {
        let deeper_text = deeper.to_string();
        if !text.contains(&deeper_text) {
            text.push_str(": ");
            text.push_str(&deeper_text);
        }
        source = deeper.source();
    }
    text
}

/// What to do about a request that failed.
pub fn remedy(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) => remedy_of_status(status.code),
        kube::Error::Service(_) | kube::Error::HyperError(_) | kube::Error::ReadEvents(_) => {
            "the API server cannot be reached: see that it runs, and that the address, the network and its certificate are right"
        }
        kube::Error::Auth(_) => "there is no login for the API server: see the ServiceAccount, or the user of the kubeconfig",
        kube::Error::SerdeError(_) => "what answers does not speak as an API server does, or as another version of it",
        _ => "see the log above",
    }
}

fn remedy_of_status(code: u16) -> &'static str {
    match code {
        401 => "the API server does not accept the login: see the ServiceAccount, or the user of the kubeconfig",
        403 => "the account lacks the right: see its Role and RoleBinding",
        404 => "the kind is not known: install the resource definitions of Larder",
        429 | 500.. => "the API server is in trouble or overloaded: it is asked again",
        _ => "the API server refuses the request",
    }
}

/// What a watch that broke off says, and what to do. `None` where nothing is wrong: a watch that is too old begins anew.
pub fn of_watch(error: &watcher::Error) -> Option<(String, &'static str)> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Some((describe(error), remedy(error))),
        watcher::Error::WatchError(status) if status.code == 410 => None,
        watcher::Error::WatchError(status) => Some((status.message.clone(), remedy_of_status(status.code))),
        watcher::Error::NoResourceVersion => Some((error.to_string(), "the API server tells no version of what it holds")),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn status(code: u16) -> Box<kube::core::Status> {
        Box::new(kube::core::Status { code, message: "no".to_owned(), ..Default::default() })
    }

    #[test]
    fn rights_are_spoken_of_only_where_they_lack() {
        let refused = kube::Error::Api(status(403));
        assert!(remedy(&refused).contains("Role") && describe(&refused) == "no (403)");
        let closed = kube::Error::Service(Box::new(io::Error::from(io::ErrorKind::ConnectionRefused)));
        assert!(remedy(&closed).contains("cannot be reached") && !remedy(&closed).contains("Role"));
        assert!(describe(&closed).contains("connection refused"), "{}", describe(&closed));
        assert!(remedy(&kube::Error::Api(status(404))).contains("resource definitions"));
    }

    #[test]
    fn a_watch_that_is_too_old_is_no_trouble() {
        assert_eq!(of_watch(&watcher::Error::WatchError(status(410))), None);
        assert!(of_watch(&watcher::Error::WatchError(status(403))).is_some_and(|(_, remedy)| remedy.contains("Role")));
        let cut = kube::Error::ReadEvents(io::Error::from(io::ErrorKind::UnexpectedEof));
        assert!(of_watch(&watcher::Error::WatchFailed(cut)).is_some_and(|(_, remedy)| remedy.contains("cannot be reached")));
    }
}
