//! As much of the protobuf encoding as CRIU's files and words need here: fields of numbers and of bytes.

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Walks the numbers and byte strings of a message; ends at the first thing that is not one.
pub(super) fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u64, Value<'_>)> {
    std::iter::from_fn(move || {
        let tag = varint(&mut rest)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut rest)?),
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                let (inner, after) = rest.split_at_checked(length)?;
                rest = after;
                Value::Bytes(inner)
            }
            _ => return None,
        };
        Some((tag >> 3, value))
    })
}

/// The first number that a field of a message holds.
pub(super) fn number(message: &[u8], field: u64) -> Option<u64> {
    fields(message).find_map(|(own, value)| match value {
        Value::Number(number) if own == field => Some(number),
        _ => None,
    })
}

/// The first byte string that a field of a message holds.
pub(super) fn bytes(message: &[u8], field: u64) -> Option<&[u8]> {
    fields(message).find_map(|(own, value)| match value {
        Value::Bytes(bytes) if own == field => Some(bytes),
        _ => None,
    })
}

/// Appends a field. Of a field that occurs twice and holds a number, the last counts.
pub(crate) fn put(message: &mut Vec<u8>, field: u64, value: Value<'_>) {
    match value {
        Value::Number(number) => {
            put_varint(message, field << 3);
            put_varint(message, number);
        }
        Value::Bytes(bytes) => {
            put_varint(message, field << 3 | 2);
            put_varint(message, bytes.len() as u64);
            message.extend_from_slice(bytes);
        }
    }
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn put_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_put_is_read(number: u64, text: Vec<u8>, field in 1_u64..1000) {
            let mut message = Vec::new();
            put(&mut message, field, Value::Number(number));
            put(&mut message, field + 1, Value::Bytes(&text));
            let read: Vec<_> = fields(&message).collect();
            let written = vec![(field, Value::Number(number)), (field + 1, Value::Bytes(&text))];
            prop_assert_eq!(read, written);
        }
    }
}
