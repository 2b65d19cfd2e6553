//! What clients may send and how they may behave, against the running sidecar: Redis' own words, and bounded memory.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::support::resp::{Client, Value, encode};
use super::support::server::{Engine, SentinelCluster};
use super::support::sidecar::{Sidecar, bypass, sentinel_topology};
use super::support::wait_for;

const LONG: Duration = Duration::from_secs(60);
const MIB: u64 = 1024 * 1024;

fn start() -> (SentinelCluster, Sidecar) {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let sidecar = Sidecar::start(&bypass(sentinel_topology(&servers)));
    (servers, sidecar)
}

/// Sends `input` and no more, and reads until the other side closes.
pub fn converse(port: u16, input: &[u8]) -> Vec<u8> {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("it accepts");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    // The other side may close before all is sent.
    let _ = (&stream).write_all(input);
    let _ = stream.shutdown(Shutdown::Write);
    read_to_close(stream, input)
}

/// Sends `input` and reads until the other side closes by itself.
fn converse_until_closed(port: u16, input: &[u8]) -> Vec<u8> {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("it accepts");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let _ = (&stream).write_all(input);
    read_to_close(stream, input)
}

fn read_to_close(mut stream: TcpStream, input: &[u8]) -> Vec<u8> {
    let (mut output, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return output,
            Ok(count) => output.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return output,
            Err(error) => panic!("no close after {}: {error}", input[..input.len().min(60)].escape_ascii()),
        }
    }
}

#[test]
fn malformed_input_gets_redis_own_words_and_a_close() {
    let (servers, sidecar) = start();
    let bare = servers.servers[0].port();
    let long = |start: &str, byte: &str| [start, &byte.repeat(70 * 1024)].concat().into_bytes();
    let mut cases: Vec<Vec<u8>> = [
        &b"*1\r\n!4\r\nPING\r\n"[..],
        b"*1\r\n\r\n",
        b"*1\r\n\n\r\n",
        b"*1\r\n\xe9\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n$abc\r\n",
        b"*1\r\n$04\r\nPING\r\n",
        b"*1\r\n$\r\n",
        b"*1\r\n$536870913\r\n",
        b"*1\r\n$999999999999\r\n",
        b"*abc\r\n",
        b"*01\r\n$4\r\nPING\r\n",
        b"*+1\r\n$4\r\nPING\r\n",
        b"*-0\r\n",
        b"*\r\n",
        b"*99999999999\r\n",
        b"GET 'open\r\n",
        b"GET \"a\"b\r\n",
    ]
    .map(<[u8]>::to_vec)
    .to_vec();
    cases.extend([long("", "x"), long("*", "1"), long("*1\r\n$", "1"), b"*1\r\n".repeat(10_000)]);
    for case in cases {
        // What came before is answered first.
        for before in [&b""[..], b"SET k v\r\nGET k\r\n*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"] {
            let input = [before, &case].concat();
            let (wanted, got) = (converse_until_closed(bare, &input), converse_until_closed(sidecar.port(), &input));
            let shown = input[..input.len().min(80)].escape_ascii();
            assert!(wanted.ends_with(b"\r\n"), "{shown}: the server said {}", wanted.escape_ascii());
            assert_eq!(wanted.escape_ascii().to_string(), got.escape_ascii().to_string(), "{shown}");
        }
    }
    assert_eq!(sidecar.client().line("GET k").text(), "v");
}

/// Odd and still right, nested replies, and commands whose rest never comes.
#[test]
fn unusual_and_unfinished_input_gets_a_bare_servers_answer() {
    let (servers, sidecar) = start();
    let nested = "local t = {} for i = 1, 100 do t = {t} end return t";
    let mut cases = vec![
        b"*1\rX$4\rYPINGZZ".to_vec(),
        b"*-5\r\n*0\r\n*-9223372036854775808\r\nPING\r\n".to_vec(),
        b"\x0bPING\r\n\"PING\"\x0b\r\nSET a\x0bb c\r\n \t PING \r\n".to_vec(),
        b"PI\"NG\"\r\n\"PI\\x4\"\r\n'PING'\r\nECHO \"\"\r\n".to_vec(),
        b"*1\r\n$0\r\n\r\nPING\r\n".to_vec(),
        encode(&["EVAL", nested, "0"]),
    ];
    let set = encode(&["SET", "k", "value"]);
    cases.extend((0..set.len()).map(|cut| [&b"PING\r\n"[..], &set[..cut]].concat()));
    cases.extend([&b"*1\r\n!4\r"[..], b"*1\r\n!", b"*1\r\n\n", b"*2\r\n$4\r\r\nPING\r\n"].map(<[u8]>::to_vec));
    cases.push(b"*1048576\r\n$4\r\nMSET".to_vec());
    cases.push(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$536870912\r\nstart".to_vec());
    for input in cases {
        let (wanted, got) = (converse(servers.servers[0].port(), &input), converse(sidecar.port(), &input));
        assert_eq!(wanted.escape_ascii().to_string(), got.escape_ascii().to_string(), "{}", input.escape_ascii());
    }
    assert_eq!(sidecar.client().line("EXISTS k"), Value::Int(0), "half a command was carried out");
}

/// What clients announce costs nothing; what they send and leave unfinished, its own size.
#[test]
fn unfinished_commands_take_bounded_memory() {
    const CLIENTS: usize = 200;
    let (_servers, sidecar) = start();
    drop(sidecar.client().line("GET k"));
    let inline = [b"SET k ".to_vec(), vec![b'x'; 60 * 1024]].concat();
    for (input, each) in [
        (b"*1048576\r\n$4\r\nMSET".to_vec(), 8 * 1024),
        (b"*1048576\r\n$4\r\nMSET\r\n$536870912\r\nstart".to_vec(), 8 * 1024),
        (b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$536870912\r\nstart".to_vec(), 8 * 1024),
        (b"*1\r\n".to_vec(), 8 * 1024),
        (inline, 160 * 1024),
    ] {
        let before = sidecar.resident_bytes();
        let mut clients: Vec<Client> = (0..CLIENTS).map(|_| sidecar.client()).collect();
        for client in &mut clients {
            client.send(&[&b"PING\r\n"[..], &input].concat()).expect("the sidecar reads");
        }
        clients.iter_mut().for_each(|client| assert_eq!(client.read().expect("a reply"), Value::Simple("PONG".to_owned())));
        assert_eq!(sidecar.client().line("SET other x"), Value::Simple("OK".to_owned()));
        let grown = sidecar.resident_bytes().saturating_sub(before);
        let shown = input[..input.len().min(60)].escape_ascii().to_string();
        println!("{shown}: {} KiB", grown / 1024);
        assert!(grown < CLIENTS as u64 * each + 2 * MIB, "{shown}: grew by {} KiB", grown / 1024);
        // Some leave in the midst of it, without a word.
        drop(clients);
        wait_for("the clients to be forgotten", LONG, || sidecar.metric("larder_clients") == 0.0);
    }
}

#[test]
fn every_way_to_cut_a_pipeline_gets_the_same_replies() {
    let (servers, sidecar) = start();
    let input =
        b"SET a \"x\\x00y\"\r\n\r\n*2\r\n$3\r\nGET\r\n$1\r\na\r\nGET a\n*0\r\n*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$2\r\n\r\n\r\n\
                  *2\r\n$3\r\nGET\r\n$1\r\nb\r\n*1\r\n$4\r\nNOPE\r\nstrlen b\r\nQUIT\r\n";
    let wanted = converse_until_closed(servers.servers[0].port(), input);
    assert!(wanted.ends_with(b"+OK\r\n"), "{}", wanted.escape_ascii());
    for cut in 0..input.len() {
        let mut stream = TcpStream::connect(("127.0.0.1", sidecar.port())).expect("the sidecar accepts");
        stream.set_nodelay(true).expect("nodelay");
        stream.write_all(&input[..cut]).expect("the sidecar reads");
        std::thread::sleep(Duration::from_millis(1));
        stream.write_all(&input[cut..]).expect("the sidecar reads");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("replies and a close");
        assert_eq!(got.escape_ascii().to_string(), wanted.escape_ascii().to_string(), "cut at {cut}");
    }
    let mut stream = TcpStream::connect(("127.0.0.1", sidecar.port())).expect("the sidecar accepts");
    stream.set_nodelay(true).expect("nodelay");
    for byte in input {
        stream.write_all(&[*byte]).expect("the sidecar reads");
    }
    let mut got = Vec::new();
    stream.read_to_end(&mut got).expect("replies and a close");
    assert_eq!(got.escape_ascii().to_string(), wanted.escape_ascii().to_string(), "byte by byte");
}

#[test]
fn a_client_that_only_stops_sending_gets_all_its_replies() {
    let (_servers, sidecar) = start();
    let mut client = sidecar.client();
    for number in 0..10_000 {
        client.send(&encode(&["SET", "k", &number.to_string()])).expect("the sidecar reads");
        client.send(&encode(&["GET", "k"])).expect("the sidecar reads");
    }
    client.stream().shutdown(Shutdown::Write).expect("half a close");
    for number in 0..10_000 {
        assert_eq!(client.read().expect("a reply"), Value::Simple("OK".to_owned()));
        assert_eq!(client.read().expect("a reply").text(), number.to_string());
    }
    assert!(client.read().is_err(), "nothing comes after the last reply");
}

#[test]
fn a_pipeline_of_any_depth_takes_bounded_memory() {
    const DEPTH: usize = 100_000;
    let (_servers, sidecar) = start();
    let value = "v".repeat(1000);
    assert_eq!(sidecar.client().call(&["SET", "k", &value]), Value::Simple("OK".to_owned()));
    let before = sidecar.resident_bytes();
    let mut client = sidecar.client();
    let mut sender = client.stream().try_clone().expect("another handle");
    let sent = std::thread::spawn(move || {
        for number in 0..DEPTH / 2 {
            let pair = [encode(&["SET", &format!("n{}", number % 10), &number.to_string()]), encode(&["GET", "k"])].concat();
            sender.write_all(&pair).expect("the sidecar reads in the end");
        }
    });
    // Nothing is read until no more fits anywhere.
    std::thread::sleep(Duration::from_secs(2));
    let mut peak = sidecar.resident_bytes();
    for number in 0..DEPTH / 2 {
        assert_eq!(client.read().expect("a reply"), Value::Simple("OK".to_owned()));
        assert_eq!(client.read().expect("a reply"), Value::Bulk(value.clone().into_bytes()), "reply {number}");
        if number % 1000 == 0 {
            peak = peak.max(sidecar.resident_bytes());
        }
    }
    sent.join().expect("all is sent");
    // The pipeline is 5 MiB, its replies are 50.
    println!("grew by {} MiB", (peak - before) / MIB);
    assert!(peak < before + 12 * MIB, "grew by {} MiB", (peak - before) / MIB);
}

#[test]
fn a_client_that_never_reads_is_closed_and_holds_nobody_up() {
    let (_servers, sidecar) = start();
    let mut other = sidecar.client();
    let value = "v".repeat(1024 * 1024);
    assert_eq!(other.call(&["SET", "big", &value]), Value::Simple("OK".to_owned()));
    let before = sidecar.resident_bytes();
    let mut slow = sidecar.client();
    slow.send(&encode(&["GET", "big"]).repeat(500)).expect("the sidecar reads");
    let (mut peak, mut served) = (0, 0);
    wait_for("the slow client to be closed", LONG, || {
        served += usize::from(other.call(&["SET", "small", "x"]) == Value::Simple("OK".to_owned()));
        peak = peak.max(sidecar.resident_bytes());
        sidecar.metric("larder_clients") < 2.0
    });
    println!("grew by {} MiB while {served} commands of the other were served", (peak - before) / MIB);
    assert!(served > 0);
    // 500 MiB were asked for; 64 MiB may wait for one client, and a buffer that grows is there twice for a moment.
    assert!(peak < before + 3 * 64 * MIB, "grew by {} MiB", (peak - before) / MIB);
    let mut rest = Vec::new();
    let _ = slow.stream().read_to_end(&mut rest);
    assert!(rest.len() < 200 * value.len(), "it was not closed early");
}

#[test]
fn a_thousand_clients_take_little_memory_and_give_it_back() {
    const CLIENTS: usize = 1_000;
    let limits = std::fs::read_to_string("/proc/self/limits").expect("the kernel tells limits");
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    assert!(files.is_none_or(|files: usize| files >= 4 * CLIENTS), "{files:?} files may be open: `ulimit -n 4096`, as make does");
    let (_servers, sidecar) = start();
    drop(sidecar.client().line("GET k"));
    let idle = sidecar.resident_bytes();
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| sidecar.client()).collect();
    let value = "v".repeat(4000);
    for client in &mut clients {
        client.send(&encode(&["SET", "k", &value]).repeat(10)).expect("the sidecar reads");
        client.send(&encode(&["GET", "k"]).repeat(10)).expect("the sidecar reads");
        (0..20).for_each(|_| drop(client.read().expect("a reply")));
    }
    assert!(sidecar.metric("larder_clients") >= CLIENTS as f64);
    let full = sidecar.resident_bytes();
    drop(clients);
    wait_for("the clients to be forgotten", LONG, || sidecar.metric("larder_clients") == 0.0);
    let after = sidecar.resident_bytes();
    println!("idle {} KiB, with clients {} KiB, after {} KiB", idle / 1024, full / 1024, after / 1024);
    assert!(idle < 10 * MIB, "{} KiB idle", idle / 1024);
    assert!(full < 20 * MIB, "{} KiB for {CLIENTS} clients", full / 1024);
    assert!(after < idle + 3 * MIB, "{} KiB stay", after.saturating_sub(idle) / 1024);
}
