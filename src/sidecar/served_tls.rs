//! The server's side of TLS: a certificate and its key from files that rotate, and the connections that are made with them.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::serve::Listener;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, TlsAcceptor};
use tracing::{info, warn};

use super::files::{Contents, FileError, WatchedFiles};
use super::upstream::access::KeysError;

/// The longest of these files.
const MAX_FILE_BYTES: usize = 1 << 20;

/// Why a certificate cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServedTlsError {
    /// Its files cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// What they hold is refused.
    #[error("the served certificate: {0}")]
    Keys(#[from] KeysError),
}

/// The newest of a served certificate: each connection is made with what it holds then.
pub type Served = watch::Receiver<Arc<ServerConfig>>;

/// Reads a certificate with its chain and its key, and takes up each change that can be used, as long as somebody holds the result.
pub async fn open_served(certificate: PathBuf, key: PathBuf) -> Result<Served, ServedTlsError> {
    let mut files = WatchedFiles::open(vec![certificate, key], MAX_FILE_BYTES).await?;
    let (sender, served) = watch::channel(parse(&files.current())?);
    tokio::spawn(async move {
        loop {
            let contents = tokio::select! {
                contents = files.changed() => contents,
                () = sender.closed() => return,
            };
            match parse(&contents) {
                Ok(config) => {
                    sender.send_replace(config);
                    info!("a new certificate is served");
                }
                Err(error) => warn!(%error, "a new certificate cannot be served; the old one stays in use"),
            }
        }
    });
    Ok(served)
}

fn parse(contents: &Contents) -> Result<Arc<ServerConfig>, KeysError> {
    let file = |index: usize| contents.get(index).map_or(&[][..], |bytes| bytes);
    let chain: Vec<_> = CertificateDer::pem_slice_iter(file(0)).collect::<Result<_, _>>().unwrap_or_default();
    if chain.is_empty() {
        return Err(KeysError::NoCertificate);
    }
    let key = PrivateKeyDer::from_pem_slice(file(1)).map_err(|_| KeysError::NoKey)?;
    let pair = |error: rustls::Error| KeysError::Pair(error.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(pair)?;
    builder.with_no_client_auth().with_single_cert(chain, key).map(Arc::new).map_err(pair)
}

/// A listener whose connections are encrypted.
pub struct SecuredListener {
    /// Where connections come in.
    pub listener: TcpListener,
    /// What is presented to them.
    pub served: Served,
}

impl Listener for SecuredListener {
    type Io = Secured;
    type Addr = SocketAddr;

    /// The handshake is left to whoever reads: a slow peer holds up no other.
    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let acceptor = TlsAcceptor::from(self.served.borrow().clone());
        (Secured::Agreeing(Box::new(acceptor.accept(stream))), address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// An encrypted connection, which agrees with its peer first.
pub enum Secured {
    /// It has not agreed yet.
    Agreeing(Box<Accept<TcpStream>>),
    /// It has.
    Agreed(Box<TlsStream<TcpStream>>),
    /// It could not.
    Failed,
}

impl Secured {
    fn poll_agreed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut TlsStream<TcpStream>>>> {
        if let Self::Agreeing(accept) = self {
            let agreed = ready!(Pin::new(&mut **accept).poll(cx));
            *self = Self::Failed;
            *self = Self::Agreed(Box::new(agreed?));
        }
        match self {
            Self::Agreed(stream) => Poll::Ready(Ok(Pin::new(&mut **stream))),
            Self::Agreeing(_) | Self::Failed => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for Secured {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.get_mut().poll_agreed(cx))?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.get_mut().poll_agreed(cx))?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Agreed(stream) => Pin::new(&mut **stream).poll_flush(cx),
            Self::Agreeing(_) | Self::Failed => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Agreed(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            // Who ends before it has agreed has said nothing that could be cut off.
            Self::Agreeing(_) | Self::Failed => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use axum::Router;
    use axum::routing::get;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, RootCertStore};
    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;
    use tokio_rustls::TlsConnector;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// Puts a new self-signed certificate in its place.
    fn renew(dir: &Path) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        for (name, text) in [("key", made.signing_key.serialize_pem()), ("cert", made.cert.pem())] {
            fs::write(dir.join("fresh"), text).unwrap();
            fs::rename(dir.join("fresh"), dir.join(name)).unwrap();
        }
        made.cert.der().clone()
    }

    /// What a client that trusts `certificate` alone is answered.
    async fn ask(address: SocketAddr, certificate: &CertificateDer<'static>) -> io::Result<String> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let tcp = TcpStream::connect(address).await?;
        let mut stream = TlsConnector::from(Arc::new(config)).connect(ServerName::from(address.ip()), tcp).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn new_certificates_are_taken_up_and_nobody_holds_up_the_others() {
        let dir = TempDir::new().unwrap();
        let first = renew(dir.path());
        let served = open_served(dir.path().join("cert"), dir.path().join("key")).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "here" }));
        tokio::spawn(async move { axum::serve(SecuredListener { listener, served }, router).await });
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut plain = TcpStream::connect(address).await.unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let answer = timeout(LONG, ask(address, &first)).await.expect("an answer").unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer}");
        let second = renew(dir.path());
        let taken_up = async {
            while ask(address, &second).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(LONG, taken_up).await.expect("the new certificate is presented");
        assert!(ask(address, &first).await.is_err());
        assert!(matches!(parse(&[Arc::from(&b"no certificate"[..]), Arc::from(&b""[..])].into()), Err(KeysError::NoCertificate)));
    }
}
