//! Clients that leave while they are held: their places must be free within a second, and nothing of theirs may ever
//! reach an origin.

use std::time::{Duration, Instant};

use crate::bench::hold::judge::{Evidence, judge};
use crate::bench::hold::plan::{Kind, Request};
use crate::bench::hold::report::{Mark, Played, Row};
use crate::bench::hold::run::in_order;
use crate::bench::hold::scene::{Scene, executions, group, release};
use crate::bench::hold::stage::{Knobs, Stage};
use crate::interrupt;
use crate::lab::error::{LabError, Result};

/// Within so many seconds everybody who left must be gone from the queue.
const SLOTS_BACK_S: f64 = 1.0;
/// After so many the lab stops waiting.
const WAIT_S: u64 = 45;

/// What one kind of leavers showed.
struct Left {
    kind: Kind,
    requests: Vec<Request>,
    slots_back: Option<Duration>,
    gave_up: u64,
}

/// Plays it with each protocol in turn, in one hold.
///
/// # Errors
/// When something of the lab fails or is interrupted, or the proxy ends or refuses a command.
pub fn play(scene: &Scene<'_>) -> Result<Played> {
    let name = scene.case.name;
    let mut stage = Stage::start(name, scene.place, in_order(), Knobs::default())?;
    let mut others = scene.prime(&mut stage)?;
    stage.control.hold()?;
    let mut left = Vec::new();
    for kind in Kind::ALL {
        left.push(leave(scene, &mut stage, kind)?);
    }
    scene.pause(scene.freeze)?;
    let released = release(&stage)?;
    // Whoever comes now finds the gate open, and the queue empty.
    others.extend(scene.prime(&mut stage)?);
    stage.lives()?;
    let executions = executions(&stage)?;
    let mut played = Played::default();
    for left in left {
        let tally = judge(&Evidence {
            requests: &[left.requests.as_slice(), others.as_slice()].concat(),
            executions: &executions,
            released: Some(released),
            window: Knobs::default().window_max,
        });
        let executed = left
            .requests
            .iter()
            .filter(|request| {
                executions
                    .iter()
                    .any(|execution| execution.id == request.id)
            })
            .count();
        let seconds = left.slots_back.map(|time| time.as_secs_f64());
        let case = format!("{name}-{}", left.kind.as_str());
        let row = Row {
            sent: left.requests.len(),
            answered: 0,
            held: None,
            slots_back_seconds: seconds,
            unknown: executed,
            ..Row::of("hopgate", &case, scene.clients, &tally)
        };
        let what = format!("{}: slots back", left.kind.as_str());
        played
            .marks
            .push(Mark::at_most(&what, seconds, SLOTS_BACK_S, "s"));
        played.marks.push(Mark::new(
            format!(
                "{}: none executed ({executed}), each counted as given up ({} of {})",
                left.kind.as_str(),
                left.gave_up,
                row.sent
            ),
            executed == 0 && left.gave_up == row.sent as u64,
        ));
        played.rows.push(row);
    }
    Ok(played)
}

fn gave_up(stage: &Stage) -> Result<u64> {
    let services = stage.control.status()?;
    Ok(services.iter().map(|service| service.gave_up).sum())
}

fn leave(scene: &Scene<'_>, stage: &mut Stage, kind: Kind) -> Result<Left> {
    scene.now(kind.as_str());
    let before = gave_up(stage)?;
    let mut crowd = stage.crowd(&[group(stage, kind, scene.clients)], 1)?;
    crowd.run("connect", scene.patience())?;
    crowd.run("send", scene.patience())?;
    if !scene.until_held(stage, scene.clients)? {
        return Err(LabError::Differs {
            what: format!("not all {} clients were held", kind.as_str()),
        });
    }
    let began = Instant::now();
    crowd.tell("leave")?;
    let mut slots_back = None;
    while slots_back.is_none() && began.elapsed() < Duration::from_secs(WAIT_S) {
        if stage.control.held_now()? == 0 {
            slots_back = Some(began.elapsed());
        } else if interrupt::requested() {
            return Err(LabError::Interrupted);
        }
    }
    crowd.heard(scene.patience())?;
    let requests = crowd.report(scene.patience())?.requests;
    Ok(Left {
        kind,
        requests,
        slots_back,
        gave_up: gave_up(stage)? - before,
    })
}
