//! Connections: who is let in, who is refused with which words, and how a dead peer is noticed.

use std::fs;
use std::time::Duration;

use cutover_agent::peer::{self, Part, PeerError, PeerTimeouts, Refusal};
use cutover_agent::pki;
use cutover_agent::tls::ClientTls;
use cutover_agent::transfer::{SyncOptions, TransferError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::cable::{Cable, Cut};
use crate::world::{LIMIT, TIMEOUTS, World, identity, picture, volume};

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_answered_and_a_round_trip_measured() {
    let world = World::new().await;
    let session = world.connect().await;
    let answer: String = session.call(&"well", LIMIT).await.unwrap();
    assert_eq!(answer, "well indeed");
    assert!(session.round_trip(3, LIMIT).await.unwrap() < LIMIT);
    assert!(
        session
            .measure(4 << 20, LIMIT)
            .await
            .unwrap()
            .bytes_per_second
            > 1e6
    );
    let wrong: Result<String, _> = session.call(&(1_u8, 255_u8, 3_u8), LIMIT).await;
    assert!(matches!(wrong, Err(PeerError::Vocabulary)), "{wrong:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_for_a_tree_is_carried_out_when_that_is_sealed() {
    let world = World::new().await;
    fs::write(world.here().join("page"), "one").unwrap();
    let session = world.connect().await;
    // What arrived before does not count.
    world.sync(&session).await.unwrap();
    let parts = [Part::Tree(volume())];
    let asked = session.call_after(&parts, &"restore", LIMIT).await;
    let mut answer = std::pin::pin!(asked.unwrap().answer());
    let other = session.call::<_, String>(&"first", LIMIT);
    tokio::select! {
        early = &mut answer => panic!("answered before the tree was there: {early:?}"),
        first = other => assert_eq!(first.unwrap(), "first indeed"),
    }
    fs::write(world.here().join("page"), "two").unwrap();
    world.sync(&session).await.unwrap();
    let answer: String = answer.await.unwrap();
    assert_eq!(answer, "restore indeed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_ends_with_its_connections() {
    let world = World::new().await;
    let cable = Cable::to(world.addr).await;
    let session = peer::connect(cable.addr, world.tls(), TIMEOUTS, 2)
        .await
        .unwrap();
    let parts = [Part::Tree(volume())];
    let asked = session.call_after(&parts, &"restore", LIMIT).await.unwrap();
    cable.cut.send_replace(Cut::Closed);
    let answer: Result<String, _> = asked.answer().await;
    assert!(matches!(answer, Err(PeerError::Lost { .. })), "{answer:?}");
    world.handler.ended.notified().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_authority_is_refused_on_both_sides() {
    let world = World::new().await;
    let foreign = world.folder.path().join("foreign");
    pki::create(&foreign).unwrap();
    let theirs = ClientTls::load(&identity(&foreign, "source"), "target").unwrap();
    let text = world.try_connect(theirs).await.unwrap_err().to_string();
    assert!(text.contains("both sites need the same ca.pem"), "{text}");
    let mut mixed = identity(&foreign, "source");
    mixed.ca = world.folder.path().join("tls/ca.pem");
    let text = world
        .try_connect(ClientTls::load(&mixed, "target").unwrap())
        .await
        .unwrap_err()
        .to_string();
    assert!(text.contains("the peer refused our certificate"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_the_wrong_role_is_refused_on_both_sides() {
    let world = World::new().await;
    let tls = world.folder.path().join("tls");
    let posing = ClientTls::load(&identity(&tls, "target"), "target").unwrap();
    let refused = world.try_connect(posing).await.unwrap_err();
    assert!(
        matches!(
            &refused,
            PeerError::Refused {
                refusal: Refusal::Role(_),
                ..
            }
        ),
        "{refused}"
    );
    assert!(
        refused.to_string().contains("not made out to \"source\""),
        "{refused}"
    );
    let other = ClientTls::load(&identity(&tls, "source"), "source").unwrap();
    let text = world.try_connect(other).await.unwrap_err().to_string();
    assert!(text.contains("not made out to \"source\""), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_session_is_refused_while_the_first_lives_and_let_in_when_it_is_gone() {
    let world = World::new().await;
    let first = world.connect().await;
    let short = PeerTimeouts {
        connect: Duration::from_millis(150),
        ..TIMEOUTS
    };
    let second = peer::connect(world.addr, world.tls(), short, 1)
        .await
        .unwrap_err();
    assert!(
        matches!(
            second,
            PeerError::Deadline { .. }
                | PeerError::Refused {
                    refusal: Refusal::Busy,
                    ..
                }
        ),
        "{second}"
    );
    let answer: String = first.call(&"still here", LIMIT).await.unwrap();
    assert_eq!(answer, "still here indeed");
    drop(first);
    world.connect().await;
    world.handler.ended.notified().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_nobody_listens_on_is_said_at_once() {
    let world = World::new().await;
    let free = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let text = peer::connect(free, world.tls(), TIMEOUTS, 1)
        .await
        .unwrap_err()
        .to_string();
    assert!(text.contains("is the agent running there"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_instead_of_tls_hurts_nobody() {
    let world = World::new().await;
    let mut stream = TcpStream::connect(world.addr).await.unwrap();
    stream.write_all(&[0x55; 3000]).await.unwrap();
    let mut end = Vec::new();
    // Closed or reset, whichever comes first.
    let _ = stream.read_to_end(&mut end).await;
    world.connect().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_link_is_noticed_by_the_heartbeat_on_both_sides() {
    let world = World::new().await;
    let cable = Cable::to(world.addr).await;
    let timeouts = PeerTimeouts {
        dead_after: Duration::from_millis(300),
        ..TIMEOUTS
    };
    let session = peer::connect(cable.addr, world.tls(), timeouts, 2)
        .await
        .unwrap();
    cable.cut.send_replace(Cut::Silent);
    assert_eq!(session.lost().await, "no sign of life for 300 ms");
    assert!(!session.is_alive());
    let answer: Result<String, _> = session.call(&"anybody?", LIMIT).await;
    assert!(answer.unwrap_err().to_string().contains("no sign of life"));
    world.handler.ended.notified().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_in_the_middle_fails_the_round_and_the_next_one_moves_only_the_rest() {
    let world = World::new().await;
    let cable = Cable::to(world.addr).await;
    let mut data = vec![0; 60 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut data);
    fs::write(world.here().join("big"), data).unwrap();
    let session = peer::connect(cable.addr, world.tls(), TIMEOUTS, 4)
        .await
        .unwrap();
    let mut carried = cable.carried.clone();
    let (outcome, _) = tokio::join!(world.sync(&session), async {
        carried.wait_for(|bytes| *bytes > 50 << 20).await.unwrap();
        cable.cut.send_replace(Cut::Closed);
    });
    let error = outcome.unwrap_err();
    assert!(
        matches!(error, TransferError::Peer(PeerError::Lost { .. })),
        "{error}"
    );
    assert!(
        world.sync(&session).await.is_err(),
        "a lost session stays lost"
    );
    let session = world.connect().await;
    let rest = world.sync(&session).await.unwrap();
    assert!(rest.bytes_data < 60 << 20, "{rest:?}");
    assert_eq!(picture(&world.here()), picture(&world.there()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_dies_is_noticed_at_once_and_a_new_one_takes_over() {
    let mut world = World::new().await;
    fs::write(world.here().join("x"), vec![7; 1 << 20]).unwrap();
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    world.restart().await;
    session.lost().await;
    drop(session);
    let session = world.connect().await;
    let report = world.sync(&session).await.unwrap();
    assert_eq!(report.bytes_data, 0, "it is all there still");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_forgot_is_asked_for_again() {
    let world = World::new().await;
    fs::write(world.here().join("x"), vec![7; 1 << 20]).unwrap();
    let session = world.connect().await;
    world.sync(&session).await.unwrap();
    fs::write(world.there().join("x"), "a restored container wrote here").unwrap();
    session.forget(&volume(), LIMIT).await.unwrap();
    session
        .sync(&volume(), &world.here(), SyncOptions::live(LIMIT))
        .await
        .unwrap();
    assert_eq!(picture(&world.here()), picture(&world.there()));
}
