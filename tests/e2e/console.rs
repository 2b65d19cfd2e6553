//! Questions to servers and sentinels, all over one connection into the pod of a tier's writers.
//!
//! A `kubectl exec` for each would cost more of two processors than the tiers themselves.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use super::install::PLACE;

/// Longer than the client takes to read all values of a run back.
const ANSWER_WITHIN: Duration = Duration::from_secs(180);
/// Between the words of a question, which may hold anything else but line ends.
const SEPARATOR: &str = "\u{1f}";

/// A client in a pod that answers a line for each line.
pub struct Console {
    pod: String,
    session: Option<Session>,
}

struct Session {
    child: Child,
    questions: ChildStdin,
    answers: Receiver<String>,
}

impl Console {
    /// One in the pod of this name, which is spoken to when the first question is asked.
    pub fn of(pod: &str) -> Self {
        Self { pod: pod.to_owned(), session: None }
    }

    /// Asks, once more where the connection into the pod was lost before an answer came.
    pub fn ask(&mut self, words: &[&str]) -> Result<String, String> {
        let question = words.join(SEPARATOR);
        let before = self.session.is_some();
        match self.exchange(&question) {
            Err(Lost(_)) if before => self.exchange(&question),
            other => other,
        }
        .unwrap_or_else(|Lost(why)| Err(why))
    }

    fn exchange(&mut self, question: &str) -> Result<Result<String, String>, Lost> {
        if self.session.is_none() {
            self.session = Some(Session::into(&self.pod).map_err(|error| Lost(error.to_string()))?);
        }
        let answer = self.session.as_mut().map(|session| session.exchange(question));
        match answer.unwrap_or_else(|| Err(Lost("no session".to_owned()))) {
            Ok(answer) => Ok(answer),
            Err(lost) => {
                self.session = None;
                Err(lost)
            }
        }
    }
}

/// The connection into the pod, lost with what it was asked.
struct Lost(String);

impl Session {
    fn into(pod: &str) -> std::io::Result<Self> {
        let mut command = Command::new("kubectl");
        command.args(["-n", PLACE, "exec", "-i", pod, "--", "/e2e-client", "console"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (questions, said) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(said).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, questions, answers })
    }

    fn exchange(&mut self, question: &str) -> Result<Result<String, String>, Lost> {
        let lost = |error: &dyn std::fmt::Display| Lost(format!("the console is lost: {error}"));
        self.questions.write_all(format!("{question}\n").as_bytes()).map_err(|error| lost(&error))?;
        let answer = self.answers.recv_timeout(ANSWER_WITHIN).map_err(|error| lost(&error))?;
        let text = |rest: &str| rest.replace(SEPARATOR, "\n");
        match answer.split_at_checked(1) {
            Some(("+", rest)) => Ok(Ok(text(rest))),
            Some(("-", rest)) => Ok(Err(text(rest))),
            _ => Err(lost(&answer)),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
