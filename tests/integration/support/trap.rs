//! Stands between processes and servers, and holds one of them up at the moment when what it waits for passes by: so a test can let
//! something happen at a named point of what a process does, since each step of that is an exchange with somebody.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::frames::Frames;
use super::wait_for;

/// A moment of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// What is sent holds the text: the server does not see it.
    Asked,
    /// The server answers what held the text: who asked does not see it.
    Answered,
    /// The answer holds the text: who asked does not see it.
    Replied,
}

/// A point of what a process does, by a text that passes there.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// What it does there.
    pub name: &'static str,
    pub when: When,
    pub text: &'static str,
    /// A text that the same connection must have carried before, if any: it tells whose it is.
    pub behind: &'static str,
    /// Since this one, if any.
    pub since: &'static str,
}

impl Point {
    /// Where `text` passes.
    pub const fn new(name: &'static str, when: When, text: &'static str) -> Self {
        Self { name, when, text, behind: "", since: "" }
    }

    /// On a connection that has carried `behind` since it last carried `since`.
    pub const fn within(self, since: &'static str, behind: &'static str) -> Self {
        Self { behind, since, ..self }
    }
}

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Who came there dies.
    Dies,
    /// Who came there stands still for a while.
    StandsStill,
    /// Whom it asks dies.
    IsLeftAlone,
}

impl Fate {
    pub const ALL: [Self; 3] = [Self::Dies, Self::StandsStill, Self::IsLeftAlone];
}

/// How often what happened where.
pub type Hits = BTreeMap<(&'static str, Fate), usize>;

/// Processes that come to points, and the servers that they ask.
pub trait Befallen {
    /// What is told of a process that takes another's place.
    type World;
    /// For how long one stands still, in milliseconds.
    const STANDS_STILL: Range<u64>;

    /// Another takes the place of a process that died.
    fn succeed(&mut self, dead: u32, world: &Self::World);

    /// The server at this port dies, and is there again.
    fn leave_alone(&mut self, server: u16, random: &mut fastrand::Rng);

    /// Lets `fate` befall the process that is held up at a point, or whom it asks.
    fn befall_at(&mut self, fate: Fate, caught: Caught, (trap, world): (&Trap, &Self::World), random: &mut fastrand::Rng) {
        let Caught { process, server } = caught;
        match fate {
            Fate::Dies => {
                signal(process, "KILL");
                trap.release();
                self.succeed(process, world);
            }
            Fate::StandsStill => {
                signal(process, "STOP");
                std::thread::sleep(Duration::from_millis(random.u64(Self::STANDS_STILL)));
                trap.release();
                signal(process, "CONT");
            }
            Fate::IsLeftAlone => {
                self.leave_alone(server, random);
                trap.release();
            }
        }
    }
}

/// Sends a signal by name, such as `STOP`.
pub fn signal(process: u32, name: &str) {
    let status = std::process::Command::new("kill").args([format!("-{name}"), process.to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()), "kill -{name} {process}");
}

/// All that stand before the servers of a test.
#[derive(Default)]
pub struct Trap {
    inner: Arc<Inner>,
    doors: Mutex<Vec<(u16, JoinHandle<()>)>>,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    over: AtomicBool,
}

#[derive(Default)]
struct State {
    armed: Option<Point>,
    /// The connection that is held up.
    caught: Option<Ends>,
    /// Who hears nothing of which server, and is not heard there.
    cut: Option<Caught>,
}

/// The ports at both ends of a connection, and that of the door between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ends {
    asks: u16,
    door: u16,
    server: u16,
}

/// Who is held up, or cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caught {
    /// The process.
    pub process: u32,
    /// The port of the server that it asks.
    pub server: u16,
}

impl Trap {
    /// A port behind which there is nothing yet.
    pub fn open() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").expect("loopback has a free port")
    }

    /// Stands before the server at `server`; the port where it does.
    pub fn stand_before(&self, door: TcpListener, server: u16) -> u16 {
        let port = door.local_addr().expect("it is bound").port();
        let inner = self.inner.clone();
        let acceptor = std::thread::spawn(move || {
            for client in door.incoming() {
                if inner.over.load(Ordering::SeqCst) {
                    return;
                }
                // A server that is gone is gone for its clients, too: the connection is closed.
                let (Ok(client), Ok(stream)) = (client, TcpStream::connect(("127.0.0.1", server))) else { continue };
                Line::pass_on(&client, &stream, (port, server), &inner);
            }
        });
        self.doors.lock().unwrap().push((port, acceptor));
        port
    }

    /// Holds the next of these processes up that comes to `point`. Nobody else is held up for longer than a moment.
    #[track_caller]
    pub fn catch(&self, point: Point, processes: &[u32], within: Duration) -> Caught {
        let deadline = Instant::now() + within;
        loop {
            self.inner.state.lock().unwrap().armed = Some(point);
            let caught = self.caught(Duration::from_secs(5));
            match caught.map(|ends| Some(Caught { process: ends.owner(processes)?, server: ends.server })) {
                Some(Some(caught)) => return caught,
                Some(None) => self.release(),
                None => {}
            }
            assert!(Instant::now() < deadline, "nobody comes to the point `{}` within {within:?}", point.name);
        }
    }

    /// Cuts a process off from a server: both wait for each other, on all their connections, until [`Trap::mend`].
    pub fn cut(&self, process: u32, server: u16) {
        self.inner.state.lock().unwrap().cut = Some(Caught { process, server });
    }

    /// Nobody is cut off any more.
    pub fn mend(&self) {
        self.inner.state.lock().unwrap().cut = None;
        self.inner.changed.notify_all();
    }

    /// Waits until somebody is waited for.
    #[track_caller]
    pub fn wait_until_armed(&self) {
        wait_for("somebody to be waited for", Duration::from_secs(60), || self.is_armed());
    }

    /// Whether somebody is waited for who has not come.
    fn is_armed(&self) -> bool {
        self.inner.state.lock().unwrap().armed.is_some()
    }

    fn caught(&self, within: Duration) -> Option<Ends> {
        let state = self.inner.state.lock().unwrap();
        let waited = self.inner.changed.wait_timeout_while(state, within, |state| state.caught.is_none());
        waited.unwrap().0.caught
    }

    /// Lets whoever is held up go on, where it still is there.
    pub fn release(&self) {
        let mut state = self.inner.state.lock().unwrap();
        (state.armed, state.caught) = (None, None);
        self.inner.changed.notify_all();
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.inner.over.store(true, Ordering::SeqCst);
        self.mend();
        self.release();
        for (port, acceptor) in self.doors.lock().unwrap().drain(..) {
            // It waits for one more.
            let _ = TcpStream::connect(("127.0.0.1", port));
            let _ = acceptor.join();
        }
    }
}

/// One connection.
struct Line {
    inner: Arc<Inner>,
    ends: Ends,
    /// How many replies there are before that which is waited for, if any is.
    expects: Mutex<Option<u64>>,
}

impl Line {
    /// Both directions, each on a thread of its own, until either end is gone.
    fn pass_on(client: &TcpStream, server: &TcpStream, ports: (u16, u16), inner: &Arc<Inner>) {
        let Ok(asks) = client.peer_addr().map(|address| address.port()) else { return };
        let ends = Ends { asks, door: ports.0, server: ports.1 };
        let line = Arc::new(Self { inner: inner.clone(), ends, expects: Mutex::new(None) });
        for asks in [true, false] {
            let (Ok(client), Ok(server)) = (client.try_clone(), server.try_clone()) else { return };
            let line = line.clone();
            std::thread::spawn(move || {
                let _ = if asks {
                    line.carry(&client, &server, (Frames::commands(), Self::asked))
                } else {
                    line.carry(&server, &client, (Frames::replies(), Self::replied))
                };
                let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
            });
        }
    }

    fn carry(&self, mut from: &TcpStream, mut to: &TcpStream, (mut frames, look): (Frames, Look)) -> io::Result<()> {
        to.set_nodelay(true)?;
        let (mut seen, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
        loop {
            let length = from.read(&mut chunk)?;
            if length == 0 {
                return Ok(());
            }
            seen.extend_from_slice(&chunk[..length]);
            look(self, &Passing { seen: &seen, fresh: length }, &mut frames);
            self.wait_while_cut();
            to.write_all(&chunk[..length])?;
            // A text may come in two pieces, and what tells whose the connection is came long before.
            let kept = seen.len().min(64 * 1024);
            seen.drain(..seen.len() - kept);
        }
    }

    fn wait_while_cut(&self) {
        let cut = self.inner.state.lock().unwrap().cut.filter(|cut| cut.server == self.ends.server);
        if cut.is_some_and(|cut| self.ends.owner(&[cut.process]).is_some()) {
            let state = self.inner.state.lock().unwrap();
            drop(self.inner.changed.wait_while(state, |state| state.cut == cut));
        }
    }

    fn asked(&self, passing: &Passing<'_>, frames: &mut Frames) {
        let point = self.inner.state.lock().unwrap().armed.filter(|point| point.when != When::Replied);
        let found = point.and_then(|point| Some((point.when, passing.place_of(&point)?)));
        let (before, rest) = passing.fresh().split_at(found.map_or(0, |(_, place)| place));
        frames.pass(before);
        let number = frames.whole();
        frames.pass(rest);
        match found {
            Some((When::Asked, _)) => self.hold(),
            Some(_) => *self.expects.lock().unwrap() = Some(number),
            None => {}
        }
    }

    fn replied(&self, passing: &Passing<'_>, frames: &mut Frames) {
        frames.pass(passing.fresh());
        let point = self.inner.state.lock().unwrap().armed.filter(|point| point.when == When::Replied);
        let is_it = point.is_some_and(|point| passing.place_of(&point).is_some());
        let answers = self.expects.lock().unwrap().take_if(|number| frames.whole() > *number).is_some();
        if answers || is_it {
            self.hold();
        }
    }

    /// Waits until the test has done what it wants to do, unless another is being waited for already.
    fn hold(&self) {
        let mut state = self.inner.state.lock().unwrap();
        if state.armed.take().is_none() || state.caught.is_some() {
            return;
        }
        state.caught = Some(self.ends);
        self.inner.changed.notify_all();
        drop(self.inner.changed.wait_while(state, |state| state.caught == Some(self.ends)));
    }
}

/// Looks at what passes by.
type Look = fn(&Line, &Passing<'_>, &mut Frames);

/// What passes by in one direction, behind what did before.
struct Passing<'a> {
    seen: &'a [u8],
    /// How many of these bytes are new.
    fresh: usize,
}

impl Passing<'_> {
    fn fresh(&self) -> &[u8] {
        &self.seen[self.seen.len() - self.fresh..]
    }

    /// Where among the new bytes the text of a point begins that is come to; it may have begun before them.
    fn place_of(&self, point: &Point) -> Option<usize> {
        let find = |bytes: &[u8], text: &str| memchr::memmem::find(bytes, text.as_bytes());
        let old = self.seen.len() - self.fresh;
        let from = old.saturating_sub(point.text.len() - 1);
        let place = from + find(&self.seen[from..], point.text)?;
        let since = if point.since.is_empty() { Some(0) } else { memchr::memmem::rfind(self.seen, point.since.as_bytes()) };
        find(&self.seen[since?..], point.behind)?;
        Some(place.saturating_sub(old))
    }
}

impl Ends {
    /// Which of these processes has the connection. The kernel's table is not read at one moment: a line may lack in it while others come and go,
    /// so it is read again where it does.
    fn owner(self, processes: &[u32]) -> Option<u32> {
        let inode = (0..100).find_map(|_| {
            let table = fs::read_to_string("/proc/net/tcp").ok()?;
            self.inode_in(&table).map(str::to_owned).or_else(|| {
                std::thread::sleep(Duration::from_millis(10));
                None
            })
        })?;
        let socket = format!("socket:[{inode}]");
        let has = |process: &&u32| {
            let files = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
            files.filter_map(|file| fs::read_link(file.path()).ok()).any(|target| target.to_string_lossy() == socket)
        };
        processes.iter().find(has).copied()
    }

    /// The socket of who asks, by the kernel's table of connections. Its port alone does not tell: connections to other servers may have it, too.
    fn inode_in(self, table: &str) -> Option<&str> {
        let port = |address: &str| u16::from_str_radix(address.rsplit_once(':')?.1, 16).ok();
        table.lines().skip(1).find_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [_, local, remote, _, _, _, _, _, _, inode, ..] = fields[..] else { return None };
            (port(local) == Some(self.asks) && port(remote) == Some(self.door)).then_some(inode)
        })
    }
}

#[test]
fn who_comes_to_a_point_is_held_up_there_and_nobody_else() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let trap = Trap::default();
    let behind = server.local_addr().unwrap().port();
    let port = trap.stand_before(Trap::open(), behind);
    std::thread::spawn(move || {
        for mut client in server.incoming().flatten() {
            std::thread::spawn(move || {
                let mut chunk = [0; 64];
                while let Ok(length @ 1..) = client.read(&mut chunk) {
                    client.write_all(&[b"re:", &chunk[..length]].concat()).unwrap();
                }
            });
        }
    });
    let own = [std::process::id()];
    let limit = Duration::from_secs(60);
    let ask = |client: &mut TcpStream, text: &str| client.write_all(text.as_bytes()).unwrap();
    let answer = |client: &mut TcpStream| {
        let mut chunk = [0; 64];
        let length = client.read(&mut chunk).unwrap();
        String::from_utf8_lossy(&chunk[..length]).into_owned()
    };
    let [mut one, mut other] = [(); 2].map(|()| TcpStream::connect(("127.0.0.1", port)).unwrap());
    for (when, text) in [(When::Asked, "go"), (When::Answered, "go"), (When::Replied, "re:go")] {
        let point = Point { name: "a point", when, text, behind: "", since: "" };
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                trap.wait_until_armed();
                ask(&mut one, "go");
            });
            assert_eq!(trap.catch(point, &own, limit), Caught { process: own[0], server: behind }, "{when:?}");
            asked.join().unwrap();
        });
        ask(&mut other, "go");
        assert_eq!(answer(&mut other), "re:go", "{when:?}: it is held up");
        one.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(one.read(&mut [0; 1]).is_err(), "{when:?}: it is not held up");
        trap.release();
        one.set_read_timeout(Some(limit)).unwrap();
        assert_eq!(answer(&mut one), "re:go", "{when:?}");
    }
}

#[test]
fn the_answer_is_that_to_the_command_which_held_the_text() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let (trap, own, limit) = (Trap::default(), [std::process::id()], Duration::from_secs(60));
    let port = trap.stand_before(Trap::open(), server.local_addr().unwrap().port());
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut accepted, _) = server.accept().unwrap();
    client.set_read_timeout(Some(limit)).unwrap();
    let [mut first, mut second] = [[0; 6]; 2];
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            wait_for("somebody to be waited for", limit, || trap.is_armed());
            client.write_all(b"*1\r\n$3\r\none\r\n*1\r\n$3\r\ntwo\r\n").unwrap();
            accepted.read_exact(&mut [0; 26]).unwrap();
            accepted.write_all(b"+one\r\n").unwrap();
            client.read_exact(&mut first).unwrap();
            accepted.write_all(b"+two\r\n").unwrap();
        });
        trap.catch(Point::new("a point", When::Answered, "two"), &own, limit);
        asked.join().unwrap();
    });
    assert_eq!(&first, b"+one\r\n");
    trap.release();
    client.read_exact(&mut second).unwrap();
    assert_eq!(&second, b"+two\r\n");
}

#[test]
fn a_connection_is_told_by_both_of_its_ports() {
    let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
        0: 0100007F:2328 0100007F:1388 06 00000000:00000000 00:00000000 00000000     0        0 0 3 0\n\
        1: 0100007F:1770 0100007F:2328 01 00000000:00000000 00:00000000 00000000     0        0 18 1 0\n\
        2: 0100007F:2328 0100007F:1770 01 00000000:00000000 00:00000000 00000000     0        0 17 1 0\n";
    let ends = |asks, door| Ends { asks, door, server: 1 };
    assert_eq!(ends(9000, 6000).inode_in(table), Some("17"));
    assert_eq!(ends(9000, 6001).inode_in(table), None);
}

#[test]
fn what_was_carried_before_counts_since_its_beginning_alone() {
    let point = Point { name: "a commit", when: When::Asked, text: "COMMIT", behind: "moves", since: "BEGIN" };
    let comes = |seen: &str| Passing { seen: seen.as_bytes(), fresh: 6 }.place_of(&point).is_some();
    assert!(comes("BEGIN moves COMMIT"));
    assert!(!comes("BEGIN moves COMMIT BEGIN takes COMMIT"));
    assert!(!comes("moves COMMIT"));
}
