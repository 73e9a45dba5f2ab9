//! What all cases share: clients come, everything is held, stands still, goes to the target and is released, and the
//! notes are compared.

use std::time::{Duration, Instant};

use crate::bench::hold::case::Case;
use crate::bench::hold::clock::now_ns;
use crate::bench::hold::crowd::Crowd;
use crate::bench::hold::judge::{Evidence, Released, Tally, judge};
use crate::bench::hold::plan::{
    Execution, First, Group, Kind, Manner, Posts, Redirects, Request, Wave,
};
use crate::bench::hold::stage::{Place, Stage};
use crate::interrupt;
use crate::lab::error::{LabError, Result};
use crate::progress::Progress;

/// Longest wait for clients and the proxy, in seconds, beside a second for so many requests.
const PATIENCE_S: u64 = 60;
const REQUESTS_PER_S: usize = 500;
/// How long memory is left to settle before it is looked at, in milliseconds.
const SETTLE_MS: u64 = 500;
/// How long clients that never pause have the service to themselves, before and after, in milliseconds.
const STEADY_MS: u64 = 500;
/// Failures that are shown, at most.
const FAULTS_MAX: usize = 5;

/// A case and what it is played with.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// The case.
    pub case: &'a Case,
    /// Clients, or requests.
    pub clients: usize,
    /// How long everything stands still.
    pub freeze: Duration,
    /// Where.
    pub place: &'a Place,
    /// Who hears how far we are.
    pub progress: &'a Progress,
}

/// When the clients connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coming {
    /// Before the hold.
    Before,
    /// While the service is held already.
    Held,
}

/// Who plays in a scene of waves.
#[derive(Debug, Clone)]
pub struct Cast {
    /// Those that send when everything is held.
    pub waves: Vec<Group>,
    /// Client processes for them, at least.
    pub processes_min: usize,
    /// Those that never pause.
    pub steady: Vec<Group>,
    /// When the former connect.
    pub coming: Coming,
    /// Requests that the proxy may have under way to the target at once.
    pub window: usize,
}

/// What a scene of waves brought.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Requests and executions compared.
    pub tally: Tally,
    /// Growth of the proxy's memory for each held request.
    pub bytes_per_held: Option<f64>,
    /// The same by the proxy's own count.
    pub counted_per_held: Option<f64>,
    /// Most requests the target had at once, from the release on.
    pub peak: usize,
    /// What went wrong, as clients saw it.
    pub faults: Vec<String>,
}

/// Clients of one kind that send one wave of one request each.
#[must_use]
pub fn group(stage: &Stage, kind: Kind, connections: usize) -> Group {
    Group {
        kind,
        address: stage.listens.of(kind),
        connections,
        streams: 1,
        more: 0,
        posts: Posts::Half,
        first: First::Wait,
        redirects: Redirects::Fail,
        manner: Manner::Waves,
    }
}

impl Scene<'_> {
    /// How long clients may take for something.
    #[must_use]
    pub fn patience(&self) -> Duration {
        Duration::from_secs(PATIENCE_S + (self.clients / REQUESTS_PER_S) as u64)
    }

    /// Says what happens now.
    pub fn now(&self, what: &str) {
        self.progress.now(format!("{}: {what}", self.case.name));
    }

    /// Waits, unless the lab is interrupted.
    ///
    /// # Errors
    /// When it is.
    pub fn pause(&self, length: Duration) -> Result<()> {
        interrupt::pause(length);
        if interrupt::requested() {
            return Err(LabError::Interrupted);
        }
        Ok(())
    }

    /// Waits until the proxy holds `count`. Clients that were refused never will be: then the scene goes on, and the
    /// notes will tell.
    ///
    /// # Errors
    /// When the proxy does not answer, or the lab is interrupted.
    pub fn until_held(&self, stage: &Stage, count: usize) -> Result<bool> {
        let deadline = Instant::now() + self.patience();
        loop {
            let held = stage.control.held_now()?;
            self.now(&format!("{held} of {count} held"));
            if held >= count as u64 {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            self.pause(Duration::from_millis(50))?;
        }
    }

    /// One request of each kind, so that what is set up once is not counted for the first client.
    ///
    /// # Errors
    /// When it fails.
    pub fn prime(&self, stage: &mut Stage) -> Result<Vec<Request>> {
        let groups = Kind::ALL.map(|kind| Group {
            first: First::Ask,
            streams: 0,
            ..group(stage, kind, 1)
        });
        let mut crowd = stage.crowd(&groups, 1)?;
        crowd.run("connect", self.patience())?;
        Ok(crowd.report(self.patience())?.requests)
    }

    /// Plays it.
    ///
    /// # Errors
    /// When something of the lab fails or is interrupted, or the proxy ends or refuses a command.
    pub fn waves(&self, stage: &mut Stage, cast: &Cast) -> Result<Outcome> {
        let mut requests = self.prime(stage)?;
        let mut crowd = stage.crowd(&cast.waves, cast.processes_min)?;
        let mut steady = stage.crowd(&cast.steady, 1)?;
        if cast.coming == Coming::Before {
            self.now("clients connect");
            crowd.run("connect", self.patience())?;
        }
        steady.run("connect", self.patience())?;
        steady.run("send", self.patience())?;
        self.pause(Duration::from_millis(STEADY_MS))?;
        stage.control.hold()?;
        let holding_since = Instant::now();
        let (held_bytes, counted_bytes) = self.fill(stage, cast, &mut crowd)?.unzip();
        self.now("standing still");
        self.pause(self.freeze.saturating_sub(holding_since.elapsed()))?;
        let released = release(stage)?;
        self.now("released");
        crowd.run("settle", self.patience())?;
        self.pause(Duration::from_millis(STEADY_MS))?;
        steady.run("stop", self.patience())?;
        stage.lives()?;
        let peak = stage.target.seen()?.peak;
        let (told, others) = (
            crowd.report(self.patience())?,
            steady.report(self.patience())?,
        );
        requests.extend(told.requests.into_iter().chain(others.requests));
        let mut faults: Vec<String> = told.faults.into_iter().chain(others.faults).collect();
        faults.truncate(FAULTS_MAX);
        let tally = judge(&Evidence {
            requests: &requests,
            executions: &executions(stage)?,
            released: Some(released),
            window: cast.window,
        });
        let suspects = tally.verdict.suspects.iter();
        faults.extend(suspects.take(FAULTS_MAX).cloned());
        Ok(Outcome {
            tally,
            bytes_per_held: held_bytes,
            counted_per_held: counted_bytes,
            peak,
            faults,
        })
    }

    /// Fills the held queue, and says how much memory one request of the last wave took: by the kernel's word, and by
    /// the proxy's.
    fn fill(&self, stage: &Stage, cast: &Cast, crowd: &mut Crowd) -> Result<Option<(f64, f64)>> {
        let steady: usize = cast.steady.iter().map(|group| group.connections).sum();
        let count = |wave| -> usize { cast.waves.iter().map(|group| group.requests(wave)).sum() };
        self.until_held(stage, steady)?;
        let now = || Ok::<_, LabError>((stage.resident_bytes(), stage.control.held_bytes()?));
        let before = now()?;
        if cast.coming == Coming::Held {
            self.now("clients connect to a service that is held");
            crowd.run("connect", self.patience())?;
        }
        crowd.run("send", self.patience())?;
        let (first, more) = (count(Wave::Held), count(Wave::More));
        if !self.until_held(stage, steady + first)? {
            return Ok(None);
        }
        self.pause(Duration::from_millis(SETTLE_MS))?;
        let with_first = now()?;
        let growth = |before: (u64, u64), after: (u64, u64), count: usize| {
            let each = |before: u64, after: u64| after.saturating_sub(before) as f64 / count as f64;
            (count > 0).then(|| (each(before.0, after.0), each(before.1, after.1)))
        };
        if more == 0 {
            return Ok(growth(before, with_first, first));
        }
        crowd.run("more", self.patience())?;
        if !self.until_held(stage, steady + first + more)? {
            return Ok(None);
        }
        self.pause(Duration::from_millis(SETTLE_MS))?;
        Ok(growth(with_first, now()?, more))
    }
}

/// Commits to the other site and releases.
///
/// # Errors
/// When a command is refused.
pub fn release(stage: &Stage) -> Result<Released> {
    stage.control.commit()?;
    stage.target.count_anew()?;
    let asked_ns = now_ns();
    stage.control.release()?;
    Ok(Released {
        asked_ns,
        done_ns: now_ns(),
    })
}

/// What both origins have executed.
///
/// # Errors
/// When one does not answer.
pub fn executions(stage: &Stage) -> Result<Vec<Execution>> {
    let mut all = stage.source.seen()?.executions;
    all.extend(stage.target.seen()?.executions);
    Ok(all)
}
