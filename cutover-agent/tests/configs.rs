//! Every example configuration in the repository: the valid ones load, each invalid one is refused with exactly the
//! message in its first line, `# expected: …`. In that message the file's own path stands as FILE.

#![allow(clippy::unwrap_used)] // helpers of tests, outside of test functions

use std::path::{Path, PathBuf};

use cutover_agent::config::{Config, ConfigError, load_plan};

/// What a file claims to be.
#[derive(Debug, Clone, Copy)]
enum Meant {
    Agent,
    Plan,
}

impl Meant {
    fn load(self, path: &Path) -> Result<(), ConfigError> {
        match self {
            Self::Agent => Config::load(path).map(drop),
            Self::Plan => load_plan(path).map(drop),
        }
    }
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

/// The TOML files directly in a folder, sorted; a folder without any is a mistake in this test.
fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "toml"))
        .collect();
    assert!(
        !files.is_empty(),
        "{} holds no .toml file",
        folder.display()
    );
    files.sort();
    files
}

fn expectation(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let first = text.lines().next().unwrap_or_default();
    first
        .strip_prefix("# expected: ")
        .unwrap_or_else(|| panic!("{} does not begin with `# expected: `", path.display()))
        .to_owned()
}

fn refusal(meant: Meant, path: &Path) -> String {
    match meant.load(path) {
        Ok(()) => "it was accepted".to_owned(),
        Err(error) => error
            .to_string()
            .replace(&path.display().to_string(), "FILE"),
    }
}

fn assert_loads(meant: Meant, path: &Path) {
    if let Err(error) = meant.load(path) {
        panic!("{error}");
    }
}

/// All differences at once, so that a changed message is mended in one go.
fn assert_each_is_refused_as_it_says(meant: Meant, folder: &Path) {
    let wrong: Vec<String> = files_in(folder)
        .iter()
        .filter_map(|path| {
            let (expected, told) = (expectation(path), refusal(meant, path));
            (expected != told).then(|| {
                format!(
                    "{}\n  expected: {expected}\n  told:     {told}",
                    path.display()
                )
            })
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_example_of_an_agent_loads() {
    for path in files_in(&configs().join("agent")) {
        assert_loads(Meant::Agent, &path);
    }
}

#[test]
fn every_example_of_a_plan_loads() {
    for path in files_in(&configs().join("plan")) {
        assert_loads(Meant::Plan, &path);
    }
}

#[test]
fn every_configuration_of_the_lab_loads() {
    let lab = configs().join("lab");
    let apps: Vec<PathBuf> = std::fs::read_dir(lab)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        // The benchmark's folder has no application that hops.
        .filter(|folder| folder.join("plan.toml").exists())
        .collect();
    assert!(apps.len() >= 2, "{apps:?}");
    for app in apps {
        assert_loads(Meant::Agent, &app.join("source.toml"));
        assert_loads(Meant::Agent, &app.join("target.toml"));
        assert_loads(Meant::Plan, &app.join("plan.toml"));
    }
}

#[test]
fn every_bad_agent_configuration_is_refused_in_its_own_words() {
    assert_each_is_refused_as_it_says(Meant::Agent, &configs().join("agent/invalid"));
}

#[test]
fn every_bad_plan_is_refused_in_its_own_words() {
    assert_each_is_refused_as_it_says(Meant::Plan, &configs().join("plan/invalid"));
}

#[test]
fn a_relative_path_is_taken_from_the_folder_of_its_file() {
    let path = configs().join("lab/counter/source.toml");
    let config = Config::load(&path).unwrap();
    let folder = std::path::absolute(path.parent().unwrap()).unwrap();
    assert_eq!(config.control, folder.join("source.sock"));
}
