//! The injector as a part of the operator's process.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::{error, info};

use super::certificates::{self, Places};
use super::known::Known;
use super::missed::Missed;
use super::patch::Settings;
use super::serve::{self, Desk};
use crate::operator::controller::Beside;

/// How the injector runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the webhook is served.
    pub listen: SocketAddr,
    /// The namespaces whose policies and pods it knows. Empty: all.
    pub namespaces: Vec<String>,
    /// The namespace of the Secret.
    pub namespace: String,
    /// The Secret with the webhooks' certificate.
    pub secret: String,
    /// The MutatingWebhookConfiguration, and the ValidatingWebhookConfiguration of the same name, that lead to the webhooks.
    pub configuration: String,
    /// The names under which the API server finds it.
    pub hosts: BTreeSet<String>,
    /// What all pods share.
    pub settings: Settings,
}

/// Why the webhook cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{address} cannot be listened on: {source}: stop what listens there, or choose another address with --webhook-listen")]
pub struct BindError {
    address: SocketAddr,
    source: io::Error,
}

/// Takes the port. Serving begins with [`start`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Starts it. Each of what is returned says what it waits for, and is empty in the end.
pub fn start(config: Config, listener: TcpListener, beside: Beside<'_>) -> Vec<watch::Receiver<String>> {
    let Beside { client, leadership, metrics, tasks } = beside;
    let Config { listen, namespaces, namespace, secret, configuration, hosts, settings } = config;
    info!(%listen, configuration, "the injector starts");
    let known = Arc::new(Known::start(client, &namespaces, tasks));
    let (tell_known, known_waiting) = watch::channel("what the injector watches".to_owned());
    let (tell_served, served_waiting) = watch::channel("the Secret with the webhook's certificate".to_owned());
    let (served, certificate) = watch::channel(None);
    let missed = Missed {
        client: client.clone(),
        known: known.clone(),
        settings: settings.clone(),
        metrics: metrics.clone(),
        own_namespace: namespace.clone(),
    };
    tasks.spawn(missed.follow(leadership.clone(), known_waiting.clone()));
    let places = Places { namespace, secret, configuration, hosts };
    tasks.spawn(certificates::keep(client.clone(), places, leadership.clone(), served, tell_served));
    let desk = Desk::new(known.clone(), known_waiting.clone(), settings, metrics.clone());
    tasks.spawn(answer(listener, certificate, desk));
    tasks.spawn(async move {
        known.ready().await;
        tell_known.send_replace(String::new());
    });
    vec![known_waiting, served_waiting]
}

/// Serves, from the first certificate on.
async fn answer(listener: TcpListener, mut certificate: watch::Receiver<Option<Arc<ServerConfig>>>, desk: Desk) {
    let Some(first) = certificate.wait_for(Option::is_some).await.ok().and_then(|first| first.clone()) else { return };
    let (serve_next, served) = watch::channel(first);
    let follow = async {
        while certificate.changed().await.is_ok() {
            if let Some(next) = certificate.borrow_and_update().clone() {
                serve_next.send_replace(next);
            }
        }
    };
    tokio::select! {
        outcome = serve::serve(listener, served, desk) => {
            if let Err(error) = outcome {
                error!(%error, "the webhook is served no more");
            }
        }
        () = follow => {}
    }
}
