//! A client connection: its commands, in order.

use super::*;

impl Place {
    /// The keys that it reads.
    pub(super) fn keys(&self) -> &[usize] {
        match &self.cmd {
            Cmd::Get(key) => std::slice::from_ref(key),
            Cmd::Mget(keys) => keys,
            Cmd::Set { .. } | Cmd::Del(_) => &[],
        }
    }

    /// The keys that the cache did not have.
    pub(super) fn missing(&self) -> Vec<usize> {
        self.keys().iter().zip(&self.values).filter(|(_, value)| value.is_none()).map(|(key, _)| *key).collect()
    }
}

impl Conn {
    pub(super) fn new(pod: usize, keys: usize) -> Self {
        Self {
            pod,
            open: true,
            busy: false,
            returned: 0,
            shared: false,
            next: 0,
            places: VecDeque::new(),
            arrive_after: 0,
            deliver_after: 0,
            points: vec![0; keys],
            told: Vec::new(),
            last_set: vec![0; keys],
        }
    }

    pub(super) fn push(&mut self, actor: usize, cmd: Cmd, floors: Vec<Version>) -> u32 {
        self.next += 1;
        self.places.push_back(Place {
            place: self.next,
            actor,
            cmd,
            arrived: Millis::MAX,
            floors,
            pressed: None,
            answered: false,
            missed: None,
            values: Vec::new(),
            forbidden: Vec::new(),
            executed: None,
            got: None,
        });
        self.next
    }

    pub(super) fn place(&mut self, place: u32) -> Option<&mut Place> {
        self.places.iter_mut().find(|own| own.place == place)
    }

    pub(super) fn arrived(&mut self, place: u32, now: Millis) {
        if let Some(cmd) = self.place(place).map(|own| own.cmd.clone()) {
            for before in self.places.iter_mut().filter(|own| own.place < place) {
                // Of a read of several keys all but one may be there.
                let awaited = if before.missed.is_some() { before.missing() } else { before.keys().to_vec() };
                let goes_on = matches!((&awaited[..], &cmd), ([key], Cmd::Get(same) | Cmd::Set { key: same, .. }) if key == same);
                before.pressed = before.pressed.or((!goes_on).then_some(now));
            }
            if let Cmd::Set { key, .. } = cmd {
                self.told.retain(|(told, _)| *told != key);
                self.last_set[key] = now;
            }
        }
        if let Some(own) = self.place(place) {
            own.arrived = now;
        }
        self.shared |= self.places.iter().filter(|own| own.arrived <= now).count() > 1;
    }

    /// Whether a later command has been sent to the cache that is no read of the same key.
    pub(super) fn is_overtaken(&self, place: u32, key: usize) -> bool {
        let later = self.places.iter().filter(|own| own.place > place && own.arrived != Millis::MAX && !own.answered);
        later.into_iter().any(|own| own.cmd != Cmd::Get(key))
    }

    pub(super) fn written_behind(&self, place: u32, keys: &[usize]) -> Vec<Version> {
        let later = self.places.iter().filter(|own| own.place > place && own.arrived != Millis::MAX);
        later
            .filter_map(|own| match own.cmd {
                Cmd::Set { key, version, fill: false, .. } if keys.contains(&key) => Some(version),
                _ => None,
            })
            .collect()
    }
}
