//! A cable between source and target that can be cut, falls silent, flips bits, and counts what it carried.

use std::time::Duration;

use cutover_agent::peer::{self, PeerTimeouts, Session};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::world::{LIMIT, TIMEOUTS, World};

/// A cable between source and target that can be cut, and counts what it carried.
pub(crate) struct Cable {
    pub(crate) addr: std::net::SocketAddr,
    pub(crate) cut: watch::Sender<Cut>,
    pub(crate) carried: watch::Receiver<u64>,
    _tasks: JoinSet<()>,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Cut {
    Whole,
    /// Nothing passes, nothing is reset: as a dead router.
    Silent,
    /// Every connection is closed, also new ones.
    Closed,
    /// One bit of the next bytes is flipped; then the cable is whole again.
    Flip,
}

impl Cable {
    pub(crate) async fn to(target: std::net::SocketAddr) -> Self {
        // A link has no room for megabytes: what it holds when it breaks is lost.
        let socket = if target.is_ipv4() {
            TcpSocket::new_v4().unwrap()
        } else {
            TcpSocket::new_v6().unwrap()
        };
        socket.set_recv_buffer_size(64 << 10).unwrap();
        socket.bind((target.ip(), 0).into()).unwrap();
        let listener = socket.listen(64).unwrap();
        let addr = listener.local_addr().unwrap();
        let (cut, _) = watch::channel(Cut::Whole);
        let (count, carried) = watch::channel(0);
        let mut tasks = JoinSet::new();
        let switch = cut.clone();
        tasks.spawn(async move {
            let mut wires = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                // Nobody listens while an agent is restarted.
                let Ok(far) = TcpStream::connect(target).await else {
                    continue;
                };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                wires.spawn(wire(near_read, far_write, switch.clone(), count.clone()));
                wires.spawn(wire(far_read, near_write, switch.clone(), count.clone()));
            }
        });
        Self {
            addr,
            cut,
            carried,
            _tasks: tasks,
        }
    }

    /// A session over it that is taken up again when its connections break.
    pub(crate) async fn connect(&self, world: &World, dead_after: Duration) -> Session {
        let timeouts = PeerTimeouts {
            dead_after,
            resume_within: LIMIT,
            ..TIMEOUTS
        };
        let session = peer::connect(self.addr, world.tls(), timeouts, 4).await;
        session.unwrap()
    }

    /// Waits until more than so much has been carried.
    pub(crate) async fn has_carried(&self, bytes: u64) {
        let mut carried = self.carried.clone();
        carried.wait_for(|all| *all > bytes).await.unwrap();
    }

    /// Breaks, and is whole again only when it is known that something is wrong.
    pub(crate) async fn breaks(&self, cut: Cut, session: &Session) {
        self.cut.send_replace(cut);
        session.lost().await;
        self.cut.send_replace(Cut::Whole);
    }
}

async fn wire<R, W>(
    mut read: R,
    mut write: W,
    switch: watch::Sender<Cut>,
    count: watch::Sender<u64>,
) where
    R: AsyncReadExt + Unpin,
    W: AsyncWriteExt + Unpin,
{
    let mut cut = switch.subscribe();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let state = *cut.borrow_and_update();
        match state {
            Cut::Closed => return,
            Cut::Silent => {
                if cut.changed().await.is_err() {
                    return;
                }
            }
            Cut::Whole | Cut::Flip => tokio::select! {
                _ = cut.changed() => {}
                got = read.read(&mut buffer) => match got {
                    Ok(bytes) if state == Cut::Flip && bytes > 4096 => {
                        let is_ours = switch.send_if_modified(|cut| {
                            std::mem::replace(cut, Cut::Whole) == Cut::Flip
                        });
                        if is_ours {
                            buffer[bytes / 2] ^= 1;
                        }
                        if write.write_all(&buffer[..bytes]).await.is_err() {
                            return;
                        }
                    }
                    Ok(bytes) if bytes > 0 && write.write_all(&buffer[..bytes]).await.is_ok() => {
                        count.send_modify(|all| *all += bytes as u64);
                    }
                    _ => return,
                },
            },
        }
    }
}
