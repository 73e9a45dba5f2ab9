//! Takes apart what the kernel writes about changes (fanotify(7)). Nothing in a buffer is trusted: what is not
//! understood to its last byte counts as a loss, and whoever asks for changes then has to look at everything.

/// `FANOTIFY_METADATA_VERSION`.
const VERSION: u8 = 3;
/// `struct fanotify_event_metadata`.
const EVENT_BYTES: usize = 24;
/// `struct fanotify_event_info_header` and the file system's id behind it.
const INFO_BYTES: usize = 12;
/// Length and kind of a handle.
const HANDLE_HEAD_BYTES: usize = 8;
/// `MAX_HANDLE_SZ`: the longest handle the kernel makes.
pub(super) const HANDLE_BYTES_MAX: usize = 128;
/// `FILEID_INVALID`: a handle that could not be made.
const HANDLE_INVALID: i32 = 0xff;

/// What changes the names in a directory.
const NAMES: u64 = libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO;
/// What changes a file or a directory itself.
const OBJECTS: u64 = libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE | libc::FAN_ATTRIB;
/// What we ask to be told of.
pub(super) const WANTED: u64 = NAMES | OBJECTS | libc::FAN_ONDIR;

/// How the kernel names a file or a directory for as long as it exists, whatever its path: name_to_handle_at(2).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Handle {
    pub(super) kind: i32,
    /// At most [`HANDLE_BYTES_MAX`].
    pub(super) bytes: Box<[u8]>,
}

/// What one event tells.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told<'a> {
    /// Something of this name came into a directory, or left it.
    Name { directory: Handle, name: &'a [u8] },
    /// This file or directory was written to, or its attributes were changed.
    Object(Handle),
}

/// Something is missing, or is not understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lost;

/// Tells of every event in what was read at once.
///
/// # Errors
/// When the kernel's queue ran over, or anything does not read as expected; what was told before stays true.
pub(super) fn parse<'a>(mut buffer: &'a [u8], mut tell: impl FnMut(Told<'a>)) -> Result<(), Lost> {
    while !buffer.is_empty() {
        let length = u32_at(buffer, 0)? as usize;
        let event = buffer.get(..length).ok_or(Lost)?;
        parse_event(event, &mut tell)?;
        buffer = &buffer[length..];
    }
    Ok(())
}

fn parse_event<'a>(event: &'a [u8], tell: &mut impl FnMut(Told<'a>)) -> Result<(), Lost> {
    let head = usize::from(u16_at(event, 6)?);
    let mask = u64::from_ne_bytes(array_at(event, 8)?);
    let is_known = event.get(4) == Some(&VERSION) && head >= EVENT_BYTES;
    if !is_known || mask & libc::FAN_Q_OVERFLOW != 0 {
        return Err(Lost);
    }
    let mut infos = event.get(head..).ok_or(Lost)?;
    let (mut place, mut object) = (None, None);
    while !infos.is_empty() {
        let length = usize::from(u16_at(infos, 2)?);
        let info = infos.get(..length).ok_or(Lost)?;
        let (handle, rest) = handle(info)?;
        match info[0] {
            libc::FAN_EVENT_INFO_TYPE_DFID_NAME => {
                let end = rest.iter().position(|byte| *byte == 0).ok_or(Lost)?;
                place = Some((handle, &rest[..end]));
            }
            libc::FAN_EVENT_INFO_TYPE_FID => object = Some(handle),
            _ => return Err(Lost),
        }
        infos = &infos[length..];
    }
    if mask & OBJECTS != 0 {
        // A directory is spoken of by itself and the name ".".
        let itself = place.as_ref().filter(|(_, name)| *name == b".");
        let itself = itself.map(|(directory, _)| directory.clone());
        tell(Told::Object(object.or(itself).ok_or(Lost)?));
    }
    if mask & NAMES != 0 {
        let (directory, name) = place.filter(|(_, name)| is_name(name)).ok_or(Lost)?;
        tell(Told::Name { directory, name });
    }
    Ok(())
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.contains(&b'/')
}

/// The handle in a record, and what follows it.
fn handle(info: &[u8]) -> Result<(Handle, &[u8]), Lost> {
    let head = info.get(INFO_BYTES..).ok_or(Lost)?;
    let length = u32_at(head, 0)? as usize;
    let kind = i32::from_ne_bytes(array_at(head, 4)?);
    let bytes = head.get(HANDLE_HEAD_BYTES..).ok_or(Lost)?;
    if length == 0 || length > HANDLE_BYTES_MAX || length > bytes.len() || kind == HANDLE_INVALID {
        return Err(Lost);
    }
    let (bytes, rest) = bytes.split_at(length);
    let bytes = bytes.into();
    Ok((Handle { kind, bytes }, rest))
}

fn array_at<const BYTES: usize>(bytes: &[u8], at: usize) -> Result<[u8; BYTES], Lost> {
    let found = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    found.copied().ok_or(Lost)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Lost> {
    array_at(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Lost> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(kind: u8, handle: &[u8], name: Option<&[u8]>) -> Vec<u8> {
        let mut tail = Vec::new();
        tail.extend_from_slice(&[7; 8]);
        tail.extend_from_slice(&(handle.len() as u32).to_ne_bytes());
        tail.extend_from_slice(&1_i32.to_ne_bytes());
        tail.extend_from_slice(handle);
        if let Some(name) = name {
            tail.extend_from_slice(name);
            tail.push(0);
        }
        while tail.len() % 4 != 0 {
            tail.push(0);
        }
        let mut info = vec![kind, 0];
        info.extend_from_slice(&(tail.len() as u16 + 4).to_ne_bytes());
        info.extend(tail);
        info
    }

    fn event(mask: u64, infos: &[Vec<u8>]) -> Vec<u8> {
        let infos = infos.concat();
        let mut event = Vec::new();
        event.extend_from_slice(&((EVENT_BYTES + infos.len()) as u32).to_ne_bytes());
        event.extend_from_slice(&[VERSION, 0]);
        event.extend_from_slice(&(EVENT_BYTES as u16).to_ne_bytes());
        event.extend_from_slice(&mask.to_ne_bytes());
        event.extend_from_slice(&[0xff; 8]);
        event.extend(infos);
        event
    }

    fn told(buffer: &[u8]) -> Result<Vec<Told<'_>>, Lost> {
        let mut told = Vec::new();
        parse(buffer, |one| told.push(one)).map(|()| told)
    }

    fn handle_of(bytes: &[u8]) -> Handle {
        Handle {
            kind: 1,
            bytes: bytes.into(),
        }
    }

    const PLACE: u8 = libc::FAN_EVENT_INFO_TYPE_DFID_NAME;
    const OBJECT: u8 = libc::FAN_EVENT_INFO_TYPE_FID;

    #[test]
    fn names_and_objects_are_told_in_their_order() {
        let mut buffer = event(libc::FAN_CREATE, &[info(PLACE, b"dir_", Some(b"new"))]);
        let infos = [
            info(PLACE, b"dir_", Some(b"old")),
            info(OBJECT, b"filefile", None),
        ];
        buffer.extend(event(libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE, &infos));
        let itself = [info(PLACE, b"dir_", Some(b"."))];
        buffer.extend(event(libc::FAN_ATTRIB | libc::FAN_ONDIR, &itself));
        let name = Told::Name {
            directory: handle_of(b"dir_"),
            name: b"new",
        };
        let object = Told::Object(handle_of(b"filefile"));
        let directory = Told::Object(handle_of(b"dir_"));
        assert_eq!(told(&buffer), Ok(vec![name, object, directory]));
    }

    #[test]
    fn what_says_too_little_is_a_loss() {
        let alone = |mask, infos: &[Vec<u8>]| event(mask, infos);
        let bad = [
            alone(libc::FAN_Q_OVERFLOW, &[]),
            // Written to, by a name that may be of another file.
            alone(libc::FAN_MODIFY, &[info(PLACE, b"dir_", Some(b"x"))]),
            alone(libc::FAN_CREATE, &[info(PLACE, b"dir_", Some(b"."))]),
            alone(libc::FAN_CREATE, &[info(PLACE, b"dir_", Some(b".."))]),
            alone(libc::FAN_CREATE, &[info(PLACE, b"dir_", Some(b"a/b"))]),
            alone(libc::FAN_CREATE, &[info(PLACE, b"dir_", Some(b""))]),
            alone(libc::FAN_CREATE, &[info(PLACE, b"dir_", None)]),
            alone(libc::FAN_CREATE, &[info(PLACE, b"", Some(b"x"))]),
            alone(libc::FAN_CREATE, &[info(PLACE, &[1; 132], Some(b"x"))]),
            alone(libc::FAN_CREATE, &[info(77, b"dir_", Some(b"x"))]),
            alone(libc::FAN_CREATE, &[]),
        ];
        for buffer in bad {
            assert_eq!(told(&buffer), Err(Lost), "{buffer:?}");
        }
    }

    #[test]
    fn no_prefix_and_no_damaged_byte_of_a_buffer_is_read_beyond_its_end() {
        let infos = [
            info(PLACE, b"dir_", Some(b"old")),
            info(OBJECT, b"filefile", None),
        ];
        let whole = event(libc::FAN_MODIFY, &infos);
        for end in 1..whole.len() {
            assert_eq!(told(&whole[..end]), Err(Lost), "{end}");
        }
        for at in 0..whole.len() {
            for value in [0, 1, 3, 0x7f, 0x80, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                // Whatever it says: it ends, without a panic.
                let _ = told(&damaged);
            }
        }
    }
}
