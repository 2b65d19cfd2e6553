//! Loads from a Postgres that speaks TLS only, to clients with a certificate only.

use std::fs;
use std::path::Path;

use larder::origin::LoadError;
use larder::policy::snapshot::{Origin, OriginKind, Sensitive};
use tempfile::TempDir;

use crate::support::certificates::write_certificates;
use crate::support::origin::{found, loader, reads, with};
use crate::support::postgres::Postgres;

const ITEMS: [&str; 2] = ["CREATE TABLE items (id int PRIMARY KEY, name text)", "INSERT INTO items VALUES (7, 'seven')"];

/// A URL with what TLS needs, from the files in `keys`.
fn secured(url: &str, mode: &str, keys: &Path) -> String {
    let at = |name: &str| keys.join(name).display().to_string();
    format!("{url}?sslmode={mode}&sslrootcert={}&sslcert={}&sslkey={}", at("ca.pem"), at("cert.pem"), at("key.pem"))
}

fn origin(url: &str) -> Origin {
    with(OriginKind::Sql { url: Sensitive::Value(url.to_owned()) })
}

async fn load(url: &str) -> Result<larder::origin::Loaded, LoadError> {
    loader(&origin(url), "item:{id}", &reads("SELECT name FROM items WHERE id = $id", None, None)).load(b"item:7").await
}

async fn start() -> (Postgres, String) {
    let server = Postgres::start_secured();
    let url = server.database(&ITEMS).await;
    (server, url)
}

#[tokio::test]
async fn certificates_are_verified_and_shown() {
    let (server, url) = start().await;
    let elsewhere = url.replace("127.0.0.1", "localhost");
    let strict = secured(&url, "verify-full", server.directory());
    assert_eq!(load(&strict).await, Ok(found("seven")));
    // Whoever issued it counts for verify-ca, and the name does not.
    assert_eq!(load(&secured(&elsewhere, "verify-ca", server.directory())).await, Ok(found("seven")));
    let over_tls =
        "SELECT count(*)::text FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'larder' AND ssl";
    let loads = loader(&origin(&strict), "item:{id}", &reads("SELECT name FROM items WHERE id = $id", None, None));
    loads.load(b"item:7").await.expect("loads");
    assert_eq!(server.value("postgres", over_tls).await, "1", "the connection is encrypted");

    let stranger = TempDir::new().expect("a temporary directory");
    write_certificates(stranger.path());
    let root_only = |mode: &str| format!("{url}?sslmode={mode}&sslrootcert={}", server.directory().join("ca.pem").display());
    for (wrong, word) in [
        (secured(&url, "verify-full", stranger.path()), "invalid peer certificate"),
        (secured(&elsewhere, "verify-full", server.directory()), "not valid for name"),
        (root_only("verify-full"), "certificate"),
        (format!("{url}?sslmode=disable"), "no encryption"),
        (strict.replace("ca.pem", "none.pem"), "cannot be opened"),
        (strict.replace("cert.pem", "key.pem"), "TLS failed"),
    ] {
        let error = load(&wrong).await.expect_err(&wrong);
        assert!(error.to_string().contains(word), "{wrong}: {error}");
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_wanted() {
    let server = Postgres::shared();
    let url = server.database(&ITEMS).await;
    let error = load(&format!("{url}?sslmode=require")).await.expect_err("the server has no TLS");
    assert!(error.to_string().contains("TLS failed: server does not support TLS"), "{error}");
}

/// The server gets certificates of another authority; the origin's files follow, and its next connection takes them up.
#[tokio::test]
async fn certificates_that_change_on_disk_are_taken_up() {
    let (server, url) = start().await;
    let keys = TempDir::new().expect("a temporary directory");
    let copy = |from: &Path, to: &Path| {
        for name in ["ca.pem", "cert.pem", "key.pem"] {
            // In place, so that the server's key keeps its owner and mode.
            fs::write(to.join(name), fs::read(from.join(name)).expect("a file")).expect("a file of ours");
        }
    };
    copy(server.directory(), keys.path());
    let loads = loader(
        &origin(&secured(&url, "verify-full", keys.path())),
        "item:{id}",
        &reads("SELECT name FROM items WHERE id = $id", None, None),
    );
    assert_eq!(loads.load(b"item:7").await, Ok(found("seven")));
    let fresh = TempDir::new().expect("a temporary directory");
    write_certificates(fresh.path());
    copy(fresh.path(), server.directory());
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'larder'";
    server.run("postgres", &["SELECT pg_reload_conf()", end]).await;
    let mut refused = false;
    crate::support::poll("the old authority to be refused", async || {
        refused |= loads.load(b"item:7").await.is_err_and(|error| error.to_string().contains("invalid peer certificate"));
        if !refused {
            server.run("postgres", &[end]).await;
        }
        refused
    })
    .await;
    copy(fresh.path(), keys.path());
    crate::support::poll("the new certificates", async || loads.load(b"item:7").await == Ok(found("seven"))).await;
}
