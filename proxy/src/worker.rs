//! A worker: one thread, one single-threaded runtime, its own listeners, pools and buffers. Workers share nothing
//! but the gates, the registers behind them and the number of connections.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cutover_protocol::hold::InFlight;
use cutover_protocol::id::ServiceName;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinSet, LocalSet};

use crate::access_log::AccessLog;
use crate::buffer::Buffers;
use crate::config::Limits;
use crate::listen::hangup::HangupWatch;
use crate::listen::port::{Closing, Current, Port, PortSeed, Settings};
use crate::listen::{self, Listener};
use crate::service::Service;

/// Smallest size of a connection's buffer, in bytes: large enough that a system call is worth its price.
const BUFFER_BYTES_MIN: usize = 16 * 1024;

/// What the control thread may ask a worker.
#[derive(Debug)]
pub(crate) enum Question {
    /// Who is in flight for this service.
    InFlight {
        service: ServiceName,
        reply: oneshot::Sender<Vec<InFlight>>,
    },
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not at all.
    Running,
    /// Accept nobody, finish what runs.
    Closing,
    /// Whoever is left is cut off.
    Cut,
}

/// Everything a worker needs to start; it is made on the main thread.
pub(crate) struct WorkerSeed {
    pub(crate) index: usize,
    pub(crate) services: Vec<(Arc<Service>, Vec<Listener>)>,
    pub(crate) limits: Limits,
    pub(crate) access_log: Option<AccessLog>,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) questions: mpsc::Receiver<Question>,
    pub(crate) phase: watch::Receiver<Phase>,
    /// Told who had to be cut off, when it is over.
    pub(crate) over: mpsc::Sender<Vec<InFlight>>,
}

impl WorkerSeed {
    /// Runs the worker on this thread until the proxy ends.
    pub(crate) fn run(self) -> io::Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, self.work())
    }

    async fn work(self) -> io::Result<()> {
        let buffers = Buffers::new(self.limits.head_bytes_max.max(BUFFER_BYTES_MIN));
        let current = Current::new(Settings {
            limits: self.limits,
        });
        let hangup = HangupWatch::new()?;
        let closing = Rc::new(Closing::default());
        let mut helpers = JoinSet::new();
        helpers.spawn_local(watch_hangups(Rc::clone(&hangup)));
        let mut ports = Vec::new();
        let mut listening = JoinSet::new();
        for (service, listeners) in self.services {
            let port = Rc::new(Port::new(PortSeed {
                service,
                worker: self.index,
                current: Rc::clone(&current),
                buffers: Rc::clone(&buffers),
                hangup: Rc::clone(&hangup),
                closing: Rc::clone(&closing),
                access_log: self.access_log.clone(),
                id_origin: id_origin(self.index, ports.len()),
            }));
            helpers.spawn_local(Rc::clone(&port.pool).keep());
            for listener in listeners {
                let permits = Arc::clone(&self.permits);
                listening.spawn_local(listen::serve(Rc::clone(&port), listener, permits));
            }
            ports.push(port);
        }
        helpers.spawn_local(answer(ports.clone(), self.questions));
        let left = finish(listening, self.phase, &closing, &ports).await;
        // The control thread may have given up on us.
        drop(self.over.send(left).await);
        Ok(())
    }
}

async fn watch_hangups(hangup: Rc<HangupWatch>) {
    if let Err(error) = hangup.run().await {
        tracing::error!("clients that leave while held are no longer noticed: {error}");
    }
}

async fn answer(ports: Vec<Rc<Port>>, mut questions: mpsc::Receiver<Question>) {
    while let Some(Question::InFlight { service, reply }) = questions.recv().await {
        let ports = ports.iter().filter(|port| *port.service.name() == service);
        // Whoever asked may not wait any longer.
        drop(reply.send(ports.flat_map(|port| port.in_flight.list()).collect()));
    }
}

/// Waits for the end to begin, and then for every connection to end or for the cut.
async fn finish(
    mut listening: JoinSet<io::Result<()>>,
    mut phase: watch::Receiver<Phase>,
    closing: &Closing,
    ports: &[Rc<Port>],
) -> Vec<InFlight> {
    // A dropped sender means that the main thread is gone; that ends us like a word from it.
    drop(phase.wait_for(|phase| *phase != Phase::Running).await);
    closing.close();
    let ended = async {
        while let Some(port) = listening.join_next().await {
            if let Ok(Err(error)) = port {
                tracing::error!("a listener failed: {error}");
            }
        }
    };
    tokio::select! {
        biased;
        () = ended => Vec::new(),
        _ = phase.wait_for(|phase| *phase == Phase::Cut) => ports.iter().flat_map(|port| port.in_flight.list()).collect(),
    }
}

/// Differs between starts, workers and services: time of the start, and which.
fn id_origin(worker: usize, port: usize) -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or_default();
    let place = u64::try_from(worker * 64 + port).unwrap_or_default();
    nanoseconds.rotate_left(16) ^ place ^ u64::from(std::process::id()) << 16
}
