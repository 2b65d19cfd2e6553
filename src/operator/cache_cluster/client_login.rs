//! The login that clients are told: one that every server knows. Pure.
//!
//! A Secret that a person changes reaches clients when their kubelets bring it, which may be before any server was told. So clients are
//! told by a Secret of Larder's own, which follows once every server has proved the change.

use super::users::{Access, Users};
use crate::operator::admin::Login;

/// What clients are to be told. `wanted`: what the servers are to know in the end; `told`: the password that clients were told before,
/// which stands nowhere else. `None`: nobody logs in, or the password that every server knows is not known here.
pub fn client_login(users: &Users, wanted: Option<Login>, told: Option<Vec<u8>>) -> Option<Login> {
    let Access::User { name, .. } = users.published() else { return None };
    let told = told.and_then(|bytes| String::from_utf8(bytes).ok());
    let told = told.map(|password| Login { user: name.clone(), password });
    let is_known = |login: &Login| Access::user(&*login.user, &login.password) == *users.published();
    wanted.into_iter().chain(told).find(is_known)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn login(user: &str, password: &str) -> Login {
        Login { user: user.to_owned(), password: password.to_owned() }
    }

    fn next(before: Option<&Users>, wanted: &Login, proved: Option<u64>) -> Users {
        let access = Access::user(&*wanted.user, &wanted.password);
        Users::next(before, &access, "system", proved, SystemTime::UNIX_EPOCH + Duration::from_secs(9))
    }

    #[test]
    fn clients_are_told_of_a_change_when_every_server_has_proved_it() {
        let (one, two) = (login("shop", "one"), login("web", "two"));
        let first = next(None, &one, None);
        assert_eq!(client_login(&first, Some(one.clone()), None), Some(one.clone()));
        let adding = next(Some(&first), &two, Some(1));
        assert_eq!(client_login(&adding, Some(two.clone()), Some(b"one".to_vec())), Some(one));
        let proved = next(Some(&adding), &two, Some(2));
        assert_eq!(client_login(&proved, Some(two.clone()), Some(b"one".to_vec())), Some(two.clone()));
        // The person's Secret is gone meanwhile.
        assert_eq!(client_login(&proved, None, Some(b"two".to_vec())), Some(two));
    }

    #[test]
    fn a_password_that_no_server_knows_is_never_told() {
        let first = next(None, &login("shop", "one"), None);
        assert_eq!(client_login(&first, Some(login("shop", "two")), Some(b"three".to_vec())), None);
        assert_eq!(client_login(&first, Some(login("web", "one")), None), None);
        let open = Users::next(None, &Access::Open, "system", None, SystemTime::UNIX_EPOCH);
        assert_eq!(client_login(&open, Some(login("shop", "one")), Some(b"one".to_vec())), None);
    }
}
