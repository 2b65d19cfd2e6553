//! Slots move with their keys as Larder's own user, while sidecars work as a binding's.

use std::sync::atomic::{AtomicBool, Ordering};

use larder::operator::admin::Login;
use larder::operator::cache_cluster::resharding::Resharding;
use larder::operator::cache_cluster::users::SYSTEM_USER;

use super::{LIMIT, Scene, Servers, bulk, ok};
use crate::resharding::{Rig, STAYING};
use crate::support::resp::Value;
use crate::support::server::{Engine, RedisCluster};
use crate::support::sidecar::Sidecar;
use crate::support::wait_for;
use crate::write_through::block;

const SHARDS: usize = 4;
const KEPT: usize = 2000;

/// What applications do with keys of three rules, without an error.
fn load(sidecar: &Sidecar, name: &str, stop: &AtomicBool) -> usize {
    let (mut client, mut count) = (sidecar.client(), 0);
    while !stop.load(Ordering::Relaxed) {
        count += 1;
        let [item, queue] = ["item", "queue"].map(|rule| format!("{rule}:{name}{}", count % 300));
        let text = count.to_string();
        assert_eq!(client.call(&["SET", &item, &text]), ok(), "{item}");
        let found = client.call(&["GET", &item]);
        assert!(found == Value::Nil || found == bulk(&text), "{item}: {found:?}");
        assert_eq!(client.call(&["RPUSH", &queue, &text]), Value::Int(1), "{queue}");
        assert_eq!(client.call(&["LPOP", &queue]), bulk(&text), "{queue}");
        assert_eq!(client.line("GET user:1"), bulk("Ann"));
    }
    count
}

/// Servers that know Larder's user, as which they follow and move slots, and keys.
struct Tier {
    scene: Scene,
    rig: Rig,
}

impl Tier {
    fn open(engine: Engine) -> Self {
        let cluster = RedisCluster::start_with(engine, SHARDS, 0, &STAYING);
        let rig = Rig::over(&cluster, Some(Login { user: SYSTEM_USER.to_owned(), password: "system".to_owned() }));
        let scene = block(Scene::open(Servers::Cluster(cluster)));
        let users = scene.users.on_servers();
        let system = users.iter().find(|user| user.name == SYSTEM_USER).expect("Larder has a user");
        let tier = Self { scene, rig };
        tier.set_system_user(&system.rules.iter().map(String::as_str).collect::<Vec<_>>());
        for mut admin in tier.scene.servers.admins() {
            assert_eq!(admin.call(&["CONFIG", "SET", "masteruser", SYSTEM_USER, "masterauth", "system"]), ok());
        }
        let mut client = tier.scene.sidecars[0].client();
        (0..KEPT).for_each(|number| assert_eq!(client.line(&format!("RPUSH queue:kept:{number} {number}")), Value::Int(1)));
        tier
    }

    fn set_system_user(&self, rules: &[&str]) {
        for mut admin in self.scene.servers.admins() {
            assert_eq!(admin.call(&[&["ACL", "SETUSER", SYSTEM_USER], rules].concat()), ok());
        }
    }

    #[track_caller]
    fn assert_all_kept(&self) {
        let mut client = self.scene.sidecars[1].client();
        for number in 0..KEPT {
            let found = client.line(&format!("LINDEX queue:kept:{number} 0"));
            assert_eq!(found, bulk(&number.to_string()), "queue:kept:{number}");
        }
    }
}

#[track_caller]
fn check_moves(engine: Engine) {
    let tier = Tier::open(engine);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sidecars = tier.scene.sidecars.iter().zip(["one", "two"]);
        let loads: Vec<_> = sidecars.map(|(sidecar, name)| scope.spawn(|| load(sidecar, name, &stop))).collect();
        tier.rig.settle(SHARDS as u16 - 1);
        tier.rig.settle(SHARDS as u16);
        stop.store(true, Ordering::Relaxed);
        loads.into_iter().for_each(|load| assert!(load.join().expect("no error") > 0));
    });
    tier.assert_all_kept();
    assert_eq!(tier.scene.refusals(), []);
}

#[test]
fn keys_move_key_by_key_under_the_users_that_servers_have() {
    check_moves(Engine::Redis7);
}

#[test]
fn keys_move_at_once_under_the_users_that_servers_have() {
    check_moves(Engine::Valkey9);
}

#[test]
fn keys_are_imported_under_the_users_that_servers_have() {
    if let Some(engine) = Engine::redis_8() {
        check_moves(engine);
    }
}

/// With keys alone it shows that servers may not hand them over; nothing is lost, and it goes on once they may.
#[test]
fn a_permission_that_lacks_is_told_and_harms_nothing() {
    let tier = Tier::open(Engine::Valkey9);
    tier.set_system_user(&["-cluster|syncslots"]);
    let look = tier.rig.look(SHARDS as u16 - 1);
    tier.rig.apply(&mut Resharding::default(), &look, tier.rig.ports());
    let mut why = None;
    wait_for("the servers to give up", LIMIT, || {
        why = tier.rig.failure(SHARDS - 1, 0);
        why.is_some()
    });
    println!("the servers say: {why:?}");
    assert!(!tier.scene.refusals().is_empty(), "nothing was refused: {why:?}");
    tier.assert_all_kept();
    tier.set_system_user(&["+cluster|syncslots"]);
    tier.rig.settle(SHARDS as u16 - 1);
    tier.assert_all_kept();
}
