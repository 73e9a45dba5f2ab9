//! The proxy is changed while clients ask without a pause: no request may fail, and a reload may not cost anybody a
//! connection.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use super::load::Load;
use super::stage::{Service, Stage};
use super::{differs, same};
use crate::command::Shell;
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};

/// Clients of each manner.
const CLIENTS: usize = 4;
/// From one change to the next, in seconds.
const PAUSE_S: u64 = 1;

/// A service that every other configuration has.
const MORE: &str = "\n[[service]]\nname = \"more\"\nprotocol = \"http\"\nlisten = \"127.0.0.1:0\"\n\
                    source = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:1\"\n";

pub(super) fn reloads(stage: &mut Stage) -> Result<()> {
    let path = stage.folder.join("proxy.toml");
    let first = fs::read_to_string(&path).on("read", &path)?;
    let reload = control(&stage.folder, "reload");
    let load = load(stage);
    for number in 0..stage.times.reloads {
        let more = if number % 2 == 0 { MORE } else { "" };
        let changed = format!("{first}{more}\n[limits]\nretry_after_s = {}\n", number + 1);
        fs::write(&path, changed).on("write", &path)?;
        reload.run()?;
        stage.lives()?;
        pause(&load)?;
    }
    fs::write(&path, format!("{first}\n[nonsense]\n")).on("write", &path)?;
    let refused = reload.end()?;
    if refused.code == Some(0) || !refused.err.contains("nonsense") {
        return Err(differs(
            "a reload of nonsense",
            "a refusal that names it",
            &format!("{refused:?}"),
        ));
    }
    fs::write(&path, &first).on("write", &path)?;
    reload.run()?;
    let (keeps, renews) = load.finish()?;
    let connections = keeps.connections.to_string();
    same(
        "connections of the clients that keep theirs",
        &CLIENTS.to_string(),
        &connections,
    )?;
    let answered = keeps.answered + renews.answered;
    stage.progress.say(format!(
        "  {} reloads, {answered} requests answered, none failed, no connection lost",
        stage.times.reloads
    ));
    Ok(())
}

fn load(stage: &Stage) -> Load {
    Load::start(
        SocketAddr::from((Ipv4Addr::LOCALHOST, stage.clear(Service::Fast))),
        CLIENTS,
    )
}

fn control(folder: &Path, verb: &str) -> Shell {
    Shell::new(folder.join("hopgate-proxy"))
        .args(["ctl", "--socket"])
        .arg(folder.join("control.sock"))
        .arg(verb)
}

/// Waits, unless a client has failed or the lab is interrupted.
fn pause(load: &Load) -> Result<()> {
    interrupt::wait_until(Duration::from_secs(PAUSE_S), || load.has_failed());
    if interrupt::requested() {
        return Err(LabError::Interrupted);
    }
    Ok(())
}
