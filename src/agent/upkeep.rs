//! Keeps settings, users and certificates of the running server as configured, and proves that they are: what was set is read back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::board::Board;
use super::charge::{Charge, ChargeError};
use super::line::{Line, LineError};
use super::users::{self, Generation, User};
use super::values::same_setting;
use crate::policy::agent::{AgentConfig, Proved, ServedTls};
use crate::policy::binding::BindingName;
use crate::policy::digest::sha256;
use crate::policy::snapshot::Auth;
use crate::policy::told;
use crate::sidecar::files::WatchedFiles;
use crate::sidecar::upstream::access::Access;
use crate::sidecar::upstream::admin_client::Value;

/// How soon what could not be proved is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// The largest file of users or certificates.
const MAX_FILE_BYTES: usize = 1 << 20;
/// The most problems that are told.
const MAX_PROBLEMS: usize = 16;

/// What is kept in place.
pub struct Upkeep {
    access: Access,
    charge: watch::Receiver<Arc<Charge>>,
    users: Option<(PathBuf, WatchedFiles)>,
    served: Option<WatchedFiles>,
    /// The user's file, where there is one, and the password's.
    replication: Option<WatchedFiles>,
    due: Option<Instant>,
}

impl Upkeep {
    /// Watches the files that the configuration names.
    pub async fn open(charge: watch::Receiver<Arc<Charge>>, access: Access) -> Result<Self, ChargeError> {
        let config = charge.borrow().config.clone();
        let mut upkeep = Self { access, charge, users: None, served: None, replication: None, due: None };
        upkeep.watch_users(&config).await?;
        if let Some(ServedTls { cert_file, key_file, ca_file }) = &config.server.serves {
            let files = [cert_file, key_file, ca_file].map(Clone::clone).into();
            upkeep.served = Some(WatchedFiles::open(files, MAX_FILE_BYTES).await?);
        }
        if let Some(Auth { username_file, password_file }) = &config.server.replication {
            let files = username_file.iter().chain([password_file]).cloned().collect();
            upkeep.replication = Some(WatchedFiles::open(files, MAX_FILE_BYTES).await?);
        }
        Ok(upkeep)
    }

    async fn watch_users(&mut self, config: &AgentConfig) -> Result<(), ChargeError> {
        let wanted = config.users.as_ref().map(|users| &users.file);
        if self.users.as_ref().map(|(path, _)| path) == wanted {
            return Ok(());
        }
        self.users = None;
        if let Some(path) = wanted {
            self.users = Some((path.clone(), WatchedFiles::open(vec![path.clone()], MAX_FILE_BYTES).await?));
        }
        Ok(())
    }

    /// A server was started: everything is to be proved anew.
    pub fn begin(&mut self) {
        self.due = Some(Instant::now());
    }

    /// Waits until there is something to do. Cancel-safe.
    pub async fn due(&mut self) {
        let Self { users, served, replication, charge, due, .. } = self;
        let at = async {
            match due {
                Some(due) => sleep_until(*due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = at => {}
            Ok(()) = charge.changed() => {}
            () = changed(users.as_mut().map(|(_, files)| files)) => {}
            () = changed(served.as_mut()) => {}
            () = changed(replication.as_mut()) => {}
        }
        self.due = Some(Instant::now());
    }

    /// Notes of which users the server is being told by somebody else. Never while [`Upkeep::act`] is under way, so that whoever reads of it
    /// knows that nothing is about to undo what he sets.
    pub async fn heed(&self, line: &mut Line, board: &Board) {
        if self.users.is_none() {
            return;
        }
        if let Ok(told) = told_generation(line).await {
            board.update(|known| known.report.proved.users_told = Some(told.unwrap_or(0)));
        }
    }

    /// Sets and proves everything; what fails is tried again.
    pub async fn act(&mut self, charge: &Charge, line: &mut Line, board: &Board) {
        self.due = None;
        let config = &charge.config;
        let mut problems = Vec::new();
        if let Err(error) = self.watch_users(config).await {
            problems.push(format!("users: {error}"));
        }
        let before = board.read().report.proved;
        let settings = self.hold_settings(config, line, &mut problems).await;
        let users = self.hold_users(line, &mut problems).await;
        let replication = self.hold_replication(line, &mut problems).await;
        let certificate = self.hold_certificate(config, line, &mut problems).await;
        problems.truncate(MAX_PROBLEMS);
        let proved = Proved { settings, users, users_told: before.users_told, replication, certificate, problems };
        if proved != before {
            info!(settings = ?proved.settings, users = ?proved.users, certificate = ?proved.certificate, "the configuration was read back");
            proved.problems.iter().for_each(|problem| warn!("not in place: {problem}"));
        }
        if !proved.problems.is_empty() {
            self.due = Some(Instant::now() + RETRY);
        }
        board.update(|known| {
            known.report.generation = config.generation;
            known.counts.refusals += proved.problems.len() as u64;
            known.report.proved = proved;
        });
    }

    async fn hold_settings(&self, config: &AgentConfig, line: &mut Line, problems: &mut Vec<String>) -> Option<u64> {
        let before = problems.len();
        for (name, value) in &config.settings {
            if let Err(problem) = hold_setting(line, name, value).await {
                problems.push(format!("{name}: {problem}"));
            }
        }
        (problems.len() == before).then_some(config.generation)
    }

    async fn hold_users(&self, line: &mut Line, problems: &mut Vec<String>) -> Option<u64> {
        let contents = self.users.as_ref()?.1.current();
        let own = self.access.current().credentials.as_ref().map_or("default".to_owned(), |login| login.user().to_owned());
        let text = String::from_utf8_lossy(contents.first().map_or(&[][..], |bytes| bytes)).into_owned();
        let held = async {
            let Generation { number, users } = users::parse(&text, &own)?;
            let told = told_generation(line).await.map_err(|error| error.to_string())?;
            // What was told since the file was written is newer than the file.
            let is_left = told.is_some_and(|told| told > number);
            for user in users.iter().filter(|user| !(is_left && is_told_of(&user.name))) {
                hold_user(line, user).await?;
            }
            remove_others(line, &users, &own, is_left).await.map(|()| number)
        };
        match held.await {
            Ok(number) => Some(number),
            Err(problem) => {
                problems.push(format!("users: {problem}"));
                None
            }
        }
    }

    /// The login towards the primary, in one command, so that a name never goes with another's password.
    async fn hold_replication(&self, line: &mut Line, problems: &mut Vec<String>) -> Option<String> {
        let contents = self.replication.as_ref()?.current();
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).map(|text| text.trim_end_matches(['\r', '\n']).to_owned());
        let login = match &contents[..] {
            [password] => text(password).map(|password| ("default".to_owned(), password)),
            [user, password, ..] => text(user).and_then(|user| Ok((user, text(password)?))),
            [] => return None,
        };
        let held = async {
            let (user, password) = login.map_err(|_| "its files are not UTF-8".to_owned())?;
            if user.is_empty() || password.is_empty() {
                return Err("the user or the password is empty".to_owned());
            }
            line.ask(&["CONFIG", "SET", "masteruser", &user, "masterauth", &password])
                .await
                .map_err(|error| error.to_string())?;
            for (name, wanted) in [("masteruser", &user), ("masterauth", &password)] {
                let answer = line.ask(&["CONFIG", "GET", name]).await.map_err(|error| error.to_string())?;
                if answer.field(name).and_then(Value::as_str) != Some(wanted) {
                    return Err(format!("{name} reads back as something else"));
                }
            }
            Ok(user)
        };
        held.await.map_err(|problem| problems.push(format!("replication: {problem}"))).ok()
    }

    /// The files are read again by the server, and a handshake shows what it presents.
    async fn hold_certificate(&self, config: &AgentConfig, line: &mut Line, problems: &mut Vec<String>) -> Option<String> {
        let ServedTls { cert_file, key_file, ca_file } = config.server.serves.as_ref()?;
        let contents = self.served.as_ref()?.current();
        let pem = contents.first().map_or(&[][..], |bytes| bytes);
        let shown = |path: &Path| path.to_string_lossy().into_owned();
        let (cert, key, ca) = (shown(cert_file), shown(key_file), shown(ca_file));
        let proof = async {
            let wanted = CertificateDer::pem_slice_iter(pem).next().and_then(Result::ok).ok_or("its file has no certificate")?;
            let command = ["CONFIG", "SET", "tls-cert-file", &cert, "tls-key-file", &key, "tls-ca-cert-file", &ca];
            line.ask(&command).await.map_err(|error| error.to_string())?;
            let presented = Line::new(line.node().clone(), self.access.clone()).presented_certificate().await;
            match presented.map_err(|error| error.to_string())? {
                Some(presented) if presented == wanted.as_ref() => Ok(sha256(&presented)),
                Some(_) => Err("the server presents another certificate than its file holds".to_owned()),
                None => Err("the agent is not configured to use TLS towards the server".to_owned()),
            }
        };
        match proof.await {
            Ok(fingerprint) => Some(fingerprint),
            Err(problem) => {
                let problem: String = problem;
                problems.push(format!("certificate: {problem}"));
                None
            }
        }
    }
}

async fn changed(files: Option<&mut WatchedFiles>) {
    match files {
        Some(files) => {
            files.changed().await;
        }
        None => std::future::pending().await,
    }
}

/// Sets one setting where it differs, and reads it back.
async fn hold_setting(line: &mut Line, name: &str, wanted: &str) -> Result<(), String> {
    let read = async |line: &mut Line| {
        let answer = line.ask(&["CONFIG", "GET", name]).await.map_err(|error| error.to_string())?;
        let value = answer.field(name).and_then(Value::as_str).map(str::to_owned);
        value.ok_or_else(|| "the server has no such setting".to_owned())
    };
    if same_setting(wanted, &read(line).await?) {
        return Ok(());
    }
    line.ask(&["CONFIG", "SET", name, wanted]).await.map_err(|error| error.to_string())?;
    if same_setting(wanted, &read(line).await?) { Ok(()) } else { Err("it was set and reads back as something else".to_owned()) }
}

/// Makes a user what its line says, at once, and reads back whether it is on and which passwords it has.
async fn hold_user(line: &mut Line, user: &User) -> Result<(), String> {
    let words: Vec<&str> =
        ["ACL", "SETUSER", &user.name, "reset"].into_iter().chain(user.rules.iter().map(String::as_str)).collect();
    // The server's own words may repeat a rule, and a rule may be a password's hash.
    let refused = |error: LineError| match error {
        LineError::Refused { .. } => format!("{}: the server refuses its rules", user.name),
        other => format!("{}: {other}", user.name),
    };
    line.ask(&words).await.map_err(refused)?;
    let answer = line.ask(&["ACL", "GETUSER", &user.name]).await.map_err(refused)?;
    let list = |name: &str| {
        let values = answer.field(name).and_then(Value::as_list).unwrap_or_default();
        values.iter().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>()
    };
    let (mut passwords, mut wanted) = (list("passwords"), user.password_hashes());
    passwords.sort();
    wanted.sort();
    let is_on = list("flags").iter().any(|flag| flag == "on");
    if passwords == wanted && is_on == user.is_on() {
        Ok(())
    } else {
        Err(format!("{}: it reads back as something else", user.name))
    }
}

/// The generation of users that the server is being told of by somebody else, if any.
async fn told_generation(line: &mut Line) -> Result<Option<u64>, LineError> {
    let answer = line.ask(&["ACL", "GETUSER", told::MARK]).await?;
    Ok(answer.field("keys").and_then(Value::as_str).and_then(told::generation))
}

/// Whether a server may be told of this user by somebody else: it is a workload's, or the mark.
fn is_told_of(name: &str) -> bool {
    name == told::MARK || BindingName::of_user(name).is_some()
}

/// Users that the file does not name any more lose their place. The default user and the agent's own stay, and with `is_left` those that
/// the server is being told of.
async fn remove_others(line: &mut Line, users: &[User], own: &str, is_left: bool) -> Result<(), String> {
    let answer = line.ask(&["ACL", "USERS"]).await.map_err(|error| error.to_string())?;
    let present = answer.as_list().unwrap_or_default().iter().filter_map(Value::as_str);
    let stays = |name: &str| name == "default" || name == own || (is_left && is_told_of(name));
    let others = present.filter(|name| !stays(name) && users.iter().all(|user| user.name != *name));
    for name in others.map(str::to_owned).collect::<Vec<_>>() {
        line.ask(&["ACL", "DELUSER", &name]).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}
