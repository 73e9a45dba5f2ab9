//! IPsec by strongSwan: ESP in tunnel mode, keys by IKEv2, told to charon over its control socket. charon is the
//! operator's; we load one connection and its key, and take them away again.
//!
//! Everything may pass the tunnel, and routes say what does: the kernel's ESP ends in an XFRM interface of our own
//! number, charon's own ESP (its plugin kernel-libipsec) in the TUN device `ipsec0`. So addresses flip by routes alone.

use std::io;
use std::path::Path;
use std::time::Duration;

use cutover_protocol::tunnel::flip;
use cutover_protocol::tunnel::{Carrier, Key};

use super::Counters;
use super::end::Made;
use super::netlink::Nest;
use super::network::Network;
use super::vici::{Item, Vici, find, list, section, text, value};

/// How long charon may take for one command; an exchange of keys over a slow link is the longest.
const COMMAND_MAX: Duration = Duration::from_secs(15);
/// What our XFRM interface and charon's connection have in common (linux/if_link.h: `IFLA_XFRM_IF_ID`).
const NUMBER: u32 = 7443;
const XFRM_NUMBER: u16 = 2;
/// The device of kernel-libipsec.
pub(super) const USER_DEVICE: &str = "ipsec0";
/// AES-GCM with 256 bits for packets; the same with ECDH on P-384 for the exchange.
const IKE: &str = "aes256gcm16-prfsha384-ecp384";
const ESP: &str = "aes256gcm16";

/// Who does ESP under this charon.
pub(super) fn carrier(socket: &Path) -> io::Result<Carrier> {
    let stats = Vici::connect(socket, COMMAND_MAX)?.order("stats", &[])?;
    let plugins = match find(&stats, "plugins") {
        Some(Item::List(_, plugins)) => plugins.clone(),
        _ => Vec::new(),
    };
    let in_user_space = plugins.iter().any(|plugin| plugin == b"kernel-libipsec");
    Ok(if in_user_space {
        Carrier::User
    } else {
        Carrier::Kernel
    })
}

/// Makes the device where it is ours to make, and loads connection and key. The source also begins.
pub(super) fn set_up(made: &Made, network: &mut Network) -> io::Result<()> {
    if made.carrier == Carrier::Kernel {
        let number = Nest::default().put(XFRM_NUMBER, &NUMBER.to_ne_bytes());
        network.make_device(made.device(), "xfrm", Some(&number))?;
    }
    let mut charon = Vici::connect(&made.charon, COMMAND_MAX)?;
    let name = made.hop.as_str();
    charon.order("load-shared", &shared(made))?;
    charon.order("load-conn", &[section(name, connection(made))])?;
    Ok(())
}

/// Has the two ends exchange keys; from the source only, when both are set up.
pub(super) fn begin(made: &Made) -> io::Result<()> {
    if made.end == flip::End::Target {
        return Ok(());
    }
    let limit = (COMMAND_MAX / 2).as_millis().to_string();
    let items = [
        value("child", made.hop.as_str()),
        value("ike", made.hop.as_str()),
        value("timeout", limit),
    ];
    Vici::connect(&made.charon, COMMAND_MAX)?
        .order("initiate", &items)
        .map(drop)
}

/// Ends the connection and takes away what was loaded. A charon that is gone has forgotten it anyway.
pub(super) fn take_down(made: &Made) -> io::Result<()> {
    let Ok(mut charon) = Vici::connect(&made.charon, COMMAND_MAX) else {
        return Ok(());
    };
    let name = made.hop.as_str();
    // First the definition, so that the other end's attempts find nothing; what is not there is taken away.
    let _ = charon.order("unload-conn", &[value("name", name)]);
    let _ = charon.order(
        "terminate",
        &[
            value("ike", name),
            value("force", "yes"),
            value("timeout", "-1"),
        ],
    );
    let _ = charon.order("unload-shared", &[value("id", name)]);
    Ok(())
}

fn identity(end: flip::End) -> &'static str {
    match end {
        flip::End::Source => "source.hopgate",
        flip::End::Target => "target.hopgate",
    }
}

const fn other(end: flip::End) -> flip::End {
    match end {
        flip::End::Source => flip::End::Target,
        flip::End::Target => flip::End::Source,
    }
}

fn shared(made: &Made) -> Vec<Item> {
    let owners =
        [flip::End::Source, flip::End::Target].map(|end| identity(end).as_bytes().to_vec());
    vec![
        value("id", made.hop.as_str()),
        value("type", "IKE"),
        value("data", secret(made).0),
        Item::List("owners".into(), owners.to_vec()),
    ]
}

/// Both sides have given half of the key: neither chooses it alone.
fn secret(made: &Made) -> Key {
    let (source, target) = match made.end {
        flip::End::Source => (made.secret, made.peer_key),
        flip::End::Target => (made.peer_key, made.secret),
    };
    let mut whole = blake3::Hasher::new_derive_key("hopgate IPsec key of a hop, version 1");
    whole.update(&source.0).update(&target.0);
    Key(*whole.finalize().as_bytes())
}

fn connection(made: &Made) -> Vec<Item> {
    let everything = if made.own().is_ipv4() {
        "0.0.0.0/0"
    } else {
        "::/0"
    };
    let mut child = vec![
        value("mode", "tunnel"),
        list("local_ts", everything),
        list("remote_ts", everything),
        list("esp_proposals", ESP),
        // A peer that is gone is asked for again for as long as the connection is loaded.
        value("dpd_action", "restart"),
        value(
            "close_action",
            if made.end == flip::End::Source {
                "start"
            } else {
                "none"
            },
        ),
    ];
    if made.carrier == Carrier::Kernel {
        child.extend([
            value("if_id_in", NUMBER.to_string()),
            value("if_id_out", NUMBER.to_string()),
        ]);
    }
    let mut connection = vec![
        value("version", "2"),
        value("mobike", "no"),
        value("dpd_delay", "5s"),
        value("keyingtries", "0"),
        list("proposals", IKE),
        section(
            "local",
            vec![value("auth", "psk"), value("id", identity(made.end))],
        ),
        section(
            "remote",
            vec![value("auth", "psk"), value("id", identity(other(made.end)))],
        ),
        section("children", vec![section(made.hop.as_str(), child)]),
    ];
    if made.end == flip::End::Source {
        connection.push(list("remote_addrs", made.outer.to_string()));
    }
    connection
}

/// What charon's connection has counted.
pub(super) fn counters(made: &Made) -> io::Result<Counters> {
    let events = Vici::connect(&made.charon, COMMAND_MAX)?.collect("list-sas", "list-sa")?;
    let mut counters = Counters::default();
    for ike in events
        .iter()
        .filter_map(|event| find(event, made.hop.as_str()))
    {
        let number = |items, name| text(items, name).and_then(|text| text.parse::<u64>().ok());
        let age = number(ike.items(), "established");
        counters.handshake_age_s = age.into_iter().chain(counters.handshake_age_s).min();
        for child in find(ike.items(), "child-sas").map_or(&[][..], Item::items) {
            counters.bytes_sent += number(child.items(), "bytes-out").unwrap_or(0);
            counters.bytes_received += number(child.items(), "bytes-in").unwrap_or(0);
        }
    }
    Ok(counters)
}
