//! Child processes on loopback, stopped by their id when dropped.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A running program.
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts `command`; its output goes to `log`.
    pub fn start(mut command: Command, log: &Path) -> Result<Self, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = File::create(log).map_err(|error| format!("{}: {error}", log.display()))?;
        let errors = output.try_clone().map_err(|error| error.to_string())?;
        let child = command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn();
        child.map(|child| Self { child }).map_err(|error| format!("{name} does not start: {error}; run `make setup`"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end, and waits until it has.
    pub fn terminate(mut self) -> Result<(), String> {
        let asked = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
        asked.map_err(|error| format!("kill: {error}"))?;
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline {
            if let Ok(Some(_)) = self.child.try_wait() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(format!("process {} does not end on SIGTERM", self.pid()))
    }

    /// Waits until `address` answers PING. The end of `log` is shown where it does not.
    pub fn await_pong(&mut self, address: SocketAddr, log: &Path) -> Result<(), String> {
        let deadline = Instant::now() + START_LIMIT;
        let mut last = String::new();
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                last = status.to_string();
                break;
            }
            match ask(address, b"*1\r\n$4\r\nPING\r\n", 7) {
                Ok(reply) if reply.starts_with("+PONG") => return Ok(()),
                Ok(reply) => last = reply,
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let log = std::fs::read_to_string(log).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(15).collect();
        Err(format!("{address} does not answer PING: {last}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address of loopback whose port was free a moment ago.
pub fn free_address() -> Result<SocketAddr, String> {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    bound.map_err(|error| format!("no free port: {error}"))
}

/// Sends `request` and reads until `length` bytes or the end.
pub fn ask(address: SocketAddr, request: &[u8], length: usize) -> std::io::Result<String> {
    let limit = Duration::from_secs(2);
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(request)?;
    let mut reply = Vec::new();
    stream.take(length as u64).read_to_end(&mut reply)?;
    Ok(String::from_utf8_lossy(&reply).into_owned())
}
