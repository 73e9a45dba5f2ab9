//! The part of the test command that holds a few hundred clients of every protocol for a second, with origins that do
//! right and with origins that do wrong. It judges no time and no order: it must prove the same on a busy machine.

use std::path::PathBuf;

use crate::bench::hold::origin::Spoil;
use crate::bench::hold::report::Row;
use crate::bench::hold::run::short;
use crate::lab::folders::Folders;
use crate::progress::Progress;

const EXACT: &str = "requests of every protocol that are held are executed exactly once";
const CAN_FAIL: &str = "an origin that loses or doubles a held request turns the verdict red";

/// Whether a test passed, and otherwise why not.
type Outcome = Result<(), String>;

/// Plays the wanted ones, and hands each outcome to `count`.
pub fn run(
    hopgate: Option<&PathBuf>,
    wanted: impl Fn(&str) -> bool,
    folders: &Folders,
    progress: &Progress,
    mut count: impl FnMut(&str, Outcome),
) {
    let play = |spoil| play(spoil, hopgate, folders, progress);
    if wanted(EXACT) {
        progress.say(format!("end to end: {EXACT}"));
        count(EXACT, exact(play));
    }
    if wanted(CAN_FAIL) {
        progress.say(format!("end to end: {CAN_FAIL}"));
        count(CAN_FAIL, can_fail(play));
    }
}

fn play(
    spoil: Spoil,
    hopgate: Option<&PathBuf>,
    folders: &Folders,
    progress: &Progress,
) -> Result<Row, String> {
    let played = short(spoil, hopgate, folders, progress).map_err(|error| error.to_string())?;
    let row = played.rows.into_iter().next().ok_or("no row")?;
    progress.say(format!(
        "  sent {} · held {} · answered {} · lost {} · doubled {} · failed {} {}",
        row.sent,
        row.held.unwrap_or(0),
        row.answered,
        row.lost,
        row.doubled,
        row.failed,
        played.faults.join("; ")
    ));
    Ok(row)
}

fn exact(play: impl Fn(Spoil) -> Result<Row, String>) -> Outcome {
    let row = play(Spoil::Nothing)?;
    if row.is_exact() && row.held.is_some_and(|held| held >= row.clients) {
        Ok(())
    } else {
        Err(format!("{row:?}"))
    }
}

fn can_fail(play: impl Fn(Spoil) -> Result<Row, String>) -> Outcome {
    let (losing, doubling) = (play(Spoil::Lose)?, play(Spoil::Double)?);
    let is_red = !losing.is_exact() && !doubling.is_exact();
    let names_it = losing.lost > 0 && losing.doubled == 0 && doubling.doubled > 0;
    if is_red && names_it {
        Ok(())
    } else {
        Err(format!("{losing:?} {doubling:?}"))
    }
}
