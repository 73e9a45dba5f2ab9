//! Names turned at a real name server: Knot DNS on loopback, where it is installed. Without it these tests say so and
//! prove nothing.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_agent::names::update::TsigKey;
use cutover_agent::names::{Name, Names, Rfc2136};
use cutover_protocol::door::{Pointing, Redirect};

const KNOT: &str = "/usr/sbin/knotd";
const SECRET: [u8; 32] = *b"an example of thirty-two bytes..";
/// A busy machine takes its time; only a failure waits this long.
const LIMIT: Duration = Duration::from_secs(60);

struct Knot {
    child: Child,
    at: SocketAddr,
    folder: tempfile::TempDir,
}

impl Drop for Knot {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    // Both kinds of port, as a name server takes both.
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        if UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Knot {
    fn start() -> Option<Self> {
        if !std::path::Path::new(KNOT).exists() {
            eprintln!("left out: names need knotd of the package knot");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let (path, port) = (folder.path().display().to_string(), free_port());
        let secret = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, SECRET);
        let zone = "@ 3600 SOA ns.example.org. admin.example.org. 1 60 60 3600 60\n\
                    @ 3600 NS ns.example.org.\nns 3600 A 127.0.0.1\nwww 3600 A 192.0.2.1\nshop 3600 A 192.0.2.1\n";
        std::fs::write(folder.path().join("example.org.zone"), zone).unwrap();
        let text = format!(
            "server:\n    rundir: {path}\n    listen: 127.0.0.1@{port}\n    user: root\n\
             database:\n    storage: {path}\n\
             key:\n  - id: hopgate.\n    algorithm: hmac-sha256\n    secret: {secret}\n\
             acl:\n  - id: update\n    key: hopgate.\n    action: update\n\
             template:\n  - id: default\n    storage: {path}\n    zonefile-sync: -1\n    journal-content: none\n\
             zone:\n  - domain: example.org\n    file: example.org.zone\n    acl: update\n"
        );
        let configuration = folder.path().join("knot.conf");
        std::fs::write(&configuration, text).unwrap();
        let child = Command::new(KNOT)
            .arg("-c")
            .arg(&configuration)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let knot = Self {
            child,
            at: ([127, 0, 0, 1], port).into(),
            folder,
        };
        let begun = Instant::now();
        while knot.look_up("www").is_empty() {
            assert!(begun.elapsed() < LIMIT, "knotd does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(knot)
    }

    /// Addresses and time to live of a name, asked of the server itself.
    fn look_up(&self, name: &str) -> Vec<(IpAddr, u32)> {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let mut question = vec![0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in [name, "example", "org"] {
            question.push(label.len() as u8);
            question.extend_from_slice(label.as_bytes());
        }
        question.extend_from_slice(&[0, 0, 1, 0, 1]);
        let mut answer = [0; 1500];
        if socket.send_to(&question, self.at).is_err() {
            return Vec::new();
        }
        let Ok(read) = socket.recv(&mut answer) else {
            return Vec::new();
        };
        // Each answer: a pointer to the name, type, class, time to live, length, address.
        let records = answer[question.len()..read].chunks_exact(16);
        let count = usize::from(answer[7]);
        let address = |record: &[u8]| {
            let ttl_s = u32::from_be_bytes(record[6..10].try_into().unwrap());
            (
                IpAddr::from(<[u8; 4]>::try_from(&record[12..16]).unwrap()),
                ttl_s,
            )
        };
        let mut found: Vec<_> = records.take(count).map(address).collect();
        found.sort_unstable();
        found
    }

    fn names(&self, secret: &[u8]) -> Arc<Names> {
        let name = |name: &str| Name {
            name: format!("{name}.example.org"),
            zone: "example.org".to_owned(),
            ttl_s: 3600,
            source: vec![[192, 0, 2, 1].into()],
            target: vec![[198, 51, 100, 1].into()],
        };
        let provider = Rfc2136 {
            server: self.at,
            key: TsigKey::new("hopgate.", secret.to_vec()).unwrap(),
        };
        let names = vec![name("www"), name("shop")];
        Arc::new(Names::new(self.folder.path(), names, 30, Some(Arc::new(provider))).unwrap())
    }

    fn wait_for(&self, name: &str, wanted: &[(IpAddr, u32)]) {
        let begun = Instant::now();
        while self.look_up(name) != wanted {
            assert!(
                begun.elapsed() < LIMIT,
                "{name} is {:?}",
                self.look_up(name)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
const TARGET: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));

#[tokio::test(flavor = "multi_thread")]
async fn names_live_shortly_turn_at_the_commit_and_live_long_again() {
    let Some(knot) = Knot::start() else { return };
    let (names, hop) = (knot.names(&SECRET), "hop-1".parse().unwrap());
    names
        .prepare(&hop, (Redirect::AtOnce, 60), Vec::new())
        .await
        .unwrap();
    knot.wait_for("www", &[(SOURCE, 30)]);
    let following = Arc::clone(&names);
    let follow = tokio::spawn(async move { following.follow(None).await });
    names.commit(&hop).await.unwrap();
    knot.wait_for("www", &[(TARGET, 30)]);
    knot.wait_for("shop", &[(TARGET, 30)]);
    let door = names.old_door().await.unwrap();
    assert_eq!(
        door.names[0],
        ("www.example.org".to_owned(), Pointing::Target)
    );
    names.retire().await.unwrap();
    knot.wait_for("www", &[(TARGET, 3600)]);
    follow.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undone_hop_leaves_names_as_they_were() {
    let Some(knot) = Knot::start() else { return };
    let (names, hop) = (knot.names(&SECRET), "hop-1".parse().unwrap());
    names
        .prepare(&hop, (Redirect::AtOnce, 60), Vec::new())
        .await
        .unwrap();
    names.give_up(&hop).await.unwrap();
    knot.wait_for("www", &[(SOURCE, 3600)]);
    assert!(names.old_door().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn gradual_names_give_both_sites_first_and_a_restart_goes_on_from_there() {
    let Some(knot) = Knot::start() else { return };
    let (names, hop) = (knot.names(&SECRET), "hop-1".parse().unwrap());
    names
        .prepare(&hop, (Redirect::Gradual, 3), Vec::new())
        .await
        .unwrap();
    names.commit(&hop).await.unwrap();
    drop(names);
    // Another life of the agent: it remembers the commit, and turns what is to be turned by now.
    let again = knot.names(&SECRET);
    let following = Arc::clone(&again);
    let follow = tokio::spawn(async move { following.follow(None).await });
    knot.wait_for("www", &[(SOURCE, 30), (TARGET, 30)]);
    knot.wait_for("www", &[(TARGET, 30)]);
    follow.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_told_and_changes_nothing() {
    let Some(knot) = Knot::start() else { return };
    let names = knot.names(b"another secret");
    let told = names
        .prepare(
            &"hop-1".parse().unwrap(),
            (Redirect::AtOnce, 60),
            Vec::new(),
        )
        .await;
    let message = told.unwrap_err();
    assert!(
        message.starts_with("www.example.org: 127.0.0.1:"),
        "{message}"
    );
    assert!(message.contains("refused the update"), "{message}");
    knot.wait_for("www", &[(SOURCE, 3600)]);
}
