//! A real Postgres on loopback in a temporary directory, stopped when the last test that uses it ends.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use tempfile::TempDir;

use super::certificates::write_certificates;
use super::server::free_port;

/// How long the server may take to start. Long: test machines are busy.
const START_LIMIT: Duration = Duration::from_secs(60);

/// One server process. Its superuser is `postgres` with the password `secret`; it logs every statement, but no parameter.
pub struct Postgres {
    port: u16,
    child: Child,
    directory: TempDir,
    settings: Vec<String>,
}

impl Postgres {
    /// The server that all tests of this process share. Give each test a database of its own.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::start());
            *shared = Arc::downgrade(&server);
            server
        })
    }

    /// A server of one's own.
    pub fn start() -> Self {
        Self::start_in(TempDir::new().expect("a temporary directory"), &[])
    }

    /// A server of one's own that tells of its changes.
    pub fn start_logical() -> Self {
        Self::start_logical_with(&[])
    }

    /// [`Postgres::start_logical`], with more settings, such as `max_slot_wal_keep_size=1MB`.
    pub fn start_logical_with(settings: &[&str]) -> Self {
        let all: Vec<String> = ["wal_level=logical"].iter().chain(settings).map(|setting| (*setting).to_owned()).collect();
        Self::start_in(TempDir::new().expect("a temporary directory"), &all)
    }

    /// A server that writes to disk before it confirms, and logs no statement, as a database that is measured must.
    pub fn start_durable() -> Self {
        Self::start_in(TempDir::new().expect("a temporary directory"), &["fsync=on", "log_statement=none"].map(str::to_owned))
    }

    /// A server that speaks TLS only, to clients with a certificate only, and tells of its changes, with the files that [`write_certificates`] made.
    pub fn start_secured() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        write_certificates(directory.path());
        std::fs::set_permissions(directory.path().join("key.pem"), Permissions::from_mode(0o600)).expect("a file of ours");
        let rules = "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256 clientcert=verify-ca\n";
        std::fs::write(directory.path().join("hba"), rules).expect("the directory is writable");
        let files = [("ssl_cert_file", "cert.pem"), ("ssl_key_file", "key.pem"), ("ssl_ca_file", "ca.pem"), ("hba_file", "hba")];
        let mut settings = vec!["ssl=on".to_owned(), "wal_level=logical".to_owned()];
        settings.extend(files.map(|(name, file)| format!("{name}={}", directory.path().join(file).display())));
        Self::start_in(directory, &settings)
    }

    fn start_in(directory: TempDir, settings: &[String]) -> Self {
        let data = directory.path().join("data");
        std::fs::write(directory.path().join("password"), "secret\n").expect("the directory is writable");
        if is_root() {
            let owner = format!("{}:", unprivileged());
            run(Command::new("chown").arg("-R").arg(owner).arg(directory.path()));
        }
        let password = directory.path().join("password");
        let mut initdb = as_user(&binary("initdb"), directory.path());
        run(initdb
            .arg("-D")
            .arg(&data)
            .args(["-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "-A", "scram-sha-256"])
            .arg(format!("--pwfile={}", password.display())));
        for _ in 0..5 {
            let port = free_port();
            let child = spawn(directory.path(), port, settings);
            let elsewhere = TempDir::new().expect("a temporary directory");
            let mut server = Self { port, child, directory: elsewhere, settings: settings.to_vec() };
            if server.answers(directory.path()) {
                server.directory = directory;
                return server;
            }
        }
        panic!("postgres does not start: {}", std::fs::read_to_string(directory.path().join("log")).unwrap_or_default());
    }

    fn answers(&mut self, directory: &Path) -> bool {
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline && self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            // The socket answers whatever the port asks of its clients.
            let url = format!("postgres://postgres:secret@localhost:{}/postgres?host={}", self.port, directory.display());
            // In a thread: a test may call this from within its own runtime.
            let answered = std::thread::spawn(move || runtime.block_on(async { connect(&url).await.is_ok() })).join();
            if answered.is_ok_and(|answered| answered) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(30));
        }
        false
    }

    /// Ends the server and all its connections at once, and starts it again: what it had committed is there.
    pub fn restart(&mut self) {
        self.quit();
        let (directory, deadline) = (self.directory.path().to_owned(), Instant::now() + START_LIMIT);
        loop {
            self.child = spawn(&directory, self.port, &self.settings);
            if self.answers(&directory) {
                return;
            }
            // It ends at once where a child of the one before still has its memory.
            assert!(Instant::now() < deadline, "postgres does not come back: {}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends the server and all its connections at once, and starts it again after `meanwhile`.
    pub fn interrupt(&mut self, meanwhile: impl FnOnce()) {
        self.quit();
        meanwhile();
        self.restart();
    }

    /// SIGQUIT ends the server and its children at once; killed, the children would linger.
    fn quit(&mut self) {
        let _ = Command::new("kill").args(["-QUIT", &self.child.id().to_string()]).status();
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of a database.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres:secret@127.0.0.1:{}/{database}", self.port)
    }

    /// The URL of a database through the Unix socket, where nothing is encrypted.
    pub fn local_url(&self, database: &str) -> String {
        format!("postgres://postgres:secret@localhost:{}/{database}?host={}", self.port, self.directory.path().display())
    }

    /// Where the server's files are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Creates a database, runs `statements` in it, and gives its URL.
    pub async fn database(&self, statements: &[&str]) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.run("postgres", &[&format!("CREATE DATABASE {name}")]).await;
        self.run(&name, statements).await;
        self.url(&name)
    }

    /// Runs statements in a database.
    pub async fn run(&self, database: &str, statements: &[&str]) {
        let mut connection = connect(&self.local_url(database)).await.expect("the server accepts");
        for statement in statements {
            sqlx::raw_sql(AssertSqlSafe((*statement).to_owned())).execute(&mut connection).await.expect(statement);
        }
        connection.close().await.expect("closes");
    }

    /// Runs statements until one is refused.
    pub async fn try_to_run(&self, database: &str, statements: &[&str]) {
        let Ok(mut connection) = connect(&self.local_url(database)).await else { return };
        for statement in statements {
            if sqlx::raw_sql(AssertSqlSafe((*statement).to_owned())).execute(&mut connection).await.is_err() {
                return;
            }
        }
    }

    /// One value of one row, as text.
    pub async fn value(&self, database: &str, query: &str) -> String {
        let mut connection = connect(&self.local_url(database)).await.expect("the server accepts");
        sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(&mut connection).await.expect(query)
    }

    /// What the server wrote to its log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.directory.path().join("log")).unwrap_or_default()).into_owned()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.quit();
    }
}

/// A server's process on the data in `directory`.
fn spawn(directory: &Path, port: u16, settings: &[String]) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(directory.join("log")).expect("the directory is writable");
    let mut command = as_user(&binary("postgres"), directory);
    command.arg("-D").arg(directory.join("data")).args(["-p", &port.to_string(), "-h", "127.0.0.1"]);
    command.arg("-k").arg(directory);
    for setting in ["fsync=off", "log_statement=all", "log_parameter_max_length=0", "log_line_prefix=%p ", "max_connections=200"]
    {
        command.args(["-c", setting]);
    }
    for setting in settings {
        command.args(["-c", setting]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("postgres runs")
}

/// PgBouncer in transaction mode before a server, with one server connection for all clients.
pub struct Pooler {
    port: u16,
    child: Child,
    _directory: TempDir,
}

impl Pooler {
    /// Panics, naming the remedy, where PgBouncer is not installed.
    pub fn start(server: &Postgres) -> Self {
        let debian = PathBuf::from("/usr/sbin/pgbouncer");
        let program = if debian.exists() { debian } else { "pgbouncer".into() };
        let runs = Command::new(&program).arg("--version").stdout(Stdio::null()).status();
        assert!(runs.is_ok(), "there is no pgbouncer: run scripts/setup");
        let (directory, port) = (TempDir::new().expect("a temporary directory"), free_port());
        let file = directory.path().join("pgbouncer.ini");
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={} user=postgres password=secret\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
             pool_mode = transaction\ndefault_pool_size = 1\n",
            server.port
        );
        std::fs::write(&file, settings).expect("the directory is writable");
        if is_root() {
            run(Command::new("chown").arg("-R").arg(format!("{}:", unprivileged())).arg(directory.path()));
        }
        let mut command = as_user(&program, directory.path());
        let child = command.arg("-q").arg(&file).stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("pgbouncer runs");
        let pooler = Self { port, child, _directory: directory };
        super::wait_for("pgbouncer", START_LIMIT, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        pooler
    }

    /// The URL of the server's database `url`, through the pooler.
    pub fn url(&self, url: &str) -> String {
        let database = url.rsplit('/').next().expect("a name");
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn connect(url: &str) -> Result<PgConnection, sqlx::Error> {
    PgConnectOptions::from_str(url)?.connect().await
}

/// A program of the installed Postgres: on the path, or where Debian puts it.
fn binary(name: &str) -> PathBuf {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        debian.map(|version| version.path().join("bin").join(name)).filter(|path| path.exists()).collect();
    found.sort();
    found.pop().unwrap_or_else(|| {
        let on_path = Command::new(name).arg("--version").stdout(Stdio::null()).status();
        assert!(on_path.is_ok(), "there is no {name}: install postgresql");
        name.into()
    })
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output().expect("id runs");
    output.stdout.starts_with(b"0\n")
}

/// Whom to run as where the tests run as root, which Postgres refuses.
fn unprivileged() -> &'static str {
    let exists = |user: &str| Command::new("id").arg(user).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if exists("postgres").is_ok_and(|status| status.success()) { "postgres" } else { "nobody" }
}

/// `program`, run as someone who is not root. `setpriv` becomes the program, so that its pid is the server's.
fn as_user(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    if is_root() {
        command = Command::new("setpriv");
        command.args(["--reuid", unprivileged(), "--regid", group_of(unprivileged()).as_str(), "--clear-groups"]).arg(program);
    }
    command.current_dir(directory);
    command
}

fn group_of(user: &str) -> String {
    let output = Command::new("id").args(["-gn", user]).output().expect("id runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
