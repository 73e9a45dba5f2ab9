//! A shim between a runtime and a CRIU that are threads of the test; nothing is dumped or restored.

use std::io::Read;
use std::thread::JoinHandle;

use super::super::protobuf::{Value, put};
use super::*;

const VERSION: [u8; 2] = [8, 10];
const RESTORE: [u8; 2] = [8, 2];
const DUMP: [u8; 2] = [8, 1];
const GOOD: [u8; 4] = [8, 6, 24, 1];
const REFUSAL: [u8; 4] = [8, 6, 24, 0];

/// What CRIU says of a step.
fn notification(step: &str) -> Vec<u8> {
    let (mut notify, mut message) = (Vec::new(), vec![8, 6, 16, 1]);
    put(&mut notify, 1, Value::Bytes(step.as_bytes()));
    put(&mut message, 5, Value::Bytes(&notify));
    message
}

/// A shim at work, and what is at its ends.
struct Scene {
    folder: tempfile::TempDir,
    agent: UnixListener,
    runtime: OwnedFd,
    criu: OwnedFd,
    shim: JoinHandle<io::Result<()>>,
}

impl Scene {
    fn new(at: ParkAt) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agent = sockets::bind(&folder.path().join(AGENT_SOCKET)).unwrap();
        let ((runtime, one), (criu, other)) = (rpc::pair().unwrap(), rpc::pair().unwrap());
        let process = Pid::from_raw(std::process::id().cast_signed()).unwrap();
        let ends = Ends {
            runtime: one,
            criu: other,
            process: pidfd_open(process, PidfdFlags::empty()).unwrap(),
        };
        let mut shim = Shim {
            parkings: Parking::ahead(folder.path()).unwrap(),
            folder: folder.path().to_owned(),
            at,
            network_namespace: "/there/is/none".into(),
            going_since: Instant::now(),
            went_on: Duration::ZERO,
            init_pid: None,
            frozen: None,
            fencing: None,
        };
        let shim = std::thread::spawn(move || shim.pass(&ends));
        Self {
            folder,
            agent,
            runtime,
            criu,
            shim,
        }
    }

    fn ask(&self, request: &[u8]) {
        rpc::send_with(&self.runtime, request, &[]).unwrap();
    }

    fn notify(&self, step: &str) {
        rpc::send_with(&self.criu, &notification(step), &[]).unwrap();
    }

    /// What comes to an end next.
    fn heard(end: &OwnedFd) -> Option<Vec<u8>> {
        rpc::receive(end).unwrap().map(|message| message.bytes)
    }

    /// Where the agent is told that CRIU is parked.
    fn stop(&self) -> Stop {
        let (stream, _) = self.agent.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str::<Parked>(&line).unwrap().stop
    }

    /// Gives a word, among others that are none; the stream ends when it has been carried out.
    fn tell(&self, word: &str) -> UnixStream {
        let path = self.folder.path().join(PARK_SOCKET);
        for nonsense in ["", "maybe\n"] {
            let mut stream = sockets::connect(&path).unwrap();
            stream.write_all(nonsense.as_bytes()).unwrap();
        }
        let mut stream = sockets::connect(&path).unwrap();
        stream.write_all(format!("{word}\n").as_bytes()).unwrap();
        stream
    }
}

fn until_carried_out(mut told: UnixStream) {
    let mut rest = Vec::new();
    told.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn a_restore_waits_for_its_trees_then_for_its_images_then_to_run() {
    let scene = Scene::new(ParkAt::Restore);
    scene.ask(&VERSION);
    assert_eq!(scene.stop(), Stop::Asked);
    let told = scene.tell("go");
    assert_eq!(Scene::heard(&scene.criu).unwrap(), VERSION);
    until_carried_out(told);
    rpc::send_with(&scene.criu, b"\x08\x0a\x10\x01", &[]).unwrap();
    assert_eq!(Scene::heard(&scene.runtime).unwrap(), b"\x08\x0a\x10\x01");
    scene.ask(&RESTORE);
    assert_eq!(scene.stop(), Stop::Ready);
    let told = scene.tell("go");
    assert_eq!(Scene::heard(&scene.criu).unwrap(), RESTORE);
    until_carried_out(told);
    // A step that is none of ours is between the two.
    scene.notify("setup-namespaces");
    assert_eq!(
        Scene::heard(&scene.runtime).unwrap(),
        notification("setup-namespaces")
    );
    scene.ask(&GOOD);
    assert_eq!(Scene::heard(&scene.criu).unwrap(), GOOD);
    // The agent need not wait for the runtime.
    scene.notify("post-restore");
    assert_eq!(scene.stop(), Stop::Restored);
    let told = scene.tell("go");
    assert_eq!(
        Scene::heard(&scene.runtime).unwrap(),
        notification("post-restore")
    );
    scene.ask(&GOOD);
    assert_eq!(Scene::heard(&scene.criu).unwrap(), GOOD);
    until_carried_out(told);
    rpc::send_with(&scene.criu, b"\x08\x02\x10\x01", &[]).unwrap();
    assert_eq!(Scene::heard(&scene.runtime).unwrap(), b"\x08\x02\x10\x01");
    drop(scene.runtime);
    assert_eq!(Scene::heard(&scene.criu), None);
    scene.shim.join().unwrap().unwrap();
}

#[test]
fn a_veto_ends_a_restore_wherever_it_stands() {
    for request in [VERSION, RESTORE] {
        let scene = Scene::new(ParkAt::Restore);
        scene.ask(&request);
        scene.stop();
        until_carried_out(scene.tell("veto"));
        assert_eq!(Scene::heard(&scene.criu), None);
        assert_eq!(Scene::heard(&scene.runtime), None);
    }
    let scene = Scene::new(ParkAt::Restore);
    scene.notify("post-restore");
    scene.ask(&VERSION);
    scene.stop();
    scene.tell("go");
    assert_eq!(Scene::heard(&scene.criu).unwrap(), VERSION);
    assert_eq!(scene.stop(), Stop::Restored);
    scene.ask(&GOOD);
    let told = scene.tell("veto");
    assert_eq!(Scene::heard(&scene.criu).unwrap(), REFUSAL);
    until_carried_out(told);
}

#[test]
fn what_the_runtime_refuses_is_refused_whatever_the_word() {
    let scene = Scene::new(ParkAt::Restore);
    scene.ask(&VERSION);
    scene.stop();
    scene.tell("go");
    assert_eq!(Scene::heard(&scene.criu).unwrap(), VERSION);
    scene.notify("post-restore");
    scene.stop();
    scene.ask(&REFUSAL);
    scene.tell("go");
    assert_eq!(Scene::heard(&scene.criu).unwrap(), REFUSAL);
}

#[test]
fn a_dump_goes_on_without_us_at_no_step_that_we_could_not_do() {
    for (step, why) in [
        ("pre-dump", "there/is/none"),
        ("post-dump", "nothing was frozen"),
    ] {
        let scene = Scene::new(ParkAt::Dump);
        scene.ask(&DUMP);
        assert_eq!(Scene::heard(&scene.criu).unwrap(), DUMP);
        scene.notify(step);
        // CRIU alone is told otherwise, and parked nowhere.
        assert_eq!(Scene::heard(&scene.runtime).unwrap(), notification(step));
        scene.ask(&GOOD);
        assert_eq!(Scene::heard(&scene.criu).unwrap(), REFUSAL);
        let said = std::fs::read_to_string(scene.folder.path().join(ERROR_FILE)).unwrap();
        assert!(said.contains(why) || said.contains("did not say"), "{said}");
    }
}

#[test]
fn the_end_of_either_is_the_end_of_the_other() {
    let scene = Scene::new(ParkAt::Dump);
    scene.ask(&VERSION);
    assert_eq!(Scene::heard(&scene.criu).unwrap(), VERSION);
    drop(scene.criu);
    assert_eq!(Scene::heard(&scene.runtime), None);
    let scene = Scene::new(ParkAt::Dump);
    scene.ask(&VERSION);
    assert_eq!(Scene::heard(&scene.criu).unwrap(), VERSION);
    scene.notify("pre-restore");
    drop(scene.runtime);
    assert_eq!(Scene::heard(&scene.criu), None);
}

#[test]
fn it_ends_as_its_runtime_does_and_says_when_there_is_none() {
    let ended = |runtime: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let runtime: Vec<OsString> = runtime.iter().map(OsString::from).collect();
        let code = run(folder.path(), ParkAt::Dump, Path::new("/"), &runtime);
        let said = std::fs::read_to_string(folder.path().join(ERROR_FILE)).unwrap_or_default();
        (format!("{code:?}"), said)
    };
    let (code, said) = ended(&["sh", "-c", "exit 7"]);
    assert_eq!(
        (code, said.as_str()),
        (format!("{:?}", ExitCode::from(7)), "")
    );
    let (code, said) = ended(&["/there/is/no/runc", "restore"]);
    assert_eq!(code, format!("{:?}", ExitCode::FAILURE));
    assert!(said.contains("cannot run /there/is/no/runc"), "{said}");
}
