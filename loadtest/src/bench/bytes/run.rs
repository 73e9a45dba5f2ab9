//! One run of the bench: link by link, set by set, the same source tree for every system, one copy at a time.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::bench::bytes::agent::{Copied, Source, Word};
use crate::bench::bytes::case::{Case, LinkCase, Thoroughness};
use crate::bench::bytes::database::Database;
use crate::bench::bytes::report::{CaseReport, Row};
use crate::bench::bytes::rivals::{self, Rsync};
use crate::bench::bytes::set::Set;
use crate::bench::bytes::stage::Stage;
use crate::bench::bytes::tree;
use crate::command::Shell;
use crate::interrupt;
use crate::lab::app::{App, ContainerKind};
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::folders::Folders;
use crate::lab::process::Process;
use crate::lab::rootfs::{self, Images};
use crate::lab::{packages, setup};
use crate::progress::Progress;

const PORT: u16 = 7443;
/// How long iperf3 sends for each figure, in seconds; a quick look sends for less.
const IPERF_S: u64 = 8;
const IPERF_QUICK_S: u64 = 2;
const OURS: &str = "hopgate";
const RIVALS: [Rsync; 2] = [Rsync::Plain, Rsync::Compressed];
/// Who copies, in turn.
const SYSTEMS: [&str; 3] = [OURS, Rsync::Plain.name(), Rsync::Compressed.name()];

/// Measures; `tell` hears of each case as soon as it is through.
///
/// # Errors
/// When the lab itself fails or is interrupted. A copy that fails or is not equal is part of the report.
pub fn run(
    cases: &[Case],
    thoroughness: Thoroughness,
    folders: &Folders,
    progress: &Progress,
    mut tell: impl FnMut(&CaseReport),
) -> Result<Vec<CaseReport>> {
    setup::root()?;
    let _alone = folders.lock("bench")?;
    let images = prepare(cases, folders, progress)?;
    let mut reports = Vec::new();
    let mut rest = cases;
    while let Some(first) = rest.first() {
        let count = rest
            .iter()
            .take_while(|case| case.link == first.link)
            .count();
        let (here, others) = rest.split_at(count);
        rest = others;
        let stage = Stage::build(&first.link, folders, progress)?;
        let flows = flows(&stage, &first.link, thoroughness, progress)?;
        for case in here {
            let one = One {
                case,
                thoroughness,
                stage: &stage,
                images: &images,
                folders,
                progress,
            };
            let mut report = one.measure()?;
            report.rows.extend(flows.iter().cloned());
            tell(&report);
            reports.push(report);
        }
    }
    Ok(reports)
}

fn prepare(cases: &[Case], folders: &Folders, progress: &Progress) -> Result<Images> {
    let _lock = folders.lock("install")?;
    packages::install(packages::WORLD, progress)?;
    packages::install(rivals::NEEDED, progress)?;
    let has_images = |case: &Case| matches!(case.set, Set::Wordpress | Set::Mariadb);
    if cases.iter().any(has_images) {
        rootfs::images(App::Wordpress, folders, progress)
    } else {
        Ok(Images { layers: Vec::new() })
    }
}

/// What the link gives, by iperf3 with one stream and with eight.
fn flows(
    stage: &Stage,
    link: &LinkCase,
    thoroughness: Thoroughness,
    progress: &Progress,
) -> Result<Vec<Row>> {
    let length = Duration::from_secs(match thoroughness {
        Thoroughness::Full => IPERF_S,
        Thoroughness::Quick => IPERF_QUICK_S,
    });
    let _server = rivals::iperf_server(stage)?;
    let mut rows = Vec::new();
    for (streams, system) in [(1, "iperf3 -P 1"), (8, "iperf3 -P 8")] {
        progress.now(format!("{}: {system}", link.name));
        let before = stage.sent()?;
        let flow = rivals::iperf(stage, streams, length)?;
        Stage::settle();
        rows.push(Row {
            set: "stream",
            link: link.link.to_string(),
            system,
            copy: "stream",
            seconds: flow.seconds,
            bytes_wire: stage.sent()? - before,
            bytes_data: flow.bytes,
            memory_bytes_max: None,
        });
    }
    Ok(rows)
}

/// One case on its stage.
struct One<'a> {
    case: &'a Case,
    thoroughness: Thoroughness,
    stage: &'a Stage,
    images: &'a Images,
    folders: &'a Folders,
    progress: &'a Progress,
}

impl One<'_> {
    fn measure(&self) -> Result<CaseReport> {
        let name = self.case.name();
        self.progress.now(format!("{name}: making the set"));
        self.stage.clear()?;
        let size = self.case.size(self.thoroughness);
        let (source, set) = (self.stage.source_tree(), self.case.set);
        let mut database = match set {
            Set::Mariadb => {
                let image = self.image(ContainerKind::Db)?;
                let started =
                    Database::start(self.stage, &image, size.bytes, self.folders, self.progress);
                Some(started?)
            }
            Set::Wordpress => {
                set.make(size, &self.image(ContainerKind::Web)?, &source)?;
                None
            }
            _ => {
                set.make(size, &PathBuf::new(), &source)?;
                None
            }
        };
        for system in RIVALS.map(Rsync::folder).into_iter().chain([OURS]) {
            let folder = self.stage.target_tree(system);
            fs::create_dir_all(&folder).on("create", &folder)?;
        }
        let mut report = CaseReport {
            name,
            rows: Vec::new(),
            failures: Vec::new(),
        };
        let mut ends = Ends::start(self.stage, self.folders)?;
        let mut copy = |system, (name, word, is_still)| {
            self.copy(system, (name, word, is_still), &mut ends, &mut report)
        };
        let delta = ("delta", Word::Frozen, true);
        if let Some(database) = &mut database {
            database.write(self.stage)?;
            for system in SYSTEMS {
                // Each has to make good what was written while it copied, as in a hop.
                copy(system, ("first", Word::First, false))?;
                database.freeze()?;
                copy(system, delta)?;
                database.thaw()?;
            }
        } else {
            for system in SYSTEMS {
                copy(system, ("first", Word::First, true))?;
            }
            set.change(size, &source)?;
            for system in SYSTEMS {
                copy(system, delta)?;
            }
        }
        Ok(report)
    }

    fn image(&self, kind: ContainerKind) -> Result<PathBuf> {
        let mut layers = self.images.layers.iter();
        let found = layers.find(|(known, _)| *known == kind);
        found
            .map(|(_, path)| path.clone())
            .ok_or_else(|| LabError::Output {
                program: "the maker of root file systems",
                what: format!("there is none of {}", kind.name()),
            })
    }

    /// One copy by one system; a tree that is still is compared afterwards.
    fn copy(
        &self,
        system: &'static str,
        (copy, word, is_still): (&'static str, Word, bool),
        ends: &mut Ends,
        report: &mut CaseReport,
    ) -> Result<()> {
        let source = self.stage.source_tree();
        let rival = RIVALS.into_iter().find(|rival| rival.name() == system);
        let target = self.stage.target_tree(rival.map_or(OURS, Rsync::folder));
        let bytes_data = match copy {
            "first" => tree::bytes(&source)?,
            _ => tree::changed_blocks(&target, &source)? * (16 << 10),
        };
        self.progress
            .now(format!("{}: {copy} copy by {system}", report.name));
        Stage::settle();
        let before = self.stage.sent()?;
        let seconds = match rival {
            Some(rival) => rivals::rsync(self.stage, rival, &source),
            None => ends.source.tell(word).map(|copied: Copied| copied.seconds),
        };
        let bytes_wire = self.stage.sent()? - before;
        let seconds = match seconds {
            Ok(seconds) => seconds,
            Err(_) if interrupt::requested() => return Err(LabError::Interrupted),
            Err(error) => {
                report
                    .failures
                    .push(format!("{copy} copy by {system}: {error}"));
                return Ok(());
            }
        };
        report.rows.push(Row {
            set: self.case.set.name(),
            link: self.case.link.link.to_string(),
            system,
            copy,
            seconds,
            bytes_wire,
            bytes_data,
            memory_bytes_max: rival.is_none().then(|| ends.memory_bytes_max()),
        });
        if is_still {
            let differences = tree::differences(&source, &target)?;
            let named = differences.into_iter();
            let failures = named.map(|what| format!("{copy} copy by {system}: {what}"));
            report.failures.extend(failures);
        }
        Ok(())
    }
}

/// Everything that runs during a case.
struct Ends {
    source: Source,
    target: Process,
    _daemon: Process,
}

impl Ends {
    fn start(stage: &Stage, folders: &Folders) -> Result<Self> {
        let address = Stage::address(PORT).to_string();
        let end = |verb: &str| {
            let shell = Shell::new(&folders.program).args([verb, &address, "--tls"]);
            shell.arg(stage.tls()).arg("--tree")
        };
        let target = end("bytes-target").arg(stage.target_tree(OURS));
        let source = end("bytes-source").arg(stage.source_tree());
        Ok(Self {
            target: stage.serve("bytes-target", target, PORT)?,
            source: Source::start(&stage.at("source", source))?,
            _daemon: rivals::daemon(stage)?,
        })
    }

    /// The most memory either end ever had.
    fn memory_bytes_max(&self) -> u64 {
        let peak = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("VmHWM:"))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok()
        };
        let ends = [self.source.pid(), self.target.pid()];
        ends.into_iter().filter_map(peak).max().unwrap_or(0) * 1024
    }
}
