//! The old process of an upgrade: starts the new one, hands everything over, and goes on as if nothing had happened
//! where that comes to nothing.
//!
//! From the offer to the end no command may change a gate or a register here, and no lease runs out: the new process
//! has read them. A gate that drains or releases is not handed over. One that holds is: the held are tasks of this
//! process and stay so, whatever they speak; it follows the gate of the new process, lets them through when that opens,
//! and ends after the last of them.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use cutover_protocol::hold::Command;
use cutover_protocol::id::ServiceName;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::process::Command as Process;
use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

use super::channel::{Channel, FILES_MAX, Message, VERSION, send_with_files};
use super::{Running, supervisor};
use crate::control::words::{ProcessAnswer, ProcessRefusal};
use crate::listen::bound::Place;
use crate::listen::quic::router::Succession;
use crate::service::Mode;

/// Why the process stays the one it is.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The held would be stranded.
    #[error(
        "the gate of service {0} drains or releases; upgrade when it holds, or when it is open"
    )]
    InHop(ServiceName),
    /// The held would never be let through.
    #[error(
        "the gate of service {0} holds, and the new process would not say when it opens: it has no such service, or is too old"
    )]
    TellsNothing(ServiceName),
    /// One thing at a time.
    #[error("a reload or an upgrade is under way; try again when it has ended")]
    Busy,
    /// The last upgrade is not over.
    #[error("the process before the last upgrade{} still finishes what it began; try again when it has ended", pid(*.0))]
    Predecessor(Option<i32>),
    /// This process is ending.
    #[error("this process is ending")]
    Ending,
    /// The new program does not take the configuration, or is none.
    #[error("{} does not accept the configuration: {said}", .binary.display())]
    Check {
        /// The program.
        binary: PathBuf,
        /// Its words.
        said: String,
        /// What it ended with.
        status: ExitStatus,
    },
    /// The new program cannot be started.
    #[error("{} cannot be started", .binary.display())]
    Start {
        /// The program.
        binary: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The new process gave up, with a reason.
    #[error("the new process does not take over: {0}")]
    Declined(String),
    /// The new process ended, or broke off.
    #[error("the new process ended before it had taken over; its log says why")]
    Gone(#[source] io::Error),
    /// The new process takes too long.
    #[error("the new process was not ready within {} ms (upgrade_ms_max) and was given up", .0.as_millis())]
    TooSlow(Duration),
    /// The new process makes no sense.
    #[error("the new process said something unexpected; are the versions too far apart?")]
    Unexpected,
    /// Nothing to hand over with.
    #[error("cannot hand over")]
    System(#[from] io::Error),
}

impl UpgradeError {
    /// The class of it, for a program.
    #[must_use]
    pub fn reason(&self) -> ProcessRefusal {
        match self {
            Self::Check { status, .. } if status.code() == Some(2) => ProcessRefusal::Configuration,
            Self::InHop(_) | Self::Busy | Self::Predecessor(_) | Self::Ending => {
                ProcessRefusal::Busy
            }
            _ => ProcessRefusal::Failed,
        }
    }
}

fn pid(pid: Option<i32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" ({pid})"))
}

/// How far this process is in being replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Passing {
    /// Not at all.
    #[default]
    No,
    /// Another process has been offered everything.
    Offered,
    /// Another process serves.
    Over,
}

/// Who serves now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Handed {
    /// Its number for the kernel.
    pub(crate) pid: Option<i32>,
    /// Places it has no listener for.
    pub(crate) unused: Vec<Place>,
}

/// The right to hand over. Dropped before the end, everything goes on here.
struct Turn {
    running: Rc<Running>,
    done: Cell<bool>,
    _turn: OwnedMutexGuard<()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.done.get() {
            self.running.passing.set(Passing::No);
            for serving in &self.running.shared.load().services {
                serving.service.resume_lease();
            }
            for (_, quic) in self.running.shared.load().quic() {
                quic.router.take_back();
            }
            self.running.commands.send_replace(true);
        }
    }
}

impl Running {
    /// Why a command may not be obeyed now, if so.
    pub(crate) fn refuses(&self, command: &Command) -> Option<String> {
        if matches!(command, Command::Status { .. }) {
            return None;
        }
        match (self.passing.get(), &*self.predecessor.borrow()) {
            (Passing::Offered, _) => {
                Some("an upgrade is under way; repeat this in a moment".to_owned())
            }
            (Passing::Over, _) => Some("another process has taken over; connect again".to_owned()),
            (Passing::No, Some(before)) if self.begins_a_hold(command) => Some(format!(
                "the process before the last upgrade{} still finishes what it began, and would not be held; repeat this when it has ended",
                pid(*before)
            )),
            (Passing::No, _) => None,
        }
    }

    /// Starts a new process, and returns its number once it serves.
    ///
    /// # Cancel safety
    /// A new process that has been started goes on taking over.
    pub(crate) async fn upgrade(&self, binary: Option<PathBuf>) -> Result<u32, UpgradeError> {
        let binary = binary.unwrap_or_else(|| self.binary.clone());
        let outcome = self.replace_by(&binary).await;
        match &outcome {
            Ok(pid) => tracing::info!(target: "audit", pid, binary = %binary.display(), "upgraded"),
            Err(error) => {
                let why = super::chain(error);
                tracing::error!(target: "audit", binary = %binary.display(), "not upgraded, this process goes on: {why}");
            }
        }
        outcome
    }

    async fn replace_by(&self, binary: &Path) -> Result<u32, UpgradeError> {
        self.check_upgrade()?;
        if self.turn.try_lock().is_err() {
            return Err(UpgradeError::Busy);
        }
        let snapshot = self.shared.load_full();
        let (file, limit) = (&snapshot.config.file, snapshot.config.limits.upgrade_max);
        check(binary, file, limit).await?;
        let failed = |source| UpgradeError::Start {
            binary: binary.to_owned(),
            source,
        };
        let mut command = program(binary);
        command
            .arg("run")
            .arg("--config")
            .arg(file)
            .arg("--upgrade");
        let mut child = command.spawn().map_err(failed)?;
        let pid = child.id().unwrap_or_default();
        tracing::info!(pid, binary = %binary.display(), "starting the new process");
        let mut handed = self.handed.subscribe();
        let mut failure = self.failure.subscribe();
        failure.mark_unchanged();
        // Its own limits end a handover; this one is for a process that never asks for one.
        let waited = timeout(limit * 3, async {
            tokio::select! {
                biased;
                _ = handed.wait_for(Option::is_some) => Ok(pid),
                status = child.wait() => {
                    let changed = failure.has_changed().unwrap_or(false);
                    let why = failure.borrow_and_update().clone().filter(|_| changed);
                    let status = status?;
                    Err(why.map_or_else(
                        || UpgradeError::Gone(io::Error::other(status.to_string())),
                        UpgradeError::Declined,
                    ))
                }
            }
        });
        let outcome = waited.await.unwrap_or(Err(UpgradeError::TooSlow(limit)));
        if outcome.is_err() {
            // It may have ended by itself.
            child.start_kill().ok();
            child.wait().await.ok();
        }
        outcome
    }

    fn check_upgrade(&self) -> Result<(), UpgradeError> {
        match self.passing.get() {
            Passing::No => {}
            Passing::Offered => return Err(UpgradeError::Busy),
            Passing::Over => return Err(UpgradeError::Ending),
        }
        if let Some(before) = &*self.predecessor.borrow() {
            return Err(UpgradeError::Predecessor(*before));
        }
        if self.ending.get() {
            return Err(UpgradeError::Ending);
        }
        let snapshot = self.shared.load();
        let mut services = snapshot.services.iter();
        let moves = services.find(|serving| !serving.service.stands_still());
        match moves {
            Some(serving) => Err(UpgradeError::InHop(serving.service.name().clone())),
            None => Ok(()),
        }
    }

    /// Answers the word `handover` of another process, and sees the handover through.
    ///
    /// # Cancel safety
    /// Dropped before the new process serves, everything goes on here.
    pub(crate) async fn hand_over(self: &Rc<Self>, stream: &UnixStream) {
        let turn = match self.begin() {
            Ok(turn) => turn,
            Err(error) => {
                let answer = ProcessAnswer::Refused {
                    reason: error.reason(),
                    message: super::chain(&error),
                };
                // Whoever asked may be gone.
                answer_with(stream, &answer, None).await.ok();
                return;
            }
        };
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        tracing::info!(pid, "another process asks to take over");
        match self.pass_all(stream, pid).await {
            Ok((channel, unused)) => {
                turn.done.set(true);
                self.passing.set(Passing::Over);
                // First this word, then the new process' own: until it is named it may not be heard.
                supervisor::replaced_by(pid);
                say(&channel, &Message::Farewell, &[]).await.ok();
                tracing::info!(target: "audit", pid, "handed over: finishing what runs");
                self.handed.send_replace(Some(Handed { pid, unused }));
                // Closed when this process ends: that tells the new one.
                self.follow(&channel).await;
            }
            Err(error) => {
                drop(turn);
                let why = super::chain(&error);
                tracing::error!("nothing was handed over, this process goes on: {why}");
                self.failure.send_replace(Some(why));
            }
        }
    }

    /// Does with the gates of this process what the new one does with its own, for as long as both are there.
    async fn follow(&self, channel: &AsyncFd<Channel>) {
        loop {
            match hear(channel).await {
                Ok(Message::Gate {
                    service,
                    gate,
                    register,
                }) => {
                    let snapshot = self.shared.load();
                    if let Some(service) = snapshot.service(&service) {
                        service.follow(gate, register);
                    }
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        if !self.holding().is_empty() {
            tracing::error!("the process after this one is gone: whoever is held here is refused");
            for serving in &self.shared.load().services {
                serving.service.gate.shut();
            }
        }
        self.deserted.send_replace(true);
    }

    /// Services whose gates hold.
    fn holding(&self) -> Vec<ServiceName> {
        let snapshot = self.shared.load();
        let services = snapshot.services.iter().map(|serving| &serving.service);
        let holding = services.filter(|service| service.gate.word().mode == Mode::Holding);
        holding.map(|service| service.name().clone()).collect()
    }

    /// Whether a command would close a gate that does not hold yet.
    fn begins_a_hold(&self, command: &Command) -> bool {
        let snapshot = self.shared.load();
        let is_open = |name: &ServiceName| {
            let service = snapshot.service(name);
            service.is_some_and(|service| service.gate.word().mode != Mode::Holding)
        };
        match command {
            Command::Hold { service, .. } => is_open(service),
            Command::HoldAll { services, .. } => {
                services.iter().any(|expected| is_open(&expected.service))
            }
            _ => false,
        }
    }

    async fn pass_all(
        &self,
        stream: &UnixStream,
        successor: Option<i32>,
    ) -> Result<(AsyncFd<Channel>, Vec<Place>), UpgradeError> {
        let (ours, theirs) = Channel::pair()?;
        let channel = ours.watch()?;
        let answered = answer_with(stream, &ProcessAnswer::HandingOver, Some(theirs)).await;
        answered.map_err(UpgradeError::Gone)?;
        match self.pass(&channel, successor).await {
            Ok(unused) => Ok((channel, unused)),
            Err(error) => {
                let error = last_word(&channel).unwrap_or(error);
                let why = super::chain(&error);
                // Gone is told as well by the closed channel.
                say(&channel, &Message::No { why }, &[]).await.ok();
                Err(error)
            }
        }
    }

    fn begin(self: &Rc<Self>) -> Result<Turn, UpgradeError> {
        self.check_upgrade()?;
        let turn = self.turn.clone().try_lock_owned();
        let turn = turn.map_err(|_| UpgradeError::Busy)?;
        self.passing.set(Passing::Offered);
        for serving in &self.shared.load().services {
            serving.service.pause_lease();
        }
        Ok(Turn {
            running: Rc::clone(self),
            done: Cell::new(false),
            _turn: turn,
        })
    }

    async fn pass(
        &self,
        channel: &AsyncFd<Channel>,
        successor: Option<i32>,
    ) -> Result<Vec<Place>, UpgradeError> {
        let limit = self.shared.load().config.limits.upgrade_max;
        let offered = timeout(limit, self.offer(channel)).await;
        offered.map_err(|_| UpgradeError::TooSlow(limit))??;
        let (unused, gates) = match hear_within(limit, channel).await? {
            Message::Ready { unused, gates } => (unused, gates),
            _ => return Err(UpgradeError::Unexpected),
        };
        let stranded = |name: &ServiceName| !gates.contains(name);
        if let Some(name) = self.holding().into_iter().find(stranded) {
            return Err(UpgradeError::TellsNothing(name));
        }
        // From here commands wait for the new process, or for us again.
        self.commands.send_replace(false);
        // Packets wait in the kernel until the new process reads them.
        let snapshot = self.shared.load_full();
        let unused_there = |place: &Place| unused.contains(place);
        for (_, quic) in snapshot.quic() {
            if !unused_there(&quic.bound.place) {
                quic.router.let_go();
            }
        }
        say(channel, &Message::Yours, &[]).await?;
        match hear_within(limit, channel).await {
            Ok(Message::Serving) => Ok(unused),
            Ok(_) => Err(UpgradeError::Unexpected),
            Err(error) => {
                // It may be about to begin: two must not serve.
                if let (UpgradeError::TooSlow(_), Some(pid)) =
                    (&error, successor.and_then(Pid::from_raw))
                {
                    kill_process(pid, Signal::KILL).ok();
                    drop(timeout(limit, hear(channel)).await);
                }
                Err(error)
            }
        }
    }

    async fn offer(&self, channel: &AsyncFd<Channel>) -> Result<(), UpgradeError> {
        let snapshot = self.shared.load_full();
        let mut parts = Vec::new();
        for bound in snapshot.sockets() {
            let mut sockets = bound.all()?.into_iter().peekable();
            while sockets.peek().is_some() {
                let some: Vec<OwnedFd> = sockets.by_ref().take(FILES_MAX).collect();
                let message = Message::Sockets {
                    place: bound.place.clone(),
                    keeper: bound.keeper,
                };
                parts.push((message, some));
            }
        }
        for (_, quic) in snapshot.quic() {
            let Succession { generation, outlet } = quic.router.hand_over()?;
            let message = Message::Succession {
                place: quic.bound.place.clone(),
                generation: generation.0,
            };
            parts.push((message, vec![outlet]));
        }
        let offer = Message::Offer {
            version: VERSION,
            state_dir: snapshot.config.state_dir.clone(),
            parts: parts.len(),
        };
        let lock = self.ground.state.share_lock()?;
        let control = self.control.try_clone()?;
        say(channel, &offer, &[lock, control]).await?;
        for (message, sockets) in parts {
            say(channel, &message, &sockets).await?;
        }
        Ok(())
    }
}

pub(super) async fn say(
    channel: &AsyncFd<Channel>,
    message: &Message,
    files: &[OwnedFd],
) -> io::Result<()> {
    channel
        .async_io(Interest::WRITABLE, |channel| channel.send(message, files))
        .await
}

async fn hear(channel: &AsyncFd<Channel>) -> Result<Message, UpgradeError> {
    let heard = channel.async_io(Interest::READABLE, Channel::receive).await;
    match heard.map_err(UpgradeError::Gone)? {
        (Message::No { why }, _) => Err(UpgradeError::Declined(why)),
        (message, _) => Ok(message),
    }
}

/// What the new process said before it closed its end while there was something to read: the kernel reports that
/// first, once, and only then gives what is there.
fn last_word(channel: &AsyncFd<Channel>) -> Option<UpgradeError> {
    let heard = channel.get_ref().receive();
    match heard.or_else(|_| channel.get_ref().receive()).ok()? {
        (Message::No { why }, _) => Some(UpgradeError::Declined(why)),
        _ => None,
    }
}

async fn hear_within(limit: Duration, channel: &AsyncFd<Channel>) -> Result<Message, UpgradeError> {
    let heard = timeout(limit, hear(channel)).await;
    heard.unwrap_or(Err(UpgradeError::TooSlow(limit)))
}

/// Writes an answer's line, and the open file beside its first byte.
async fn answer_with(
    stream: &UnixStream,
    answer: &ProcessAnswer,
    file: Option<OwnedFd>,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut files: Vec<OwnedFd> = file.into_iter().collect();
    let mut rest = &line[..];
    while !rest.is_empty() {
        let sent = stream
            .async_io(Interest::WRITABLE, || send_with_files(stream, rest, &files))
            .await?;
        files.clear();
        rest = &rest[sent..];
    }
    Ok(())
}

/// The new program, without what the supervisor meant for this process alone.
fn program(binary: &Path) -> Process {
    let mut command = Process::new(binary);
    command.stdin(Stdio::null());
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"] {
        command.env_remove(name);
    }
    command
}

/// Lets the new program look at the configuration first: it says what is wrong better than a process that ends.
async fn check(binary: &Path, file: &Path, limit: Duration) -> Result<(), UpgradeError> {
    let mut command = program(binary);
    command
        .arg("check")
        .arg("--config")
        .arg(file)
        .kill_on_drop(true);
    let output = timeout(limit, command.output()).await;
    let output = output.map_err(|_| UpgradeError::TooSlow(limit))?;
    let output = output.map_err(|source| UpgradeError::Start {
        binary: binary.to_owned(),
        source,
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("hopgate-proxy: ");
    let said = if said.is_empty() {
        output.status.to_string()
    } else {
        said.to_owned()
    };
    Err(UpgradeError::Check {
        binary: binary.to_owned(),
        said,
        status: output.status,
    })
}
