//! Which partitions a relay is to have, so that all that live share them evenly. Pure.
//!
//! Nobody asks another: each knows who lives and who holds what, and gives up what is beyond its share. What nobody holds is taken by who
//! has less than its share. Where two are mistaken for a moment, claims decide.

/// What a relay is to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// Partitions to claim.
    pub claim: Vec<usize>,
    /// Partitions to give up.
    pub release: Vec<usize>,
}

/// What `me` is to do. `living`: the relays that live, in whatever order, with or without `me`. `holders`: by partition who holds it.
pub fn wish(me: &str, living: &[String], holders: &[Option<String>]) -> Wish {
    let mut all: Vec<&str> = living.iter().map(String::as_str).chain([me]).collect();
    all.sort_unstable();
    all.dedup();
    let place = all.iter().position(|relay| *relay == me).unwrap_or_default();
    let quota = holders.len() / all.len() + usize::from(place < holders.len() % all.len());
    let held_by = |who: Option<&str>| (0..holders.len()).filter(|at| holders[*at].as_deref() == who).collect::<Vec<_>>();
    let mine = held_by(Some(me));
    // Begun at different places, so that those that start together do not all ask for the same.
    let mut free = held_by(None);
    let turn = place * holders.len() / all.len();
    free.sort_by_key(|at| (at + holders.len() - turn) % holders.len());
    free.truncate(quota.saturating_sub(mine.len()));
    Wish { claim: free, release: mine.into_iter().skip(quota).collect() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(relay: usize) -> String {
        format!("relay-{relay}")
    }

    /// One round of each relay in turn, whose claims and releases take effect at once.
    fn round(living: &[String], holders: &mut [Option<String>]) {
        for me in living {
            let Wish { claim, release } = wish(me, living, holders);
            release.into_iter().for_each(|at| holders[at] = None);
            claim.into_iter().for_each(|at| holders[at] = Some(me.clone()));
        }
    }

    proptest! {
        #[test]
        fn partitions_end_shared_evenly_and_stay_so(
            relays in 1usize..20, partitions in 1usize..40, held in proptest::collection::vec(0usize..22, 40),
        ) {
            let living: Vec<String> = (0..relays).map(name).collect();
            // Some are held by relays that are gone: such claims end by themselves.
            let mut holders: Vec<_> = held[..partitions].iter().map(|at| Some(name(*at)).filter(|name| living.contains(name))).collect();
            round(&living, &mut holders);
            round(&living, &mut holders);
            for me in &living {
                let count = holders.iter().flatten().filter(|holder| *holder == me).count();
                prop_assert!((partitions / relays..=partitions.div_ceil(relays)).contains(&count), "{me} has {count}");
                prop_assert_eq!(wish(me, &living, &holders), Wish::default());
            }
            prop_assert!(holders.iter().all(Option::is_some));
        }

        #[test]
        fn what_another_holds_is_never_asked_for(holders in proptest::collection::vec(proptest::option::of(0usize..4), 1..30)) {
            let holders: Vec<_> = holders.into_iter().map(|holder| holder.map(name)).collect();
            let living: Vec<String> = (0..4).map(name).collect();
            let Wish { claim, release } = wish(&name(1), &living, &holders);
            prop_assert!(claim.iter().all(|at| holders[*at].is_none()));
            prop_assert!(release.iter().all(|at| holders[*at].as_ref() == Some(&name(1))));
        }
    }

    #[test]
    fn one_alone_takes_everything() {
        assert_eq!(wish("a", &[], &vec![None; 4]).claim, [0, 1, 2, 3]);
        assert_eq!(wish("b", &[name(1)], &vec![None; 4]).claim.len(), 2);
    }
}
