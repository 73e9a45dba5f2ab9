//! Where peers come in: the address of the configuration, and the inside of the tunnel while there is one.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Whatever connections can be accepted from.
pub trait Accept: Send {
    /// Waits for the next connection.
    ///
    /// # Errors
    /// What the system says.
    ///
    /// # Cancel safety
    /// Safe: a connection that was not given out is not accepted.
    fn accept(&mut self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send;
}

impl Accept for TcpListener {
    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }
}

/// Two listeners, the second of which comes and goes with a tunnel.
#[derive(Debug)]
pub struct Doors {
    outer: TcpListener,
    inner: Option<TcpListener>,
    tunnel: watch::Receiver<Option<SocketAddr>>,
}

impl Doors {
    /// A listener, and the place where the address of the tunnel's inside is told.
    #[must_use]
    pub fn new(outer: TcpListener, mut tunnel: watch::Receiver<Option<SocketAddr>>) -> Self {
        // A tunnel that is there already is a change.
        tunnel.mark_changed();
        Self {
            outer,
            inner: None,
            tunnel,
        }
    }

    async fn move_inner(&mut self) {
        let address = *self.tunnel.borrow_and_update();
        self.inner = None;
        if let Some(address) = address {
            match TcpListener::bind(address).await {
                Ok(listener) => self.inner = Some(listener),
                // A configuration that listens everywhere listens there too.
                Err(error) => {
                    tracing::debug!(%address, %error, "no listener of its own inside the tunnel")
                }
            }
        }
    }
}

async fn accept_inner(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

impl Accept for Doors {
    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        loop {
            let changed = tokio::select! {
                accepted = self.outer.accept() => return accepted,
                accepted = accept_inner(self.inner.as_ref()) => return accepted,
                changed = self.tunnel.changed() => changed,
            };
            if changed.is_err() {
                // Nobody tells of tunnels any more.
                return self.outer.accept().await;
            }
            self.move_inner().await;
        }
    }
}
