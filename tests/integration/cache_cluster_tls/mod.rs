//! A CacheCluster with TLS: servers under agents and sentinels from the operator's own files, and the operator's own asking of them.

mod pods;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use larder::operator::admin::Admin;
use larder::operator::cache_cluster::certify::{self, Shown};
use larder::operator::cache_cluster::handover::{Handover, Outcome};
use larder::operator::cache_cluster::pki::{AUTHORITY_LIFE, AUTHORITY_RENEWAL, AUTHORITY_STEP, Pki, Subjects};
use larder::operator::cache_cluster::plan::{Member, Observed, Pod, Revision, SentinelId};
use larder::operator::election::Leadership;

use self::pods::{Pods, TlsClient};
use crate::support::resp::{Client, Value};
use crate::support::server::Engine;

const WRITERS: usize = 4;

/// Writers with one connection each, which they never make anew.
struct Writers {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(pods: &Pods, server: usize) -> Self {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let thread = |id| {
            let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
            let mut client = TlsClient::login(pods, server);
            thread::spawn(move || {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let answer = client.call(&["SET", &format!("w{id}:{number}"), "x"]);
                    assert_eq!(answer, Value::Simple("OK".to_owned()), "write {number} of writer {id}");
                    acknowledged.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = (0..WRITERS).map(thread).collect();
        Self { stop, acknowledged, threads }
    }

    /// Waits for so many more writes, whatever they take.
    fn go_on(&self, pods: &Pods, more: usize) {
        let least = self.acknowledged.load(Ordering::Relaxed) + more;
        pods.wait("writes to go on", || {
            self.acknowledged.load(Ordering::Relaxed) >= least || self.threads.iter().any(JoinHandle::is_finished)
        });
    }

    /// Ends them. Panics where one of them had an error.
    fn finish(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a writer without an error"));
        self.acknowledged.load(Ordering::Relaxed)
    }
}

/// What certificates everybody presents, as the operator learns of them.
fn shown(pods: &Pods) -> Shown {
    let servers = pods.server_ids().filter_map(|id| Some((id, pods.proved_certificate(usize::from(id.index))?)));
    let sentinels = pods.sentinel_ids().filter_map(|id| {
        let asked = pods.run(async { Admin::connect(pods.sentinel_address(usize::from(id.0)), pods.entry()).await });
        Some((id, asked.ok()?.shown_certificate()?.to_owned()))
    });
    Shown { servers: servers.collect(), sentinels: sentinels.collect() }
}

/// The sentinels that the planner would have restarted.
fn aged(pods: &Pods, shown: &Shown) -> Vec<usize> {
    let revision = Some(Revision("a".to_owned()));
    let pod = Pod { uid: "1".to_owned(), revision, node: None, started: true, ready: true, deleting: false };
    let all = pods.sentinel_ids().map(|id| (Member::Sentinel(id), pod.clone()));
    let mut observed = Observed { pods: all.collect(), ..Observed::default() };
    certify::age_sentinels(&mut observed, &pods.pki, shown);
    let aged = observed.pods.into_iter().filter(|(_, found)| found != &pod);
    aged.map(|(member, _)| if let Member::Sentinel(SentinelId(id)) = member { usize::from(id) } else { usize::MAX }).collect()
}

/// Gives the pods these certificates as the operator does: Secrets change, servers take theirs up, sentinels are restarted in turn.
fn rotate(pods: &mut Pods, pki: Pki) {
    let count = pods.sentinel_ids().count();
    pods.replace_certificates(pki);
    let fingerprint = pods.pki.servers().expect("a certificate").fingerprint().to_owned();
    for server in 0..2 {
        pods.wait("the agents to prove it", || pods.proved_certificate(server).as_ref() == Some(&fingerprint));
        assert_eq!(TlsClient::connect(pods, server).certificate(), fingerprint, "a client sees what the agent proved");
    }
    assert_eq!(aged(pods, &shown(pods)), (0..count).collect::<Vec<_>>(), "sentinels cannot take it up");
    for sentinel in 0..count {
        pods.restart_sentinel(sentinel);
        pods.wait("the sentinel to be back", || pods.sentinel_is_whole(sentinel));
        assert_eq!(aged(pods, &shown(pods)), (sentinel + 1..count).collect::<Vec<_>>());
    }
    let wanted = pods.wanted.clone();
    assert!(certify::is_settled(&wanted, &pods.pki, &shown(pods)));
}

/// Certificates whose authority is about to be replaced: the next one is known to all, and has not signed yet.
fn announced(subjects: &Subjects) -> Pki {
    let long_ago = SystemTime::now() - Duration::from_secs(AUTHORITY_LIFE - AUTHORITY_RENEWAL + AUTHORITY_STEP + 3600);
    let first = Pki::default().next(subjects, false, long_ago).expect("certificates");
    let lately = SystemTime::now() - Duration::from_secs(AUTHORITY_STEP + 1800);
    first.next(subjects, true, lately).expect("certificates")
}

fn check(engine: Engine) {
    let mut pods = Pods::start(engine, announced);
    pods.form();
    // Nobody gets in without TLS, nor with another authority.
    let address = pods.server_address(0);
    assert!(Client::connect_to(address).and_then(|mut client| client.try_call(&["PING"])).is_err());
    assert!(
        TlsClient::try_connect(
            address,
            &Pki::default().next(&pods.subjects(), false, SystemTime::now()).expect("another").bundle()
        )
        .is_err()
    );

    let writers = Writers::start(&pods, 0);
    writers.go_on(&pods, 500);
    let asked = Subjects { rotation: Some("today".to_owned()), ..pods.subjects() };
    let lately = SystemTime::now() - Duration::from_secs(60);
    let on_demand = pods.pki.next(&asked, false, lately).expect("certificates");
    assert_eq!(on_demand.bundle(), pods.pki.bundle());
    rotate(&mut pods, on_demand);
    writers.go_on(&pods, 500);
    // The next authority signs, as everybody trusts it.
    let next_authority = pods.pki.next(&asked, true, SystemTime::now()).expect("certificates");
    rotate(&mut pods, next_authority);
    writers.go_on(&pods, 500);
    let count = writers.finish();
    // The replica came in before all of it; it comes in again.
    let mut admin = TlsClient::login_as_larder(&pods, 0);
    assert_eq!(admin.call(&["CLIENT", "KILL", "TYPE", "replica"]), Value::Int(1));
    // By the primary's own word: the replica may not have noticed yet that it is cut off.
    let mut attached = || admin.call(&["INFO", "replication"]).text().contains("state=online");
    pods.wait("the replica to come back", || attached() && pods.follows(1, 0));
    let keys = |server| usize::try_from(TlsClient::login(&pods, server).call(&["DBSIZE"]).int());
    pods.wait("each acknowledged write to be on the replica", || keys(1) == Ok(count));

    let sentinels: Vec<_> = (0..3).map(|index| pods.sentinel_address(index)).collect();
    let (from, to) = (pods.server_address(0), pods.server_address(1));
    let limit = Duration::from_secs(60);
    let (entry, leadership) = (pods.entry(), &Leadership::for_good());
    let handover = Handover { master: "shop", from, to, sentinels: &sentinels, entry, leadership, limit };
    let outcome = pods.run(handover.run());
    assert!(matches!(outcome, Ok(Outcome::Done { primary }) if primary == to), "{engine:?}: {outcome:?}");
    pods.wait("the former primary to follow", || pods.follows(0, 1));
    assert_eq!(keys(1), Ok(count));
    pods.wait("the former primary to have everything", || keys(0) == Ok(count));
    // The agent of the new primary hands over, too.
    pods.hand_over_by_agent(1);
    pods.wait("server 0 to lead again", || pods.follows(1, 0));
    let written = pods.everything_but_secrets();
    assert!(!written.contains("PRIVATE KEY"), "a key stands where it does not belong");
}

#[test]
fn a_tier_with_tls_forms_rotates_its_certificates_under_load_and_hands_over() {
    check(Engine::Redis7);
}

#[test]
fn a_tier_of_valkey_with_tls_does_the_same_where_valkey_was_built_with_it() {
    if Engine::Valkey9.has_tls() {
        check(Engine::Valkey9);
    } else {
        eprintln!("left out: this valkey-server was built without TLS; name one that has it in LARDER_VALKEY_SERVER");
    }
}
