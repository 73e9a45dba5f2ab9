//! The listening end of the control socket: one JSON line in, one out, several commanders at once. Only the user
//! who runs the proxy (and root) may open the socket; whoever changes something is named in an audit line.

use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use cutover_protocol::hold::{Answer, Command, LINE_BYTES_MAX, Order, Refusal, ServiceStatus};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use super::commands::Commander;
use super::events;
use super::peer::Peer;
use super::seen::{Look, Seen};
use super::words::{ProcessAnswer, ProcessCommand, ProcessRefusal};

/// Commanders at once; the next waits in the kernel.
const COMMANDERS_MAX: usize = 64;

/// The bound socket; its file goes away with it.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: StdListener,
    path: PathBuf,
    /// Whether the file is ours: another process may have it now, or still.
    owns_file: AtomicBool,
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Somebody answers there.
    #[error("another proxy listens on the control socket {}; stop it, or give this one its own", .0.display())]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("{} is not a socket; remove it, or name another control socket", .0.display())]
    NotASocket(PathBuf),
    /// Anything the system says.
    #[error("cannot listen on the control socket {}; check its folder", .path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl ControlSocket {
    /// Binds with mode 0600. A socket file that nobody answers on is a dead proxy's, and is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, ControlError> {
        if StdStream::connect(path).is_ok() {
            return Err(ControlError::InUse(path.to_owned()));
        }
        let failed = |source| ControlError::Bind {
            path: path.to_owned(),
            source,
        };
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ControlError::NotASocket(path.to_owned()));
            }
            _ => {}
        }
        // Bound under another name and renamed once its mode is right: nobody meets it with the wrong one.
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = StdListener::bind(&fresh).map_err(failed)?;
        std::fs::set_permissions(&fresh, Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        std::fs::rename(&fresh, path).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            owns_file: AtomicBool::new(true),
        })
    }

    /// Takes over the socket of the process before this one. Its file stays that process' until we own it.
    pub(crate) fn inherit(path: &Path, socket: OwnedFd) -> Self {
        Self {
            listener: socket.into(),
            path: path.to_owned(),
            owns_file: AtomicBool::new(false),
        }
    }

    /// Removes the file at the end, or leaves it to another process.
    pub(crate) fn own_file(&self, owns: bool) {
        self.owns_file.store(owns, Ordering::Relaxed);
    }

    /// The socket, for the process that comes after this one.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.listener.try_clone()?.into())
    }

    /// Serves for ever.
    ///
    /// # Cancel safety
    /// Dropping the future drops every commander's connection; commands that took effect have done so.
    pub(crate) async fn serve(&self, commander: Rc<Commander>) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let mut commanders = JoinSet::new();
        let mut commands = commander.running.commands.subscribe();
        loop {
            // While a new process is about to take over, nobody is taken from its queue.
            if commands.wait_for(|obeys| *obeys).await.is_err() {
                return Ok(());
            }
            while commanders.try_join_next().is_some() {}
            if commanders.len() >= COMMANDERS_MAX {
                commanders.join_next().await;
            }
            let stream = tokio::select! {
                biased;
                _ = commands.wait_for(|obeys| !*obeys) => continue,
                accepted = listener.accept() => accepted?.0,
            };
            commanders.spawn_local(talk(stream, Rc::clone(&commander)));
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if *self.owns_file.get_mut() {
            // Gone already is as good.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

async fn talk(stream: UnixStream, commander: Rc<Commander>) {
    let peer = Peer::of(&stream);
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
        match (&mut stream).take(limit).read_until(b'\n', &mut line).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        let complete = line.ends_with(b"\n");
        if matches!(serde_json::from_slice(&line), Ok(ProcessCommand::Handover)) {
            peer.audit(commander.running.events(), "handover", "begun");
            // What came of it is in the log.
            commander.running.hand_over(stream.get_ref()).await;
            return;
        }
        if matches!(serde_json::from_slice(&line), Ok(Look::Watch)) {
            return watch(stream, &commander, &peer).await;
        }
        let upgrades = matches!(
            serde_json::from_slice(&line),
            Ok(ProcessCommand::Upgrade { .. })
        );
        // An upgrade ends this process; it waits for this answer.
        let _answering = match upgrades {
            true => Some(commander.running.answering.lock().await),
            false => None,
        };
        let answer = if complete {
            obey(&line, &commander, &peer).await
        } else {
            serde_json::to_vec(&bad("the line is too long, or cut off"))
        };
        let Ok(mut text) = answer else {
            return;
        };
        text.push(b'\n');
        if stream.write_all(&text).await.is_err() || !complete {
            return;
        }
    }
}

/// From here the connection carries events.
async fn watch(stream: BufReader<UnixStream>, commander: &Commander, peer: &Peer) {
    peer.audit_question("watch", "begun");
    let events = commander.running.events().watch();
    let answer = match &events {
        Some(_) => Seen::Watching,
        None => Seen::Refused {
            message: "enough watch already; end one of them".to_owned(),
        },
    };
    let Ok(mut text) = serde_json::to_vec(&answer) else {
        return;
    };
    text.push(b'\n');
    let mut stream = stream.into_inner();
    if let (Ok(()), Some(events)) = (stream.write_all(&text).await, events) {
        events::write_to(stream, events).await;
    }
}

async fn obey(line: &[u8], commander: &Commander, peer: &Peer) -> serde_json::Result<Vec<u8>> {
    if Look::is_meant_by(line) {
        return serde_json::to_vec(&look(line, commander, peer).await);
    }
    if !ProcessCommand::is_meant_by(line) {
        return serde_json::to_vec(&obey_for_service(line, commander, peer).await);
    }
    let answer = match serde_json::from_slice::<ProcessCommand>(line) {
        Ok(ProcessCommand::Process) => {
            peer.audit_question("process", "told");
            commander.execute_for_process(ProcessCommand::Process).await
        }
        Ok(command @ ProcessCommand::Ledger { .. }) => {
            peer.audit_question("ledger", "told");
            commander.execute_for_process(command).await
        }
        Ok(command) => {
            let said = serde_json::to_string(&command)?;
            let events = commander.running.events();
            peer.audit(events, &said, "begun");
            let answer = commander.execute_for_process(command).await;
            peer.audit(events, &said, &outcome_for_process(&answer));
            answer
        }
        Err(error) => ProcessAnswer::Refused {
            reason: ProcessRefusal::BadCommand,
            message: format!("not a command: {error}"),
        },
    };
    serde_json::to_vec(&answer)
}

async fn look(line: &[u8], commander: &Commander, peer: &Peer) -> Seen {
    match serde_json::from_slice::<Look>(line) {
        Ok(look) => {
            let said = serde_json::to_string(&look).unwrap_or_default();
            peer.audit_question(&said, "told");
            commander.look(look).await
        }
        Err(error) => Seen::Refused {
            message: format!("not a command: {error}"),
        },
    }
}

async fn obey_for_service(line: &[u8], commander: &Commander, peer: &Peer) -> Answer {
    let events = commander.running.events();
    let order = match serde_json::from_slice::<Order>(line) {
        Ok(order) => order,
        Err(error) => {
            let answer = bad(&format!("not a command: {error}"));
            peer.audit(events, "nothing that is understood", &outcome(&answer));
            return answer;
        }
    };
    let said = serde_json::to_string(&order).unwrap_or_default();
    if matches!(order.command, Command::Status { .. }) {
        peer.audit_question(&said, "told");
        return commander.execute(order).await;
    }
    // A hold takes its time: who began it must be known even if we die before its end.
    let takes_time = matches!(
        order.command,
        Command::Hold { .. } | Command::HoldAll { .. }
    );
    if takes_time {
        peer.audit(events, &said, "begun");
    }
    let answer = commander.execute(order).await;
    peer.audit(events, &said, &outcome(&answer));
    answer
}

fn outcome_for_process(answer: &ProcessAnswer) -> String {
    match answer {
        ProcessAnswer::Refused { message, .. } => format!("refused: {message}"),
        _ => "done".to_owned(),
    }
}

fn outcome(answer: &Answer) -> String {
    match answer {
        Answer::Status { .. } => "status".to_owned(),
        Answer::Done { service } => format!("done, epoch {}", service.register.epoch),
        Answer::NotDrained { service, .. } => {
            format!("not drained, {} in flight", service.in_flight)
        }
        Answer::Refused { message, .. } => format!("refused: {message}"),
        Answer::DoneAll { services } => {
            let epochs = services.iter().map(|status| {
                let ServiceStatus {
                    service, register, ..
                } = status;
                format!("{service} at epoch {}", register.epoch)
            });
            format!("done, {}", epochs.collect::<Vec<_>>().join(", "))
        }
        Answer::RefusedAll {
            service, message, ..
        } => format!("refused for {service}: {message}"),
    }
}

fn bad(message: &str) -> Answer {
    Answer::Refused {
        reason: Refusal::BadCommand,
        message: message.to_owned(),
        register: None,
    }
}
