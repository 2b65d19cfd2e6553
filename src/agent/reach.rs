//! Before a sentinel starts: whether those that it remembers can be reached, or at least say no.
//!
//! A sentinel that connects to an address behind which a pod has just died gets no answer at all. The kernel repeats the attempt after
//! one, three, seven and fifteen seconds, and the sentinel does not begin another within fifteen: until then it takes a server that is
//! long back for dead, and replaces it. Where all pods of a tier are replaced at once, that costs what the primary has acknowledged
//! meanwhile. So a sentinel waits a little until everybody's address leads somewhere again.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// How long one attempt waits for an answer: as long as the kernel, before it repeats it.
const ATTEMPT: Duration = Duration::from_secs(1);
/// How long it rests where there is no way to the address.
const REST: Duration = Duration::from_millis(200);

/// Those whom a sentinel's configuration names: the primary, its replicas, and the other sentinels.
pub fn remembered(configuration: &str) -> BTreeSet<SocketAddr> {
    let address = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let ["sentinel", "monitor" | "known-replica" | "known-slave" | "known-sentinel", _, host, port, ..] = words[..] else {
            return None;
        };
        Some(SocketAddr::new(host.parse().ok()?, port.parse().ok()?))
    };
    configuration.lines().filter_map(address).collect()
}

/// Waits until each of them accepts a connection or refuses one, at most for `limit`: those that did neither.
pub fn wait(addresses: &BTreeSet<SocketAddr>, limit: Duration) -> Vec<SocketAddr> {
    let deadline = Instant::now() + limit;
    thread::scope(|scope| {
        let asked: Vec<_> = addresses.iter().map(|address| (address, scope.spawn(|| answers(*address, deadline)))).collect();
        let silent = asked.into_iter().filter_map(|(address, answers)| (!answers.join().unwrap_or(true)).then_some(*address));
        silent.collect()
    })
}

fn answers(address: SocketAddr, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        match TcpStream::connect_timeout(&address, left.min(ATTEMPT)) {
            Ok(_) => return true,
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) => return true,
            Err(error) if error.kind() == ErrorKind::TimedOut => {}
            Err(_) => thread::sleep(REST.min(left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn everybody_whom_a_sentinel_names_is_found() {
        let file = "port 26379\nsentinel myid abc\nsentinel monitor main 10.0.0.1 6379 2\nsentinel auth-pass main x\n\
                    sentinel known-replica main 10.0.0.2 6379\nsentinel known-sentinel main 10.0.0.3 26379 def\n\
                    sentinel known-replica main a.name 6379\nsentinel known-replica main\n";
        let found: Vec<String> = remembered(file).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.1:6379", "10.0.0.2:6379", "10.0.0.3:26379"]);
    }

    #[test]
    fn who_accepts_or_refuses_is_not_waited_for() {
        let open = TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let addresses = BTreeSet::from([open.local_addr().unwrap(), closed]);
        assert!(wait(&addresses, Duration::from_secs(60)).is_empty());
        assert_eq!(wait(&BTreeSet::from([closed]), Duration::ZERO), [closed]);
    }
}
