//! What goes on without the operator: agents that start servers, sentinels that fail over, replication, and a client that writes.

use super::world::{Data, Node, Process, SYNC_TICKS, Verdict, World};

/// Sentinels replace a primary that has been gone for so many ticks.
const FAILOVER_TICKS: u32 = 5;
/// They take it for down after so many.
pub(super) const DOWN_TICKS: u32 = 4;

/// How one copy compares with another.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    Ahead,
    Equal,
    Behind,
    Unknown,
}

fn order(own: &Data, theirs: &Data) -> Order {
    match (own.version > 0, theirs.version > 0) {
        (true, false) => return Order::Ahead,
        (false, true) => return Order::Behind,
        (false, false) => return Order::Equal,
        (true, true) => {}
    }
    match (own.complete, theirs.complete) {
        (true, false) => return Order::Ahead,
        (false, true) => return Order::Behind,
        (false, false) => return Order::Unknown,
        (true, true) if own.lineage != theirs.lineage => return Order::Unknown,
        (true, true) => {}
    }
    match (own.led && own.exact, theirs.led && theirs.exact) {
        (true, false) => Order::Ahead,
        (false, true) => Order::Behind,
        _ if own.version > theirs.version => Order::Ahead,
        _ if own.version < theirs.version => Order::Behind,
        _ => Order::Equal,
    }
}

enum Decision {
    Lead,
    Follow { of: usize, promotable: bool },
    Hold(&'static str),
}

impl World {
    /// One tick of everything but the operator.
    pub(super) fn step(&mut self) -> Verdict {
        self.step_pods();
        self.hear();
        self.convert();
        self.fail_over();
        self.synchronise()?;
        for index in 0..self.servers.len() {
            if self.can_run(index) {
                self.run_agent(index)?;
            }
        }
        self.write();
        match self.broken.take() {
            Some(broken) => Err(broken),
            None => Ok(()),
        }
    }

    /// Sentinels hear each other, and of the primary that they watch.
    fn hear(&mut self) {
        for index in 0..self.sentinels.len() {
            let Some(node) = self.sentinel_node(index) else { continue };
            let Some(mut memory) = self.sentinels[index].memory else { continue };
            let finds = self.sentinels[index].finds_nobody == 0;
            for other in (0..self.sentinels.len()).filter(|other| *other != index) {
                let Some(theirs) = self.sentinel_node(other).filter(|there| self.reach(node, *there)) else { continue };
                let _ = theirs;
                let Some(theirs) = self.sentinels[other].memory else { continue };
                memory.peers |= u8::from(finds) << other;
                if theirs.epoch > memory.epoch {
                    if theirs.primary != memory.primary {
                        memory.replicas = (memory.replicas | 1 << memory.primary) & !(1 << theirs.primary);
                        memory.gone = 0;
                    }
                    (memory.primary, memory.epoch) = (theirs.primary, theirs.epoch);
                }
            }
            let primary = memory.primary;
            let there = self.serving_node(primary).filter(|there| self.acts(primary) && self.reach(node, *there));
            if let Some(there) = there {
                memory.gone = 0;
                for replica in 0..self.servers.len() {
                    let attached = matches!(self.servers[replica].process, Process::Replica { of, .. } if of == primary);
                    if finds && attached && self.serving_node(replica).is_some_and(|node| self.reach(node, there)) {
                        memory.replicas |= 1 << replica;
                    }
                }
            } else {
                memory.gone += 1;
            }
            self.sentinels[index].memory = Some(memory);
        }
    }

    /// Sentinels turn servers that they know towards the primary that they name, while it is there.
    fn convert(&mut self) {
        for index in 0..self.sentinels.len() {
            let Some(node) = self.sentinel_node(index) else { continue };
            let Some(memory) = self.sentinels[index].memory.filter(|memory| memory.gone == 0) else { continue };
            for server in (0..self.servers.len()).filter(|server| memory.replicas & 1 << server != 0) {
                let reached = self.serving_node(server).is_some_and(|there| self.reach(node, there));
                let misplaced = match self.servers[server].process {
                    Process::Primary => server != memory.primary,
                    Process::Replica { of, .. } => of != memory.primary,
                    Process::None | Process::Intending => false,
                };
                if reached && misplaced {
                    // One that was cut off, and alone remembers anything afterwards, remembers an earlier time. What the operator
                    // told it (then there was no election) is the operator's to answer for.
                    let own_memory = memory.epoch > 0 && self.named().is_none();
                    if self.servers[server].process == Process::Primary || own_memory {
                        // The sentinel's choice, which may be of an earlier time.
                        self.truth = self.truth.min(self.servers[memory.primary].data.version);
                    }
                    self.follow(server, memory.primary);
                }
            }
        }
    }

    pub(super) fn follow(&mut self, server: usize, of: usize) {
        let promotable = match self.servers[server].process {
            Process::Replica { promotable, .. } => promotable,
            _ => true,
        };
        self.servers[server].process = Process::Replica { of, synced_for: 0, promotable };
    }

    /// A majority of those that a sentinel knows replaces a primary that a quorum takes for down.
    fn fail_over(&mut self) {
        for leader in 0..self.sentinels.len() {
            let Some(node) = self.sentinel_node(leader) else { continue };
            let Some(memory) = self.sentinels[leader].memory else { continue };
            let others =
                (0..self.sentinels.len()).filter(|other| self.sentinel_node(*other).is_some_and(|there| self.reach(node, there)));
            let others: Vec<_> = others.filter_map(|other| self.sentinels[other].memory).collect();
            let agree = others.iter().filter(|other| other.primary == memory.primary && other.gone >= FAILOVER_TICKS).count();
            let known = memory.peers.count_ones() as usize + 1;
            if agree < usize::from(memory.quorum) || others.len() <= known / 2 {
                continue;
            }
            let electable = |index: &usize| {
                let reached = self.serving_node(*index).is_some_and(|there| self.reach(node, there));
                let promotable =
                    matches!(self.servers[*index].process, Process::Primary | Process::Replica { promotable: true, .. });
                memory.replicas & 1 << index != 0 && reached && promotable
            };
            let best = (0..self.servers.len()).filter(electable).max_by_key(|index| self.servers[*index].data.version);
            if let Some(best) = best {
                // What the election leaves behind, replication had not brought over.
                self.truth = self.truth.min(self.servers[best].data.version);
                self.promote(best);
                self.name(leader, best);
                return;
            }
        }
    }

    pub(super) fn promote(&mut self, index: usize) {
        if self.servers[index].process != Process::Primary {
            self.servers[index].process = Process::Primary;
            self.new_lineage(index);
        }
    }

    /// A sentinel names a successor, in an epoch of its own.
    fn name(&mut self, sentinel: usize, primary: usize) {
        self.epoch += 1;
        if let Some(memory) = &mut self.sentinels[sentinel].memory {
            memory.replicas = (memory.replicas | 1 << memory.primary) & !(1 << primary);
            (memory.primary, memory.epoch, memory.gone) = (primary, self.epoch, 0);
        }
    }

    /// A planned handover, all of it: the successor has everything before it leads. False where no majority can.
    pub(super) fn hand_over(&mut self, from: usize, to: usize) -> bool {
        let able = self.named() == Some(from) && self.acts(from) && self.follows_in_step(to, from);
        let leader = (0..self.sentinels.len()).find(|index| {
            self.sentinel_node(*index).is_some() && self.sentinels[*index].memory.is_some_and(|memory| memory.primary == from)
        });
        let (true, Some(leader)) = (able, leader) else { return false };
        self.servers[to].data = Data { led: false, ..self.servers[from].data };
        self.promote(to);
        self.follow(from, to);
        self.name(leader, to);
        true
    }

    fn synchronise(&mut self) -> Verdict {
        for index in 0..self.servers.len() {
            let Process::Replica { of, synced_for, promotable } = self.servers[index].process else { continue };
            let Some(node) = self.serving_node(index) else { continue };
            let source = self.serving_node(of).filter(|there| self.acts(of) && self.reach(node, *there));
            if source.is_none() {
                self.servers[index].process = Process::Replica { of, synced_for: 0, promotable };
                continue;
            }
            let (own, theirs) = (self.servers[index].data, self.servers[of].data);
            let synced_for = (synced_for + 1).min(SYNC_TICKS);
            let same = own.lineage == theirs.lineage && own.complete && own.version <= theirs.version;
            let data = if synced_for >= SYNC_TICKS {
                Data { led: false, exact: true, ..theirs }
            } else if same || theirs.version == 0 {
                own
            } else {
                Data { complete: false, led: false, exact: false, ..theirs }
            };
            self.servers[index].data = data;
            let promotable = promotable || synced_for >= SYNC_TICKS;
            self.servers[index].process = Process::Replica { of, synced_for, promotable };
            if self.servers[of].pod.is_none_or(|pod| pod.deleting.is_some()) {
                // A fault takes the source away while it is copied.
                self.truth = self.truth.min(self.held());
            }
            if data != own {
                self.last_copy_is_there(&format!("server {index} took over the data of server {of}"))?;
            }
        }
        Ok(())
    }

    pub(super) fn last_copy_is_there(&self, what: &str) -> Verdict {
        if self.held() >= self.truth || self.desired.accept_data_loss {
            return Ok(());
        }
        Err(format!("{what}: of {} writes {} are left", self.truth, self.held()))
    }

    /// The client writes to the primary that a majority names.
    fn write(&mut self) {
        let reached = |primary: usize| self.serving_node(primary).is_some_and(|node| self.nodes[node] == Node::Up);
        let Some(primary) = self.named().filter(|primary| self.acts(*primary) && reached(*primary)) else { return };
        let ends = self.servers[primary].pod.is_none_or(|pod| pod.deleting.is_some());
        if ends || self.rng.u32(0..4) == 0 {
            return;
        }
        if self.servers[primary].data.version == 0 {
            self.servers[primary].data.version = 1;
            self.new_lineage(primary);
        } else {
            self.servers[primary].data.version += 1;
        }
        self.truth = self.servers[primary].data.version;
    }

    fn run_agent(&mut self, index: usize) -> Verdict {
        match self.servers[index].process {
            Process::Primary => {}
            Process::Replica { of, synced_for, promotable } => {
                let promotable = promotable || self.is_best_copy(index, of);
                self.servers[index].process = Process::Replica { of, synced_for, promotable };
            }
            Process::None | Process::Intending => match self.decide(index) {
                Decision::Hold(why) => (self.servers[index].process, self.servers[index].held) = (Process::None, Some(why)),
                Decision::Follow { of, promotable } => {
                    self.servers[index].held = None;
                    self.servers[index].process = Process::Replica { of, synced_for: 0, promotable };
                }
                Decision::Lead if self.servers[index].process == Process::None => {
                    self.servers[index].held = None;
                    self.servers[index].process = Process::Intending;
                }
                Decision::Lead => self.lead(index)?,
            },
        }
        Ok(())
    }

    fn lead(&mut self, index: usize) -> Verdict {
        let own = self.servers[index].data.version;
        if own < self.truth && self.held() > own && !self.desired.accept_data_loss {
            return Err(format!("server {index} leads with {own} of {} writes", self.truth));
        }
        self.truth = self.truth.min(own);
        self.servers[index].process = Process::Primary;
        self.new_lineage(index);
        Ok(())
    }

    /// A peer's data and whether it acts as primary, as its agent answers.
    fn ask_peer(&self, index: usize, peer: usize) -> Option<(Data, bool)> {
        let (here, there) = (self.agent_node(index)?, self.agent_node(peer)?);
        let server = &self.servers[peer];
        self.reach(here, there).then_some((server.data, matches!(server.process, Process::Primary | Process::Intending)))
    }

    fn peers(&self, index: usize) -> impl Iterator<Item = usize> + use<> {
        (0..self.servers.len()).filter(move |peer| *peer != index)
    }

    /// Which primary each sentinel names, if it answers: `None`, or `Some(None)` where it watches nothing.
    fn ask_sentinels(&self, index: usize) -> Vec<Option<Option<usize>>> {
        // Those that are still to go count.
        let count = self.desired.sentinels().count().max(self.scale.1);
        let ask = |sentinel: usize| {
            let (here, there) = (self.agent_node(index)?, self.sentinel_node(sentinel)?);
            self.reach(here, there).then(|| self.sentinels[sentinel].memory.map(|memory| memory.primary))
        };
        (0..count).map(ask).collect()
    }

    /// As agents decide.
    fn decide(&self, index: usize) -> Decision {
        let answers = self.ask_sentinels(index);
        let named: Vec<usize> = answers.iter().filter_map(|answer| answer.flatten()).collect();
        let majority = answers.len() / 2;
        match named.iter().find(|owner| named.iter().filter(|other| other == owner).count() > majority) {
            Some(owner) if *owner != index => self.decide_to_follow(index, *owner),
            Some(_) => self.decide_to_lead(index, true, &answers),
            None if named.iter().all(|owner| *owner == index) => self.decide_to_lead(index, false, &answers),
            None => Decision::Hold("NoMajority"),
        }
    }

    fn decide_to_follow(&self, index: usize, owner: usize) -> Decision {
        let runs_empty = self.ask_peer(index, owner).is_some_and(|(data, acts)| acts && data.version == 0);
        if runs_empty && self.servers[index].data.version > 0 && !self.desired.accept_data_loss {
            return Decision::Hold("OwnerIsEmpty");
        }
        Decision::Follow { of: owner, promotable: self.is_best_copy(index, owner) }
    }

    fn is_best_copy(&self, index: usize, owner: usize) -> bool {
        let own = self.servers[index].data;
        let accept = self.desired.accept_data_loss;
        own.version > 0
            && own.complete
            && self.peers(index).all(|peer| match self.ask_peer(index, peer) {
                None => accept,
                Some((_, true)) => false,
                Some((data, false)) => match order(&own, &data) {
                    Order::Ahead => true,
                    Order::Equal => index < peer && peer != owner,
                    Order::Behind => false,
                    Order::Unknown => accept,
                },
            })
    }

    fn decide_to_lead(&self, index: usize, named: bool, answers: &[Option<Option<usize>>]) -> Decision {
        let own = self.servers[index].data;
        if self.peers(index).any(|peer| self.ask_peer(index, peer).is_some_and(|(_, acts)| acts)) {
            return Decision::Hold("AnotherActs");
        }
        if named && own.version > 0 && own.complete && own.led && own.exact {
            return Decision::Lead;
        }
        let answering = answers.iter().filter(|answer| answer.is_some()).count();
        let accept = self.desired.accept_data_loss && answering > answers.len() / 2;
        let (mut unknown, mut incomparable, mut turn) = (false, false, false);
        for peer in self.peers(index) {
            let Some((data, _)) = self.ask_peer(index, peer) else {
                unknown = true;
                continue;
            };
            let earlier = peer < index && !named;
            match order(&own, &data) {
                Order::Behind => return Decision::Hold("PeerAhead"),
                Order::Equal => turn |= earlier,
                Order::Unknown if accept && earlier => return Decision::Hold("OthersTurn"),
                Order::Unknown => incomparable = true,
                Order::Ahead => {}
            }
        }
        let partial = own.version > 0 && !own.complete;
        match () {
            () if unknown && !accept => Decision::Hold("PeersUnknown"),
            () if incomparable && !accept => Decision::Hold("Incomparable"),
            () if partial && !accept => Decision::Hold("OwnPartial"),
            () if turn => Decision::Hold("OthersTurn"),
            () => Decision::Lead,
        }
    }
}
