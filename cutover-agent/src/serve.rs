//! The serving agent: the control socket for people, the peer listener for the other side, at most one hop.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cutover_protocol::door::Closing;
use cutover_protocol::hop::Undo;
use cutover_protocol::id::{HopId, Site};
use cutover_protocol::plan::{Plan, RawPlan};
use cutover_protocol::wire::{Request, Response};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore, broadcast};
use tokio::task::JoinSet;

use crate::config::Config;
use crate::control::{Checked, Command, Line, Status};
use crate::driver::{Driver, DriverError, Watch, journal::Journal};
use crate::engine::Host;
use crate::memory::PageStore;
use crate::names::Names;
use crate::peer::{self, Doors, Handler, PeerTimeouts};
use crate::report::Report;
use crate::target::Target;
use crate::tls::ServerTls;
use crate::tunnel::Tunnel;
use crate::{driver, durable, sockets};

/// Longest command line, in bytes: a plan of thousands of containers fits.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Commands served at once.
const COMMANDS_MAX: usize = 32;

/// Timeouts of the accepting side; the driver brings its own.
const PEER_TIMEOUTS: PeerTimeouts = PeerTimeouts {
    resume_within: Duration::ZERO,
    connect: Duration::from_secs(10),
    dead_after: Duration::from_secs(3),
};

/// Pause between tries to pay what is owed to a target that was gone.
const OWED_PAUSE: Duration = Duration::from_secs(2);

/// How often what is owed is tried before it is left to `recover`: ten minutes.
const OWED_TRIES_MAX: u32 = 300;

/// The agent could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket is taken or cannot be made.
    #[error("cannot listen at {place}: {source}")]
    Listen {
        /// The address or path.
        place: String,
        /// Why.
        source: std::io::Error,
    },
    /// The state folder cannot be used.
    #[error(
        "cannot use the state folder {path}: {source}; make it writable or choose another `state_dir`"
    )]
    State {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] crate::tls::TlsError),
    /// Names cannot be turned.
    #[error(transparent)]
    Names(#[from] crate::names::NamesError),
    /// The remembered standing cannot be read.
    #[error(transparent)]
    Target(#[from] crate::target::TargetError),
}

/// What the last hop left to be done at a target that was gone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Owed {
    hop: Option<HopId>,
    plan: Option<Plan>,
    undos: Vec<Undo>,
}

/// The serving agent.
#[derive(Debug)]
pub struct Agent {
    host: Host,
    target: Arc<Target>,
    tunnel: Arc<Tunnel>,
    names: Arc<Names>,
    /// The hop that is being driven. Held across the whole hop by whoever drives.
    current: Mutex<Option<Watch>>,
    owed: Mutex<Owed>,
}

struct PeerHandler(Arc<Target>);

impl Handler for PeerHandler {
    type Request = Request;
    type Response = Response;

    async fn handle(&self, request: Request) -> Response {
        self.0.answer(request).await
    }

    fn pages(&self) -> Option<Arc<PageStore>> {
        Some(self.0.pages())
    }
}

/// Serves until SIGTERM or SIGINT, then undoes a hop that has not committed, finishes one that has, and returns.
///
/// # Errors
/// [`ServeError`] when a socket, the state folder or a certificate cannot be used.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    let state = |source| ServeError::State {
        path: config.state_dir.clone(),
        source,
    };
    make_private(&config.state_dir).map_err(state)?;
    let owed = durable::read_json(&config.state_dir.join("owed.json")).map_err(state)?;
    let tls = ServerTls::load(&config.peer.tls, "source");
    let control = sockets::listen(&config.control).map_err(|source| ServeError::Listen {
        place: config.control.display().to_string(),
        source,
    })?;
    let port = config.peer.listen.port();
    let tunnel = Arc::new(Tunnel::new(&config.state_dir, &config.tunnel, port));
    if let Err(error) = tunnel.restore().await {
        // A hop that needs it makes a new one, and goes past it meanwhile.
        tracing::error!("the tunnel of an earlier hop is not up: {error}");
    }
    let agent = Arc::new(Agent {
        host: Host::new(config.clone()),
        target: Arc::new(Target::new(config.clone(), Arc::clone(&tunnel))?),
        tunnel,
        names: Arc::new(Names::load(&config)?),
        current: Mutex::new(None),
        owed: Mutex::new(owed),
    });
    let mut tasks = JoinSet::new();
    if config.site == Site::Target {
        let listener = TcpListener::bind(config.peer.listen)
            .await
            .map_err(|source| ServeError::Listen {
                place: config.peer.listen.to_string(),
                source,
            })?;
        tasks.spawn(serve_peers(listener, tls?, Arc::clone(&agent)));
    }
    tracing::info!(site = %config.site, control = %config.control.display(), peer = %config.peer.listen, "serving");
    tasks.spawn(Arc::clone(&agent).recover_at_start());
    tasks.spawn(Arc::clone(&agent).pay_owed());
    let (names, proxy) = (Arc::clone(&agent.names), config.proxy_control.clone());
    tasks.spawn(async move { names.follow(proxy.as_deref()).await });
    let accepting = Arc::clone(&agent);
    tasks.spawn(async move { accepting.accept(control).await });
    stop_signal().await;
    tracing::info!("asked to stop");
    agent.wind_down().await;
    Ok(())
}

/// Images hold whatever secrets the memory held: nobody else may look into the state folder.
fn make_private(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut stream) => stream.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = terminated => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

async fn serve_peers(listener: TcpListener, tls: ServerTls, agent: Arc<Agent>) {
    let config = agent.host.config.clone();
    let trees: peer::Trees = Arc::new(move |name| config.folder(name.as_str()));
    let handler = Arc::new(PeerHandler(Arc::clone(&agent.target)));
    let doors = Doors::new(listener, agent.tunnel.door());
    let Err(error) = peer::serve(doors, tls, PEER_TIMEOUTS, handler, trees).await;
    tracing::error!("the peer listener failed: {error}");
}

type Answers = tokio::net::unix::OwnedWriteHalf;

impl Agent {
    async fn accept(self: Arc<Self>, listener: UnixListener) {
        let slots = Arc::new(Semaphore::new(COMMANDS_MAX));
        let mut commands = JoinSet::new();
        loop {
            while commands.try_join_next().is_some() {}
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            if let Ok((stream, _)) = listener.accept().await {
                let agent = Arc::clone(&self);
                commands.spawn(async move {
                    agent.command(stream).await;
                    drop(slot);
                });
            }
        }
    }

    async fn command(self: Arc<Self>, stream: UnixStream) {
        let (read, mut answers) = stream.into_split();
        let mut text = Vec::new();
        if BufReader::new(read.take(LINE_BYTES_MAX))
            .read_until(b'\n', &mut text)
            .await
            .is_err()
        {
            return;
        }
        let line = match serde_json::from_slice(&text) {
            Ok(command) => self.obey(command, &mut answers).await,
            Err(error) => Line::Error {
                message: format!("not a command: {error}"),
            },
        };
        say(&mut answers, &line).await;
    }

    async fn obey(self: Arc<Self>, command: Command, answers: &mut Answers) -> Line {
        let result = match command {
            Command::Preflight { plan } => self.preflight(plan).await.map(Line::Preflight),
            Command::Hop { plan, fail_at } => {
                let plan = match Plan::try_from(plan) {
                    Ok(plan) => plan,
                    Err(error) => {
                        return Line::Error {
                            message: error.to_string(),
                        };
                    }
                };
                self.hop(plan, fail_at, answers).await
            }
            Command::Status => Ok(Line::Status(Box::new(self.status().await))),
            Command::Abort => self.abort().await,
            Command::Recover => self.recover(answers).await,
            Command::Retire { anyway } => self.retire(anyway).await,
        };
        result.unwrap_or_else(|message| Line::Error { message })
    }

    async fn hop(
        self: Arc<Self>,
        plan: Plan,
        fail_at: Option<cutover_protocol::hop::Phase>,
        answers: &mut Answers,
    ) -> Result<Line, String> {
        let mut current = self.current.lock().await;
        if let Some(watch) = current.as_ref() {
            return Err(format!(
                "{} is under way: wait for it, or `cutover-agent abort`",
                watch.hop
            ));
        }
        let driver = Driver::begin(self.place(), plan.clone(), fail_at)
            .await
            .map_err(|error| error.to_string())?;
        *current = Some(driver.watch());
        drop(current);
        self.drive(driver, answers).await
    }

    /// Drives in a task of its own: whoever asked may leave, the hop goes on.
    async fn drive(self: Arc<Self>, driver: Driver, answers: &mut Answers) -> Result<Line, String> {
        let mut progress = driver.watch().progress.subscribe();
        let agent = Arc::clone(&self);
        let mut running = tokio::spawn(async move { agent.to_the_end(driver).await });
        let mut watching = true;
        loop {
            tokio::select! {
                // Lines first, so that none is missing before the report.
                biased;
                line = progress.recv(), if watching => match line {
                    Ok(line) => say(answers, &Line::Progress(line)).await,
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => watching = false,
                },
                ended = &mut running => {
                    let report = ended.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
                    return Ok(Line::Report(Box::new(report)));
                }
            }
        }
    }

    async fn to_the_end(&self, driver: Driver) -> Result<Report, DriverError> {
        let plan = driver.plan().clone();
        let result = driver.run().await;
        if let Ok(report) = &result {
            self.remember_owed(report, plan).await;
        }
        *self.current.lock().await = None;
        result
    }

    async fn remember_owed(&self, report: &Report, plan: Plan) {
        let undos: Vec<Undo> = Undo::ALL
            .into_iter()
            .filter(|undo| report.owed.contains(&undo.to_string()))
            .rev()
            .collect();
        if undos.is_empty() {
            return;
        }
        let owed = Owed {
            hop: Some(report.hop.clone()),
            plan: Some(plan),
            undos,
        };
        self.keep_owed(owed).await;
    }

    async fn keep_owed(&self, owed: Owed) {
        let path = self.host.config.state_dir.join("owed.json");
        if let Err(error) = durable::write_json(&path, &owed) {
            tracing::error!("cannot keep {}: {error}", path.display());
        }
        *self.owed.lock().await = owed;
    }

    /// Pays what is owed to a target that was gone, as soon as it is back.
    async fn pay_owed(self: Arc<Self>) {
        let mut tries = 0;
        let mut ticks = tokio::time::interval(OWED_PAUSE);
        loop {
            ticks.tick().await;
            let owed = self.owed.lock().await.clone();
            if owed.undos.is_empty() || self.current.lock().await.is_some() {
                tries = 0;
            } else if tries < OWED_TRIES_MAX {
                tries += 1;
                self.pay(owed).await;
            }
        }
    }

    async fn pay(&self, owed: Owed) {
        let (Some(hop), Some(plan)) = (owed.hop.clone(), owed.plan.clone()) else {
            return;
        };
        match driver::pay(&self.host, &plan, &hop, &owed.undos).await {
            Ok(()) => {
                tracing::info!(%hop, "what was owed to the target has been done");
                self.keep_owed(Owed::default()).await;
            }
            Err(message) => tracing::debug!(%hop, "still owed: {message}"),
        }
    }

    async fn recover_at_start(self: Arc<Self>) {
        match self.take_up().await {
            Ok(Some(driver)) => {
                tracing::warn!(hop = %driver.watch().hop, "a hop was left unfinished: recovering");
                match self.to_the_end(driver).await {
                    Ok(report) => {
                        tracing::info!(hop = %report.hop, outcome = ?report.outcome, "recovered")
                    }
                    Err(error) => tracing::error!("not recovered: {error}"),
                }
            }
            Ok(None) => {}
            Err(message) => tracing::error!("cannot recover: {message}"),
        }
    }

    async fn take_up(&self) -> Result<Option<Driver>, String> {
        let mut current = self.current.lock().await;
        if let Some(watch) = current.as_ref() {
            return Err(format!("{} is under way already", watch.hop));
        }
        let driver = Driver::resume(self.place()).map_err(|error| error.to_string())?;
        *current = driver.as_ref().map(Driver::watch);
        Ok(driver)
    }

    async fn recover(self: Arc<Self>, answers: &mut Answers) -> Result<Line, String> {
        if let Some(watch) = self.current.lock().await.clone() {
            return Ok(follow(watch).await);
        }
        if let Some(driver) = self.take_up().await? {
            return self.drive(driver, answers).await;
        }
        let owed = self.owed.lock().await.clone();
        if !owed.undos.is_empty() {
            self.pay(owed).await;
            let left = self.owed.lock().await.undos.len();
            return match left {
                0 => Ok(Line::Done {
                    message: "what was owed to the target has been done".to_owned(),
                }),
                _ => Err(
                    "the target cannot be reached: what is owed there stays; the source serves"
                        .to_owned(),
                ),
            };
        }
        Ok(Line::Done {
            message: self.nothing_to_recover().await,
        })
    }

    async fn nothing_to_recover(&self) -> String {
        match self.target.standing().await {
            Some(standing) => format!(
                "{} stands here as {:?}; the source's agent decides what becomes of it",
                standing.hop, standing.stage
            ),
            None => "nothing to recover".to_owned(),
        }
    }

    async fn preflight(&self, plan: RawPlan) -> Result<Checked, String> {
        let plan = Plan::try_from(plan).map_err(|error| error.to_string())?;
        driver::dry_run(&self.host, &plan).await
    }

    async fn status(&self) -> Status {
        let watch = self.current.lock().await.clone();
        let unfinished = watch.is_none() && Journal::exists(&self.host.config.state_dir);
        Status {
            site: self.host.config.site,
            phase: watch.as_ref().map(|watch| *watch.phase.borrow()),
            moving: watch
                .as_ref()
                .and_then(|watch| watch.moving.borrow().clone()),
            hop: watch.map(|watch| watch.hop),
            standing: self.target.standing().await,
            unfinished,
            tunnel: self.tunnel.fare().await,
            old_door: self.names.old_door().await,
            owed: self
                .owed
                .lock()
                .await
                .undos
                .iter()
                .map(ToString::to_string)
                .collect(),
        }
    }

    async fn abort(&self) -> Result<Line, String> {
        let Some(watch) = self.current.lock().await.clone() else {
            return Err("no hop is under way here".to_owned());
        };
        if !watch.phase.borrow().is_before_commit() {
            return Err(format!(
                "{} is past its commit: it cannot be aborted, only finished",
                watch.hop
            ));
        }
        watch.abort.send_replace(true);
        Ok(follow(watch).await)
    }

    fn place(&self) -> driver::Place {
        (
            self.host.clone(),
            Arc::clone(&self.tunnel),
            Arc::clone(&self.names),
        )
    }

    async fn retire(&self, anyway: bool) -> Result<Line, String> {
        let door = self.names.old_door().await;
        if !anyway && door.is_some_and(|door| door.closing != Closing::Now) {
            return Err(
                "somebody still comes by the source, or may: see `cutover-agent status`, or say --anyway"
                    .to_owned(),
            );
        }
        if let Some(watch) = self.current.lock().await.as_ref() {
            return Err(format!("{} is under way: wait for its end", watch.hop));
        }
        self.names.retire().await?;
        let Some((hop, target)) = self.tunnel.kept().await else {
            return Ok(Line::Done {
                message: "no tunnel is left; names live as long as before".to_owned(),
            });
        };
        // The target's end first: while ours is there, another try is possible.
        driver::close_far_end(&self.host, target, &hop).await?;
        self.tunnel
            .close(&hop)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Line::Done {
            message: format!(
                "the tunnel of {hop} is down; the source no longer leads anybody to the target"
            ),
        })
    }

    /// At SIGTERM: what has not committed is undone, what has is finished.
    async fn wind_down(&self) {
        let Some(watch) = self.current.lock().await.clone() else {
            return;
        };
        if watch.phase.borrow().is_before_commit() {
            watch.abort.send_replace(true);
        }
        follow(watch).await;
    }
}

/// Waits until a hop is over.
async fn follow(watch: Watch) -> Line {
    let mut phase = watch.phase.subscribe();
    let hop = watch.hop.clone();
    // Only the driver keeps the sender alive.
    drop(watch);
    while !phase.borrow().is_over() && phase.changed().await.is_ok() {}
    let stands = *phase.borrow();
    Line::Done {
        message: format!("{hop} stands at {stands}"),
    }
}

async fn say(answers: &mut Answers, line: &Line) {
    if let Ok(mut text) = serde_json::to_vec(line) {
        text.push(b'\n');
        // Whoever asked may have left; the work goes on.
        let _ = answers.write_all(&text).await;
    }
}
