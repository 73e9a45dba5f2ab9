//! Clients that wait for longer than most timeouts around us: some with a request that is held, some without any. After
//! the release the former have their answers, and the latter ask on the very connection they had.

use crate::bench::hold::judge::{Evidence, judge};
use crate::bench::hold::plan::{First, Group, Kind};
use crate::bench::hold::report::{Mark, Played, Row};
use crate::bench::hold::run::in_order;
use crate::bench::hold::scene::{Scene, executions, group, release};
use crate::bench::hold::stage::{Knobs, Stage};
use crate::lab::error::Result;

/// The proxy's own default: whoever is idle for so long would have to go, were the service not held.
const CLIENT_IDLE_MS_MAX: u64 = 60_000;

/// Plays it: half of the clients HTTP/2, half HTTP/3.
///
/// # Errors
/// When something of the lab fails or is interrupted, or the proxy ends or refuses a command.
pub fn play(scene: &Scene<'_>) -> Result<Played> {
    let knobs = Knobs {
        client_idle_ms_max: CLIENT_IDLE_MS_MAX,
        ..Knobs::default()
    };
    let mut stage = Stage::start(scene.case.name, scene.place, in_order(), knobs)?;
    let quarter = (scene.clients / 4).max(1);
    let mut played = Played::default();
    let groups = [Kind::H2, Kind::H3].map(|kind| Group {
        first: First::Ask,
        ..group(&stage, kind, quarter)
    });
    let mut crowds = Vec::new();
    for group in groups {
        for is_held in [true, false] {
            let mut crowd = stage.crowd(&[group], 1)?;
            crowd.run("connect", scene.patience())?;
            crowds.push((group.kind, is_held, crowd));
        }
    }
    stage.control.hold()?;
    for (_, _, crowd) in crowds.iter_mut().filter(|(_, is_held, _)| *is_held) {
        crowd.run("send", scene.patience())?;
    }
    scene.until_held(&stage, 2 * quarter)?;
    scene.now("standing still");
    scene.pause(scene.freeze)?;
    let released = release(&stage)?;
    for (_, is_held, crowd) in &mut crowds {
        if !*is_held {
            crowd.run("send", scene.patience())?;
        }
        crowd.run("settle", scene.patience())?;
    }
    stage.lives()?;
    let executions = executions(&stage)?;
    let mut all = Vec::new();
    for (kind, is_held, crowd) in &mut crowds {
        let told = crowd.report(scene.patience())?;
        played.faults.extend(told.faults);
        all.push((*kind, *is_held, told.requests));
    }
    for (kind, is_held, requests) in all {
        let ids: std::collections::HashSet<u64> =
            requests.iter().map(|request| request.id).collect();
        let own = executions
            .iter()
            .filter(|execution| ids.contains(&execution.id));
        let tally = judge(&Evidence {
            requests: &requests,
            executions: &own.copied().collect::<Vec<_>>(),
            released: Some(released),
            window: Knobs::default().window_max,
        });
        let word = if is_held { "held" } else { "idle" };
        let case = format!("{}-{}-{word}", scene.case.name, kind.as_str());
        let row = Row::of("hopgate", &case, quarter, &tally);
        let demand = format!(
            "{} clients, {word} for {:.0} s, survive",
            kind.as_str(),
            scene.freeze.as_secs_f64()
        );
        played.marks.push(Mark::new(demand, row.is_exact()));
        played.rows.push(row);
    }
    Ok(played)
}
