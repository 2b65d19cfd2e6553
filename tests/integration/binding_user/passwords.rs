//! The password of a binding's user is replaced while sidecars log in with it: servers take both meanwhile, and refuse nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use larder::operator::cache_cluster::users::{GRACE, Grant};
use larder::operator::cache_policy::passwords::{Due, Servers as Taking};
use larder::operator::cache_policy::user::with_passwords;

use super::*;

/// The operator's part: looks at policies and at the CacheCluster in turn, and what a kubelet brings to sidecars.
struct Operator<'a> {
    scene: &'a Scene,
    secret: Passwords,
    users: Users,
    proved: u64,
    now: SystemTime,
    made: u32,
}

struct AtServers<'a>(&'a Operator<'a>);

impl Taking for AtServers<'_> {
    fn know_the_user(&self) -> bool {
        self.0.users.grant_of(&self.0.scene.binding).is_some()
    }

    fn take(&self, password: &str) -> bool {
        self.0.users.takes(&self.0.scene.binding, password, Some(self.0.proved))
    }
}

impl<'a> Operator<'a> {
    fn new(scene: &'a Scene) -> Self {
        let secret = Passwords { current: Some(PASSWORD.to_owned()), ..Passwords::default() };
        let users = scene.users.clone();
        Self { scene, secret, proved: users.generation, users, now: SystemTime::UNIX_EPOCH, made: 0 }
    }

    /// One look at each. Servers learn of users one after another, and work goes on in between.
    fn look(&mut self, asked: &str, work: &dyn Fn(usize)) {
        let binding = self.scene.binding.clone();
        let made = self.made + 1;
        let due = Due { now: self.now, age: None, binding: &binding, created: None, asked: Some(asked) };
        let next = self.secret.next(due, &AtServers(self), || Ok::<_, Infallible>(format!("new-password-{made}"))).expect("one");
        self.made = made;
        if next.current != self.secret.current {
            put(&self.scene.secret(), next.current.as_deref());
        }
        self.secret = next;
        let known = self.users.grant_of(&binding).expect("it has a user");
        let keys: BTreeSet<String> = user::globs(&self.scene.snapshot);
        let grant = with_passwords(|password| Grant::new(password, keys, false, false), &self.secret, Some(&known));
        let before = self.users.clone();
        let users = Users::next(Some(&before), &Access::Open, "system", Some(self.proved), self.now);
        self.users = users.bind(Some(&before), &BTreeMap::from([(binding.clone(), grant)]), Some(self.proved), self.now);
        if self.users.generation != before.generation {
            for place in 0..self.scene.servers.admins().len() {
                set_users_at(&self.scene.servers, &binding, &self.users, place);
                work(3);
            }
            self.proved = self.users.generation;
        }
    }

    /// Looks until the earlier password is gone.
    fn settle(&mut self, asked: &str, work: &dyn Fn(usize)) {
        for _ in 0..4 {
            self.look(asked, work);
        }
        assert!(self.secret.next.is_none() && self.secret.current.is_some(), "{:?}", self.secret);
        for _ in 0..3 {
            self.now += GRACE;
            self.look(asked, work);
        }
    }
}

/// As a kubelet brings a changed Secret; `None`: its password is gone.
fn put(secret: &Path, password: Option<&str>) {
    for name in ["password", "sentinel-password"] {
        match password {
            Some(password) => {
                let new = secret.join(format!("..{name}"));
                fs::write(&new, password).expect("it is written");
                fs::rename(new, secret.join(name)).expect("it is renamed");
            }
            None => fs::remove_file(secret.join(name)).expect("it was there"),
        }
    }
}

/// What an application does, over connections that stand and over new ones, until `stop`.
fn load(sidecar: &Sidecar, number: usize, stop: &AtomicBool, rounds: &AtomicUsize) {
    let key = format!("queue:{number}");
    let mut client = sidecar.client();
    for round in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let value = format!("{number}-{round}");
        assert_eq!(client.call(&["SET", &key, &value]), ok());
        assert_eq!(client.call(&["GET", &key]), bulk(&value));
        assert_eq!(client.line("MULTI"), ok());
        assert_eq!(client.call(&["GET", &key]), Value::Simple("QUEUED".to_owned()));
        assert_eq!(client.line("EXEC"), Value::Array(vec![bulk(&value)]));
        assert_eq!(client.line(&format!("BLPOP queue:none:{number} 0.001")), Value::Nil);
        if round % 8 == 7 {
            client = sidecar.client();
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Ends the load also where an assertion fails, so that the test does not hang.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until every sidecar has taken up so many changed passwords.
fn await_renewed(scene: &Scene, times: f64) {
    for sidecar in &scene.sidecars {
        wait_for("the new password is taken up", LIMIT, || sidecar.metric("larder_secrets_renewed_total") >= times);
    }
}

fn rotate(scene: &Scene, work: &dyn Fn(usize)) {
    let mut operator = Operator::new(scene);
    // The first look begins, and the second ends what servers have taken up.
    operator.look("today", work);
    assert_eq!(operator.secret.current.as_deref(), Some(PASSWORD), "sidecars are told when all servers know it");
    operator.look("today", work);
    assert_ne!(operator.secret.current.as_deref(), Some(PASSWORD));
    work(10);
    await_renewed(scene, 1.0);
    operator.settle("today", work);
    work(10);
    // Somebody deletes the Secret while nobody remembers what was in it.
    let lost = operator.secret.current.take().expect("there was one");
    put(&scene.secret(), None);
    operator.secret = Passwords { heeded: Some("today".to_owned()), ..Passwords::default() };
    work(10);
    operator.look("today", work);
    assert!(operator.secret.current.is_none(), "no sidecar is told what servers do not know");
    operator.look("today", work);
    await_renewed(scene, 2.0);
    assert_ne!(operator.secret.current, Some(lost.clone()));
    operator.settle("today", work);
    work(10);
    assert_eq!(scene.refusals(), [], "nobody was refused");
    // Only the last one opens anything.
    let name = scene.binding.user();
    let mut server = scene.servers.holder_of("queue:0");
    for earlier in [PASSWORD, &lost] {
        assert!(server.call(&["AUTH", &name, earlier]).is_error(), "{earlier}");
    }
    assert!(!scene.refusals().is_empty(), "the log would have shown refusals");
    assert_eq!(server.call(&["AUTH", &name, &operator.secret.current.expect("one")]), ok());
}

async fn judge(engine: Engine) {
    let scene = Scene::open(Servers::Sentinel(SentinelCluster::start(engine, 1))).await;
    let (stop, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let work = |more: usize| {
        let from = rounds.load(Ordering::Relaxed);
        wait_for("the load to go on", LIMIT, || rounds.load(Ordering::Relaxed) >= from + more);
    };
    std::thread::scope(|scope| {
        let _end = StopOnDrop(&stop);
        for (number, sidecar) in scene.sidecars.iter().cycle().take(4).enumerate() {
            let (stop, rounds) = (&stop, &rounds);
            scope.spawn(move || load(sidecar, number, stop, rounds));
        }
        work(10);
        rotate(&scene, &work);
    });
    for sidecar in &scene.sidecars {
        let log = sidecar.log();
        assert!(!log.contains("WRONGPASS") && !log.contains("lost a server connection"), "{log}");
        assert!(!log.contains(PASSWORD) && !log.contains("new-password"), "{log}");
    }
}

#[tokio::test]
async fn no_connection_is_refused_while_it_changes_at_redis() {
    judge(Engine::Redis7).await;
}

#[tokio::test]
async fn no_connection_is_refused_while_it_changes_at_valkey() {
    judge(Engine::Valkey9).await;
}
