//! What is done to nodes, and to pods from their nodes, which must be containers of kind. Whatever is done that must end is ended when
//! its guard is dropped, also by a test that fails.

use std::time::Duration;

use super::cluster::{eventually, get, kubectl, run, uid};
use super::install::PLACE;

/// Whether nothing can be done from nodes, because they are not containers of kind.
pub fn is_on_foreign_nodes() -> bool {
    std::env::var_os("LARDER_E2E_NODES").is_none()
}

/// The node that a pod is on.
pub fn node_of(pod: &str) -> String {
    let found = get(PLACE, &format!("pod/{pod}")).unwrap_or_default();
    found["spec"]["nodeName"].as_str().unwrap_or_else(|| panic!("{pod} is on no node")).to_owned()
}

/// A pod as its node sees it: nothing is asked of the API server.
pub struct Inside {
    node: String,
    uid: String,
}

impl Inside {
    pub fn of(pod: &str) -> Self {
        Self::find(pod).unwrap_or_else(|error| panic!("{error}"))
    }

    fn find(pod: &str) -> Result<Self, String> {
        let found = get(PLACE, &format!("pod/{pod}")).ok_or(format!("no pod {pod}"))?;
        let node = found["spec"]["nodeName"].as_str().ok_or("on no node")?.to_owned();
        Ok(Self { node, uid: uid(&found) })
    }

    /// Runs a script on the node, where `$pids` are the pod's processes.
    fn run(&self, script: &str) -> Result<String, String> {
        let uid = &self.uid;
        let whole = format!(
            "pids=; for file in $(grep -lE '{uid}|{}' /proc/[0-9]*/cgroup 2>/dev/null); do pid=${{file#/proc/}}; pid=${{pid%/cgroup}}; \
             case $(cat /proc/$pid/comm 2>/dev/null) in ''|containerd-shim*) ;; *) pids=\"$pids $pid\" ;; esac; done\n{script}",
            uid.replace('-', "_")
        );
        run("docker", &["exec", &self.node, "bash", "-c", &whole], "")
    }

    /// Runs it for each process of that name, as `$pid`. It says whether there was one by what it writes.
    fn for_each(&self, program: &str, script: &str) -> Result<String, String> {
        self.run(&format!(
            "for pid in $pids; do if [ \"$(cat /proc/$pid/comm 2>/dev/null)\" = {program} ]; then {script}; fi; done"
        ))
    }

    /// Kills a process with SIGKILL: process 1 of a container ignores the signal when it comes from inside.
    pub fn kill(&self, program: &str) {
        let said = self.for_each(program, "kill -9 $pid; echo killed").unwrap_or_else(|error| panic!("{error}"));
        assert!(said.contains("killed"), "{program} does not run in the pod {}", self.uid);
    }

    /// Whether such a process runs that is not on its way out.
    pub fn runs(&self, program: &str) -> Result<(), String> {
        let said = self.for_each(program, "grep -q '^State:.*[ZX]' /proc/$pid/status || echo runs")?;
        if said.contains("runs") { Ok(()) } else { Err("it does not run".to_owned()) }
    }

    /// What a server in the pod answers by HTTP to the node.
    pub fn visit(&self, address: &str, path: &str) -> Result<String, String> {
        let ask = format!("printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3");
        self.run(&format!("exec 3<>/dev/tcp/{address}/8080 && timeout 10 bash -c \"{}\"", ask.replace('"', "\\\"")))
    }
}

/// Runs a script on a pod's node, where `$pids` are the pod's processes.
fn beside(pod: &str, script: &str) -> Result<String, String> {
    Inside::find(pod)?.run(script)
}

/// Kills a process of a pod with SIGKILL.
pub fn kill_process(pod: &str, program: &str) {
    Inside::of(pod).kill(program);
}

/// Kills everything of a pod at once: all its processes, and the sandbox that they live in.
pub fn kill_pod(pod: &str) {
    let said = beside(pod, "kill -9 $pids && echo \"killed$pids\"").unwrap_or_else(|error| panic!("{error}"));
    assert!(said.split_ascii_whitespace().count() > 3, "a sandbox, an agent and a server were to be killed: {said}");
}

/// A pod that is cut off from everybody: nothing reaches it, and nothing leaves it, but over its own loopback interface. Its node can
/// still run programs in it.
pub struct CutOff {
    pod: String,
}

impl CutOff {
    pub fn pod(pod: &str) -> Self {
        let cut = Self { pod: pod.to_owned() };
        cut.rules("-I").unwrap_or_else(|error| panic!("{error}"));
        cut
    }

    fn rules(&self, what: &str) -> Result<String, String> {
        let inside = "nsenter -t ${pids##* } -n iptables -w";
        beside(&self.pod, &format!("{inside} {what} INPUT ! -i lo -j DROP && {inside} {what} OUTPUT ! -o lo -j DROP"))
    }

    pub fn heal(self) {
        drop(self);
    }
}

impl Drop for CutOff {
    fn drop(&mut self) {
        if let Err(error) = self.rules("-D") {
            eprintln!("{} is not let in again: {error}", self.pod);
        }
    }
}

/// A node that stands still with everything on it.
pub struct Paused {
    node: String,
}

impl Paused {
    pub fn node(node: &str) -> Self {
        let nodes = kubectl(&["get", "nodes", "-l", "node-role.kubernetes.io/control-plane", "-o", "name"]).expect("nodes");
        assert!(!nodes.lines().any(|name| name == format!("node/{node}")), "{node} is of the control plane");
        // On a busy machine its processes may not be caught standing all at once.
        eventually(&format!("{node} stands"), Duration::from_secs(60), || run("docker", &["pause", node], ""));
        Self { node: node.to_owned() }
    }

    /// Waits until the control plane has noticed.
    pub fn await_noticed(&self) {
        await_readiness(&self.node, "Unknown");
    }

    pub fn resume(self) {
        let node = self.node.clone();
        drop(self);
        await_readiness(&node, "True");
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if let Err(error) = run("docker", &["unpause", &self.node], "") {
            eprintln!("{} still stands: {error}", self.node);
        }
    }
}

fn await_readiness(node: &str, wanted: &str) {
    let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
    eventually(&format!("the readiness of {node} is {wanted}"), Duration::from_secs(120), || {
        let said = kubectl(&["get", "node", node, "-o", path])?;
        if said == wanted { Ok(()) } else { Err(said) }
    });
}

/// A node that is drained, on which nothing new is started.
pub struct Cordoned {
    node: String,
}

impl Cordoned {
    /// One that is about to be drained, which cordons it.
    pub fn by_drain(node: &str) -> Self {
        Self { node: node.to_owned() }
    }

    pub fn lift(self) {
        drop(self);
    }
}

impl Drop for Cordoned {
    fn drop(&mut self) {
        if let Err(error) = kubectl(&["uncordon", &self.node]) {
            eprintln!("{} takes no pods: {error}", self.node);
        }
    }
}

/// The taint that closes nodes to one tier. The pods of all others tolerate it.
pub fn closing_taint(tier: &str) -> String {
    format!("larder-e2e/closed-to-{tier}")
}

/// Nodes, all of them, on which nothing new is started of one tier.
pub struct Closed {
    taint: String,
}

impl Closed {
    pub fn to(tier: &str) -> Self {
        let closed = Self { taint: closing_taint(tier) };
        closed.say(":NoSchedule").expect("tainted");
        closed
    }

    fn say(&self, what: &str) -> Result<String, String> {
        kubectl(&["taint", "nodes", "--all", "--overwrite", &format!("{}{what}", self.taint)])
    }

    pub fn open(self) {
        drop(self);
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        if let Err(error) = self.say(":NoSchedule-") {
            eprintln!("nodes stay closed by {}: {error}", self.taint);
        }
    }
}
