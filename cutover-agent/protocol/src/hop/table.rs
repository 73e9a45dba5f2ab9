//! Every situation of a hop times every event, compared with the tables in `docs/hop.md`.
//!
//! The page's table and graph are written by this test, never by hand: `UPDATE_SNAPSHOT=1 cargo test -p
//! cutover-protocol` rewrites them. A change of the machine is thus a change of the page, for a reviewer to read.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

use super::*;

const EPOCH: Epoch = Epoch(7);

const UPDATE: &str = "UPDATE_SNAPSHOT=1 cargo test -p cutover-protocol";

/// A machine and how a reader calls the place where it stands.
struct Situation {
    name: String,
    hop: Hop,
}

/// An event and how a reader calls it.
struct Happening {
    name: String,
    event: Event,
}

/// What one event does in one situation.
struct Cell {
    from: Phase,
    situation: String,
    happening: String,
    result: Result<(Step, Phase), StepError>,
}

fn done(action: ActionName) -> Event {
    Event::Done { action }
}

fn failed(action: ActionName) -> Event {
    Event::Failed {
        action,
        failure: Failure::new("a test"),
    }
}

fn register(epoch: Epoch, owner: Site) -> Register {
    Register { epoch, owner }
}

fn round(pages: u64) -> Event {
    Event::PreCopied {
        round: Round {
            pages,
            bytes: pages * 4096,
            seconds: 1.0,
            resident_bytes: 0,
        },
    }
}

fn measured() -> Event {
    Event::Measured {
        link: Link {
            rtt_ms: 20.0,
            bytes_per_second: 1e8,
        },
    }
}

fn hop_after(events: &[Event]) -> Hop {
    let mut hop = Hop::new(Bounds {
        rounds_max: 2,
        stall_ms_max: 2000,
        throttle_percent_max: 0,
        costs: Costs::default(),
    });
    for event in events {
        hop.step(event.clone()).unwrap();
    }
    hop
}

/// The events of a hop in which everything goes well, from its begin to its end.
fn straight() -> Vec<Event> {
    vec![
        Event::Begun { epoch: EPOCH },
        done(ActionName::Preflight),
        measured(),
        done(ActionName::SyncFiles),
        round(1000),
        round(100),
        done(ActionName::Hold),
        done(ActionName::Checkpoint),
        done(ActionName::Transfer),
        done(ActionName::Restore),
        done(ActionName::Verify),
        Event::Committed {
            register: register(EPOCH.next(), Site::Target),
        },
        done(ActionName::Redirect),
    ]
}

/// The first `count` events of [`straight`], and these.
fn then(count: usize, more: &[Event]) -> Hop {
    let mut events = straight();
    events.truncate(count);
    events.extend_from_slice(more);
    hop_after(&events)
}

fn situation(name: &str, hop: Hop) -> Situation {
    Situation {
        name: name.to_owned(),
        hop,
    }
}

/// Every phase, and every variant of a phase in which an event does something else.
fn situations() -> Vec<Situation> {
    let source_won = Event::Settled {
        register: register(EPOCH.next(), Site::Source),
    };
    let mut all: Vec<Situation> = (0..straight().len())
        .map(|count| then(count, &[]))
        .map(|hop| situation(&hop.phase().to_string(), hop))
        .collect();
    all[4].name = "PreCopy, round 1".to_owned();
    all[5].name = "PreCopy, the last round".to_owned();
    all.insert(
        11,
        situation("Verify, abort asked", then(10, &[Event::AbortAsked])),
    );
    let unwound = [failed(ActionName::Verify), source_won];
    all.extend([
        situation(
            "Settle, before the commit",
            then(10, &[failed(ActionName::Verify)]),
        ),
        situation(
            "Settle, after the commit was asked",
            then(11, &[failed(ActionName::Commit)]),
        ),
    ]);
    let mut hop = then(10, &unwound);
    while hop.phase() == Phase::Unwind {
        let name = format!("Unwind, {} on top", hop.undos.last().unwrap());
        all.push(situation(&name, hop.clone()));
        hop.step(done(ActionName::Undo)).unwrap();
    }
    all.push(situation("Undone", hop));
    all.push(situation("Done", then(straight().len(), &[])));
    all
}

fn happening(name: &str, event: Event) -> Happening {
    Happening {
        name: name.to_owned(),
        event,
    }
}

/// Every event, with every action and with every register it can name.
fn happenings() -> Vec<Happening> {
    let mut all = vec![happening("Begun", Event::Begun { epoch: EPOCH })];
    for action in ActionName::ALL {
        all.push(happening(&format!("Done({action})"), done(action)));
        all.push(happening(&format!("Failed({action})"), failed(action)));
    }
    all.push(happening("Measured", measured()));
    all.push(happening("PreCopied", round(10)));
    let answers = [
        ("target won", register(EPOCH.next(), Site::Target)),
        ("source won", register(EPOCH.next(), Site::Source)),
        ("undecided", register(EPOCH, Site::Source)),
    ];
    for (words, register) in answers {
        all.push(happening(
            &format!("Committed({words})"),
            Event::Committed { register },
        ));
        all.push(happening(
            &format!("Settled({words})"),
            Event::Settled { register },
        ));
    }
    all.push(happening("AbortAsked", Event::AbortAsked));
    all.push(happening("Restarted", Event::Restarted));
    all
}

fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for situation in situations() {
        for happening in happenings() {
            let mut hop = situation.hop.clone();
            let step = hop.step(happening.event);
            cells.push(Cell {
                from: situation.hop.phase(),
                situation: situation.name.clone(),
                happening: happening.name,
                result: step.map(|step| (step, hop.phase())),
            });
        }
    }
    cells
}

fn words(step: &Step) -> String {
    match step {
        Step::Act(Action::PreCopy { round }) => format!("PreCopy, round {round}"),
        Step::Act(Action::Undo(undo)) => format!("undo: {undo}"),
        Step::Act(action) => action.name().to_string(),
        Step::Nothing => "nothing".to_owned(),
        Step::Over(ending) => format!("over: {ending:?}"),
    }
}

/// One row an event that does something; the rest of each situation in one row.
fn table() -> String {
    let mut text =
        "| where the hop stands | event | next action | next phase |\n|---|---|---|---|\n"
            .to_owned();
    let cells = cells();
    for group in cells.chunk_by(|one, other| one.situation == other.situation) {
        let mut refused = 0;
        for cell in group {
            match &cell.result {
                Ok((step, phase)) => writeln!(
                    text,
                    "| {} | {} | {} | {phase} |",
                    cell.situation,
                    cell.happening,
                    words(step)
                )
                .unwrap(),
                Err(_) => refused += 1,
            }
        }
        writeln!(
            text,
            "| {} | *the {refused} others* | unexpected | |",
            group[0].situation
        )
        .unwrap();
    }
    text
}

/// The graph of the phases: one arrow a pair, labelled with the events that lead along it.
fn graph() -> String {
    let mut arrows: BTreeMap<(usize, usize), Vec<String>> = BTreeMap::new();
    let place = |phase| Phase::ALL.iter().position(|one| *one == phase).unwrap();
    for cell in cells() {
        if let Ok((Step::Act(_) | Step::Over(_), to)) = cell.result {
            if cell.from.is_over() {
                continue;
            }
            let label = match cell.happening.split_once('(') {
                Some((name @ ("Committed" | "Settled"), words)) => {
                    format!("{name}: {}", words.trim_end_matches(')'))
                }
                Some((name, _)) => name.to_owned(),
                None => cell.happening,
            };
            let labels = arrows.entry((place(cell.from), place(to))).or_default();
            if !labels.contains(&label) {
                labels.push(label);
            }
        }
    }
    let mut text = "```mermaid\nstateDiagram-v2\n    [*] --> Plan\n".to_owned();
    for ((from, to), labels) in arrows {
        let (from, to) = (Phase::ALL[from], Phase::ALL[to]);
        // A colon ends a label's target in this notation, so labels carry none.
        let labels = labels.join(", ").replace(": ", " – ");
        writeln!(text, "    {from} --> {to}: {labels}").unwrap();
    }
    text.push_str("    Done --> [*]\n    Undone --> [*]\n```\n");
    text
}

fn event_list() -> String {
    let names: Vec<String> = happenings()
        .into_iter()
        .map(|happening| happening.name)
        .collect();
    format!("{} events: {}.\n", names.len(), names.join(", "))
}

fn page_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/hop.md")
}

/// Replaces what stands between the markers of one region.
fn with_region(page: &str, region: &str, content: &str) -> String {
    let begin = format!("<!-- generated: {region} -->\n");
    let end = format!("<!-- end of generated: {region} -->");
    let (before, rest) = page
        .split_once(&begin)
        .unwrap_or_else(|| panic!("docs/hop.md has lost its line {begin:?}"));
    let (_, after) = rest
        .split_once(&end)
        .unwrap_or_else(|| panic!("docs/hop.md has lost its line {end:?}"));
    format!("{before}{begin}{content}{end}{after}")
}

#[test]
fn the_page_about_the_hop_says_what_the_machine_does() {
    let path = page_path();
    let page = fs::read_to_string(&path).unwrap();
    let mut wanted = page.clone();
    for (region, content) in [
        ("graph", graph()),
        ("events", event_list()),
        ("table", table()),
    ] {
        wanted = with_region(&wanted, region, &content);
    }
    if env::var_os("UPDATE_SNAPSHOT").is_some() {
        fs::write(&path, &wanted).unwrap();
        return;
    }
    let difference = page
        .lines()
        .zip(wanted.lines())
        .enumerate()
        .find(|(_, (is, should))| is != should);
    assert!(
        page == wanted,
        "docs/hop.md no longer says what the machine does; run `{UPDATE}`, read the difference, commit it.\n\
         First difference (line counted from 0, page, machine): {difference:?}"
    );
}

#[test]
fn the_table_has_every_phase_and_every_undo() {
    let situations = situations();
    for phase in Phase::ALL {
        assert!(
            situations
                .iter()
                .any(|situation| situation.hop.phase() == phase),
            "{phase}"
        );
    }
    for undo in Undo::ALL {
        assert!(
            situations
                .iter()
                .any(|situation| situation.hop.phase() == Phase::Unwind
                    && situation.hop.undos.last() == Some(&undo)),
            "{undo}"
        );
    }
}

#[test]
fn an_event_that_does_not_belong_changes_nothing() {
    for situation in situations() {
        for happening in happenings() {
            let mut hop = situation.hop.clone();
            if let Err(error) = hop.step(happening.event) {
                assert_eq!(hop, situation.hop, "{} {}", situation.name, happening.name);
                assert_eq!(error.phase, hop.phase());
            }
        }
    }
}

#[test]
fn an_abort_asked_before_the_commit_is_kept_as_soon_as_the_action_ends() {
    for (count, event) in straight().into_iter().enumerate().skip(1) {
        let mut hop = then(count, &[]);
        let asked = hop.step(Event::AbortAsked);
        if !hop.phase().is_before_commit() {
            assert!(asked.is_err(), "{}", hop.phase());
            continue;
        }
        assert_eq!(asked, Ok(Step::Nothing));
        // Rounds are cheap to end, and end with the phase.
        while hop.phase().is_before_commit() {
            let before = hop.phase();
            hop.step(event.clone()).unwrap();
            assert!(
                hop.phase() != before || before == Phase::PreCopy,
                "{before}"
            );
        }
        let is_undone = matches!(hop.phase(), Phase::Settle | Phase::Unwind | Phase::Undone);
        assert!(is_undone, "{event:?} leads to {}", hop.phase());
        assert_eq!(hop.failure(), Some(&Failure::aborted()));
    }
}

#[test]
fn only_what_the_source_can_do_without_is_ever_owed() {
    for situation in situations() {
        if situation.hop.phase() != Phase::Unwind {
            continue;
        }
        let mut hop = situation.hop;
        let undo = *hop.undos.last().unwrap();
        for _ in 0..100 {
            let step = hop.step(failed(ActionName::Undo)).unwrap();
            if undo.is_worth_waiting_for() {
                assert_eq!(step, Step::Act(Action::Undo(undo)));
            } else {
                assert_ne!(step, Step::Act(Action::Undo(undo)));
                break;
            }
        }
        assert_eq!(hop.owed().contains(&undo), !undo.is_worth_waiting_for());
    }
}

#[test]
fn a_success_that_is_told_twice_is_taken_once() {
    for (count, event) in straight().iter().enumerate() {
        // What carries an answer has no repetition: each is journalled once, and a fold replays it once.
        if matches!(event, Event::Done { .. }) {
            let mut hop = then(count + 1, &[]);
            let before = hop.clone();
            assert_eq!(hop.step(event.clone()), Ok(Step::Nothing), "{event:?}");
            assert_eq!(hop, before, "{event:?}");
        }
    }
}

#[test]
fn once_the_target_owns_the_service_nothing_leads_back() {
    for cell in cells() {
        if let Ok((_, to)) = cell.result {
            let allowed: &[Phase] = match cell.from {
                Phase::Redirect | Phase::Done => &[Phase::Redirect, Phase::Done],
                Phase::Unwind | Phase::Undone => &[Phase::Unwind, Phase::Undone],
                _ => continue,
            };
            assert!(
                allowed.contains(&to),
                "{} {} leads to {to}",
                cell.situation,
                cell.happening
            );
        }
    }
}

#[test]
fn nothing_held_is_undone_before_the_register_has_answered() {
    for cell in cells() {
        if cell.from.is_holding()
            && !matches!(cell.from, Phase::Settle | Phase::Commit | Phase::Unwind)
            && let Ok((_, to)) = cell.result
        {
            assert_ne!(to, Phase::Unwind, "{} {}", cell.situation, cell.happening);
        }
    }
}
