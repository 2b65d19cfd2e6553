use std::sync::Arc;

use proptest::prelude::*;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::*;

fn at(secs: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(secs)
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn subjects() -> Subjects {
    Subjects {
        cluster: "shop".to_owned(),
        servers: names(&["shop-0-0", "10.96.0.1", "127.0.0.1"]),
        sentinels: names(&["shop-sentinel-0", "10.96.1.1"]),
        rotation: None,
    }
}

const START: u64 = 1_800_000_000;

fn first() -> Pki {
    Pki::default().next(&subjects(), false, at(START)).unwrap()
}

/// Whether a client that trusts `bundle` takes the certificate for that of `name` at that time.
fn is_trusted(bundle: &str, certified: &Certified, name: &str, now: u64) -> bool {
    let mut roots = rustls::RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(authority.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let certificate = CertificateDer::from_pem_slice(certified.certificate().as_bytes()).unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    verifier.verify_server_cert(&certificate, &[], &name, &[], now).is_ok()
}

fn both(pki: &Pki) -> [&Certified; 2] {
    [pki.servers().unwrap(), pki.sentinels().unwrap()]
}

#[test]
fn certificates_name_everybody_and_end() {
    let pki = first();
    let [servers, sentinels] = both(&pki);
    for name in ["shop-0-0", "10.96.0.1", "127.0.0.1"] {
        assert!(is_trusted(&pki.bundle(), servers, name, START), "{name}");
        assert!(!is_trusted(&pki.bundle(), sentinels, name, START), "{name}");
    }
    assert!(is_trusted(&pki.bundle(), sentinels, "shop-sentinel-0", START));
    // Of those whose clocks are behind or ahead.
    for (now, trusted) in [(START - 3599, true), (START - 3700, false), (START + 90 * DAY, true), (START + 90 * DAY + 1, false)] {
        assert_eq!(is_trusted(&pki.bundle(), servers, "shop-0-0", now), trusted, "{now}");
    }
    let other = first();
    assert!(!is_trusted(&other.bundle(), servers, "shop-0-0", START));
    assert_ne!(servers.fingerprint(), sentinels.fingerprint());
    let der = CertificateDer::from_pem_slice(servers.certificate().as_bytes()).unwrap();
    assert_eq!(servers.fingerprint(), crate::policy::digest::sha256(&der));
    assert!(PrivateKeyDer::from_pem_slice(servers.key().as_bytes()).is_ok());
}

#[test]
fn keys_are_remembered_and_never_shown() {
    let pki = first();
    let json = pki.to_json();
    assert_eq!(Pki::parse(json.as_bytes()).unwrap(), pki);
    assert!(json.contains("PRIVATE KEY"));
    let shown = format!("{pki:?}");
    assert!(!shown.contains("PRIVATE") && !shown.contains("BEGIN") && shown.contains("10.96.0.1"), "{shown}");
    assert!(!pki.bundle().contains("PRIVATE"));
}

#[test]
fn what_is_new_is_certified_at_once_and_what_goes_later() {
    let before = first();
    let mut more = subjects();
    more.servers.insert("10.96.0.2".to_owned());
    let grown = before.next(&more, true, at(START + DAY)).unwrap();
    let [servers, sentinels] = both(&grown);
    assert!(is_trusted(&grown.bundle(), servers, "10.96.0.2", START + DAY));
    assert_eq!(sentinels, before.sentinels().unwrap());
    // Nothing is restarted for it, and it ends in time for those who still have the earlier one.
    assert!(servers.is_served_by(before.servers().unwrap().fingerprint()));
    assert_eq!(servers.renewal, before.servers().unwrap().renewal);
    assert_eq!(grown.next(&subjects(), true, at(START + 2 * DAY)).unwrap(), grown);
    let renewed = grown.next(&subjects(), true, at(servers.renewal)).unwrap();
    let servers = renewed.servers().unwrap();
    assert!(!is_trusted(&renewed.bundle(), servers, "10.96.0.2", START + 61 * DAY));
    assert!(!servers.is_served_by(grown.servers().unwrap().fingerprint()));
}

#[test]
fn who_asks_gets_new_certificates_of_the_same_authority() {
    let before = first();
    let asked = Subjects { rotation: Some("2026-12-01".to_owned()), ..subjects() };
    let after = before.next(&asked, true, at(START + 1)).unwrap();
    assert_eq!((after.bundle(), after.generation()), (before.bundle(), before.generation() + 1));
    for (new, old) in both(&after).into_iter().zip(both(&before)) {
        assert!(new.fingerprint() != old.fingerprint() && new.key() != old.key() && !new.is_served_by(old.fingerprint()));
    }
    assert_eq!(after.next(&asked, true, at(START + 2)).unwrap(), after);
}

#[test]
fn an_authority_is_trusted_before_it_signs_and_after_it_has_signed() {
    let first = first();
    let due = START + AUTHORITY_LIFE - AUTHORITY_RENEWAL;
    let announced = first.next(&subjects(), true, at(due)).unwrap();
    assert_eq!(announced.authorities.len(), 2);
    for certified in both(&announced) {
        assert_eq!((certified.authority, certified.bundle.as_slice()), (1, &[1, 2][..]), "the old one signs");
    }
    let early = announced.next(&subjects(), true, at(due + AUTHORITY_STEP - 1)).unwrap();
    assert!(both(&early).iter().all(|certified| certified.authority == 1));
    let unseen = announced.next(&subjects(), false, at(due + AUTHORITY_STEP)).unwrap();
    assert!(both(&unseen).iter().all(|certified| certified.authority == 1), "somebody does not trust the new one yet");
    let signing = announced.next(&subjects(), true, at(due + AUTHORITY_STEP)).unwrap();
    assert!(both(&signing).iter().all(|certified| certified.authority == 2));
    assert_eq!(signing.authorities.len(), 2, "who has not changed over yet is still trusted");
    // Whoever only knows the bundle of the step before trusts what is presented now.
    assert!(is_trusted(&announced.bundle(), signing.servers().unwrap(), "shop-0-0", due + AUTHORITY_STEP));
    assert!(is_trusted(&signing.bundle(), announced.servers().unwrap(), "shop-0-0", due + AUTHORITY_STEP));
    let alone = signing.next(&subjects(), true, at(due + 2 * AUTHORITY_STEP)).unwrap();
    assert_eq!(alone.authorities.len(), 1);
    assert!(both(&alone).iter().all(|certified| certified.bundle == [2]));
    assert!(is_trusted(&alone.bundle(), signing.servers().unwrap(), "shop-0-0", due + 2 * AUTHORITY_STEP));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever happens when, whoever lags: what is to be presented is always valid, names everybody, and is trusted also by those who
    /// read the bundle of the last certificates that everybody showed; and asking twice changes nothing.
    #[test]
    fn what_is_presented_is_always_trusted(
        steps in prop::collection::vec((1u64..70, any::<bool>(), 0u8..6, 0u8..4), 1..50),
    ) {
        let (mut now, mut wanted) = (START, subjects());
        let mut pki = first();
        // What those trust who lag as far as is possible.
        let mut lagging = pki.bundle();
        for (days, shown, change, number) in steps {
            now += days * DAY;
            match change {
                0 => { wanted.servers.insert(format!("10.96.0.{number}")); }
                1 => { wanted.sentinels.insert(format!("10.96.1.{number}")); }
                2 => wanted.rotation = Some(number.to_string()),
                // Years later.
                3 => now += u64::from(number) * 400 * DAY,
                _ => {}
            }
            // The operator was away for longer than a certificate lives: whatever was presented has ended.
            let was_away = pki.servers().is_none_or(|held| held.expires <= now);
            if shown {
                lagging = pki.bundle();
            }
            let next = pki.next(&wanted, shown, at(now)).unwrap();
            prop_assert_eq!(&next.next(&wanted, false, at(now)).unwrap(), &next);
            prop_assert!(next.generation() == pki.generation() || next.generation() == pki.generation() + 1);
            prop_assert!(next.authorities.len() <= 3);
            for (certified, names) in both(&next).into_iter().zip([&wanted.servers, &wanted.sentinels]) {
                for name in names {
                    prop_assert!(is_trusted(&next.bundle(), certified, name, now), "{} at {}: {:?}", name, now, next);
                    let ended = was_away || next.authorities[0].number > pki.authorities[0].number;
                    if ended {
                        lagging = next.bundle();
                    }
                    prop_assert!(is_trusted(&lagging, certified, name, now), "{} at {}: {:?}", name, now, next);
                }
                // Where nobody has read the bundle of a newer authority, the former signs until its own end.
                let signer_ends = next.authorities.iter().find(|made| made.number == certified.authority).map(|made| made.expires);
                let lasts = certified.expires > now + DAY || Some(certified.expires) == signer_ends;
                prop_assert!(certified.renewal > now && certified.expires > now && lasts);
            }
            pki = next;
        }
    }
}
