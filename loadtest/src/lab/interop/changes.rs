//! The proxy is changed while clients ask without a pause: no request may fail, and a reload may not cost anybody a
//! connection.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::load::Load;
use super::stage::{Service, Stage};
use super::{differs, same};
use crate::interrupt;
use crate::lab::error::{LabError, OnFile, Result};

/// Clients of each manner.
const CLIENTS: usize = 4;
/// From one change to the next, in seconds.
const PAUSE_S: u64 = 1;

/// Longest an upgrade may take, and after it the end of the process before, in seconds.
const OVER_S: u64 = 60;

/// A service that every other configuration has.
const MORE: &str = "\n[[service]]\nname = \"more\"\nprotocol = \"http\"\nlisten = \"127.0.0.1:0\"\n\
                    source = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:1\"\n";

pub(super) fn reloads(stage: &mut Stage) -> Result<()> {
    let path = stage.folder.join("proxy.toml");
    let first = fs::read_to_string(&path).on("read", &path)?;
    let reload = stage.control("reload");
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

pub(super) fn upgrades(stage: &mut Stage) -> Result<()> {
    let upgrade = stage.control("upgrade").within(Duration::from_secs(OVER_S));
    let load = load(stage);
    for _ in 0..stage.times.upgrades {
        let said = upgrade.run()?;
        let pid = said
            .strip_prefix("upgraded: process ")
            .and_then(|rest| rest.split(' ').next()?.parse().ok());
        let pid = pid.ok_or_else(|| differs("an upgrade", "upgraded: process ...", &said))?;
        stage.successor.0 = Some(pid);
        // The next one is refused until the process before has finished what it began.
        let status = stage.control("status");
        let mut said = String::new();
        let over = interrupt::wait_until(Duration::from_secs(OVER_S), || {
            said = status.run().unwrap_or_default();
            !said.is_empty() && !said.contains("still finishes")
        });
        if !over {
            return Err(differs("the process before", "its end", &said));
        }
        pause(&load)?;
    }
    let (keeps, renews) = load.finish()?;
    let answered = keeps.answered + renews.answered;
    stage.progress.say(format!(
        "  {} upgrades, {answered} requests answered, none failed",
        stage.times.upgrades
    ));
    Ok(())
}

fn load(stage: &Stage) -> Load {
    Load::start(
        SocketAddr::from((Ipv4Addr::LOCALHOST, stage.clear(Service::Fast))),
        CLIENTS,
    )
}

/// Waits, unless a client has failed or the lab is interrupted.
fn pause(load: &Load) -> Result<()> {
    interrupt::wait_until(Duration::from_secs(PAUSE_S), || load.has_failed());
    if interrupt::requested() {
        return Err(LabError::Interrupted);
    }
    Ok(())
}
