//! What `ctl status` says of the servers behind a service: whether they take requests and why not, and what they have
//! to do now.

use cutover_protocol::hold::{ServerState, ServerStatus};
use cutover_protocol::id::Site;

use crate::balancing::{addresses, group, until_servers};
use crate::held_upgrade::ctl;
use crate::world::{Nobody, Origin, Stage, World};

/// The lines that `ctl status web` has of servers at the source.
fn shown(world: &World) -> Vec<String> {
    let (code, said) = ctl(&world.folder, &["status", "web"]);
    assert_eq!(code, Some(0), "{said}");
    let lines = said.lines().skip_while(|line| !line.contains(" source "));
    let lines = lines.take_while(|line| !line.contains(" target "));
    lines.map(str::to_owned).collect()
}

fn server(world: &World, index: usize) -> ServerStatus {
    world.control().status().servers.remove(index)
}

#[test]
fn a_server_shows_what_it_has_to_do_and_what_it_keeps() {
    let stage = Stage::new();
    let world = group(&[stage.address().to_string()], "").start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = stage.accept();
    upstream.message();
    let busy = server(&world, 0);
    assert_eq!(
        (busy.state, busy.active, busy.connections),
        (ServerState::Up, 1, 1)
    );
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n");
    client.message();
    until_servers(&world, Site::Source, |servers| servers[0].active == 0);
    let idle = server(&world, 0);
    // Kept for the next request.
    assert_eq!((idle.requests, idle.connections), (1, 1));
    let lines = shown(&world);
    let address = stage.address();
    assert_eq!(
        lines,
        [
            format!("  source {address} of source: up, weight 1"),
            "    connections 1, in flight 0, requests 1, errors: 0 connecting, 0 answered 5xx, 0 broken".to_owned(),
        ]
    );
    drop(upstream);
    until_servers(&world, Site::Source, |servers| servers[0].connections == 0);
}

#[test]
fn a_server_that_is_down_says_what_its_last_check_found() {
    let (well, ill) = (Origin::new("well"), Nobody::new());
    let servers = [
        format!("{} weight = 3", well.address()),
        format!("{} backup = true", ill.address()),
    ];
    let checks = "[upstream.health]\ncheck = \"http\"\ninterval_ms = 20\nfall = 1";
    let world = group(&servers, checks).start();
    until_servers(&world, Site::Source, |servers| {
        servers[0].check.is_some() && servers[1].state == ServerState::Down
    });
    let lines = shown(&world);
    assert_eq!(
        lines[0],
        format!("  source {} of source: up, weight 3", well.address())
    );
    assert!(lines[2].starts_with("    last check good, "), "{lines:?}");
    assert!(lines[2].ends_with(" ms ago: status 200"), "{lines:?}");
    assert_eq!(
        lines[3],
        format!(
            "  source {} of source: down, weight 1, backup",
            ill.address()
        )
    );
    assert!(lines[5].starts_with("    last check bad, "), "{lines:?}");
    assert!(lines[5].contains("onnection refused"), "{lines:?}");
}

#[test]
fn a_server_that_is_ejected_says_why_and_for_how_long() {
    let (ill, well) = (Stage::new(), Origin::new("well"));
    let servers = [ill.address().to_string(), well.address().to_string()];
    let eject = "[upstream.eject]\nserver_errors = 1\nejected_ms_first = 200000";
    let world = group(&servers, eject).start();
    let mut client = world.client();
    client.get("/");
    let mut upstream = ill.accept();
    upstream.message();
    upstream.send("HTTP/1.1 500 Ill\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 500);
    until_servers(&world, Site::Source, |servers| {
        servers[0].state == ServerState::Ejected
    });
    let ejected = server(&world, 0).ejected.unwrap();
    assert_eq!(ejected.reason, "1 requests failed in a row");
    assert!(
        (100_000..=200_000).contains(&ejected.ms_left),
        "{ejected:?}"
    );
    let lines = shown(&world);
    let begins = format!("  source {} of source: ejected for ", ill.address());
    assert!(lines[0].starts_with(&begins), "{lines:?}");
    let ends = " ms more (1 requests failed in a row), weight 1";
    assert!(lines[0].ends_with(ends), "{lines:?}");
    assert!(
        lines[1].contains("errors: 0 connecting, 1 answered 5xx, 0 broken"),
        "{lines:?}"
    );
    // JSON has the same.
    let (_, said) = ctl(&world.folder, &["--json", "status", "web"]);
    assert!(said.contains(r#""state":"ejected""#), "{said}");
    assert!(
        said.contains(r#""ejected":{"reason":"1 requests failed in a row","ms_left":"#),
        "{said}"
    );
}

#[test]
fn a_server_that_came_back_says_how_far_it_has_come() {
    let (first, late) = (Origin::new("first"), Nobody::new());
    let checks = "slow_start_ms = 3600000\n[upstream.health]\ncheck = \"tcp\"\ninterval_ms = 20\nfall = 1\nrise = 1";
    let servers = [addresses(&[&first]).remove(0), late.address().to_string()];
    let world = group(&servers, checks).start();
    until_servers(&world, Site::Source, |servers| {
        servers[1].state == ServerState::Down
    });
    let _late = late.becomes("late");
    until_servers(&world, Site::Source, |servers| {
        servers[1].state == ServerState::SlowStart
    });
    assert_eq!(server(&world, 1).weight_percent, Some(1));
    assert_eq!(server(&world, 0).weight_percent, None);
    let lines = shown(&world);
    assert!(
        lines
            .iter()
            .any(|line| line.ends_with("of source: slow start, at 1 %, weight 1")),
        "{lines:?}"
    );
}
