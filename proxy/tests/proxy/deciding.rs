//! Who may serve: leases, commits, aborts and releases, and what becomes of those that come too late or twice.

use std::sync::Barrier;
use std::thread;

use cutover_protocol::hold::{Answer, Command, Gate, Refusal};
use cutover_protocol::id::{Epoch, Register, Site};

use crate::holding::two_sites;
use crate::world::{Control, Nobody, Plan, Stage, done, hold, web};

#[test]
fn a_lease_that_runs_out_reopens_to_the_source_at_the_next_epoch() {
    let (world, source, target) = two_sites();
    let mut control = world.control();
    done(control.say(&hold(Epoch(1), 200, 20_000)));
    let mut client = world.client();
    client.post("/held", "x");
    assert_eq!(client.message().body, "source POST /held x");
    assert_eq!(
        world.status().register,
        Register {
            epoch: Epoch(2),
            owner: Site::Source
        }
    );
    let late = control.say(&Command::Commit {
        service: web(),
        epoch: Epoch(1),
        to: Site::Target,
    });
    let Answer::Refused {
        reason, register, ..
    } = late
    else {
        panic!("{late:?}")
    };
    assert_eq!(
        (reason, register),
        (Refusal::WrongEpoch, Some(world.status().register))
    );
    assert_eq!((source.seen().len(), target.seen().len()), (1, 0));
}

#[test]
fn a_lease_that_runs_out_after_the_commit_releases_to_the_target() {
    let (world, source, target) = two_sites();
    let mut control = world.control();
    done(control.say(&hold(Epoch(1), 300, 20_000)));
    done(control.say(&Command::Commit {
        service: web(),
        epoch: Epoch(1),
        to: Site::Target,
    }));
    assert_eq!(
        world.client().get("/held").message().body,
        "target GET /held"
    );
    assert_eq!(
        world.status().register,
        Register {
            epoch: Epoch(2),
            owner: Site::Target
        }
    );
    assert_eq!((source.seen().len(), target.seen().len()), (0, 1));
}

#[test]
fn a_renewed_lease_lasts() {
    let (world, _source, _target) = two_sites();
    let mut control = world.control();
    done(control.say(&hold(Epoch(1), 60_000, 20_000)));
    let renewed = done(control.say(&Command::Renew {
        service: web(),
        epoch: Epoch(1),
        lease_ms: 90_000,
    }));
    assert!(renewed.lease_ms_left.unwrap() > 60_000);
    world.reopen();
    let late = control.say(&Command::Renew {
        service: web(),
        epoch: Epoch(1),
        lease_ms: 1,
    });
    assert!(
        matches!(
            late,
            Answer::Refused {
                reason: Refusal::WrongEpoch,
                ..
            }
        ),
        "{late:?}"
    );
}

#[test]
fn a_repeated_command_answers_done_and_the_loser_is_told_the_register() {
    let (world, _source, _target) = two_sites();
    let mut control = world.control();
    let commit = Command::Commit {
        service: web(),
        epoch: Epoch(1),
        to: Site::Target,
    };
    let abort = Command::Abort {
        service: web(),
        epoch: Epoch(1),
    };
    let release = |epoch, to| Command::Release {
        service: web(),
        epoch: Epoch(epoch),
        to,
    };

    let refused = |answer| match answer {
        Answer::Refused {
            reason, register, ..
        } => (reason, register.unwrap()),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(control.say(&commit)).0, Refusal::NotHolding);
    control.hold(Epoch(1));
    control.hold(Epoch(1));
    assert_eq!(
        refused(control.say(&release(1, Site::Source))).0,
        Refusal::WrongEpoch
    );
    done(control.say(&commit));
    done(control.say(&commit));
    let committed = Register {
        epoch: Epoch(2),
        owner: Site::Target,
    };
    assert_eq!(
        refused(control.say(&abort)),
        (Refusal::WrongEpoch, committed)
    );
    assert_eq!(
        refused(control.say(&release(2, Site::Source))),
        (Refusal::WrongOwner, committed)
    );
    done(control.say(&release(2, Site::Target)));
    done(control.say(&release(2, Site::Target)));
    done(control.say(&commit));

    control.hold(Epoch(2));
    let abort = Command::Abort {
        service: web(),
        epoch: Epoch(2),
    };
    done(control.say(&abort));
    done(control.say(&abort));
    let back = Command::Commit {
        service: web(),
        epoch: Epoch(2),
        to: Site::Source,
    };
    assert_eq!(
        refused(control.say(&back)),
        (
            Refusal::WrongEpoch,
            Register {
                epoch: Epoch(3),
                owner: Site::Target
            }
        )
    );
    done(control.say(&release(3, Site::Target)));
}

#[test]
fn of_two_contradictory_commands_exactly_one_wins() {
    let (world, _source, _target) = two_sites();
    for _ in 0..20 {
        let before = world.status().register;
        world.hold();
        let barrier = Barrier::new(2);
        let to = if before.owner == Site::Source {
            Site::Target
        } else {
            Site::Source
        };
        let commands = [
            Command::Commit {
                service: web(),
                epoch: before.epoch,
                to,
            },
            Command::Abort {
                service: web(),
                epoch: before.epoch,
            },
        ];
        let answers = thread::scope(|scope| {
            let run = |command| {
                let mut control = world.control();
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    control.say(&command)
                })
            };
            commands.map(run).map(|thread| thread.join().unwrap())
        });
        let after = world.status().register;
        assert_eq!(after.epoch, before.epoch.next());
        let [commit, abort] = &answers;
        let (winner, loser) = if after.owner == to {
            (commit, abort)
        } else {
            (abort, commit)
        };
        assert!(matches!(winner, Answer::Done { .. }), "{answers:?}");
        let Answer::Refused { register, .. } = loser else {
            panic!("{answers:?}")
        };
        assert_eq!(*register, Some(after));
        done(world.control().say(&Command::Release {
            service: web(),
            epoch: after.epoch,
            to: after.owner,
        }));
    }
}

#[test]
fn a_drain_that_is_overtaken_by_a_reopening_says_so() {
    let source = Stage::new();
    let world = Plan::new(source.address(), Nobody::new().address()).start();
    let mut client = world.client();
    client.get("/long");
    let mut upstream = source.accept();
    upstream.message();
    let mut control = world.control();
    let drain = thread::spawn(move || control.say(&hold(Epoch(1), 60_000, 60_000)));
    world.until(|status| status.gate == Gate::Draining);
    world.reopen();
    let answer = drain.join().unwrap();
    assert!(
        matches!(
            answer,
            Answer::Refused {
                reason: Refusal::NotHolding,
                ..
            }
        ),
        "{answer:?}"
    );
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.message().status(), 200);
}

#[test]
fn several_commanders_talk_at_once_and_nonsense_is_answered() {
    let (world, _source, _target) = two_sites();
    let mut one = world.control();
    let mut other = Control::connect(&world.folder);
    assert_eq!(one.status(), other.status());
    let unknown = one.say(&Command::Abort {
        service: "shop".parse().unwrap(),
        epoch: Epoch(1),
    });
    let Answer::Refused {
        reason: Refusal::UnknownService,
        message,
        ..
    } = unknown
    else {
        panic!("{unknown:?}")
    };
    assert_eq!(message, "no service is called shop; there is: web");

    let path = world.folder.path().join("control.sock");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    for nonsense in [
        "nonsense\n",
        "{\"command\":\"release\"}\n",
        "{\"command\":\"status\",\"servce\":\"web\"}\n",
    ] {
        let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        std::io::Write::write_all(&mut stream, nonsense.as_bytes()).unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut line).unwrap();
        assert!(line.contains("\"bad_command\""), "{line}");
    }
}

#[test]
fn a_change_that_cannot_be_made_durable_changes_nothing() {
    let (world, source, _target) = two_sites();
    std::fs::remove_dir_all(world.folder.path().join("state")).unwrap();
    let mut control = world.control();
    let answer = control.say(&hold(Epoch(1), 60_000, 20_000));
    assert!(
        matches!(
            answer,
            Answer::Refused {
                reason: Refusal::NotDurable,
                ..
            }
        ),
        "{answer:?}"
    );
    assert_eq!(world.status().gate, Gate::Open);
    assert_eq!(
        world.client().get("/goes-on").message().body,
        "source GET /goes-on"
    );
    std::fs::create_dir(world.folder.path().join("state")).unwrap();
    control.hold(Epoch(1));
    assert_eq!(source.seen(), ["GET /goes-on"]);
}
