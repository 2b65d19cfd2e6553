//! Loads that a relay makes, where sidecars outnumber the connections that their origin may have: none of them opens one of its own.
//!
//! What is asked and answered travels through the cache ([`crate::journal::loads`]). Whoever asks has the lease of its keys, or loads for
//! nobody else, as ever; what comes is stored, or not, as a load of one's own is.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::journal::loads::{self, LoadQueue, MOST_REQUEST_BYTES, Pushed, Request};
use crate::origin::{LoadError, Loaded, Loader, MAX_BATCH, parcel};
use crate::policy::JournalName;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::upstream::ask::ask;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::Sink;
use crate::sidecar::worker::Worker;

/// How much longer than the origin's timeout an answer may take: it goes through the cache twice.
const ON_ITS_WAY: Duration = Duration::from_millis(500);
/// It is looked for after a pause between these, which doubles.
const FIRST_LOOK_MS: u64 = 2;
const LAST_LOOK_MS: u64 = 25;
/// The most answers that are looked for at once. Those that were asked for first come first.
const MOST_LOOKED_FOR: usize = 64;
/// What a request takes besides its keys.
const HEAD_BYTES: usize = 32;

const NO_RELAY: &str =
    "its workload has more sidecars than its maxTotalConnections, so that a relay loads for them, and none runs";

type Answer = Result<Loaded, LoadError>;

/// A request, and where its keys stand among those that were asked for.
struct Errand {
    request: Request,
    places: Vec<usize>,
    bytes: usize,
}

/// Has the relay of `queue` load keys, as its rules call them. What came of each, in their order. Takes at most half a second longer than the
/// origin's timeout.
pub async fn load(worker: &Rc<Worker>, loader: &Loader, queue: &JournalName, keys: &[Vec<u8>]) -> Vec<Answer> {
    let until = Instant::now() + loader.timeout().as_duration() + ON_ITS_WAY;
    let way = Way { worker, loader, place: LoadQueue::new(queue), until };
    let mut answers: Vec<Option<Answer>> = vec![None; keys.len()];
    let mut open = way.errands(keys, &mut answers);
    let fallback = match way.push(&open).await {
        Ok(Pushed { count, is_tended }) => {
            for errand in open.split_off(count.min(open.len())) {
                let busy = || Some(Err(LoadError::Busy { origin: way.origin() }));
                errand.places.iter().for_each(|at| answers[*at] = busy());
            }
            way.wait_for(open, &mut answers).await;
            if is_tended { way.late() } else { way.unreachable(NO_RELAY) }
        }
        Err(why) => way.unreachable(&format!("a relay loads for it, and the cache between gave no answer ({why})")),
    };
    answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(fallback.clone()))).collect()
}

struct Way<'a> {
    worker: &'a Rc<Worker>,
    loader: &'a Loader,
    place: LoadQueue,
    until: Instant,
}

impl Way<'_> {
    /// The requests for all keys: one for as many as a query takes, or each by itself. A key that has no room in any is answered here.
    fn errands(&self, keys: &[Vec<u8>], answers: &mut [Option<Answer>]) -> Vec<Errand> {
        let most_keys = if self.loader.batches() { MAX_BATCH } else { 1 };
        let mut errands: Vec<Errand> = Vec::new();
        for (at, key) in keys.iter().enumerate() {
            let weight = Request::weight(key);
            if HEAD_BYTES + weight > MOST_REQUEST_BYTES {
                answers[at] = Some(Err(self.too_long()));
                continue;
            }
            let has_room = |errand: &&mut Errand| errand.places.len() < most_keys && errand.bytes + weight <= MOST_REQUEST_BYTES;
            match errands.last_mut().filter(has_room) {
                Some(errand) => {
                    errand.request.keys.push(key.clone());
                    errand.places.push(at);
                    errand.bytes += weight;
                }
                None => errands.push(Errand {
                    request: Request { token: self.token(), keys: vec![key.clone()] },
                    places: vec![at],
                    bytes: HEAD_BYTES + weight,
                }),
            }
        }
        errands
    }

    fn token(&self) -> String {
        let worker = self.worker;
        format!("{:08x}{:08x}{:08x}", worker.random(), worker.random(), worker.random())
    }

    async fn push(&self, errands: &[Errand]) -> Result<Pushed, String> {
        if errands.is_empty() {
            return Ok(Pushed { count: 0, is_tended: true });
        }
        let requests: Vec<Request> = errands.iter().map(|errand| errand.request.clone()).collect();
        let command = self.place.push(self.loader.timeout().as_millis(), &requests).command();
        let command: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
        // A request that is pushed twice is loaded twice, and answered alike.
        let asked = timeout_at(self.until, ask(self.worker, self.slot(), Lane::default(), &command)).await;
        let answer = asked.map_err(|_| "it took too long".to_owned())??;
        let parts = reply::elements(&answer).unwrap_or_default();
        let words: Vec<&[u8]> = parts.iter().filter_map(|part| reply::text(part)).collect();
        loads::pushed(&words).map_err(|error| error.to_string())
    }

    /// Looks for answers until all are there, or it is too late.
    async fn wait_for(&self, mut open: Vec<Errand>, answers: &mut [Option<Answer>]) {
        let mut pause = FIRST_LOOK_MS;
        while !open.is_empty() && Instant::now() < self.until {
            sleep(Duration::from_millis(fastrand::u64(pause.div_ceil(2)..=pause))).await;
            pause = (pause * 2).min(LAST_LOOK_MS);
            // While the cache does not answer, it is looked again.
            let Ok(Ok(found)) = timeout_at(self.until, self.look(&open)).await else { continue };
            if found.iter().all(Option::is_none) {
                continue;
            }
            pause = FIRST_LOOK_MS;
            let mut found = found.into_iter();
            let (come, still): (Vec<_>, Vec<_>) =
                open.into_iter().map(|errand| (errand, found.next().flatten())).partition(|(_, bytes)| bytes.is_some());
            open = still.into_iter().map(|(errand, _)| errand).collect();
            self.forget(come.iter().map(|(errand, _)| errand));
            come.into_iter().for_each(|(errand, bytes)| self.unpack(&errand, &bytes.unwrap_or_default(), answers));
        }
    }

    /// The answers to the first of these, as far as they are there.
    async fn look(&self, open: &[Errand]) -> Result<Vec<Option<Vec<u8>>>, String> {
        let names: Vec<Vec<u8>> =
            open.iter().take(MOST_LOOKED_FOR).map(|errand| self.place.answer(&errand.request.token)).collect();
        let command: Vec<&[u8]> = [&b"MGET"[..]].into_iter().chain(names.iter().map(Vec::as_slice)).collect();
        let answer = ask(self.worker, self.slot(), Lane::default(), &command).await?;
        let values = reply::elements(&answer).unwrap_or_default();
        Ok(values.into_iter().map(|value| reply::text(value).map(<[u8]>::to_vec)).collect())
    }

    /// Has answers dropped that were read. Nobody waits for that, and what stays ends by itself.
    fn forget<'e>(&self, read: impl Iterator<Item = &'e Errand>) {
        let mut command = vec![b"UNLINK".to_vec()];
        command.extend(read.map(|errand| self.place.answer(&errand.request.token)));
        let mut wire = Vec::new();
        encode::command(&mut wire, &command);
        let (slot, now) = (self.slot(), self.worker.now());
        self.worker.submit(&[&wire], Pending::new(Sink::Drop, slot, Retry::Safe, Lane::default(), now));
    }

    fn unpack(&self, errand: &Errand, bytes: &[u8], answers: &mut [Option<Answer>]) {
        let Some(results) = parcel::unpack(bytes, self.loader.origin(), errand.places.len()) else {
            let error = self.unreachable("a relay loads for it, and gave an answer that cannot be read");
            return errand.places.iter().for_each(|at| answers[*at] = Some(Err(error.clone())));
        };
        errand.places.iter().zip(results).for_each(|(at, result)| answers[*at] = Some(result));
    }

    fn slot(&self) -> u16 {
        if self.worker.is_cluster() { self.place.slot() } else { ANY_SLOT }
    }

    fn origin(&self) -> String {
        self.loader.origin().to_owned()
    }

    fn late(&self) -> LoadError {
        LoadError::Timeout { origin: self.origin(), within: self.loader.timeout() }
    }

    fn unreachable(&self, why: &str) -> LoadError {
        LoadError::Unreachable { origin: self.origin(), why: why.to_owned() }
    }

    fn too_long(&self) -> LoadError {
        let why = format!("a relay loads for it, and is asked for keys of at most {MOST_REQUEST_BYTES} bytes");
        LoadError::Unusable { origin: self.origin(), why }
    }
}
