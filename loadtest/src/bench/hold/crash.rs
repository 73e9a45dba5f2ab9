//! The proxy is killed while it holds, at random moments, and started again by a supervisor that keeps its listening
//! sockets, as systemd does. It must come back holding at the same epoch; who was held loses the connection, but was
//! never executed; who comes meanwhile waits, and is refused by nobody.

use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use cutover_protocol::hold::Gate;
use cutover_protocol::id::Register;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use crate::bench::hold::clock::now_ns;
use crate::bench::hold::judge::{Evidence, judge};
use crate::bench::hold::plan::{Group, Kind, Outcome, Request};
use crate::bench::hold::report::{Mark, Played, Row};
use crate::bench::hold::run::in_order;
use crate::bench::hold::scene::{Scene, executions, group};
use crate::bench::hold::stage::{Backdrop, Knobs, Listens, Place, Stage};
use crate::command::Shell;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::process::Process;

/// Longest a new process may take until it answers, in seconds.
const READY_S: u64 = 30;
/// The first file number that the proxy's sockets have while they are handed over: far from those that are in use.
const PASSED_FROM: i32 = 100;
/// Who is held when the proxy dies, and who comes while it is away. QUIC is left out: its connections live in the
/// process, and end with it whatever becomes of the socket.
const KINDS: [Kind; 5] = [Kind::Clear, Kind::Tls, Kind::H2, Kind::Websocket, Kind::Tcp];

/// Where the dice are: a linear congruential generator (Knuth's MMIX), for moments and not for secrets.
struct Dice(u64);

impl Dice {
    fn up_to(&mut self, most: Duration) -> Duration {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        most.mul_f64((self.0 >> 33) as f64 / f64::from(1_u32 << 31))
    }
}

/// Keeps the sockets, and starts the proxy with them.
struct Supervisor {
    sockets: [TcpListener; 3],
}

impl Supervisor {
    fn new(place: &Place) -> Result<Self> {
        let bind = || TcpListener::bind("127.0.0.1:0").on("choose a port for", &place.run);
        Ok(Self {
            sockets: [bind()?, bind()?, bind()?],
        })
    }

    fn listens(&self, place: &Place) -> Result<Listens> {
        let address = |index: usize| {
            let socket: &TcpListener = &self.sockets[index];
            socket.local_addr().on("choose a port for", &place.run)
        };
        Ok(Listens {
            clear: address(0)?,
            tls: address(1)?,
            raw: address(2)?,
        })
    }

    /// Starts what `start` makes of a command that has the sockets from number 3 on, as sd_listen_fds(3) says.
    fn starting<T>(
        &self,
        place: &Place,
        backdrop_config: &std::path::Path,
        start: impl FnOnce(&Shell) -> Result<T>,
    ) -> Result<T> {
        let passed: Vec<OwnedFd> = self
            .sockets
            .iter()
            .map(|socket| {
                let copy = fcntl_dupfd_cloexec(socket, PASSED_FROM)?;
                fcntl_setfd(&copy, FdFlags::empty())?;
                Ok(copy)
            })
            .collect::<rustix::io::Result<_>>()
            .on("pass sockets to", &place.hopgate)?;
        let moves: Vec<String> = passed
            .iter()
            .enumerate()
            .map(|(index, socket)| format!("exec {}<&{1} {1}<&-", index + 3, socket.as_raw_fd()))
            .collect();
        let script = format!(
            "{}\nLISTEN_PID=$$ LISTEN_FDS={} exec {} run --config {}",
            moves.join("\n"),
            passed.len(),
            place.hopgate.display(),
            backdrop_config.display()
        );
        start(&Shell::new("bash").args(["-c", &script]))
    }
}

/// What all deaths together brought.
#[derive(Default)]
struct Notes {
    requests: Vec<Request>,
    cut: usize,
    faults: Vec<String>,
    came_back_wrong: Vec<String>,
}

/// Plays it so many times.
///
/// # Errors
/// When something of the lab fails or is interrupted, or the proxy refuses a command.
pub fn play(scene: &Scene<'_>, times: usize) -> Result<Played> {
    let place = scene.place;
    let supervisor = Supervisor::new(place)?;
    let listens = supervisor.listens(place)?;
    let (name, knobs) = (scene.case.name, Knobs::default());
    let backdrop = Backdrop::set(name, place, in_order(), knobs, listens)?;
    let config = backdrop.config.clone();
    let mut stage = supervisor.starting(place, &config, |shell| {
        Stage::with(shell, backdrop, listens, place)
    })?;
    let (mut notes, mut dice) = (Notes::default(), Dice(now_ns()));
    for number in 0..times {
        scene.now(&format!("death {} of {times}", number + 1));
        let again = |stage: &mut Stage| {
            supervisor.starting(place, &config, |shell| {
                *stage.proxy() = Process::start("proxy", shell, &stage.folder)?;
                let control = stage.control.clone();
                let limit = Duration::from_secs(READY_S);
                stage.proxy().wait_ready(limit, || control.answers())
            })
        };
        die_once(scene, &mut stage, number, &mut dice, &mut notes, again)?;
    }
    let tally = judge(&Evidence {
        requests: &notes.requests,
        executions: &executions(&stage)?,
        released: None,
        window: Knobs::default().window_max,
    });
    let clients = scene.clients;
    let row = Row {
        cut: Some(notes.cut),
        held: None,
        ..Row::of("hopgate", name, clients, &tally)
    };
    let wrong = notes.came_back_wrong.len();
    let marks = vec![
        Mark::new(
            format!(
                "came back holding at the same epoch ({} of {times})",
                times - wrong
            ),
            wrong == 0,
        ),
        Mark::new(
            format!(
                "nothing executed twice ({}), nothing executed of those cut ({})",
                row.doubled, row.unknown
            ),
            row.doubled + row.unknown == 0,
        ),
        Mark::new(
            format!("new clients see delay and no refusal ({})", row.failed),
            row.sent > 0 && row.failed + row.lost == 0,
        ),
    ];
    notes.faults.extend(notes.came_back_wrong);
    Ok(Played {
        rows: vec![row],
        marks,
        faults: notes.faults,
    })
}

fn groups(stage: &Stage, clients: usize) -> Vec<Group> {
    let each = (clients / 2 / KINDS.len()).max(1);
    KINDS.iter().map(|kind| group(stage, *kind, each)).collect()
}

fn die_once(
    scene: &Scene<'_>,
    stage: &mut Stage,
    number: usize,
    dice: &mut Dice,
    notes: &mut Notes,
    again: impl FnOnce(&mut Stage) -> Result<()>,
) -> Result<()> {
    let groups = groups(stage, scene.clients);
    let mut held = stage.crowd(&groups, 1)?;
    let mut coming = stage.crowd(&groups, 1)?;
    // A raw connection that comes before the hold is connected through, and in flight.
    stage.control.hold()?;
    held.run("connect", scene.patience())?;
    held.tell("send")?;
    // Every third time the register has moved on before the end comes.
    if number % 3 == 2 {
        stage.control.commit()?;
    }
    let before = registers(stage)?;
    scene.pause(dice.up_to(scene.freeze))?;
    stage.proxy().kill();
    coming.tell("connect")?;
    scene.pause(dice.up_to(scene.freeze / 3))?;
    again(stage)?;
    let after = registers(stage)?;
    let holds = stage
        .control
        .status()?
        .iter()
        .all(|service| matches!(service.gate, Gate::Holding | Gate::Draining));
    if before != after || !holds {
        notes.came_back_wrong.push(format!(
            "{before:?} before, {after:?} after, holding: {holds}"
        ));
    }
    coming.heard(scene.patience())?;
    coming.run("send", scene.patience())?;
    let count = groups.iter().map(|group| group.connections).sum();
    if !scene.until_held(stage, count)? {
        notes.faults.push("not all new clients were held".into());
    }
    match number % 3 {
        0 => stage.control.commit()?,
        1 => stage.control.abort()?,
        _ => {}
    }
    stage.control.release()?;
    coming.run("settle", scene.patience())?;
    held.heard(scene.patience())?;
    held.run("settle", scene.patience())?;
    let (cut, told) = (
        held.report(scene.patience())?,
        coming.report(scene.patience())?,
    );
    notes.requests.extend(told.requests);
    notes.faults.extend(told.faults);
    for mut request in cut.requests {
        // It was held and died with the proxy: nobody may ever execute it.
        if request.outcome == Outcome::Broken {
            request.outcome = Outcome::Left;
            notes.cut += 1;
        }
        notes.requests.push(request);
    }
    Ok(())
}

fn registers(stage: &Stage) -> Result<Vec<Register>> {
    let services = stage.control.status()?;
    if services.is_empty() {
        return Err(LabError::Differs {
            what: "the proxy has no services".into(),
        });
    }
    Ok(services.iter().map(|service| service.register).collect())
}
