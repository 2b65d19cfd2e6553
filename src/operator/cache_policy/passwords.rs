//! The passwords of a binding's user, one after another. Pure.
//!
//! Sidecars log in with the entry `password` of the binding's Secret. A new one first lies beside it, in an entry that no sidecar reads, while
//! servers and sentinels are told to take both. Once each of them has proved that, it takes the earlier one's place. The earlier one works
//! for ten minutes from then on ([`crate::operator::cache_cluster::users`]): a kubelet brings a changed Secret within two.
//!
//! A Secret that somebody deletes is made again with the password that it had, as long as this process remembers it. Otherwise a new
//! password is on its way as above, and until it has arrived the Secret has none: sidecars that run stay with the one that they read, which
//! servers still take, and those that start wait.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::jiff::Timestamp;

use super::parts::Keyring;
use crate::policy::binding::{BindingName, PASSWORD_FILE};
use crate::policy::digest::digest;

/// The entry of the Secret in which a password lies that servers do not know yet. No sidecar reads it.
pub const NEXT_PASSWORD: &str = "next-password";
/// The annotation of the Secret that tells since when its password is the one; none on the first.
pub const SINCE_ANNOTATION: &str = "larder.dev/password-since";
/// The annotation by which a person asks for another: by any text that differs from the last.
pub const ASKED_ANNOTATION: &str = "larder.dev/rotate-password";
/// The annotation that tells which text was heeded last.
pub const HEEDED_ANNOTATION: &str = "larder.dev/password-rotated-for";
/// How much of such a text counts.
const MAX_ASKED: usize = 128;

/// What lies in a binding's Secret of passwords. `Debug` does not show them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Passwords {
    /// What sidecars log in with. `None`: it is lost, or there was none.
    pub current: Option<String>,
    /// What is to take its place.
    pub next: Option<String>,
    /// When the current one took an earlier one's place, in seconds since 1970.
    pub since: Option<u64>,
    /// What was asked when the newest one was made.
    pub heeded: Option<String>,
}

impl fmt::Debug for Passwords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { current, next, since, heeded } = self;
        let (current, next) = (current.is_some(), next.is_some());
        let mut shown = f.debug_struct("Passwords");
        shown.field("current", &current).field("next", &next).field("since", since).field("heeded", heeded).finish()
    }
}

/// What servers and sentinels take of the binding's user.
pub trait Servers {
    /// Whether there is such a user, as far as is known.
    fn know_the_user(&self) -> bool;
    /// Whether each of them has proved that it takes this password.
    fn take(&self, password: &str) -> bool;
}

/// When a password is to be replaced.
#[derive(Debug, Clone, Copy)]
pub struct Due<'a> {
    /// The time.
    pub now: SystemTime,
    /// How old a password may grow. `None`: as old as it likes.
    pub age: Option<Duration>,
    /// The binding: not all of them have their turn at the same moment.
    pub binding: &'a BindingName,
    /// When the Secret was made.
    pub created: Option<SystemTime>,
    /// What a person asks.
    pub asked: Option<&'a str>,
}

impl Due<'_> {
    fn asked(&self) -> Option<String> {
        self.asked.map(|asked| asked.chars().take(MAX_ASKED).collect())
    }

    /// The age at which this binding's password is replaced: up to a tenth less than it may have.
    fn age(&self) -> Option<Duration> {
        let [first, second, ..] = digest(self.binding.as_str().as_bytes());
        let share = f64::from(u16::from_be_bytes([first, second])) / f64::from(u16::MAX);
        Some(self.age?.mul_f64(0.9 + share * 0.1))
    }

    fn is_due(&self, passwords: &Passwords) -> bool {
        let since = passwords.since.map(|since| UNIX_EPOCH + Duration::from_secs(since)).or(self.created);
        let age = since.and_then(|since| self.now.duration_since(since).ok());
        let is_old = age.zip(self.age()).is_some_and(|(age, most)| age >= most);
        is_old || (self.asked.is_some() && self.asked() != passwords.heeded)
    }
}

impl Passwords {
    /// What lies in a Secret.
    pub fn of(keyring: &Keyring) -> Self {
        let entry = |name: &str| keyring.entries.get(name).filter(|text| !text.is_empty()).map(ToString::to_string);
        let since = keyring.since.and_then(|since| Some(since.duration_since(UNIX_EPOCH).ok()?.as_secs()));
        let heeded = keyring.heeded.as_deref().map(str::to_owned);
        Self { current: entry(PASSWORD_FILE), next: entry(NEXT_PASSWORD), since, heeded }
    }

    /// Whether there is none at all.
    pub const fn are_missing(&self) -> bool {
        self.current.is_none() && self.next.is_none()
    }

    /// What is to lie there now. `new` makes a password. Calling it again with its own result changes nothing until something else does.
    pub fn next<E>(&self, due: Due<'_>, servers: &impl Servers, new: impl FnOnce() -> Result<String, E>) -> Result<Self, E> {
        let mut next = self.clone();
        match (&self.current, &self.next) {
            // The first: nobody has logged in yet.
            (None, None) if !servers.know_the_user() => next.current = Some(new()?),
            (None, None) => next.next = Some(new()?),
            (current, Some(coming)) if servers.take(coming) || (current.is_none() && !servers.know_the_user()) => {
                next.current = Some(coming.clone());
                next.next = None;
                next.since = Some(due.now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
            }
            // One that servers do not take yet is no reason for yet another.
            (Some(current), None) if due.is_due(self) && servers.take(current) => {
                next.next = Some(new()?);
                next.heeded = due.asked();
            }
            _ => {}
        }
        Ok(next)
    }

    /// The annotations that tell of them.
    pub fn annotations(&self) -> impl Iterator<Item = (String, String)> {
        let since = self.since.and_then(|since| Timestamp::from_second(i64::try_from(since).ok()?).ok());
        let since = since.map(|since| (SINCE_ANNOTATION.to_owned(), since.to_string()));
        since.into_iter().chain(self.heeded.clone().map(|heeded| (HEEDED_ANNOTATION.to_owned(), heeded)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::operator::cache_cluster::users::{Access, GRACE, Grant, Users};
    use crate::operator::cache_policy::user::with_passwords;

    const MONTH: u64 = 30 * 24 * 3600;

    fn at(secs: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(secs)
    }

    fn binding() -> BindingName {
        BindingName::of("Deployment", "shop", "main")
    }

    /// Servers that take these passwords of a user; `None`: they know none.
    struct Taking<'a>(Option<&'a [&'a str]>);

    impl Servers for Taking<'_> {
        fn know_the_user(&self) -> bool {
            self.0.is_some()
        }

        fn take(&self, password: &str) -> bool {
            self.0.is_some_and(|all| all.contains(&password))
        }
    }

    fn due<'a>(now: u64, asked: Option<&'a str>, binding: &'a BindingName) -> Due<'a> {
        Due { now: at(now), age: Some(Duration::from_secs(MONTH)), binding, created: Some(at(0)), asked }
    }

    fn lying(current: Option<&str>, next: Option<&str>) -> Passwords {
        let text = |text: Option<&str>| text.map(str::to_owned);
        Passwords { current: text(current), next: text(next), ..Passwords::default() }
    }

    fn next(passwords: &Passwords, due: Due<'_>, taken: Option<&[&str]>, new: &str) -> Passwords {
        passwords.next(due, &Taking(taken), || Ok::<_, Infallible>(new.to_owned())).unwrap()
    }

    #[test]
    fn a_new_password_comes_into_its_place_once_servers_take_it() {
        let name = binding();
        let first = next(&Passwords::default(), due(0, None, &name), None, "one");
        assert_eq!(first, lying(Some("one"), None), "whoever is the first waits for nobody");
        let early = due(MONTH * 9 / 10 - 1, None, &name);
        assert_eq!(next(&first, early, Some(&["one"]), "two"), first);
        let both = next(&first, due(MONTH, None, &name), Some(&["one"]), "two");
        assert_eq!(both, lying(Some("one"), Some("two")));
        assert_eq!(next(&both, due(MONTH + 60, None, &name), Some(&["one"]), "three"), both, "a server lags");
        let turned = next(&both, due(MONTH + 90, None, &name), Some(&["one", "two"]), "three");
        assert_eq!(turned, Passwords { since: Some(MONTH + 90), ..lying(Some("two"), None) });
        assert_eq!(next(&turned, due(MONTH + 91, None, &name), Some(&["one", "two"]), "three"), turned);
        assert!(next(&turned, due(2 * MONTH + 90, None, &name), Some(&["two"]), "three").next.is_some());
        assert_eq!(next(&first, due(MONTH, None, &name), Some(&[]), "two"), first, "servers do not know the first yet");
        let for_ever = Due { age: None, ..due(99 * MONTH, None, &name) };
        assert_eq!(next(&first, for_ever, Some(&["one"]), "two"), first);
    }

    #[test]
    fn who_asks_is_heeded_once() {
        let (name, first) = (binding(), lying(Some("one"), None));
        let asked = due(5, Some("today"), &name);
        let both = next(&first, asked, Some(&["one"]), "two");
        assert_eq!(both, Passwords { heeded: Some("today".to_owned()), ..lying(Some("one"), Some("two")) });
        let turned = next(&both, asked, Some(&["one", "two"]), "three");
        assert_eq!(next(&turned, asked, Some(&["two"]), "three"), turned);
        assert!(next(&turned, due(6, Some("again"), &name), Some(&["two"]), "three").next.is_some());
        let annotations: BTreeMap<String, String> = turned.annotations().collect();
        let expected = [(HEEDED_ANNOTATION, "today"), (SINCE_ANNOTATION, "1970-01-01T00:00:05Z")];
        assert_eq!(annotations, expected.map(|(name, text)| (name.to_owned(), text.to_owned())).into());
        let long = "x".repeat(9999);
        let heeded = next(&first, due(5, Some(&long), &name), Some(&["one"]), "two").heeded.unwrap();
        assert_eq!(heeded.len(), MAX_ASKED);
        let turned = Passwords { heeded: Some(heeded), ..first };
        assert_eq!(next(&turned, due(6, Some(&long), &name), Some(&["one"]), "two"), turned);
    }

    #[test]
    fn one_that_is_lost_is_replaced_once_servers_take_another() {
        let name = binding();
        let coming = next(&Passwords::default(), due(9, None, &name), Some(&["lost"]), "two");
        assert_eq!(coming, lying(None, Some("two")), "no sidecar is told what servers do not take");
        assert_eq!(next(&coming, due(10, None, &name), Some(&["lost"]), "three"), coming);
        let there = next(&coming, due(11, None, &name), Some(&["lost", "two"]), "three");
        assert_eq!((there.current.as_deref(), there.next), (Some("two"), None));
        let nobody = next(&coming, due(11, None, &name), None, "three");
        assert_eq!(nobody.current.as_deref(), Some("two"), "the user is gone: nobody logs in");
    }

    #[test]
    fn passwords_are_not_shown() {
        let shown = format!("{:?}", lying(Some("hidden"), Some("sealed")));
        assert!(!shown.contains("hidden") && !shown.contains("sealed"), "{shown}");
    }

    /// What a Secret and servers are in the course of time: the looks of policies and of the CacheCluster in turn, servers that lag, kubelets
    /// that bring a Secret within two minutes.
    struct World {
        secret: Passwords,
        users: Users,
        proved: u64,
        now: u64,
        made: u32,
        /// Each password that the Secret held for sidecars, with the moment at which it held it no more.
        told: Vec<(String, Option<u64>)>,
    }

    struct AtServers<'a>(&'a World, &'a BindingName);

    impl Servers for AtServers<'_> {
        fn know_the_user(&self) -> bool {
            self.0.users.grant_of(self.1).is_some()
        }

        fn take(&self, password: &str) -> bool {
            self.0.users.takes(self.1, password, Some(self.0.proved))
        }
    }

    fn opens(users: &Users, name: &BindingName, password: &str) -> bool {
        let hash = format!("#{}", crate::policy::digest::sha256(password.as_bytes()));
        users.on_servers().iter().any(|user| user.name == name.user() && user.rules.contains(&hash))
    }

    impl World {
        /// A look at policies, and then at the CacheCluster.
        fn look(&mut self, asked: Option<&str>, name: &BindingName) {
            let made = self.made + 1;
            let due = Due { now: at(self.now), age: None, binding: name, created: Some(at(0)), asked };
            let next = self.secret.next(due, &AtServers(self, name), || Ok::<_, Infallible>(format!("password-{made}"))).unwrap();
            self.made = made;
            if next.current != self.secret.current {
                if let Some((_, until)) = self.told.last_mut() {
                    until.get_or_insert(self.now);
                }
                self.told.extend(next.current.clone().map(|password| (password, None)));
            }
            self.secret = next;
            let grant = |password: &str| Grant::new(password, BTreeSet::from(["a:?*".to_owned()]), false, false);
            let grant = with_passwords(grant, &self.secret, self.users.grant_of(name).as_ref());
            let (before, now) = (self.users.clone(), at(self.now));
            let next = Users::next(Some(&before), &Access::Open, "system", Some(self.proved), now);
            self.users = next.bind(Some(&before), &BTreeMap::from([(name.clone(), grant)]), Some(self.proved), now);
        }
    }

    proptest! {
        /// However often a person asks, servers lag, the operator is away and its Secret is lost: what sidecars may have read works at all
        /// servers, from the moment at which they could until ten minutes after.
        #[test]
        fn no_sidecar_is_refused(steps in prop::collection::vec((0u8..8, 1u64..400, any::<bool>()), 1..60)) {
            let name = binding();
            let users = Users::next(None, &Access::Open, "system", None, at(0));
            let mut world = World { secret: Passwords::default(), users, proved: 0, now: 0, made: 0, told: Vec::new() };
            world.look(None, &name);
            world.proved = world.users.generation;
            let (mut asked, mut lost) = (0u32, 0u64);
            for (step, passing, catches_up) in steps {
                world.now += passing;
                if catches_up {
                    world.proved = world.users.generation;
                }
                match step {
                    // Nobody here remembers what was in it; not so often that more are under way than servers keep.
                    0 if world.now > lost + 2 * GRACE.as_secs() => {
                        lost = world.now;
                        world.secret = Passwords { heeded: world.secret.heeded.clone(), ..Passwords::default() };
                        if let Some((_, until)) = world.told.last_mut() {
                            until.get_or_insert(world.now);
                        }
                    }
                    // The operator is away.
                    1 => continue,
                    2 => asked += 1,
                    _ => {}
                }
                let text = asked.to_string();
                world.look(Some(&text), &name);
                for (password, until) in &world.told {
                    let counts = until.is_none_or(|until| world.now < until + GRACE.as_secs());
                    prop_assert!(!counts || opens(&world.users, &name, password), "{password} at {}: {:?}", world.now, world.users);
                }
            }
            let text = asked.to_string();
            for _ in 0..8 {
                world.now += GRACE.as_secs();
                world.proved = world.users.generation;
                world.look(Some(&text), &name);
            }
            prop_assert!(world.secret.next.is_none());
            for (password, until) in &world.told {
                prop_assert_eq!(opens(&world.users, &name, password), until.is_none(), "{}", password);
            }
        }
    }
}
