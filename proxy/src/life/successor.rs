//! The new process of an upgrade: takes everything over from the one that runs, and begins when that says so.
//!
//! Until the word `Yours` it touches nothing that the old one relies on: it may fail, or be killed, at any moment,
//! and the old one goes on. It never serves while it does not hold the lock of the state folder.

use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cutover_protocol::id::ServiceName;

use super::channel::{Channel, Message, VERSION, receive_with_files};
use super::inherited::Inherited;
use crate::config::Config;
use crate::control::words::{ProcessAnswer, ProcessCommand};
use crate::listen::bound::Place;
use crate::listen::quic::connection_id::Generation;
use crate::listen::quic::router::Succession;

/// Longest answer of the old process to our first word, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Why nothing was taken over. The old process goes on in every case.
#[derive(Debug, thiserror::Error)]
pub enum SuccessionError {
    /// Nobody to take over from.
    #[error("no proxy to take over from answers on {}; start without --upgrade if none runs", .path.display())]
    Nobody {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The old process does not want it now.
    #[error("the running proxy does not hand over: {0}")]
    Refused(String),
    /// The old process keeps its registers elsewhere.
    #[error("the running proxy has its state_dir at {}, this configuration at {}; an upgrade cannot move it", .theirs.display(), .ours.display())]
    OtherState {
        /// The old process' folder.
        theirs: PathBuf,
        /// That of the new configuration.
        ours: PathBuf,
    },
    /// The old process is gone, slow, or of another kind.
    #[error("the running proxy did not hand over as expected; its log says more")]
    Broken(#[source] io::Error),
    /// Something that makes no sense at this point.
    #[error("the running proxy said something unexpected; are the versions too far apart?")]
    Unexpected,
}

/// What the old process has handed over.
#[derive(Debug)]
pub(crate) struct Estate {
    pub(crate) predecessor: Predecessor,
    pub(crate) lock: OwnedFd,
    pub(crate) control: OwnedFd,
    pub(crate) inherited: Inherited,
}

/// The way back to the old process.
#[derive(Debug)]
pub(crate) struct Predecessor {
    pub(crate) channel: Channel,
    /// Its number for the kernel.
    pub(crate) pid: Option<i32>,
}

/// Asks the proxy that listens on this configuration's control socket for everything it has.
pub(crate) fn ask(config: &Config, limit: Duration) -> Result<Estate, SuccessionError> {
    let (channel, pid) = open_channel(&config.control, limit)?;
    channel.set_limit(limit).map_err(SuccessionError::Broken)?;
    let (theirs, parts, lock, control) = match receive(&channel)? {
        (
            Message::Offer {
                version: VERSION,
                state_dir,
                parts,
            },
            files,
        ) => {
            let [lock, control] =
                <[OwnedFd; 2]>::try_from(files).map_err(|_| SuccessionError::Unexpected)?;
            (state_dir, parts, lock, control)
        }
        _ => return Err(SuccessionError::Unexpected),
    };
    let mut inherited = Inherited::default();
    for _ in 0..parts {
        match receive(&channel)? {
            (Message::Sockets { place, keeper }, files) => {
                for socket in files {
                    inherited.add(place.clone(), keeper, socket);
                }
            }
            (Message::Succession { place, generation }, mut files) => {
                let outlet = files.pop().ok_or(SuccessionError::Unexpected)?;
                let generation = Generation(generation);
                inherited.add_succession(place, Succession { generation, outlet });
            }
            _ => return Err(SuccessionError::Unexpected),
        }
    }
    // Only now: while it still speaks, the old process would meet a closed channel instead of our word.
    if theirs != config.state_dir {
        let ours = config.state_dir.clone();
        let error = SuccessionError::OtherState { theirs, ours };
        decline(&channel, &error.to_string());
        return Err(error);
    }
    Ok(Estate {
        predecessor: Predecessor { channel, pid },
        lock,
        control,
        inherited,
    })
}

/// The answer's line comes with one end of the channel.
fn open_channel(path: &Path, limit: Duration) -> Result<(Channel, Option<i32>), SuccessionError> {
    let nobody = |source| SuccessionError::Nobody {
        path: path.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(nobody)?;
    let broken = SuccessionError::Broken;
    stream.set_read_timeout(Some(limit)).map_err(broken)?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok();
    let pid = peer.map(|peer| peer.pid.as_raw_nonzero().get());
    let mut line =
        serde_json::to_vec(&ProcessCommand::Handover).map_err(|error| broken(error.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(broken)?;
    let (mut answer, mut files) = (Vec::new(), Vec::new());
    while !answer.ends_with(b"\n") && answer.len() < ANSWER_BYTES_MAX {
        let mut room = [0; 4096];
        let (count, given) = receive_with_files(&stream, &mut room).map_err(broken)?;
        if count == 0 {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        answer.extend_from_slice(&room[..count]);
        files.extend(given);
    }
    match serde_json::from_slice(&answer) {
        Ok(ProcessAnswer::HandingOver) => files
            .pop()
            .map(|end| (Channel::from(end), pid))
            .ok_or(SuccessionError::Unexpected),
        Ok(ProcessAnswer::Refused { message, .. }) => Err(SuccessionError::Refused(message)),
        Ok(_) => Err(SuccessionError::Unexpected),
        // A proxy from before there were upgrades does not know the word.
        Err(_) => Err(SuccessionError::Refused(
            String::from_utf8_lossy(&answer).trim_end().to_owned(),
        )),
    }
}

fn receive(channel: &Channel) -> Result<(Message, Vec<OwnedFd>), SuccessionError> {
    match channel.receive() {
        Ok((Message::No { why }, _)) => Err(SuccessionError::Refused(why)),
        received => received.map_err(SuccessionError::Broken),
    }
}

/// Tells the old process why it goes on.
pub(crate) fn decline(channel: &Channel, why: &str) {
    // Gone is told as well by the closed channel.
    let why = why.to_owned();
    channel.send(&Message::No { why }, &[]).ok();
}

impl Predecessor {
    /// Everything is made: asks to begin, and waits for the word. It is told of the `gates` from then on.
    pub(crate) fn wait_for_our_turn(
        &self,
        unused: Vec<Place>,
        gates: Vec<ServiceName>,
    ) -> Result<(), SuccessionError> {
        self.say(&Message::Ready { unused, gates })?;
        match receive(&self.channel)? {
            (Message::Yours, _) => Ok(()),
            _ => Err(SuccessionError::Unexpected),
        }
    }

    /// Clients are being accepted; waits until the supervisor knows who we are.
    pub(crate) fn say_serving(&self) -> Result<(), SuccessionError> {
        self.say(&Message::Serving)?;
        match receive(&self.channel)? {
            (Message::Farewell, _) => Ok(()),
            _ => Err(SuccessionError::Unexpected),
        }
    }

    fn say(&self, message: &Message) -> Result<(), SuccessionError> {
        self.channel
            .send(message, &[])
            .map_err(SuccessionError::Broken)
    }
}
