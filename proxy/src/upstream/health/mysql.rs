//! A check by the greeting of MySQL or MariaDB, ended so that the database does not hold it against us.
//!
//! Whoever leaves after the greeting counts as a broken handshake, and `max_connect_errors` of those in a row from
//! one host, without a login in between, make the database refuse that host: seen on MariaDB 10.11, with a polite
//! close as with a reset. So a check logs in. A login that is denied counts in another place, which blocks nobody,
//! but is a line in the database's log; a user without rights and without a password leaves no trace at all.

use tokio::io::AsyncReadExt as _;

use super::probe::{CheckError, Wire, send};

/// Longest packet we read, in bytes; greetings have about a hundred.
const PACKET_BYTES_MAX: usize = 4096;
/// First byte of the packets we know.
const GREETING_9: u8 = 9;
const GREETING_10: u8 = 10;
const OK: u8 = 0;
const SWITCH: u8 = 0xfe;
const ERROR: u8 = 0xff;
/// COM_QUIT, the first packet of a command.
const QUIT: &[u8] = &[1, 0, 0, 0, 1];
/// CLIENT_LONG_PASSWORD, CLIENT_PROTOCOL_41, CLIENT_SECURE_CONNECTION, CLIENT_PLUGIN_AUTH.
const CAPABILITIES: u32 = 0x1 | 0x200 | 0x8000 | 0x8_0000;
/// utf8mb4_general_ci, known to every version since 5.5.
const COLLATION: u8 = 45;
const PLUGIN: &[u8] = b"mysql_native_password\0";
/// Who tries to log in where no user is configured.
const NOBODY: &str = "hopgate-health";
/// Questions about the kind of password before a verdict; one is usual.
const SWITCHES_MAX: u8 = 3;

struct Packet {
    sequence: u8,
    payload: Vec<u8>,
}

/// Reads the greeting, logs in without a password, and leaves.
pub(super) async fn greet(
    stream: &mut impl Wire,
    user: Option<&str>,
) -> Result<String, CheckError> {
    let greeting = read(stream).await?;
    let version = version_of(&greeting)?;
    let mut answer = login(user.unwrap_or(NOBODY));
    let mut sequence = greeting.sequence;
    for _ in 0..=SWITCHES_MAX {
        let verdict = async {
            write(stream, sequence.wrapping_add(1), &answer).await?;
            read(stream).await
        };
        let verdict = match (verdict.await, user) {
            (Ok(packet), _) => packet,
            // It has greeted, and nobody told us with whom it would rather speak.
            (Err(_), None) => return Ok(version),
            (Err(error), Some(_)) => return Err(error),
        };
        match (verdict.payload.first(), user) {
            (Some(&OK), _) => {
                // A database that is gone by now has heard all it has to.
                send(stream, QUIT).await.ok();
                return Ok(version);
            }
            (Some(&ERROR), Some(_)) => return Err(error_of(&verdict.payload)),
            (Some(&SWITCH), _) => {
                // No password is no bytes, whatever the plugin.
                sequence = verdict.sequence;
                answer.clear();
            }
            _ => break,
        }
    }
    match user {
        None => Ok(version),
        Some(_) => Err(CheckError::NotMysql),
    }
}

async fn read(stream: &mut impl Wire) -> Result<Packet, CheckError> {
    let ended = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => CheckError::Closed,
        _ => CheckError::Connection(error),
    };
    let mut head = [0; 4];
    stream.read_exact(&mut head).await.map_err(ended)?;
    let [low, middle, high, sequence] = head;
    let length = usize::from(low) | usize::from(middle) << 8 | usize::from(high) << 16;
    if length == 0 || length > PACKET_BYTES_MAX {
        return Err(CheckError::NotMysql);
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await.map_err(ended)?;
    Ok(Packet { sequence, payload })
}

async fn write(stream: &mut impl Wire, sequence: u8, payload: &[u8]) -> Result<(), CheckError> {
    let mut packet = Vec::with_capacity(4 + payload.len());
    // Shorter than 64 KiB: a user's name has a limit.
    let length = u32::try_from(payload.len())
        .unwrap_or_default()
        .to_le_bytes();
    packet.extend_from_slice(&length[..3]);
    packet.push(sequence);
    packet.extend_from_slice(payload);
    send(stream, &packet).await
}

/// The server's version, or the error it greets with.
fn version_of(greeting: &Packet) -> Result<String, CheckError> {
    match greeting.payload.split_first() {
        Some((&(GREETING_9 | GREETING_10), rest)) => {
            let version = rest.split(|byte| *byte == 0).next().unwrap_or_default();
            // MariaDB puts it in front for replicas that would refuse a version of two digits.
            let version = version.strip_prefix(b"5.5.5-").unwrap_or(version);
            Ok(String::from_utf8_lossy(version).into_owned())
        }
        Some((&ERROR, _)) => Err(error_of(&greeting.payload)),
        _ => Err(CheckError::NotMysql),
    }
}

/// HandshakeResponse41 with an empty password.
fn login(user: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend_from_slice(&CAPABILITIES.to_le_bytes());
    payload.extend_from_slice(&(1_u32 << 24).to_le_bytes());
    payload.push(COLLATION);
    payload.extend_from_slice(&[0; 23]);
    payload.extend_from_slice(user.as_bytes());
    // The end of the name, and an empty password's length.
    payload.extend_from_slice(&[0, 0]);
    payload.extend_from_slice(PLUGIN);
    payload
}

/// Code and message; before a login there is no SQL state in between, after it there is one of six bytes.
fn error_of(payload: &[u8]) -> CheckError {
    let [_, low, high, rest @ ..] = payload else {
        return CheckError::NotMysql;
    };
    let message = match rest {
        [b'#', _, _, _, _, _, message @ ..] => message,
        message => message,
    };
    CheckError::Mysql {
        code: u16::from_le_bytes([*low, *high]),
        message: String::from_utf8_lossy(message).into_owned(),
    }
}
