//! What the two loops tell each other of the bindings of each CacheCluster.
//!
//! The look at a namespace's policies says which users a CacheCluster is to have, and the look at the CacheCluster makes them; that one
//! says where the servers are and which users every server has proved, and the policies' look tells sidecars. Neither waits for the other:
//! each is woken when something changed.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::place::Place;
use crate::operator::admin::Keys;
use crate::operator::cache_cluster::users::{Grant, Users};
use crate::operator::queue::Key;
use crate::policy::binding::BindingName;

/// What the user of a binding is to be able to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// Just this.
    Exactly(Grant),
    /// What it can do already, with the password of this; this, where there is no such user. So it is while what policies say cannot be
    /// carried out, and after the last of them is gone: the application goes on with its keys. Not with journals that no rule of this writes to.
    AsItIs(Grant),
}

/// The claims of all bindings of a CacheCluster.
pub type Claims = BTreeMap<BindingName, Claim>;

/// What a look at a CacheCluster found.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// How sidecars find it.
    pub place: Place,
    /// The authorities of servers, PEM, where they speak TLS.
    pub authorities: Option<String>,
    /// How servers and sentinels let Larder in.
    pub keys: Keys,
    /// All servers.
    pub servers: Vec<SocketAddr>,
    /// All sentinels.
    pub sentinels: Vec<SocketAddr>,
    /// The name under which sentinels know the primary.
    pub master: String,
    /// The primary, as the sentinels name it.
    pub primary: Option<SocketAddr>,
    /// Everybody's users.
    pub users: Users,
    /// What was claimed when those were made.
    pub claims: Option<Arc<Claims>>,
    /// The newest generation of those that every server has proved by its file and every sentinel was told; `None`: not known.
    pub proved: Option<u64>,
    /// The same, where a server also counts that was told before its file came. What is in force is lost with a server's process until
    /// then, for a moment; so passwords, which are replaced at leisure, go by what is proved.
    pub in_force: Option<u64>,
}

/// What is known of a CacheCluster.
#[derive(Debug, Clone)]
pub enum Found {
    /// Nobody has looked since this process leads.
    NotYet,
    /// It has no place yet, or is refused.
    Nothing,
    /// It can be used.
    Offer(Arc<Offer>),
}

#[derive(Debug, Default)]
struct Tie {
    /// `None`: nobody has said so since this process leads, and users stay as they are.
    claims: Option<Arc<Claims>>,
    looked: bool,
    offer: Option<Arc<Offer>>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ties {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    term: u64,
    all: HashMap<Key, Tie>,
}

impl Ties {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the times that this process began to lead, or ceased to. A look that began in an earlier one knows nothing of what others
    /// did since.
    pub fn term(&self) -> u64 {
        self.lock().term
    }

    /// Says which users a CacheCluster is to have for bindings, by a look that began in this term. Whether that is new.
    pub fn claim(&self, term: u64, cluster: &Key, claims: Claims) -> bool {
        let mut state = self.lock();
        if state.term != term {
            return false;
        }
        let tie = state.all.entry(cluster.clone()).or_default();
        if tie.claims.as_deref() == Some(&claims) {
            return false;
        }
        // Users that were never asked for need not be taken away.
        let is_new = tie.claims.is_some() || !claims.is_empty();
        tie.claims = Some(Arc::new(claims));
        is_new
    }

    /// What was claimed last.
    pub fn claims(&self, cluster: &Key) -> Option<Arc<Claims>> {
        self.lock().all.get(cluster)?.claims.clone()
    }

    /// Says what a look at a CacheCluster found. Whether that is new.
    pub fn offer(&self, cluster: &Key, offer: Offer) -> bool {
        let mut state = self.lock();
        let tie = state.all.entry(cluster.clone()).or_default();
        let is_new = tie.offer.as_deref() != Some(&offer);
        if is_new {
            tie.offer = Some(Arc::new(offer));
        }
        tie.looked = true;
        is_new
    }

    /// A look at a CacheCluster has ended, whatever it found. Whether it was the first.
    pub fn looked(&self, cluster: &Key) -> bool {
        !std::mem::replace(&mut self.lock().all.entry(cluster.clone()).or_default().looked, true)
    }

    /// What is known of a CacheCluster.
    pub fn found(&self, cluster: &Key) -> Found {
        match self.lock().all.get(cluster) {
            Some(Tie { offer: Some(offer), .. }) => Found::Offer(offer.clone()),
            Some(Tie { looked: true, .. }) => Found::Nothing,
            _ => Found::NotYet,
        }
    }

    /// A CacheCluster is gone.
    pub fn gone(&self, cluster: &Key) {
        self.lock().all.remove(cluster);
    }

    /// Another may have changed everything: another term begins.
    pub fn forget(&self) {
        let mut state = self.lock();
        state.term += 1;
        state.all.clear();
    }
}

/// The grants that claims come to, given what users can do already.
pub fn grants(claims: &Claims, before: Option<&Users>) -> BTreeMap<BindingName, Grant> {
    let grant = |(name, claim): (&BindingName, &Claim)| {
        let grant = match claim {
            Claim::Exactly(grant) => grant.clone(),
            Claim::AsItIs(otherwise) => {
                let known = before.and_then(|users| users.grant_of(name));
                let kept = |known: Grant| known.with_password_of(otherwise).with_journals(otherwise.journals().clone());
                known.map_or_else(|| otherwise.clone(), kept)
            }
        };
        (name.clone(), grant)
    };
    claims.iter().map(grant).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::SystemTime;

    use super::*;
    use crate::operator::cache_cluster::users::Access;

    fn grant(password: &str, keys: &[&str]) -> Grant {
        Grant::new(password, keys.iter().map(|glob| (*glob).to_owned()).collect(), false, false)
    }

    fn key() -> Key {
        Key { namespace: "store".to_owned(), name: "main".to_owned() }
    }

    #[test]
    fn only_news_wake() {
        let (ties, name) = (Ties::default(), BindingName::of("Deployment", "shop", "main"));
        assert!(!ties.claim(0, &key(), Claims::new()), "nobody had any");
        let claims = Claims::from([(name, Claim::Exactly(grant("p", &["a"])))]);
        assert!(ties.claim(0, &key(), claims.clone()) && !ties.claim(0, &key(), claims.clone()));
        assert_eq!(ties.claims(&key()).as_deref(), Some(&claims));
        assert!(ties.claim(0, &key(), Claims::new()));
        assert!(matches!(ties.found(&key()), Found::NotYet));
        assert!(ties.looked(&key()) && !ties.looked(&key()));
        assert!(matches!(ties.found(&key()), Found::Nothing));
        ties.forget();
        assert!(matches!(ties.found(&key()), Found::NotYet) && ties.claims(&key()).is_none());
        assert!(!ties.claim(0, &key(), claims.clone()) && ties.claims(&key()).is_none(), "others led in between");
        assert!(ties.claim(ties.term(), &key(), claims));
    }

    #[test]
    fn a_user_that_is_kept_keeps_its_keys_and_takes_a_new_password() {
        let name = BindingName::of("Deployment", "shop", "main");
        let claims = |claim: Claim| Claims::from([(name.clone(), claim)]);
        let none = grants(&claims(Claim::AsItIs(grant("one", &["b"]))), None);
        assert_eq!(none[&name], grant("one", &["b"]), "there is none yet");
        let users = Users::next(None, &Access::Open, "system", None, SystemTime::UNIX_EPOCH);
        let users = users.bind(None, &BTreeMap::from([(name.clone(), grant("one", &["a"]))]), None, SystemTime::UNIX_EPOCH);
        let kept = grants(&claims(Claim::AsItIs(grant("two", &[]))), Some(&users));
        assert_eq!(kept[&name], grant("two", &["a"]));
        let writing = grant("one", &["a"]).with_journals(BTreeSet::from(["store.shop.db".to_owned()]));
        let users = users.bind(None, &BTreeMap::from([(name.clone(), writing)]), None, SystemTime::UNIX_EPOCH);
        let kept = grants(&claims(Claim::AsItIs(grant("two", &[]))), Some(&users));
        assert_eq!(kept[&name], grant("two", &["a"]), "nobody would drain the journal");
        let exact = grants(&claims(Claim::Exactly(grant("one", &["b"]))), Some(&users));
        assert_eq!(exact[&name], grant("one", &["b"]));
    }
}
