//! What is done to a tier while the writers write, and what must hold.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;
use std::time::{Duration, Instant};

use super::bare::{self, Floors};
use super::cluster::{eventually, name};
use super::clusters;
use super::faults;
use super::install::{self, PLACE};
use super::logs::Logs;
use super::nodes::is_on_foreign_nodes;
use super::operator::Quiet;
use super::planned;
use super::primaries::Reign;
use super::report::{self, Line};
use super::tier::{SETTLES_WITHIN, Tier};
use super::writers::{self, Report, Writers};

/// What a case promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// Planned: nothing acknowledged is lost, and the gap is within three times that of the bare engine when it is told to fail over, plus a
    /// second.
    Planned,
    /// A fault that others must notice first: the gap is within three times that of the bare engine when its primary ends, plus a second.
    /// Replication is asynchronous, so what was acknowledged within a second may be lost.
    Fault,
    /// The same where nobody can repair it for a while: the case itself says how soon afterwards.
    Outage,
    /// Nothing that clients notice: no loss, no refused or broken command, and no gap but of the machine's making.
    Unnoticed,
    /// Nothing acknowledged is lost, but for a while there is nobody to serve.
    Kept,
    /// What is in memory is lost with all servers; the tier serves again.
    Emptied,
}

/// What a case needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Only its own tier is touched.
    Nothing,
    /// The same, from the tier's nodes, which must be containers.
    Nodes,
    /// A node is touched, or the operator taken away: no other tier may be measured meanwhile.
    Alone,
    /// Both.
    NodesAlone,
}

/// How a case can be done once more.
#[derive(Clone, Copy)]
pub enum Again {
    /// As it was the first time.
    Likewise,
    /// After this has taken it back.
    After(fn(&Scene<'_>)),
    /// Not at all.
    Never,
}

/// A case: its name, what it promises, what it needs, and what it does. It returns when the tier is as it is meant to be afterwards.
pub struct Case {
    pub name: &'static str,
    pub promise: Promise,
    pub needs: Needs,
    /// Whether it is a change by the operator, which may be restarted in its midst.
    pub changes: bool,
    /// How it is done once more.
    pub again: Again,
    /// What is prepared for it before the writers begin.
    pub before: Option<fn(&Scene<'_>)>,
    pub act: fn(&Scene<'_>),
}

/// What a case acts on.
pub struct Scene<'a> {
    pub tier: &'a Tier,
    pub writers: &'a Writers,
    /// What the bare engine takes, at its slowest so far.
    floors: Cell<Floors>,
    pub down_after: Duration,
    notes: RefCell<Vec<String>>,
    /// What was acknowledged outside of this time, since 1970, may not be lost.
    window: Cell<Option<(Duration, Duration)>>,
}

impl Scene<'_> {
    /// Has what is lost lie within a time, since 1970. Only for what is done on this machine: the client's clock is that of its node.
    pub fn losses_lie_within(&self, begin: Duration, end: Duration) {
        self.window.set(Some((begin, end)));
    }

    /// Has something stand in the report.
    pub fn note(&self, text: String) {
        self.notes.borrow_mut().push(text);
    }

    /// How soon a fault that others must notice first is over.
    pub fn bound_of_faults(&self) -> Duration {
        3 * self.floors.get().noticed + Duration::from_secs(1)
    }

    fn bound(&self, promise: Promise) -> Option<Duration> {
        match promise {
            Promise::Planned => Some(3 * self.floors.get().ordered + Duration::from_secs(1)),
            Promise::Fault => Some(self.bound_of_faults()),
            Promise::Unnoticed => Some(self.floors.get().ordered + Duration::from_secs(1)),
            Promise::Kept | Promise::Emptied | Promise::Outage => None,
        }
    }

    /// Whether nothing was acknowledged for longer than is promised, in words.
    fn is_slow(&self, promise: Promise, report: &Report) -> Option<String> {
        let bound = self.bound(promise).filter(|bound| report.longest_gap > *bound)?;
        Some(format!("nothing was acknowledged for {:?}, more than {bound:?}: {report:?}", report.longest_gap))
    }
}

impl Case {
    /// One that is done again as it was.
    pub fn of(name: &'static str, promise: Promise, needs: Needs, act: fn(&Scene<'_>)) -> Self {
        Self { name, promise, needs, changes: false, again: Again::Likewise, before: None, act }
    }

    /// A change by the operator.
    pub fn change(name: &'static str, promise: Promise, needs: Needs, act: fn(&Scene<'_>)) -> Self {
        Self { changes: true, ..Self::of(name, promise, needs, act) }
    }
}

/// The cases of a tier, the upgrade last.
fn cases(tier: &Tier) -> Vec<Case> {
    let mut cases = if tier.is_cluster() { clusters::cases(tier) } else { under_sentinel(tier) };
    if is_on_foreign_nodes() {
        eprintln!("left out: what is done from nodes, which must be containers of kind");
        cases.retain(|case| !matches!(case.needs, Needs::Nodes | Needs::NodesAlone));
    }
    if tier.engine.newer().is_some() {
        let upgrade = Case::change("upgraded to the next version", Promise::Planned, Needs::Nothing, planned::upgrade);
        cases.push(Case { again: Again::Never, ..upgrade });
    }
    cases
}

/// Faults stand apart from one another: sentinels keep a distance between two failovers, which other cases fill.
fn under_sentinel(tier: &Tier) -> Vec<Case> {
    use Again::After;
    use Needs::{Alone, Nodes, NodesAlone, Nothing};
    use Promise::{Emptied, Fault, Kept, Outage, Planned, Unnoticed};
    let (case, change) = (Case::of, Case::change);
    vec![
        case("primary pod deleted", Planned, Nothing, planned::delete_primary),
        change("live parameter", Unnoticed, Nothing, planned::change_live_parameter),
        case("server process killed", Fault, Nodes, faults::kill_server),
        change("password rotated", Unnoticed, Nothing, planned::rotate_password),
        case("agent killed", Fault, Nodes, faults::kill_agent),
        change("bad image, reverted", Planned, Nothing, planned::name_a_bad_image),
        case("pod killed", Fault, Nodes, faults::kill_whole_pod),
        change("parameter that restarts", Planned, Nothing, planned::change_start_parameter),
        Case { again: After(planned::remove_replica), ..change("replica added", Planned, Nothing, planned::add_replica) },
        case("primary cut off", Fault, Nodes, faults::cut_primary_off),
        Case { again: After(planned::add_replica), ..change("replica removed", Planned, Nothing, planned::remove_replica) },
        case("majority of sentinels lost", Planned, Nothing, planned::delete_sentinels),
        case("pod lost, operator away", Fault, Alone, faults::kill_while_operator_is_away),
        case("node paused and back", Fault, NodesAlone, faults::pause_node),
        Case { before: Some(planned::fill), ..change("node drained, cache full", Planned, Alone, planned::drain_node) },
        case("majority and primary lost", Outage, Nodes, faults::lose_majority_and_primary),
        case("all pods deleted", if tier.durable { Kept } else { Emptied }, Nothing, faults::delete_all_pods),
    ]
}

/// The engine's own command at one of the tier's sentinels, of which nobody else is told.
pub fn fail_over(tier: &Tier, writers: &Writers) {
    let _others = install::beside_others();
    let (began, before) = (Instant::now(), tier.reign());
    writers.begin();
    failover_by(tier, &name(tier.sentinels().first().expect("a sentinel")));
    changed(tier, &before);
    let report = writers.finish();
    report::add(Line { report: Some(report), took: Some(began.elapsed()), ..Line::of(tier, "failover ordered at a sentinel") });
}

/// By Larder's own login, which the agent of the primary's pod uses too: clients may not fail over.
fn failover_by(tier: &Tier, sentinel: &str) {
    let mut command = vec!["sentinel", "failover", &tier.name];
    if tier.engine.has_coordinated_failover() {
        command.push("coordinated");
    }
    assert_eq!(tier.ask_as_larder(sentinel, "26379", &command).as_deref(), Ok("OK"));
}

/// Runs all cases, each to its end whatever became of the one before, and says which failed.
pub fn run_all(tier: &mut Tier, writers: &Writers) -> Vec<String> {
    let only = std::env::var("LARDER_E2E_CASES").ok();
    let mut floors = bare::floors(tier);
    let down_after = tier.down_after();
    let mut failed = Vec::new();
    let mut failed_over = Instant::now();
    for (number, case) in cases(tier).iter().enumerate() {
        if only.as_ref().is_some_and(|only| !only.split(',').any(|part| case.name.contains(part))) {
            continue;
        }
        let restarts = case.changes && tier.restarts_operator(number);
        let title = format!("{}{}", case.name, if restarts { ", operator restarted" } else { "" });
        let scene =
            Scene { tier, writers, floors: Cell::new(floors), down_after, notes: RefCell::default(), window: Cell::default() };
        let logs = Logs::follow(tier);
        let outcome = catch_unwind(AssertUnwindSafe(|| hold_to_promise(&scene, case, &title, restarts, &mut failed_over)));
        floors = scene.floors.get();
        if let Err(panic) = outcome {
            let text =
                panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let problem = format!("{}: {title}: {}", tier.name, text.unwrap_or_default());
            eprintln!("{problem}\n{}\n{}", super::cluster::describe(PLACE), logs.shown());
            report::add(Line { problem: Some(problem.clone()), ..Line::of(tier, &title) });
            failed.push(problem);
            if catch_unwind(AssertUnwindSafe(|| tier.settle("after a case that failed"))).is_err() {
                failed.push(format!("{}: the cases after it were not run: the tier does not settle", tier.name));
                break;
            }
        }
        if case.name.starts_with("upgraded") {
            tier.engine = tier.engine.newer().unwrap_or(tier.engine);
        }
    }
    failed
}

/// Runs a case and judges it. How long clients wait is a matter of the machine, too, which others use meanwhile: where that is longer than
/// promised, the floors are taken again, and then the case is done once more. Only what is slow beside the floors of the same minutes
/// has failed. Nothing is forgiven of what is lost.
fn hold_to_promise(scene: &Scene<'_>, case: &Case, title: &str, restarts: bool, failed_over: &mut Instant) {
    let report = run_case(scene, case, title, restarts, failed_over);
    judge_losses(scene, case.promise, &report);
    let Some(slow) = scene.is_slow(case.promise, &report) else { return };
    eprintln!("{}: {title}: {slow}; the floors are taken again", scene.tier.name);
    scene.floors.set(scene.floors.get().max(bare::floors(scene.tier)));
    let Some(still) = scene.is_slow(case.promise, &report) else { return };
    match case.again {
        Again::Likewise => {}
        Again::After(take_back) => take_back(scene),
        Again::Never => panic!("{still}"),
    }
    let report = run_case(scene, case, &format!("{title}, again"), restarts, failed_over);
    judge_losses(scene, case.promise, &report);
    if let Some(again) = scene.is_slow(case.promise, &report) {
        panic!("{still}; and again: {again}");
    }
}

fn run_case(scene: &Scene<'_>, case: &Case, title: &str, restarts: bool, failed_over: &mut Instant) -> Report {
    let (tier, writers) = (scene.tier, scene.writers);
    if matches!(case.promise, Promise::Fault | Promise::Outage) {
        // Nobody begins a failover by himself within this time of the last one: the case would measure that.
        thread::sleep((2 * tier.failover_timeout()).saturating_sub(failed_over.elapsed()));
    }
    let _guard = match case.needs {
        Needs::Alone | Needs::NodesAlone => (Some(install::without_others()), None),
        Needs::Nothing | Needs::Nodes => (None, Some(install::beside_others())),
    };
    // What was done to another tier's node may have been done to one of this tier's, too.
    eventually(&format!("{} is at rest", tier.name), SETTLES_WITHIN, || tier.is_at_rest());
    eprintln!("{}: {title}", tier.name);
    let (began, epoch) = (Instant::now(), tier.epoch());
    if let Some(before) = case.before {
        before(scene);
    }
    writers.begin();
    let quiet = restarts.then(|| Quiet::of(tier));
    thread::scope(|scope| {
        let restart = quiet.map(|quiet| scope.spawn(move || quiet.restart_once_begun(tier)));
        (case.act)(scene);
        if let Some(restart) = restart {
            restart.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
    let report = writers.finish();
    if tier.epoch() != epoch {
        *failed_over = Instant::now();
    }
    let notes = scene.notes.take();
    let problem = (!notes.is_empty()).then(|| notes.join("; "));
    report::add(Line { report: Some(report.clone()), took: Some(began.elapsed()), problem, ..Line::of(tier, title) });
    report
}

fn judge_losses(scene: &Scene<'_>, promise: Promise, report: &Report) {
    match promise {
        Promise::Planned | Promise::Kept => assert_eq!(report.lost, 0, "acknowledged and lost: {report:?}"),
        // How long an answer may take is up to the machine, and judged by the longest gap.
        Promise::Unnoticed => {
            assert_eq!((report.lost, report.failed - report.timed_out), (0, 0), "clients noticed: {report:?}");
        }
        Promise::Fault | Promise::Outage => {
            assert!(report.lost <= writers::A_SECOND, "more than a second of what was acknowledged is lost: {report:?}");
        }
        Promise::Emptied => {}
    }
    if let (Some((begin, end)), Some((first, last))) = (scene.window.get(), report.lost_between) {
        assert!(
            first >= begin && last <= end,
            "lost what was acknowledged from {first:?} to {last:?}, not only from {begin:?} to {end:?}"
        );
    }
}

/// Waits until another is primary, and nothing is left to do.
pub fn changed(tier: &Tier, before: &Reign) {
    another_reigns(tier, before);
    tier.settle("with another primary");
}

/// Waits until another is primary, or the same anew: where a node came to carry most primaries, the operator has one of them hand over, which
/// may be the new one.
pub fn another_reigns(tier: &Tier, before: &Reign) {
    eventually("another primary", Duration::from_secs(90), || {
        let now = tier.reign_seen()?;
        if now == *before { Err(format!("{} still is", now.pod)) } else { Ok(()) }
    });
}

/// Waits until none of the servers is one of those before. In a Cluster there are more, and they, too, are replaced one after the other.
pub fn replaced(tier: &Tier, before: &BTreeSet<String>) {
    let within = if tier.is_cluster() { 2 * SETTLES_WITHIN } else { SETTLES_WITHIN };
    eventually("every server is replaced", within, || {
        let left: Vec<String> = tier.server_uids().intersection(before).cloned().collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{} are left", left.len())) }
    });
    tier.settle("after the roll");
}
