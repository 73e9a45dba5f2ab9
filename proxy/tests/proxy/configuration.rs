//! Every file under `configs` that concerns the proxy is loaded; those that must be refused say why in their own
//! first line, word for word.

use std::path::{Path, PathBuf};
use std::process::Command as Process;

use hopgate_proxy::config::{Config, Protocol};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|end| end == "toml"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{}", folder.display());
    files
}

#[test]
fn every_valid_file_loads() {
    let mut valid = files(&configs().join("proxy"));
    valid.push(configs().join("lab/wordpress/proxy.toml"));
    valid.push(configs().join("lab/counter/proxy.toml"));
    for path in valid {
        Config::load(&path).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn the_full_file_shows_every_default() {
    let full = Config::load(&configs().join("proxy/full.toml")).unwrap();
    let mut minimal = Config::load(&configs().join("proxy/minimal.toml")).unwrap();
    // Services share the machine, and the full file has more of them.
    let ours = &mut minimal.limits;
    assert!(
        ours.held_bytes_max > full.limits.held_bytes_max && ours.held_max >= full.limits.held_max
    );
    (ours.held_max, ours.held_bytes_max) = (full.limits.held_max, full.limits.held_bytes_max);
    assert_eq!(
        format!("{:?}", full.limits),
        format!("{:?}", minimal.limits)
    );
    assert_eq!(
        format!("{:?}", full.release),
        format!("{:?}", minimal.release)
    );
    assert_eq!(format!("{:?}", full.quic), format!("{:?}", minimal.quic));
    assert_eq!(full.workers, minimal.workers);
    let mut services = full.services.iter();
    let database = services.find(|service| service.name.as_str() == "database");
    assert_eq!(database.unwrap().protocol, Protocol::Tcp);
    let lines = std::fs::read_to_string(configs().join("proxy/minimal.toml")).unwrap();
    assert!(lines.lines().count() <= 10);
}

#[test]
fn relative_paths_are_taken_from_the_folder_of_the_file() {
    let path = configs().join("proxy/minimal.toml");
    let config = Config::load(&path).unwrap();
    assert!(config.state_dir.is_absolute());
    assert_eq!(config.state_dir.file_name(), Some("state".as_ref()));
    assert_eq!(
        config.control.parent().unwrap().canonicalize().unwrap(),
        configs().join("proxy").canonicalize().unwrap()
    );
}

#[test]
fn every_invalid_file_is_refused_with_the_words_of_its_first_line() {
    for path in files(&configs().join("proxy/invalid")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = text.lines().next().unwrap().strip_prefix("# ").unwrap();
        let error = Config::load(&path).expect_err(&path.display().to_string());
        assert_eq!(error.to_string(), format!("{}: {expected}", path.display()));
    }
}

#[test]
fn a_refused_configuration_is_one_line_and_exit_code_two() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("bad.toml"), "stat_dir = \"x\"\n").unwrap();
    for (verb, file, said) in [
        (
            "check",
            "bad.toml",
            "hopgate-proxy: bad.toml: unknown key \"stat_dir\" in the top of the file; did you mean \"state_dir\"?\n",
        ),
        (
            "run",
            "none.toml",
            "hopgate-proxy: none.toml: cannot be read (No such file or directory (os error 2)); check the path given to --config\n",
        ),
    ] {
        let output = Process::new(env!("CARGO_BIN_EXE_hopgate-proxy"))
            .current_dir(folder.path())
            .args([verb, "--config", file])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(String::from_utf8(output.stderr).unwrap(), said);
    }
}

#[test]
fn the_full_file_shows_every_default_of_a_group_of_servers() {
    let full = Config::load(&configs().join("proxy/full.toml")).unwrap();
    let minimal = Config::load(&configs().join("proxy/minimal.toml")).unwrap();
    assert_eq!(full.resolver, minimal.resolver);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("proxy.toml");
    let text = "state_dir = \"s\"\ncontrol = \"c\"\n[[upstream]]\nname = \"web-source\"\n\
                servers = [{ address = \"10.0.0.11:80\" }]\n[upstream.health]\ncheck = \"http\"\n[upstream.eject]\n\
                [[service]]\nname = \"web\"\nlisten = \"127.0.0.1:0\"\nsource = \"10.0.0.1:80\"\ntarget = \"10.0.1.1:80\"\n";
    std::fs::write(&path, text).unwrap();
    let mut least = Config::load(&path).unwrap().upstreams.remove(0);
    let shown = full.upstreams[0].clone();
    assert_eq!(shown.servers[0], least.servers[0]);
    least.servers = shown.servers.clone();
    assert_eq!(shown, least);
}
