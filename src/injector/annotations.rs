//! What a pod asks of the injector, and what the injector writes on it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::api::cache_policy::EnvMode;
use crate::policy::ByteSize;

/// `false`: no sidecar for this pod.
pub const INJECT: &str = "larder.dev/inject";
/// The names of the containers that get variables and the socket, separated by commas; otherwise all.
pub const CONTAINERS: &str = "larder.dev/inject-containers";
/// `IfAbsent` or `Override`.
pub const ENV: &str = "larder.dev/inject-env";
/// The port on loopback.
pub const PORT: &str = "larder.dev/inject-port";
/// `true` or `false`: whether there is a Unix socket.
pub const SOCKET: &str = "larder.dev/inject-socket";
/// The sidecar's numeric user.
pub const UID: &str = "larder.dev/sidecar-uid";
/// The sidecar's image.
pub const IMAGE: &str = "larder.dev/sidecar-image";
/// The sidecar's share of a processor.
pub const CPU: &str = "larder.dev/sidecar-cpu";
/// The sidecar's memory.
pub const MEMORY: &str = "larder.dev/sidecar-memory";
/// What the injector wrote: see [`Record`].
pub const INJECTED: &str = "larder.dev/injected";
/// The label with the binding's name.
pub const BINDING: &str = "larder.dev/binding";

/// The least memory of a sidecar.
const LEAST_MEMORY: u64 = 32 << 20;
/// The least port that needs no privilege everywhere.
const LEAST_PORT: u16 = 1024;

/// What a pod asks for. `None`: as the policies say, or the settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// No sidecar.
    pub opted_out: bool,
    /// The containers that get variables and the socket.
    pub containers: Option<BTreeSet<String>>,
    /// See [`EnvMode`].
    pub env: Option<EnvMode>,
    /// See [`PORT`].
    pub port: Option<u16>,
    /// See [`SOCKET`].
    pub socket: Option<bool>,
    /// See [`UID`].
    pub uid: Option<i64>,
    /// See [`IMAGE`].
    pub image: Option<String>,
    /// See [`CPU`].
    pub cpu: Option<String>,
    /// See [`MEMORY`].
    pub memory: Option<String>,
}

/// What the injector did to a pod, as its annotation tells: a second look tells by it what is its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The CacheCluster.
    pub cluster: String,
    /// The port on loopback.
    pub port: u16,
    /// The port of health and metrics.
    pub admin: u16,
}

impl Record {
    /// What an earlier look wrote. A text that is none of ours counts as nothing.
    pub fn of(pod: &Value) -> Option<Self> {
        serde_json::from_str(pod["metadata"]["annotations"][INJECTED].as_str()?).ok()
    }
}

/// Reads the wishes. The error says which cannot be, and what to write.
pub fn wishes(pod: &Value) -> Result<Wishes, String> {
    let text = |name: &str| pod["metadata"]["annotations"][name].as_str();
    let truth = |text: &str| text.parse::<bool>().ok();
    let mode = |text: &str| match text {
        "IfAbsent" => Some(EnvMode::IfAbsent),
        "Override" => Some(EnvMode::Override),
        _ => None,
    };
    let names = |text: &str| {
        let names: BTreeSet<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        names.iter().all(|name| !name.is_empty()).then_some(names)
    };
    let port = |text: &str| text.parse().ok().filter(|port| *port >= LEAST_PORT);
    let uid = |text: &str| text.parse::<i64>().ok().filter(|uid| (1..=i64::from(i32::MAX)).contains(uid));
    let image = |text: &str| (!text.is_empty() && !text.contains(char::is_whitespace)).then(|| text.to_owned());
    let memory = |text: &str| {
        let size: ByteSize = text.parse().ok()?;
        (size.as_bytes() >= LEAST_MEMORY).then(|| text.to_owned())
    };
    Ok(Wishes {
        opted_out: parsed(INJECT, text(INJECT), truth, "false or true")? == Some(false),
        containers: parsed(CONTAINERS, text(CONTAINERS), names, "names of containers, separated by commas")?,
        env: parsed(ENV, text(ENV), mode, "IfAbsent or Override")?,
        port: parsed(PORT, text(PORT), port, "a port from 1024 to 65535")?,
        socket: parsed(SOCKET, text(SOCKET), truth, "true or false")?,
        uid: parsed(UID, text(UID), uid, "a user's number from 1 to 2147483647, since the sidecar never runs as root")?,
        image: parsed(IMAGE, text(IMAGE), image, "an image such as registry.example/larder:1")?,
        cpu: parsed(CPU, text(CPU), cpu, "CPUs or thousandths of one, such as 250m, 1 or 1.5")?,
        memory: parsed(MEMORY, text(MEMORY), memory, "at least 32Mi, in whole numbers, such as 128Mi")?,
    })
}

fn parsed<T>(name: &str, text: Option<&str>, parse: impl Fn(&str) -> Option<T>, write: &str) -> Result<Option<T>, String> {
    let refusal = |text: &str| format!("annotation {name}: {text:?} cannot be used: write {write}, or remove it");
    text.map(|text| parse(text).ok_or_else(|| refusal(text))).transpose()
}

/// A share of processors as Kubernetes writes it, above zero.
fn cpu(text: &str) -> Option<String> {
    let number = text.strip_suffix('m').unwrap_or(text);
    let (whole, rest) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let is_number = !whole.is_empty() && whole.len() <= 6 && rest.len() <= 3 && digits(whole) && digits(rest);
    let is_whole = !number.contains('.') || (!rest.is_empty() && !text.ends_with('m'));
    let is_something = number.bytes().any(|byte| (b'1'..=b'9').contains(&byte));
    (is_number && is_whole && is_something).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(name: &str, text: &str) -> Result<Wishes, String> {
        wishes(&json!({"metadata": {"annotations": {name: text}}}))
    }

    #[test]
    fn a_pod_may_ask_for_what_makes_sense() {
        assert_eq!(wishes(&json!({})), Ok(Wishes::default()));
        assert_eq!(asked(INJECT, "false"), Ok(Wishes { opted_out: true, ..Wishes::default() }));
        assert_eq!(asked(INJECT, "true"), Ok(Wishes::default()));
        let two: BTreeSet<String> = ["app".to_owned(), "worker".to_owned()].into();
        assert_eq!(asked(CONTAINERS, "app, worker").unwrap().containers, Some(two));
        assert_eq!(asked(ENV, "Override").unwrap().env, Some(EnvMode::Override));
        assert_eq!(asked(SOCKET, "true").unwrap().socket, Some(true));
        assert_eq!(asked(UID, "1000730000").unwrap().uid, Some(1_000_730_000));
        assert_eq!(asked(IMAGE, "registry.example/larder:2").unwrap().image.as_deref(), Some("registry.example/larder:2"));
        for (name, text) in [(CPU, "250m"), (CPU, "1"), (CPU, "1.5"), (MEMORY, "64Mi"), (MEMORY, "1Gi"), (PORT, "1024")] {
            assert!(asked(name, text).is_ok(), "{name} {text}");
        }
    }

    #[test]
    fn what_makes_none_is_refused_with_what_to_write() {
        for (name, text, write) in [
            (INJECT, "off", "write false or true"),
            (CONTAINERS, "app,", "names of containers"),
            (ENV, "Always", "IfAbsent or Override"),
            (PORT, "80", "1024"),
            (PORT, "70000", "65535"),
            (SOCKET, "yes", "true or false"),
            (UID, "0", "never runs as root"),
            (UID, "nobody", "number"),
            (IMAGE, "", "an image"),
            (IMAGE, "a b", "an image"),
            (CPU, "0", "such as 250m"),
            (CPU, "1.", "such as 250m"),
            (CPU, "1.5m", "such as 250m"),
            (CPU, "-1", "such as 250m"),
            (MEMORY, "1Mi", "at least 32Mi"),
            (MEMORY, "much", "at least 32Mi"),
        ] {
            let refusal = asked(name, text).expect_err(text);
            assert!(refusal.contains(write) && refusal.contains(name), "{refusal}");
        }
    }

    #[test]
    fn only_a_record_of_ours_counts() {
        let pod = |text: &str| json!({"metadata": {"annotations": {INJECTED: text}}});
        let record = Record { cluster: "main".to_owned(), port: 6379, admin: 9121 };
        let written = serde_json::to_string(&record).unwrap();
        assert_eq!(Record::of(&pod(&written)), Some(record));
        assert_eq!(Record::of(&pod("{}")), None);
        assert_eq!(Record::of(&json!({})), None);
    }
}
